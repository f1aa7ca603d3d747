"""What `laplace` says of a solver that is not exact enough, and of derivatives that are not those of the solution."""

import re
import warnings

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest

import laplode as lp


def messages(model, problem, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lp.laplace(model, problem, curvature="ggn", progress=False, **options)
    return [str(each.message) for each in caught if re.search("solve|derivatives", str(each.message))]


class Decay(eqx.Module):
    rate: jax.Array

    def __call__(self, t, y, args):
        return -self.rate * y


def decay(unit, rtol=1e-6, atol=1e-8, **options):
    ts = np.linspace(0, 2, 6)
    data = lp.Trajectories(ts, unit * np.exp(-ts)[:, None], y0=[unit])
    controller = diffrax.PIDController(rtol, atol)
    model = lp.NeuralODE(Decay(jnp.array(1.0)), stepsize_controller=controller, **options)
    return model, lp.Problem(data, lp.Gaussian(0.01 * unit), 1.0)


def test_a_good_solver_is_not_mentioned():
    assert messages(*decay(1.0)) == []


def test_an_absolute_tolerance_above_the_states_is_named_with_one_to_take():
    (found,) = messages(*decay(1e-9))
    assert "`atol` = 1e-08" in found and "Take atol=1e-14" in found
    assert messages(*decay(1e-9, atol=1e-15)) == []


def test_a_relative_tolerance_above_the_noise_is_named():
    (found,) = messages(*decay(1.0, rtol=0.1, observe=lambda y, args: y))
    assert "`rtol` = 0.1" in found and "Take rtol=" in found


class Late(eqx.Module):
    decay: jax.Array
    lag: jax.Array

    def __call__(self, t, y, args):
        return jnp.where(t < self.lag, 0.0, 1.0) - self.decay * y


def test_a_discontinuity_that_moves_with_a_parameter_is_found():
    ts = np.linspace(0, 4, 9)
    into = np.clip(ts - 0.7, 0, None)
    ys = ((1 - np.exp(-0.5 * into)) / 0.5)[:, None]
    model = lp.NeuralODE(Late(jnp.array(0.5), jnp.array(0.7)))
    problem = lp.Problem(lp.Trajectories(ts, ys, y0=[0.0]), lp.Gaussian(0.03), 1.0)
    with pytest.warns(lp.LaplodeWarning, match=r"vector_field\.lag.*A jump whose place depends on a parameter"):
        posterior = lp.laplace(model, problem, curvature="ggn", progress=False)
    assert posterior.size == 1  # no number is told that derivatives know nothing of


class Heat(eqx.Module):
    """Of its two rates the data see one combination."""

    diffusion: jax.Array
    source: jax.Array

    def __call__(self, t, u, args):
        padded = jnp.pad(u, 1)
        laplacian = padded[2:] - 2 * u + padded[:-2]
        return self.diffusion * laplacian * (len(u) + 1) ** 2 + self.source * u


def test_sensitivities_that_are_errors_of_an_explicit_solver_are_found():
    cells, ts = 40, np.linspace(0, 0.5, 4)
    u0 = np.sin(np.pi * np.arange(1, cells + 1) / (cells + 1))
    decays = 0.1 - 0.1 * (2 * (cells + 1) * np.sin(np.pi / (2 * (cells + 1)))) ** 2
    model = lp.NeuralODE(Heat(jnp.array(0.1), jnp.array(0.1)))
    data = lp.Trajectories(ts, np.exp(decays * ts)[:, None] * u0, y0=u0)
    (found,) = messages(model, lp.Problem(data, lp.Gaussian(0.003), 1e-4))
    assert "solver=diffrax.Kvaerno5()" in found and "rtol=1e-06" in found


class Wave(eqx.Module):
    gain: jax.Array
    phase: jax.Array

    def __call__(self, t, y, args):
        return self.gain * jnp.cos(1000 * self.phase) + 0 * y


def test_a_sharply_curved_model_is_not_taken_for_a_wrong_derivative():
    # At the crest no derivative says how far the predictions fall at a distance of a hundredth.
    model = lp.NeuralODE(Wave(jnp.array(1.0), jnp.array(0.0)))
    data = lp.Trajectories(np.linspace(0, 2, 6), np.linspace(0, 2, 6)[:, None], y0=[0.0])
    assert messages(model, lp.Problem(data, lp.Gaussian(1.0), 1.0)) == []


class Exchange(eqx.Module):
    """Two pools that exchange fast, one of which loses: data see the loss, and of the exchange the ratio alone."""

    speed: jax.Array
    ratio: jax.Array
    loss: jax.Array

    def __call__(self, t, y, args):
        flow = jnp.exp(self.speed) * (y[0] - self.ratio * y[1])
        return jnp.stack([-flow, flow - self.loss * y[1]])


@pytest.mark.parametrize(
    ("solver", "scale", "said"),
    [
        pytest.param(diffrax.Tsit5(), 1e-3, r"speed.*errors of the solver \(Tsit5, rtol.*Kvaerno5", id="explicit"),
        pytest.param(diffrax.Kvaerno5(), 1e-3, None, id="implicit"),
        # Solutions at neighboring values, which begin off the slow manifold, are less exact than the derivatives.
        pytest.param(diffrax.Kvaerno5(), 1e-2, None, id="implicit, far neighbors"),
    ],
)
def test_a_stiff_field_is_told_of_its_solver_and_not_of_a_discontinuity(solver, scale, said):
    ts, y0, speed = np.linspace(0, 4, 8), np.array([1 / 3, 2 / 3]), np.log(3e3)
    # Its slow solution: the exchange is in balance all the time.
    ys = np.exp(-0.6 / 1.5 * ts)[:, None] * y0
    model = lp.NeuralODE(Exchange(*map(jnp.array, (speed, 0.5, 0.6))), solver=solver, max_steps=20_000)
    found = messages(model, lp.Problem(lp.Trajectories(ts, ys, y0), lp.Gaussian(scale), 1e-2))
    assert re.search(said, found[0]) and len(found) == 1 if said else found == []


# ---- Models of one's own, whose solver is not known


def in_two(field, condition, after, ts, y0, root_finder):
    """A state up to an event, and from what `after` makes of it there on."""
    options = dict(dt0=None, stepsize_controller=diffrax.PIDController(1e-9, 1e-10), max_steps=64, throw=False)
    options |= dict(adjoint=diffrax.DirectAdjoint())
    both = diffrax.SaveAt(subs=[diffrax.SubSaveAt(ts=ts), diffrax.SubSaveAt(t1=True)])
    solve = lambda t0, t1, y0, **more: diffrax.diffeqsolve(
        diffrax.ODETerm(field), diffrax.Tsit5(), t0=t0, t1=t1, y0=y0, **options, **more
    )
    first = solve(ts[0], ts[-1], y0, event=diffrax.Event(condition, root_finder), saveat=both)
    when = first.ts[1][0]
    late = diffrax.SaveAt(ts=jnp.maximum(ts, when))
    second = solve(when, ts[-1] + 1e-6, after(first.ys[1][0]), saveat=late)
    before = (ts < when)[:, None]
    return jnp.where(before, jnp.where(before, first.ys[0], 0), second.ys)


class Bouncing(eqx.Module):
    gravity: jax.Array
    bounce: jax.Array
    root_finder: optimistix.Newton | None = eqx.field(static=True)

    def __call__(self, ts, y0):
        field = lambda t, y, args: jnp.stack([y[1], -self.gravity - 0.2 * y[1]])
        after = lambda y: jnp.stack([0 * y[0], -self.bounce * y[1]])
        return in_two(field, lambda t, y, args, **_: y[0], after, ts, y0, self.root_finder)[:, :1]


class Stopped(eqx.Module):
    """Fed up to a time that is a parameter; the field jumps in the step in which the event is found."""

    stop: jax.Array
    rate: jax.Array
    root_finder: optimistix.Newton = eqx.field(static=True)

    def __call__(self, ts, y0):
        field = lambda t, y, args: self.rate * jnp.where(t < self.stop, 1.0, 0.0) - 0.2 * y
        event = lambda t, y, args, **_: self.stop - t
        return in_two(field, event, lambda y: y, ts, y0, self.root_finder)


class Forgotten(eqx.Module):
    """A derivative of one's own that leaves a term out."""

    rate: jax.Array
    shape: jax.Array

    def __call__(self, ts, y0):
        kept = jax.lax.stop_gradient(self.rate)
        return y0 * jnp.exp(-(0.5 * self.rate + 0.5 * kept) * ts**self.shape)[:, None]


class Closed(eqx.Module):
    rate: jax.Array

    def __call__(self, ts, y0):
        return jnp.exp(-self.rate * (ts - ts[0]))[:, None] * (1.0 if y0 is None else y0)


class Alone(Closed):
    """Starts where it likes."""

    def __call__(self, ts, y0):
        return super().__call__(ts, None)


@pytest.mark.parametrize("model", [Closed(jnp.array(1.0)), lp.NeuralODE(Decay(jnp.array(1.0)))], ids=["own", "ready"])
def test_states_of_an_earlier_time_are_named(model):
    ts = np.linspace(0, 2, 6)
    said = lambda ts, ys: [m for m in everything(model, lp.Trajectories(ts, ys, [1.0])) if "earlier time" in m]
    late = np.exp(-(ts + 1))[:, None] + 0.01
    (found,) = said(ts + 1, late)
    assert "At the first time, 1, channel 0 of trajectory 0" in found
    begun = np.concatenate([[[np.nan]], late])
    assert said(np.append(0, ts + 1), begun) == []


def everything(model, data):
    problem = lp.Problem(data, lp.Gaussian(0.02), 1.0)
    fit = lp.refine(model, problem, curvature="ggn", progress=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lp.laplace(fit.model, problem, curvature="ggn", progress=False)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("model", "scale", "said"),
    [
        pytest.param(Closed(jnp.array(1.0)), 0.01, None, id="good"),
        pytest.param(Closed(jnp.array(1.0)), 1e-8, "noise of channel 0 has a standard deviation of 1e-08", id="noise"),
        pytest.param(Alone(jnp.array(1.0)), 0.01, "initial states of the data have no influence", id="states"),
    ],
)
def test_what_else_is_said_of_ones_own_model(model, scale, said):
    ts = np.linspace(0, 2, 6)
    problem = lp.Problem(lp.Trajectories(ts, np.exp(-ts)[:, None], [1.0]), lp.Gaussian(scale), 1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lp.laplace(model, problem, curvature="ggn", progress=False)
    found = [str(each.message) for each in caught if "decrement" not in str(each.message)]
    assert found == [] if said is None else len(found) == 1 and said in found[0]


NEWTON = optimistix.Newton(1e-10, 1e-10)


@pytest.mark.parametrize(
    ("model", "y0", "named"),
    [
        pytest.param(Bouncing(jnp.array(9.81), jnp.array(0.7), NEWTON), [1.0, 0.0], None, id="found"),
        pytest.param(Stopped(jnp.array(0.53), jnp.array(2.0), NEWTON), [0.5], "stop", id="a jump in the last step"),
        pytest.param(Forgotten(jnp.array(1.0), jnp.array(1.5)), [0.5], "rate", id="stop_gradient in part"),
    ],
)
def test_derivatives_of_ones_own_model_that_are_wrong_are_found(model, y0, named):
    ts = np.linspace(0, 1, 9)
    clean = np.asarray(model(ts, jnp.asarray(y0)))
    data = lp.Trajectories(ts, clean + 0.01 * np.sin(np.arange(9))[:, None], y0)
    found = messages(model, lp.Problem(data, lp.Gaussian(0.02), 1e-2))
    if named is None:
        assert found == []
    else:
        assert len(found) == 1 and f"The derivatives of `model` in {named} are not those" in found[0]

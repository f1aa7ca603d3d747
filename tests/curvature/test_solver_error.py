"""What `laplace` says of a solver that is not exact enough, and of derivatives that are not those of the solution."""

import re
import warnings

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplode as lp


def messages(model, problem, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lp.laplace(model, problem, curvature="ggn", progress=False, **options)
    return [str(each.message) for each in caught if "solve" in str(each.message)]


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

"""Replayed steps have the values of the adaptive solve, and its derivatives by every route."""

import warnings

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplode as lp
from laplode._model.parameters import parameters
from laplode._solve.flows import ForeignFlow, ReplayedFlow
from laplode._solve.maps import evaluate, flow, linearize, replayed

ADAPTIVE = diffrax.PIDController(rtol=1e-5, atol=1e-7)
FIXED = dict(stepsize_controller=diffrax.ConstantStepSize(), dt0=0.05, max_steps=128)
TS = np.stack([np.linspace(0, 2, 6), np.sort(np.r_[0.3, 0.3 + 2 * np.random.default_rng(0).random(5)])])
Y0 = np.array([[1.0, -0.5], [0.3, 0.8]])

# Two trajectories on grids of their own, of different lengths and starts.


class Rotation(eqx.Module):
    """Nonlinear, forced by time, with two parameters."""

    frequency: jax.Array
    damping: jax.Array

    def __call__(self, t, y, args):
        position, velocity = y
        force = jnp.cos(t) if args is None else args * jnp.cos(t)
        return jnp.stack([velocity, -(self.frequency**2) * jnp.sin(position) - self.damping * velocity + force])


def rotation(**options):
    return lp.NeuralODE(Rotation(jnp.array(1.3), jnp.array(0.2)), **options)


def plain(model, ts=TS, y0=Y0, args=None):
    """By diffeqsolve itself."""
    return jax.jit(jax.vmap(lambda ts, y0, args: model(ts, y0, args, throw=False)))(ts, y0, args)


SOLVERS = {
    "Tsit5": dict(solver=diffrax.Tsit5(), stepsize_controller=ADAPTIVE),
    "Dopri5": dict(solver=diffrax.Dopri5(), stepsize_controller=ADAPTIVE),
    "Heun": dict(solver=diffrax.Heun(), stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-5)),
    "Euler": dict(solver=diffrax.Euler(), **FIXED),
    "Kvaerno5": dict(solver=diffrax.Kvaerno5(), stepsize_controller=ADAPTIVE),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_replay_equals_the_adaptive_solve(name):
    model = rotation(**SOLVERS[name])
    view = parameters(model)
    around = flow(view, TS, Y0, None)
    assert isinstance(around, ReplayedFlow)
    np.testing.assert_allclose(evaluate(around, view.vector), plain(model), rtol=1e-12, atol=1e-12)


def test_grids_start_and_end_where_the_times_do():
    around = flow(parameters(rotation(stepsize_controller=ADAPTIVE)), TS, Y0, None)
    starts, ends = around.steps.starts, around.steps.ends
    np.testing.assert_array_equal(starts[:, 0], TS[:, 0])
    np.testing.assert_array_equal(ends[:, -1], TS[:, -1])
    assert np.all(around.steps.lengths >= 0)
    np.testing.assert_array_equal(starts[:, 1:], ends[:, :-1])


class Seen(eqx.Module):
    gain: jax.Array

    def __call__(self, y, args):
        return jnp.stack([self.gain * y[0] * y[1], jnp.tanh(y[0]), y[1] ** 2 + self.gain])


def full_model(**options):
    """Learned initial state, a parametric observation of three channels, and forcing."""
    return rotation(y0=[0.4, -0.1], observe=Seen(jnp.array(0.7)), **options)


def test_sensitivities_equal_forward_differentiation():
    view = parameters(full_model(stepsize_controller=ADAPTIVE))
    around = flow(view, TS, None, jnp.array([0.5, 1.5]))
    assert around.jacobian_route() == "sensitivity"
    predictions, jacobian = linearize(around)
    assert predictions.shape == (2, 6, 3) and jacobian.shape == (36, 5)

    def solve(theta):
        def one(ts, args):
            model = view.unravel(theta)
            saveat = diffrax.SaveAt(ts=ts)
            states = model.solve(ts, None, args, saveat=saveat, adjoint=diffrax.ForwardMode(), throw=False).ys
            return model.observe_states(states, args)

        return jax.vmap(one)(TS, jnp.array([0.5, 1.5]))

    np.testing.assert_allclose(predictions, jax.jit(solve)(view.vector), rtol=1e-12, atol=1e-12)
    expected = jax.jit(jax.jacfwd(solve))(view.vector).reshape(36, 5)
    np.testing.assert_allclose(jacobian, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("route", ["jvp", "vjp"])
def test_every_route_gives_the_same_jacobian(route):
    view = parameters(full_model(stepsize_controller=ADAPTIVE))
    around = flow(view, TS, None, jnp.array([0.5, 1.5]))
    by = eqx.filter_jit(lambda flow, theta, route: flow.linearized(theta, route)[1])
    expected = linearize(around)[1]
    np.testing.assert_allclose(by(around, view.vector, route), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_implicit_solvers_take_automatic_differentiation():
    view = parameters(rotation(**SOLVERS["Kvaerno5"]))
    around = flow(view, TS, Y0, None)
    assert around.jacobian_route() in ("jvp", "vjp")
    direction, step = jnp.array([0.6, -0.8]), 1e-4
    ahead, behind = (evaluate(around, view.vector + sign * step * direction) for sign in (1, -1))
    expected = np.ravel(ahead - behind) / (2 * step)
    np.testing.assert_allclose(linearize(around)[1] @ direction, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_each_trajectory_stands_alone():
    """Padding a short trajectory to the steps of a long one changes neither."""
    view = parameters(rotation(stepsize_controller=ADAPTIVE))
    values, jacobian = linearize(flow(view, TS, Y0, None))
    ts = np.stack([TS[1], TS[1] * 8])
    padded, padded_jacobian = linearize(flow(view, ts, Y0[[1, 1]], None))
    np.testing.assert_allclose(padded[0], values[1], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(padded_jacobian[:12], jacobian[12:], rtol=1e-11, atol=1e-12)


# ---- Foreign models


class Foreign(eqx.Module):
    """Someone's own module around diffeqsolve."""

    field: eqx.Module
    adjoint: diffrax.AbstractAdjoint

    def __call__(self, ts, y0):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(self.field),
            diffrax.Heun(),
            t0=ts[0],
            t1=ts[-1],
            dt0=0.05,
            y0=y0,
            saveat=diffrax.SaveAt(ts=ts),
            adjoint=self.adjoint,
            max_steps=64,
        ).ys


def pair(adjoint):
    ys = np.random.default_rng(1).normal(size=(2, 6, 2))
    problem = lp.Problem(lp.Trajectories(TS, ys, Y0), lp.Gaussian(0.5), 1.0)
    native = rotation(solver=diffrax.Heun(), **FIXED)
    return Foreign(native.vector_field, adjoint), native, problem


def silent(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)
        return lp.laplace(*arguments, progress=False, **options)


@pytest.fixture(scope="module")
def native_ggn():
    _, native, problem = pair(None)
    return silent(native, problem, curvature="ggn")


@pytest.mark.parametrize(
    "adjoint", [diffrax.RecursiveCheckpointAdjoint(), diffrax.ForwardMode()], ids=lambda a: type(a).__name__
)
def test_ggn_of_a_foreign_model_whatever_its_adjoint(adjoint, native_ggn):
    foreign, _, problem = pair(adjoint)
    posterior = silent(foreign, problem, curvature="ggn")
    assert isinstance(posterior.flow, ForeignFlow)
    np.testing.assert_allclose(posterior.precision(), native_ggn.precision(), rtol=1e-8)


def test_hessian_of_a_foreign_model_shows_the_line_to_change():
    foreign, _, problem = pair(diffrax.RecursiveCheckpointAdjoint())
    with pytest.raises(lp.LaplodeError, match=r"(?s)diffeqsolve\(\.\.\., adjoint=diffrax.DirectAdjoint\(\)\).*\"ggn\""):
        silent(foreign, problem)


def test_hessian_of_a_foreign_model_through_direct_adjoint():
    foreign, native, problem = pair(diffrax.DirectAdjoint())
    found, expected = silent(foreign, problem).form.matrix, silent(native, problem).form.matrix
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_failed_solve_names_trajectory_and_time():
    model = rotation(stepsize_controller=ADAPTIVE, max_steps=3)
    with pytest.raises(lp.LaplodeError, match=r"failed in trajectory 0 at time .* of 2 .*max_steps = 3"):
        flow(parameters(model), TS, Y0, None)


def test_replayed_steps_have_the_gradient_of_the_solve_without_a_callback():
    view = parameters(full_model(stepsize_controller=ADAPTIVE))
    forces = jnp.array([0.5, 1.5])

    def loss(theta, num_steps):
        here = eqx.tree_at(lambda p: p.selected, view, view.with_vector(theta))
        around, found = replayed(here, jnp.asarray(TS), None, forces, num_steps)
        return jnp.sum(around(theta) ** 2), (found.arrived, found.number)

    program = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1).lower(view.vector, 32)
    assert "callback" not in program.as_text()
    (value, (arrived, number)), gradient = program.compile()(view.vector)
    assert np.all(arrived) and np.all(number <= 32)
    plainly = lambda theta: jnp.sum(plain(view.unravel(theta), y0=None, args=forces) ** 2)
    expected, slope = jax.value_and_grad(plainly)(view.vector)
    np.testing.assert_allclose(value, expected, rtol=1e-13)
    np.testing.assert_allclose(gradient, slope, rtol=1e-11)
    assert np.max(jax.jit(loss, static_argnums=1)(view.vector, 4)[1][1]) > 4


class LogOfSecond(eqx.Module):
    """What is seen is of no use at the start: the logarithm of 0, and its derivative."""

    def __call__(self, y, args):
        return jnp.log(jnp.abs(y[1:2]))


def test_what_nobody_observed_has_no_part_in_derivatives():
    field = lambda rate: lp.NeuralODE(Filling(jnp.array(rate)), observe=LogOfSecond())
    ts = np.linspace(0, 2, 6)
    ys = np.array(field(0.8)(ts, jnp.array([1.0, 0.0])))
    ys[0] = np.nan
    whole = lp.Problem(lp.Trajectories(ts, ys, y0=[1.0, 0.0]), lp.Gaussian(0.1), 1.0)
    for curvature in ("ggn", "hessian"):
        found = lp.laplace(field(0.8), whole, curvature=curvature, progress=False)
        assert np.isfinite(found.marginal_std()[0])
        assert found.diagnostics.num_observations == 5
    # The posterior of the values that were observed, by differences of the closed form log(1 − exp(−rate t)).
    slope = lambda t: t * np.exp(-0.8 * t) / (1 - np.exp(-0.8 * t))
    precision = 1 + np.sum((slope(ts[1:]) / 0.1) ** 2)
    np.testing.assert_allclose(found.marginal_std(), precision**-0.5, rtol=1e-4)


class Filling(eqx.Module):
    rate: jax.Array

    def __call__(self, t, y, args):
        return self.rate * y[0] * jnp.array([-1.0, 1.0])


class Late(eqx.Module):
    """A model of one's own that has no second derivatives at times that nobody observed."""

    rate: jax.Array

    def __call__(self, ts, y0):
        return y0 * jnp.exp(-self.rate * ts)[:, None] / jnp.where(ts > 1.5, 0.0, 1.0)[:, None]


def test_a_model_of_ones_own_is_not_asked_for_what_nobody_observed():
    ts = np.linspace(0, 2, 5)
    ys = np.exp(-0.7 * ts)[:, None]
    short = lp.Problem(lp.Trajectories(ts[:4], ys[:4], y0=[1.0]), lp.Gaussian(0.1), 1.0)
    ys[4:] = np.nan
    long = lp.Problem(lp.Trajectories(ts, ys, y0=[1.0]), lp.Gaussian(0.1), 1.0)
    for curvature in ("ggn", "hessian"):
        one, other = (
            lp.laplace(Late(jnp.array(0.7)), each, curvature=curvature, progress=False) for each in (short, long)
        )
        np.testing.assert_allclose(one.marginal_std(), other.marginal_std(), rtol=1e-12)
        np.testing.assert_allclose(one.log_evidence, other.log_evidence, rtol=1e-12)


class EndsInNaN(eqx.Module):
    rate: jax.Array

    def __call__(self, ts, y0):
        return jnp.sqrt(jnp.where(ts > 2.5, -1.0, 1.0))[:, None] * y0 * jnp.exp(-self.rate * ts)[:, None]


def test_a_mesh_asks_a_model_for_what_was_seen_only():
    ts, seen = np.tile([0.0, 1.0, 2.0, 3.0], (2, 1)), np.tile([True, True, True, False], (2, 1))
    around = flow(parameters(EndsInNaN(jnp.array(0.5))), ts, np.ones((2, 1)), None, seen=seen)
    alone, shared = linearize(around), linearize(around, mesh=jax.make_mesh((1,), ("devices",)))
    assert np.all(np.isfinite(alone[0])) and np.all(np.isfinite(alone[1]))
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


class Decays(eqx.Module):
    rates: jax.Array

    def __call__(self, t, y, args):
        return -self.rates * y * jnp.array([1.0, 0.3]) - 0.1 * y**2


class Around(eqx.Module):
    """A model of one's own around a `NeuralODE`."""

    ode: lp.NeuralODE

    def __call__(self, ts, y0):
        return self.ode(ts, y0) @ jnp.array([[1.0], [-2.0]])


def test_a_model_around_a_neural_ode_has_its_second_derivatives():
    ts, y0, controller = np.linspace(0, 2, 5), np.ones((1, 2)), diffrax.PIDController(1e-8, 1e-8)
    field = Decays(jnp.array([0.7, 0.4]))
    around = Around(lp.NeuralODE(field, stepsize_controller=controller))
    inside = lp.NeuralODE(
        field, observe=lambda y, args: jnp.array([1.0, -2.0])[None] @ y, stepsize_controller=controller
    )
    ys = np.asarray(around(ts, y0[0]))[None] + 0.1
    problem = lp.Problem(lp.Trajectories(ts, ys, y0), lp.Gaussian(0.1), 1.0)
    for curvature in ("ggn", "hessian"):
        options = dict(curvature=curvature, decrement=1e-9, progress=False)
        one, other = (lp.refine(m, problem, **options).model for m in (around, inside))
        one, other = (lp.laplace(m, problem, curvature=curvature, progress=False) for m in (one, other))
        np.testing.assert_allclose(one.mean, other.mean, rtol=1e-4)
        np.testing.assert_allclose(one.marginal_std(), other.marginal_std(), rtol=1e-4)

"""Initial states that a model learns or computes: what depends on them, against finite differences of plain solves."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplode as lp
from laplode._model.parameters import parameters

TS = np.linspace(0.0, 2.0, 6)
ARGS = {"weight": np.array([0.8, 1.3]), "level": np.array([0.5, 0.2])}
SCALE, PRECISION = 0.1, 30.0  # the prior outweighs what the noise bends downward
# Values of fixed steps are smooth to rounding, so that differences have no noise of the solver.
FIXED = dict(stepsize_controller=diffrax.ConstantStepSize(), dt0=0.1, max_steps=64)


class Relaxing(eqx.Module):
    rate: jax.Array
    rest: jax.Array

    def __call__(self, t, y, args):
        return self.rate * (self.rest * (1 + 0.3 * jnp.sin(t)) - y) + 0.1 * y[::-1] ** 2


class Encoder(eqx.Module):
    """An initial state by parameters of its own, from what is known of a trajectory."""

    gain: jax.Array

    def __call__(self, model, args):
        return jnp.tanh(self.gain * args["weight"]) + args["level"]


class Started(eqx.Module):
    """A model of one's own that has a module for its initial state."""

    ode: lp.NeuralODE
    initialize: eqx.Module

    def __call__(self, ts, y0, args):
        return self.ode(ts, self.initialize(None, args))


def at_rest(model, args):
    return model.vector_field.rest * args["weight"]


def field():
    return Relaxing(jnp.array([0.9, 1.4]), jnp.array([1.0, 0.4]))


MODELS = {
    "by the field": lambda: lp.NeuralODE(field(), y0=at_rest, **FIXED),
    "by a module": lambda: lp.NeuralODE(field(), y0=Encoder(jnp.array([0.7, 1.1])), **FIXED),
    "by a module, seen in part": lambda: lp.NeuralODE(
        field(), y0=Encoder(jnp.array([0.7, 1.1])), observe=lambda y, args: y * args["weight"], **FIXED
    ),
    "one for all": lambda: lp.NeuralODE(field(), y0=[0.6, 1.2], **FIXED),
    "one for each": lambda: lp.NeuralODE(field(), y0=[[0.6, 1.2], [0.3, 0.8]], **FIXED),
    "in another model": lambda: Started(lp.NeuralODE(field(), **FIXED), Encoder(jnp.array([0.7, 1.1]))),
}


def solved(model, args=ARGS):
    """Predictions of plain calls."""
    each = isinstance(model, lp.NeuralODE) and model.has_state_for_each
    one = lambda y0, args: model(TS, y0, args)
    return jax.vmap(one)(jnp.arange(2) if each else None, jax.tree.map(jnp.asarray, args))


def observed(model):
    clean = np.asarray(solved(model))
    return lp.Trajectories(TS, clean + SCALE * np.random.default_rng(0).normal(size=clean.shape), args=ARGS)


BY_DEFAULT = ("by the field", "by a module, seen in part", "one for each", "in another model")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.whole) for name in MODELS]
)
def test_derivatives_by_initial_states_are_those_of_finite_differences(name, quiet):
    model = MODELS[name]()
    data = observed(model)
    view = parameters(model)
    theta, step = np.asarray(view.vector), 1e-3

    predictions = jax.jit(jax.vmap(lambda theta: solved(view.unravel(theta)).ravel()))
    size = theta.size
    pairs = [(i, j) for i in range(size) for j in range(i + 1)]
    moves = step * np.eye(size)
    there = [theta + a * moves[i] + b * moves[j] for i, j in pairs for a in (1, -1) for b in (1, -1)]
    ahead, behind = (np.asarray(predictions(theta + sign * moves)) for sign in (1, -1))
    f = np.asarray(predictions(np.stack([theta, *there])))
    J = ((ahead - behind) / (2 * step)).T
    residual = (f[0] - data.ys.ravel()) / SCALE**2
    hessian = J.T @ J / SCALE**2
    for (i, j), (both, first, second, neither) in zip(pairs, f[1:].reshape(len(pairs), 4, -1), strict=True):
        bend = residual @ (both - first - second + neither) / (4 * step**2)
        hessian[i, j] += bend
        hessian[j, i] = hessian[i, j]

    problem = lp.Problem(data, lp.Gaussian(SCALE), PRECISION)
    start = slice(-4, None) if name == "one for each" else slice(-2, None)
    assert np.all(np.linalg.norm(J[:, start], axis=0) > 0.1)
    prior = PRECISION * np.eye(size)
    atol = 1e-4 * np.max(hessian)
    ggn = quiet(model, problem, curvature="ggn", progress=False)
    np.testing.assert_allclose(ggn.precision(), J.T @ J / SCALE**2 + prior, atol=atol)
    exact = quiet(model, problem, progress=False)
    assert exact.diagnostics.regularized is None
    np.testing.assert_allclose(exact.precision(), hessian + prior, atol=atol)


@pytest.mark.parametrize("name", ["by the field", "in another model"])
def test_trajectories_of_other_args_start_where_the_model_says(name, quiet):
    model = MODELS[name]()
    posterior = quiet(
        model, lp.Problem(observed(model), lp.Gaussian(SCALE), PRECISION), curvature="ggn", progress=False
    )
    new = {"weight": np.array([0.5, 1.0]), "level": np.array([0.1, 0.9])}
    found = lp.predict(posterior, TS, args=new, num_samples=4, key=jax.random.key(0), progress=False)
    np.testing.assert_allclose(found.mean, solved(model, new), rtol=1e-12)
    tree = lp.to_datatree(posterior, found, progress=False)
    assert tree["predictions"]["f"].shape == (1, 4, 2, 6, 2)


def test_a_state_for_each_trajectory_is_of_no_other(quiet):
    model = MODELS["one for each"]()
    posterior = quiet(
        model, lp.Problem(observed(model), lp.Gaussian(SCALE), PRECISION), curvature="ggn", progress=False
    )
    with pytest.raises(lp.LaplodeError, match="one initial state for all trajectories or computes it"):
        lp.predict(posterior, TS, args=ARGS, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("y0", "known", "match"),
    [
        (lambda args: args["weight"], None, r"can't be evaluated as y0\(model, args\).*takes 1 positional"),
        (lambda model, args: args["weight"], None, r"returns shape \(\), not one state"),
        (lambda model, args: jnp.ones(3), None, "model"),
        (at_rest, np.ones((2, 2)), r"given twice.*known in part comes as args"),
    ],
)
def test_functions_that_do_not_fit(y0, known, match):
    model = lp.NeuralODE(field(), y0=y0, **FIXED)
    problem = lp.Problem(lp.Trajectories(TS, np.ones((2, 6, 2)), known, ARGS), lp.Gaussian(SCALE), 1.0)
    with pytest.raises(lp.LaplodeError, match=match):
        lp.laplace(model, problem, progress=False)


def test_it_is_shown():
    assert "by Encoder, 2 parameters" in str(MODELS["by a module"]())

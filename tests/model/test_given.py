"""Values of the first row that the initial states fix are no observations."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplode as lp
from laplode._model.given import with_given
from laplode._model.parameters import parameters

TS = np.array([0.0, 0.5, 1.0, 2.0])
Y0 = np.array([[1.0, 2.0], [0.0, 3.0]])


def ys(first, channels=2):
    noise = 0.1 * np.random.default_rng(0).normal(size=(2, 4, channels))
    values = np.exp(-0.5 * TS)[None, :, None] * Y0[:, None, :channels] + noise
    values[:, 0] = first
    return values


class Rate(eqx.Module):
    k: jax.Array

    def __call__(self, t, y, args):
        return -self.k * y


def decay(**options):
    return lp.NeuralODE(Rate(jnp.array(0.5)), **options)


class Seen(eqx.Module):
    """Twice the second state, and of the first what a gain makes of it."""

    gain: jax.Array | float

    def __call__(self, y, args):
        return jnp.stack([self.gain * y[0], 2 * y[1]])


class Growth(eqx.Module):
    rate: jax.Array
    gain: jax.Array

    def __call__(self, ts, y0):
        return self.gain * y0 * jnp.exp(self.rate * (ts - ts[0])[:, None])


def growth():
    return Growth(jnp.array(-0.5), jnp.array(1.0))


TWICE = Y0 * np.array([1.0, 2.0])
NONE, ALL = np.zeros((2, 2), bool), np.ones((2, 2), bool)
ZERO = Y0 == 0  # no gain moves it


@pytest.mark.parametrize(
    ("model", "y0", "first", "expected"),
    [
        pytest.param(decay(y0=np.ones(2)), None, np.ones(2), NONE, id="learned state"),
        pytest.param(decay(), Y0, Y0, ALL, id="states"),
        pytest.param(decay(observe=Seen(jnp.array(1.0))), Y0, TWICE, ZERO | [False, True], id="learned gain"),
        pytest.param(decay(observe=Seen(1.0)), Y0, TWICE, ALL, id="constant gain"),
        pytest.param(decay(observe=Seen(1.0)), Y0, Y0, np.array([True, False]) & ALL, id="another channel"),
        pytest.param(decay(scale=[0.1, 0.1]), Y0, Y0, ALL, id="scale of the model"),
        pytest.param(decay(), Y0, Y0 + 1e-12, NONE, id="measured beside it"),
        pytest.param(growth(), Y0, Y0, ZERO, id="own model"),
    ],
)
def test_which_values_are_given(model, y0, first, expected):
    likelihood = lp.Gaussian() if getattr(model, "scale", None) is not None else lp.Gaussian(0.1)
    problem = lp.Problem(lp.Trajectories(TS, ys(first), y0), likelihood, 1.0)
    assert problem.num_observations == 16
    seen = with_given(parameters(model), problem)
    np.testing.assert_array_equal(seen.given, expected)
    np.testing.assert_array_equal(seen.observed[:, 0], ~expected)
    np.testing.assert_array_equal(np.isnan(seen.ys), ~seen.observed)
    assert seen.num_observations == 16 - expected.sum() and np.all(seen.observed[:, 1:])


def test_they_count_nowhere():
    """The same posterior, evidence and noise as where they are missing; a gain that is not inferred moves nothing."""
    found = []
    for first in (Y0, np.nan):
        problem = lp.Problem(lp.Trajectories(TS, ys(first), Y0), lp.Gaussian(0.1), 1.0)
        options: dict = dict(where=lambda m: m.rate, curvature="ggn", progress=False)
        fitted = lp.refine(growth(), problem, where=options["where"], progress=False).model
        posterior = lp.laplace(fitted, problem, **options)
        better = lp.maximize_evidence(posterior, precision="fixed", progress=False)
        found.append(
            [
                posterior.diagnostics.num_observations,
                posterior.log_evidence,
                posterior.marginal_std()[0],
                *better.problem.likelihood.scale,
            ]
        )
    assert found[0][0] == 12
    np.testing.assert_allclose(*found, rtol=1e-12)

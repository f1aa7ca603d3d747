"""Leaves whose values matter, and that derivatives do not see."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import laplode as lp

TS = np.linspace(0, 2, 9)


class Frozen(eqx.Module):
    """exp(−rate t) · level, of which `level` is frozen and `spare` does nothing."""

    level: jax.Array
    rate: jax.Array
    spare: jax.Array

    def __call__(self, ts, y0):
        dead = jnp.maximum(self.spare, 0) * 0
        return (jax.lax.stop_gradient(self.level) * jnp.exp(-self.rate * ts) + dead)[:, None]


MODEL = Frozen(jnp.array(1.2), jnp.array(0.5), jnp.array(-1.0))
YS = 1.3 * np.exp(-0.7 * TS)[:, None] + 0.01 * np.random.default_rng(0).normal(size=(9, 1))


@pytest.mark.parametrize("prior", [1.0, lp.NamedPriors({"level": dist.LogNormal(0.0, 1.0)}, rest=1.0)])
def test_frozen_leaves_stay_as_they_are(prior):
    problem = lp.Problem(lp.Trajectories(TS, YS), lp.Gaussian(0.1), prior)
    fit = lp.fit(MODEL, problem, optax.adam(0.1), steps=20, key=jax.random.key(0), progress=False)
    np.testing.assert_allclose(fit.model.level, 1.2, rtol=1e-15)
    with pytest.warns(lp.LaplodeWarning, match="frozen by stop_gradient: level"):
        fit = lp.refine(MODEL, problem, progress=False)
    np.testing.assert_allclose(fit.model.level, 1.2, rtol=1e-15)
    with pytest.warns(lp.LaplodeWarning, match="frozen by stop_gradient: level"):
        posterior = lp.laplace(fit.model, problem, progress=False)
    assert [leaf[0] for leaf in posterior.parameters.leaves] == ["rate", "spare"]
    assert posterior.diagnostics.inert == ("spare",)
    np.testing.assert_allclose(posterior.unravel(posterior.mean + 1).level, 1.2, rtol=1e-15)


def test_a_perfect_fit_is_not_frozen():
    class Free(Frozen):
        def __call__(self, ts, y0):
            return (self.level * jnp.exp(-self.rate * ts))[:, None]

    model = Free(jnp.array(1.2), jnp.array(0.5), jnp.array(-1.0))
    data = lp.Trajectories(TS, model(jnp.asarray(TS), None))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        posterior = lp.laplace(model, lp.Problem(data, lp.Gaussian(0.1), 1.0), progress=False)
    assert posterior.parameters.size == 3
    assert not any("frozen" in str(each.message) for each in told)

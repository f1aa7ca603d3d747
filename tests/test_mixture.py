"""Several optima as one posterior."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate as si

import laplode as lp

KEY = jax.random.key(0)


class Square(eqx.Module):
    """Predicts x² t, so that x and −x are optima, and mirror images."""

    x: jax.Array

    def __call__(self, ts, y0):
        return (self.x**2 * ts)[:, None]


@pytest.fixture(scope="module")
def problem():
    ts = np.linspace(0.5, 2, 4)
    return lp.Problem(lp.Trajectories(ts, 1.7 * ts[None, :, None]), lp.Gaussian(0.5), lp.GaussianPrior(1.0, mean=0.2))


@pytest.fixture(scope="module")
def optima(problem):
    models = [lp.refine(Square(jnp.array(x)), problem, progress=False).model for x in (1.0, -1.0)]
    return [lp.laplace(m, problem, progress=False) for m in models]


@pytest.fixture(scope="module")
def mixed(optima):
    return lp.mixture(optima)


def log_joint(problem, x):
    data = problem.data
    residual = (data.ys[0, :, 0] - x[:, None] ** 2 * data.ts[0]) / 0.5
    log_likelihood = np.sum(-0.5 * residual**2 - np.log(0.5) - 0.5 * np.log(2 * np.pi), axis=1)
    return log_likelihood - 0.5 * (x - 0.2) ** 2 - 0.5 * np.log(2 * np.pi)


def test_against_quadrature(problem, mixed):
    grid = np.linspace(-3, 3, 4001)
    joint = np.exp(log_joint(problem, grid))
    exact = np.log(si.simpson(joint, grid))
    assert len(mixed.components) == 2 and mixed.components[0].mean[0] > 0
    np.testing.assert_allclose(mixed.log_evidence, exact, atol=0.02)
    share = np.exp(np.log(si.simpson(joint[grid > 0], grid[grid > 0])) - exact)
    np.testing.assert_allclose(mixed.weights[0], share, atol=0.02)
    density = np.exp(mixed.log_prob(jnp.asarray(grid)[:, None]))
    np.testing.assert_allclose(si.simpson(density, grid), 1, rtol=1e-8)
    mean = si.simpson(density * grid, grid)
    np.testing.assert_allclose(mixed.mean[0], mean, rtol=1e-8)
    variance = si.simpson(density * (grid - mean) ** 2, grid)
    np.testing.assert_allclose(mixed.covariance(), [[variance]], rtol=1e-8)
    np.testing.assert_allclose(mixed.precision(), [[1 / variance]], rtol=1e-8)
    np.testing.assert_allclose(mixed.marginal_std(), [np.sqrt(variance)], rtol=1e-8)


def test_draws(mixed):
    draws = np.asarray(mixed.sample(KEY, 4000))
    np.testing.assert_allclose(draws.mean(), mixed.mean[0], atol=5 * float(mixed.marginal_std()[0]) / 60)
    np.testing.assert_allclose(draws.std(), mixed.marginal_std()[0], rtol=0.05)
    np.testing.assert_allclose(np.mean(draws > 0), mixed.weights[0], atol=0.04)
    np.testing.assert_array_equal(draws, mixed.sample(KEY, 4000))


def test_an_optimum_found_twice_counts_once(problem, optima):
    again = lp.refine(Square(jnp.array(2.0)), problem, progress=False).model
    assert len(lp.mixture([*optima, lp.laplace(again, problem, progress=False)]).components) == 2
    # Without a preference of the prior the optima are mirror images, and equal as functions.
    even = lp.Problem(problem.data, problem.likelihood, 1.0)
    models = [lp.refine(Square(jnp.array(x)), even, progress=False).model for x in (1.0, -1.0)]
    assert len(lp.mixture([lp.laplace(m, even, progress=False) for m in models]).components) == 1


def test_weights_may_be_given(optima):
    mixed = lp.mixture(optima, weights=[1.0, 3.0])
    np.testing.assert_allclose(mixed.weights, [0.75, 0.25])
    assert mixed.components[0] is optima[1]
    assert len(lp.mixture(optima, weights=[0.0, 2.0]).components) == 1


def test_the_restarts_of_a_fit(growth):
    start = eqx.tree_at(lambda m: m.rate, growth.model, jnp.array([0.1, -0.1]))
    fit = lp.fit(
        start, growth.problem, optax.adam(1e-2), steps=40, key=KEY, restarts=3, horizons=(1.0,), progress=False
    )
    assert len(fit.restarts) == 3
    np.testing.assert_array_equal(fit.restarts[0].rate, fit.model.rate)
    alone = dataclasses.replace(fit, restarts=())
    assert alone.restarts == ()


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda o, g: [], "not empty"),
        (lambda o, g: o[0], "`posteriors` must be a list"),
        (lambda o, g: [o[0], g.parameters], r"`posteriors`\[1\]"),
        (lambda o, g: [o[0], g], "other data"),
    ],
)
def test_bad_posteriors(optima, growth_posterior, make, match):
    posteriors = make(optima, growth_posterior)
    with pytest.raises(lp.LaplodeError, match=match):
        lp.mixture(posteriors)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0]])
def test_bad_weights(optima, weights):
    with pytest.raises(lp.LaplodeError, match="`weights`"):
        lp.mixture(optima, weights=weights)

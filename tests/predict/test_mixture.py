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


def test_a_posterior_is_a_mixture_of_itself(optima):
    assert optima[0].components == (optima[0],) and optima[0].weights == 1
    assert not np.any(optima[0].choose(KEY, 5))


@pytest.mark.parametrize("method", ["linearized", "sampled", "geodesic"])
def test_predictions(problem, mixed, method):
    ts = np.linspace(0.5, 4, 5)
    found = lp.predict(mixed, ts, method=method, num_samples=400, key=KEY, progress=False)
    np.testing.assert_allclose(np.mean(found.component == 0), mixed.weights[0], atol=0.1)
    np.testing.assert_array_equal(found.component == 0, found.thetas[:, 0] > 0)
    assert np.all(found.ok) and found.f.shape == (400, 1, 5, 1)
    x = np.array([component.mean[0] for component in mixed.components])
    np.testing.assert_allclose(found.mean[0, :, 0], mixed.weights @ x**2 * ts, rtol=1e-6)
    if method != "linearized":
        np.testing.assert_allclose(found.f[:, 0, :, 0], found.thetas**2 * ts, rtol=1e-6)
        # Both optima are nearly Gaussian, and all of the posterior.
        assert found.khat < 0.5
        return
    own = x[found.component]
    np.testing.assert_allclose(found.f[:, 0, -1, 0], (2 * own * found.thetas[:, 0] - own**2) * 4, rtol=1e-6)
    variance = np.array([component.covariance()[0, 0] for component in mixed.components])
    within, mean = (2 * x) ** 2 * variance, mixed.weights @ x**2
    between = np.outer(ts, ts) * (mixed.weights @ (within + (x**2 - mean) ** 2))
    np.testing.assert_allclose(found.covariance()[0], between, rtol=1e-6)


def test_importance_weights_of_a_mixture(problem, mixed):
    """They are those of the whole density, so that both optima get the share that quadrature gives them."""
    found = lp.predict(mixed, problem.data.ts[0], method="sampled", num_samples=4000, key=KEY, progress=False)
    np.testing.assert_allclose(found.log_q, mixed.log_prob(found.thetas), rtol=1e-10)
    grid = np.linspace(-3, 3, 4001)
    joint = np.exp(log_joint(problem, grid))
    weights = np.exp(found.log_weights)
    for moment in (1, 2):
        exact = si.simpson(joint * grid**moment, grid) / si.simpson(joint, grid)
        np.testing.assert_allclose(weights @ np.asarray(found.thetas[:, 0]) ** moment, exact, atol=0.03)
    again = lp.predict(
        mixed, problem.data.ts[0], method="sampled", num_samples=4000, resample=True, key=KEY, progress=False
    )
    np.testing.assert_array_equal(again.component == 0, again.thetas[:, 0] > 0)


def test_each_component_has_its_noise(problem, optima):
    loud = dataclasses.replace(problem, likelihood=lp.Gaussian(2.0))
    other = lp.laplace(optima[1].unravel(optima[1].mean), loud, structure="diagonal", progress=False)
    both = lp.mixture([optima[0], other], weights=[1, 1])
    found = lp.predict(both, problem.data.ts[0], num_samples=1000, key=KEY, progress=False)
    noise = np.asarray(found.y - found.f).reshape(1000, -1)
    np.testing.assert_allclose(noise[found.component == 0].std(), 0.5, rtol=0.1)
    np.testing.assert_allclose(noise[found.component == 1].std(), 2.0, rtol=0.1)
    tree = lp.to_datatree(both, found)
    f, y = np.asarray(found.f), problem.data.ys
    scale = np.where(found.component == 0, 0.5, 2.0)[:, None, None, None]
    expected = -0.5 * ((y - f) / scale) ** 2 - np.log(scale * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(tree["log_likelihood"]["y"].values[0], expected, rtol=1e-6)
    assert tree["posterior"].attrs["structure"] == "Full, Diagonal" and tree["posterior"].attrs["num_components"] == 2
    assert lp.plot_trajectories(tree).viz["plot"].shape == (1, 1)


def test_a_component_too_light_for_a_draw(problem, optima):
    both = lp.mixture(optima, weights=[1, 1e-12])
    found = lp.predict(both, problem.data.ts[0], num_samples=10, key=KEY, progress=False)
    alone = lp.predict(optima[0], problem.data.ts[0], num_samples=10, key=KEY, progress=False)
    np.testing.assert_allclose(found.covariance(), alone.covariance(), rtol=1e-8)
    np.testing.assert_allclose(found.mean, alone.mean, rtol=1e-8)


def test_functions_of_a_mixture(mixed):
    found = lp.predict_function(mixed, lambda model: model.x, num_samples=200, key=KEY, progress=False)
    np.testing.assert_allclose(found.draws, found.thetas[:, 0])
    np.testing.assert_allclose(found.mean, mixed.mean[0], rtol=1e-10)
    np.testing.assert_allclose(found.std, mixed.marginal_std()[0], rtol=1e-6)
    drawn = lp.predict_function(
        mixed, lambda model: model.x, method="sampled", num_samples=200, key=KEY, progress=False
    )
    np.testing.assert_allclose(drawn.draws, drawn.thetas[:, 0])

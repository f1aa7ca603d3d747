"""Predictions of several optima as one."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
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
    models = {"plus": 1.0, "minus": -1.0}
    found = {name: lp.refine(Square(jnp.array(x)), problem, progress=False).model for name, x in models.items()}
    return {name: lp.laplace(model, problem, progress=False) for name, model in found.items()}


def predict(posterior, ts, **options):
    return lp.predict(posterior, ts, **{"num_samples": 400, "key": KEY, "progress": False} | options)


def joint_density(problem, x):
    data = problem.data
    residual = (data.ys[0, :, 0] - x[:, None] ** 2 * data.ts[0]) / 0.5
    log_likelihood = np.sum(-0.5 * residual**2 - np.log(0.5) - 0.5 * np.log(2 * np.pi), axis=1)
    return np.exp(log_likelihood - 0.5 * (x - 0.2) ** 2 - 0.5 * np.log(2 * np.pi))


def test_weights_by_evidence_are_those_of_quadrature(problem, optima):
    grid = np.linspace(-3, 3, 4001)
    joint = joint_density(problem, grid)
    share = si.simpson(joint[grid > 0], grid[grid > 0]) / si.simpson(joint, grid)
    table = lp.compare_evidence(optima)
    np.testing.assert_allclose(table["weight"]["plus"], share, atol=0.02)
    np.testing.assert_allclose(np.exp(table["log_weight"]), table["weight"])


def test_an_optimum_found_twice_counts_once(problem, optima):
    again = lp.laplace(lp.refine(Square(jnp.array(2.0)), problem, progress=False).model, problem, progress=False)
    table = lp.compare_evidence(optima | {"again": again})
    assert (table["weight"] == 0).sum() == 1 and table["weight"]["minus"] > 0
    np.testing.assert_allclose(table["weight"]["minus"], lp.compare_evidence(optima)["weight"]["minus"], rtol=1e-3)
    # Without a preference of the prior the optima are mirror images, and equal as functions.
    even = lp.Problem(problem.data, problem.likelihood, 1.0)
    models = [lp.refine(Square(jnp.array(x)), even, progress=False).model for x in (1.0, -1.0)]
    weights = lp.compare_evidence({str(i): lp.laplace(m, even, progress=False) for i, m in enumerate(models)})["weight"]
    assert sorted(weights) == [0, 1]


class Wide(eqx.Module):
    """The same with a parameter of another name."""

    w: jax.Array

    def __call__(self, ts, y0):
        return (self.w**2 * ts)[:, None]


def test_another_model_is_no_twin(problem, optima):
    wide = lp.laplace(Wide(optima["plus"].mean[0]), problem, progress=False)
    assert np.all(lp.compare_evidence(optima | {"wide": wide})["weight"] > 0)


@pytest.mark.parametrize("method", ["linearized", "sampled"])
def test_mean_draws_and_covariance(optima, method):
    ts, weights = np.linspace(0.5, 4, 5), np.array([0.25, 0.75])
    parts = [
        predict(posterior, ts, method=method, key=jax.random.key(i)) for i, posterior in enumerate(optima.values())
    ]
    found = lp.mix(parts, 3.0 + np.log(weights))
    x = np.array([posterior.mean[0] for posterior in optima.values()])
    np.testing.assert_allclose(found.mean[0, :, 0], weights @ x**2 * ts, rtol=1e-8)
    first = np.asarray(found.thetas[:, 0] > 0)
    assert first.sum() == 100 and found.f.shape == (400, 1, 5, 1) and found.method == method
    # Each draw is that of its part at the same place, and parts are spread evenly.
    for own, part in zip((first, ~first), parts, strict=True):
        np.testing.assert_array_equal(found.f[own], part.f[own])
        np.testing.assert_array_equal(found.y[own], part.y[own])
    assert np.all(np.abs(np.cumsum(first) - np.arange(1, 401) / 4) <= 1)
    if method == "sampled":
        with pytest.raises(lp.LaplodeError, match=r"`covariance\(\)`"):
            found.covariance()
        return
    variance = np.array([posterior.covariance()[0, 0] for posterior in optima.values()])
    spread = weights @ ((2 * x) ** 2 * variance + (x**2 - weights @ x**2) ** 2)
    np.testing.assert_allclose(found.covariance()[0], np.outer(ts, ts) * spread, rtol=1e-6)


def test_importance_weights_keep_the_shares(problem, optima):
    """Of optima far from each other each part's draws stand for its own, so that moments are those of quadrature."""
    ts = problem.data.ts[0]
    parts = {name: predict(p, ts, method="sampled", num_samples=4000) for name, p in optima.items()}
    found = lp.mix(parts, lp.compare_evidence(optima)["log_weight"])
    weights, grid = np.exp(found.log_weights), np.linspace(-3, 3, 4001)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
    joint = joint_density(problem, grid)
    for moment in (1, 2):
        exact = si.simpson(joint * grid**moment, grid) / si.simpson(joint, grid)
        np.testing.assert_allclose(weights @ np.asarray(found.thetas[:, 0]) ** moment, exact, atol=0.03)
    assert found.khat == max(part.khat for part in parts.values())


def test_a_forecast_has_the_draws_of_what_was_observed(problem, optima):
    """So that they go into one tree, with the noise and the likelihood that each part has."""
    loud = dataclasses.replace(problem, likelihood=lp.Gaussian(2.0))
    parts = [optima["plus"], lp.laplace(optima["minus"].parameters.model, loud, structure="diagonal", progress=False)]
    weights = np.log([0.5, 0.5])
    here, later = (
        lp.mix([predict(p, ts, key=jax.random.key(i), num_samples=1000) for i, p in enumerate(parts)], weights)
        for ts in (problem.data.ts[0], np.array([0.5, 3.0]))
    )
    np.testing.assert_array_equal(here.thetas, later.thetas)
    quiet = np.asarray(here.thetas[:, 0] > 0)
    noise = np.asarray(here.y - here.f).reshape(1000, -1)
    np.testing.assert_allclose(noise[quiet].std(), 0.5, rtol=0.1)
    np.testing.assert_allclose(noise[~quiet].std(), 2.0, rtol=0.1)
    tree = lp.to_datatree(parts[0], here, later)
    scale = np.where(quiet, 0.5, 2.0)[:, None, None, None]
    expected = -0.5 * ((problem.data.ys - np.asarray(here.f)) / scale) ** 2 - np.log(scale * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(tree["log_likelihood"]["y"].values[0], expected, rtol=1e-6)
    assert lp.plot_trajectories(tree).viz["plot"].shape == (1, 1)


def test_a_part_too_light_for_a_draw(problem, optima):
    ts = problem.data.ts[0]
    plus, minus = (predict(p, ts, num_samples=10) for p in optima.values())
    found = lp.mix([plus, minus], [0.0, -30.0])
    np.testing.assert_array_equal(found.f, plus.f)
    np.testing.assert_allclose(found.covariance(), plus.covariance(), rtol=1e-8)
    without = lp.mix([plus, minus], [0.0, -np.inf])
    np.testing.assert_array_equal(without.mean, plus.mean)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p, q: ([], []), "not empty"),
        (lambda p, q: (p, [0.0]), "must be a list"),
        (lambda p, q: ([p, p.f], [0.0, 0.0]), r"`predictions`\[1\] must come from"),
        (lambda p, q: ([p, dataclasses.replace(p, ts=p.ts + 1)], [0.0, 0.0]), r"`predictions`\[1\] is at other times"),
        (lambda p, q: ([p, dataclasses.replace(p, thetas=jnp.zeros((10, 2)))], [0.0, 0.0]), "other channels, param"),
        (lambda p, q: ([p, q], [0.0, 0.0]), "has 5 draws, but the first has 10"),
        (lambda p, q: ([p, p], [0.0]), "`log_weights` must be 2"),
        (lambda p, q: ([p, p], [np.nan, 0.0]), "`log_weights`"),
        (lambda p, q: ([p, p], [-np.inf, -np.inf]), "`log_weights`"),
        (lambda p, q: ({"a": p}, {"b": 0.0}), "`log_weights` must have a number for each name"),
    ],
)
def test_what_does_not_fit(problem, optima, change, match):
    some, fewer = (predict(optima["plus"], problem.data.ts[0], num_samples=num) for num in (10, 5))
    with pytest.raises(lp.LaplodeError, match=match):
        lp.mix(*change(some, fewer))

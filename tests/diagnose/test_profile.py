"""Profiles against closed forms, brute force, and verdicts that are known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import chi2

import laplode as lp


class Line(eqx.Module):
    """y = a + b t, linear in its parameters."""

    a: jax.Array
    b: jax.Array

    def __call__(self, ts, y0):
        return (self.a + self.b * ts)[:, None]


class Product(eqx.Module):
    """Only the product of two factors shows."""

    a: jax.Array
    b: jax.Array
    rate: jax.Array

    def __call__(self, ts, y0):
        return (self.a * self.b * jnp.exp(-self.rate * ts))[:, None]


class Saturation(eqx.Module):
    """A curve whose level is hardly seen: only its initial slope is."""

    log_level: jax.Array
    slope: jax.Array

    def __call__(self, ts, y0):
        level = jnp.exp(self.log_level)
        return (level * (1 - jnp.exp(-self.slope * ts / level)))[:, None]


TS = np.linspace(0, 2, 9)


def fitted(model, ys, scale, precision):
    problem = lp.Problem(lp.Trajectories(TS, ys), lp.Gaussian(scale), lp.GaussianPrior(precision))
    fit = lp.refine(model, problem, decrement=1e-10, progress=False)
    return lp.laplace(fit.model, problem, progress=False)


@pytest.fixture(scope="module")
def line():
    ys = (0.5 + 1.2 * TS + 0.3 * np.random.default_rng(0).normal(size=9))[:, None]
    return fitted(Line(jnp.array(0.4), jnp.array(1.0)), ys, 0.3, 1e-2)


def test_of_a_linear_model_it_is_the_parabola(line):
    std = np.asarray(line.marginal_std())
    for i, found in enumerate(lp.profile(line, ["a", "b"], progress=False)):
        offsets = (found.values - float(line.mean[i])) / std[i]
        np.testing.assert_allclose(found.drop, 0.5 * offsets**2, atol=1e-8)
        np.testing.assert_allclose(found.intervals[0], found.laplace, rtol=1e-5)
        assert found.verdict == "identifiable" and found.nonlinearity < 1e-5


def fieller(mean, covariance, level):
    """Where (a − r b)² ≤ z² Var(a − r b): the ends, if the set is an interval."""
    z2 = chi2.ppf(level, 1)
    quadratic = [
        mean[1] ** 2 - z2 * covariance[1, 1],
        -2 * (mean[0] * mean[1] - z2 * covariance[0, 1]),
        mean[0] ** 2 - z2 * covariance[0, 0],
    ]
    return np.sort(np.roots(quadratic)) if quadratic[0] > 0 else None


def test_a_ratio_has_the_interval_of_fieller(line):
    found = lp.profile(line, lambda m: m.a / m.b, level=0.9, progress=False)
    exact = fieller(np.asarray(line.mean), np.asarray(line.covariance()), 0.9)
    np.testing.assert_allclose(found.intervals[0], exact, atol=1e-4 * np.ptp(exact))
    assert abs(found.intervals[0][0] - found.laplace[0]) > 0.01 * np.ptp(exact)


def test_factors_of_a_product_are_structurally_open():
    ys = (1.8 * np.exp(-0.7 * TS) + 0.05 * np.random.default_rng(1).normal(size=9))[:, None]
    posterior = fitted(Product(jnp.array(1.2), jnp.array(1.5), jnp.array(0.7)), ys, 0.05, 1.0)
    found = lp.profile(posterior, "a", progress=False)
    assert "b" in found.moves and "not identifiable" in found.verdict
    alone = lp.profile(posterior, "a", prior=False, progress=False)
    assert alone.verdict == "structurally not identifiable" and "b" in alone.moves
    assert not np.all(np.isfinite(alone.intervals[0]))
    assert lp.profile(posterior, "rate", prior=False, progress=False).verdict == "identifiable"


def test_a_level_that_was_not_reached_is_open_above():
    ys = (10 * (1 - np.exp(-TS / 10)) + 0.1 * np.random.default_rng(2).normal(size=9))[:, None]
    posterior = fitted(Saturation(jnp.log(8.0), jnp.array(1.0)), ys, 0.1, 1e-4)
    found = lp.profile(posterior, "log_level", prior=False, progress=False)
    assert found.verdict == "one-sided" and found.intervals[0][1] == np.inf

    slopes = np.linspace(0.5, 2.5, 20001)  # brute force over the other parameter

    def loss(log_level):
        level = np.exp(log_level)
        curves = level * (1 - np.exp(-slopes[:, None] * TS / level))
        return np.min(np.sum((curves - ys[:, 0]) ** 2, axis=1)) / (2 * 0.1**2)

    best = min(map(loss, np.linspace(0.5, 15, 300)))
    exact = brentq(lambda x: loss(x) - best - found.threshold, found.intervals[0][0] - 0.3, found.estimate)
    assert found.intervals[0][0] == pytest.approx(exact, abs=2e-3)


def test_what_does_not_fit(line):
    with pytest.raises(lp.LaplodeError, match="`of` = 'c' is no parameter"):
        lp.profile(line, "c", progress=False)
    with pytest.raises(lp.LaplodeError, match="one number"):
        lp.profile(line, lambda m: jnp.stack([m.a, m.b]), progress=False)
    with pytest.raises(lp.LaplodeError, match="`level`"):
        lp.profile(line, "a", level=1.5, progress=False)


def test_a_table(line):
    table = lp.profile_table(lp.profile(line, ["a", lambda m: m.a + m.b], progress=False))
    assert list(table.columns[:3]) == ["estimate", "low", "high"] and table.index[0] == "a"


def test_a_picture(line):
    figure = lp.plot_profile(lp.profile(line, ["a", "b"], num=5, progress=False))
    assert [panel.get_xlabel() for panel in figure.axes] == ["a", "b"]
    assert [panel.get_title() for panel in figure.axes] == ["identifiable", "identifiable"]
    with pytest.raises(lp.LaplodeError, match="`profiles` must come from"):
        lp.plot_profile([line])

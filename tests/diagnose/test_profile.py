"""Profiles against closed forms, brute force, and verdicts that are known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.optimize import brentq, least_squares
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


def test_a_mesh_changes_nothing(line):
    alone = lp.profile(line, "a", progress=False)
    shared = lp.profile(line, "a", mesh=jax.make_mesh((1,), ("all",)), progress=False)
    np.testing.assert_allclose(shared.intervals, alone.intervals, rtol=1e-10)


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


def line_of(mean, std, n=41):
    """A posterior of a line whose estimates are as given, with standard deviations near `std` and no correlation."""
    ts = np.linspace(-1, 1, n)
    ys = (mean[0] + mean[1] * ts)[:, None]
    problem = lp.Problem(lp.Trajectories(ts, ys), lp.Gaussian(std * np.sqrt(n)), lp.GaussianPrior(1e-9))
    fit = lp.refine(Line(jnp.array(mean[0] + 0.1), jnp.array(mean[1])), problem, decrement=1e-12, progress=False)
    return lp.laplace(fit.model, problem, progress=False)


def test_a_ratio_whose_denominator_may_vanish_has_what_fieller_found():
    posterior = line_of([3.0, 0.5], 0.6)  # the numerator is not 0, the denominator may be: all but an interval
    found = lp.profile(posterior, lambda m: m.a / m.b, progress=False)
    mean, covariance = np.asarray(posterior.mean), np.asarray(posterior.covariance())
    z2 = chi2.ppf(0.95, 1)
    quadratic = [mean[1] ** 2 - z2 * covariance[1, 1], -2 * mean[0] * mean[1], mean[0] ** 2 - z2 * covariance[0, 0]]
    low, high = np.sort(np.roots(quadratic))
    assert low < 0 < high
    assert found.intervals[0][0] == -np.inf and found.intervals[1][1] == np.inf
    np.testing.assert_allclose([found.intervals[0][1], found.intervals[1][0]], [low, high], rtol=1e-4)
    assert found.verdict == "practically not identifiable" and "2 intervals" in found.why

    posterior = line_of([0.5, 0.5], 0.6)  # neither: the whole line
    found = lp.profile(posterior, lambda m: m.a / m.b, progress=False)
    assert found.intervals == ((-np.inf, np.inf),) and found.verdict == "practically not identifiable"


class Square(eqx.Module):
    """y = x², so that both roots fit, and a straight part that tells them apart a little."""

    x: jax.Array

    def __call__(self, ts, y0):
        return (self.x**2 + 0.05 * self.x + 0 * ts)[:, None]


def test_two_wells_are_two_intervals():
    problem = lp.Problem(lp.Trajectories(TS[:2], np.full((2, 1), 1.1)), lp.Gaussian(0.6), lp.GaussianPrior(1e-6))
    fit = lp.refine(Square(jnp.array(1.0)), problem, progress=False)
    posterior = lp.laplace(fit.model, problem, progress=False)
    (low, middle), (inner, high) = lp.profile(posterior, "x", progress=False).intervals
    loss = lambda x: np.sum((1.1 - x**2 - 0.05 * x) ** 2) * 2 / (2 * 0.6**2) + 5e-7 * x**2
    edge = lambda a, b: brentq(lambda x: loss(x) - loss(float(posterior.mean[0])) - chi2.ppf(0.95, 1) / 2, a, b)
    exact = [edge(-3, -1.1), edge(-1.0, -0.1), edge(0.1, 1.0), edge(1.1, 3)]
    np.testing.assert_allclose([low, middle, inner, high], exact, atol=1e-4)


class Banana(eqx.Module):
    """a is seen, and b beside its square."""

    a: jax.Array
    b: jax.Array

    def __call__(self, ts, y0):
        return jnp.stack([0 * self.a, self.a, self.b + 2 * self.a**2])[:, None]


def test_a_banana_is_as_on_a_dense_grid():
    problem = lp.Problem(lp.Trajectories(TS[:3], [[0.0], [0.5], [0.7]]), lp.Gaussian(0.5), lp.GaussianPrior(1e-6))
    fit = lp.refine(Banana(jnp.array(0.4), jnp.array(0.1)), problem, decrement=1e-12, progress=False)
    found = lp.profile(lp.laplace(fit.model, problem, progress=False), "b", progress=False)
    a, b = np.linspace(-4, 4, 800001), found.values
    terms = lambda b: ((a - 0.5) ** 2 + (b + 2 * a**2 - 0.7) ** 2) / (2 * 0.5**2) + 5e-7 * (a**2 + b**2)
    least = np.array([np.min(terms(each)) for each in b])
    np.testing.assert_allclose(found.drop, least - np.min(terms(found.estimate)), atol=1e-4)
    assert found.nonlinearity > 0.1


def test_values_of_the_users(line):
    values = np.linspace(-0.3, 1.3, 9)
    found = lp.profile(line, "a", values=values, progress=False)
    assert set(values.round(12)) <= set(found.values.round(12))
    free = lp.profile(line, "a", progress=False)
    np.testing.assert_allclose(found.intervals, free.intervals, rtol=1e-4)
    near = lp.profile(line, "a", values=[free.estimate + 1e-3, free.estimate - 1e-3], progress=False)
    assert near.intervals == ((-np.inf, np.inf),) and "no further than the values given" in near.why


def test_bands_hold_at_all_times_at_once(line):
    of = [lambda m: m(jnp.asarray(TS), None)[:, 0]]
    alone = lp.profile(line, of, progress=False)
    together = lp.profile(line, of, simultaneous=True, progress=False)
    assert len(alone) == len(TS) and {each.df for each in together} == {2}  # a line has two parameters
    width = lambda each: each.intervals[0][1] - each.intervals[0][0]
    ratio = np.array([width(b) / width(a) for a, b in zip(alone, together, strict=True)])
    np.testing.assert_allclose(ratio, np.sqrt(chi2.ppf(0.95, 2) / chi2.ppf(0.95, 1)), rtol=1e-5)


def test_a_checkpoint_goes_on_where_ctrl_c_came(line, tmp_path, monkeypatch):
    whole = lp.profile(line, ["a", "b"], progress=False)
    real, calls = lp._diagnose.constrained._advance, [0]

    def interrupted(*arguments):
        calls[0] += 1
        if calls[0] == 20:
            raise KeyboardInterrupt
        return real(*arguments)

    arguments = dict(checkpoint=tmp_path / "profiles", progress=False)
    monkeypatch.setattr(lp._diagnose.constrained, "_advance", interrupted)
    with pytest.warns(lp.LaplodeWarning, match="interrupted"):
        some = lp.profile(line, ["a", "b"], **arguments)
    assert some[-1].verdict == "unfinished" and len(some[-1].values) > 0
    monkeypatch.setattr(lp._diagnose.constrained, "_advance", real)
    again = lp.profile(line, ["a", "b"], **arguments)
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one.values, other.values)
        assert one.intervals == other.intervals
    monkeypatch.setattr(lp._diagnose.constrained, "_advance", None)  # nothing is computed of what is finished
    assert lp.profile(line, ["a", "b"], **arguments)[1].intervals == again[1].intervals
    with pytest.raises(lp.LaplodeError, match="other arguments"):
        lp.profile(line, ["a", "b"], level=0.5, **arguments)


class Decay(eqx.Module):
    """exp(−rate t), its rate above 0."""

    rate: jax.Array

    def __call__(self, ts, y0):
        return jnp.exp(-self.rate * ts)[:, None]


def test_the_end_of_a_support_is_named():
    ys = np.exp(-0.03 * TS)[:, None]
    priors = lp.NamedPriors({"rate": dist.LogNormal(-3.0, 2.0)})
    problem = lp.Problem(lp.Trajectories(TS, ys), lp.Gaussian(0.1), priors)
    fit = lp.refine(Decay(jnp.array(0.05)), problem, progress=False)
    posterior = lp.laplace(fit.model, problem, progress=False)
    found = lp.profile(posterior, "rate", prior=False, progress=False)
    assert found.intervals[0][0] == 0 and np.isfinite(found.intervals[0][1])
    assert found.verdict == "one-sided" and "the end of its support, 0" in found.why
    assert float(found.target(posterior.model)) == pytest.approx(float(posterior.model.rate))


class Logistic(eqx.Module):
    """Growth to a capacity, in closed form."""

    rate: jax.Array
    capacity: jax.Array
    start: jax.Array

    def __call__(self, ts, y0):
        return (self.capacity / (1 + (self.capacity / self.start - 1) * jnp.exp(-self.rate * ts)))[:, None]


def others_fitted(residuals, index, value, start):
    """The least −log p with one parameter held at a value, by SciPy, and the parameters there."""
    free = np.delete(start, index)
    at = lambda rest: residuals(np.insert(rest, index, value))
    found = least_squares(at, free, x_scale=np.abs(free), xtol=1e-13, ftol=1e-13, gtol=1e-13)
    return found.cost, np.insert(found.x, index, value)


def brute(residuals, index, best, values):
    """The drop at each of the values, in order, each begun where its neighbor toward the optimum ended."""
    least, drops = 0.5 * np.sum(residuals(best) ** 2), np.empty(len(values))
    for side in (np.flatnonzero(values < best[index])[::-1], np.flatnonzero(values >= best[index])):
        start = best
        for i in side:
            cost, start = others_fitted(residuals, index, values[i], start)
            drops[i] = cost - least
    return drops


def brute_ends(residuals, index, best, threshold, interval):
    """Where the drop is the threshold, near the ends of an interval, of which the way there is begun at the optimum."""
    least, width, found = 0.5 * np.sum(residuals(best) ** 2), np.ptp(interval), []
    for end in interval:
        start = best
        for value in np.linspace(best[index], end, 20)[1:]:
            _, start = others_fitted(residuals, index, value, start)
        gap = lambda value, start=start: others_fitted(residuals, index, value, start)[0] - least - threshold
        found.append(brentq(gap, end - 0.02 * width, end + 0.02 * width, xtol=1e-6 * width))
    return found


@pytest.fixture(scope="module")
def growth_to_capacity():
    """The logistic growth of Simpson and Maclaren (2023), its residuals, and where these are least."""
    ts, exact = np.linspace(0, 1000, 11), Logistic(*map(jnp.array, (0.01, 100.0, 10.0)))
    ys = np.asarray(exact(ts, None)) + 10 * np.random.default_rng(3).normal(size=(11, 1))
    scaled = lp.GaussianPrior(Logistic(1e-6, 1e-10, 1e-8))
    problem = lp.Problem(lp.Trajectories(ts, ys), lp.Gaussian(10.0), scaled)
    fit = lp.refine(exact, problem, decrement=1e-10, progress=False)
    posterior = lp.laplace(fit.model, problem, progress=False)

    def residuals(theta):
        rate, capacity, start = theta
        return (ys[:, 0] - capacity / (1 + (capacity / start - 1) * np.exp(-rate * ts))) / 10

    return posterior, residuals, least_squares(residuals, posterior.mean, x_scale=np.abs(posterior.mean)).x


def test_logistic_growth_is_as_by_brute_force(growth_to_capacity):
    posterior, residuals, best = growth_to_capacity
    for i, name in enumerate(["rate", "capacity", "start"]):
        found = lp.profile(posterior, name, prior=False, progress=False)
        width = np.ptp(found.intervals[0])
        exact = brute_ends(residuals, i, best, found.threshold, found.intervals[0])
        np.testing.assert_allclose(found.intervals[0], exact, atol=1e-3 * width)
        values = np.linspace(*found.intervals[0], 100)
        given = lp.profile(posterior, name, values=values, prior=False, progress=False)
        drops = given.drop[np.argmin(np.abs(given.values - values[:, None]), axis=1)]
        # The distance along the profile is that of the drop over its slope.
        slopes = np.abs(np.gradient(drops, values))
        off = np.abs(drops - brute(residuals, i, best, values))
        assert np.all(off <= 1e-3 * width * slopes + 1e-6)


def test_forecasts_of_logistic_growth_are_as_by_brute_force(growth_to_capacity):
    posterior, residuals, best = growth_to_capacity
    ts = np.array([100.0, 300.0, 1200.0])
    later = lp.profile(posterior, lambda m: m(ts, None)[:, 0], prior=False, progress=False)
    for t, found in zip(ts, later, strict=True):

        def of_value(theta, t=t):  # the value at a time in place of the capacity
            rate, value, start = theta
            grown = np.exp(-rate * t)
            return residuals([rate, value * (1 - grown) / (1 - value * grown / start), start])

        rate, capacity, start = best
        moved = np.array([rate, capacity / (1 + (capacity / start - 1) * np.exp(-rate * t)), start])
        exact = brute_ends(of_value, 1, moved, found.threshold, found.intervals[0])
        np.testing.assert_allclose(found.intervals[0], exact, atol=1e-3 * np.ptp(exact))


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


def measured(times):
    """The curve that levels off, seen early, and at `times` too."""
    ts = np.concatenate([TS, times])
    noise = 0.1 * np.random.default_rng(2).normal(size=len(ts))
    order = np.argsort(ts)
    ys = (10 * (1 - np.exp(-ts / 10)) + noise)[order, None]
    problem = lp.Problem(lp.Trajectories(ts[order], ys), lp.Gaussian(0.1), lp.GaussianPrior(1e-2))
    fit = lp.refine(Saturation(jnp.log(8.0), jnp.array(1.0)), problem, decrement=1e-10, progress=False)
    return lp.laplace(fit.model, problem, progress=False)


def test_an_open_profile_names_the_measurement_that_closes_it():
    posterior = measured([])
    found = lp.profile(posterior, "log_level", prior=False, progress=False)
    assert found.verdict == "one-sided"
    candidates = np.linspace(0.6, 40, 80)  # none of the times that the data have
    gain = lp.information_gain(posterior, candidates, target=found.target).each[0, :, 0]
    best = lp.choose_measurements(posterior, candidates, 1, target=found.target).ts
    worst = candidates[[np.argmin(gain)]]
    after = [lp.profile(measured(ts), "log_level", prior=False, progress=False).verdict for ts in (best, worst)]
    assert after == ["identifiable", "one-sided"]


def test_what_does_not_fit(line):
    with pytest.raises(lp.LaplodeError, match="`of` = 'c' is no parameter"):
        lp.profile(line, "c", progress=False)
    with pytest.raises(lp.LaplodeError, match="`values`"):
        lp.profile(line, "a", values=[[1.0]], progress=False)
    with pytest.raises(lp.LaplodeError, match="`level`"):
        lp.profile(line, "a", level=1.5, progress=False)


def test_a_group_of_the_datatree(line):
    profiles = lp.profile(line, ["a", lambda m: m.a / m.b], num=5, progress=False)
    tree = lp.to_datatree(line, key=jax.random.key(0), num_samples=4, profiles=profiles)
    found = tree["profile"]
    assert list(found["quantity"].values) == ["a", "<lambda>"] and found.attrs["level"] == 0.95
    for i, each in enumerate(profiles):
        np.testing.assert_array_equal(found["values"].values[i, : len(each.values)], each.values)
        np.testing.assert_array_equal(found["interval"].values[i, 0], each.intervals[0])
    with pytest.raises(lp.LaplodeError, match="`profiles`"):
        lp.to_datatree(line, key=jax.random.key(0), profiles=[3])


def test_a_table(line):
    table = lp.profile_table(lp.profile(line, ["a", lambda m: m.a + m.b], progress=False))
    assert list(table.columns[:3]) == ["estimate", "low", "high"] and table.index[0] == "a"


def test_a_picture(line):
    figure = lp.plot_profile(lp.profile(line, ["a", "b"], num=5, progress=False))
    assert [panel.get_xlabel() for panel in figure.axes] == ["a", "b"]
    assert [panel.get_title() for panel in figure.axes] == ["identifiable", "identifiable"]
    with pytest.raises(lp.LaplodeError, match="`profiles` must come from"):
        lp.plot_profile([line])

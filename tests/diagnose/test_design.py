"""Where to measure next, against posteriors of data with the new observations in it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import laplode as lp

LATER = np.array([0.7, 2.2, 3.0, 5.1])


def log_det(matrix):
    return np.linalg.slogdet(matrix)[1]


@pytest.fixture(scope="module")
def rows(linear):
    """Of the candidates, (T, K, P), over the noise scale."""
    return linear.design(LATER).reshape(4, 2, 6) / 0.1


def first_three(model):
    return model.vector_field.w[0] * jnp.array([1.0, 2.0, 3.0])


G = np.eye(6)[:3] * np.array([[1.0], [2.0], [3.0]])


@pytest.mark.parametrize("target", [None, first_three], ids=["all parameters", "target"])
@pytest.mark.parametrize("criterion", ["information", "variance"])
def test_gains_are_those_of_the_posterior_with_the_observations_in_it(
    linear, linear_posterior, rows, criterion, target
):
    wanted = np.eye(6) if target is None else G

    def spread(precision):
        covariance = wanted @ np.linalg.inv(precision) @ wanted.T
        return 0.5 * log_det(covariance) if criterion == "information" else np.trace(covariance)

    def gain(seen):
        return spread(linear.precision) - spread(linear.precision + seen.T @ seen)

    found = lp.information_gain(linear_posterior, LATER, criterion=criterion, target=target)
    assert found.each.shape == (1, 4, 2)
    for t in range(4):
        for k in range(2):
            np.testing.assert_allclose(found.each[0, t, k], gain(rows[t, k][None]), rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(found.total, gain(rows.reshape(-1, 6)), rtol=1e-8)
    counts = np.array([[[3, 0], [0, 1], [0, 0], [1, 0]]])
    several = np.concatenate([np.repeat(rows[0, :1], 3, axis=0), rows[1, 1:], rows[3, :1]])
    np.testing.assert_allclose(found.of(counts), gain(several), rtol=1e-8)
    np.testing.assert_allclose(found.of(np.zeros((1, 4, 2))), 0, atol=1e-12)


@pytest.mark.parametrize("target", [None, first_three], ids=["all parameters", "target"])
@pytest.mark.parametrize("criterion", ["information", "variance"])
@pytest.mark.parametrize("repeat", [False, True], ids=["once", "repeated"])
def test_each_choice_is_the_best_there_is_and_gains_add_up(linear_posterior, criterion, target, repeat):
    options = {"criterion": criterion, "target": target}
    found = lp.information_gain(linear_posterior, LATER, **options)
    chosen = lp.choose_measurements(linear_posterior, LATER, 5, repeat=repeat, **options)
    counts = np.zeros((1, 4, 2))
    for i in range(5):
        allowed = np.argwhere(counts < (np.inf if repeat else 1))
        more = [counts + np.eye(8)[np.ravel_multi_index(place, counts.shape)].reshape(1, 4, 2) for place in allowed]
        gains = [found.of(each) - found.of(counts) for each in more]
        np.testing.assert_allclose(chosen.gains[i], max(gains), rtol=1e-7, atol=1e-12)
        place = chosen.trajectory[i], chosen.time[i], chosen.channel[i]
        counts[place] += 1
        assert chosen.ts[i] == LATER[chosen.time[i]]
    assert np.max(counts) == 1 or repeat
    np.testing.assert_allclose(chosen.total, found.of(counts), rtol=1e-8)


def exact_log_det(growth, quiet, measurements):
    """Of the precision after a fresh Laplace approximation with the measurements among the data."""
    times = np.linspace(0, 12, 25)
    counts = np.zeros((25, 2))
    for t, k in measurements:
        counts[t, k] += 1
    predicted = np.asarray(growth.model(jnp.asarray(times), jnp.array([1.5, 1.0])))
    ys = np.full((3, 25, 2), np.nan)
    data = growth.problem.data
    ys[:2, :9] = data.ys
    ts = np.stack([np.concatenate([each, each[-1] + np.arange(1, 17)]) for each in data.ts] + [times])
    ys[2][counts > 0] = predicted[counts > 0]
    y0 = np.concatenate([data.y0, [[1.5, 1.0]]])
    problem = lp.Problem(lp.Trajectories(ts, ys, y0), growth.problem.likelihood, growth.problem.prior)
    return float(quiet(growth.model, problem, curvature="ggn").built.log_det)


@pytest.fixture(scope="module")
def growth_ggn(growth, quiet):
    return quiet(*growth, curvature="ggn")


def test_a_greedy_choice_beats_a_uniform_grid(growth, growth_ggn, quiet):
    ts, y0 = np.linspace(0, 12, 25), np.array([[1.5, 1.0]])
    chosen = lp.choose_measurements(growth_ggn, ts, 6, y0)
    greedy = exact_log_det(growth, quiet, zip(chosen.time, chosen.channel, strict=True))
    before = float(growth_ggn.built.log_det)
    np.testing.assert_allclose(0.5 * (greedy - before), chosen.total, rtol=1e-8)
    uniform = exact_log_det(growth, quiet, [(t, k) for t in (4, 12, 20) for k in (0, 1)])
    assert chosen.total > 1.2 * 0.5 * (uniform - before)


def test_information_does_not_depend_on_coordinates(growth, quiet):
    """The same prior, the same data and the same noise, with parameters and observations in logarithms."""
    data, model = growth.problem.data, growth.model
    named = {"rate": dist.Normal(0.0, 0.5), "gain": dist.LogNormal(0.1, 0.4)}
    ours = quiet(model, lp.Problem(data, lp.LogNormal(0.1), lp.NamedPriors(named)), curvature="ggn")

    class Logs(eqx.Module):
        rate: jax.Array
        gain: jax.Array

        def __call__(self, ts, y0):
            return self.gain + jnp.log(y0) + 0.5 * self.rate * (ts - ts[0])[:, None]

    logs = Logs(2 * model.rate, jnp.log(model.gain))
    prior = lp.NamedPriors({"rate": dist.Normal(0.0, 1.0), "gain": dist.Normal(0.1, 0.4)})
    log_data = lp.Trajectories(data.ts, np.log(data.ys), data.y0)
    theirs = quiet(logs, lp.Problem(log_data, lp.Gaussian(0.1), prior), curvature="ggn")
    ts = np.linspace(0, 8, 5)
    gains = [lp.information_gain(posterior, ts) for posterior in (ours, theirs)]
    np.testing.assert_allclose(gains[0].each, gains[1].each, rtol=1e-8)
    np.testing.assert_allclose(gains[0].total, gains[1].total, rtol=1e-8)
    about = [
        lp.information_gain(ours, ts, target=lambda m: m.gain),
        lp.information_gain(theirs, ts, target=lambda m: m.gain),
    ]
    np.testing.assert_allclose(about[0].each, about[1].each, rtol=1e-6)
    # A target from which all parameters can be told is all parameters.
    whole = lp.information_gain(ours, ts, target=lambda m: jnp.append(m.rate**3, m.gain))
    np.testing.assert_allclose(whole.each, gains[0].each, rtol=1e-6)


@pytest.mark.parametrize("structure", ["low_rank", "diagonal", "block_diagonal"])
def test_structures(growth, growth_ggn, quiet, structure):
    posterior = quiet(*growth, curvature="ggn", structure=structure)
    ts = np.linspace(0, 8, 5)
    found = lp.information_gain(posterior, ts)
    if structure == "low_rank":
        np.testing.assert_allclose(found.each, lp.information_gain(growth_ggn, ts).each, rtol=1e-8)
        variances = [lp.information_gain(p, ts, criterion="variance").each for p in (posterior, growth_ggn)]
        np.testing.assert_allclose(*variances, rtol=1e-7)
    theta = posterior.mean
    predict = lambda theta: jnp.log(
        jax.vmap(lambda y: posterior.unravel(theta)(jnp.asarray(ts), y))(jnp.asarray(growth.problem.data.y0))
    )
    rows = np.asarray(jax.jacfwd(predict)(theta)).reshape(-1, 3) / 0.1
    precision = np.asarray(posterior.precision())
    np.testing.assert_allclose(found.total, 0.5 * (log_det(precision + rows.T @ rows) - log_det(precision)), rtol=1e-8)


class Noisy(eqx.Module):
    level: jax.Array
    log_scale: jax.Array

    def __call__(self, ts, y0):
        ones = jnp.ones((len(ts), 1))
        return jnp.concatenate([self.level * ones, self.log_scale * ones], axis=1)


def test_an_observation_tells_of_its_noise_too(quiet):
    data = lp.Trajectories(np.arange(3.0), np.array([[1.0], [1.3], [0.8]]))
    model = Noisy(jnp.array(1.0), jnp.log(0.2))
    posterior = quiet(model, lp.Problem(data, lp.Gaussian(), 1.0), curvature="ggn")
    found = lp.information_gain(posterior, np.array([0.0, 5.0]))
    assert found.each.shape == (1, 2, 1)
    level, scale = 1 + 3 / 0.04, 1 + 3 * 2.0
    expected = 0.5 * (np.log1p(1 / 0.04 / level) + np.log1p(2 / scale))
    np.testing.assert_allclose(found.each, expected, rtol=1e-10)
    np.testing.assert_allclose(
        lp.information_gain(posterior, np.array([0.0, 5.0]), target=lambda m: m.log_scale).each,
        0.5 * np.log1p(2 / scale),
        rtol=1e-8,
    )


def test_the_information_of_a_distribution_of_the_users_own(quiet):
    """Of a Poisson distribution in its logarithm, whose observed information is y / prediction²."""

    class Level(eqx.Module):
        level: jax.Array

        def __call__(self, ts, y0):
            return self.level * jnp.ones((len(ts), 1))

    data = lp.Trajectories(np.arange(3.0), np.array([[4.0], [7.0], [3.0]]))
    gains = [
        lp.information_gain(quiet(Level(jnp.array(5.0)), lp.Problem(data, like, 1.0)), np.arange(2.0)).each
        for like in (lp.Poisson(), lambda rate: dist.Poisson(rate))
    ]
    np.testing.assert_allclose(gains[1], gains[0], rtol=0.05)
    assert not np.array_equal(gains[0], gains[1])


def test_what_does_not_fit(linear_posterior, growth_posterior):
    wrong = [
        (lambda: lp.information_gain(linear_posterior, LATER, criterion="e"), "criterion"),
        (lambda: lp.information_gain(lp, LATER), "posterior"),
        (lambda: lp.information_gain(linear_posterior, LATER, target=3), "target"),
        (lambda: lp.information_gain(linear_posterior, LATER, target=lambda m: m.nothing), "target"),
        (lambda: lp.choose_measurements(linear_posterior, LATER, 0), "num"),
        (lambda: lp.choose_measurements(linear_posterior, LATER, 9), "repeat"),
        (lambda: lp.information_gain(linear_posterior, LATER).of(np.ones(3)), "counts"),
        (lambda: lp.information_gain(growth_posterior, LATER, np.array([[-1.0, 2.0]])), "does not allow"),
    ]
    for function, match in wrong:
        with pytest.raises(lp.LaplodeError, match=match):
            function()


def test_a_state_that_is_known_tells_nothing(linear, linear_posterior):
    found = lp.information_gain(linear_posterior, np.array([0.0, 1.0]), np.array([[1.0, 2.0]]))
    np.testing.assert_allclose(found.each[:, 0], 0, atol=1e-12)
    assert np.all(found.each[:, 1] > 0.01)

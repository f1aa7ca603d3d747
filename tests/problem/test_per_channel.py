"""Channels of different kinds, against each channel alone and against NumPyro distributions written by hand."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
import scipy.stats as st
from numpyro.distributions import constraints

import laplode as lp
from laplode._posterior.evidence import evidence_function

KEY = jax.random.key(3)
TS = np.linspace(0.0, 3.0, 13)
NAMES = ["cases", "drug", "heat"]
RATES = np.array([2.5, 0.4, 0.3, 1.2])


class Curves(eqx.Module):
    """Counts that grow, a concentration that falls, and a line."""

    rates: jax.Array

    def __call__(self, ts, y0):
        a, b, c, d = self.rates
        return jnp.stack([jnp.exp(a + b * ts), d * jnp.exp(-c * ts), c + d * ts], axis=1)


class WithScale(Curves):
    """And the logarithm of the noise of the line."""

    log_scale: jax.Array

    def __call__(self, ts, y0):
        seen = super().__call__(ts, y0)
        return jnp.concatenate([seen, jnp.broadcast_to(self.log_scale, (len(ts), 1))], axis=1)


class CountsConcentrationLine(dist.Distribution):
    """Poisson, LogNormal and Normal, written by hand."""

    support = constraints.real

    def __init__(self, prediction):
        self.parts = (
            dist.Poisson(prediction[..., 0]),
            dist.LogNormal(jnp.log(prediction[..., 1]), 0.15),
            dist.Normal(prediction[..., 2], 0.3),
        )
        super().__init__(prediction.shape, ())

    def sample(self, key, sample_shape=()):
        return jnp.stack([part.sample(key, sample_shape) for part in self.parts], axis=-1)

    def log_prob(self, value):
        return jnp.stack([part.log_prob(value[..., k]) for k, part in enumerate(self.parts)], axis=-1)


def observed(channels=NAMES):
    rng = np.random.default_rng(0)
    clean = np.asarray(Curves(jnp.asarray(RATES))(jnp.asarray(TS), None))
    ys = np.stack([rng.poisson(clean[:, 0]), clean[:, 1] * np.exp(0.15 * rng.normal(size=len(TS))),
                   clean[:, 2] + 0.3 * rng.normal(size=len(TS))], axis=1)  # fmt: skip
    ys[2, 0] = ys[5, 1] = ys[5, 2] = np.nan
    return lp.Trajectories(TS, ys, channels=channels)


DATA = observed()
KINDS = (lp.Poisson(), lp.LogNormal(0.15), lp.Gaussian(0.3))
MODEL = Curves(jnp.asarray(RATES))


def problem(likelihood, data=DATA, prior=0.5):
    return lp.Problem(data, likelihood, prior)


@pytest.fixture(scope="module")
def fitted():
    made = problem(lp.PerChannel(*KINDS))
    return lp.refine(MODEL, made, progress=False).model, made


@pytest.fixture(scope="module")
def posterior(fitted):
    return lp.laplace(*fitted, progress=False)


def alone(k):
    """The data with channel `k` observed only."""
    return eqx.tree_at(lambda d: d.ys, DATA, np.where(np.arange(3) == k, DATA.ys, np.nan))


# ---- The likelihood


MIXED = [
    lp.Poisson(),
    lp.Gaussian(),
    lp.LogNormal(0.2, lower=1.5),
    lp.NegativeBinomial(),
    lambda f: dist.Gamma(3.0, 3.0 / f),
    lp.StudentT(4.0, 0.3),
]


def test_each_channel_is_as_it_would_be_alone():
    rng = np.random.default_rng(1)
    ys = np.round(rng.gamma(4.0, 1.0, (1, 7, 6))) + 1.0
    ys[0, 2, 1] = ys[0, 4, 3] = np.nan
    made = lp.Problem(lp.Trajectories(np.arange(7.0), ys), lp.PerChannel(*MIXED), 1.0)
    assert made.prediction_shape == (7, 8)
    np.testing.assert_array_equal(made.channel, [0, 1, 2, 3, 4, 5, 1, 3])
    f = jnp.asarray(np.concatenate([rng.gamma(5.0, 0.6, (1, 7, 6)), rng.normal(0, 0.3, (1, 7, 2))], axis=2))
    whole, values = made.likelihood, made.ys
    found = {"log_prob": whole.log_prob(f, values), "score": whole.score(f, values), "fisher": whole.fisher(f, values),
             "stabilize": whole.stabilize(f), "expected_fisher": whole.expected_fisher(f)}  # fmt: skip
    np.testing.assert_allclose(whole.unstabilize(found["stabilize"]), f, rtol=1e-12)
    information, expected = made.information(f), 0
    for k, kind in enumerate(MIXED):
        own = np.flatnonzero(made.channel == k)
        single = lp.Problem(lp.Trajectories(np.arange(7.0), ys[:, :, k : k + 1]), kind, 1.0)
        likelihood, part, y = single.likelihood, f[..., own], single.ys
        for name, arguments in {"log_prob": (y,), "score": (y,), "fisher": (y,), "stabilize": ()}.items():
            place = own if name != "log_prob" else [k]
            np.testing.assert_allclose(found[name][..., place], getattr(likelihood, name)(part, *arguments), rtol=1e-12)
        np.testing.assert_allclose(found["expected_fisher"][..., own], likelihood.expected_fisher(part), rtol=1e-12)
        np.testing.assert_allclose(information[..., own], single.information(part), rtol=1e-12)
        expected += single.log_likelihood(part)
    np.testing.assert_allclose(made.log_likelihood(f), expected, rtol=1e-14)
    drawn = np.asarray(whole.sample(KEY, jnp.broadcast_to(f[:, :1], (1, 4000, 8))))[0]
    assert np.all(drawn[:, [0, 3]] == np.round(drawn[:, [0, 3]])) and drawn[:, 2].min() == 1.5
    at = np.asarray(f[0, 0])
    np.testing.assert_allclose(drawn[:, [0, 3]].mean(axis=0), at[[0, 3]], rtol=0.1)
    np.testing.assert_allclose(drawn[:, 1].std(), np.exp(at[6]), rtol=0.05)
    assert abs(np.corrcoef(drawn.T) - np.eye(6)).max() < 0.08  # each has a key of its own


@pytest.mark.parametrize(
    "likelihood",
    [
        lp.PerChannel(cases=lp.Poisson(), drug=lp.LogNormal(0.15), heat=lp.Gaussian(0.3)),
        lp.PerChannel({"heat": lp.Gaussian(0.3), "cases": lp.Poisson(), "drug": lp.LogNormal([0.15])}),
    ],
)
def test_channels_by_name_and_in_order_are_the_same(likelihood, posterior):
    by_name = problem(likelihood)
    assert by_name.likelihood.names == ("cases", "drug", "heat") and by_name.likelihood.likelihoods[0] == lp.Poisson()
    f = MODEL(jnp.asarray(TS), None)[None]
    np.testing.assert_array_equal(by_name.log_likelihood(f), posterior.problem.log_likelihood(f))
    again = lp.Problem(by_name.data, by_name.likelihood, 0.5)
    assert again.likelihood.names == by_name.likelihood.names


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lp.PerChannel, "give a likelihood for each channel.*0 in order and 0 by name"),
        (lambda: lp.PerChannel(lp.Poisson(), drug=lp.Poisson()), "got 1 in order and 1 by name"),
        (lambda: lp.PerChannel(lp.Poisson, lp.Gaussian(1.0)), "channel 0` must be an instance"),
        (lambda: lp.PerChannel(drug=3), "`likelihood of channel 'drug'` must be Gaussian"),
        (lambda: problem(lp.PerChannel(*KINDS[:2])), "is of 2 channels, 0, 1, and the data have K = 3, 0, 1, 2"),
        (lambda: problem(lp.PerChannel(cases=lp.Poisson())), "of 1 channels, 'cases', .* K = 3, 'cases'"),
        (lambda: problem(lp.PerChannel(cases=lp.Poisson()), observed(None)), "of the data have no names"),
        (lambda: problem(lp.PerChannel(lp.Gaussian([1.0, 1.0]), *KINDS[1:])), r"channel 0 .*`scale` has shape \(2,\)"),
        (lambda: problem(lp.PerChannel(heat=lp.Poisson(), cases=lp.Poisson(), drug=lp.Gaussian(1.0))),
         r"channel 'heat' .*counts under a Poisson likelihood, but ys\[0, 0, 2\]"),
        (lambda: problem(lp.PerChannel(lambda f: f, *KINDS[1:])), "channel 0 .*must return a NumPyro distribution"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(make, match):
    with pytest.raises(lp.LaplodeError, match=match):
        make()


# ---- Curvature


@pytest.mark.parametrize("curvature", ["ggn", "hessian", "fisher"])
def test_curvature_is_the_sum_over_the_channels(fitted, curvature):
    model, made = fitted
    options = dict(curvature=curvature, progress=False, regularization="none")
    whole = lp.laplace(model, made, **options)
    parts = [lp.laplace(model, lp.Problem(alone(k), kind, 0.5), **options) for k, kind in enumerate(KINDS)]
    matrix = sum(part.form.matrix for part in parts)
    np.testing.assert_allclose(whole.form.matrix, matrix, atol=1e-10 * np.abs(matrix).max())
    joint = sum(part.log_joint for part in parts) - 2 * made.prior.local(whole.parameters).log_density
    np.testing.assert_allclose(whole.log_joint, joint, rtol=1e-10)


def test_the_exact_hessian_is_that_of_a_distribution_written_by_hand(fitted, posterior):
    by_hand = lp.laplace(fitted[0], problem(lambda f: CountsConcentrationLine(f)), progress=False)
    np.testing.assert_allclose(posterior.precision(), by_hand.precision(), rtol=1e-10)
    np.testing.assert_allclose(posterior.log_evidence, by_hand.log_evidence, rtol=1e-10)


# ---- Noise scales


@pytest.mark.parametrize(
    ("curvature", "structure"), [("hessian", "full"), ("ggn", "low_rank"), ("hessian", "low_rank")]
)
def test_evidence_at_other_scales_is_that_of_a_posterior_with_them(fitted, curvature, structure):
    model, made = fitted
    options = dict(curvature=curvature, structure=structure, progress=False)
    function, start = evidence_function(lp.laplace(model, made, **options))
    if curvature == "hessian" and structure == "low_rank":  # no leading eigenpairs by channel, and counts have no scale
        assert start.log_scale is None
        for noise in ("one", "channel"):
            with pytest.raises(lp.LaplodeError, match=f'`noise`="{noise}".*eigenpairs.*Take curvature="ggn"'):
                evidence_function(lp.laplace(model, made, **options), noise=noise)
        return
    assert start.log_scale.shape == (2,)
    there = eqx.tree_at(lambda h: (h.log_scale, h.log_precision), start, (jnp.array([0.4, -0.3]), jnp.log(jnp.ones(1))))
    scaled = (lp.Poisson(), lp.LogNormal(0.15 * np.exp(0.4)), lp.Gaussian(0.3 * np.exp(-0.3)))
    expected = lp.laplace(model, problem(lp.PerChannel(*scaled), prior=1.0), **options).log_evidence
    np.testing.assert_allclose(function(there), expected, rtol=1e-10)
    # One factor is of all that have a scale.
    one, at = evidence_function(lp.laplace(model, made, **options), noise="one")
    scaled = (lp.Poisson(), lp.LogNormal(0.15 * np.exp(0.2)), lp.Gaussian(0.3 * np.exp(0.2)))
    expected = lp.laplace(model, problem(lp.PerChannel(*scaled)), **options).log_evidence
    np.testing.assert_allclose(one(eqx.tree_at(lambda h: h.log_scale, at, jnp.array([0.2]))), expected, rtol=1e-10)


def test_maximize_evidence_learns_each_scale(posterior):
    found = lp.maximize_evidence(posterior, precision="fixed", online=True, progress=False)
    _, drug, heat = found.problem.likelihood.likelihoods
    ys, f = DATA.ys[0], np.asarray(found.flow(found.mean)[0])
    # At its maximum the scale² is the mean square of the residuals of a channel, less the parameters that it fits.
    for k, scale, residuals in ((1, drug.scale, np.log(ys[:, 1] / f[:, 1])), (2, heat.scale, ys[:, 2] - f[:, 2])):
        hessian = lp.laplace(
            found.model, lp.Problem(alone(k), found.problem.likelihood, 0.5), progress=False
        ).form.matrix
        fits = np.trace(np.linalg.solve(found.precision(), hessian))
        left = np.sum(np.isfinite(residuals)) - fits
        np.testing.assert_allclose(np.nansum(residuals**2) / left, scale**2, rtol=1e-4)


def test_limits_and_other_families_are_left_as_they_are(fitted):
    model, _ = fitted
    mixed = lp.PerChannel(lp.Gaussian(3.0, lower=12.0), lp.LogNormal(0.15), lp.StudentT(5.0, 0.3))
    posterior = lp.laplace(model, problem(mixed), progress=False)
    function, start = evidence_function(posterior)
    assert function.scale_of == (-1, 0, -1) and start.log_scale.shape == (1,)
    with pytest.raises(lp.LaplodeError, match="beyond a limit of Gaussian"):
        evidence_function(posterior, noise="channel")
    counts = lp.laplace(model, problem(lp.PerChannel(lp.Poisson(), *MIXED[-1:] * 2)), progress=False)
    with pytest.raises(lp.LaplodeError, match='curvature="hessian" changes with the scale of StudentT'):
        evidence_function(counts, noise="channel")


def test_fit_learns_the_scales_that_it_is_told_to():
    likelihood = lp.PerChannel(lp.Poisson(), lp.LogNormal(0.5, learned=True), lp.Gaussian(0.3))
    made = problem(likelihood)
    with pytest.raises(lp.LaplodeError, match="still to be learned"):
        lp.laplace(MODEL, made, progress=False)
    fit = lp.fit(MODEL, made, optax.adam(0.03), steps=600, key=KEY, horizons=(1.0,), progress=False)
    counts, drug, heat = fit.problem.likelihood.likelihoods
    assert counts == lp.Poisson() and heat.scale == 0.3 and not drug.learned
    residuals = np.log(DATA.ys[0, :, 1] / np.asarray(fit.model(jnp.asarray(TS), None))[:, 1])
    np.testing.assert_allclose(drug.scale, [np.sqrt(np.nanmean(residuals**2))], rtol=1e-3)


# ---- What is made of a posterior


def test_draws_and_their_pointwise_log_likelihood(posterior, tmp_path):
    predictions = lp.predict(posterior, TS, key=KEY, num_samples=5, progress=False)
    y, f = np.asarray(predictions.y)[:, 0], np.asarray(predictions.f)[:, 0]
    assert np.all(y[..., 0] == np.round(y[..., 0])) and np.all(y[..., 1] > 0)
    ys = DATA.ys[0]
    expected = np.stack([st.poisson(f[..., 0]).logpmf(ys[:, 0]), st.lognorm(0.15, scale=f[..., 1]).logpdf(ys[:, 1]),
                         st.norm(f[..., 2], 0.3).logpdf(ys[:, 2])], axis=-1)  # fmt: skip
    seen = np.isfinite(ys)
    np.testing.assert_allclose(np.asarray(predictions.log_likelihood)[:, 0][:, seen], expected[:, seen], rtol=1e-10)
    tree = lp.to_datatree(posterior, predictions)
    assert list(tree["posterior_predictive"]["channel"].values) == NAMES
    np.testing.assert_allclose(tree["log_likelihood"]["y"].values[0], expected[:, seen], rtol=1e-10)
    lp.save(tmp_path / "posterior", posterior)
    back = lp.load(tmp_path / "posterior", like=posterior.model)
    np.testing.assert_array_equal(back.precision(), posterior.precision())
    assert repr(back.problem.likelihood) == repr(posterior.problem.likelihood)
    assert all(name in repr(back.problem.likelihood) for name in ("PerChannel", "Poisson", "LogNormal", "Gaussian"))
    geodesic = lp.predict(posterior, TS, method="geodesic", key=KEY, num_samples=3, weigh=True, progress=False)
    assert np.all(geodesic.ok) and np.all(np.isfinite(geodesic.log_weights))


def test_an_observation_of_each_channel_is_worth_what_it_is_alone(posterior):
    gain = lp.information_gain(posterior, TS[1:], criterion="information").each
    covariance = np.linalg.inv(posterior.precision())
    jacobian = np.asarray(jax.jacobian(lambda r: Curves(r)(jnp.asarray(TS[1:]), None))(posterior.mean))
    f = np.asarray(Curves(posterior.mean)(jnp.asarray(TS[1:]), None))
    information = np.stack([1 / f[:, 0], 1 / (0.15 * f[:, 1]) ** 2, np.full(len(f), 1 / 0.3**2)], axis=1)
    variance = np.einsum("tkp,pq,tkq->tk", jacobian, covariance, jacobian)
    np.testing.assert_allclose(np.squeeze(gain), 0.5 * np.log1p(information * variance), rtol=1e-8)


def test_the_model_predicts_the_scale_of_one_channel():
    likelihood = lp.PerChannel(lp.Poisson(), lp.LogNormal(0.15), lp.Gaussian())
    made, model = problem(likelihood), WithScale(jnp.asarray(RATES), jnp.log(0.3))
    posterior = lp.laplace(lp.refine(model, made, progress=False).model, made, curvature="ggn", progress=False)
    assert posterior.form.matrix[4, 4] == pytest.approx(2 * np.sum(np.isfinite(DATA.ys[0, :, 2])))
    predictions = lp.predict(posterior, TS, key=KEY, num_samples=4, progress=False)
    assert predictions.f.shape == predictions.scale.shape == (4, 1, 13, 3)
    assert np.all(np.isnan(predictions.scale[..., :2]))
    np.testing.assert_allclose(predictions.scale[:, 0, 0, 2], np.exp(predictions.thetas[:, 4]), rtol=1e-12)
    gain = lp.information_gain(posterior, TS[1:3], criterion="information").each
    assert np.shape(np.squeeze(gain)) == (2, 3)
    with pytest.raises(lp.LaplodeError, match="1 of these at each time"):
        lp.laplace(MODEL, made, progress=False)
    ode = lp.NeuralODE(lambda t, y, args: -y, scale=[0.3])
    data = lp.Trajectories(TS, DATA.ys, np.ones(3))
    assert ode(jnp.asarray(TS), jnp.ones(3)).shape == (13, 4) == lp.Problem(data, likelihood, 1.0).prediction_shape

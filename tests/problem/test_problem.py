"""What is being inferred: data, likelihoods, prior, and what is refused at this door."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st

import laplode as lp
from laplode._problem.likelihood import FromDistribution

TS = np.array([0.0, 1.0, 2.0])
YS = np.ones((2, 3, 1))
Y0 = np.ones((2, 1))


def with_nan(array, index):
    array = array.copy()
    array[index] = np.nan
    return array


# ---- Trajectories


def test_shapes_are_completed():
    one = lp.Trajectories([0, 1, 2], np.ones((3, 2), int), [1, 2])
    assert (one.ts.shape, one.ys.shape, one.y0.shape) == ((1, 3), (1, 3, 2), (1, 2))
    assert {one.ts.dtype, one.ys.dtype, one.y0.dtype} == {np.dtype(np.float64)}
    two = lp.Trajectories(TS, YS, Y0, args={"dose": np.ones((2, 5))})
    np.testing.assert_array_equal(two.ts, [TS, TS])
    assert lp.Trajectories(np.stack([TS, TS + 0.5]), YS, Y0).ts[1, 0] == 0.5


def test_float32_observations_keep_their_values():
    ys = np.float32(0.1) * np.ones((2, 3, 1), np.float32)
    np.testing.assert_array_equal(lp.Trajectories(TS, ys, Y0).ys, ys.astype(np.float64))


def test_the_callers_arrays_are_not_shared():
    ts = np.stack([TS, TS])
    data = lp.Trajectories(ts, YS, Y0)
    ts[:] = 9
    np.testing.assert_array_equal(data.ts[0], TS)


def test_until_and_observed():
    data = lp.Trajectories(TS, with_nan(YS, (0, 1, 0)), Y0)
    assert data.until(2).ts.shape == (2, 2) and data.until(2).ys.shape == (2, 2, 1)
    np.testing.assert_array_equal(data.observed[:, :, 0], [[True, False, True], [True, True, True]])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param(dict(ts=[0, 2, 1]), r"`ts` must be strictly increasing.*ts\[1\] = 2 is followed by 1", id="order"),
        pytest.param(dict(ts=[0, 1, 1]), "`ts` must be strictly increasing", id="repeated"),
        pytest.param(dict(ts=np.stack([TS, -TS])), r"`ts` must be strictly increasing.*ts\[1, 0\]", id="row"),
        pytest.param(dict(ts=[0, np.nan, 2]), "`ts` must be finite, got 1 NaN", id="nan time"),
        pytest.param(dict(ts=[0, 1, np.inf]), "`ts` must be finite", id="infinite time"),
        pytest.param(dict(ts=[0.0]), "`ts` must have at least two times", id="one time"),
        pytest.param(dict(ts=1.0), r"`ts` must have shape \(T,\)", id="scalar time"),
        pytest.param(dict(ts=np.ones((1, 2, 3))), r"`ts` must have shape \(T,\)", id="3d times"),
        pytest.param(dict(ts=["a", "b", "c"]), "`ts` must be an array of real times", id="strings"),
        pytest.param(dict(ts=[0, 1]), r"`ts` and `ys` disagree.*\(2,\).*T = 3", id="length"),
        pytest.param(dict(ts=np.stack([TS] * 3)), "`ts` and `ys` disagree", id="rows"),
        pytest.param(dict(ys=np.ones(3)), r"`ys` must have shape.*ys\[:, None\]", id="1d observations"),
        pytest.param(dict(ys=np.ones((1, 2, 3, 1))), "`ys` must have shape", id="4d observations"),
        pytest.param(dict(ys=YS * 1j), "`ys` must be an array of real", id="complex"),
        pytest.param(dict(ys=YS * np.inf), "`ys` holds infinite values", id="infinite observation"),
        pytest.param(dict(ys=with_nan(YS, 1)), "`ys` holds no observation.*trajectory 1", id="all nan"),
        pytest.param(dict(y0=np.ones(2)), r"`y0` must have shape \(N, D\) with N = 2.*np.tile", id="y0 1d"),
        pytest.param(dict(y0=np.ones((3, 1))), r"`y0` must have shape \(N, D\) with N = 2", id="y0 rows"),
        pytest.param(dict(y0=with_nan(Y0, 1)), "`y0` must be finite, but trajectory 1", id="y0 nan"),
        pytest.param(dict(y0=Y0 * np.inf), "`y0` must be finite, but trajectory 0", id="y0 infinite"),
        pytest.param(dict(y0="rest"), "`y0` must be an array of real states", id="y0 string"),
        pytest.param(dict(args={"dose": np.ones(3)}), r"`args\['dose'\]`.*N = 2.*shape \(3,\)", id="args rows"),
        pytest.param(dict(args=2.0), "`args` must be an array with leading axis N = 2.*a float", id="args scalar"),
    ],
)
def test_bad_trajectories_are_refused_by_name(arguments, match):
    with pytest.raises(lp.LaplodeError, match=match):
        lp.Trajectories(**{"ts": TS, "ys": YS, "y0": Y0} | arguments)


# ---- Likelihoods

PREDICTION = np.array([[0.7, 2.0], [3.1, 1.2]])
OBSERVED = np.array([[1.0, 2.0], [4.0, 1.0]])
SCALE = np.array([0.3, 0.8])


def _between(law, y, lower, upper):
    beyond = np.where(y <= lower, law.logcdf(lower), law.logsf(upper))
    return np.where((y > lower) & (y < upper), law.logpdf(y), beyond)


LIKELIHOODS = {
    "gaussian": (lp.Gaussian(SCALE), st.norm(PREDICTION, SCALE).logpdf),
    "lognormal": (lp.LogNormal(SCALE), st.lognorm(SCALE, scale=PREDICTION).logpdf),
    "student": (lp.StudentT(4.0, SCALE), st.t(4.0, PREDICTION, SCALE).logpdf),
    "poisson": (lp.Poisson(), st.poisson(PREDICTION).logpmf),
    "counts": (lp.NegativeBinomial(2.5), st.nbinom(2.5, 2.5 / (2.5 + PREDICTION)).logpmf),
    "limits": (lp.Gaussian(SCALE, lower=0.9, upper=3.2), lambda y: _between(st.norm(PREDICTION, SCALE), y, 0.9, 3.2)),
    "detection": (
        lp.LogNormal(SCALE, lower=[1.1, 0.8]),
        lambda y: _between(st.lognorm(SCALE, scale=PREDICTION), y, np.array([1.1, 0.8]), np.inf),
    ),
    "user": (FromDistribution(lambda f: dist.Gamma(3.0, 3.0 / f)), st.gamma(3.0, scale=PREDICTION / 3).logpdf),
}
each = pytest.mark.parametrize("name", LIKELIHOODS)


@each
def test_log_prob_against_scipy(name):
    likelihood, log_pdf = LIKELIHOODS[name]
    np.testing.assert_allclose(likelihood.log_prob(jnp.asarray(PREDICTION), OBSERVED), log_pdf(OBSERVED), rtol=1e-12)


@each
def test_missing_values_have_neither_likelihood_nor_gradient(name):
    likelihood, _ = LIKELIHOODS[name]
    ys = with_nan(OBSERVED, (0, 1))
    log_prob = likelihood.log_prob(jnp.asarray(PREDICTION), ys)
    score = likelihood.score(jnp.asarray(PREDICTION), ys)
    assert log_prob[0, 1] == 0 and score[0, 1] == 0
    full = likelihood.log_prob(jnp.asarray(PREDICTION), OBSERVED)
    np.testing.assert_array_equal(np.delete(log_prob, 1), np.delete(full, 1))
    np.testing.assert_allclose(
        np.delete(score, 1), np.delete(likelihood.score(jnp.asarray(PREDICTION), OBSERVED), 1), rtol=1e-15
    )


def test_a_missing_value_needs_no_place_in_the_support():
    # A logit-normal lives on (0, 1): whatever stands in for a missing value must do so too.
    squash = dist.transforms.SigmoidTransform()
    likelihood = FromDistribution(lambda f: dist.TransformedDistribution(dist.Normal(f, 1.0), squash))
    prediction = jnp.array([0.3, 0.4])
    score = likelihood.score(prediction, jnp.array([np.nan, 0.5]))
    np.testing.assert_allclose(score, [0, -0.4], rtol=1e-12)
    np.testing.assert_allclose(likelihood.fisher(prediction, jnp.array([np.nan, 0.5])), [0, 1], rtol=1e-12)


@pytest.mark.parametrize("likelihood", [lp.LogNormal(0.1, lower=0.2), lp.LogNormal(), lp.Poisson()])
def test_a_prediction_of_which_nothing_is_observed_needs_no_place_in_the_support(likelihood):
    """Such as that of a compartment that is empty at first."""
    ys = jnp.array([[np.nan], [3.0]])
    full = jnp.array([[0.0], [2.5]])
    if len(likelihood.channel_of(1)) == 2:
        full = jnp.concatenate([full, jnp.full((2, 1), -1.0)], axis=1)
    score = lambda f: likelihood.score(f, ys)
    first, second = jax.jit(lambda f: (score(f), jax.jacfwd(score)(f)))(full)
    assert np.all(first[0] == 0) and np.all(first[1] != 0) and np.all(np.isfinite(second))
    assert np.all(second[0] == 0) and np.all(second[:, :, 0] == 0)


PREDICTED_SCALE = {
    "gaussian": lp.Gaussian(),
    "lognormal": lp.LogNormal(),
    "student": lp.StudentT(4.0),
    "counts": lp.NegativeBinomial(),
}


@pytest.mark.parametrize("name", [name for name in LIKELIHOODS if name != "user"] + [f"{n}'s" for n in PREDICTED_SCALE])
def test_fisher_is_the_variance_of_the_score(name):
    given = name in LIKELIHOODS
    likelihood = LIKELIHOODS[name][0] if given else PREDICTED_SCALE[name[:-2]]
    at = PREDICTION if given else np.concatenate([PREDICTION, np.log(0.2 * PREDICTION)], axis=-1)
    num = 50_000
    prediction = jnp.broadcast_to(at, (num, *at.shape))
    ys = likelihood.sample(jax.random.key(0), prediction)
    score = np.asarray(likelihood.score(prediction, ys))
    squared = score**2
    error = squared.std(axis=0) / np.sqrt(num)
    fisher = likelihood.fisher(jnp.asarray(at), OBSERVED)
    if not given:  # location and scale share none
        shared = score[..., :2] * score[..., 2:]
        assert np.all(np.abs(shared.mean(axis=0)) < 4 * shared.std(axis=0) / np.sqrt(num))
    assert np.all(error < 0.03 * fisher)
    assert np.all(np.abs(squared.mean(axis=0) - fisher) < 4 * error)


def test_fisher_of_a_users_distribution_is_observed_and_clipped():
    normal = FromDistribution(lambda f: dist.Normal(f, 0.5))
    np.testing.assert_allclose(normal.fisher(jnp.asarray(PREDICTION), OBSERVED), 4.0, rtol=1e-12)
    # A Cauchy log density is convex where |y − f| > scale.
    cauchy = FromDistribution(lambda f: dist.Cauchy(f, 1.0))
    f, y = jnp.array([0.0, 0.0]), jnp.array([0.5, 3.0])
    expected = 2 * (1 - 0.25) / (1 + 0.25) ** 2
    np.testing.assert_allclose(cauchy.fisher(f, y), [expected, 0], rtol=1e-12)


def test_fisher_of_a_users_distribution_is_right_on_average():
    """Where the likelihood is log-concave in the prediction, as that of a Gamma distribution is in its logarithm."""
    likelihood = FromDistribution(lambda f: dist.Gamma(3.0, 3.0 * jnp.exp(-f)))
    at = jnp.broadcast_to(jnp.asarray(PREDICTION), (20_000, *PREDICTION.shape))
    ys = likelihood.sample(jax.random.key(1), at)
    for each in (likelihood.fisher(at, ys), likelihood.score(at, ys) ** 2):
        each = np.asarray(each)
        assert np.all(np.abs(each.mean(axis=0) - 3) < 4 * each.std(axis=0) / np.sqrt(20_000))


@pytest.mark.parametrize("name", ["lognormal", "poisson", "counts", "gaussian", "student"])
def test_stabilized_prediction_has_constant_information(name):
    likelihood, _ = LIKELIHOODS[name]
    prediction = jnp.linspace(0.5, 8.0, 6)[:, None] * jnp.ones(2)
    stable, slope = jax.jvp(likelihood.stabilize, (prediction,), (jnp.ones_like(prediction),))
    information = likelihood.fisher(prediction, None) / slope**2
    np.testing.assert_allclose(information, np.broadcast_to(information[0], information.shape), rtol=1e-13)
    np.testing.assert_allclose(likelihood.unstabilize(stable), prediction, rtol=1e-14)


def test_poisson_draws_stay_counts_after_stabilizing():
    assert lp.Poisson().unstabilize(jnp.array(-3.0)) == 0


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, "small", [0.1, -0.1]])
@pytest.mark.parametrize(
    "make", [lp.Gaussian, lp.LogNormal, lambda s: lp.StudentT(3.0, s)], ids=["gaussian", "lognormal", "student"]
)
def test_bad_scale(make, scale):
    with pytest.raises(lp.LaplodeError, match="`scale` must be"):
        make(scale)


def test_bad_scale_shape_and_degrees_of_freedom():
    with pytest.raises(lp.LaplodeError, match=r"`scale` must be a scalar or have shape \(K,\)"):
        lp.Gaussian(np.ones((2, 2)))
    with pytest.raises(lp.LaplodeError, match="`df` must be positive"):
        lp.StudentT(0.0, 1.0)


# ---- Prior and problem


@pytest.mark.parametrize("precision", [0.0, -1.0, np.nan, np.inf, np.array([1.0, -1.0]), "flat"])
def test_bad_prior_precision(precision):
    with pytest.raises(lp.LaplodeError, match="`precision` must be"):
        lp.GaussianPrior(precision)


def test_bad_precision_in_a_pytree_is_named():
    with pytest.raises(lp.LaplodeError, match=r"`precision\['a'\]\[1\]` must be positive"):
        lp.GaussianPrior({"a": [1.0, -2.0]})


def test_bad_prior_mean():
    with pytest.raises(lp.LaplodeError, match="`mean` must be finite"):
        lp.GaussianPrior(1.0, mean=np.nan)


def problem(**arguments):
    data = lp.Trajectories(TS, YS, Y0)
    return lp.Problem(**{"data": data, "likelihood": lp.Gaussian(1.0), "prior": 1.0} | arguments)


def test_problem_accepts_a_number_and_a_function():
    made = problem(likelihood=lambda f: dist.Laplace(f, 1.0), prior=3)
    assert isinstance(made.prior, lp.GaussianPrior) and made.prior.precision == 3
    np.testing.assert_allclose(made.log_likelihood(jnp.zeros((2, 3, 1))), 6 * st.laplace.logpdf(1.0), rtol=1e-14)


def test_log_likelihood_is_a_sum():
    predictions = jnp.arange(6.0).reshape(2, 3, 1)
    expected = st.norm(predictions, 1.0).logpdf(YS).sum()
    np.testing.assert_allclose(problem().log_likelihood(predictions), expected, rtol=1e-14)


def test_learned_scale_becomes_one_per_channel():
    assert problem(likelihood=lp.Gaussian(0.5, learned=True)).likelihood.scale.shape == (1,)
    assert np.shape(problem(likelihood=lp.Gaussian(0.5)).likelihood.scale) == ()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param(dict(data=YS), "`data` must be laplode.Trajectories.*ndarray", id="data"),
        pytest.param(dict(likelihood=lp.Gaussian), "`likelihood` must be an instance", id="class"),
        pytest.param(dict(likelihood="gaussian"), "`likelihood` must be Gaussian", id="string"),
        pytest.param(dict(likelihood=lambda f: f), "`likelihood`", id="no distribution"),
        pytest.param(
            dict(likelihood=lambda f: dist.Normal(f, 1.0).to_event(1)), "`likelihood`.*one by one.*to_event", id="event"
        ),
        pytest.param(dict(likelihood=lp.Gaussian([1.0, 1.0])), r"`scale` has shape \(2,\).*K = 1", id="channels"),
        pytest.param(dict(prior="wide"), "`precision` must be", id="prior string"),
        pytest.param(dict(prior=-1.0), "`precision` must be positive", id="prior negative"),
        pytest.param(dict(prior=None), "`prior`|`precision`", id="prior missing"),
        pytest.param(dict(prior=lp.Gaussian(1.0)), "`prior`|`precision`", id="prior type"),
    ],
)
def test_bad_problems_are_refused_by_name(arguments, match):
    with pytest.raises(lp.LaplodeError, match=match):
        problem(**arguments)


@pytest.mark.parametrize(
    ("likelihood", "value", "match"),
    [
        (lp.LogNormal(0.1), -1.0, r"`ys` must be positive.*\[0, 1, 0\]"),
        (lp.LogNormal(0.1), 0.0, "`ys` must be positive"),
        (lp.Poisson(), -1.0, r"`ys` must hold counts.*\[0, 1, 0\]"),
        (lp.Poisson(), 0.5, "`ys` must hold counts"),
    ],
)
def test_observations_outside_the_support(likelihood, value, match):
    ys = YS.copy()
    ys[0, 1, 0] = value
    ys[1, 1, 0] = np.nan
    with pytest.raises(lp.LaplodeError, match=match):
        lp.Problem(lp.Trajectories(TS, ys, Y0), likelihood, 1.0)


@pytest.mark.parametrize("likelihood", [lp.LogNormal(0.1), lp.Poisson()])
def test_missing_values_are_inside_every_support(likelihood):
    lp.Problem(lp.Trajectories(TS, with_nan(YS, (0, 1, 0)), Y0), likelihood, 1.0)

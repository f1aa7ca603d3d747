"""Named priors, constrained parameters, and noise scales among the parameters, against models transformed by hand."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.scipy.stats import norm

import laplode as lp
from laplode._model.parameters import parameters
from laplode._posterior.laplace import reassembled
from laplode._predict.solves import log_joint

KEY = jax.random.key(0)
TS = np.linspace(0, 4, 9)


class Decay(eqx.Module):
    """In closed form: channels start at `amount`, and decay at their rates; `share` of the first is lost at once."""

    rate: jax.Array
    share: jax.Array
    amount: jax.Array

    def __call__(self, ts, y0):
        kept = jnp.stack([1 - self.share, jnp.ones(())])
        return kept * self.amount * jnp.exp(-self.rate * ts[:, None])


class ByHand(eqx.Module):
    """The same with log rate, logit share and amount in place of them."""

    log_rate: jax.Array
    logit_share: jax.Array
    amount: jax.Array

    def __call__(self, ts, y0):
        return Decay(jnp.exp(self.log_rate), jax.nn.sigmoid(self.logit_share), self.amount)(ts, y0)


MODEL = Decay(jnp.array([0.4, 0.9]), jnp.array(0.3), jnp.array([2.0, 1.5]))
THETA = np.concatenate([np.log([0.4, 0.9]), [np.log(0.3 / 0.7)], [2.0, 1.5]])
YS = np.asarray(MODEL(jnp.asarray(TS), None)) + 0.05 * np.random.default_rng(0).normal(size=(9, 2))
DATA = lp.Trajectories(TS, YS)
NAMED = lp.NamedPriors({"rate": dist.LogNormal(-0.5, 0.7), "share": dist.Beta(2.0, 3.0)}, rest=0.5)


def by_hand_log_joint(theta, scale=0.05):
    predicted = ByHand(theta[:2], theta[2], theta[3:])(jnp.asarray(TS), None)
    share = jax.nn.sigmoid(theta[2])
    return (
        jnp.sum(norm.logpdf(YS, predicted, scale))
        + jnp.sum(norm.logpdf(theta[:2], -0.5, 0.7))
        + jnp.log(12 * share * (1 - share) ** 2)
        + jnp.log(share * (1 - share))
        + jnp.sum(norm.logpdf(theta[3:], 0, np.sqrt(2)))
    )


@pytest.fixture(scope="module")
def constrained():
    fit = lp.refine(MODEL, lp.Problem(DATA, lp.Gaussian(0.05), NAMED), progress=False)
    return lp.laplace(fit.model, fit.problem, progress=False)


def test_constrained_parameters_are_those_of_the_model_transformed_by_hand(constrained):
    theta = constrained.mean
    np.testing.assert_allclose(jax.jit(jax.grad(by_hand_log_joint))(theta), 0, atol=2e-2)
    hessian = jax.jit(jax.hessian(by_hand_log_joint))(theta)
    np.testing.assert_allclose(constrained.precision(), -hessian, rtol=1e-8, atol=1e-6)
    some = jnp.stack([theta, theta + 0.1, theta - jnp.arange(5) / 20])
    expected = jax.jit(jax.vmap(by_hand_log_joint))(some)
    np.testing.assert_allclose(constrained.log_joint, expected[0], rtol=1e-12)
    np.testing.assert_allclose(log_joint(constrained, some), expected, rtol=1e-10)
    model = constrained.unravel(theta)
    np.testing.assert_allclose(model.rate, np.exp(theta[:2]), rtol=1e-14)
    np.testing.assert_allclose(model.share, 1 / (1 + np.exp(-theta[2])), rtol=1e-14)


@pytest.mark.filterwarnings("ignore:The Newton decrement")
def test_a_log_normal_prior_is_a_gaussian_one_of_the_logarithm():
    named = lp.NamedPriors({"rate": dist.LogNormal(-0.5, 0.7), "amount": dist.Normal(1.0, 2.0)}, rest=0.5)
    mean = ByHand(jnp.full(2, -0.5), jnp.zeros(()), jnp.ones(2))
    precision = ByHand(jnp.full(2, 0.7**-2), jnp.array(0.5), jnp.full(2, 0.25))
    likelihood, held = lp.Gaussian(0.05), lambda m: (m.amount, m.rate)
    ours = lp.laplace(MODEL, lp.Problem(DATA, likelihood, named), where=held, curvature="ggn", progress=False)
    model = ByHand(jnp.log(MODEL.rate), jnp.log(0.3 / 0.7), MODEL.amount)
    problem = lp.Problem(DATA, likelihood, lp.GaussianPrior(precision, mean))
    hand = lp.laplace(model, problem, where=lambda m: (m.log_rate, m.amount), curvature="ggn", progress=False)
    np.testing.assert_allclose(ours.covariance(), hand.covariance(), rtol=1e-8)
    np.testing.assert_allclose(ours.log_evidence, hand.log_evidence, rtol=1e-10)
    predict = lambda p: lp.predict(p, np.linspace(0, 6, 7), key=KEY, num_samples=5, progress=False)
    np.testing.assert_allclose(predict(ours).covariance(), predict(hand).covariance(), rtol=1e-8, atol=1e-14)
    np.testing.assert_allclose(predict(ours).f, predict(hand).f, rtol=1e-8)


BENT = lp.NamedPriors(
    {"amount": dist.TruncatedNormal(5.0, 1.0, low=0.0), "rate": dist.TruncatedNormal(0.1, 1.0, low=0.0)}, rest=0.5
)


@pytest.mark.parametrize(
    ("structure", "curvature"), [("full", "hessian"), ("full", "ggn"), ("block_diagonal", "ggn"), ("diagonal", "ggn")]
)
@pytest.mark.filterwarnings("ignore:The Newton decrement")
def test_a_prior_that_bends_upward(structure, curvature):
    """A normal far above the fitted value has positive curvature in the logarithm; Λ is what it is all the same."""
    options = {"where": lambda m: (m.rate, m.amount), "curvature": curvature, "structure": structure}
    posterior = lp.laplace(MODEL, lp.Problem(DATA, lp.Gaussian(0.05), BENT), progress=False, **options)
    view = posterior.parameters
    bend = np.diagonal(-jax.jit(jax.hessian(lambda theta: BENT.log_density(view, theta)))(view.vector))
    assert np.all(bend[2:] < 0)
    predict = lambda theta: view.unravel(theta)(jnp.asarray(TS), None).ravel()
    J = np.asarray(jax.jit(jax.jacfwd(predict))(view.vector))
    matrix = posterior.form.matrix if curvature == "hessian" else J.T @ J / 0.05**2
    expected = np.asarray(matrix) + np.diag(bend)
    mask = {"full": np.ones((4, 4)), "diagonal": np.eye(4)}.get(structure)
    if mask is None:
        mask = np.zeros((4, 4))
        for _, _, start, stop in view.leaves:
            mask[start:stop, start:stop] = 1
    np.testing.assert_allclose(posterior.precision(), mask * expected, rtol=1e-8, atol=1e-8)
    function, start = lp.evidence_function(posterior, noise="one")
    np.testing.assert_allclose(function(start), posterior.log_evidence, rtol=1e-10)


def test_evidence_changes_the_gaussian_part_only(constrained):
    function, start = lp.evidence_function(constrained, noise="fixed")
    np.testing.assert_allclose(function(start), constrained.log_evidence, rtol=1e-10)
    assert start.log_precision.shape == (1,)
    changed = lp.Hyperparameters(jnp.log(jnp.array([3.0])), None)
    prior = eqx.tree_at(lambda p: p.rest, NAMED, lp.GaussianPrior(3.0))
    again = lp.Problem(DATA, lp.Gaussian(0.05), prior)
    expected = reassembled(constrained, again, constrained.form).log_evidence
    np.testing.assert_allclose(function(changed), expected, rtol=1e-10)
    found = lp.maximize_evidence(constrained, precision="leaf", noise="fixed", progress=False)
    assert set(found.problem.prior.named) == {"rate", "share"}
    assert float(found.log_evidence) > float(constrained.log_evidence)


def test_the_prior_looks_like_the_gaussian_that_touches_it():
    view = parameters(MODEL, None, NAMED)
    np.testing.assert_allclose(view.vector, THETA, rtol=1e-12)
    local = NAMED.local(view)
    density = jax.jit(lambda theta: NAMED.log_density(view, theta))
    np.testing.assert_allclose(jax.jit(jax.grad(density))(view.vector), -local.gradient, rtol=1e-9)
    np.testing.assert_allclose(jax.jit(jax.hessian(density))(view.vector), -np.diag(local.precision), atol=1e-12)
    batch = jnp.stack([view.vector, view.vector + 0.1])
    np.testing.assert_allclose(density(batch), [density(row) for row in batch], rtol=1e-12)


@pytest.mark.parametrize("unit", [1e-12, 1e6, 1e12])
@pytest.mark.parametrize("make", [lambda unit: dist.Normal(0.0, 3 * unit), lambda unit: dist.Cauchy(0.0, 0.3 * unit)])
def test_a_prior_is_the_same_in_every_unit(unit, make):
    """A Cauchy prior bends upward at the value; a wide normal one has next to no curvature in a large unit."""

    def local(unit):
        prior = lp.NamedPriors({"amount": make(unit)}, rest=1.0)
        return prior.local(parameters(eqx.tree_at(lambda m: m.amount, MODEL, MODEL.amount * unit), None, prior))

    here, there = local(1.0), local(unit)
    for name in ("precision", "deficit", "gradient"):
        power = 1 if name == "gradient" else 2
        expected = np.asarray(getattr(here, name)[3:]) / unit**power
        np.testing.assert_allclose(getattr(there, name)[3:], expected, rtol=1e-10)
    assert np.all(there.precision > 0)


def test_a_flat_prior_has_a_metric():
    """No curvature, no slope: the precision is on the scale of the value, and the deficit takes all of it away."""
    prior = lp.NamedPriors({"amount": dist.ImproperUniform(dist.constraints.real, (), ())}, rest=1.0)
    local = prior.local(parameters(MODEL, None, prior))
    np.testing.assert_allclose(local.precision[3:], 1 / MODEL.amount**2, rtol=1e-12)
    np.testing.assert_array_equal(local.diagonal[3:], 0)


def test_draws_of_the_prior():
    view = parameters(MODEL, None, NAMED)
    draws = NAMED.sample(view, KEY, 4000)
    model = jax.vmap(view.unravel)(draws)
    np.testing.assert_allclose(np.log(model.rate).mean(axis=0), -0.5, atol=5 * 0.7 / np.sqrt(4000))
    np.testing.assert_allclose(model.share.mean(), 0.4, atol=5 * 0.2 / np.sqrt(4000))
    np.testing.assert_allclose(model.amount.std(axis=0), np.sqrt(2), rtol=5 / np.sqrt(8000))


def test_the_tree_shows_parameters_as_the_model_knows_them(constrained):
    tree = lp.to_datatree(constrained, key=KEY, num_samples=50)
    for group in ("posterior", "prior"):
        assert np.all((tree[group]["share"].values > 0) & (tree[group]["share"].values < 1))
        assert np.all(tree[group]["rate"].values > 0)


def test_fit_moves_constrained_parameters_in_their_own_coordinate():
    import optax

    problem = lp.Problem(DATA, lp.Gaussian(0.05), NAMED)
    start = eqx.tree_at(lambda m: (m.rate, m.share), MODEL, (jnp.array([0.05, 3.0]), jnp.array(0.9)))
    fit = lp.fit(start, problem, optax.adam(0.1), steps=50, key=KEY, horizons=(1.0,), restarts=2, progress=False)
    assert np.all(fit.model.rate > 0) and 0 < fit.model.share < 1
    np.testing.assert_allclose(fit.losses[0], -by_hand_log_joint(jnp.asarray([
        np.log(0.05), np.log(3.0), np.log(9.0), 2.0, 1.5])), rtol=1e-6)  # fmt: skip


# ---- Noise scales among the parameters


class Line(eqx.Module):
    w: jax.Array

    def __call__(self, t, y, args):
        return self.w * jnp.stack([jnp.ones_like(t), jnp.cos(t)])


SCALED = {"gaussian": (lp.Gaussian(), norm.logpdf), "lognormal": (lp.LogNormal(), lambda y, f, s: norm.logpdf(
    jnp.log(y), jnp.log(f), s) - jnp.log(y))}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_a_noise_scale_among_the_parameters(name):
    likelihood, log_pdf = SCALED[name]
    model = lp.NeuralODE(Line(jnp.array([0.5, 0.8])), y0=[1.0, 2.0], scale=[0.2, 0.3])
    rng = np.random.default_rng(1)
    clean = 1 + np.stack([0.5 * TS, 1 + 0.8 * np.sin(TS)], axis=1)
    ys = clean * np.exp(0.1 * rng.normal(size=clean.shape))
    ys[3, 1] = ys[5, 0] = np.nan
    prior = lp.NamedPriors({"scale": dist.HalfNormal(0.5), "y0": dist.LogNormal(0.0, 1.0)}, rest=1.0)
    problem = lp.Problem(lp.Trajectories(TS, ys), likelihood, prior)
    options = {"where": lambda m: (m.vector_field, m.y0, m.scale), "progress": False}
    fit = lp.refine(model, problem, **options)
    posterior = lp.laplace(fit.model, problem, **options)

    def nll(theta):
        w, y0, scale = theta[:2], jnp.exp(theta[2:4]), jnp.exp(theta[4:])
        f = y0 + jnp.stack([w[0] * TS, w[1] * jnp.sin(TS)], axis=1)
        return -jnp.sum(jnp.where(np.isfinite(ys), log_pdf(jnp.where(np.isfinite(ys), ys, 1.0), f, scale), 0))

    theta = posterior.mean
    assert [leaf[0] for leaf in posterior.parameters.leaves] == ["vector_field.w", "y0", "scale"]
    expected = jax.jit(jax.hessian(nll))(theta)
    np.testing.assert_allclose(posterior.form.matrix, expected, atol=1e-6 * np.abs(expected).max())
    ggn = lp.laplace(fit.model, problem, curvature="ggn", **options)
    # In the log scale an observation has information 2, whatever its distribution is around its location.
    np.testing.assert_allclose(np.diag(ggn.form.matrix)[4:], 2 * np.isfinite(ys).sum(axis=0), rtol=1e-12)
    predictions = lp.predict(posterior, TS, key=KEY, num_samples=3, progress=False)
    assert predictions.f.shape == predictions.scale.shape == (3, 1, 9, 2)
    assert predictions.covariance().shape == (1, 18, 18)
    np.testing.assert_allclose(predictions.scale[:, 0, 0], np.exp(predictions.thetas[:, 4:]), rtol=1e-12)
    tree = lp.to_datatree(posterior, predictions)
    np.testing.assert_array_equal(tree["posterior_predictive"]["scale"][0], predictions.scale)
    values = [jnp.where(np.isfinite(ys), log_pdf(ys, f[0], s[0]), 0).sum()
              for f, s in zip(predictions.f, predictions.scale, strict=True)]  # fmt: skip
    np.testing.assert_allclose(tree["log_likelihood"]["y"].values.sum(axis=-1)[0], values, rtol=1e-10)


def test_an_initial_state_for_each_trajectory():
    tight = diffrax.PIDController(rtol=1e-10, atol=1e-12)
    states = [[1.0, 2.0], [0.0, 1.0], [3.0, 0.5]]
    model = lp.NeuralODE(Line(jnp.array([0.5, 0.8])), y0=states, stepsize_controller=tight)
    start = np.asarray(model.y0)[:, None]
    ys = start + np.stack([0.5 * TS, 0.8 * np.sin(TS)], axis=1)
    posterior = lp.laplace(model, lp.Problem(lp.Trajectories(TS, ys), lp.Gaussian(0.1), 1e-8), progress=False)
    # Of each initial state 9 observations, less what is needed for the slope that all have in common.
    design = np.zeros((3, 9, 2, 8))
    design[..., 0, 0], design[..., 1, 1] = TS, np.sin(TS)
    for i in range(3):
        design[i, :, 0, 2 + 2 * i] = design[i, :, 1, 3 + 2 * i] = 1
    flat = design.reshape(-1, 8)
    np.testing.assert_allclose(posterior.precision(), flat.T @ flat / 0.01 + 1e-8 * np.eye(8), rtol=1e-6, atol=1e-5)
    later = lp.predict(posterior, np.array([5.0, 6.0]), key=KEY, num_samples=2, progress=False)
    np.testing.assert_allclose(later.mean[:, 0, 0], start[:, 0, 0] + 2.5, rtol=1e-6)
    fresh = lp.predict(posterior, [0.0, 1.0], np.zeros((1, 2)), key=KEY, num_samples=2, progress=False)
    np.testing.assert_allclose(fresh.mean[0, 1], [0.5, 0.8 * np.sin(1)], rtol=1e-6)


# ---- Bad input


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: lp.NamedPriors({}), "`named` must map paths"),
        (lambda: lp.NamedPriors({"rate": 1.0}), r"`named`\['rate'\] must be the NumPyro distribution.*float"),
        (lambda: lp.NamedPriors({"rate": dist.Poisson(1.0)}), r"`named`\['rate'\].*discrete"),
        (lambda: lp.NamedPriors({"rate": dist.Delta(1.0)}), r"`named`\['rate'\].*Delta.*`where`"),
        (lambda: lp.NamedPriors({"rate": dist.Dirichlet(jnp.ones(2))}), r"`named`\['rate'\].*arrays of shape \(2,\)"),
        (lambda: lp.NamedPriors({"rate": dist.Normal(0, 1)}, rest=-1.0), "`precision` must be positive"),
        (lambda: lp.Problem(DATA, lp.Gaussian(1.0), dist.Normal(0, 1)), "`prior` must be.*NamedPriors"),
        (lambda: lp.Gaussian(learned=True), "`learned`=True adjusts a given scale"),
        (lambda: lp.Gaussian(lower=0.0), "`scale` must be given with `lower`"),
        (lambda: lp.Gaussian(0.1, lower=2.0, upper=1.0), "`lower` must lie below `upper`"),
        (lambda: lp.LogNormal(0.1, lower=0.0), "`lower` must be positive"),
        (lambda: lp.NegativeBinomial(0.0), "`concentration` must be positive"),
        (lambda: lp.Problem(DATA, lp.NegativeBinomial(np.ones(3)), 1.0), "`concentration` has shape"),
    ],
)  # fmt: skip
def test_bad_priors_and_likelihoods(make, match):
    with pytest.raises(lp.LaplodeError, match=match):
        make()


def _with(named, rest=1.0, model=MODEL, likelihood=None):
    return lambda: lp.laplace(model, lp.Problem(DATA, likelihood or lp.Gaussian(0.1), lp.NamedPriors(named, rest)))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (_with({"speed": dist.Normal(0, 1)}), r"`named`\['speed'\].*no parameter of the model.*rate, share, amount"),
        (_with({"rate": dist.Normal(0, 1)}, rest=None), "`rest` of the prior is missing.*share"),
        (_with({"share": dist.Uniform(0.5, 1.0)}), "`model` has share = 0.3, at which its prior"),
        (_with({"rate": dist.Normal(jnp.zeros(3), 1.0)}), r"prior of rate has batch shape \(3,\)"),
        (_with({"rate": dist.Normal(0, 1)}, likelihood=lp.Gaussian()), r"takes predictions of shape \(9, 4\)"),
        (_with({"y0": dist.Normal(0, 1)}, model=lp.NeuralODE(Line(jnp.ones(2)), y0=[1.0, 1.0], scale=[1.0, 1.0]),
               likelihood=lp.Gaussian()), "`scale` of the model.*needs a prior of its own"),
        (_with({"y0": dist.Normal(0, 1)}, model=lp.NeuralODE(Line(jnp.ones(2)), y0=np.ones((2, 2)))),
         "`y0` of the model holds 2 initial states, but the data has N = 1"),
        (lambda: lp.laplace(MODEL, lp.Problem(DATA, lp.Gaussian(0.1), BENT), curvature="ggn", structure="low_rank"),
         r"`structure`=\"low_rank\" builds on a prior that is log-concave.*amount\[0\]"),
    ],
)  # fmt: skip
def test_priors_that_do_not_fit_the_model(make, match):
    with pytest.raises(lp.LaplodeError, match=match):
        make()

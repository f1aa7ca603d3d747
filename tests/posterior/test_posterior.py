"""The Gaussian posterior against dense algebra and its own draws."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st

import laplode as lp

KEY = jax.random.key(0)


def test_covariance_precision_and_marginals_fit_together(neural_posterior):
    precision, covariance = np.asarray(neural_posterior.precision()), np.asarray(neural_posterior.covariance())
    np.testing.assert_allclose(precision @ covariance, np.eye(27), atol=1e-10)
    np.testing.assert_allclose(covariance, covariance.T, atol=0)
    np.testing.assert_allclose(neural_posterior.marginal_std(), np.sqrt(np.diag(covariance)), rtol=1e-10)


def test_log_prob_against_scipy(neural_posterior):
    thetas = neural_posterior.mean + 0.3 * jax.random.normal(KEY, (5, 27))
    gaussian = st.multivariate_normal(neural_posterior.mean, np.linalg.inv(neural_posterior.precision()))
    np.testing.assert_allclose(neural_posterior.log_prob(thetas), gaussian.logpdf(thetas), rtol=1e-8)
    np.testing.assert_allclose(neural_posterior.log_prob(thetas[0]), gaussian.logpdf(thetas[0]), rtol=1e-8)


def test_log_determinant_and_evidence(neural_posterior):
    log_det = np.linalg.slogdet(neural_posterior.precision())[1]
    np.testing.assert_allclose(neural_posterior.built.log_det, log_det, rtol=1e-12)
    expected = neural_posterior.log_joint + 0.5 * 27 * np.log(2 * np.pi) - 0.5 * log_det
    np.testing.assert_allclose(neural_posterior.log_evidence, expected, rtol=1e-12)
    # The density at the mode is the same statement.
    at_mode = neural_posterior.log_joint - neural_posterior.log_prob(neural_posterior.mean)
    np.testing.assert_allclose(neural_posterior.log_evidence, at_mode, rtol=1e-12)


def test_draws_have_mean_and_covariance(neural_posterior):
    num = 20_000
    draws = np.asarray(neural_posterior.sample(KEY, num))
    assert draws.shape == (num, 27)
    covariance = np.asarray(neural_posterior.covariance())
    std = np.sqrt(np.diag(covariance))
    assert np.all(np.abs(draws.mean(axis=0) - neural_posterior.mean) < 5 * std / np.sqrt(num))
    error = np.sqrt((covariance**2 + np.outer(std, std) ** 2) / num)
    assert np.all(np.abs(np.cov(draws.T) - covariance) < 5 * error)


def test_draws_depend_on_the_key_alone(neural_posterior):
    np.testing.assert_array_equal(neural_posterior.sample(KEY, 3), neural_posterior.sample(KEY, 3))
    assert not np.any(neural_posterior.sample(KEY, 3) == neural_posterior.sample(jax.random.key(1), 3))


def test_unravel_gives_models(neural, neural_posterior):
    model = neural_posterior.unravel(neural_posterior.mean)
    assert isinstance(model, lp.NeuralODE)
    before, after = (jax.tree.leaves(eqx.filter(m, eqx.is_array)) for m in (neural.model, model))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_through_jit_and_vmap(neural_posterior):
    keys = jax.random.split(KEY, 3)
    jitted = eqx.filter_jit(lambda posterior, key: posterior.sample(key, 2))
    np.testing.assert_allclose(jitted(neural_posterior, keys[0]), neural_posterior.sample(keys[0], 2), rtol=1e-12)
    many = jax.vmap(lambda key: neural_posterior.sample(key, 2))(keys)
    np.testing.assert_allclose(many[2], neural_posterior.sample(keys[2], 2), rtol=1e-12)
    thetas = many.reshape(-1, 27)
    np.testing.assert_allclose(
        jax.vmap(neural_posterior.log_prob)(thetas), neural_posterior.log_prob(thetas), rtol=1e-12
    )
    gradient = jax.grad(lambda theta: neural_posterior.log_prob(theta))(thetas[0])
    expected = -neural_posterior.precision() @ (thetas[0] - neural_posterior.mean)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-9)


def test_a_batch_of_posteriors(growth, quiet):
    """Posteriors stack, and a stack of them is a posterior for vmap."""
    posteriors = [
        quiet(growth.model, eqx.tree_at(lambda p: p.prior, growth.problem, lp.GaussianPrior(np.array(precision))))
        for precision in (1.0, 50.0)
    ]
    arrays, static = eqx.partition(posteriors[0], eqx.is_array)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), arrays, eqx.filter(posteriors[1], eqx.is_array))
    stds = jax.vmap(lambda arrays: eqx.combine(arrays, static).marginal_std())(stacked)
    np.testing.assert_allclose(stds, [p.marginal_std() for p in posteriors], rtol=1e-12)


def test_it_is_frozen(growth_posterior):
    with pytest.raises(AttributeError):
        growth_posterior.log_joint = 0.0


@pytest.mark.parametrize("name", ["covariance", "precision"])
def test_matrices_that_do_not_fit_are_refused(growth_posterior, monkeypatch, name):
    monkeypatch.setattr("laplode._posterior.posterior.free_bytes", lambda: 100)
    with pytest.raises(lp.LaplodeError, match=rf"`{name}\(\)`.*3 × 3.*marginal_std"):
        getattr(growth_posterior, name)()
    assert growth_posterior.marginal_std().shape == (3,)


def test_a_summary_by_name_in_the_units_of_the_user(growth, growth_posterior):
    table = growth_posterior.summary(prob=0.9)
    assert list(table.index) == ["rate[0]", "rate[1]", "gain"]
    assert list(table.columns) == ["mean", "sd", "eti_5%", "eti_95%"]
    std = np.asarray(growth_posterior.marginal_std())
    np.testing.assert_allclose(table["mean"], growth_posterior.mean, rtol=1e-12)
    np.testing.assert_allclose(table["sd"], std, rtol=1e-10)
    np.testing.assert_allclose(table["eti_95%"], growth_posterior.mean + 1.6448536269514722 * std, rtol=1e-12)


def test_a_summary_of_a_positive_parameter_is_that_of_a_log_normal(growth, quiet):
    prior = lp.NamedPriors({"gain": dist.LogNormal(0.0, 1.0)}, rest=1.0)
    posterior = quiet(growth.model, lp.Problem(growth.problem.data, lp.LogNormal(0.1), prior))
    row, std = posterior.summary().loc["gain"], float(posterior.marginal_std()[2])
    exact = st.lognorm(std, scale=np.exp(float(posterior.mean[2])))
    found = [row["mean"], row["sd"], row["eti_3%"], row["eti_97%"]]
    np.testing.assert_allclose(found, [exact.mean(), exact.std(), *exact.ppf([0.03, 0.97])], rtol=1e-9)

"""Trajectories from initial states that are known up to a distribution."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import laplode as lp

TIGHT = diffrax.PIDController(rtol=1e-11, atol=1e-12)
KEY = jax.random.key(5)
SPREAD = np.array([[0.04, 0.03], [0.03, 0.09]])


def test_a_linear_model_in_closed_form(linear, linear_posterior):
    ts = np.array([0.0, 1.0, 2.5])
    y0 = dist.MultivariateNormal(jnp.array([[1.0, 2.0]]), jnp.asarray(SPREAD))
    design = linear.design(ts)
    start = np.tile(np.eye(2), (3, 1))
    expected = design @ np.linalg.inv(linear.precision) @ design.T + start @ SPREAD @ start.T
    predict = lambda num, method: lp.predict(
        linear_posterior, ts, y0, method=method, weigh=False, key=KEY, num_samples=num, progress=False
    )
    linearized, sampled = predict(3000, "linearized"), predict(20, "sampled")
    np.testing.assert_allclose(linearized.covariance()[0], expected, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(
        linearized.mean[0], np.array([1.0, 2.0]) + (design @ linear.mean).reshape(3, 2), rtol=1e-7
    )
    for found in (linearized, sampled):
        assert found.y0.shape == (len(found.thetas), 1, 2) and not found.observed_grid
        exact = np.einsum("ap,sp->sa", design, found.thetas).reshape(-1, 1, 3, 2) + np.asarray(found.y0)[:, :, None]
        np.testing.assert_allclose(found.f, exact, rtol=1e-6, atol=1e-7)
    drawn = np.asarray(linearized.f).reshape(3000, -1)
    np.testing.assert_allclose(np.cov(drawn.T), expected, atol=0.08 * np.max(expected))
    known = lp.predict(linear_posterior, ts, np.array([[1.0, 2.0]]), key=KEY, num_samples=4, progress=False)
    assert known.y0 is None


def test_two_trajectories_of_a_model_in_closed_form(growth, growth_posterior):
    """Under a LogNormal likelihood: linearized in logarithms for the draws, not for the covariance."""
    ts = np.array([0.0, 1.0, 3.0])
    mean, deviation = np.array([[1.5, 1.0], [2.0, 0.7]]), np.array([[0.1, 0.2], [0.05, 0.03]])
    y0 = dist.Gamma(jnp.asarray(mean / deviation) ** 2, jnp.asarray(mean / deviation**2))
    found = lp.predict(growth_posterior, ts, y0, key=KEY, num_samples=50, progress=False)
    model = lambda theta, y: growth_posterior.unravel(theta)(jnp.asarray(ts), y).ravel()
    theta, covariance = growth_posterior.mean, np.asarray(growth_posterior.covariance())
    for i in range(2):
        in_theta, in_state = jax.jacfwd(model, (0, 1))(theta, jnp.asarray(mean[i]))
        expected = in_theta @ covariance @ in_theta.T + (in_state * deviation[i] ** 2) @ in_state.T
        np.testing.assert_allclose(found.covariance()[i], expected, rtol=1e-6, atol=1e-12)
        at = model(theta, jnp.asarray(mean[i]))
        change = np.einsum("ap,sp->sa", in_theta, found.thetas - theta)
        change += np.einsum("ad,sd->sa", in_state, found.y0[:, i] - mean[i])
        np.testing.assert_allclose(found.f[:, i].reshape(50, -1), at * np.exp(change / at), rtol=1e-6)
    kept = lp.to_datatree(growth_posterior, found)["predictions"]["y0"]
    assert kept.dims == ("chain", "draw", "trajectory", "state")
    np.testing.assert_array_equal(kept[0], found.y0)
    sampled = lp.predict(
        growth_posterior, ts, y0, method="sampled", weigh=False, key=KEY, num_samples=5, progress=False
    )
    exact = jax.vmap(lambda theta, y0: jax.vmap(lambda y: model(theta, y))(y0))(sampled.thetas, sampled.y0)
    np.testing.assert_allclose(sampled.f.reshape(5, 2, -1), exact, rtol=1e-10)


def test_mixed_predictions_vary_within_their_parts_and_between_them(growth, growth_posterior, quiet):
    moved = eqx.tree_at(lambda m: m.gain, growth.model, jnp.array(1.4))
    posteriors, weights = (growth_posterior, quiet(moved, growth.problem)), np.array([0.3, 0.7])
    y0 = dist.LogNormal(jnp.log(jnp.array([[1.5, 1.0]])), jnp.array([[0.1, 0.2]]))
    ts = np.array([0.0, 1.0, 3.0])
    parts = [lp.predict(posterior, ts, y0, key=KEY, num_samples=20, progress=False) for posterior in posteriors]
    found = lp.mix(parts, np.log(weights))
    means = np.stack([part.mean.ravel() for part in parts])
    offsets = means - weights @ means
    within = sum(w * part.covariance()[0] for w, part in zip(weights, parts, strict=True))
    np.testing.assert_allclose(found.covariance()[0], within + (offsets.T * weights) @ offsets, rtol=1e-10)
    assert found.y0.shape == (20, 1, 2)


class Logistic(eqx.Module):
    rate: jax.Array

    def __call__(self, t, y, args):
        return self.rate * y * (1 - y)


def test_a_nonlinear_field(quiet):
    ts = np.array([0.0, 1.0, 2.0])
    exact = lambda rate, y: y / (y + (1 - y) * jnp.exp(-rate * jnp.asarray(ts)))
    data = lp.Trajectories(ts, np.asarray(exact(1.2, 0.2))[:, None], np.array([0.2]))
    model = lp.NeuralODE(Logistic(jnp.array(1.2)), stepsize_controller=TIGHT)
    posterior = quiet(model, lp.Problem(data, lp.Gaussian(0.05), 1.0), curvature="ggn")
    y0 = dist.Normal(jnp.array([[0.3], [0.6]]), 0.02)
    found = lp.predict(posterior, ts, y0, key=KEY, num_samples=4000, progress=False)
    for i, state in enumerate((0.3, 0.6)):
        in_rate, in_state = jax.jacfwd(exact, (0, 1))(1.2, state)
        expected = np.outer(in_rate, in_rate) * posterior.covariance()[0, 0] + np.outer(in_state, in_state) * 0.02**2
        np.testing.assert_allclose(found.covariance()[i], expected, rtol=1e-6, atol=1e-12)
    solved = jax.vmap(lambda rate, y: jax.vmap(lambda y: exact(rate, y[0]))(y))(found.thetas[:, 0], found.y0)
    np.testing.assert_allclose(np.std(solved, axis=0), np.std(found.f[..., 0], axis=0), rtol=0.05, atol=1e-3)


@pytest.mark.parametrize(
    ("y0", "match"),
    [
        (dist.Normal(jnp.zeros((1, 2, 2)), 1.0), "batch shape"),
        (dist.Poisson(jnp.ones((1, 2))), "batch shape"),
        (dist.Cauchy(jnp.ones((1, 2)), 1.0), "finite"),
        (dist.Dirichlet(jnp.ones((1, 2))), "MultivariateNormal"),
        (dist.Normal(jnp.ones((1, 3)), 1.0), "D = 3"),
    ],
)
def test_what_does_not_fit(linear_posterior, y0, match):
    with pytest.raises(lp.LaplodeError, match=match):
        lp.predict(linear_posterior, np.array([0.0, 1.0]), y0, key=KEY, num_samples=2, progress=False)

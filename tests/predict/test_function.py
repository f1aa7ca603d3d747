"""Functions of the model under the posterior."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplode as lp

KEY = jax.random.key(0)


def predict(posterior, function, **options):
    return lp.predict_function(posterior, function, **{"num_samples": 200, "key": KEY, "progress": False} | options)


def test_the_delta_method(growth_posterior):
    found = predict(growth_posterior, lambda model: jnp.outer(model.rate, model.gain**2 * jnp.ones(3)))
    assert found.mean.shape == found.std.shape == (2, 3) and found.draws.shape == (200, 2, 3)
    exact = lambda theta: jnp.outer(theta[:2], theta[2] ** 2 * jnp.ones(3)).ravel()
    theta = growth_posterior.mean
    jacobian = jax.jacfwd(exact)(theta)
    np.testing.assert_allclose(found.mean.ravel(), exact(theta), rtol=1e-12)
    covariance = jacobian @ growth_posterior.covariance() @ jacobian.T
    np.testing.assert_allclose(found.covariance(), covariance, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(found.std.ravel(), np.sqrt(np.diag(covariance)), rtol=1e-9)
    expected = exact(theta) + (found.thetas - theta) @ jacobian.T
    np.testing.assert_allclose(found.draws.reshape(200, -1), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["sampled", lp.Sampled(df=5.0), lp.Geodesic()], ids=str)
def test_at_draws(growth_posterior, method):
    found = predict(growth_posterior, lambda model: model.gain**2, method=method, weigh=False)
    np.testing.assert_allclose(found.draws, found.thetas[:, 2] ** 2, rtol=1e-12)
    np.testing.assert_allclose(found.std, np.std(found.draws, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(found.covariance(), [[np.var(found.draws, ddof=1)]], rtol=1e-10)


def test_where_it_is_not_finite(growth_posterior):
    root = lambda model: jnp.sqrt(model.gain - growth_posterior.mean[2] + 0.05)
    with pytest.warns(lp.LaplodeWarning, match="not finite at"):
        found = predict(growth_posterior, root, method="sampled", weigh=False)
    assert 0 < found.ok.sum() < 200 and np.all(np.isnan(found.draws[~found.ok])) and np.isfinite(found.std)
    with pytest.raises(lp.LaplodeError, match="`function` is not finite at the fitted model"):
        predict(growth_posterior, lambda model: jnp.log(model.gain * 0.0))
    with pytest.raises(lp.LaplodeError, match="`function` fails at the fitted model: AttributeError"):
        predict(growth_posterior, lambda model: model.nothing)
    with pytest.raises(lp.LaplodeError, match="floating point numbers"):
        predict(growth_posterior, lambda model: 3)


def test_the_vector_field(linear, linear_posterior):
    """dy/dt = w φ(t) is linear in w, whatever the state."""
    states, ts = np.zeros((4, 2)), np.linspace(0, 3, 4)
    found = predict(linear_posterior, lp.field_at(states, ts))
    basis = np.stack([np.ones(4), np.sin(ts), np.cos(2 * ts)], axis=-1)
    design = np.zeros((4, 2, 6))
    design[:, 0, :3] = design[:, 1, 3:] = basis
    design = design.reshape(8, 6)
    np.testing.assert_allclose(found.mean.ravel(), design @ linear.mean, rtol=1e-10)
    expected = design @ np.linalg.inv(linear.precision) @ design.T
    np.testing.assert_allclose(found.covariance(), expected, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(predict(linear_posterior, lp.field_at(states[:1])).mean, found.mean[:1], rtol=1e-12)


def test_a_point_of_a_trajectory(linear, linear_posterior, growth_posterior):
    """It is what `predict` says there, of a `NeuralODE` and of a model of one's own."""
    for posterior, trajectory, channel in ((linear_posterior, 0, 1), (growth_posterior, 1, 0)):
        ts = np.array([1.0, 5.0])
        whole = lp.predict(posterior, ts, key=KEY, num_samples=2, progress=False)
        found = predict(posterior, lp.trajectory_at(ts, channel, trajectory), num_samples=2)
        np.testing.assert_allclose(found.mean, whole.mean[trajectory, :, channel], rtol=1e-7)
        covariance = whole.covariance()[trajectory, channel::2, channel::2]
        np.testing.assert_allclose(found.covariance(), covariance, rtol=1e-6, atol=1e-12)
        one = predict(posterior, lp.trajectory_at(5.0, channel=channel, trajectory=trajectory), num_samples=2)
        assert one.mean.shape == () and one.draws.shape == (2,)
        np.testing.assert_allclose(one.mean, found.mean[1], rtol=1e-7)


def test_a_trajectory_whose_initial_state_is_learned(quiet):
    class Decay(eqx.Module):
        rate: jax.Array

        def __call__(self, t, y, args):
            return -self.rate * y

    ts = np.linspace(0, 1, 4)
    y0 = jnp.array([[1.0], [2.0]])
    data = lp.Trajectories(ts, y0[:, None, :] * np.exp(-ts)[:, None])
    model = lp.NeuralODE(Decay(jnp.array(1.0)), y0=y0)
    posterior = quiet(model, lp.Problem(data, lp.Gaussian(0.1), 1.0), curvature="ggn")
    found = predict(posterior, lp.trajectory_at(2.0, channel=0, trajectory=1), num_samples=2)
    np.testing.assert_allclose(found.mean, 2 * np.exp(-2), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: lp.field_at([1.0, 2.0]), "`states`"),
        (lambda: lp.field_at([[1.0, np.nan]]), "`states`"),
        (lambda: lp.field_at([[1.0, 2.0]], [0.0, 1.0]), "`ts`"),
        (lambda: lp.field_at([[1.0, 2.0]], args=np.zeros(3)), "`args`"),
        (lambda: lp.field_at([[1.0, 2.0]]), "`field_at`.*Growth"),
        (lambda: lp.trajectory_at(np.inf, 0), "`t`"),
        (lambda: lp.trajectory_at([2.0, 1.0], 0), "`t`"),
        (lambda: lp.trajectory_at(1.0, -1), "`channel`"),
        (lambda: lp.trajectory_at(1.0, 2), "`channel` = 2, but the data have 2"),
        (lambda: lp.trajectory_at(1.0, 0, 2), "`trajectory` = 2, but the data have 2"),
        (lambda: lp.trajectory_at(-1.0, 0), "`t` = -1 is before"),
        (lambda: lp.trajectory_at(0.0, 0), "`t` = 0 is the time of the initial state"),
    ],
)
def test_what_does_not_fit(growth_posterior, make, match):
    with pytest.raises(lp.LaplodeError, match=match):
        predict(growth_posterior, make())

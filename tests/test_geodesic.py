"""Draws along geodesics: where the answer is known, and where plain draws fail."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate as si

import laplode as lp

KEY = jax.random.key(0)


def draw(posterior, ts=None, method="geodesic", **options):
    ts = posterior.problem.data.ts if ts is None else ts
    return lp.predict(posterior, ts, method=method, **{"key": KEY, "progress": False, "num_samples": 64} | options)


# ---- Linear in the parameters: geodesics are straight, and everything is conjugate


def test_all_methods_agree_on_a_linear_model(linear, linear_posterior):
    found = {
        method: draw(linear_posterior, method=method, khat=True) for method in ("linearized", "sampled", "geodesic")
    }
    exact = linear.problem.data.y0 + (found["geodesic"].thetas @ linear.design(linear.problem.data.ts[0]).T).reshape(
        64, 1, -1, 2
    )
    conjugate = linear_posterior.log_evidence
    for predictions in found.values():
        assert np.all(predictions.ok) and predictions.khat < 0
        np.testing.assert_allclose(predictions.thetas, found["linearized"].thetas, rtol=0, atol=1e-8)
        np.testing.assert_allclose(predictions.epistemic, exact, rtol=0, atol=1e-8)
        np.testing.assert_allclose(predictions.predictive, found["linearized"].predictive, rtol=0, atol=1e-8)
        # The weight of every draw is the evidence.
        np.testing.assert_allclose(predictions.log_p - predictions.log_q, conjugate, rtol=1e-8)
    # The draws are the whitened normals of the conjugate posterior.
    white = (np.asarray(found["geodesic"].thetas) - linear.mean) @ np.linalg.cholesky(linear.precision)
    assert abs(np.mean(white**2) - 1) < 5 * np.sqrt(2 / white.size)


# ---- Strongly curved: y' = -(b + a²) y, whose data fix b + a² alone


class Parabola(eqx.Module):
    a: jax.Array
    b: jax.Array

    def __call__(self, t, y, args):
        return -(self.b + self.a**2) * y


BANANA_TS = np.linspace(0, 2, 6)
RATE, NOISE = 0.0, 0.1


@pytest.fixture(scope="module")
def banana():
    ys = np.exp(-RATE * BANANA_TS)[:, None]
    ys[0] = np.nan  # known
    data = lp.Trajectories(BANANA_TS, ys, np.ones(1))
    problem = lp.Problem(data, lp.LogNormal(NOISE), 1.0)
    model = lp.NeuralODE(Parabola(jnp.array(0.1), jnp.array(0.1)))
    fit = lp.refine(model, problem, curvature="ggn", decrement=1e-10, progress=False)
    return lp.laplace(fit.model, fit.problem, curvature="ggn", progress=False)


@pytest.fixture(scope="module")
def banana_exactly():
    """The moments and the evidence of (a, b), by quadrature in a and c = b + a²."""
    a, c = np.linspace(-4, 4, 2001), np.linspace(RATE - 1, RATE + 1, 2001)
    b = c[:, None] - a**2
    rates = np.broadcast_to(c[:, None], b.shape)
    squares = np.sum(BANANA_TS**2)
    # log y = -c t, seen where it is -RATE t
    log_p = -0.5 * (rates - RATE) ** 2 * squares / NOISE**2 - 0.5 * (a**2 + b**2)
    p = np.exp(log_p)
    over = lambda f: si.simpson(si.simpson(f * p, a), c)
    total = over(1.0)
    moments = [over(f) / total for f in (a, b, a**2, b**2, a * b)]
    jacobian = np.sum(RATE * BANANA_TS[1:])  # of log y
    constants = -0.5 * 5 * np.log(2 * np.pi * NOISE**2) + jacobian - np.log(2 * np.pi)
    return np.array(moments), np.log(total) + constants


def moments_of(thetas, log_weights):
    a, b = np.asarray(thetas).T
    return np.exp(np.asarray(log_weights)) @ np.stack([a, b, a**2, b**2, a * b], axis=1)


@pytest.mark.filterwarnings("ignore::laplode.LaplodeWarning")
def test_a_banana(banana, banana_exactly):
    moments, log_evidence = banana_exactly
    geodesic, plain = (draw(banana, method=method, num_samples=1000) for method in ("geodesic", "sampled"))
    assert np.all(geodesic.ok) and geodesic.khat < 0.7 < plain.khat
    a, b = np.asarray(geodesic.thetas).T
    weights = np.exp(np.asarray(geodesic.log_weights))
    found = weights @ np.stack([a, b, a**2, b**2, a * b], axis=1)
    np.testing.assert_allclose(found[[1, 2, 3]], moments[[1, 2, 3]], rtol=0.1)
    np.testing.assert_allclose(found[[0, 4]], 0, atol=0.1 * np.sqrt(moments[[2, 3]]))  # by symmetry
    # This surface is a cylinder, so that the density of the draws is exact: the mean weight is the evidence.
    mean = jax.scipy.special.logsumexp(geodesic.log_p - geodesic.log_q) - np.log(1000)
    np.testing.assert_allclose(mean, log_evidence, atol=0.1)
    print(moments, found, geodesic.khat, plain.khat, mean, log_evidence)


# ---- Weakly identified: y' = -v y / (k + y), whose data hardly tell k


class MichaelisMenten(eqx.Module):
    log_v: jax.Array
    log_k: jax.Array

    def __call__(self, t, y, args):
        return -jnp.exp(self.log_v) * y / (jnp.exp(self.log_k) + y)


@pytest.mark.parametrize("method", ["sampled", "geodesic"])
def test_heavy_tails_are_reported(method):
    truth = np.log([1.0, 2.0])
    model = lp.NeuralODE(MichaelisMenten(*map(jnp.asarray, truth)))
    ts = np.linspace(0, 4, 8)
    data = lp.Trajectories(ts, model(ts, jnp.ones(1)), np.ones(1))
    # The prior is wide, and centered at the truth so that the optimum is known.
    for noise in (0.02, 0.05, 0.1):
        for prec in (0.01, 0.1):
            problem = lp.Problem(data, lp.Gaussian(noise), lp.GaussianPrior(prec, truth))
            posterior = lp.laplace(model, problem, curvature="ggn", progress=False)
            found = draw(posterior, method=method, num_samples=1000)
            print(
                noise,
                prec,
                method,
                posterior.marginal_std(),
                found.khat,
                found.ok.mean(),
                float(posterior.log_evidence),
                jax.scipy.special.logsumexp(found.log_p - found.log_q) - np.log(1000),
            )

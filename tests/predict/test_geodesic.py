"""Draws along geodesics: where the answer is known, and where plain draws fail."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate as si
from conftest import TIGHT

import laplode as lp
from laplode._predict.geodesic import follow
from laplode._predict.surface import Surface, log_volume

KEY = jax.random.key(0)


def draw(posterior, ts=None, method="geodesic", **options):
    ts = posterior.problem.data.ts if ts is None else ts
    return lp.predict(posterior, ts, method=method, **{"key": KEY, "progress": False, "num_samples": 64} | options)


# ---- Linear in the parameters: geodesics are straight, and everything is conjugate


def test_all_methods_agree_on_a_linear_model(linear, linear_posterior):
    found = {
        method: draw(linear_posterior, method=method, weigh=True) for method in ("linearized", "sampled", "geodesic")
    }
    exact = linear.problem.data.y0 + (found["geodesic"].thetas @ linear.design(linear.problem.data.ts[0]).T).reshape(
        64, 1, -1, 2
    )
    conjugate = linear_posterior.log_evidence
    for predictions in found.values():
        assert np.all(predictions.ok) and predictions.khat < 0
        np.testing.assert_allclose(predictions.thetas, found["linearized"].thetas, rtol=0, atol=1e-8)
        np.testing.assert_allclose(predictions.f, exact, rtol=0, atol=1e-8)
        np.testing.assert_allclose(predictions.y, found["linearized"].y, rtol=0, atol=1e-8)
        # The weight of every draw is the evidence.
        np.testing.assert_allclose(predictions.log_p - predictions.log_q, conjugate, rtol=1e-8)
    # The draws are the whitened normals of the conjugate posterior.
    white = (np.asarray(found["geodesic"].thetas) - linear.mean) @ np.linalg.cholesky(linear.precision)
    assert abs(np.mean(white**2) - 1) < 5 * np.sqrt(2 / white.size)


# ---- Strongly curved: y' = -(b + a²) y, whose data fix b + a² to 0.03 while a is anywhere within ±2


class Parabola(eqx.Module):
    a: jax.Array
    b: jax.Array

    def __call__(self, t, y, args):
        return -(self.b + self.a**2) * y


BANANA_TS, NOISE, PRECISION = np.linspace(0, 2, 6), 0.1, np.array([1.0, 0.01])


@pytest.fixture(scope="module")
def banana(quiet):
    ys = np.ones((6, 1))
    ys[0] = np.nan  # known
    problem = lp.Problem(lp.Trajectories(BANANA_TS, ys, np.ones(1)), lp.LogNormal(NOISE), PRECISION)
    model = lp.NeuralODE(Parabola(jnp.array(0.0), jnp.array(0.0)))
    return quiet(model, problem, curvature="ggn")  # which says that a is without influence: at 0 it is


def banana_by_quadrature():
    """Mean and variance of a and b, and the log evidence, on a grid of a and c = b + a²; log y = −c t."""
    a, c = np.linspace(-6, 6, 1001), np.linspace(-0.5, 0.5, 1001)
    b = c[:, None] - a**2
    misfit = np.sum(BANANA_TS**2) * c[:, None] ** 2 / NOISE**2
    p = np.exp(-0.5 * (misfit + PRECISION[0] * a**2 + PRECISION[1] * b**2))
    over = lambda f: si.simpson(si.simpson(f * p, a), c)
    total = over(1.0)
    mean = np.array([over(a), over(b)]) / total
    variance = np.array([over(a**2), over(b**2)]) / total - mean**2
    log_evidence = np.log(total) - 5 / 2 * np.log(2 * np.pi * NOISE**2)
    return mean, variance, log_evidence + 0.5 * np.sum(np.log(PRECISION / (2 * np.pi)))


@pytest.mark.filterwarnings("ignore::laplode.LaplodeWarning")
def test_a_banana(banana):
    num = 2000
    geodesic, plain = (draw(banana, method=method, num_samples=num) for method in ("geodesic", "sampled"))
    assert np.all(geodesic.ok) and geodesic.khat < 0.7 < plain.khat
    exact_mean, exact_variance, log_evidence = banana_by_quadrature()
    thetas, scale = np.asarray(geodesic.thetas), np.sqrt(exact_variance)
    for weights in (np.exp(np.asarray(geodesic.log_weights)), np.full(num, 1 / num)):
        mean = weights @ thetas
        np.testing.assert_allclose((mean - exact_mean) / scale, 0, atol=0.1)
        np.testing.assert_allclose(np.sqrt(weights @ (thetas - mean) ** 2), scale, rtol=0.1)
    # The surface is a cylinder, where the density of the draws is exact: their mean weight is the evidence.
    mean_weight = jax.scipy.special.logsumexp(geodesic.log_p - geodesic.log_q) - np.log(num)
    np.testing.assert_allclose(mean_weight, log_evidence, atol=0.05)


# ---- Weakly identified: y' = -v y / (k + y), whose data hardly tell k


class MichaelisMenten(eqx.Module):
    log_v: jax.Array
    log_k: jax.Array

    def __call__(self, t, y, args):
        return -jnp.exp(self.log_v) * y / (jnp.exp(self.log_k) + y)


@pytest.fixture(scope="module")
def elimination():
    truth = np.log([1.0, 2.0])
    model = lp.NeuralODE(MichaelisMenten(*map(jnp.asarray, truth)), stepsize_controller=TIGHT)
    ts = np.linspace(0, 4, 8)
    data = lp.Trajectories(ts, model(ts, jnp.ones(1)), np.ones(1))
    # The prior is wide, and centered at the truth so that the optimum is known.
    problem = lp.Problem(data, lp.Gaussian(0.1), lp.GaussianPrior(0.01, truth))
    return lp.laplace(model, problem, curvature="ggn", progress=False)


def test_heavy_tails_are_reported(elimination):
    with pytest.warns(lp.LaplodeWarning, match=r"Pareto k̂ = .* is above 0.67.*move vector_field.log_[vk]"):
        found = draw(elimination, method="sampled", num_samples=1000)
    assert found.khat > 0.7


def test_draws_are_the_nearest_points(elimination):
    """What remains from a draw to the end of its line is normal to the surface there."""
    (surface, origin), mean = Surface.of(elimination, 1e-6), elimination.mean
    lines = elimination.sample(KEY, 8) - mean
    ends = follow(surface, origin, lines, progress=False)
    assert np.all(ends.ok)
    start = surface.tangent(mean)
    for line, theta in zip(lines, ends.thetas, strict=True):
        white = line * surface.root_prior
        off_theta = (theta - mean) * surface.root_prior - white
        there, seen = surface.renewed(jnp.asarray(theta))
        off_seen = seen - origin.seen - start @ white
        along = off_theta + off_seen @ there.tangent(jnp.asarray(theta))
        np.testing.assert_allclose(along, 0, atol=1e-4)
        assert np.linalg.norm(off_seen) > 1e-3  # so that this is no matter of course


def test_the_density_of_draws(elimination):
    """Against differences of where neighboring lines end."""
    (surface, origin), mean, h = Surface.of(elimination, 1e-8), elimination.mean, 1e-3
    lines = 0.7 * (elimination.sample(KEY, 6) - mean)
    steps = h * np.linalg.cholesky(elimination.covariance())
    around = np.concatenate([lines + sign * step for step in steps.T for sign in (1, -1)])
    ends = follow(surface, origin, jnp.concatenate([lines, around]), progress=False)
    assert np.all(ends.ok)
    found = log_volume(surface, origin, lines, jnp.asarray(ends.thetas[:6]))
    moved = ends.thetas[6:].reshape(2, 2, 6, 2)
    by_line = (moved[:, 0] - moved[:, 1]).transpose(1, 2, 0)  # (draws, θ, direction)
    expected = np.log(np.linalg.det(2 * steps)) - np.log(np.linalg.det(by_line))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.ptp(expected) > 0.5


# ---- A model of one's own that can't be differentiated twice


class Exact(eqx.Module):
    rate: jax.Array

    def __call__(self, ts, y0):
        return y0 * jnp.exp(-self.rate * ts)[:, None]


class Decay(eqx.Module):
    rate: jax.Array

    def __call__(self, ts, y0):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: -rate * y),
            diffrax.Heun(),
            ts[0],
            ts[-1],
            0.05,
            y0,
            self.rate,
            saveat=diffrax.SaveAt(ts=ts),
            max_steps=64,
        )
        return solution.ys


def test_a_model_without_second_derivatives():
    ts = np.linspace(0, 2, 6)
    ys = np.exp(-0.8 * ts)[:, None]
    problem = lp.Problem(lp.Trajectories(ts, ys, np.ones(1)), lp.Gaussian(0.2), 1.0)
    model = Decay(jnp.array(0.7842))
    posterior = lp.laplace(model, problem, curvature="ggn", progress=False)
    own = draw(posterior, num_samples=32, weigh=True)
    assert np.all(own.ok) and own.khat < 0.7
    twice = lp.laplace(Exact(model.rate), problem, curvature="ggn", progress=False)
    same = draw(twice, num_samples=32, weigh=False)
    # With the second derivatives steps are others, but they lead to the same points.
    np.testing.assert_allclose(own.thetas, same.thetas, atol=0.02)

"""A known noise scale for every value."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplode as lp

TS, Y0 = np.linspace(0, 2, 5), np.array([[1.0, 0.5], [0.3, 2.0]])


class Lines(eqx.Module):
    """Linear in its parameters, so that the posterior is known in closed form."""

    slope: jax.Array
    bend: jax.Array

    def __call__(self, ts, y0):
        return y0 + ts[:, None] * self.slope + ts[:, None] ** 2 * self.bend


MODEL = Lines(jnp.array([0.4, -0.2]), jnp.array([0.1, 0.3]))
RNG = np.random.default_rng(0)
SCALE = RNG.uniform(0.02, 0.5, (2, 5, 2))
YS = np.stack([np.asarray(MODEL(TS, y)) for y in Y0]) + SCALE * RNG.normal(size=SCALE.shape)
YS[:, 0], YS[1, 2, 0] = np.nan, np.nan
KNOWN = np.where(np.isnan(YS), np.nan, SCALE)
DATA = lp.Trajectories(TS, YS, Y0)


def posterior(likelihood=None, **options):
    problem = lp.Problem(DATA, lp.Gaussian(KNOWN) if likelihood is None else likelihood, 2.0)
    fit = lp.refine(MODEL, problem, progress=False)
    return lp.laplace(fit.model, problem, progress=False, **options)


def conjugate(factor=1.0):
    """Mean, covariance and evidence of Bayesian linear regression with these scales."""
    seen, scale = ~np.isnan(YS), factor * SCALE
    t = np.broadcast_to(TS[None, :, None], YS.shape)
    channel = np.broadcast_to(np.arange(2), YS.shape)
    design = np.stack([np.where(channel == k, t**p, 0) for p in (1, 2) for k in (0, 1)], axis=-1)[seen]
    y = (YS - Y0[:, None])[seen]
    marginal = design @ design.T / 2.0 + np.diag(scale[seen] ** 2)
    precision = 2.0 * np.eye(4) + design.T @ (design / scale[seen, None] ** 2)
    mean = np.linalg.solve(precision, design.T @ (y / scale[seen] ** 2))
    log_evidence = -0.5 * (
        y @ np.linalg.solve(marginal, y) + np.linalg.slogdet(marginal)[1] + len(y) * np.log(2 * np.pi)
    )
    return mean, np.linalg.inv(precision), log_evidence


@pytest.mark.parametrize("structure", ["full", "low_rank"])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_a_scale_for_every_value_is_that_of_linear_regression(curvature, structure):
    found = posterior(curvature=curvature, structure=structure)
    mean, covariance, log_evidence = conjugate()
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6)  # where refine's decrement ends
    np.testing.assert_allclose(found.marginal_std(), np.sqrt(np.diag(covariance)), rtol=1e-8)
    np.testing.assert_allclose(found.log_evidence, log_evidence, rtol=1e-8)


def test_the_evidence_finds_a_factor_on_all_scales():
    best = lp.maximize_evidence(posterior(), precision="fixed", noise="one", online=True, progress=False)
    factors = np.asarray(best.problem.likelihood.scale)[~np.isnan(KNOWN)] / SCALE[~np.isnan(KNOWN)]
    np.testing.assert_allclose(factors, factors[0], rtol=1e-10)
    grid = np.linspace(0.5, 1.5, 2001)
    assert abs(factors[0] - grid[np.argmax([conjugate(f)[2] for f in grid])]) < 1e-3


def test_predictions_of_other_values_say_what_they_need():
    found = posterior()
    options = {"key": jax.random.key(0), "progress": False}
    for ts in (TS, np.linspace(0, 2, 9)):  # at the times of the data some values were not observed
        with pytest.raises(lp.LaplodeError, match=r"`scale` is missing"):
            lp.predict(found, ts, **options)
    with pytest.raises(lp.LaplodeError, match=r"`scale` must be a number, or have shape \(2,\) or \(2, 9, 2\)"):
        lp.predict(found, np.linspace(0, 2, 9), scale=np.ones(3), **options)
    with pytest.raises(lp.LaplodeError, match="`scale` must be positive"):
        lp.predict(found, TS, scale=-1.0, **options)
    with pytest.raises(lp.LaplodeError, match="Leave `scale` out"):
        lp.predict(posterior(lp.Gaussian(0.1)), TS, scale=0.1, **options)
    with pytest.raises(lp.LaplodeError, match="`scale` is missing"):
        lp.information_gain(found, np.linspace(0, 3, 9))


def test_predictions_with_the_scale_that_they_need():
    found = posterior()
    for scale in (0.3, np.array([0.1, 0.7]), RNG.uniform(0.1, 1.0, (2, 5, 2))):
        p = lp.predict(found, TS, scale=scale, num_samples=4000, key=jax.random.key(1), progress=False)
        noise = np.std(np.asarray(p.y - p.f), axis=0)
        np.testing.assert_allclose(noise, np.broadcast_to(scale, noise.shape), rtol=0.05)
        assert np.all(np.isfinite(p.log_likelihood[:, ~np.isnan(KNOWN)]))
    all_known = posterior(lp.Gaussian(SCALE))
    p = lp.predict(all_known, TS, num_samples=4000, key=jax.random.key(1), progress=False)
    np.testing.assert_allclose(np.std(np.asarray(p.y - p.f), axis=0), SCALE, rtol=0.05)


def test_what_a_planned_measurement_tells_depends_on_its_scale():
    found, ts = posterior(), np.linspace(0, 3, 4)
    covariance = conjugate()[1]
    for scale in (0.1, 0.4):
        gain = lp.information_gain(found, ts, scale=scale).each[0, 3, 0]
        row = np.array([ts[3], 0, ts[3] ** 2, 0])
        np.testing.assert_allclose(gain, 0.5 * np.log1p(row @ covariance @ row / scale**2), rtol=1e-8)


def test_it_is_saved(tmp_path):
    found = posterior()
    lp.save(tmp_path / "posterior", found)
    again = lp.load(tmp_path / "posterior", like=MODEL)
    np.testing.assert_array_equal(again.problem.likelihood.scale, KNOWN)
    assert float(again.log_evidence) == float(found.log_evidence)


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (np.ones((2, 4, 2)), r"shape \(2, 4, 2\) but ys has K = 2 channels.*\(2,\) or \(2, 5, 2\)"),
        (np.where(np.arange(5)[None, :, None] == 3, np.nan, SCALE), r"`scale` is NaN at \[0, 3, 0\], where ys is"),
        (np.ones((5, 2)), r"`scale` must be a scalar or have shape \(K,\) or \(N, T, K\)"),
        (-SCALE, "`scale` must be positive"),
        (np.nan, "`scale` must be positive"),
    ],
)
def test_scales_that_do_not_fit(scale, words):
    with pytest.raises(lp.LaplodeError, match=words):
        lp.Problem(DATA, lp.Gaussian(scale), 1.0)


def test_scales_of_values_are_not_learned_one_by_one():
    with pytest.raises(lp.LaplodeError, match="maximize_evidence"):
        lp.Gaussian(SCALE, learned=True)


def test_learned_scales_are_one_for_each_channel():
    for channels in (1, 2):
        data = lp.Trajectories(TS, YS[..., :channels], Y0[:, :channels])
        model = Lines(*(leaf[:channels] for leaf in (MODEL.slope, MODEL.bend)))
        found = lp.laplace(model, lp.Problem(data, lp.Gaussian(0.1), 2.0), curvature="ggn", progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lp.LaplodeWarning)
            found = lp.maximize_evidence(found, precision="fixed", progress=False)
        assert found.problem.likelihood.scale.shape == (channels,)

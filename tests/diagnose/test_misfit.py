"""A covariance by scores, and residuals, where the model is right and where it is not."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplode as lp

TS, NUM, SCALE = np.linspace(0, 2, 20), 600, 0.1


class Line(eqx.Module):
    """Trajectories y0 + slope t + bend t², linear in two parameters."""

    slope: jax.Array
    bend: jax.Array

    def __call__(self, ts, y0):
        return y0 + self.slope * ts[:, None] + self.bend * ts[:, None] ** 2


def posterior_of(noise, precision=1.0, curvature="hessian"):
    """With noise (N, T) on the truth, which is the mean of the prior, at the exact optimum."""
    design = np.stack([TS, TS**2], axis=1)
    truth = np.array([0.5, -0.3])
    seen = design @ truth + noise
    total = NUM * design.T @ design / SCALE**2 + precision * np.eye(2)
    slope, bend = np.linalg.solve(total, design.T @ seen.sum(axis=0) / SCALE**2 + precision * truth)
    data = lp.Trajectories(TS, seen[..., None], np.zeros((NUM, 1)))
    problem = lp.Problem(data, lp.Gaussian(SCALE), lp.GaussianPrior(precision, truth))
    return lp.laplace(Line(jnp.array(slope), jnp.array(bend)), problem, curvature=curvature, progress=False)


def white(seed):
    return SCALE * np.random.default_rng(seed).normal(size=(NUM, 20))


@pytest.mark.parametrize("blocks", [1, 4])
def test_where_the_model_is_right_it_is_the_posterior(blocks):
    posterior = posterior_of(white(0))
    found, root = lp.sandwich(posterior, blocks=blocks), np.linalg.cholesky(posterior.precision())
    # A Wishart matrix of so many units.
    np.testing.assert_allclose(root.T @ found @ root, np.eye(2), atol=5 * np.sqrt(2 / (NUM * blocks)))


def test_with_a_strong_prior_too():
    posterior = posterior_of(white(1), precision=1e5)
    found, root = lp.sandwich(posterior), np.linalg.cholesky(posterior.precision())
    np.testing.assert_allclose(root.T @ found @ root, np.eye(2), atol=5 * np.sqrt(2 / NUM))


def test_correlated_noise_makes_it_as_wide_as_estimates_are():
    def correlated(seed):  # the sum of white noise and one number for each trajectory, with the same variance
        rng = np.random.default_rng(seed)
        return SCALE * np.sqrt(0.5) * (rng.normal(size=(NUM, 20)) + rng.normal(size=(NUM, 1)))

    posterior = posterior_of(correlated(0))
    design = np.stack([TS, TS**2], axis=1)
    inverse = np.linalg.inv(NUM * design.T @ design)
    covariance = SCALE**2 * (0.5 * np.eye(20) + 0.5)
    exact = inverse @ (NUM * design.T @ covariance @ design) @ inverse  # of the estimates
    found = np.asarray(lp.sandwich(posterior))
    np.testing.assert_allclose(found, exact, rtol=0.25)
    assert np.all(np.diag(found) > 1.5 * np.diag(posterior.covariance()))
    # The residuals say so; those of white noise do not.
    assert np.mean(lp.residual_table(posterior)["z_score"]) > 1
    assert abs(np.mean(lp.residual_table(posterior_of(white(2)))["z_score"])) < 0.5


def test_residuals_are_those_of_the_data():
    noise = white(3)
    noise[2, 4:9] = np.nan
    seen = np.stack([TS, TS**2], axis=1) @ [0.5, -0.3] + noise
    data = lp.Trajectories(TS, seen[..., None], np.zeros((NUM, 1)))
    model = Line(jnp.array(0.5), jnp.array(-0.3))
    posterior = lp.laplace(model, lp.Problem(data, lp.Gaussian(SCALE), 1.0), curvature="ggn", progress=False)
    table = lp.residual_table(posterior)
    z = noise[5] / SCALE
    row = table.iloc[5]
    np.testing.assert_allclose(row[["mean", "sd", "largest"]], [z.mean(), z.std(ddof=1), np.abs(z).max()], rtol=1e-8)
    np.testing.assert_allclose(row["autocorrelation"], z[1:] @ z[:-1] / (z @ z), rtol=1e-8)
    assert list(table["count"][:4]) == [20, 20, 15, 20]


def test_too_few_units_are_named(growth_posterior):
    with pytest.warns(lp.LaplodeWarning, match="the data are 2 units, and determine 3.0"):
        lp.sandwich(growth_posterior)
    with pytest.raises(lp.LaplodeError, match="`blocks` = 10, but a trajectory has 9 times"):
        lp.sandwich(growth_posterior, blocks=10)

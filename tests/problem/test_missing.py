"""A linear compartment model with observations missing in any pattern."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

import laplode as lp

TS = np.array([0.0, 0.4, 1.0, 1.9, 3.0])
EXCHANGE = np.array([[-0.9, 0.3], [0.5, -0.4]])
SCALE, PRECISION = np.array([0.1, 0.3]), np.array([0.5, 2.0])


class Compartments(eqx.Module):
    """Two compartments that exchange at known rates, with unknown constant inflows."""

    inflow: jax.Array

    def __call__(self, t, y, args):
        return EXCHANGE @ y + self.inflow


def _design():
    """Rows (time, compartment), columns the inflows and the initial amounts."""
    rows = [expm(np.block([[EXCHANGE, np.eye(2)], [np.zeros((2, 4))]]) * t)[:2] for t in TS]
    return np.concatenate([np.concatenate([row[:, 2:], row[:, :2]], axis=1) for row in rows])


DESIGN = _design()
PRIOR = np.repeat(PRECISION, 2)
YS = DESIGN @ [1.0, 0.3, 2.0, 0.5] + np.tile(SCALE, 5) * np.random.default_rng(0).normal(size=10)


def patterns():
    """Which of the observations are there: all but one, one alone, a channel, a time, and at random."""
    yield pytest.param(np.ones(10, bool), id="complete")
    yield pytest.param(np.arange(10) != 4, id="all but one")
    yield pytest.param(np.arange(10) == 7, id="one alone")
    yield pytest.param(np.arange(10) % 2 == 1, id="one compartment")
    yield pytest.param(np.arange(10) // 2 != 0, id="not the first time")
    yield pytest.param(np.arange(10) // 2 == 4, id="the last time alone")
    rng = np.random.default_rng(1)
    for i in range(6):
        yield pytest.param(rng.uniform(size=10) < rng.uniform(0.3, 0.8), id=f"at random {i}")


@pytest.mark.parametrize("seen", list(patterns()))
def test_equals_the_closed_form_with_the_rows_removed(seen):
    design, ys, scale = DESIGN[seen], YS[seen], np.tile(SCALE, 5)[seen]
    precision = (design.T / scale**2) @ design + np.diag(PRIOR)
    mean = np.linalg.solve(precision, design.T @ (ys / scale**2))
    tight = diffrax.PIDController(rtol=1e-11, atol=1e-12)
    model = lp.NeuralODE(Compartments(jnp.asarray(mean[:2])), y0=mean[2:], stepsize_controller=tight)
    data = lp.Trajectories(TS, np.where(seen, YS, np.nan).reshape(5, 2))
    posterior = lp.laplace(model, lp.Problem(data, lp.Gaussian(SCALE), lp.GaussianPrior(PRIOR)), progress=False)
    np.testing.assert_allclose(posterior.precision(), precision, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(posterior.covariance(), np.linalg.inv(precision), rtol=1e-8, atol=1e-10)
    assert posterior.diagnostics.newton_decrement < 1e-14
    assert posterior.diagnostics.num_observations == np.sum(seen)
    marginal = design / PRIOR @ design.T + np.diag(scale**2)
    log_det = np.linalg.slogdet(2 * np.pi * marginal)[1]
    evidence = -0.5 * (ys @ np.linalg.solve(marginal, ys) + log_det)
    np.testing.assert_allclose(posterior.log_evidence, evidence, rtol=1e-8)

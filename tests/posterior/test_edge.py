"""Parameters that only their transformation holds inside of their support are named."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import laplode as lp
from laplode._posterior.summary import summary_table

TS = np.linspace(0.2, 3, 10)


class Line(eqx.Module):
    slope: jax.Array
    start: jax.Array

    def __call__(self, ts, y0):
        return (self.start + self.slope * ts)[:, None]


def edges(slope, prior, scale=0.05):
    """What is said of a slope that the data, without noise, put at a number of its standard deviations from 0."""
    ys = (1 + slope * TS)[:, None]
    model = Line(jnp.array(0.5), jnp.array(1.0))
    named = {"slope": prior, "start": dist.Normal(1.0, 1e-3)}
    problem = lp.Problem(lp.Trajectories(TS, ys), lp.Gaussian(scale), lp.NamedPriors(named))
    model = lp.refine(model, problem, progress=False).model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = lp.laplace(model, problem, progress=False)
    said = [str(each.message) for each in caught if "edge of the support" in str(each.message)]
    return posterior, said


SD = 0.05 / np.linalg.norm(TS)


@pytest.mark.parametrize("prior", [dist.HalfNormal(2.0), dist.Exponential(0.1), dist.Uniform(0.0, 3.0)])
@pytest.mark.parametrize(("away", "named"), [(-3.0, True), (-0.3, True), (0.5, False), (3.0, False)])
def test_a_rate_whose_density_is_largest_at_zero_is_named(prior, away, named):
    posterior, said = edges(away * SD, prior)
    assert bool(said) == named
    assert not named or ("have slope at the edge" in said[0] and "df=5" in said[0])
    assert float(posterior.parameters.model.slope) > 0


def test_the_upper_end_counts_too():
    assert edges(3.1, dist.Uniform(0.0, 3.0))[1]


def test_a_parameter_that_is_left_to_its_prior_is_not_named():
    assert not edges(0.0, dist.HalfNormal(2.0), scale=1e3)[1]


def test_moments_beyond_the_largest_number_are_infinite_and_not_nan():
    posterior, _ = edges(0.5, dist.HalfNormal(2.0))
    table = summary_table(posterior.parameters, posterior.mean, jnp.full(2, 200.0), 0.9)
    assert not table.isna().any(axis=None) and np.isinf(table.loc["slope", "sd"])

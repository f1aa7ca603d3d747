"""What is printed of results: a few lines that say what they are, how far to trust them, and what to do next."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import laplode as lp

TS = np.linspace(0, 2, 9)


class Decay(eqx.Module):
    rate: jax.Array

    def __call__(self, ts, y0):
        return y0 * jnp.exp(-self.rate * ts)[:, None]


@pytest.fixture(scope="module")
def results():
    data = lp.Trajectories(TS, np.exp(-0.7 * TS)[:, None], y0=[1.0])
    problem = lp.Problem(data, lp.Gaussian(0.1), 1.0)
    trained = lp.fit(Decay(jnp.array(0.3)), problem, optax.adam(0.1), steps=5, key=jax.random.key(0), progress=False)
    fit = lp.refine(trained.model, problem, progress=False)
    posterior = lp.laplace(fit.model, problem, progress=False)
    key = jax.random.key(1)
    profile = lp.profile(posterior, "rate", progress=False)
    return {
        "trained": trained,
        "fit": fit,
        "posterior": posterior,
        "diagnostics": posterior.diagnostics,
        "predictions": lp.predict(posterior, TS, key=key, num_samples=50, weigh=True),
        "profile": profile[0] if isinstance(profile, list) else profile,
        "identifiability": lp.identifiability(posterior),
    }


SAYS = {
    "trained": ["Fit of Decay", "budget, after 5 steps", "refine(fit.model"],
    "fit": ["converged", "nats left to gain", "laplace(fit.model"],
    "posterior": ["Posterior of Decay", "1, 0.9", "determined by 8 observations", "hessian, full", "predict(posterior"],
    "diagnostics": ["condition number", "without influence"],
    "predictions": ["1 trajectories at 9 times", "50 by method='linearized', 0 failed", "Pareto k̂", "to_datatree"],
    "profile": ["rate = 0.", "identifiable"],
    "identifiability": ["determined by the data"],
}


@pytest.mark.parametrize("name", SAYS)
def test_a_result_says_what_it_is_in_a_few_lines(results, name):
    text = repr(results[name])
    assert all(part in text for part in SAYS[name]), text
    assert len(text.splitlines()) <= 10 and max(map(len, text.splitlines())) <= 200
    assert str(results[name]) == text
    assert results[name]._repr_html_().startswith("<pre>")


def test_inside_a_program_the_fields_are_shown(results):
    shown = []
    eqx.filter_jit(lambda posterior: shown.append(repr(posterior)))(results["posterior"])
    assert shown[0].startswith("Posterior(")

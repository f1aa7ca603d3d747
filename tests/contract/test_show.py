"""What is printed of results: a few lines that say what they are, how far to trust them, and what to do next."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import laplode as lp

TS = np.linspace(0, 2, 9)


class Decay(eqx.Module):
    rate: jax.Array

    def __call__(self, ts, y0):
        return y0 * jnp.exp(-self.rate * ts)[:, None]


class Rotation(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t, y, args):
        return self.mlp(y)


@pytest.fixture(scope="module")
def results():
    data = lp.Trajectories(TS, np.exp(-0.7 * TS)[:, None], y0=[1.0])
    problem = lp.Problem(data, lp.Gaussian(0.1), 1.0)
    trained = lp.fit(Decay(jnp.array(0.3)), problem, optax.adam(0.1), steps=5, key=jax.random.key(0), progress=False)
    fit = lp.refine(trained.model, problem, progress=False)
    posterior = lp.laplace(fit.model, problem, progress=False)
    key = jax.random.key(1)
    profile = lp.profile(posterior, "rate", progress=False)
    field = eqx.nn.MLP(2, 2, 3, 1, key=key)
    return {
        "data": data,
        "problem": problem,
        "named": lp.Problem(data, lp.LogNormal([0.1], learned=True), lp.NamedPriors({"rate": dist.HalfNormal(1.0)})),
        "model": lp.NeuralODE(lambda t, y, args: field(y), y0=[1.0, 2.0]),
        "neural": lp.NeuralODE(Rotation(field), max_steps=99),
        "function": lp.predict_function(posterior, lambda model: model.rate, key=key),
        "trained": trained,
        "fit": fit,
        "posterior": posterior,
        "diagnostics": posterior.diagnostics,
        "predictions": lp.predict(posterior, TS, key=key, num_samples=50, weigh=True),
        "profile": profile[0] if isinstance(profile, list) else profile,
        "identifiability": lp.identifiability(posterior),
        "gain": lp.information_gain(posterior, [1.0, 3.0]),
        "measurements": lp.choose_measurements(posterior, TS, 9, repeat=True),
        "likelihood": problem.likelihood,
        "prior": problem.prior,
        "estimate": lp.estimate(fit.model, problem),
    }


SAYS = {
    "data": ["1, at 9 times between 0 and 2", "9 of 9 values", "given, 1 numbers each"],
    "problem": ["1 trajectories, 9 times, 1 channels: 9 values", "Gaussian(scale=0.1)", "precision=1,", "refine(model"],
    "named": ["LogNormal(scale=[0.1], learned=True)", "rate: HalfNormal"],
    "model": ["learned, shape (2,)", "Tsit5, PIDController(rtol=1e-06"],
    "neural": ["Rotation, 17 parameters", "given with the data", "the likelihood's", "at most 99 steps"],
    "function": ["mean                0.6", "1000 by method='linearized', 0 failed"],
    "trained": ["Fit of Decay", "budget, after 5 steps", "refine(fit.model"],
    "fit": ["converged", "nats left to gain", "laplace(fit.model"],
    "posterior": ["Posterior of Decay", "1, 0.9", "determined by 8 observations", "hessian, full", "predict(posterior"],
    "diagnostics": ["condition number", "without influence"],
    "predictions": ["1 trajectories at 9 times", "50 by method='linearized', 0 failed", "Pareto k̂", "to_datatree"],
    "profile": ["rate = 0.", "identifiable"],
    "identifiability": ["determined by the data"],
    "gain": ["1 trajectories, 2 times, 1 channels", "time 1 of trajectory 0, channel 0", "choose_measurements"],
    "measurements": ["trajectory 0, channel 0: 0.", "and 1 more"],
    "likelihood": ["Gaussian(scale=0.1)"],
    "prior": ["GaussianPrior(precision=1"],
    "estimate": ["hessian by forward over reverse, full", "P = 1, M = 8", "free"],
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


def test_what_is_left_of_an_object_shows_its_fields(results):
    rest = eqx.filter(results["data"], eqx.is_array, inverse=True)
    assert "ts=None" in repr(rest)
    assert "17 parameters" in repr(eqx.filter_eval_shape(lambda: results["neural"]))

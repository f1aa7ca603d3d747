"""How often refinement and the evidence do what they promise, on simulated Lotka-Volterra data. Run by hand:

    python tests/benchmarks/optimum.py refine|noise|structure|mixture [first seed] [last seed]

- `refine`: after 2500 steps of Adam in a plain Optax loop, does `refine` reach a minimum, and how fast beside it?
- `noise`: does `maximize_evidence(online=True)`, started from three times the noise, find the true scale?
- `structure`: does the evidence prefer the right universal differential equation to a wrong one?
- `mixture`: do restarts weighted by evidence forecast better than the best of them?
"""

import sys
import time
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats as st

import laplode

jax.config.update("jax_enable_x64", True)
warnings.simplefilter("ignore", laplode.LaplodeWarning)

ADAM = optax.adam(1e-2)  # one object, so that it is compiled once


class LotkaVolterra(eqx.Module):
    def __call__(self, t, y, args):
        return jnp.stack([1.3 * y[0] - 0.9 * y[0] * y[1], 0.8 * y[0] * y[1] - 1.8 * y[1]])


class Neural(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, key, width, depth):
        self.mlp = eqx.nn.MLP(2, 2, width, depth, jnp.tanh, key=key)

    def __call__(self, t, y, args):
        return self.mlp(y)


class Universal(eqx.Module):
    """Growth and death known in form, their coupling a network: of both species, or of the other one alone."""

    rates: jax.Array
    mlp: eqx.nn.MLP
    both: bool = eqx.field(static=True)

    def __init__(self, key, both):
        self.rates = jnp.array([1.0, 1.0])
        self.mlp = eqx.nn.MLP(2, 2, 8, 1, jnp.tanh, key=key)
        self.both = both

    def __call__(self, t, y, args):
        seen = (
            self.mlp(y)
            if self.both
            else jnp.stack([self.mlp(y * jnp.array([0, 1]))[0], self.mlp(y * jnp.array([1, 0]))[1]])
        )
        return self.rates * jnp.array([1, -1]) * y + seen


def data(seed, end=10.0, times=41, scale=0.1):
    ts, y0 = np.linspace(0, end, times), np.array([1.5, 0.8])
    exact = np.asarray(laplode.NeuralODE(LotkaVolterra())(ts, y0))
    return ts, exact + scale * np.random.default_rng(seed).normal(size=exact.shape), y0, exact


def by_adam(model, problem, steps):
    """A plain loop, as one would write it."""
    ts, ys, y0 = (jnp.asarray(x[0]) for x in (problem.data.ts, problem.data.ys, problem.data.y0))

    def loss(model):
        squares = sum(
            jnp.sum(leaf**2) for leaf in jax.tree.leaves(eqx.filter(model.vector_field, eqx.is_inexact_array))
        )
        return 0.5 * jnp.sum((model(ts, y0) - ys) ** 2) / problem.likelihood.scale**2 + 0.5 * squares

    @eqx.filter_jit
    def step(model, state):
        value, gradient = eqx.filter_value_and_grad(loss)(model)
        updates, state = ADAM.update(gradient, state)
        return eqx.apply_updates(model, updates), state, value

    state = ADAM.init(eqx.filter(model, eqx.is_inexact_array))
    for _ in range(steps):
        model, state, value = step(model, state)
    jax.block_until_ready(value)
    return model


def refine(seed):
    ts, ys, y0, _ = data(seed)
    problem = laplode.Problem(laplode.Trajectories(ts, ys, y0), laplode.Gaussian(0.1), 1.0)
    start = time.perf_counter()
    model = by_adam(laplode.NeuralODE(Neural(jax.random.key(seed), 16, 2)), problem, 2500)
    fit_seconds = time.perf_counter() - start
    start = time.perf_counter()
    fit = laplode.refine(model, problem, progress=False)
    seconds = time.perf_counter() - start
    found = laplode.laplace(fit.model, problem, progress=False).diagnostics
    relative = found.eigenvalue_min / found.eigenvalue_max
    print(
        f"seed {seed}: Adam {fit_seconds:.1f} s, {fit.losses[0]:.2f} nats; refine {seconds:.1f} s "
        f"({seconds / fit_seconds:.2f}), {fit.loss:.2f} nats, decrement {found.newton_decrement:.1e}, "
        f"smallest eigenvalue {relative:.1e} of the largest, {fit.reason}",
        flush=True,
    )
    return seconds / fit_seconds, fit.loss <= fit.losses[0], found.eigenvalue_min > 0


def noise(seed):
    ts, ys, y0, _ = data(seed)
    problem = laplode.Problem(laplode.Trajectories(ts, ys, y0), laplode.Gaussian(0.3), 1.0)
    model = laplode.NeuralODE(Neural(jax.random.key(seed), 8, 1))
    fit = laplode.fit(model, problem, ADAM, steps=1500, key=jax.random.key(seed), progress=False)
    posterior = laplode.laplace(fit.model, problem, curvature="ggn", progress=False)
    found = laplode.maximize_evidence(posterior, online=True, progress=False)
    scale, precision = np.asarray(found.problem.likelihood.scale), float(found.problem.prior.precision)
    print(
        f"seed {seed}: scales {scale[0]:.4f}, {scale[1]:.4f} (true 0.1), prior precision {precision:.3g}, "
        f"{found.diagnostics.effective_dof:.1f} parameters determined, "
        f"decrement {found.diagnostics.newton_decrement:.1e}",
        flush=True,
    )
    return float(np.sqrt(np.mean(scale**2))), precision


def structure(seed):
    ts, ys, y0, _ = data(seed)
    problem = laplode.Problem(laplode.Trajectories(ts, ys, y0), laplode.Gaussian(0.1), 1.0)
    found = {}
    for name, both in (("right", True), ("wrong", False)):
        model = laplode.NeuralODE(Universal(jax.random.key(seed), both))
        fit = laplode.fit(model, problem, ADAM, steps=1500, key=jax.random.key(seed), progress=False)
        fit = laplode.refine(fit.model, problem, curvature="ggn", progress=False)
        posterior = laplode.laplace(fit.model, problem, curvature="ggn", progress=False)
        found[name] = laplode.maximize_evidence(posterior, online=True, progress=False)
    table = laplode.compare_evidence(found)
    print(f"seed {seed}: {table.index[0]} by {table['diff'].iloc[1]:.1f} nats", flush=True)
    return table.index[0] == "right"


def mixture(seed):
    ts, ys, y0, _ = data(seed, end=15.0, times=61)
    train, later = 41, slice(41, 61)
    problem = laplode.Problem(laplode.Trajectories(ts[:train], ys[:train], y0), laplode.Gaussian(0.1), 1.0)
    model = laplode.NeuralODE(Neural(jax.random.key(seed), 8, 1))
    fit = laplode.fit(model, problem, ADAM, steps=1500, key=jax.random.key(seed), restarts=4, progress=False)
    optima = [laplode.refine(m, problem, curvature="ggn", progress=False).model for m in fit.restarts]
    posteriors = [laplode.laplace(m, problem, curvature="ggn", progress=False) for m in optima]
    table = laplode.compare_evidence({str(i): posterior for i, posterior in enumerate(posteriors)})
    table = table[table["weight"] > 0]
    scores = []
    for name in table.index:
        forecast = laplode.predict(posteriors[int(name)], ts, key=jax.random.key(0), num_samples=2, progress=False)
        variance = jnp.diagonal(forecast.covariance()[0]).reshape(ts.size, 2) + 0.1**2
        scores.append(st.norm.logpdf(ys, forecast.mean[0], np.sqrt(variance))[later])
    scores = np.stack(scores)  # of each optimum, at each time and channel
    mixed = np.logaddexp.reduce(scores + np.asarray(table["log_weight"])[:, None, None])
    best, all_of_them = scores[0].mean(), mixed.mean()
    weights = ", ".join(f"{w:.3f}" for w in table["weight"])
    print(f"seed {seed}: best {best:.3f}, mixture {all_of_them:.3f} nats a value; weights {weights}", flush=True)
    return all_of_them - best


def main():
    name = sys.argv[1]
    last = 10 if name in ("structure", "mixture") else 20
    seeds = range(int(sys.argv[2]), int(sys.argv[3])) if len(sys.argv) > 3 else range(last)
    found = [globals()[name](seed) for seed in seeds]
    if name == "refine":
        ratios, no_worse, positive = zip(*found, strict=True)
        print(f"the first in {ratios[0]:.2f} of Adam's time, compilation in both")
        print(f"no worse {sum(no_worse)}, positive definite {sum(positive)} of {len(found)}")
    elif name == "noise":
        scales, precisions = zip(*found, strict=True)
        print(f"scale {np.median(scales):.4f} in the median (true 0.1)")
        print(f"prior precision {min(precisions):.3g} … {max(precisions):.3g}")
    elif name == "structure":
        print(f"the right structure in {sum(found)} of {len(found)}")
    else:
        print(f"mixture better by {np.median(found):+.4f} nats a value in the median")
        print(f"better in {sum(gain > 0 for gain in found)} of {len(found)}")


if __name__ == "__main__":
    main()

"""Predictive bands of laplode's methods beside NUTS on the exact posterior. Run by hand:

    python tests/benchmarks/reference.py lotka-volterra|quadratic-0.01|quadratic-0.05|hare-lynx [draws of each chain]

- `lotka-volterra`: the target of Dandekar et al. (2020), "Bayesian neural ordinary differential equations": noise-free
  Lotka-Volterra data, t = 0, 0.1 … 3.5, a network 2-20-2, log p = −SSE − ‖θ‖²; forecast to 4.5.
- `quadratic-σ`: that of Schmid et al. (2024), "Assessment of uncertainty quantification in universal differential
  equations": x' = x − network(t) for x' = x − 2x², 12 points on [0, 10]; prior precision 1, forecast to 12.
- `hare-lynx`: the mechanistic model of examples/rates.py, initial states and noise scales inferred too: moments of its
    parameters by importance resampling from a Student t beside those of NUTS.
"""

import runpy
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import laplode

jax.config.update("jax_enable_x64", True)
warnings.simplefilter("ignore", laplode.LaplodeWarning)

ADAM = optax.adam(1e-2)


class LotkaVolterra(eqx.Module):
    def __call__(self, t, y, args):
        return jnp.stack([1.5 * y[0] - y[0] * y[1], y[0] * y[1] - 3.0 * y[1]])


class Neural(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(2, 2, 20, 1, jnp.tanh, key=key)

    def __call__(self, t, y, args):
        return self.mlp(y)


class Quadratic(eqx.Module):
    def __call__(self, t, y, args):
        return y - 2 * y**2


class Universal(eqx.Module):
    """Growth that is known, less a network of time whose last layer is zero at the start."""

    mlp: eqx.nn.MLP

    def __init__(self, key):
        mlp = eqx.nn.MLP(1, 1, 3, 2, jnp.tanh, key=key)
        last = lambda m: (m.layers[-1].weight, m.layers[-1].bias)
        self.mlp = eqx.tree_at(last, mlp, replace_fn=jnp.zeros_like)

    def __call__(self, t, y, args):
        return y - self.mlp(jnp.atleast_1d(t))


class Target(NamedTuple):
    model: laplode.NeuralODE
    problem: laplode.Problem
    ts: np.ndarray
    steps: int


def lotka_volterra() -> Target:
    ts, y0 = np.arange(46) * 0.1, np.ones(2)
    ys = np.asarray(laplode.NeuralODE(LotkaVolterra())(ts, y0))
    data = laplode.Trajectories(ts[:36], ys[:36], y0)
    problem = laplode.Problem(data, laplode.Gaussian(np.sqrt(0.5)), 2.0)
    return Target(laplode.NeuralODE(Neural(jax.random.key(0))), problem, ts, 600)


def quadratic(scale: float) -> Target:
    ts, y0 = np.linspace(0, 10, 12), np.array([0.1])
    exact = np.asarray(laplode.NeuralODE(Quadratic())(ts, y0))
    ys = exact + scale * np.random.default_rng(0).normal(size=exact.shape)
    problem = laplode.Problem(laplode.Trajectories(ts, ys, y0), laplode.Gaussian(scale), 1.0)
    later = np.linspace(10, 12, 5)[1:]
    return Target(laplode.NeuralODE(Universal(jax.random.key(0))), problem, np.concatenate([ts, later]), 1000)


TARGETS = {
    "lotka-volterra": lotka_volterra,
    "quadratic-0.01": lambda: quadratic(0.01),
    "quadratic-0.05": lambda: quadratic(0.05),
}


def optima(target: Target, restarts: int) -> list[Any]:
    """The best first."""
    fit = laplode.fit(
        target.model, target.problem, ADAM, steps=target.steps, key=jax.random.key(0), restarts=restarts, progress=False
    )
    refine = lambda model: laplode.refine(model, target.problem, curvature="ggn", progress=False)
    refined = [refine(model) for model in fit.restarts or (fit.model,)]
    for each in refined:
        print(
            f"  optimum: {each.loss:.3f} nats, decrement {each.newton_decrement:.1e}, {each.reason}",
            flush=True,
        )
    return [each.model for each in sorted(refined, key=lambda each: each.loss)]


def gauss_newton(target: Target, models: list[Any]) -> list[laplode.Posterior]:
    return [laplode.laplace(model, target.problem, curvature="ggn", progress=False) for model in models]


def predictions(target: Target, models: list[Any], num_geodesics: int):
    """Name, draws (S, T, K) and Pareto k̂ of each method."""
    ggn = gauss_newton(target, models)
    exact = laplode.laplace(models[0], target.problem, progress=False)
    geodesic = dict(method="geodesic", num_samples=num_geodesics)
    for name, posterior, options in (
        ("linearized, Gauss-Newton", ggn[0], dict(num_samples=4000)),
        ("linearized, exact Hessian", exact, dict(num_samples=4000)),
        ("linearized, mixture of restarts", ggn, dict(num_samples=4000)),
        ("sampled", ggn[0], dict(method="sampled", num_samples=1000)),
        ("geodesic", ggn[0], geodesic),
        (
            "geodesic, Student-t, resampled",
            ggn[0],
            dict(method=laplode.Geodesic(df=5), num_samples=num_geodesics, resample=True),
        ),
    ):
        began = time.process_time()
        try:
            found = mixed(posterior, target.ts, key=jax.random.key(1), progress=False, **options)
        except laplode.LaplodeError as error:
            print(f"| {name} | {error} |", flush=True)
            continue
        seconds = time.process_time() - began
        yield name, np.asarray(found.f)[np.asarray(found.ok), 0], found.khat, 1 - np.mean(found.ok), seconds


def mixed(posterior, ts, *, key, **options):
    """Predictions of one posterior, or of several by their evidence."""
    if not isinstance(posterior, list):
        return laplode.predict(posterior, ts, key=key, **options)
    parts = [laplode.predict(each, ts, key=jax.random.fold_in(key, i), **options) for i, each in enumerate(posterior)]
    table = laplode.compare_evidence({str(i): each for i, each in enumerate(posterior)})
    return laplode.mix(parts, [table["log_weight"][str(i)] for i in range(len(parts))])


def bands(draws):
    """Center, width of the central 90%, and standard deviation over draws."""
    low, center, high = np.quantile(draws, [0.05, 0.5, 0.95], axis=0)
    return center, high - low, draws.std(axis=0)


def reference(target: Target, models: list[Any], num_samples: int):
    """NUTS draws of f at the target's times, and what says whether to believe them."""
    posteriors = {str(i): posterior for i, posterior in enumerate(gauss_newton(target, models))}
    table = laplode.compare_evidence(posteriors)
    print(f"{(table['weight'] > 0).sum()} optima, weights {np.round(table['weight'], 3).tolist()}", flush=True)
    posterior = posteriors[table.index[0]]
    began = time.process_time()
    tree = laplode.nuts(
        posterior,
        target.ts,
        key=jax.random.key(2),
        num_warmup=num_samples,
        num_samples=num_samples,
        target_accept_prob=0.9,
        max_tree_depth=7,
        progress=sys.stderr.isatty(),
    )
    seconds = time.process_time() - began
    attrs, stats = tree["posterior"].attrs, tree["sample_stats"]
    print(
        f"NUTS: {num_samples} draws of 4 chains, {seconds:.0f} s of processor time; r_hat at most "
        f"{attrs['max_rhat']:.3f} over weights, {attrs['max_rhat_f']:.3f} over trajectories; "
        f"{attrs['num_divergences']} divergences, {float(stats['n_steps'].mean()):.0f} gradients a draw",
        flush=True,
    )
    f = tree["predictions"]["f"].values[:, :, 0]
    return f.reshape(-1, *f.shape[2:])


# ---- Moments of a mechanistic model


def hare_lynx(num_samples: int):
    """What the posterior of the example finds, which runs as it stands."""
    example = Path(__file__).parents[2] / "examples" / "rates.py"
    with tempfile.TemporaryDirectory() as out:
        arguments, sys.argv = sys.argv, [str(example), "--quick", "--out", out]
        posterior, years = map(runpy.run_path(str(example)).get, ("posterior", "years"))
        sys.argv = arguments
    nuts = laplode.nuts(
        posterior, key=jax.random.key(2), num_warmup=1000, num_samples=num_samples, progress=sys.stderr.isatty()
    )
    attrs = nuts["posterior"].attrs
    print(
        f"NUTS: {num_samples} draws of 4 chains, r_hat at most {attrs['max_rhat']:.4f}, "
        f"{attrs['num_divergences']} divergences",
        flush=True,
    )
    reference = parameters(nuts)
    for df in (None, 5.0):
        for resample in (False, True):
            draws = laplode.predict(
                posterior,
                years,
                method=laplode.Sampled(df),
                resample=resample,
                num_samples=4000,
                key=jax.random.key(3),
                progress=False,
            )
            found = parameters(laplode.to_datatree(posterior, draws))
            shift = np.max(np.abs(found.mean(axis=0) - reference.mean(axis=0)) / reference.std(axis=0))
            widths = found.std(axis=0) / reference.std(axis=0)
            proposal = f"{'Gaussian' if df is None else 'Student-t'}{', resampled' if resample else ''}"
            print(
                f"{proposal}: k\u0302 {draws.khat:.2f}; means differ by at most "
                f"{shift:.3f} standard deviations, which are {widths.min():.3f} to {widths.max():.3f} of those of NUTS"
            )


def parameters(tree) -> np.ndarray:
    """Draws (S, P), all chains one after another."""
    stacked = tree["posterior"].dataset.to_stacked_array("parameter", ["chain", "draw"])
    return stacked.values.reshape(-1, stacked.sizes["parameter"])


def main():
    name, num_samples = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 300
    if name == "hare-lynx":
        return hare_lynx(num_samples)
    target = TARGETS[name]()
    print(name, flush=True)
    models = optima(target, restarts=3)
    center, width, std = bands(reference(target, models, num_samples))
    end = target.problem.data.ts[0, -1]
    inside, beyond = (target.ts > target.ts[0]) & (target.ts <= end), target.ts > end
    print("| | k̂ | failed | width inside | beyond | center inside | beyond | s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, draws, khat, failed, seconds in predictions(target, models, 100):
        other, other_width, _ = bands(draws)
        cells = [
            np.mean(x[part] / y[part])
            for x, y in ((other_width, width), (np.abs(other - center), std))
            for part in (inside, beyond)
        ]
        k = "" if khat is None else f"{khat:.2f}"
        print(
            f"| {name} | {k} | {failed:.0%} | " + " | ".join(f"{x:.2f}" for x in cells) + f" | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

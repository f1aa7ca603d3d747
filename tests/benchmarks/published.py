"""laplode on the settings of two published benchmarks of uncertain dynamics. Run by hand:

    python tests/benchmarks/published.py hegde [FIRST LAST]
    python tests/benchmarks/published.py uqnu lotka|damped [SEED]

- `hegde`: van der Pol as in Hegde et al. (2022), "Variational multiple shooting for Bayesian ODEs with Gaussian
    processes": μ = 0.5, start (−1.5, 2.5), to be learned, 25 times on [0, 7], even or at random, noise variance
    0.05; the forecast is for 25 times more, to 14.29. The squared error is of the noise-free truth, the log density
    that of new observations; mean ± standard error over data sets.
- `uqnu`: the field of Lotka-Volterra or of a damped spiral, as in "Universal differential equations, uncertainty on
    networks" (UQNU): three trajectories, two of them from initial states off by 10%, noise 1% of the range, an MLP
    2-32-32-2 with GELU. The truth at a state counts as covered where it is in the joint 95% ellipse of the field there.
    The first box is that of the trajectories, wider by 0.2 of its width on each side; the second is wider so once more.
"""

import argparse
import time
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats as st

import laplode

jax.config.update("jax_enable_x64", True)
warnings.simplefilter("ignore", laplode.LaplodeWarning)


class Neural(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t, y, args):
        return self.mlp(y)


def oscillator(t, y, args):
    return jnp.stack([y[1], 0.5 * (1 - y[0] ** 2) * y[1] - y[0]])


def lotka(t, y, args):
    return jnp.stack([1.3 * y[0] - 0.9 * y[0] * y[1], 0.8 * y[0] * y[1] - 1.8 * y[1]])


def damped(t, y, args):
    return jnp.stack([-0.1 * y[0] ** 3 - 2 * y[1] ** 3, 2 * y[0] ** 3 - 0.1 * y[1] ** 3])


UQNU = {"lotka": (lotka, (3.0, 1.5), np.linspace(0, 10, 101)), "damped": (damped, (1.0, 1.0), np.linspace(0, 25, 101))}


# ---- Fits and posteriors


def fitted(model, data, scale, steps, restarts=1):
    """Models that Adam found, under a weak prior."""
    problem = laplode.Problem(data, laplode.Gaussian(scale), 0.1)
    options: Any = dict(steps=steps, key=jax.random.key(0), restarts=restarts, progress=False)
    found = laplode.fit(model, problem, optax.adam(optax.cosine_decay_schedule(1e-2, steps, 0.03)), **options)
    return found.restarts or (found.model,)


def by_evidence(models, data, scale, prior, precision, structure="full"):
    """The most probable posterior, its hyperparameters by the evidence."""
    found = []
    for model in models:
        problem = laplode.Problem(data, laplode.Gaussian(scale), prior)
        fit = laplode.refine(model, problem, curvature="ggn", decrement=1e-2, progress=False)
        posterior = laplode.laplace(fit.model, problem, curvature="ggn", structure=structure, progress=False)
        found.append(laplode.maximize_evidence(posterior, precision=precision, online=True, progress=False))
    return max(found, key=lambda p: float(p.log_evidence))


PRIORS = {"leaf": (1.0, "leaf"), "field": (laplode.FieldPrior(), "one")}


# ---- Hegde et al.


def hegde(options):
    step, start = 7 / 24, np.array([-1.5, 2.5])
    later = 7 + step * np.arange(1, 26)
    for kind in ("even", "random"):
        rows = {name: [] for name in PRIORS}
        for seed in range(options.first, options.last):
            rng = np.random.default_rng([seed, kind == "random"])
            ts = np.linspace(0, 7, 25) if kind == "even" else np.append(0, np.sort(rng.uniform(0, 7, 24)))
            truth = np.asarray(laplode.NeuralODE(oscillator)(np.append(ts, later), start))
            noisy = truth + np.sqrt(0.05) * rng.normal(size=truth.shape)
            data, scale = laplode.Trajectories(ts, noisy[:25]), np.full(2, np.sqrt(0.05))
            network = eqx.nn.MLP(2, 2, 16, 1, jnp.tanh, key=jax.random.key(seed), dtype=float)
            models = fitted(laplode.NeuralODE(Neural(network), y0=noisy[0]), data, scale, 800, 2)
            for name, (prior, precision) in PRIORS.items():
                posterior = by_evidence(models, data, scale, prior, precision)
                predictions = laplode.predict(posterior, later, num_samples=1, key=jax.random.key(0), progress=False)
                mean, noise = np.asarray(predictions.mean[0]), np.asarray(posterior.problem.likelihood.scale)
                std = np.sqrt(np.diagonal(np.asarray(predictions.covariance()[0])).reshape(mean.shape))
                off, new = truth[25:] - mean, noisy[25:]
                density = st.norm.logpdf(new, mean, np.hypot(std, noise))
                covers = [np.mean(np.abs(off) < q * std) for q in st.norm.ppf([0.75, 0.95])]
                rows[name].append([np.mean(off**2), np.mean(density), *covers])
                print(kind, seed, name, np.round(rows[name][-1], 3), flush=True)
        for name, found in rows.items():
            error = np.std(found, axis=0, ddof=1) / np.sqrt(len(found)) if len(found) > 1 else np.full(4, np.nan)
            cells = " | ".join(f"{m:.3f} ± {e:.3f}" for m, e in zip(np.mean(found, axis=0), error, strict=True))
            print(f"| {kind} | {name} | {len(found)} | {cells} |", flush=True)


# ---- UQNU


def uqnu(options):
    field, start, ts = UQNU[options.system]
    rng = np.random.default_rng(options.seed)
    starts = np.array(start) * np.stack([np.ones(2), *1 + 0.1 * rng.normal(size=(2, 2))])
    truth = np.stack([np.asarray(laplode.NeuralODE(field)(ts, y0)) for y0 in starts])
    low, high = truth.min(axis=(0, 1)), truth.max(axis=(0, 1))
    scale = 0.01 * (high - low)
    data = laplode.Trajectories(ts, truth + scale * rng.normal(size=truth.shape), starts)
    network = eqx.nn.MLP(2, 2, 32, 2, jax.nn.gelu, key=jax.random.key(options.seed), dtype=float)
    clock = time.perf_counter()
    models = fitted(laplode.NeuralODE(Neural(network)), data, scale, options.steps)
    print(f"fit {time.perf_counter() - clock:.0f} s", flush=True)
    for name in options.priors:
        prior, precision = PRIORS[name]
        clock = time.perf_counter()
        posterior = by_evidence(models, data, scale, prior, precision)
        cells = []
        for wide in (1.4, 1.96):
            unit = np.random.default_rng(0).uniform(-0.5, 0.5, size=(options.points, 2))
            states = (low + high) / 2 + wide * (high - low) * unit
            at = laplode.predict_function(
                posterior, laplode.field_at(states), num_samples=1, key=jax.random.key(0), progress=False
            )
            off = np.asarray(jax.vmap(lambda y: field(0.0, y, None))(jnp.asarray(states))) - np.asarray(at.mean)
            joint = np.asarray(at.covariance()).reshape(len(states), 2, len(states), 2)
            each = joint[np.arange(len(states)), :, np.arange(len(states))]
            distance = np.einsum("ni,ni->n", off, np.linalg.solve(each, off[..., None])[..., 0])
            cells.append(f"{np.mean(distance < st.chi2.ppf(0.95, 2)):.2f}")
        shape = "" if name == "leaf" else f"{posterior.problem.prior.amplitude}, {posterior.problem.prior.length}"
        print(
            f"| {options.system} {options.seed} | {name} | {' | '.join(cells)} | {float(posterior.log_evidence):.1f} | "
            f"{np.round(np.asarray(posterior.problem.likelihood.scale) / scale, 2)} | {shape} | "
            f"{time.perf_counter() - clock:.0f} s |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("hegde")
    command.add_argument("first", type=int, nargs="?", default=0)
    command.add_argument("last", type=int, nargs="?", default=5)
    command.set_defaults(do=hegde)
    command = commands.add_parser("uqnu")
    command.add_argument("system", choices=UQNU)
    command.add_argument("seed", type=int, nargs="?", default=0)
    command.add_argument("--steps", type=int, default=3000, help="of Adam")
    command.add_argument("--points", type=int, default=1000, help="at which the field is compared, in each box")
    command.add_argument("--priors", nargs="*", choices=PRIORS, default=tuple(PRIORS))
    command.set_defaults(do=uqnu)
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()

"""Draws of trajectories from the posterior of a neural field on simulated Lotka-Volterra data. Run by hand:

    python tests/benchmarks/trajectories.py geodesic [first seed] [last seed]

- `geodesic`: an MLP 2-16-16-2 (P = 354), 41 times to t = 10, noise 0.1, prior precision 1. Do all draws arrive, is
    their spread that of the linearized posterior, do they keep to the data, and how long does one take?
"""

import sys
import time
import warnings

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
        return jnp.stack([1.3 * y[0] - 0.9 * y[0] * y[1], 0.8 * y[0] * y[1] - 1.8 * y[1]])


class Neural(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t, y, args):
        return self.mlp(y)


def problem(seed):
    ts, y0 = np.linspace(0, 10, 41), np.array([1.5, 0.8])
    exact = np.asarray(laplode.NeuralODE(LotkaVolterra())(ts, y0))
    ys = exact + 0.1 * np.random.default_rng(seed).normal(size=exact.shape)
    return laplode.Problem(laplode.Trajectories(ts, ys, y0), laplode.Gaussian(0.1), 1.0)


def spread(draws, ok):
    """Standard deviation over draws, averaged over times and channels."""
    return float(np.mean(np.std(np.asarray(draws)[np.asarray(ok)], axis=0)))


def misfit(problem, draws):
    """−log p(Y | θ) of each draw, up to the constant that all share."""
    residuals = (np.asarray(draws) - problem.data.ys) / np.asarray(problem.likelihood.scale)
    return 0.5 * np.sum(residuals**2, axis=(1, 2, 3))


def geodesic(seed, num=50):
    task, key = problem(seed), jax.random.key(seed)
    model = laplode.NeuralODE(Neural(eqx.nn.MLP(2, 2, 16, 2, jnp.tanh, key=key)))
    fit = laplode.fit(model, task, ADAM, steps=2500, key=key, progress=False)
    fit = laplode.refine(fit.model, task, curvature="ggn", progress=False)
    posterior = laplode.laplace(fit.model, task, curvature="ggn", progress=False)
    options = dict(num_samples=num, key=key, progress=False)
    linearized = laplode.predict(posterior, task.data.ts, **options)
    sampled = laplode.predict(posterior, task.data.ts, method="sampled", weigh=False, **options)
    seconds = []
    for _ in range(2):  # the first compiles
        start = time.perf_counter()
        draws = laplode.predict(posterior, task.data.ts, method="geodesic", weigh=False, **options)
        jax.block_until_ready(draws.f)
        seconds.append((time.perf_counter() - start) / num)
    dof = posterior.diagnostics.effective_dof
    optimum = misfit(task, linearized.mean[None])[0]
    nll = misfit(task, draws.f) - optimum
    reference = spread(linearized.f, linearized.ok)
    ratio = spread(draws.f, draws.ok) / reference
    arrived = float(np.mean(draws.ok))
    good = arrived == 1 and 0.8 <= ratio <= 1.4 and np.nanmedian(nll) <= 0.5 * dof + 8 and seconds[1] <= 0.3
    print(
        f"seed {seed}: {fit.reason}, {dof:.1f} parameters determined; finite {arrived:.1%}; spread "
        f"{ratio:.2f} of {reference:.4f} linearized (plain draws {spread(sampled.f, sampled.ok):.3g}); "
        f"-log p(Y|θ) of the median draw {np.nanmedian(nll):+.1f} nats from the optimum's, allowed "
        f"{0.5 * dof + 8:+.1f} (plain {np.nanmedian(misfit(task, sampled.f) - optimum):+.3g}); "
        f"{seconds[1]:.3f} s a draw ({seconds[0]:.3f} with compilation): {'good' if good else 'NOT GOOD'}",
        flush=True,
    )
    return good


def main():
    name = sys.argv[1]
    seeds = range(int(sys.argv[2]), int(sys.argv[3])) if len(sys.argv) > 3 else range(3)
    found = [globals()[name](seed) for seed in seeds]
    print(f"good {sum(found)} of {len(found)}")


if __name__ == "__main__":
    main()

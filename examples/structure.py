"""What structure in the vector field does to uncertainty: the comparison of Ott, Tiemann and Hennig (2023).

"Uncertainty and structure in neural ordinary differential equations", arXiv 2305.13290. Systems, initial states,
training times, noise and networks (one tanh layer of 6 units) are theirs; the noise scale is found by the evidence, as
is the prior precision. Other than theirs: fits are 1000 steps of Adam at a rate of 0.01 over a growing horizon, where
theirs are of 0.1, from 2 restarts, and end with Levenberg-Marquardt steps; the solver is adaptive.

- Lotka-Volterra, seen for a full and for half a period.
- A harmonic oscillator, seen for a half, three quarters and a full period: a plain network, and a Hamiltonian one,
  whose field conserves a learned energy.
- A damped pendulum: a plain network, and a pendulum without friction (its frequency a parameter) plus a network.

Prints a table, and writes structure_trajectories.png and structure_fields.png.
"""

import argparse
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
import pandas as pd

import laplode

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_compilation_cache_dir", ".jax_cache")  # what is compiled is kept for the next run
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
matplotlib.use("Agg")
warnings.simplefilter("ignore", laplode.LaplodeWarning)  # how far from an optimum a fit is stands in the table

ADAM = optax.adam(1e-2)
PERIOD = 2 * math.pi / math.sqrt(2)  # of the harmonic oscillator
FREQUENCY = (2 * math.pi / 12) ** 2  # ω² of the pendulum

# Blue and vermilion of Okabe and Ito, which differ for every kind of color vision.
COLORS = {"plain": "#0072B2", "structured": "#D55E00"}


# ---- Fields


def network(key, out=2, bias=True):
    return eqx.nn.MLP(2, out, width_size=6, depth=1, activation=jnp.tanh, use_final_bias=bias, key=key)


class Plain(eqx.Module):
    """dy/dt is a network."""

    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.mlp = network(key)

    def __call__(self, t, y, args):
        return self.mlp(y)


class Hamiltonian(eqx.Module):
    """The energy H(q, p) is a network: q' = ∂H/∂p, p' = −∂H/∂q."""

    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.mlp = network(key, out="scalar", bias=False)  # a constant in H moves nothing

    def __call__(self, t, y, args):
        slope = jax.grad(self.mlp)(y)
        return jnp.stack([slope[1], -slope[0]])


class Augmented(eqx.Module):
    """A pendulum without friction, ω² a parameter, and a network for what it misses."""

    frequency: jax.Array
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.frequency = jnp.array(0.5)
        self.mlp = network(key)

    def __call__(self, t, y, args):
        return jnp.stack([y[1], -self.frequency * jnp.sin(y[0])]) + self.mlp(y)


# ---- Systems


class Case(NamedTuple):
    name: str
    field: type
    structured: bool
    truth: laplode.NeuralODE
    y0: np.ndarray
    end: float
    last: float
    times: int
    noise: float
    box: tuple[float, float, float, float]  # of the vector field

    def observations(self, seed):
        rng = np.random.default_rng([seed, round(100 * self.end)])
        ts = np.concatenate([[0.0], np.sort(rng.uniform(0, self.end, self.times))])
        if self.name.startswith("damped"):
            ts = np.linspace(0, self.end, self.times + 1)
        exact = solve(self.truth, ts, self.y0)
        ys = exact + self.noise * rng.normal(size=exact.shape)
        ys[:, 0] = np.nan  # the initial state is known
        return laplode.Trajectories(ts, ys, self.y0)


def solve(model, ts, y0):
    return np.asarray(jax.vmap(lambda y: model(ts, y))(jnp.asarray(y0)))


def cases(seed):
    rng = np.random.default_rng(seed)
    predator = laplode.NeuralODE(lambda t, y, args: jnp.stack([2 / 3 * y[0] - 4 / 3 * y[0] * y[1], y[0] * y[1] - y[1]]))
    harmonic = laplode.NeuralODE(lambda t, y, args: jnp.stack([y[1], -2 * y[0]]))
    pendulum = laplode.NeuralODE(lambda t, y, args: jnp.stack([y[1], -FREQUENCY * jnp.sin(y[0]) - 0.1 * y[1]]))
    y0 = np.array([3.0, 0.0]) + 0.2 * rng.normal(size=(16, 2))
    radius, angle = rng.uniform(1.3, 2.3, 25), rng.uniform(0, 2 * np.pi, 25)
    swings = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    found = []
    for part, end in (("full", 10.0), ("half", 5.0)):
        found.append(
            Case(f"Lotka-Volterra, {part}", Plain, False, predator, np.ones((1, 2)), end, 20.0, 50, 0.03, (0, 3, 0, 2))
        )
    for part, share, last in (("half", 0.5, 10.0), ("3/4", 0.75, 20.0), ("full", 1.0, 4 * PERIOD)):
        for field in (Plain, Hamiltonian):
            found.append(
                Case(
                    f"harmonic, {part}", field, field is Hamiltonian, harmonic, y0, share * PERIOD, last, 50, 0.3,
                    (-6, 6, -8, 8),
                )
            )  # fmt: skip
    for field in (Plain, Augmented):
        found.append(
            Case("damped pendulum", field, field is Augmented, pendulum, swings, 10.0, 20.0, 20, 0.1, (-3, 3, -3, 3))
        )
    return found


# ---- Fit and predict


class Result(NamedTuple):
    case: Case
    data: laplode.Trajectories
    ts: np.ndarray
    truth: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    states: np.ndarray
    field: laplode.FunctionPredictions
    noise: np.ndarray
    decrement: float

    def row(self):
        error, inside = np.abs(self.mean - self.truth), self.ts <= self.case.end
        inside[0], beyond = False, self.ts > self.case.end  # at t = 0 all is known
        covers = error < 1.645 * self.std
        root_mean_square = lambda x: float(np.sqrt(np.mean(x**2)))
        row = {"system": self.case.name, "field": self.case.field.__name__}
        for name, times in (("inside", inside), ("beyond", beyond)):
            row[f"sd {name}"] = float(np.mean(self.std[:, times]))
            row[f"error {name}"] = root_mean_square(error[:, times])
            row[f"90% covers {name}"] = float(np.mean(covers[:, times]))
        exact = np.asarray(jax.vmap(lambda y: self.case.truth.vector_field(0.0, y, None))(jnp.asarray(self.states)))
        miss = np.abs(np.asarray(self.field.mean) - exact)
        row["sd of field"] = float(np.mean(self.field.std))
        row["error of field"] = root_mean_square(miss)
        row["noise found / true"] = float(np.mean(self.noise)) / self.case.noise
        row["decrement (nats)"] = self.decrement
        return row


def analyze(case, seed, quick):
    data = case.observations(seed)
    keys = jax.random.split(jax.random.key(seed), 3)
    problem = laplode.Problem(data, laplode.Gaussian(np.full(2, 2 * case.noise)), laplode.GaussianPrior(1.0))
    fit = laplode.fit(
        laplode.NeuralODE(case.field(keys[0])),
        problem,
        ADAM,
        steps=20 if quick else 1000,
        key=keys[1],
        horizons=(1.0,) if quick else (0.25, 0.5, 1.0),
        restarts=1 if quick else 2,
        initialize=lambda key: laplode.NeuralODE(case.field(key)),
        progress=False,
    )
    fit = laplode.refine(fit.model, problem, curvature="ggn", steps=5 if quick else 500, progress=False)
    posterior = laplode.laplace(fit.model, problem, curvature="ggn", progress=False)
    posterior = laplode.maximize_evidence(posterior, online=not quick, progress=False)
    ts = np.linspace(0, case.last, 81)
    found = laplode.predict(posterior, ts, num_samples=1, key=keys[2], progress=False)
    variance = np.diagonal(np.asarray(found.covariance()), axis1=1, axis2=2).reshape(found.mean.shape)
    x, y = np.meshgrid(np.linspace(*case.box[:2], 25), np.linspace(*case.box[2:], 25))
    states = np.stack([x.ravel(), y.ravel()], axis=1)
    field = laplode.predict_function(posterior, laplode.field_at(states), num_samples=1, key=keys[2], progress=False)
    truth, std = solve(case.truth, ts, case.y0), np.sqrt(np.maximum(variance, 0))
    noise = np.asarray(posterior.problem.likelihood.scale)
    decrement = posterior.diagnostics.newton_decrement
    return Result(case, data, ts, truth, np.asarray(found.mean), std, states, field, noise, decrement)


# ---- Pictures


def panels(results):
    """Results by system, the plain field first."""
    found = {}
    for result in results:
        found.setdefault(result.case.name, []).append(result)
    return found


def draw_trajectories(results, path):
    groups = panels(results)
    figure, axes = plt.subplots(len(groups), 2, figsize=(9, 1.9 * len(groups)), layout="constrained", squeeze=False)
    for row, (name, both) in zip(axes, groups.items(), strict=True):
        for ax in row:
            ax.set_visible(False)
        for ax, result in zip(row, both, strict=False):
            ax.set_visible(True)
            case = result.case
            color = COLORS["structured" if case.structured else "plain"]
            ax.axvspan(0, case.end, color="0.93", zorder=0, label="seen in training")
            mean, std = result.mean[0, :, 0], result.std[0, :, 0]
            ax.fill_between(result.ts, mean - 2 * std, mean + 2 * std, color=color, alpha=0.3, lw=0)
            ax.plot(result.ts, mean, color=color, lw=1.5, label="mean ± 2 sd")
            ax.plot(result.ts, result.truth[0, :, 0], "k--", lw=1, label="truth")
            ax.plot(result.data.ts[0], result.data.ys[0, :, 0], "k.", ms=2.5, label="data")
            truth = result.truth[0, :, 0]
            room = 0.6 * np.ptp(truth)
            ax.set_ylim(truth.min() - room, truth.max() + room)
            ax.set_xlim(0, case.last)
            ax.set_title(f"{name}: {case.field.__name__}", fontsize=9)
            ax.set_ylabel("first state", fontsize=8)
            ax.tick_params(labelsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=4, loc="outside upper center", frameon=False)
    for ax in axes[-1]:
        ax.set_xlabel("t")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_fields(results, path):
    """How uncertain the field is, beside its own size."""
    shown = [r for r in results if r.case.name in ("harmonic, half", "harmonic, full", "damped pendulum")]
    rows = math.ceil(len(shown) / 2)
    figure, axes = plt.subplots(rows, 2, figsize=(8, 3 * rows), layout="constrained", squeeze=False)
    picture = None
    for ax, result in zip(axes.flat, shown, strict=False):
        grid = lambda values: np.asarray(values).reshape(25, 25)
        x, y = grid(result.states[:, 0]), grid(result.states[:, 1])
        size = np.sqrt(np.mean(np.sum(np.asarray(result.field.mean) ** 2, axis=1)))
        relative = grid(np.linalg.norm(np.asarray(result.field.std), axis=1)) / size
        levels = matplotlib.colors.LogNorm(1e-3, 1)
        picture = ax.pcolormesh(x, y, relative, norm=levels, cmap="cividis", shading="gouraud", rasterized=True)
        every = (slice(None, None, 3),) * 2
        u, v = (grid(np.asarray(result.field.mean)[:, k]) for k in range(2))
        ax.quiver(x[every], y[every], u[every], v[every], color="white", width=0.004)
        seen = result.ts <= result.case.end
        for trajectory in result.truth:
            ax.plot(*trajectory[seen].T, color="white", lw=0.8, alpha=0.8)
        ax.set_title(f"{result.case.name}: {result.case.field.__name__}", fontsize=9)
        ax.set(xlabel="q", ylabel="p", xlim=result.case.box[:2], ylim=result.case.box[2:])
        ax.tick_params(labelsize=8)
    assert picture is not None
    bar = figure.colorbar(picture, ax=axes, aspect=30)
    bar.set_label("sd of the field / its size", fontsize=9)
    figure.savefig(path, dpi=65)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the two pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one case, fitted poorly, to see that everything runs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = cases(options.seed)
    if options.quick:
        chosen = [case for case in chosen if case.name == "harmonic, half" and case.structured]
    results = []
    for case in chosen:
        results.append(analyze(case, options.seed, options.quick))
        print(results[-1].row(), flush=True)
    table = pd.DataFrame([result.row() for result in results])
    print(table.to_string(index=False, float_format="{:.3g}".format))
    draw_trajectories(results, options.out / "structure_trajectories.png")
    draw_fields(results, options.out / "structure_fields.png")


if __name__ == "__main__":
    main()

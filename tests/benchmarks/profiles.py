"""Profiles held against optimizations by other code, and the time that they take. Run by hand:

    python tests/benchmarks/profiles.py rates|neural|stat5 [draws of each chain of NUTS, for rates]

- `rates`: the eight parameters of examples/rates.py. Ends against SciPy's SLSQP, which looks for the least and the
    largest value within the threshold, on a solve and a density of its own; rows of a table beside quantiles of NUTS.
- `neural`: a forecast beyond the data by an MLP 2-16-16-2 (P = 354), and what is left to gain at each of 20 points by
    the exact Hessian of the Lagrangian.
- `stat5`: all nine parameters of Boehm et al. (2014), six rates by their decimal logarithm and three noise scales, by
    an implicit solver. Each end that is finite against an optimization of the others by L-BFGS.
"""

import dataclasses
import runpy
import sys
import tempfile
import time
import warnings
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy.optimize import minimize

import laplode
from laplode._diagnose.constrained import newton_step, together
from laplode._diagnose.quantity import quantities
from laplode._diagnose.side_by_side import Ask, aims_of

jax.config.update("jax_enable_x64", True)
warnings.simplefilter("ignore", laplode.LaplodeWarning)

HERE = Path(__file__).parent


def timed(posterior, of, **options):
    """Profiles, and the seconds that they took when all was compiled."""
    laplode.profile(posterior, of, progress=False, **options)
    start = time.perf_counter()
    found = laplode.profile(posterior, of, progress=False, **options)
    return found, time.perf_counter() - start


def with_gradient(loss):
    program = eqx.filter_jit(jax.value_and_grad(loss))

    def call(theta):
        value, gradient = program(jnp.asarray(theta))
        good = np.isfinite(value) and np.all(np.isfinite(gradient))
        return (float(value), np.asarray(gradient)) if good else (1e6, np.zeros(np.size(theta)))

    return call


# ---- Hares and lynx


def hare_lynx_loss(table):
    """−log p of the logarithms of rates, initial states and noise scales, with the priors of the example."""
    years, counts = jnp.asarray(table[:, 0]), jnp.asarray(table[:, 1:])

    def field(t, y, rates):
        birth, hunt, death, feed = rates
        return jnp.stack([(birth - hunt * y[1]) * y[0], (feed * y[0] - death) * y[1]])

    def loss(z):
        values = jnp.exp(z)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Dopri8(),
            years[0],
            years[-1],
            0.01,
            values[4:6],
            values[:4],
            saveat=diffrax.SaveAt(ts=years),
            stepsize_controller=diffrax.PIDController(1e-9, 1e-9),
            throw=False,
        )
        total = dist.LogNormal(jnp.log(solution.ys), values[6:]).log_prob(counts).sum()
        for prior, some in (
            (dist.TruncatedNormal(1.0, 0.5, low=0.0), values[jnp.array([0, 2])]),
            (dist.TruncatedNormal(0.05, 0.05, low=0.0), values[jnp.array([1, 3])]),
            (dist.LogNormal(jnp.log(10.0), 1.0), values[4:6]),
            (dist.LogNormal(-1.0, 1.0), values[6:]),
        ):
            total += prior.log_prob(some).sum()
        return -(total + z.sum())

    return with_gradient(loss)


def slsqp_end(loss, best, index, sign, threshold, guess):
    """The least or the largest value of one parameter at which L is at most the threshold above its minimum."""
    least = loss(best)[0]
    unit = np.zeros(len(best))
    unit[index] = 1.0
    room = {
        "type": "ineq",
        "fun": lambda z: least + threshold - loss(z)[0],
        "jac": lambda z: -loss(z)[1],
    }
    found = minimize(
        lambda z: -sign * z[index],
        guess,
        jac=lambda z: -sign * unit,
        constraints=[room],
        method="SLSQP",
        options=dict(ftol=1e-10, maxiter=500),
    )
    return found.x[index]


def example():
    """What examples/rates.py finds, which runs as it stands."""
    path = HERE.parents[1] / "examples" / "rates.py"
    with tempfile.TemporaryDirectory() as out:
        arguments, sys.argv = sys.argv, [str(path), "--quick", "--out", out]
        found = runpy.run_path(str(path))
        sys.argv = arguments
    fit = laplode.refine(found["posterior"].model, found["problem"], decrement=1e-10, progress=False)
    return laplode.laplace(fit.model, found["problem"], progress=False), found["table"]


def rates(num_samples):
    posterior, table = example()
    names = [posterior.parameters.name(i) for i in range(8)]
    profiles, seconds = timed(posterior, names, num=24)
    points = [len(each.values) for each in profiles]
    left = max(float(each.decrement.max()) for each in profiles)
    print(f"{len(profiles)} profiles of {min(points)} to {max(points)} points in {seconds:.1f} s; decrement {left:.1e}")
    loss, mean, std = hare_lynx_loss(table), np.asarray(posterior.mean), np.asarray(posterior.marginal_std())
    best = minimize(loss, mean, jac=True, method="BFGS", options=dict(gtol=1e-6)).x
    worst, nuts = 0.0, None
    if num_samples:
        tree = laplode.nuts(posterior, key=jax.random.key(2), num_warmup=1000, num_samples=num_samples, progress=False)
        print(f"NUTS: r_hat at most {tree['posterior'].attrs['max_rhat']:.4f}")
        stacked = tree["posterior"].dataset.to_stacked_array("parameter", ["chain", "draw"])
        nuts = np.quantile(stacked.values.reshape(-1, 8), [0.025, 0.975], axis=0)
    print("| parameter | estimate | profile | SciPy | Gaussian | NUTS |\n|---|---:|---:|---:|---:|---:|")
    for i, each in enumerate(profiles):
        ends = each.intervals[0]
        guess = lambda end, each=each: np.asarray(each.thetas[np.argmin(np.abs(each.values - end))])
        exact = [
            np.exp(slsqp_end(loss, best, i, sign, each.threshold, guess(end)))
            for sign, end in zip((-1, 1), ends, strict=True)
        ]
        worst = max(worst, np.max(np.abs(np.subtract(ends, exact))) / np.ptp(ends))
        cells = [ends, exact, each.laplace, *([nuts[:, i]] if nuts is not None else [])]
        row = " | ".join(f"{low:.4g} to {high:.4g}" for low, high in cells)
        print(f"| {each.name} | {each.estimate:.4g} | {row} |", flush=True)
    print(f"ends differ by at most {worst:.1e} of the interval; standard deviations {np.round(std, 3).tolist()}")
    return seconds <= 20 and worst < 1e-3


# ---- A forecast of a neural field


def left_to_gain(aim, theta):
    """The constrained Newton decrement at θ, by the exact Hessian of the Lagrangian."""
    lane = aim.lane(theta, aim.grid(theta), np.nan, 1.0)
    here = (yield lane).here
    return -0.5 * here.gradient @ newton_step(aim, dataclasses.replace(lane, target=here.value), here)


def neural(_):
    from trajectories import ADAM, Neural, problem

    task, key = problem(0), jax.random.key(0)
    model = laplode.NeuralODE(Neural(eqx.nn.MLP(2, 2, 16, 2, jnp.tanh, key=key)))
    fit = laplode.fit(model, task, ADAM, steps=2500, key=key, progress=False)
    fit = laplode.refine(fit.model, task, progress=False)
    posterior = laplode.laplace(fit.model, task, curvature="ggn", progress=False)
    forecast = laplode.trajectory_at(12.0, 0)
    found, seconds = timed(posterior, forecast, num=10)
    aim, left = aims_of(quantities(forecast, posterior), Ask(posterior, True, 0.95, 1, 10, None))[0], {}
    together(aim.held, {i: left_to_gain(aim, theta) for i, theta in enumerate(found.thetas)}, left.__setitem__, None)
    print(found)
    print(
        f"P = {posterior.size}: {len(found.values)} points in {seconds:.1f} s; left to gain at most "
        f"{max(left.values()):.1e} nats by the exact Hessian of the Lagrangian"
    )
    return seconds * 20 / len(found.values) <= 60 and max(left.values()) < 1e-3


# ---- Systems biology


class Stat5(eqx.Module):
    """Receptor activity decays; dimers are formed, go into the nucleus and come out again."""

    epo_decay: jax.Array
    export_hetero: jax.Array
    export_homo: jax.Array
    import_hetero: jax.Array
    import_homo: jax.Array
    phosphorylation: jax.Array

    def __call__(self, t, y, args):
        a, paa, b, pab, pbb, naa, nab, nbb = y
        power = lambda x: 10.0**x
        ratio, decay = 0.45 / 1.4, power(self.epo_decay)  # of the nucleus' volume to that of the cytoplasm
        made = 1.25e-7 * jnp.exp(-decay * t) * power(self.phosphorylation)
        out_homo, out_hetero = power(self.export_homo), power(self.export_hetero)
        in_homo, in_hetero = power(self.import_homo), power(self.import_hetero)
        return jnp.stack(
            [
                -made * (2 * a * a + a * b) + ratio * (2 * out_homo * naa + out_hetero * nab),
                made * a * a - in_homo * paa,
                -made * (2 * b * b + a * b) + ratio * (2 * out_homo * nbb + out_hetero * nab),
                made * a * b - in_hetero * pab,
                made * b * b - in_homo * pbb,
                in_homo * paa / ratio - out_homo * naa,
                in_hetero * pab / ratio - out_hetero * nab,
                in_homo * pbb / ratio - out_homo * nbb,
            ]
        )


def observed(y, args):
    """Shares of what a mass spectrometer sees, in percent; 0.107 of the peptides are of type C17."""
    a, paa, b, pab, pbb, *_ = y
    c = 0.107
    d = 1 - c
    return 100 * jnp.stack(
        [
            (pab + 2 * paa * c) / (pab + a * c + 2 * paa * c),
            (pab + 2 * pbb * d) / (pab + b * d + 2 * pbb * d),
            (pab + a * c + 2 * paa * c) / (2 * pab + a * c + 2 * paa * c + b * d + 2 * pbb * d),
        ]
    )


# The nominal parameters of the collection: rates by their decimal logarithm, noise scales.
NOMINAL = np.log10([0.026982514, 1.00068e-5, 0.006170228, 0.016367918, 97749.38, 15766.507])
SCALES = np.array([3.8526, 6.5915, 3.1527])
START = np.array([207.6 * 0.693, 0, 207.6 * 0.307, 0, 0, 0, 0, 0])


def stat5_posterior(spread=3.0):
    table = np.genfromtxt(HERE / "stat5.csv", delimiter=",", skip_header=5)
    model = laplode.NeuralODE(
        Stat5(*map(jnp.asarray, NOMINAL)),
        observe=observed,
        scale=SCALES,
        solver=diffrax.Kvaerno5(),
        stepsize_controller=diffrax.PIDController(1e-7, 1e-8),
    )
    priors = {"vector_field": dist.Normal(0.0, spread), "scale": dist.LogNormal(1.5, 1.0)}
    data = laplode.Trajectories(table[:, 0], table[:, 1:], START)
    problem = laplode.Problem(data, laplode.Gaussian(), laplode.NamedPriors(priors))
    fit = laplode.refine(model, problem, decrement=1e-10, progress=False)
    return laplode.laplace(fit.model, problem, progress=False)


def stat5_loss(data):
    """−log p(Y | θ) of the rates' logarithms and those of the noise scales."""
    ts, ys = jnp.asarray(data.ts[0]), jnp.asarray(data.ys[0])

    def loss(z):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rates: Stat5(*rates)(t, y, None)),
            diffrax.Kvaerno5(),
            ts[0],
            ts[-1],
            0.01,
            jnp.asarray(START),
            tuple(z[:6]),
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=diffrax.PIDController(1e-8, 1e-9),
            throw=False,
        )
        seen = jax.vmap(lambda y: observed(y, None))(solution.ys)
        return -dist.Normal(seen, jnp.exp(z[6:])).log_prob(ys).sum()

    return with_gradient(loss)


def best_of_others(loss, index, value, starts):
    """The least L with one parameter held, over all others, from several starts."""
    rest = np.arange(9) != index

    def free(z):
        found, gradient = loss(np.insert(z, index, value))
        return found, gradient[rest]

    options = dict(maxiter=2000, maxfun=4000, ftol=1e-14, gtol=1e-7)
    return min(minimize(free, start[rest], jac=True, method="L-BFGS-B", options=options).fun for start in starts)


def stat5(_):
    began = time.perf_counter()
    posterior = stat5_posterior()
    data, z = posterior.problem.data, np.append(NOMINAL, np.log(SCALES))
    loss = stat5_loss(data)
    print(f"at the nominal parameters of the collection −log p(Y | θ) = {loss(z)[0]:.3f} (published 138.222)")
    names = [posterior.parameters.name(i) for i in range(9)]
    print(f"posterior after {time.perf_counter() - began:.0f} s", flush=True)
    profiles, good = [], True
    for i, name in enumerate(names):
        start = time.perf_counter()
        found = laplode.profile(posterior, name, prior=False, progress=False)
        profiles.append(found)
        print(f"{found} {len(found.values)} points, {time.perf_counter() - start:.1f} s", flush=True)
    least = min(minimize(loss, p.thetas[np.argmin(p.drop)], jac=True, method="L-BFGS-B").fun for p in profiles)
    for i, found in enumerate(profiles):
        known = np.log if i >= 6 else np.asarray
        for end in np.ravel(found.intervals):
            if not np.isfinite(end) or (i >= 6 and end <= 0):
                print(f"{found.name}: open, {end}")
                continue
            at = found.thetas[np.argmin(np.abs(found.values - end))]
            starts = (at, np.asarray(posterior.mean), at + 0.3 * np.random.default_rng(i).normal(size=9))
            drop = best_of_others(loss, i, float(known(end)), starts) - least
            good &= abs(drop - found.threshold) < 0.02
            print(f"{found.name}: {end:.4f}, drop {drop:.4f} of {found.threshold:.4f}", flush=True)
    return good


def main():
    num_samples = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    good = {"rates": rates, "neural": neural, "stat5": stat5}[sys.argv[1]](num_samples)
    print("good" if good else "NOT GOOD")


if __name__ == "__main__":
    main()

"""Do the intervals cover the truth as often as they say? Simulated data of five systems, many seeds. Run by hand:

    python tests/benchmarks/calibration.py run linear|oscillator|predator|vanderpol|fitzhugh FIRST LAST --out DIR
    python tests/benchmarks/calibration.py table DIR
    python tests/benchmarks/calibration.py nuts SYSTEM SEED
    python tests/benchmarks/calibration.py profiles rates|oscillator|predator|vanderpol|fitzhugh FIRST LAST

`run` adds a line for each seed to DIR/SYSTEM.jsonl, and leaves out those that are there; `table` reads all of them.
`nuts` compares one seed with NUTS on the exact posterior, with the noise and the prior precision found there.
`profiles` counts how often 90% intervals of profiles cover, beside linearized and geodesic ones: of forecasts at t = 12
and 15, both channels, by the neural field with noise and precision found; or of the four rates of `predator`, from 7
noisy times.

Each seed has its own initial state (known) and noise: 41 times to t = 10, two channels, standard deviation 0.1, which
the methods have to find. The truth continues to t = 15. The field is a basis linear in its parameters for `linear`,
whose truth is drawn from the prior; otherwise an MLP 2-16-2 (P = 82), which knows nothing of the system. Restarts are
fitted side by side by Adam; then, each for itself, refine(curvature="ggn"), laplace(curvature="ggn") and
maximize_evidence(online=True). Methods:

- linearized, geodesic, sampled: of the restart of highest evidence; weighted: the geodesic draws by their importance
    weights, which is what resampling stands for;
- leaf, field, learned: linearized, with a precision for each leaf of the model; with `FieldPrior()` as it is; and with
    its amplitude and length by the evidence, too; "leaf geodesic" and so on, the same with geodesic draws. --priors
    says which;
- mixture: of all restarts by their evidence, each linearized;
- ensemble: all restarts as Adam left them, a deep ensemble: the mean of their trajectories, the standard deviation
    between them, and the noise from their residuals. Refined, they fall into the same optimum and say nothing.

Steps of the solver are constant, so that all seeds and systems have the same shapes, and each program is compiled once.
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats as st

import laplode

jax.config.update("jax_enable_x64", True)
warnings.simplefilter("ignore", laplode.LaplodeWarning)

ADAM = optax.adam(1e-2)
NOISE, TRAIN = 0.1, 41
TS = np.linspace(0, 15, 61)
PRIORS = ("leaf", "field", "learned")
METHODS = ("linearized", "geodesic", "sampled", "weighted", "mixture", "ensemble")
METHODS += tuple(name for prior in PRIORS for name in (prior, f"{prior} geodesic"))
# New initial states in the box of the data, and in one 1.5 times as wide; of how many, and at which of the times.
BOXES, STATES, SOME = {"inside": 1.0, "wide": 1.5}, 8, slice(4, TRAIN, 4)


# ---- Systems


class Oscillator(eqx.Module):
    start = (2.0, 0.0)

    def __call__(self, t, y, args):
        return jnp.stack([y[1], -y[0] - 0.2 * y[1]])


class Predator(eqx.Module):
    start = (1.5, 0.8)

    def __call__(self, t, y, args):
        return jnp.stack([1.3 * y[0] - 0.9 * y[0] * y[1], 0.8 * y[0] * y[1] - 1.8 * y[1]])


class VanDerPol(eqx.Module):
    start = (1.0, 0.5)

    def __call__(self, t, y, args):
        return jnp.stack([y[1], (1 - y[0] ** 2) * y[1] - y[0]])


class FitzHugh(eqx.Module):
    """In time units six times as long as usual, in which its period is about 6.5."""

    start = (-1.0, 0.5)

    def __call__(self, t, y, args):
        return 6 * jnp.stack([y[0] - y[0] ** 3 / 3 - y[1] + 0.5, 0.08 * (y[0] + 0.7 - 0.8 * y[1])])


class Basis(eqx.Module):
    w: jax.Array
    start = (1.0, -1.0)

    def __call__(self, t, y, args):
        phases = jnp.arange(1, 4) * t / 2
        return self.w @ jnp.concatenate([jnp.sin(phases), jnp.cos(phases)])


class Neural(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t, y, args):
        return self.mlp(y)


SYSTEMS = {
    "linear": Basis,
    "oscillator": Oscillator,
    "predator": Predator,
    "vanderpol": VanDerPol,
    "fitzhugh": FitzHugh,
}


def solved(field):
    steps = diffrax.ConstantStepSize()
    return laplode.NeuralODE(field, stepsize_controller=steps, dt0=0.2, max_steps=80)


def simulate(name, seed):
    """The model to begin with, the observations up to t = 10, and the truth and new observations up to t = 15."""
    rng = np.random.default_rng([list(SYSTEMS).index(name), seed])
    key = jax.random.key(seed)
    if name == "linear":
        field, model = Basis(jnp.asarray(rng.normal(size=(2, 6)))), solved(Basis(jnp.zeros((2, 6))))
    else:
        field, model = SYSTEMS[name](), solved(Neural(eqx.nn.MLP(2, 2, 16, 1, jnp.tanh, key=key)))
    y0 = np.array(field.start) + 0.2 * rng.normal(size=2)
    exact = laplode.NeuralODE(field, stepsize_controller=diffrax.PIDController(1e-9, 1e-9))
    truth = np.asarray(exact(TS, y0))
    old, new = truth + NOISE * rng.normal(size=(2, *truth.shape))
    return model, laplode.Trajectories(TS[:TRAIN], old[:TRAIN], y0), truth, new


def elsewhere(name, seed, data, posterior):
    """The linearized forecast from new initial states against the truth; None where the model has no solution."""
    rng, found = np.random.default_rng([100 + list(SYSTEMS).index(name), seed]), {}
    exact = laplode.NeuralODE(SYSTEMS[name](), stepsize_controller=diffrax.PIDController(1e-9, 1e-9))
    low, high = data.ys[0].min(axis=0), data.ys[0].max(axis=0)
    for box, wide in BOXES.items():
        states = (low + high) / 2 + wide * (high - low) * (rng.uniform(size=(STATES, 2)) - 0.5)
        truth = np.stack([np.asarray(_solve(exact, y0)) for y0 in states])[:, SOME]
        try:
            options = dict(num_samples=1, key=jax.random.key(0), progress=False)
            predictions = laplode.predict(posterior, TS[:TRAIN], states, **options)
        except laplode.LaplodeError:
            found[box] = None
            continue
        variance = np.diagonal(np.asarray(predictions.covariance()), axis1=1, axis2=2)
        std = np.sqrt(np.maximum(variance.reshape(STATES, TRAIN, 2)[:, SOME], 1e-12))
        found[box] = rounded(st.norm.cdf((truth - np.asarray(predictions.mean)[:, SOME]) / std))
    return found


def rounded(values):
    return np.round(np.asarray(values, dtype=float), 4).tolist()


# ---- What a method predicts, and how well


class Marginals(NamedTuple):
    """A mixture of Gaussians for each noise-free value, (C, T, K), and the noise of each component."""

    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray
    noise: np.ndarray
    draws: bool

    @classmethod
    def of_draws(cls, predictions, noise, log_weights=None):
        ok = np.asarray(predictions.ok)
        means = np.asarray(predictions.f)[ok, 0]
        weights = np.full(len(means), 1 / len(means)) if log_weights is None else np.exp(np.asarray(log_weights))[ok]
        return cls(weights / weights.sum(), means, np.zeros_like(means), np.broadcast_to(noise, means.shape), True)

    def std(self):
        mean = np.tensordot(self.weights, self.means, 1)
        return np.sqrt(np.tensordot(self.weights, self.variances + (self.means - mean) ** 2, 1))

    def pit(self, values, noise: bool):
        """The probability below each value: uniform where all is well."""
        scale = np.sqrt(self.variances + self.noise**2 * noise)
        if self.draws and not noise:
            below = np.tensordot(self.weights, (self.means < values).astype(float), 1)
            return (len(self.means) * below + 0.5) / (len(self.means) + 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.tensordot(self.weights, st.norm.cdf((values - self.means) / scale), 1)

    def log_density(self, values):
        """Of new observations."""
        scale = np.sqrt(self.variances + self.noise**2)
        with np.errstate(divide="ignore"):
            each = st.norm.logpdf(values, self.means, scale) + np.log(self.weights)[:, None, None]
        return np.logaddexp.reduce(each)

    def crps(self, values):
        """Of new observations; Grimit et al. (2006)."""
        variances = self.variances + self.noise**2

        def absolute(mean, variance):  # E|X|
            scale = np.sqrt(variance)
            return 2 * scale * st.norm.pdf(mean / scale) + mean * (2 * st.norm.cdf(mean / scale) - 1)

        apart = sum(
            w * np.tensordot(self.weights, absolute(self.means - m, variances + v), 1)
            for w, m, v in zip(self.weights, self.means, variances, strict=True)
        )
        return np.tensordot(self.weights, absolute(self.means - values, variances), 1) - 0.5 * apart


def closed_form(posteriors, weights):
    """Each linearized."""
    means, variances = [], []
    for posterior in posteriors:
        found = laplode.predict(posterior, TS, num_samples=1, key=jax.random.key(0), progress=False)
        means.append(np.asarray(found.mean[0]))
        variances.append(np.diagonal(np.asarray(found.covariance()[0])).reshape(means[-1].shape))
    noise = np.stack([np.broadcast_to(scale_of(p), means[0].shape) for p in posteriors])
    return Marginals(np.asarray(weights), np.stack(means), np.maximum(np.stack(variances), 0), noise, False)


def ensemble(models, data):
    members = np.stack([np.asarray(_solve(model, data.y0[0])) for model in models])
    mean, variance = members.mean(axis=0)[None], np.var(members, axis=0, ddof=1)[None]
    residuals = (members[:, :TRAIN] - data.ys[0])[:, 1:]
    noise = np.sqrt(np.mean(residuals**2, axis=(0, 1)))
    return Marginals(np.ones(1), mean, variance, np.broadcast_to(noise, mean.shape), False)


@eqx.filter_jit
def _solve(model, y0):
    return model(TS, y0)


def scale_of(posterior):
    return np.asarray(posterior.problem.likelihood.scale)


def timed(clock, name, function):
    start = time.perf_counter()
    result = function()
    jax.block_until_ready(jax.tree.leaves(eqx.filter(result, eqx.is_array)))
    clock[name] = time.perf_counter() - start
    return result


def fitted(name, model, problem, seed, restarts, steps, clock):
    if name == "linear":
        return [model]
    adam = lambda: laplode.fit(
        model, problem, ADAM, steps=steps, key=jax.random.key(seed), restarts=restarts, progress=False
    )
    fit = timed(clock, "fit", adam)
    return fit.restarts or (fit.model,)


def posteriors_of(models, problem, precision="one"):
    """Of each model one, with hyperparameters by evidence; the most probable first."""
    found = []
    for model in models:
        # As far as is of use: with the hyperparameters the optimum will move, and online=True refines again.
        fit = laplode.refine(model, problem, curvature="ggn", decrement=1e-2, progress=False)
        posterior = laplode.laplace(fit.model, problem, curvature="ggn", progress=False)
        found.append(laplode.maximize_evidence(posterior, precision=precision, online=True, progress=False))
    return sorted(found, key=lambda p: -float(p.log_evidence))


def with_prior(prior, posteriors, data):
    """The most probable posterior with another prior, from where `posteriors` are."""
    likelihood, models = posteriors[0].problem.likelihood, [posterior.model for posterior in posteriors]
    if prior == "leaf":
        return posteriors_of(models, laplode.Problem(data, likelihood, 1.0), "leaf")[0]
    problem = laplode.Problem(data, likelihood, laplode.FieldPrior())
    return posteriors_of(models, problem, "fixed" if prior == "field" else "one")[0]


def started(name, model, data, seed, options, clock):
    """The models as Adam left them, and their posteriors."""
    problem = laplode.Problem(data, laplode.Gaussian(np.full(2, 0.1 * float(np.std(data.ys)))), 1.0)
    models = fitted(name, model, problem, seed, options.restarts, options.steps, clock)
    return models, timed(clock, "refine and evidence", lambda: posteriors_of(models, problem))


def one(name, seed, options):
    clock, draws = {}, options.draws
    model, data, truth, new = simulate(name, seed)
    models, posteriors = started(name, model, data, seed, options, clock)
    best = posteriors[0]
    table = laplode.compare_evidence({str(i): posterior for i, posterior in enumerate(posteriors)})
    table = table[table["weight"] > 0]
    noise = scale_of(best)
    found = {
        "linearized": timed(clock, "linearized", lambda: closed_form([best], [1.0])),
        "mixture": closed_form([posteriors[int(name)] for name in table.index], np.asarray(table["weight"])),
    }
    khat = {}
    if draws:
        for method in ("geodesic", "sampled"):
            options = dict(method=method, num_samples=draws, key=jax.random.key(seed), progress=False)
            predictions = timed(clock, method, lambda options=options: laplode.predict(best, TS, **options))
            khat[method] = predictions.khat
            if np.sum(predictions.ok) > 1:
                found[method] = Marginals.of_draws(predictions, noise)
                found[f"{method} ok"] = float(np.mean(predictions.ok))
                if method == "geodesic":
                    found["weighted"] = Marginals.of_draws(predictions, noise, predictions.log_weights)
    if len(models) > 1:
        found["ensemble"] = ensemble(models, data)
    others = {
        prior: timed(clock, prior, lambda prior=prior: with_prior(prior, posteriors, data))
        for prior in options.priors
        if name != "linear"
    }
    for prior, posterior in others.items():
        found[prior] = closed_form([posterior], [1.0])
        if draws:
            how = dict(method="geodesic", num_samples=draws, key=jax.random.key(seed), progress=False)
            predictions = laplode.predict(posterior, TS, **how)
            found[f"{prior} geodesic"] = Marginals.of_draws(predictions, scale_of(posterior))
    states = {"linearized": best, **others} if name != "linear" else {}
    record = {
        "system": name,
        "seed": seed,
        "scale": rounded(noise),
        "precision": float(best.problem.prior.precision),
        "dof": best.diagnostics.effective_dof,
        "decrement": best.diagnostics.newton_decrement,
        "log_evidence": [float(p.log_evidence) for p in posteriors],
        "components": len(table),
        "khat": khat,
        "draws": draws,
        "seconds": clock,
        "evidence": {prior: float(p.log_evidence) for prior, p in others.items()},
        "field": {prior: _shape_of(p) for prior, p in others.items() if prior != "leaf"},
        "elsewhere": {method: elsewhere(name, seed, data, posterior) for method, posterior in states.items()},
        "methods": {},
    }
    for method in METHODS:
        if method not in found:
            continue
        marginals = found[method]
        # The initial state is known: nothing is said about it.
        record["methods"][method] = {
            "ok": found.get(f"{method} ok", 1.0),
            "std": rounded(marginals.std()[1:]),
            "error": rounded((np.tensordot(marginals.weights, marginals.means, 1) - truth)[1:]),
            "pit": rounded(marginals.pit(truth, False)[1:]),
            "pit_new": rounded(marginals.pit(new, True)[1:]),
            "crps": rounded(marginals.crps(new)[1:]),
            "log_density": rounded(marginals.log_density(new)[1:]),
        }
    return record


def _shape_of(posterior):
    prior = posterior.problem.prior
    return {"amplitude": rounded(prior.amplitude), "length": rounded(prior.length)}


def run(options):
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.system}.jsonl"
    done = {r["seed"] for r in read(path)}
    for seed in range(options.first, options.last):
        if seed in done:
            continue
        record = one(options.system, seed, options)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        clock = ", ".join(f"{k} {v:.1f} s" for k, v in record["seconds"].items())
        inside = {
            m: f"{np.mean(np.abs(np.array(r['pit'])[: TRAIN - 1] - 0.5) < 0.45):.0%}/"
            f"{np.mean(np.abs(np.array(r['pit'])[TRAIN - 1 :] - 0.5) < 0.45):.0%}"
            for m, r in record["methods"].items()
        }
        print(
            f"{options.system} {seed}: scales {record['scale']}, precision {record['precision']:.3g}, "
            f"dof {record['dof']:.1f}, decrement {record['decrement']:.1e}, evidence "
            f"{[round(x, 1) for x in record['log_evidence']]}, k̂ {record['khat']}; {clock}; {inside}",
            flush=True,
        )


def against_nuts(options):
    """Rows of a Markdown table: spread over that of NUTS, and the distance of means in its standard deviations."""
    model, data, *_ = simulate(options.system, options.seed)
    _, found = started(options.system, model, data, options.seed, options, {})
    best, key = found[0], jax.random.key(options.seed)
    draws, deep = options.draws, options.max_tree_depth
    sampler = dict(num_warmup=draws, num_samples=draws, target_accept_prob=0.9, max_tree_depth=deep, progress=False)
    tree = laplode.nuts(best, TS, key=key, **sampler)
    attrs, values = tree["posterior"].attrs, tree["predictions"]["f"].values[:, :, 0]
    reference = values.reshape(-1, *values.shape[2:])
    mean, std = reference.mean(axis=0), reference.std(axis=0)
    methods = {"linearized": closed_form([best], [1.0])}
    for method in ("geodesic", "sampled"):
        predictions = laplode.predict(best, TS, method=method, num_samples=200, key=key, progress=False)
        methods[method] = Marginals.of_draws(predictions, scale_of(best))
    for method, marginals in methods.items():
        center = np.tensordot(marginals.weights, marginals.means, 1)
        cells = [
            f"{np.mean(x[rows]):.2f}"
            for x in (marginals.std()[1:] / std[1:], np.abs(center - mean)[1:] / std[1:])
            for rows in (slice(None, TRAIN - 1), slice(TRAIN - 1, None))
        ]
        print(
            f"| {options.system} {options.seed} | {attrs['max_rhat_f']:.3f} | {attrs['max_rhat']:.2f} | "
            f"{attrs['num_divergences']} | {attrs['sampling_time']:.0f} | {method} | {' | '.join(cells)} |",
            flush=True,
        )


# ---- Profiles


class Rates(eqx.Module):
    """The predator and its prey by the logarithms of their rates."""

    log_rates: jax.Array

    def __call__(self, t, y, args):
        birth, hunt, feed, death = jnp.exp(self.log_rates)
        return jnp.stack([birth * y[0] - hunt * y[0] * y[1], feed * y[0] * y[1] - death * y[1]])


def of_rates(seed):
    """The posterior of four rates, what is profiled, and its true values."""
    truth, ts = np.log([1.3, 0.9, 0.8, 1.8]), np.linspace(0, 4, 7)
    y0, rng = np.array(Predator.start), np.random.default_rng([7, seed])
    exact = np.asarray(laplode.NeuralODE(Predator())(ts, y0))
    data = laplode.Trajectories(ts, exact + 0.3 * rng.normal(size=exact.shape), y0)
    problem = laplode.Problem(data, laplode.Gaussian(0.3), laplode.GaussianPrior(0.1))
    fit = laplode.refine(laplode.NeuralODE(Rates(jnp.asarray(truth))), problem, progress=False)
    return laplode.laplace(fit.model, problem, progress=False), "vector_field.log_rates", truth


def of_forecasts(name, seed, options):
    """The same of forecasts by a neural field."""
    model, data, truth, _ = simulate(name, seed)
    posterior = started(name, model, data, seed, options, {})[1][0]
    later = TS[[48, 60]]
    return posterior, [laplode.trajectory_at(later, channel) for channel in (0, 1)], truth[[48, 60]].T.ravel()


def quantiles(posterior, of, draws, seed):
    """Central 90% intervals of geodesic draws, as many as quantities."""
    of = of if isinstance(of, list) else [lambda model: model.vector_field.log_rates]
    how = dict(method="geodesic", num_samples=draws, key=jax.random.key(seed), progress=False)
    found = [np.asarray(laplode.predict_function(posterior, each, **how).draws).reshape(draws, -1) for each in of]
    return np.nanquantile(np.concatenate(found, axis=1), [0.05, 0.95], axis=0).T


def profiles(options):
    covered = {"profile": [], "linearized": [], "geodesic": []}
    for seed in range(options.first, options.last):
        rates = options.system == "rates"
        posterior, of, truth = of_rates(seed) if rates else of_forecasts(options.system, seed, options)
        start = time.perf_counter()
        try:
            found = laplode.profile(posterior, of, level=0.9, num=8, progress=False)
        except laplode.FitError as error:
            print(f"seed {seed}: {error}", flush=True)
            continue
        seconds = time.perf_counter() - start
        inside = lambda ends, truth=truth: [low <= x <= high for (low, high), x in zip(ends, truth, strict=True)]
        several = zip(found, truth, strict=True)
        covered["profile"].append([any(low <= x <= high for low, high in each.intervals) for each, x in several])
        covered["linearized"].append(inside([each.laplace for each in found]))
        covered["geodesic"].append(inside(quantiles(posterior, of, options.draws, seed)))
        bent = max(each.nonlinearity for each in found)
        print(f"seed {seed}: {seconds:.1f} s, nonlinearity at most {bent:.2f}, {covered['profile'][-1]}", flush=True)
    for method, each in covered.items():
        each = np.mean(np.array(each), axis=1)
        error = np.std(each, ddof=1) / np.sqrt(len(each))
        print(f"| {options.system} | {method} | {len(each)} | {100 * np.mean(each):.0f} ± {100 * error:.0f} |")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- The table


def table(folder):
    """Rows of a Markdown table; ± is the standard error over seeds, each seed being one cluster."""
    for part, rows in (("inside", slice(None, TRAIN - 1)), ("beyond", slice(TRAIN - 1, None))):
        print(f"\n{part}\n")
        print(
            "| system | method | seeds | covers at 50% | 90% | 95% | new data at 90% | CRPS | log density | spread | "
            "s a draw |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
        )
        for name in SYSTEMS:
            records = read(Path(folder) / f"{name}.jsonl")
            for method in METHODS:
                having = [r for r in records if method in r["methods"]]
                if having:
                    print(_row(name, method, having, rows))


def table_elsewhere(folder):
    """The same for new initial states; where a model has no solution from one of them, the data set is left out."""
    print("\nnew initial states\n\n| system | method | box | seeds | covers at 50% | 90% | 95% | without solution |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for name in SYSTEMS:
        records = [r for r in read(Path(folder) / f"{name}.jsonl") if r.get("elsewhere")]
        for method in ("linearized", *PRIORS):
            for box in BOXES:
                having = [r["elsewhere"][method][box] for r in records if method in r["elsewhere"]]
                pits = np.array([pit for pit in having if pit is not None])
                if len(pits):
                    cells = " | ".join(_covers(pits, level) for level in (0.5, 0.9, 0.95))
                    print(f"| {name} | {method} | {box} | {len(pits)} | {cells} | {len(having) - len(pits)} |")


def _covers(pits, level):
    each = np.mean(np.abs(pits - 0.5) < level / 2, axis=tuple(range(1, pits.ndim)))
    error = np.std(each, ddof=1) / np.sqrt(len(each)) if len(each) > 1 else np.nan
    return f"{100 * np.mean(each):.0f} ± {100 * error:.0f}"


def _row(name, method, records, rows):
    pick = lambda key: np.stack([np.array(r["methods"][method][key])[rows] for r in records])

    covers = lambda key, level: _covers(pick(key), level)
    linear = np.stack([np.array(r["methods"]["linearized"]["std"])[rows] for r in records])
    ratio = np.median(np.mean(pick("std"), axis=(1, 2)) / np.mean(linear, axis=(1, 2)))
    seconds = [r["seconds"][method] / r["draws"] for r in records if r["draws"] and method in r["seconds"]]
    took = "" if method == "linearized" or not seconds else f"{np.median(seconds):.2g}"
    return (
        f"| {name} | {method} | {len(records)} | {covers('pit', 0.5)} | {covers('pit', 0.9)} | {covers('pit', 0.95)} | "
        f"{covers('pit_new', 0.9)} | {np.mean(pick('crps')):.4f} | {np.mean(pick('log_density')):.2f} | {ratio:.2f} | "
        f"{took} |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run")
    command.add_argument("system", choices=SYSTEMS)
    command.add_argument("first", type=int)
    command.add_argument("last", type=int)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--draws", type=int, default=60, help="of geodesic and sampled; 0 leaves these out")
    command.add_argument("--priors", nargs="*", choices=PRIORS, default=PRIORS)
    command.add_argument("--restarts", type=int, default=3)
    command.add_argument("--steps", type=int, default=800, help="of Adam")
    command.set_defaults(do=run)
    command = commands.add_parser("nuts")
    command.add_argument("system", choices=SYSTEMS)
    command.add_argument("seed", type=int)
    command.add_argument("--draws", type=int, default=1000, help="of each of 4 chains, after as many of warmup")
    command.add_argument("--max-tree-depth", type=int, default=8)
    command.set_defaults(do=against_nuts, restarts=3, steps=800)
    command = commands.add_parser("profiles")
    command.add_argument("system", choices=("rates", *SYSTEMS))
    command.add_argument("first", type=int)
    command.add_argument("last", type=int)
    command.add_argument("--draws", type=int, default=100, help="of geodesic")
    command.set_defaults(do=profiles, restarts=1, steps=800)
    command = commands.add_parser("table")
    command.add_argument("folder", type=Path)
    command.set_defaults(do=lambda options: (table(options.folder), table_elsewhere(options.folder)))
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()

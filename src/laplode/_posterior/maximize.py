"""Hyperparameters at which the data are most probable."""

import math
import warnings
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from .._checks import check_count, check_flag, real_array
from .._curvature.strategies import At
from .._errors import LaplodeError, LaplodeWarning
from .._fit.refine import refine
from .._problem.problem import Problem
from .._progress import tqdm
from .evidence import Evidence, Hyperparameters, _forms, evidence_function
from .laplace import laplace, reassembled
from .posterior import Posterior

# ---- Its maximum

# A gradient below this, in nats per e-fold, is at a maximum.
_FLAT = 1e-5


# Rounds of refinement that gain less than this, in nats, have settled.
_SETTLED = 1e-3


# An optimum has not been found where the evidence rises by more nats in an e-fold.
_STILL_RISES = 0.1


# What stands for a loss that is not finite.
_WORSE = 1e6


# The parts of a step that are tried, one after another.
_PARTS = (1.0, 0.5, 0.2, 0.05)


# Within this of a bound, in e-folds, an optimum has run to it.
_AT_BOUND = 0.01


def maximize_evidence(
    posterior: Posterior,
    *,
    precision: str = "one",
    noise: str | None = None,
    online: bool = False,
    precision_bounds: tuple[float, float] = (1e-6, 1e6),
    scale_bounds: tuple[float, float] = (1e-3, 1e3),
    steps: int = 200,
    rounds: int = 20,
    progress: bool = True,
) -> Posterior:
    """Prior precisions and noise scales at which the data are most probable under the Laplace approximation.

    log p(Y) ≈ log p(Y | θ*) + log p(θ*) + P/2 log 2π − ½ log det Λ is maximized over log hyperparameters by L-BFGS. θ*
    and its curvature being in hand, no value takes a solve.

    **Arguments:**

    - `posterior`: from `laplace`.
    - `precision`: how many prior precisions there are: "one"; one for each "leaf" of the model (weight matrix, bias,
        scalar); one for each "parameter"; or "fixed" as they are. Of a `FieldPrior` amplitude and length: "one" factor
        of each for all outputs of the field, otherwise one for each output.
    - `noise`: the noise scales: one for each "channel"; "one" factor on all; or "fixed". By default "channel" where the
        likelihood has a scale and the curvature at other scales is known: with "ggn" always, with the exact "hessian"
        for Gaussian and LogNormal ("one", if "low_rank" or with "jitter").
    - `online`: whether to alternate with `refine`, which moves θ* to the optimum under the new hyperparameters, until
        the evidence settles. With a `FieldPrior` from two starts, its amplitude and length and four times these, of
        which the better is kept.
    - `precision_bounds`, `scale_bounds`: of the prior precisions, or amplitudes and lengths, and of the noise scales,
        as multiples of those at the start.
    - `steps`: of L-BFGS, at most.
    - `rounds`: of refinement and maximization, at most, when `online`.
    - `progress`: whether to show a progress bar with the evidence.

    **Returns:** a `Posterior` with the hyperparameters found in its `.problem`. Unless `online`, its mean is that of
    `posterior`.

    **Raises:** `LaplodeError` when an option does not fit the posterior. Warns (`LaplodeWarning`) when a hyperparameter
    ran to a bound, when the evidence has not settled, and when θ* is no longer the optimum.

    MacKay (1992), "Bayesian interpolation"; Immer, Bauer, Fortuin, Rätsch and Khan (2021), "Scalable marginal
    likelihood estimation for model selection in deep learning".
    """
    for name, bounds in (("precision_bounds", precision_bounds), ("scale_bounds", scale_bounds)):
        low, high = real_array(name, bounds) if np.shape(bounds) == (2,) else (0, 0)
        if not 0 < low < high < math.inf:
            raise LaplodeError(f"`{name}` must be two positive numbers in order, got {bounds!r}.")
    for name, value in (("steps", steps), ("rounds", rounds)):
        check_count(name, value)
    check_flag("online", online)
    grouping, _ = _forms(posterior, precision, noise)
    problem, view = posterior.problem, posterior.parameters
    origin = None if grouping is None else problem.prior.hyperparameters(view, grouping)
    starts = problem.prior.starts() if online and grouping is not None else [problem.prior]
    low, high = zip(precision_bounds, scale_bounds, strict=True)
    total = (rounds if online else 1) * len(starts)
    with tqdm(total=total, desc="Evidence", unit="round", disable=not progress) as bar:
        search = _Search(precision, noise, online, steps, total // len(starts), low, high, origin, bar)
        found = [_climbed(eqx.tree_at(lambda p: p.problem.prior, posterior, prior), search) for prior in starts]
    best = max(found, key=lambda each: float(each[0].log_evidence))
    _warn(*best)
    return best[0]


class _Search(NamedTuple):
    """What a search for hyperparameters keeps to."""

    precision: str
    noise: str | None
    online: bool
    steps: int
    rounds: int
    low: tuple[float, float]
    high: tuple[float, float]
    origin: Float[Array, " A"] | None  # the log hyperparameters of the prior of which bounds are multiples
    bar: Any


def _climbed(
    posterior: Posterior, search: _Search
) -> tuple[Posterior, Evidence, Hyperparameters, tuple[Hyperparameters, Hyperparameters], str | None]:
    """The posterior at the maximum that is found from here; and what `_warn` asks for.

    Last is the option that was too small for it, or None.
    """
    moved = None  # the log hyperparameters, since the start
    posterior = _refined(posterior, posterior.problem) if search.online else posterior
    left = search.rounds
    while True:
        function, start = evidence_function(posterior, precision=search.precision, noise=search.noise)
        if moved is None:
            since = jax.tree.map(jnp.subtract, start.log_precision, search.origin)
            moved = Hyperparameters(since, jax.tree.map(jnp.zeros_like, start.log_scale))
        bounds = _bound(start, moved, *search.low), _bound(start, moved, *search.high)
        found, gained, is_flat = _maximum(function, start, bounds, search.steps)
        settled = gained < _SETTLED or not search.online
        if settled:
            posterior = _with(posterior, function, found)
        else:
            better, found = _stepped(posterior, function, start, found)
            posterior, settled = better, better is posterior
        moved = jax.tree.map(lambda before, new, old: before + new - old, moved, found, start)
        search.bar.update(left if settled else 1)
        left -= 1
        search.bar.set_postfix(log_evidence=f"{float(posterior.log_evidence):.6g} nats")
        if settled or not left:
            lacks = None if settled and is_flat else "steps" if settled else "rounds"
            return posterior, function, found, bounds, lacks


def _stepped(
    posterior: Posterior, function: Evidence, start: Hyperparameters, found: Hyperparameters
) -> tuple[Posterior, Hyperparameters]:
    """The posterior around the optimum that goes with hyperparameters, and where these are: `start` if none is better.

    The evidence at one θ* says less of others the farther they are: the step is cut short until the data are more
    probable there indeed.
    """
    for part in _PARTS:
        there = jax.tree.map(lambda a, b, part=part: a + part * (b - a), start, found)
        trial = _refined(posterior, function.problem_at(there))
        if trial.log_evidence > posterior.log_evidence:
            return trial, there
    return posterior, start


def _refined(posterior: Posterior, problem: Problem) -> Posterior:
    """The posterior around the optimum of a problem."""
    curvature, structure, where = posterior.curvature, posterior.structure, posterior.parameters.where
    descent = "hessian" if curvature.signed and structure.whole else "ggn"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LaplodeWarning)  # what remains of it at the end is said there
        fit = refine(posterior.model, problem, curvature=descent, where=where, progress=False)
        return laplace(
            fit.model,
            problem,
            curvature=curvature,
            structure=structure,
            regularization=posterior.regularization,
            where=where,
            progress=False,
        )


def _bound(start: Hyperparameters, moved: Hyperparameters, precision: float, scale: float) -> Hyperparameters:
    """The log hyperparameters that are such multiples of what they were before they `moved`."""
    at = lambda now, since, multiple: None if now is None else now - since + math.log(multiple)
    return Hyperparameters(
        at(start.log_precision, moved.log_precision, precision), at(start.log_scale, moved.log_scale, scale)
    )


def _maximum(
    function: Evidence, start: Hyperparameters, bounds: tuple[PyTree, PyTree], steps: int
) -> tuple[Hyperparameters, float, bool]:
    """The best hyperparameters that L-BFGS finds, what they gain in nats, and whether the evidence is flat there.

    The start, if none is better.
    """
    import scipy.optimize  # it takes a while to import, and few ask for it

    flat, unravel = ravel_pytree(start)
    low, high = (np.asarray(ravel_pytree(bound)[0]) for bound in bounds)

    first = _value_and_gradient(function, start)
    value, slope = float(first[0]), np.asarray(ravel_pytree(first[1])[0])
    if not (np.isfinite(value) and np.all(np.isfinite(slope))):
        raise LaplodeError(
            "`posterior` has an evidence that is not finite, or has derivatives that are not, at its present "
            "hyperparameters: start from other ones."
        )

    def loss(flat, unit):
        there, gradient = _value_and_gradient(function, unravel(jnp.asarray(flat)))
        if not np.isfinite(there):  # Λ is not positive definite; a line search wants a number
            return _WORSE, np.zeros_like(low)
        return (value - float(there)) / unit, -np.asarray(ravel_pytree(gradient)[0]) / unit

    inside, between = np.clip(flat, low, high), np.stack([low, high], axis=1)
    # L-BFGS begins with a step of the length of the gradient. Where that is too long, it is an e-fold at most.
    for unit in (1.0, max(1.0, float(np.max(np.abs(slope))))):
        options = {"maxiter": steps, "ftol": 0.0, "gtol": _FLAT / unit}
        found = scipy.optimize.minimize(
            loss, inside, (unit,), jac=True, method="L-BFGS-B", bounds=between, options=options
        )
        rises = np.clip(found.x - unit * found.jac, low, high) - found.x  # a bound may hold it
        is_flat = bool(np.max(np.abs(rises)) < _STILL_RISES)
        gained = -unit * float(found.fun)
        if gained > 0 or is_flat:
            break
    return (unravel(jnp.asarray(found.x)), gained, is_flat) if gained >= 0 else (start, 0.0, is_flat)  # pyright: ignore[reportPossiblyUnboundVariable]


@eqx.filter_jit
def _value_and_gradient(function: Evidence, hyperparameters: Hyperparameters):
    return jax.value_and_grad(lambda h, f: f(h))(hyperparameters, function)


def _with(posterior: Posterior, function: Evidence, found: Hyperparameters) -> Posterior:
    """The posterior with other hyperparameters."""
    problem = function.problem_at(found)
    form = function.form.scaled(function.shrink(found))
    if form.chosen_by_prior:
        form = posterior.structure.form(posterior.curvature, At(posterior.flow, problem))
    return reassembled(posterior, problem, form)


def _warn(
    posterior: Posterior, function: Evidence, found: Hyperparameters, bounds: tuple[PyTree, PyTree], lacks: str | None
) -> None:
    said, (low, high) = [], bounds
    if found.log_precision is not None:
        assert function.grouping is not None
        names = posterior.problem.prior.hyperparameter_names(posterior.parameters, function.grouping)
        meaning = posterior.problem.prior.at_bounds
        said += _at_bounds(names, found.log_precision, low.log_precision, high.log_precision, meaning)
    if found.log_scale is not None:
        names = ["the noise scale"]
        if len(set(function.scale_of)) > 1:
            labels = posterior.problem.data.channels or range(len(function.scale_of))
            pairs = zip(labels, function.scale_of, strict=True)
            names = [f"the noise scale of channel {label}" for label, place in pairs if place >= 0]
        meaning = ("the model runs through the observations", "the model explains nothing")
        said += _at_bounds(names, found.log_scale, low.log_scale, high.log_scale, meaning)
    if lacks is not None:
        said.append(f"The evidence has not settled: allow more `{lacks}`, or start nearer to its maximum.")
    elif posterior.diagnostics.newton_decrement > 0.1:
        said.append(
            "With these hyperparameters the optimum lies elsewhere: the Newton decrement is now "
            f"{posterior.diagnostics.newton_decrement:.3g} nats. Take online=True, or refine and call laplace again."
        )
    for message in said:
        warnings.warn(message, LaplodeWarning, stacklevel=3)


def _at_bounds(names: list[str], found: Any, low: Any, high: Any, meaning: tuple[str, str]) -> list[str]:
    said = []
    for which, at, means in (
        ("lower", found - low < _AT_BOUND, meaning[0]),
        ("upper", high - found < _AT_BOUND, meaning[1]),
    ):
        index = np.flatnonzero(at)
        if index.size:
            few = ", ".join(names[i] for i in index[:3]) + (f", … ({index.size} in all)" if index.size > 3 else "")
            said.append(
                f"The evidence ran to the {which} bound of {few}: {means}. Look whether the model and the data allow "
                "that, or fix the value."
            )
    return said

"""The exact posterior by NumPyro's No-U-Turn sampler, to hold a Laplace approximation against."""

import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from arviz_stats.base.array import array_stats
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from numpyro.infer.hmc import HMCState, hmc
from numpyro.infer.util import ParamInfo

from .._algebra.precision import AbstractPrecision
from .._checks import check_count, check_flag, check_fraction, check_from, check_key, check_x64, real_array
from .._errors import LaplodeError, choose, warn
from .._model.parameters import Parameters
from .._posterior.posterior import Posterior
from .._predict.grid import Grid
from .._predict.predict import predict_at
from .._predict.predictions import Predictions
from .._predict.solves import advice, log_joint_at
from .._problem.likelihood import AbstractLikelihood
from .._problem.problem import Problem
from .._progress import tqdm
from .datatree import chains_to_datatree
from .layout import check_coords

# Above this the ranks of the chains differ too much (Vehtari et al., 2021).
_RHAT = 1.01


# Transitions that one call may hold, and the seconds that it should take: between calls the bar moves and Ctrl-C is
# heard.
_CHUNK = 64


_SECONDS = (0.3, 1.5)


# Where chains start: draws this much wider than the Laplace posterior, drawn toward its mode by halves until their log
# density is one that the typical set could have.
_OVERDISPERSION = 1.5


_HALVINGS = 20


# NUTS gives up a trajectory whose energy is off by as much.
_DIVERGENCE = 1000.0


# The force at a place that has no part in the posterior, and how far the next step leads from there: so far that it is
# known without a solve. Chains that run together wait for each other, and one that has ended goes on in place.
_WALL, _OUTSIDE = 1e200, 1e100


def nuts(
    posterior: Posterior,
    ts: Any = None,
    y0: Any = None,
    args: PyTree = None,
    *,
    scale: Any = None,
    key: PRNGKeyArray,
    num_warmup: int = 500,
    num_samples: int = 500,
    num_chains: int = 4,
    target_accept_prob: float = 0.8,
    max_tree_depth: int = 10,
    dense_mass: bool = False,
    starts: Any = None,
    chain_method: str = "vectorized",
    num_prior: int = 0,
    coords: Mapping[str, Sequence[Any]] | None = None,
    progress: bool = True,
) -> xr.DataTree:
    """Draws from the exact posterior p(θ | Y) by NumPyro's NUTS, to hold a Laplace approximation against.

    The density is log p(Y | θ) + log p(θ) with the model's own adaptive solve in it, differentiated in reverse; where
    the solve fails it is −∞. Chains move in z, θ = θ* + C z with C Cᵀ = Λ⁻¹ of the Laplace posterior, in which it is a
    standard normal if the approximation is right.

    **Arguments:**

    - `posterior`: from `laplace`.
    - `ts`, `y0`, `args`, `scale`: as in `predict`, for a group `predictions`; None for none.
    - `key`: a JAX random key.
    - `num_warmup`, `num_samples`, `num_chains`: transitions of each chain to adapt in, and to keep; how many chains.
    - `target_accept_prob`, `max_tree_depth`, `dense_mass`: as in `numpyro.infer.NUTS`. A transition takes up to
        2 ** max_tree_depth − 1 gradients. The mass matrix is that of z.
    - `starts`: where chains start, (num_chains, P); by default at draws 1.5 times as wide as the Laplace posterior,
        drawn toward its mode until their density is not much lower than there.
    - `chain_method`: "vectorized": all chains at once, each transition as long as the longest of them; "sequential".
    - `num_prior`: how many draws of the prior to add, as the group `prior`.
    - `coords`: names for "trajectory" and "channel", as in `to_datatree`.
    - `progress`: whether to show a progress bar.

    **Returns:** an `xarray.DataTree` with the groups of `to_datatree`. `sample_stats` holds diverging, energy, lp
    (log p(Y, θ)), n_steps, tree_depth, acceptance_rate and step_size; among the attributes are num_divergences,
    max_rhat over parameters and max_rhat_f over predictions of the data. Stopped by Ctrl-C after warmup, what was drawn
    until then.

    **Raises:** `LaplodeError` when an argument does not fit, the model has no reverse mode, or the density is not
    finite at a start. Warns (`LaplodeWarning`) of divergences and of r̂ above 1.01: that of weights is high where a
    network's hidden units can be exchanged, whether or not the chains agree on its predictions.

    Hoffman and Gelman (2014), "The No-U-Turn sampler"; Phan, Pradhan and Jankowiak (2019), "Composable effects for
    flexible and accelerated probabilistic programming in NumPyro"; Vehtari et al. (2021), "Rank-normalization, folding,
    and localization: an improved R̂".
    """
    check_x64()
    check_from("posterior", posterior, Posterior, "laplace")
    counts = {"num_warmup": num_warmup, "num_samples": num_samples, "num_chains": num_chains}
    for name, value in (counts | {"max_tree_depth": max_tree_depth}).items():
        check_count(name, value)
    check_count("num_prior", num_prior, 0)
    check_key("key", key)
    check_fraction("target_accept_prob", target_accept_prob)
    check_flag("dense_mass", dense_mass)
    vectorized = choose("chain_method", chain_method, {"vectorized": True, "sequential": False})
    check_coords({} if coords is None else coords, posterior)
    grids = _grids(posterior, ts, y0, args, scale)
    if not posterior.flow.has_reverse():
        raise LaplodeError(
            "`posterior` is of a model that can't be differentiated in reverse, which NUTS needs. Inside it, solve "
            "with Diffrax's default adjoint, or with adjoint=diffrax.DirectAdjoint()."
        )

    key_starts, key_chains, *key_predictions, key_prior = jax.random.split(key, 5)
    settings = _Settings(int(num_warmup), float(target_accept_prob), int(max_tree_depth), bool(dense_mass))
    with advice():
        target, first = _begin(posterior, starts, num_chains, key_starts)
        began = time.perf_counter()
        keys = jax.random.split(key_chains, num_chains)
        together = num_chains if vectorized else 1
        trace = _sampled(target, settings, first, keys, num_samples, together, progress)
    seconds = time.perf_counter() - began
    predictions = _predicted(posterior, grids, trace, key_predictions, progress)
    attrs = _found(posterior, trace, settings, predictions[0]) | {"sampling_time": seconds}
    stats = {name: getattr(trace, name) for name in _Trace._fields if name != "theta"}
    stats["tree_depth"] = np.ceil(np.log2(trace.n_steps + 1)).astype(int)
    return chains_to_datatree(posterior, predictions, stats, attrs, coords or {}, key_prior, num_prior)


def _grids(posterior: Posterior, ts: Any, y0: Any, args: PyTree, scale: Any) -> list[tuple[Grid, AbstractLikelihood]]:
    """The times of the data and those that are asked for beside them, with the likelihood there."""
    if ts is None and not (y0 is None and args is None):
        raise LaplodeError("`ts` is missing: `y0` and `args` are for predictions at these times.")
    grids = [Grid.of(posterior, posterior.problem.data.ts, None, None)]
    if ts is not None:
        grids.append(Grid.of(posterior, ts, y0, args))
    return [(grid, grid.likelihood(posterior, scale if grid is grids[-1] else None)) for grid in grids]


def _predicted(
    posterior: Posterior,
    grids: list[tuple[Grid, AbstractLikelihood]],
    trace: "_Trace",
    keys: list[PRNGKeyArray],
    progress: bool,
) -> list[Predictions]:
    """Predictions on each grid, one chain after the other."""
    thetas = jnp.asarray(trace.theta).reshape(-1, posterior.size)
    options = {"method": "nuts", "progress": progress}
    found = [
        predict_at(posterior, grid, thetas, likelihood=likelihood, key=key, **options)
        for (grid, likelihood), key in zip(grids, keys, strict=False)
    ]
    for other in found[1:]:
        if not np.all(other.ok):
            warn(
                f"{int(np.sum(~other.ok))} of {len(thetas)} draws have no finite trajectory at `ts`, though they have "
                "one at the times of the data: they are NaN.",
                level=3,
            )
    return found


def _found(posterior: Posterior, trace: "_Trace", settings: "_Settings", predicted: Predictions) -> dict[str, Any]:
    """How the chains agree, as attributes; warns where they do not."""
    f = np.asarray(predicted.f)
    rhat, rhat_f = _rhat(np.asarray(trace.theta)), _rhat(f.reshape(*trace.lp.shape, *f.shape[1:]))
    if trace.lp.shape[1] >= 4:  # a parameter that no chain has moved is not explored
        rhat = np.where(np.isnan(rhat), np.inf, rhat)
    attrs = {
        "inference_library": "numpyro",
        "inference_library_version": version("numpyro"),
        "tuning_steps": settings.num_warmup,
        "num_divergences": int(np.sum(trace.diverging)),
        "max_rhat": _largest(rhat),
        "max_rhat_f": _largest(rhat_f),
    }
    _warn(posterior, trace, settings, rhat, attrs)
    return attrs


class _Settings(NamedTuple):
    num_warmup: int
    target_accept_prob: float
    max_tree_depth: int
    dense_mass: bool


class _Target(eqx.Module):
    """−log p(Y, θ) at θ = θ* + C z, as a function of z.

    Above `ceiling`, in nats, no trajectory of NUTS can be but in error.
    """

    # Not the posterior, whose diagnostics are numbers of its own: each would be compiled anew.
    problem: Problem
    parameters: Parameters
    structure: AbstractPrecision
    ceiling: Float[Array, ""]

    def theta(self, z: Float[Array, "... P"]) -> Float[Array, "... P"]:
        return self.parameters.vector + self.structure.root_product(z)

    def __call__(self, z: Float[Array, " P"]) -> Float[Array, ""]:
        inside = jnp.all(jnp.abs(z) < _OUTSIDE)
        place = jax.lax.stop_gradient(jnp.where(inside, z, 0))
        value, force = jax.value_and_grad(self._negative_log_joint)(place)
        # Any finite force leaves the distribution as it is; one that is NaN would end the chain.
        force = jnp.where(jnp.isfinite(force), force, 0)
        value = jnp.where(inside & jnp.isfinite(value), value, jnp.inf)
        force = jnp.where(value < self.ceiling, force, _WALL)
        return value + force @ (z - jax.lax.stop_gradient(z))

    def _negative_log_joint(self, z: Float[Array, " P"]) -> Float[Array, ""]:
        return -log_joint_at(self.problem, self.parameters, self.theta(z))


@eqx.filter_jit
def _evaluate(target: _Target, zs: Float[Array, "C P"]) -> ParamInfo:
    """Positions of chains, with the potential and its gradient there."""
    return ParamInfo(zs, *jax.vmap(jax.value_and_grad(target))(zs))


def _begin(posterior: Posterior, starts: Any, num_chains: int, key: PRNGKeyArray) -> tuple[_Target, ParamInfo]:
    """**Raises:** `LaplodeError` when `starts` do not fit, or have no density."""
    shape = (num_chains, posterior.size)
    unlimited = _Target(posterior.problem, posterior.parameters, posterior.built, jnp.array(jnp.inf))
    if starts is not None:
        thetas = real_array("starts", starts)
        if thetas.shape != shape or not np.all(np.isfinite(thetas)):
            raise LaplodeError(f"`starts` must be finite and of shape (num_chains, P) = {shape}, got {thetas.shape}.")
        offsets = posterior.built.precision_product(jnp.asarray(thetas) - posterior.mean)
        (zs,) = jax.linear_transpose(posterior.built.root_product, offsets)(offsets)  # C⁻¹ = Cᵀ Λ
        first = _evaluate(unlimited, zs)
    else:
        zs = _OVERDISPERSION * jax.random.normal(key, shape)
        least = _evaluate(unlimited, jnp.zeros((1, posterior.size))).potential_energy
        for _ in range(_HALVINGS):
            first = _evaluate(unlimited, zs)
            far = ~(first.potential_energy < least + 2 * posterior.size + 10)
            if not jnp.any(far):
                break
            zs = jnp.where(far[:, None], zs / 2, zs)
    failed = np.flatnonzero(~np.isfinite(np.asarray(first.potential_energy)))
    if failed.size:
        raise LaplodeError(
            f"{'`starts`' if starts is not None else '`posterior`'}: the density is not finite where chain "
            f"{failed[0]} would start ({failed.size} of {num_chains} chains): the solve fails there, or the likelihood "
            "can't have the data."
        )
    ceiling = jnp.max(first.potential_energy) + _DIVERGENCE + 10 * posterior.size
    return eqx.tree_at(lambda target: target.ceiling, unlimited, ceiling), first


class _Trace(NamedTuple):
    """What is kept of each transition."""

    theta: Float[Array, "... P"]
    lp: Float[Array, "..."]
    energy: Float[Array, "..."]
    diverging: Array
    n_steps: Int[Array, "..."]
    acceptance_rate: Float[Array, "..."]
    step_size: Float[Array, "..."]


def _kernel(target: _Target, settings: _Settings):
    """NumPyro's functions for one chain: `begin(first, key)` and `step(state)`."""
    init, step = hmc(target, algo="NUTS")

    def begin(first: ParamInfo, key):
        size = first.z.size
        return init(first, step_size=size**-0.25, rng_key=key, **settings._asdict())

    return begin, step


@eqx.filter_jit
def _initial(target: _Target, settings: _Settings, first: ParamInfo, keys: Array) -> HMCState:
    return jax.vmap(_kernel(target, settings)[0])(first, keys)


# NumPyro's MCMC would run these transitions too, but it was seen to compile anew in each part of a run, and for each
# posterior, whose numbers it has inside; and it warms up in one call that shows nothing meanwhile.
@eqx.filter_jit
def _advance(target: _Target, settings: _Settings, first: ParamInfo, keys, state: HMCState, num):
    """`num` transitions of every chain, at most `_CHUNK`."""
    begin, step = _kernel(target, settings)
    jax.eval_shape(jax.vmap(begin), first, keys)  # it hands its settings to `step`

    def record(state):
        adapted = state.adapt_state.step_size
        found = (-state.potential_energy, state.energy, state.diverging, state.num_steps, state.accept_prob, adapted)
        return _Trace(target.theta(state.z), *found)

    def one(i, carry):
        state, trace = carry
        state = jax.vmap(step)(state)
        return state, jax.tree.map(lambda all, new: all.at[i].set(new), trace, jax.vmap(record)(state))

    shapes = jax.eval_shape(jax.vmap(record), state)
    empty = jax.tree.map(lambda x: jnp.zeros((_CHUNK, *x.shape), x.dtype), shapes)
    return jax.lax.fori_loop(0, num, one, (state, empty))


def _sampled(
    target: _Target,
    settings: _Settings,
    first: ParamInfo,
    keys: Array,
    num_samples: int,
    together: int,
    progress: bool,
) -> _Trace:
    """What was drawn after warmup, chains before draws; so many chains at a time `together`."""
    parts, total = [], (settings.num_warmup + num_samples) * (len(keys) // together)
    with tqdm(total=total, desc="NUTS", unit="transition", disable=not progress) as bar:
        for i in range(0, len(keys), together):
            chosen = slice(i, i + together)
            some = jax.tree.map(lambda x, chosen=chosen: x[chosen], first)
            parts.append(_run(target, settings, some, keys[chosen], num_samples, bar))
    done = min(len(part.lp) for part in parts)
    if done < num_samples:
        warn(f"Interrupted: each chain has {done} of {num_samples} draws after warmup.", level=3)
    return jax.tree.map(lambda *x: np.concatenate([a[:done] for a in x], axis=1).swapaxes(0, 1), *parts)


def _run(target: _Target, settings: _Settings, first: ParamInfo, keys: Array, num_samples: int, bar: tqdm) -> _Trace:
    """What was drawn after warmup, draws before chains."""
    state = _initial(target, settings, first, keys)
    kept, num = [], 1
    for phase, length in (("warmup", settings.num_warmup), ("sample", num_samples)):
        done = diverged = 0
        while done < length:
            some = min(num, length - done)
            began = time.perf_counter()
            try:
                state, trace = _advance(target, settings, first, keys, state, jnp.asarray(some))
                trace: _Trace = jax.tree.map(lambda x, some=some: np.asarray(x[:some]), trace)
            except KeyboardInterrupt:
                if not kept:
                    raise
                return jax.tree.map(lambda *x: np.concatenate(x), *kept)
            seconds = time.perf_counter() - began
            num = min(2 * num, _CHUNK) if seconds < _SECONDS[0] else max(num // 2, 1) if seconds > _SECONDS[1] else num
            done, diverged = done + some, diverged + int(np.sum(trace.diverging))
            kept += [trace] if phase == "sample" else []
            bar.update(some)
            bar.set_postfix(phase=phase, divergences=diverged, steps=int(np.max(trace.n_steps)))
    return jax.tree.map(lambda *x: np.concatenate(x), *kept)


def _rhat(draws: Float[np.ndarray, "C S ..."]) -> Float[np.ndarray, "..."]:
    """Rank-normalized split r̂ of each value; NaN where no draw differs, or there are fewer than four.

    It is infinite where every chain stands still and not all at the same place.
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = np.asarray(array_stats.rhat(draws, chain_axis=0, draw_axis=1), dtype=float)
    still = np.all(np.ptp(draws, axis=1) == 0, axis=0) & (np.ptp(draws, axis=(0, 1)) > 0)
    return np.where(still & (draws.shape[1] >= 4), np.inf, found)


def _largest(rhat: np.ndarray) -> float:
    return float("nan") if np.all(np.isnan(rhat)) else float(np.nanmax(rhat))


def _warn(posterior: Posterior, trace: _Trace, settings: _Settings, rhat: np.ndarray, attrs: dict) -> None:
    if attrs["num_divergences"]:
        warn(
            f"{attrs['num_divergences']} of {trace.diverging.size} transitions diverged, where the posterior bends "
            "more than a step can follow or a solve fails: the draws may miss a part of it. A higher "
            "`target_accept_prob` shortens the steps.",
            level=4,
        )
    if attrs["max_rhat"] > _RHAT or attrs["max_rhat_f"] > _RHAT:
        worst = posterior.parameters.name(int(np.nanargmax(rhat)))
        full = float(np.mean(trace.n_steps >= 2**settings.max_tree_depth - 1))
        trees = f" {full:.0%} of the transitions reached `max_tree_depth`." if full else ""
        warn(
            f"The chains do not agree: r̂ is {attrs['max_rhat']:.3g} for {worst}, the worst parameter, and at most "
            f"{attrs['max_rhat_f']:.3g} for the predictions of the data, where it should be below {_RHAT}.{trees} Give "
            "more `num_warmup` and `num_samples`; weights that can be exchanged may disagree for good.",
            level=4,
        )

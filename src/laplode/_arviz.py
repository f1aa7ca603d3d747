"""Posteriors and predictions as an ArviZ DataTree. The only module that knows ArviZ's data model.

ArviZ 0.23 (`arviz.preview`, Python 3.11) and ArviZ 1.x are both made of arviz-base, which is used here directly.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import arviz_base
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, PRNGKeyArray

from ._draws import over_components
from ._errors import LaplodeError, LaplodeWarning
from ._posterior import AbstractPosterior
from ._predict import Predictions
from ._prior import prior_draws
from ._vector import Parameters

_CELLS = ["trajectory", "time", "channel"]


def to_datatree(
    posterior: AbstractPosterior,
    *predictions: Predictions,
    key: PRNGKeyArray | None = None,
    num_samples: int = 1000,
    coords: Mapping[str, Sequence[Any]] | None = None,
) -> xr.DataTree:
    """The groups that ArviZ expects, as an `xarray.DataTree`.

    - `posterior`: draws of the parameters, one variable a leaf, named by its path in the model.
    - `posterior_predictive` and `log_likelihood`: of predictions at the observed times.
    - `predictions` and `predictions_constant_data`: of predictions elsewhere.
    - `sample_stats`: solver success and, where they were computed, `log_p`, `log_q` and `log_weights`.
    - `prior`: draws of the prior, when `key` is given.
    - `observed_data`, `constant_data`.

    In the predictive groups `y` has observation noise and `f` has not. Dimensions are chain, draw, trajectory, time,
    channel. `log_likelihood` leaves out values that are missing, and those that no draw changes (at the time of a given
    initial state); where there are any, it has the dimension `observation` in place of the last three.

    **Arguments:**

    - `posterior`: from `laplace` or `mixture`.
    - `predictions`: from `predict`; at most one on the observed times and one elsewhere.
    - `key`: a JAX random key, for draws of the prior, and of the posterior when no predictions are given.
    - `num_samples`: how many draws when no predictions are given.
    - `coords`: names for "trajectory" and "channel"; they are numbered by default.

    **Raises:** `LaplodeError` when several predictions compete for a group, or names do not fit. Warns
    (`LaplodeWarning`) when draws without a solution are left out.
    """
    if not isinstance(posterior, AbstractPosterior):
        raise LaplodeError(
            f"`posterior` must come from laplode.laplace or laplode.mixture, got {type(posterior).__name__}."
        )
    for item in predictions:
        if not isinstance(item, Predictions):
            raise LaplodeError(f"`predictions` must come from laplode.predict, got {type(item).__name__}.")
    here = [item for item in predictions if item.observed_grid]
    elsewhere = [item for item in predictions if not item.observed_grid]
    if len(here) > 1 or len(elsewhere) > 1:
        raise LaplodeError(
            f"`predictions` holds {len(here)} on the observed times and {len(elsewhere)} elsewhere: a DataTree has one "
            "group for each. Make a second tree."
        )
    if not predictions and key is None:
        raise LaplodeError("`key` is needed to draw from the posterior when no predictions are given.")
    if any(not np.array_equal(item.thetas, predictions[0].thetas) for item in predictions[1:]):
        raise LaplodeError(
            "`predictions` differ in their draws of θ, so that one draw of the tree would mix two: use the same "
            "key and num_samples for both."
        )
    data = posterior.problem.data
    coords = check_coords(coords or {}, data.ys.shape)

    groups: dict[str, xr.Dataset] = {}
    diagnostics = [component.diagnostics for component in posterior.components]
    attrs = {
        "inference_library": "laplode",
        "inference_library_version": version("laplode"),
        "curvature": _joined(component.method.curvature for component in posterior.components),
        "structure": _joined(type(component.structure).__name__ for component in posterior.components),
        "num_components": len(posterior.components),
        "regularization": _joined("none" if d.regularized is None else d.regularized.kind for d in diagnostics),
        "newton_decrement": max(d.newton_decrement for d in diagnostics),
    }
    if predictions:
        keep = np.all([np.asarray(item.ok) for item in predictions], axis=0)
        if not np.any(keep):
            raise LaplodeError("`predictions` hold no draw whose solve succeeded; there is nothing to show.")
        if not np.all(keep):
            warnings.warn(
                f"{np.sum(~keep)} of {keep.size} draws have no finite trajectory and are left out of the DataTree "
                "(the attribute num_failed keeps their number).",
                LaplodeWarning,
                stacklevel=2,
            )
        thetas = predictions[0].thetas[keep]
        stats, stats_attrs = _sample_stats([*here, *elsewhere], keep)
        attrs["num_failed"] = int(np.sum(~keep))
        groups["sample_stats"] = _dataset(stats, {}, {}, {**attrs, **stats_attrs})
    else:
        keep = np.ones(num_samples, bool)
        thetas = posterior.sample(jax.random.fold_in(key, 1), num_samples)  # pyright: ignore[reportArgumentType]
    groups["posterior"] = _dataset(_named(posterior.parameters, thetas), {}, {}, attrs)
    if key is not None:
        groups["prior"] = _prior(posterior, jax.random.fold_in(key, 0), num_samples, attrs)
    for item in predictions:
        groups |= _predicted(posterior, item, keep, coords, attrs, _one_chain)
    groups |= _data(posterior, coords, attrs)
    return xr.DataTree.from_dict(groups)


def chains_to_datatree(
    posterior: AbstractPosterior,
    predictions: Sequence[Predictions],
    stats: Mapping[str, np.ndarray],
    attrs: Mapping[str, Any],
    coords: Mapping[str, Sequence[Any]],
    key: PRNGKeyArray | None,
    num_prior: int,
) -> xr.DataTree:
    """The groups of `to_datatree` for C chains of S draws each, which predictions hold one chain after the other.

    `stats` are (C, S), `attrs` those of all groups, and `key` asks for draws of the prior.
    """
    data, first = posterior.problem.data, predictions[0]
    coords = check_coords(coords, data.ys.shape)
    chains, everything = len(next(iter(stats.values()))), np.ones(len(first.thetas), bool)
    chained = lambda x: np.asarray(x).reshape(chains, -1, *np.shape(x)[1:])
    groups = {
        "posterior": _dataset(_named(posterior.parameters, first.thetas), {}, {}, attrs, lay_out=chained),
        "sample_stats": _dataset(stats, {}, {}, attrs, lay_out=np.asarray),
        **_data(posterior, coords, attrs),
    }
    for item in predictions:
        groups |= _predicted(posterior, item, everything, coords, attrs, chained)
    if key is not None:
        groups["prior"] = _prior(posterior, key, num_prior, attrs)
    return xr.DataTree.from_dict(groups)


def _predicted(posterior: AbstractPosterior, item: Predictions, keep, coords, attrs, lay_out) -> dict[str, xr.Dataset]:
    """The groups that one prediction makes of the draws that are kept."""
    data, cells = posterior.problem.data, dict.fromkeys(["y", "f"], _CELLS)
    draws = {"y": item.predictive[keep], "f": item.epistemic[keep]}
    attrs = {**attrs, "method": item.method}
    if item.observed_grid:
        grid = {**coords, **_time_coords(data.ts)}
        return {
            "posterior_predictive": _dataset(draws, grid, cells, attrs, lay_out=lay_out),
            "log_likelihood": _log_likelihood(posterior, item, keep, grid, attrs, lay_out),
        }
    same = item.ts.shape[0] == data.ts.shape[0]
    grid = {"channel": coords["channel"], **({"trajectory": coords["trajectory"]} if same else {})}
    grid |= _time_coords(item.ts)
    return {
        "predictions": _dataset(draws, grid, cells, attrs, lay_out=lay_out),
        "predictions_constant_data": _constant(item.ts, None, grid, attrs),
    }


def _data(posterior: AbstractPosterior, coords, attrs) -> dict[str, xr.Dataset]:
    data = posterior.problem.data
    grid = {**coords, **_time_coords(data.ts)}
    observed = _dataset({"y": data.ys}, grid, {"y": _CELLS}, attrs, sample_dims=(), lay_out=np.asarray)
    return {"observed_data": observed, "constant_data": _constant(data.ts, data.y0, grid, attrs)}


def _prior(posterior: AbstractPosterior, key: PRNGKeyArray, num: int, attrs) -> xr.Dataset:
    thetas = prior_draws(posterior.problem.prior, posterior.parameters, key, num)
    return _dataset(_named(posterior.parameters, thetas), {}, {}, attrs)


def _joined(names: Iterable[str]) -> str:
    """The different ones among them."""
    return ", ".join(dict.fromkeys(names))


def check_coords(coords: Mapping[str, Sequence[Any]], shape: tuple[int, ...]) -> dict[str, Any]:
    lengths = {"trajectory": shape[0], "channel": shape[2]}
    for name, values in coords.items():
        if name not in lengths:
            raise LaplodeError(f'`coords` may name "trajectory" and "channel", got {name!r}. Times come with the data.')
        if len(values) != lengths[name]:
            raise LaplodeError(f"`coords` has {len(values)} names for {name}, but there are {lengths[name]}.")
    return {name: np.asarray(coords.get(name, np.arange(length))) for name, length in lengths.items()}


def _time_coords(ts: Float[np.ndarray, "N T"]) -> dict[str, Any]:
    """The times themselves where trajectories share them; otherwise indices, with the times in constant_data."""
    shared = bool(np.all(ts == ts[0]))
    return {"time": ts[0] if shared else np.arange(ts.shape[1])}


def _one_chain(draws: Any) -> np.ndarray:
    return np.asarray(draws)[None]


def _dataset(variables, coords, dims, attrs, sample_dims=("chain", "draw"), lay_out=_one_chain) -> xr.Dataset:
    values = {name: lay_out(value) for name, value in variables.items()}
    used = {dim for name in values for dim in dims.get(name, ())}
    return arviz_base.dict_to_dataset(
        values,
        coords={name: value for name, value in coords.items() if name in used},
        dims={name: dim for name, dim in dims.items() if name in values},
        sample_dims=list(sample_dims),
        attrs=attrs,
    )


def _named(view: Parameters, thetas: Float[Array, "S P"]) -> dict[str, Array]:
    """The parameters as the model knows them, leaf by leaf."""
    values = jax.tree.leaves(jax.vmap(lambda theta: view.constrained(view.with_vector(theta)))(thetas))
    return {name: value for (name, *_), value in zip(view.leaves, values, strict=True)}


def _sample_stats(predictions: list[Predictions], keep: np.ndarray) -> tuple[dict[str, Array], dict[str, float]]:
    stats: dict[str, Array] = {"success": predictions[0].ok[keep]}
    attrs: dict[str, float] = {}
    for item in predictions:
        if item.khat is not None:
            attrs["khat"] = item.khat
            for name in ("log_p", "log_q", "log_weights"):
                stats[name] = getattr(item, name)[keep]
            break
    return stats, attrs


def _log_likelihood(
    posterior: AbstractPosterior, item: Predictions, keep: np.ndarray, coords, attrs, lay_out
) -> xr.Dataset:
    data = posterior.problem.data
    likelihoods = [component.problem.likelihood for component in posterior.components]
    log_prob = lambda i, predictions: likelihoods[i].log_prob(predictions, jnp.asarray(data.ys))
    values = np.asarray(over_components(log_prob, item.component[keep], item.predictions[keep]))
    # A missing value has no likelihood, and one that no parameter changes, as at the time of a given initial state,
    # says nothing about them: az.loo fails on the first as NaN and on the second for want of a tail to fit.
    varies = np.ptp(values, axis=0) > 1e-12 * (1 + np.abs(values[0]))
    informative = data.observed & (varies | (len(values) == 1))
    if np.all(informative):
        return _dataset({"y": values}, coords, {"y": _CELLS}, attrs, lay_out=lay_out)
    where = np.nonzero(informative)
    dataset = _dataset({"y": values[:, *where]}, {}, {"y": ["observation"]}, attrs, lay_out=lay_out)
    labels = {dim: ("observation", coords[dim][index]) for dim, index in zip(_CELLS, where, strict=True)}
    return dataset.assign_coords(labels)


def _constant(ts, y0, coords, attrs) -> xr.Dataset:
    variables = {"ts": ts} | ({} if y0 is None else {"y0": y0})
    dims = {"ts": ["trajectory", "time"], "y0": ["trajectory", "state"]}
    return _dataset(variables, coords, dims, attrs, sample_dims=(), lay_out=np.asarray)

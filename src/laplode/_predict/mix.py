"""Predictions from several posteriors as one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._checks import real_array
from .._errors import LaplodeError
from .predictions import AbstractClosedForm, Predictions


class Mixed(AbstractClosedForm):
    """The closed form of predictions that were mixed."""

    parts: tuple[AbstractClosedForm, ...]
    weights: Float[np.ndarray, " C"]
    means: Float[Array, "C N T K"]

    def covariance(self) -> Float[Array, "N TK TK"]:
        """The covariance within the parts and between them."""
        mean, total = jnp.tensordot(self.weights, self.means, 1), jnp.zeros(())
        for weight, part, own in zip(self.weights, self.parts, self.means, strict=True):
            offset = (own - mean).reshape(len(mean), -1)
            total += weight * (part.covariance() + offset[:, :, None] * offset[:, None, :])
        return total


def mix(predictions: Sequence[Predictions] | Mapping[str, Predictions], log_weights: Any) -> Predictions:
    """Predictions of several posteriors, as of restarts of a fit or of several models, as one.

    ```python
    posteriors = {f"restart {i}": laplode.laplace(model, problem) for i, model in enumerate(optima)}
    parts = {name: laplode.predict(posterior, ts, key=key) for name, posterior in posteriors.items()}
    mixed = laplode.mix(parts, laplode.compare_evidence(posteriors)["log_weight"])
    ```

    **Arguments:**

    - `predictions`: of the same times and the same number of draws, as a list or by name.
    - `log_weights`: the logarithms of their probabilities, up to a constant, (C,), −∞ for none; or by name, such as the
        column "log_weight" of `compare_evidence`, where an optimum that was found twice counts once.

    **Returns:** `Predictions` with as many draws as each of them, each part with a share of them by its weight. The
    choice depends on the weights alone, so that a forecast mixed by the same ones has the same draws. `mean` is the
    weighted mean, `khat` the worst of those with a weight, and importance weights are those of a part times its share.

    **Raises:** `LaplodeError` when predictions differ in times, channels, parameters or draws, or weights do not fit.
    """
    if isinstance(predictions, Mapping):
        try:
            log_weights = [float(log_weights[name]) for name in predictions]
        except (KeyError, IndexError, TypeError, ValueError):
            raise LaplodeError("`log_weights` must have a number for each name in `predictions`.") from None
        predictions = list(predictions.values())
    if not isinstance(predictions, Sequence) or not predictions:
        raise LaplodeError("`predictions` must be a list of predictions from laplode.predict, and not empty.")
    for i, part in enumerate(predictions):
        _check_alike(predictions[0], part, i)
    logs = real_array("log_weights", log_weights)
    if logs.shape != (len(predictions),) or np.any(np.isnan(logs) | (logs == np.inf)) or np.all(np.isneginf(logs)):
        raise LaplodeError(
            f"`log_weights` must be {len(predictions)} logarithms of weights, one for each of the predictions, not all "
            f"of them −∞; got {log_weights!r}."
        )
    shares = np.exp(logs - np.logaddexp.reduce(logs))
    weights, parts = shares[shares > 0], [part for part, share in zip(predictions, shares, strict=True) if share > 0]
    which = _allotted(weights, len(parts[0].ok))
    every = np.arange(len(which))

    def chosen(name: str) -> Array | None:
        """Of each draw what its own part has at its place, so that no two come from the same random numbers."""
        leaves = [getattr(part, name) for part in parts]
        return None if any(leaf is None for leaf in leaves) else jnp.stack(leaves)[which, every]

    closed_forms, means = [part._closed_form for part in parts], jnp.stack([part.mean for part in parts])
    log_weights, khats = chosen("log_weights"), [part.khat for part in parts if part.khat is not None]
    return dataclasses.replace(
        parts[0],
        mean=jnp.tensordot(weights, means, 1),
        **{name: chosen(name) for name in _OF_DRAWS},
        log_weights=None if log_weights is None else _shared(log_weights, which, weights),
        khat=max(khats) if len(khats) == len(parts) else None,
        method=", ".join(dict.fromkeys(part.method for part in parts)),
        key=None,
        _closed_form=None if None in closed_forms else Mixed(tuple(closed_forms), weights, means),  # pyright: ignore[reportArgumentType]
    )


# Fields with an entry for each draw, beside importance weights.
_OF_DRAWS = ("f", "y", "scale", "thetas", "ok", "log_p", "log_q", "log_likelihood", "y0")


def _check_alike(first: Any, part: Any, i: int) -> None:
    if not isinstance(part, Predictions):
        raise LaplodeError(f"`predictions`[{i}] must come from laplode.predict, got {type(part).__name__}.")
    if part.ts.shape != first.ts.shape or not np.array_equal(part.ts, first.ts):
        raise LaplodeError(f"`predictions`[{i}] is at other times than the first.")
    forms = [(each.f.shape[1:], each.thetas.shape[1], each.observed_grid) for each in (part, first)]
    if forms[0] != forms[1]:
        raise LaplodeError(
            f"`predictions`[{i}] is of other channels, parameters or initial states than the first: mixed are "
            "predictions of one model, from posteriors around several optima."
        )
    if len(part.ok) != len(first.ok):
        raise LaplodeError(
            f"`predictions`[{i}] has {len(part.ok)} draws, but the first has {len(first.ok)}: take one `num_samples`."
        )


def _allotted(weights: Float[np.ndarray, " C"], num: int) -> Int[np.ndarray, " num"]:
    """Which part each draw is from: each has its share, give or take one draw, evenly spread over all draws."""
    counts = np.diff(np.round(num * np.cumsum(weights)), prepend=0).astype(int)
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count])
    return np.repeat(np.arange(len(weights)), counts)[np.argsort(places, kind="stable")]


def _shared(log_weights: Float[Array, " S"], which: Int[np.ndarray, " S"], weights: Float[np.ndarray, " C"]):
    """Normalized within each part, and scaled by its share."""
    logs = np.asarray(log_weights).copy()
    for c, weight in enumerate(weights):
        own = which == c
        total = np.logaddexp.reduce(logs[own], initial=-np.inf)
        if np.isfinite(total):
            logs[own] += np.log(weight) - total
    return jnp.asarray(logs - np.logaddexp.reduce(logs))

"""Whether a model means the same at the times asked for as at the data's."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .._devices import free_bytes
from .._errors import LaplodeError, warn
from .._model.neural_ode import NeuralODE, starts
from .._model.own import TIMES, predict_trajectories
from .._posterior.posterior import Posterior
from .._solve.finite import check_predicted
from .grid import Grid
from .predictions import Predictions

# Predictions that differ by less than this part of their standard deviation, or of the largest, are taken for the same.
_OF_STD, _OF_LARGEST = 0.1, 1e-6


def check_fits(posterior: Posterior, grid: Grid, num: int) -> None:
    """Raise `LaplodeError` where so many draws are more than memory holds."""
    rows, times = grid.ts.shape
    values = rows * times * posterior.problem.prediction_shape[1]
    # Predictions before and after the likelihood's scale, with noise, and their log-likelihood.
    needed, free = 8 * num * (posterior.size + 4 * values), free_bytes()
    if needed > free:
        raise LaplodeError(
            f"`num_samples` = {num} draws of {values} predictions and P = {posterior.size} take about "
            f"{needed / 2**30:.3g} GiB; {free / 2**30:.3g} GiB are free. Take fewer draws, or call predict for fewer "
            "times or trajectories at once."
        )


def check_forcing(posterior: Posterior, grid: Grid) -> None:
    """Warn where a forcing, in the args or in the model, ends before the last time or begins after the first.

    It is an interpolation of Diffrax, or an array of times in the args: one that has the name of times, increases, and
    reached over all of the data.
    """
    data = posterior.problem.data
    is_path = lambda node: isinstance(node, diffrax.AbstractGlobalInterpolation)
    paths = filter(is_path, jax.tree.leaves((posterior.model, grid.args), is_leaf=is_path))
    forcings = [(f"a {type(path).__name__} in `args` or in the model", path.ts) for path in paths]
    of_data = jax.tree.leaves(data.args, is_leaf=is_path)
    of_grid = jax.tree_util.tree_leaves_with_path(grid.args, is_leaf=is_path)
    for (path, leaf), before in zip(of_grid, of_data, strict=True) if len(of_grid) == len(of_data) else ():
        named = not is_path(leaf) and _named(path) in TIMES and np.ndim(leaf) == 2
        if named and np.all(np.diff(before) > 0) and _reaches(before, data.ts):
            forcings.append((f"`args{jax.tree_util.keystr(path)}`", leaf))
    for what, known in forcings:
        if not _reaches(known, grid.solve_ts):
            known = np.asarray(known)
            warn(
                f"`ts` reaches from {np.min(grid.solve_ts):g} to {np.max(grid.solve_ts):g}, but {what} is known from "
                f"{np.max(np.nanmin(known, axis=-1)):g} to {np.min(np.nanmax(known, axis=-1)):g} only: beyond, "
                "predictions rest on its extrapolation. Give it at all of these times.",
                level=3,
            )


def _reaches(known: Any, ts: Float[np.ndarray, "N T"]) -> bool:
    first, last = np.nanmin(known, axis=-1), np.nanmax(known, axis=-1)
    return bool(np.all(last >= ts[:, -1]) and np.all(first <= ts[:, 0]))


def _named(path: tuple[Any, ...]) -> str:
    """The last name on the way to a leaf, as of a key or a field."""
    last = path[-1] if path else ""
    return str(getattr(last, "key", getattr(last, "name", ""))).lower()


def check_reached(grid: Grid, predictions: Predictions) -> None:
    """Warn of times at which there is no prediction at θ*.

    **Raises:** `LaplodeError` where a trajectory has none at all.
    """
    there = np.isfinite(predictions.mean)
    if np.all(there):
        return
    nowhere = ~np.any(there, axis=(1, 2))
    if np.any(nowhere):
        check_predicted(np.asarray(predictions.mean)[nowhere], grid.ts[nowhere])
    i, t, k = map(int, np.argwhere(~there)[0])
    some = np.sum(np.any(~there, axis=(1, 2)))
    warn(
        f"`model` has no finite prediction at θ* in channel {k} of trajectory {i} at time {grid.ts[i, t]:g} ({some} of "
        f"{len(there)} trajectories have such times), as after an event that ends its solve: mean and draws are NaN "
        "there. Draws are `ok` where they are finite at all the other times.",
        level=3,
    )


def check_steps(posterior: Posterior, grid: Grid, predictions: Predictions) -> None:
    """Warn where a model of one's own predicts something else than it does at times that begin as the data's.

    The steps of a `NeuralODE` don't depend on the times asked for. The first trajectory stands for all.
    """
    model, data = posterior.model, posterior.problem.data
    if grid.observed or isinstance(model, NeuralODE) or data.ts.shape[1] < 2:
        return
    known = data.ts[0] + (grid.solve_ts[0, 0] - data.ts[0, 0])
    asked = np.flatnonzero(grid.ts[0] > known[1] + 1e-9 * np.ptp(known))
    if not asked.size or not np.any(predictions.ok):
        return
    ts = grid.ts[0, asked]
    before = known[known < ts[0] - 1e-9 * np.ptp(known)]
    as_float = lambda x: jnp.asarray(x[:1], dtype=float if np.issubdtype(x.dtype, np.floating) else x.dtype)
    y0, args = jax.tree.map(as_float, (starts(model, grid.y0, len(grid.ts)), grid.args))
    values = predict_trajectories(model, jnp.asarray(np.concatenate([before, ts]))[None], y0, args)
    mean = np.asarray(predictions.mean[0])[asked]
    values = np.asarray(values[0])[len(before) :, : mean.shape[1]]
    std = np.nan_to_num(np.std(np.asarray(predictions.f[:, 0])[np.asarray(predictions.ok)][:, asked], axis=0))
    off = np.where(np.isfinite(mean) & np.isfinite(values), np.abs(values - mean), 0)
    beyond = off - _OF_STD * std - _OF_LARGEST * np.max(np.abs(mean), initial=0, where=np.isfinite(mean))
    if not np.any(beyond > 0):
        return
    t, k = map(int, np.unravel_index(np.argmax(beyond), beyond.shape))
    warn(
        f"`model` predicts something else at these times than at times that begin as the data's: {mean[t, k]:.4g} here "
        f"and {values[t, k]:.4g} there in channel {k} of trajectory 0 at time {ts[t]:g}, where the standard deviation "
        f"of the prediction is {std[t, k]:.2g}. Its steps depend on `ts`, as with dt0 = ts[1] - ts[0] and no step size "
        "control, or something is drawn anew, as by dropout. Write diffrax.diffeqsolve(..., dt0=None, "
        "stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-8)), or a dt0 that is a number, and refit.",
        level=3,
    )

"""Observed trajectories."""

from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Bool, Float, PyTree

from .._checks import real_array
from .._errors import LaplodeError


def check_times(name: str, ts: Any) -> np.ndarray:
    """Return `ts` as a float64 array of shape (T,) or (N, T), or say what is wrong with it."""
    ts = real_array(name, ts, "times")
    if ts.ndim not in (1, 2) or ts.shape[-1] < 1:
        raise LaplodeError(f"`{name}` must have shape (T,) or (N, T), got shape {ts.shape}.")
    if not np.all(np.isfinite(ts)):
        raise LaplodeError(f"`{name}` must be finite, got {int(np.sum(~np.isfinite(ts)))} NaN or infinite times.")
    decreasing = np.argwhere(np.diff(ts, axis=-1) <= 0)
    if decreasing.size:
        index = tuple(int(i) for i in decreasing[0])
        later = (*index[:-1], index[-1] + 1)
        raise LaplodeError(
            f"`{name}` must be strictly increasing along its last axis, but {name}[{', '.join(map(str, index))}] = "
            f"{ts[index]:g} is followed by {ts[later]:g}. Sort the times, and merge observations made at the same time."
        )
    return ts


def check_solvable(name: str, ts: np.ndarray) -> None:
    """Raise `LaplodeError` unless there is a time after the first."""
    if ts.shape[-1] < 2:
        raise LaplodeError(
            f"`{name}` must have at least two times, the first of them the time of the initial state; got shape "
            f"{ts.shape}."
        )


def check_initial_state(name: str, y0: Any, num_trajectories: int) -> np.ndarray:
    """Return `y0` as a float64 array of shape (N, D), or say what is wrong with it."""
    y0 = real_array(name, y0, "states")
    if y0.ndim == 1 and num_trajectories == 1:
        y0 = y0[None]
    if y0.ndim != 2 or y0.shape[0] != num_trajectories:
        raise LaplodeError(
            f"`{name}` must have shape (N, D) with N = {num_trajectories} trajectories, got shape {y0.shape}. For one "
            f"initial state shared by all trajectories pass `np.tile(y0, ({num_trajectories}, 1))`."
        )
    if not np.all(np.isfinite(y0)):
        row = int(np.argwhere(~np.isfinite(y0))[0][0])
        raise LaplodeError(
            f"`{name}` must be finite, but trajectory {row} starts at {y0[row]}. Where an initial state is unknown, "
            "let the model learn it: NeuralODE(vector_field, y0=first_guess)."
        )
    return y0


def check_args(name: str, args: PyTree, num_trajectories: int) -> PyTree:
    """Check that every leaf of `args` is an array with leading axis N."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        shape = getattr(leaf, "shape", None)
        if shape is None or len(shape) == 0 or shape[0] != num_trajectories:
            found = "a " + type(leaf).__name__ if shape is None else f"shape {shape}"
            raise LaplodeError(
                f"`{name}{jax.tree_util.keystr(path)}` must be an array with leading axis N = {num_trajectories} (one "
                f"entry per trajectory), got {found}."
            )
    return args


class Trajectories(eqx.Module):
    """A batch of N observed trajectories.

    Kept as NumPy float64, so that nothing is rounded when 64-bit JAX is switched on later.

    **Arguments:**

    - `ts`: times, shape (T,) or (N, T), strictly increasing. The first is the time of the initial state; where nothing
        was observed then, make the first row of `ys` NaN.
    - `ys`: observations, shape (N, T, K), or (T, K) for a single trajectory. NaN marks a missing value.
    - `y0`: initial states, shape (N, D) (or (D,) for a single trajectory). None when the model carries its own.
    - `args`: any pytree of arrays with leading axis N (forcing, covariates, dose), handed to the vector field.

    **Raises:** `LaplodeError` naming the argument when shapes disagree, times do not increase, a trajectory holds no
    observation, or a value is not finite.
    """

    ts: Float[np.ndarray, "N T"]
    ys: Float[np.ndarray, "N T K"]
    y0: Float[np.ndarray, "N D"] | None
    args: PyTree

    def __init__(self, ts: Any, ys: Any, y0: Any = None, args: PyTree = None):
        ts = check_times("ts", ts)
        check_solvable("ts", ts)
        ys = real_array("ys", ys, "observations")
        if ys.ndim == 2:
            ys = ys[None]
        if ys.ndim != 3:
            hint = " For one channel use ys[:, None]." if ys.ndim == 1 else ""
            raise LaplodeError(f"`ys` must have shape (N, T, K), or (T, K) for one trajectory; got {ys.shape}.{hint}")
        num, length = ys.shape[:2]
        if ts.shape not in ((length,), (num, length)):
            raise LaplodeError(
                f"`ts` and `ys` disagree: ts has shape {ts.shape} but ys has N = {num} trajectories of T = {length} "
                f"times, which wants ts of shape ({length},) or ({num}, {length})."
            )
        if np.any(np.isinf(ys)):
            raise LaplodeError("`ys` holds infinite values. Mark missing observations by NaN.")
        empty = np.flatnonzero(np.all(np.isnan(ys), axis=(1, 2)))
        if empty.size:
            raise LaplodeError(f"`ys` holds no observation (all NaN) in trajectory {int(empty[0])}. Leave it out.")
        self.ts = np.broadcast_to(ts, (num, length)).copy()
        self.ys = ys
        self.y0 = None if y0 is None else check_initial_state("y0", y0, num)
        self.args = check_args("args", args, num)

    @property
    def observed(self) -> Bool[np.ndarray, "N T K"]:
        """True where a value was observed."""
        return ~np.isnan(self.ys)

    def until(self, length: int) -> "Trajectories":
        """The first `length` times of every trajectory (a trajectory may have no observation left in them)."""
        return eqx.tree_at(lambda t: (t.ts, t.ys), self, (self.ts[:, :length], self.ys[:, :length]))

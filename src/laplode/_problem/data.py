"""Observed trajectories."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Bool, Float, PyTree

from .._checks import real_array
from .._errors import LaplodeError
from .._late import pd
from .._show import Shown, rows
from .table import REPLICATES, read_table


def check_times(name: str, ts: Any) -> np.ndarray:
    """Return `ts` as a float64 array of shape (T,) or (N, T), or say what is wrong with it."""
    ts = real_array(name, ts, "times")
    if ts.ndim not in (1, 2) or ts.shape[-1] < 1:
        raise LaplodeError(f"`{name}` must have shape (T,) or (N, T), got shape {ts.shape}.")
    if not np.all(np.isfinite(ts)):
        raise LaplodeError(
            f"`{name}` must be finite, got {int(np.sum(~np.isfinite(ts)))} NaN or infinite times. Trajectories of "
            "different lengths are given as lists of arrays, Trajectories([ts_1, ts_2], [ys_1, ys_2])."
        )
    steps = np.diff(ts, axis=-1)
    if not np.any(steps <= 0):
        return ts
    first = tuple(int(i) for i in np.argwhere(steps <= 0)[0])
    place = f"{name}[{', '.join(map(str, first))}]"
    if np.all(steps < 0):
        cure = (
            "Data that run backward from a final state are given with times that increase: Trajectories(-ts, ys, "
            "y0=final_state), with the vector field lambda t, y, args: -field(-t, y, args)."
        )
    elif steps[first] == 0:
        cure = f"{REPLICATES} Trajectories of different lengths are given as lists of arrays, without padding."
    else:
        cure = "Sort the times, and the rows of `ys` with them."
    raise LaplodeError(
        f"`{name}` must be strictly increasing along its last axis, but {place} = {ts[first]:g} is followed by "
        f"{ts[(*first[:-1], first[-1] + 1)]:g}. {cure}"
    )


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
        if not isinstance(leaf, jax.Array) and np.asarray(leaf).dtype.kind in "USOmM":
            raise LaplodeError(
                f"`{name}{jax.tree_util.keystr(path)}` must hold numbers, got {np.asarray(leaf).ravel()[0]!r}: code "
                "words, as by np.unique(words, return_inverse=True)[1], and count dates in a unit."
            )
    return args


def _check_no_dict(name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        names = ", ".join(map(repr, value))
        raise LaplodeError(
            f"`{name}` is a dict of {names}, and laplode takes arrays. Make it one,\n"
            f"    {name} = np.stack([{name}[k] for k in [{names}]], axis=-1)\n"
            "and take it apart in the vector field,\n"
            f"    state = dict(zip([{names}], y))\n"
            "Names of channels come back in the DataTree from Trajectories(..., channels=names)."
        )


def _aligned(ts: Any, ys: Any) -> tuple[Any, Any]:
    """Lists of arrays of different lengths as arrays of one length.

    The last interval of a shorter trajectory is divided, and nothing is observed inside of it: so nothing is solved
    beyond the data.
    """
    if not all(isinstance(each, list | tuple) for each in (ts, ys)) or len(ts) != len(ys):
        return ts, ys
    lengths = [np.shape(t)[0] if np.ndim(t) == 1 else 0 for t in ts]
    if len(set(lengths)) < 2 or min(lengths) == 0:
        return ts, ys
    times, values = [], []
    for i, (t, y) in enumerate(zip(ts, ys, strict=True)):
        t, y = check_times(f"ts[{i}]", t), real_array(f"ys[{i}]", y, "observations")
        if y.ndim != 2 or len(y) != len(t) or len(t) < 2:
            raise LaplodeError(
                f"`ys[{i}]` must have shape (T, K) with the T times of `ts[{i}]`, at least 2, got shapes {y.shape} and "
                f"{t.shape}. For one channel use ys[:, None]."
            )
        extra = max(lengths) - len(t)
        inside = t[-2] + (t[-1] - t[-2]) * np.arange(1, extra + 1) / (extra + 1)
        times.append(np.concatenate([t[:-1], inside, t[-1:]]))
        values.append(np.concatenate([y[:-1], np.full((extra, y.shape[1]), np.nan), y[-1:]]))
    if len({y.shape[1] for y in values}) > 1:
        raise LaplodeError("`ys` must have the same number of channels in all trajectories; mark missing ones by NaN.")
    return np.stack(times), np.stack(values)


def _names(name: str, names: Any, num: int) -> tuple[str | int, ...] | None:
    if names is None:
        return None
    if isinstance(names, str) or len(names) != num or len(set(names)) != num:
        raise LaplodeError(f"`{name}` must be {num} different names, got {names!r}.")
    # NumPy's own numbers would not be written to files.
    return tuple(int(each) if isinstance(each, int | np.integer) else str(each) for each in names)


class Trajectories(Shown):
    """A batch of N observed trajectories.

    Kept as NumPy float64, so that nothing is rounded when 64-bit JAX is switched on later.

    **Arguments:**

    - `ts`: times, shape (T,) or (N, T), strictly increasing. The first is the time of the initial state; where nothing
        was observed then, make the first row of `ys` NaN. A list of arrays (T_i,) for different lengths.
    - `ys`: observations, shape (N, T, K), or (T, K) for a single trajectory; a list of arrays (T_i, K), when `ts` is
        one. NaN marks a missing value.
    - `y0`: initial states, shape (N, D) (or (D,) for a single trajectory). None when the model carries its own.
    - `args`: any pytree of arrays with leading axis N (forcing, covariates, dose), handed to the vector field.
    - `channels`, `trajectories`: names, K and N of them, for the coordinates of a DataTree; numbers by default.
    - `clock`: the date of time 0 and the unit of time, as pandas names it, such as ("2021-03-01", "D"): for dates in a
        DataTree. `from_dataframe` sets it.

    **Raises:** `LaplodeError` naming the argument when shapes disagree, times do not increase, a trajectory holds no
    observation, or a value is not finite.
    """

    ts: Float[np.ndarray, "N T"]
    ys: Float[np.ndarray, "N T K"]
    y0: Float[np.ndarray, "N D"] | None
    args: PyTree
    channels: tuple[str | int, ...] | None = eqx.field(static=True)
    trajectories: tuple[str | int, ...] | None = eqx.field(static=True)
    clock: tuple[str, str] | None = eqx.field(static=True)

    def __init__(
        self,
        ts: Any,
        ys: Any,
        y0: Any = None,
        args: PyTree = None,
        *,
        channels: Sequence[str | int] | None = None,
        trajectories: Sequence[str | int] | None = None,
        clock: tuple[str, str] | None = None,
    ):
        _check_no_dict("ys", ys)
        _check_no_dict("y0", y0)
        ts, ys = _aligned(ts, ys)
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
        self.channels = _names("channels", channels, ys.shape[2])
        self.trajectories = _names("trajectories", trajectories, num)
        self.clock = clock
        if clock is not None:
            self.dates(self.ts)

    @classmethod
    def from_dataframe(
        cls,
        table: "pd.DataFrame",
        *,
        time: str,
        channels: str | Sequence[str],
        value: str | None = None,
        trajectory: str | None = None,
        y0: Any = None,
        args: str | Sequence[str] | None = None,
        unit: str | None = None,
    ) -> "Trajectories":
        """Trajectories of a table, wide (a column for each channel) or long (a row for each value).

        **Arguments:**

        - `table`: a pandas DataFrame. What is missing in it, a value or a row, is a missing observation.
        - `time`: the column of times, numbers or dates.
        - `channels`: the columns observed; where `value` is given, the one column that tells which channel is observed.
        - `value`: the column of the values of a long table.
        - `trajectory`: the column that tells the trajectories apart, in order of appearance; None for one trajectory.
        - `y0`: initial states (N, D), or the columns that hold them in the first row of each trajectory (for a long
            table, the channels).
        - `args`: columns that are the same all along a trajectory (dose, group), as args of shape (N,), or (N, A) for
            several.
        - `unit`: where times are dates, the unit that they are counted in from the earliest of the table, as pandas
            names it: "D", "h", "min" or "s".

        **Returns:** `Trajectories`, whose names are those of the table.

        **Raises:** `LaplodeError` when a column is missing or two rows are of one trajectory and time.
        """
        read, firsts = read_table(table, time, channels, value, trajectory, unit)
        columns = lambda chosen: firsts([chosen] if isinstance(chosen, str) else list(chosen))
        states = y0
        if isinstance(y0, str) or (isinstance(y0, list | tuple) and all(isinstance(each, str) for each in y0)):
            states = columns(y0)
        inputs = None if args is None else columns(args)[:, 0] if isinstance(args, str) else columns(args)
        return cls(y0=states, args=inputs, **read)

    def _shown(self):
        num, length, channels = self.ys.shape
        names = f"{channels}" if self.channels is None else ", ".join(map(str, self.channels))
        args = jax.tree_util.tree_leaves_with_path(self.args)
        named = {
            "trajectories": f"{num}, at {length} times between {self.ts.min():.4g} and {self.ts.max():.4g}",
            "channels": names,
            "observed": f"{int(self.observed.sum())} of {self.ys.size} values",
            "initial states": "the model's" if self.y0 is None else f"given, {self.y0.shape[1]} numbers each",
            "args": ", ".join(f"args{jax.tree_util.keystr(path)} {leaf.shape}" for path, leaf in args),
        }
        return rows({name: value for name, value in named.items() if value}, "Trajectories")

    @property
    def observed(self) -> Bool[np.ndarray, "N T K"]:
        """True where a value was observed."""
        return ~np.isnan(self.ys)

    def dates(self, ts: Float[np.ndarray, "..."]) -> np.ndarray | None:
        """Times as dates by the `clock`, to the nanosecond; None without one."""
        if self.clock is None:
            return None
        try:
            first, unit = self.clock
            one = pd.Timedelta(1, unit).to_timedelta64()  # pyright: ignore
            nanoseconds = np.round(ts * (one / np.timedelta64(1, "ns")))
            return np.datetime64(pd.Timestamp(first).tz_localize(None).isoformat(), "ns") + nanoseconds.astype("m8[ns]")
        except (ValueError, TypeError) as error:
            raise LaplodeError(
                f'`clock` must be a date and a unit, such as ("2021-03-01", "D"), got {self.clock!r}: {error}.'
            ) from None

    def until(self, length: int) -> "Trajectories":
        """The first `length` times of every trajectory (a trajectory may have no observation left in them)."""
        return eqx.tree_at(lambda t: (t.ts, t.ys), self, (self.ts[:, :length], self.ys[:, :length]))

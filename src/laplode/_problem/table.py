"""Tables read as trajectories."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._errors import LaplodeError

if TYPE_CHECKING:
    import pandas as pd

REPLICATES = (
    "Give replicates as trajectories of their own that start in one state, or as channels (an `observe` that repeats "
    "the state). Their mean is less noisy than each of them, so that merging wants a smaller scale."
)


def read_table(
    table: "pd.DataFrame",
    time: str,
    channels: str | Sequence[str],
    value: str | None,
    trajectory: str | None,
    unit: str | None,
) -> tuple[list[Any] | None, list[np.ndarray], list[np.ndarray], list[str], Callable[[list[str]], np.ndarray]]:
    """Names of the trajectories, their times, their values, names of the channels, and a function from columns to their
    values in the first row of each trajectory.
    """
    import pandas as pd

    if not isinstance(table, pd.DataFrame):
        raise LaplodeError(f"`table` must be a pandas DataFrame, got {type(table).__name__}.")
    observed = [channels] if isinstance(channels, str) else list(channels)
    named = [("time", time), ("trajectory", trajectory), ("value", value), *(("channels", c) for c in observed)]
    for name, column in named:
        if column is not None and column not in table.columns:
            raise LaplodeError(f"`{name}`={column!r} is no column of the table, which has {list(table.columns)}.")
    if value is not None and len(observed) != 1:
        raise LaplodeError("`channels` of a long table, which has a `value`, must be the one column that tells them.")
    keys = [time] if trajectory is None else [trajectory, time]
    if table[keys].isna().any(axis=None):  # pyright: ignore[reportArgumentType]
        raise LaplodeError(f"`table` has rows without {' or '.join(map(repr, keys))}. Leave them out.")
    table = table.assign(**{time: _numbers(table[time], time, unit)})  # pyright: ignore[reportArgumentType]
    rows = keys if value is None else [*keys, observed[0]]
    if (repeated := table.duplicated(rows)).any():
        place = dict(table.loc[repeated, rows].iloc[0])
        raise LaplodeError(f"`table` has more than one row at {place}. {REPLICATES}")
    ids = [None] if trajectory is None else list(pd.unique(table[trajectory]))  # pyright: ignore[reportCallIssue, reportArgumentType]
    names, wide = observed, table
    if value is not None:
        names = list(pd.unique(table[observed[0]]))  # pyright: ignore[reportCallIssue, reportArgumentType]
        wide = table.pivot(index=keys, columns=observed[0], values=value).reset_index()
    own = lambda of, name: (of if trajectory is None else of[of[trajectory] == name]).sort_values(time)
    parts = [own(wide, name) for name in ids]
    ts = [part[time].to_numpy(float) for part in parts]
    ys = [part[names].to_numpy(float, na_value=np.nan) for part in parts]

    def firsts(columns: list[str]) -> np.ndarray:
        sources = {c: wide if c in wide.columns else table for c in columns}
        for column, source in sources.items():
            if column not in source.columns:
                raise LaplodeError(f"{column!r} is no column of the table, which has {list(table.columns)}.")
        return np.array([[own(sources[c], name)[c].iloc[0] for c in columns] for name in ids], float)

    return None if trajectory is None else ids, ts, ys, [str(name) for name in names], firsts


def _numbers(times: "pd.Series", name: str, unit: str | None) -> "pd.Series":
    """Times as numbers: dates are counted from the earliest."""
    import pandas as pd

    if pd.api.types.is_numeric_dtype(times):
        return times.astype(float)
    try:
        dates = times if pd.api.types.is_timedelta64_dtype(times) else pd.to_datetime(times)
    except (ValueError, TypeError) as error:
        raise LaplodeError(f"`time`={name!r} holds neither numbers nor dates: {error}") from None
    if unit is None:
        raise LaplodeError(f'`unit` is needed, since {name!r} holds dates: unit="D" counts days from {dates.min()}.')
    return (dates - dates.min()) / pd.Timedelta(1, unit)  # pyright: ignore[reportArgumentType]

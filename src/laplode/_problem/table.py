"""Tables read as trajectories."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from .._errors import LaplodeError
from .._late import pd

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
) -> tuple[dict[str, Any], Callable[[list[str]], np.ndarray]]:
    """What `Trajectories` are made of, but for states and args; and a function from columns to their values in the
    first row of each trajectory.
    """
    if not isinstance(table, pd.DataFrame):
        raise LaplodeError(f"`table` must be a pandas DataFrame, got {type(table).__name__}.")
    observed = [channels] if isinstance(channels, str) else list(channels)
    named = [("time", time), ("trajectory", trajectory), ("value", value), *(("channels", c) for c in observed)]
    for name, column in named:
        if column is not None and (not isinstance(column, Hashable) or column not in table.columns):
            raise LaplodeError(f"`{name}`={column!r} is no column of the table, which has {list(table.columns)}.")
    if value is not None and len(observed) != 1:
        raise LaplodeError("`channels` of a long table, which has a `value`, must be the one column that tells them.")
    keys = [time] if trajectory is None else [trajectory, time]
    if table[keys].isna().any(axis=None):  # pyright: ignore[reportArgumentType]
        raise LaplodeError(f"`table` has rows without {' or '.join(map(repr, keys))}. Leave them out.")
    numbers, clock = _numbers(table[time], time, unit)  # pyright: ignore[reportArgumentType]
    table = table.assign(**{time: numbers})
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
    ys = [_values(part, name, names) for part, name in zip(parts, ids, strict=True)]

    def firsts(columns: list[str]) -> np.ndarray:
        sources = {c: wide if c in wide.columns else table for c in columns}
        for column, source in sources.items():
            if column not in source.columns:
                raise LaplodeError(f"{column!r} is no column of the table, which has {list(table.columns)}.")
        row = lambda name: [_values(own(sources[c], name).iloc[:1], name, [c])[0, 0] for c in columns]
        return np.array([row(name) for name in ids])

    called = None if trajectory is None else ids
    return dict(ts=ts, ys=ys, channels=[str(name) for name in names], trajectories=called, clock=clock), firsts


def _values(part: "pd.DataFrame", name: Any, columns: list[str]) -> np.ndarray:
    try:
        return part[columns].to_numpy(float, na_value=np.nan)
    except (ValueError, TypeError) as error:
        place = "" if name is None else f" of {name!r}"
        raise LaplodeError(f"`table` has values in {columns}{place} that are no numbers: {error}.") from None


def _numbers(times: "pd.Series", name: str, unit: str | None) -> tuple["pd.Series", tuple[str, str] | None]:
    """Times as numbers, and what they are counted from and in: of dates, from the earliest."""
    if pd.api.types.is_numeric_dtype(times):
        return times.astype(float), None
    passed = pd.api.types.is_timedelta64_dtype(times)
    try:
        # Of other ways to write a date, day and month may be exchanged.
        dates = times if passed else pd.to_datetime(times, format="ISO8601")
    except (ValueError, TypeError) as error:
        raise LaplodeError(
            f"`time`={name!r} holds neither numbers nor dates like 2021-03-01: {error}. Say how they are written, "
            f"table[{name!r}] = pd.to_datetime(table[{name!r}], format=...)."
        ) from None
    first = dates.min()
    if unit is None:
        raise LaplodeError(f'`unit` is needed, since {name!r} holds dates: unit="D" counts days from {first}.')
    try:
        one = pd.Timedelta(1, unit)  # pyright: ignore[reportArgumentType]
    except ValueError:
        raise LaplodeError(
            f'`unit` must be "D", "h", "min" or "s", or another of fixed length that pandas knows, got {unit!r}.'
        ) from None
    return (dates - first) / one, None if passed else (first.isoformat(), unit)

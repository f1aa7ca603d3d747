"""Correlations over times."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from arviz_plots.plot_collection import PlotCollection
from jaxtyping import Float

from ..._errors import LaplodeError
from ..._predict.predictions import Predictions
from .shared import _drawing, _grid, _label, _put, _title
from .trajectories import _segment

# ---- Correlation in time


def plot_time_correlation(
    predictions: Predictions | xr.DataTree,
    *,
    trajectory: int = 0,
    channels: Sequence[Any] | None = None,
    labels: Mapping[str, str] | None = None,
) -> PlotCollection:
    """How the noise-free prediction at one time goes with that at another: a heat map for each pair of channels.

    **Arguments:**

    - `predictions`: from `predict`: if linearized, correlations are in closed form, otherwise of the draws. Or a
        DataTree from `to_datatree`, for the draws of its `predictions`, or else of its `posterior_predictive`, and for
        the names of its channels.
    - `trajectory`: which one, by its number.
    - `channels`: names of the channels, where `predictions` do not have them.
    - `labels`: for "time".

    **Returns:** ArviZ's `PlotCollection`, with "correlation" under `.viz`. It is drawn by Matplotlib:
    ArviZ's plots have no heat maps.

    **Raises:** `LaplodeError` when there is nothing to plot.
    """
    if isinstance(predictions, xr.DataTree):
        groups = [name for name in ("predictions", "posterior_predictive") if name in predictions.children]
        if not groups:
            raise LaplodeError("`predictions` is a DataTree without predictions: pass some to to_datatree.")
        segment = _segment(predictions, groups[0])
        ts = segment["ts"].transpose("trajectory", "time").values
        draws = segment["f"].transpose("sample", "trajectory", "time", "channel").values
        channels = list(segment["channel"].values) if channels is None else channels
    elif isinstance(predictions, Predictions):
        ts, draws = predictions.ts, np.asarray(predictions.f)[np.asarray(predictions.ok)]
    else:
        got = type(predictions).__name__
        raise LaplodeError(f"`predictions` must come from laplode.predict or laplode.to_datatree, got {got}.")
    num, length, num_channels = draws.shape[1:]
    if not 0 <= trajectory < num:
        raise LaplodeError(f"`trajectory` must be one of {num} by number, got {trajectory}.")
    names = [_title("channel", k) for k in (range(num_channels) if channels is None else channels)]
    if len(names) != num_channels:
        raise LaplodeError(f"`channels` has {len(names)} names, but there are {num_channels}.")
    if isinstance(predictions, Predictions) and predictions.method == "linearized":
        covariance = np.asarray(predictions.covariance()[trajectory])
    else:
        covariance = np.cov(draws[:, trajectory].reshape(len(draws), -1).T)
    std = np.sqrt(np.diagonal(covariance))
    # What is known, as a given initial state, goes with nothing.
    std = np.where(std > 1e-9 * np.max(std), std, np.nan)
    correlation = (covariance / std / std[:, None]).reshape(length, num_channels, length, num_channels)
    dims = ("time", "channel", "other_time", "other_channel")
    data = xr.Dataset({"correlation": (dims, correlation)}, {"channel": names, "other_channel": names})
    side = 3.2 if num_channels > 1 else 4.4
    plots = _grid(
        data,
        rows="channel",
        cols="other_channel",
        size=(side * num_channels + 1.0, side * num_channels),
        square=True,
        backend="matplotlib",
    )
    _put(plots, _heat, "correlation", data, {}, ts=ts[trajectory])
    time = (labels or {}).get("time", "time")
    for row, name in enumerate(names):
        for column, other in enumerate(names):
            place = {"channel": name, "other_channel": other}
            _label(
                plots,
                place,
                title=None,
                x=f"{other}, {time}" if row == num_channels - 1 else None,
                y=f"{name}, {time}" if column == 0 else None,
            )
            _drawing(plots).set_ticklabel_visibility(
                plots.get_target(None, place), axis="x", visible=row == num_channels - 1
            )
            _drawing(plots).set_ticklabel_visibility(plots.get_target(None, place), axis="y", visible=column == 0)
    panels: np.ndarray = plots.viz["plot"].to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
    figure = panels.flat[0].figure
    drawn = plots.viz["correlation"]["correlation"].to_numpy().flat[0]
    figure.colorbar(drawn, ax=list(panels.flat), label="correlation", shrink=0.8)
    return plots


def _heat(da: xr.DataArray, target: Any, *, ts: Float[np.ndarray, " T"]) -> Any:
    values = da.transpose("time", "other_time").values
    target.set_aspect("equal")
    target.set_facecolor("0.85")
    return target.pcolormesh(ts, ts, values, shading="nearest", cmap="RdBu_r", vmin=-1, vmax=1, rasterized=True)

"""Trajectories with their intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from arviz_plots import visuals
from arviz_plots.plot_collection import PlotCollection

from ..._errors import LaplodeError
from ..._posterior.posterior import Posterior
from ..._predict.predictions import Predictions
from ..._problem.data import Trajectories
from ..datatree import to_datatree
from .shared import _COLORS, _GRAY, _check_prob, _grid, _label, _legend, _lines, _put, _ribbon, _title

# ---- Trajectories over time


def plot_trajectories(
    source: xr.DataTree | Posterior,
    *predictions: Predictions,
    held_out: Trajectories | None = None,
    prob: float = 0.9,
    num_draws: int = 10,
    trajectories: Sequence[Any] | None = None,
    labels: Mapping[str, str] | None = None,
    axes: Any = None,
    backend: str | None = None,
) -> PlotCollection:
    """Predictive ribbons, draws and data over time: a row for each trajectory, a column for each channel.

    The dark ribbon is the noise-free prediction, the light one adds observation noise. The dashed line marks the last
    observation, after which everything is forecast. Predictions on the observed times are left out where others cover
    them.

    **Arguments:**

    - `source`, `predictions`: a DataTree from `to_datatree`, or a posterior and its predictions.
    - `held_out`: trajectories that were not fitted, drawn as open circles.
    - `prob`: probability within the central ribbons.
    - `num_draws`: how many noise-free draws to show.
    - `trajectories`: labels of the trajectories to show; the first four by default.
    - `labels`: for "time" and "y".
    - `axes`: Matplotlib axes to draw on, of shape (trajectories, channels).
    - `backend`: "matplotlib", "plotly" or "bokeh"; ArviZ's setting by default.

    **Returns:** ArviZ's `PlotCollection`: `.savefig(path)` and `.show()`, the axes under `.viz["plot"]`, shape
    (trajectories, channels), and what is drawn on them under `.viz["ribbon"]`, "noise_ribbon", "draws", "median",
    "data", "held_out" and "horizon", with "_forecast" after the name where a second prediction is drawn.

    **Raises:** `LaplodeError` when there is nothing to plot, or a trajectory is unknown.
    """
    _check_prob(prob)
    tree = to_datatree(source, *predictions) if isinstance(source, Posterior) else source
    if not isinstance(tree, xr.DataTree):
        raise LaplodeError(f"`source` must be a DataTree from to_datatree, or a posterior; got {type(tree).__name__}.")
    groups = [name for name in ("posterior_predictive", "predictions") if name in tree.children]
    if not groups:
        raise LaplodeError("`source` has no predictions: pass some from laplode.predict to to_datatree.")
    segments = [_segment(tree, name) for name in groups]
    if len(segments) == 2 and _covers(segments[1]["ts"], segments[0]["ts"]):
        segments = segments[1:]
    observed = tree["observed_data"].to_dataset()["y"]
    same = all(np.array_equal(s["trajectory"], observed["trajectory"]) for s in segments)
    known = list(segments[0]["trajectory"].values)
    names = known[:4] if trajectories is None else list(trajectories)
    if not names or any(name not in known for name in names):
        raise LaplodeError(f"`trajectories` must be some of {known}, got {names}.")
    segments = [segment.sel(trajectory=names) for segment in segments]
    channels = segments[0]["channel"].values
    plots = _grid(
        segments[0][["f"]],
        rows="trajectory",
        cols="channel",
        size=(4.8 * len(channels), 2.9 * len(names) + 0.4),
        axes=axes,
        backend=backend,
        aes={"color": ["channel"]},
        color=_COLORS,
    )
    for end, segment in zip(("", "_forecast"), segments, strict=False):
        _draw_segment(plots, segment, prob, num_draws, end)
    percent = f"{100 * prob:g}%"
    entries = [
        (f"{percent} with noise", dict(color=_COLORS[0], alpha=0.18, width=8)),
        (f"{percent} noise-free", dict(color=_COLORS[0], alpha=0.45, width=8)),
        ("draws", dict(color=_COLORS[0], alpha=0.6, width=0.5)),
        ("median", dict(color=_COLORS[0], width=1.8)),
    ]
    if same:
        observed = observed.sel(trajectory=names)
        times = tree["constant_data"].to_dataset()["ts"].sel(trajectory=names)
        entries += _draw_observations(plots, observed, times, segments)
        if held_out is not None:
            rows = [known.index(name) for name in names]
            # Of the shape of the observations but for the times, which have no coordinates here.
            like = dict(trajectory=names, channel=channels)
            ys = xr.DataArray(held_out.ys[rows], like, ["trajectory", "time", "channel"], name="y")
            ts = xr.DataArray(held_out.ts[rows], dict(trajectory=names), ["trajectory", "time"])
            style = dict(facecolor="white", edgecolor="black", marker="C0", size=22)
            _put(plots, visuals.scatter_xy, "held_out", ys.to_dataset(), style, x=ts)
            entries.append(("held out", dict(edgecolor="black", marker="o", facecolor="white")))
    labels = labels or {}
    for row, name in enumerate(names):
        for column, channel in enumerate(channels):
            place = {"trajectory": name, "channel": channel}
            title = _title("channel", channel) + (f", {_title('trajectory', name)}" if len(names) > 1 else "")
            _label(
                plots,
                place,
                title=title,
                x=labels.get("time", "time") if row == len(names) - 1 else None,
                y=labels.get("y", "y") if column == 0 else None,
            )
    _legend(plots, entries)
    return plots


def _covers(these: xr.DataArray, those: xr.DataArray) -> bool:
    return bool(these.min() <= those.min() and these.max() >= those.max())


def _segment(tree: xr.DataTree, group: str) -> xr.Dataset:
    """Noisy draws y and noise-free draws f of one group, with their times ts."""
    constant = "constant_data" if group == "posterior_predictive" else "predictions_constant_data"
    draws = tree[group].to_dataset()[["y", "f"]].stack(sample=("chain", "draw")).drop_vars(["sample", "chain", "draw"])
    return draws.assign(ts=tree[constant].to_dataset()["ts"])


def _draw_segment(plots: PlotCollection, segment: xr.Dataset, prob: float, num_draws: int, end: str) -> None:
    tails = [(1 - prob) / 2, (1 + prob) / 2]
    ts = segment["ts"]
    for variable, alpha, label in (("y", 0.18, "noise_ribbon"), ("f", 0.35, "ribbon")):
        low, high = segment[variable].quantile(tails, dim="sample").transpose("quantile", ...)
        data = low.drop_vars("quantile").to_dataset(name="f")
        _put(plots, _ribbon, label + end, data, dict(alpha=alpha), x=ts, high=high.drop_vars("quantile"))
    few = segment[["f"]].isel(sample=slice(num_draws))
    if num_draws > 0:
        _put(plots, _lines, "draws" + end, few, dict(width=0.5, alpha=0.6), x=ts)
    _put(plots, visuals.line_xy, "median" + end, segment[["f"]].median("sample"), dict(width=1.8), x=ts)


def _draw_observations(
    plots: PlotCollection, observed: xr.DataArray, times: xr.DataArray, segments: list[xr.Dataset]
) -> list[tuple[str, dict[str, Any]]]:
    """The data, and where forecasting starts; what to say of them in a legend."""
    style = dict(color="black", marker="C0", size=16)
    data = observed.to_dataset(name="y")
    _put(plots, visuals.scatter_xy, "data", data, style, x=times)
    entries: list[tuple[str, dict[str, Any]]] = [("data", dict(color="black", marker="o"))]
    # One horizon a trajectory: the last time at which anything was seen of it.
    seen = observed.notnull().any("channel").transpose("trajectory", "time")
    horizon = xr.where(seen, times, -np.inf).max("time")
    last = xr.concat([segment["ts"].max("time") for segment in segments], "segment").max("segment")
    horizon = horizon.where(last > horizon)
    if np.any(np.isfinite(horizon)):
        lines = horizon.expand_dims(channel=observed["channel"]).transpose("trajectory", "channel").to_dataset(name="y")
        dashed = dict(color=_GRAY, linestyle="C1", width=1)
        _put(plots, visuals.vline, "horizon", lines, dashed)
        entries.append(("last observation fitted", dashed))
    return entries

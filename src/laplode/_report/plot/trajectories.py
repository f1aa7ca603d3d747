"""Trajectories with their intervals."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from arviz_plots import visuals
from arviz_plots.plot_collection import PlotCollection

from ..._checks import check_fraction
from ..._diagnose.profile import Profile
from ..._errors import LaplodeError
from ..._posterior.posterior import Posterior
from ..._predict.predictions import Predictions
from ..._problem.data import Trajectories
from ..datatree import to_datatree
from .shared import COLORS, DATA, GRAY, HELD_OUT, Layer, annotate, draw_layers, lines, panels, pick, ribbon, titled


def plot_trajectories(
    source: xr.DataTree | Posterior,
    *predictions: Predictions,
    held_out: Trajectories | None = None,
    profiles: Sequence[Profile] = (),
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
    - `profiles`: of forecasts, from `profile(posterior, trajectory_at(...))`: the ends of their intervals over times,
        as dotted lines.
    - `prob`: probability within the central ribbons.
    - `num_draws`: how many noise-free draws to show.
    - `trajectories`: labels of the trajectories to show; the first four by default.
    - `labels`: for "time" and "y".
    - `axes`: Matplotlib axes to draw on, of shape (trajectories, channels).
    - `backend`: "matplotlib", "plotly" or "bokeh"; ArviZ's setting by default.

    **Returns:** ArviZ's `PlotCollection`: `.savefig(path)` and `.show()`, the axes under `.viz["plot"]`, shape
    (trajectories, channels), and what is drawn on them under `.viz["ribbon"]`, "noise_ribbon", "draws", "median",
    "data", "held_out", "horizon", "profile_low" and "profile_high", with "_forecast" after the
    name where a second prediction is drawn.

    **Raises:** `LaplodeError` when there is nothing to plot, or a trajectory is unknown.
    """
    check_fraction("prob", prob)
    tree = to_datatree(source, *predictions) if isinstance(source, Posterior) else source
    if not isinstance(tree, xr.DataTree):
        raise LaplodeError(f"`source` must be a DataTree from to_datatree, or a posterior; got {type(tree).__name__}.")
    segments = [_segment(tree, name) for name in ("posterior_predictive", "predictions") if name in tree.children]
    if not segments:
        raise LaplodeError("`source` has no predictions: pass some from laplode.predict to to_datatree.")
    if len(segments) == 2 and _covers(segments[1]["ts"], segments[0]["ts"]):
        segments = segments[1:]
    observed = tree["observed_data"].to_dataset()[["y"]]
    observed["ts"] = tree["constant_data"].to_dataset()["ts"]
    same = all(np.array_equal(s["trajectory"], observed["trajectory"]) for s in segments)
    known = list(segments[0]["trajectory"].values)
    rows = pick("trajectories", known[:4] if trajectories is None else trajectories, known)
    segments, names = [segment.isel(trajectory=rows) for segment in segments], [known[row] for row in rows]
    channels = segments[0]["channel"].values
    plots = panels(
        segments[0][["f"]],
        rows="trajectory",
        cols="channel",
        size=(4.8 * len(channels), 2.9 * len(names) + 0.4),
        axes=axes,
        backend=backend,
        aes={"color": ["channel"]},
        color=COLORS,
    )
    layers = []
    for segment, suffix in zip(segments, ("", "_forecast"), strict=False):
        found = _prediction_layers(segment, prob, num_draws)
        layers += [layer._replace(label=layer.label + suffix) for layer in found]
    if same:
        layers += _data_layers(observed.isel(trajectory=rows), segments)
        if held_out is not None:
            # Of the shape of the observations but for the times, which have no coordinates here.
            like = dict(trajectory=names, channel=channels)
            ys = xr.DataArray(held_out.ys[rows], like, ["trajectory", "time", "channel"], name="y")
            ts = xr.DataArray(held_out.ts[rows], dict(trajectory=names), ["trajectory", "time"])
            style = HELD_OUT | {"size": 22}
            layers += [Layer("held_out", visuals.scatter_xy, ys.to_dataset(), style, "held out", inputs={"x": ts})]
    layers += _profile_layers(profiles, rows, segments[0])
    labels = labels or {}
    for name, channel in ((name, channel) for name in names for channel in channels):
        annotate(
            plots,
            {"trajectory": name, "channel": channel},
            title=_title(channel, len(channels), name, len(names)),
            x=labels.get("time", "time") if name == names[-1] else None,
            y=labels.get("y", "y") if channel == channels[0] else None,
        )
    return draw_layers(plots, layers)


def _title(channel: Any, num_channels: int, trajectory: Any, num_trajectories: int) -> str:
    """What tells a panel from the others, and the name of a channel that has one."""
    of_channel = [titled("channel", channel)] if num_channels > 1 or isinstance(channel, str) else []
    return ", ".join(of_channel + ([titled("trajectory", trajectory)] if num_trajectories > 1 else []))


def _covers(these: xr.DataArray, those: xr.DataArray) -> bool:
    return bool(these.min() <= those.min() and these.max() >= those.max())


def _segment(tree: xr.DataTree, group: str) -> xr.Dataset:
    """Noisy draws y and noise-free draws f of one group, with their times ts."""
    constant = "constant_data" if group == "posterior_predictive" else "predictions_constant_data"
    draws = tree[group].to_dataset()[["y", "f"]].stack(sample=("chain", "draw")).drop_vars(["sample", "chain", "draw"])
    return draws.assign(ts=tree[constant].to_dataset()["ts"])


def _prediction_layers(segment: xr.Dataset, prob: float, num_draws: int) -> Iterator[Layer]:
    tails = [(1 - prob) / 2, (1 + prob) / 2]
    times, one = {"x": segment["ts"]}, {"color": COLORS[0]}
    for variable, alpha, label, text, shade in (
        ("y", 0.18, "noise_ribbon", "with noise", 0.18),
        ("f", 0.35, "ribbon", "noise-free", 0.45),
    ):
        low, high = segment[variable].quantile(tails, dim="sample").drop_vars("quantile").transpose("quantile", ...)
        swatch, ends = one | {"alpha": shade, "width": 8}, times | {"high": high}
        yield Layer(label, ribbon, low.to_dataset(name="f"), {"alpha": alpha}, f"{100 * prob:g}% {text}", swatch, ends)
    if num_draws > 0:
        few = segment[["f"]].isel(sample=slice(num_draws))
        yield Layer("draws", lines, few, {"width": 0.5, "alpha": 0.6}, "draws", one, times)
    yield Layer("median", visuals.line_xy, segment[["f"]].median("sample"), {"width": 1.8}, "median", one, times)


def _profile_layers(profiles: Any, rows: list[int], segment: xr.Dataset) -> Iterator[Layer]:
    """The outer ends of the intervals of forecasts, which may be infinite, in the form of the predictions."""
    if not isinstance(profiles, Sequence) or not all(isinstance(p, Profile) and p.place for p in profiles):
        raise LaplodeError("`profiles` must be what laplode.profile(posterior, trajectory_at(...)) returns, in a list.")
    if not profiles:
        return
    times = sorted({p.place.time for p in profiles})
    ends = np.full((2, len(rows), len(times), segment.sizes["channel"]), np.nan)
    for p in profiles:
        if p.place.trajectory in rows:
            at = (rows.index(p.place.trajectory), times.index(p.place.time), p.place.channel)
            ends[(slice(None), *at)] = p.intervals[0][0], p.intervals[-1][1]
    coords = {name: segment[name] for name in ("trajectory", "channel")}
    style = {"color": "black", "linestyle": "C2", "width": 1.2}
    for label, values in zip(("profile_low", "profile_high"), np.where(np.isfinite(ends), ends, np.nan), strict=True):
        data = xr.DataArray(values, coords, ["trajectory", "time", "channel"]).to_dataset(name="f")
        text = f"{profiles[0].level:.0%} profile"
        yield Layer(label, visuals.line_xy, data, style, text, inputs={"x": xr.DataArray(times, dims=["time"])})


def _data_layers(observed: xr.Dataset, segments: list[xr.Dataset]) -> Iterator[Layer]:
    """The data, and where forecasting starts."""
    ys, ts = observed["y"], observed["ts"]
    yield Layer("data", visuals.scatter_xy, observed[["y"]], DATA | {"size": 16}, "data", inputs={"x": ts})
    # One horizon a trajectory: the last time at which anything was seen of it.
    horizon = xr.where(ys.notnull().any("channel"), ts, -np.inf).max("time")
    last = xr.concat([segment["ts"].max("time") for segment in segments], "segment").max("segment")
    horizon = horizon.where(last > horizon)
    if np.any(np.isfinite(horizon)):
        at = horizon.expand_dims(channel=ys["channel"]).transpose("trajectory", "channel").to_dataset(name="y")
        dashed = dict(color=GRAY, linestyle="C1", width=1)
        yield Layer("horizon", visuals.vline, at, dashed, "last observation fitted")

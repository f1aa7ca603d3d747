"""Pictures that ArviZ does not have."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from ._arviz import to_datatree
from ._errors import LaplodeError
from ._posterior import AbstractPosterior
from ._predict import Predictions
from ._problem import Trajectories

# From the color-blind safe palette of Okabe and Ito.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def plot_trajectories(
    source: xr.DataTree | AbstractPosterior,
    *predictions: Predictions,
    held_out: Trajectories | None = None,
    prob: float = 0.9,
    num_draws: int = 10,
    trajectories: Any = None,
    labels: dict[str, str] | None = None,
    axes: Any = None,
) -> np.ndarray:
    """Predictive ribbons, draws and data over time: a row for each trajectory, a column for each channel.

    The dark ribbon is the noise-free prediction, the light one adds observation noise. The dashed line marks the last
    observation, after which everything is forecast. Predictions on the observed times are left out where others cover
    them.

    **Arguments:**

    - `source`: a DataTree from `to_datatree`, or a posterior followed by its predictions.
    - `held_out`: trajectories that were not fitted, drawn as open circles.
    - `prob`: probability within the central ribbons.
    - `num_draws`: how many noise-free draws to show.
    - `trajectories`: labels of the trajectories to show; the first four by default.
    - `labels`: for "time" and "y".
    - `axes`: Matplotlib axes to draw on, of shape (trajectories, channels).

    **Returns:** the axes, shape (trajectories, channels).

    **Raises:** `LaplodeError` when there is nothing to plot, or a trajectory is unknown.
    """
    tree = to_datatree(source, *predictions) if isinstance(source, AbstractPosterior) else source
    if not isinstance(tree, xr.DataTree):
        raise LaplodeError(f"`source` must be a DataTree from to_datatree, or a posterior; got {type(tree).__name__}.")
    groups = [name for name in ("posterior_predictive", "predictions") if name in tree.children]
    if not groups:
        raise LaplodeError("`source` has no predictions: pass some from laplode.predict to to_datatree.")
    if not 0 < prob < 1:
        raise LaplodeError(f"`prob` must lie between 0 and 1, got {prob}.")
    segments = [_segment(tree, name) for name in groups]
    if (
        len(segments) == 2
        and segments[1].ts.min() <= segments[0].ts.min()
        and segments[1].ts.max() >= segments[0].ts.max()
    ):
        segments = segments[1:]  # the new times cover the observed ones
    observed = tree["observed_data"].to_dataset()["y"]
    same = all(np.array_equal(s["trajectory"], observed["trajectory"]) for s in segments)
    known = list(segments[0]["trajectory"].values)
    names = known[:4] if trajectories is None else list(trajectories)
    if not names or any(name not in known for name in names):
        raise LaplodeError(f"`trajectories` must be some of {known}, got {names}.")
    channels = segments[0]["channel"].values
    if axes is None:
        size = (4.8 * len(channels), 2.9 * len(names) + 0.4)
        _, axes = plt.subplots(
            len(names), len(channels), figsize=size, sharex=True, squeeze=False, layout="constrained"
        )
    axes = np.asarray(axes, dtype=object).reshape(len(names), len(channels))
    labels = labels or {}

    for row, name in zip(axes, names, strict=True):
        for k, ax in enumerate(row):
            color = _COLORS[k % len(_COLORS)]
            for number, segment in enumerate(segments):
                _ribbon(ax, segment.sel(trajectory=name).isel(channel=k), prob, num_draws, color, number == 0)
            ax.set_title(_title("channel", channels[k]) + (f", {_title('trajectory', name)}" if len(names) > 1 else ""))
            ax.ticklabel_format(useOffset=False)  # years are not offsets from 1900
            if name == names[-1]:
                ax.set_xlabel(labels.get("time", "time"))
            if k == 0:
                ax.set_ylabel(labels.get("y", "y"))
            if not same:
                continue
            values = observed.sel(trajectory=name).values
            times = tree["constant_data"].to_dataset()["ts"].sel(trajectory=name).values
            ax.plot(times, values[:, k], "o", color="black", ms=4, label="data", zorder=5)
            # One horizon a trajectory: the last time at which anything was seen of it.
            horizon = times[np.any(np.isfinite(values), axis=1)].max()
            if max(float(segment.ts.max()) for segment in segments) > horizon:
                ax.axvline(horizon, color="0.35", ls="--", lw=1, label="last observation fitted")
            if held_out is not None:
                i = list(observed["trajectory"].values).index(name)
                style = {"mfc": "white", "mec": "black", "ms": 4.5, "zorder": 5}
                ax.plot(held_out.ts[i], held_out.ys[i, :, k], "o", label="held out", **style)
    handles, texts = axes[0, 0].get_legend_handles_labels()
    axes[0, 0].figure.legend(
        handles, texts, loc="outside lower center", ncols=min(len(texts), 6), frameon=False, fontsize="small"
    )
    return axes


def _title(kind: str, label: Any) -> str:
    return str(label) if isinstance(label, str) else f"{kind} {label}"


def _segment(tree: xr.DataTree, group: str) -> xr.Dataset:
    constant = "constant_data" if group == "posterior_predictive" else "predictions_constant_data"
    draws = tree[group].to_dataset()[["y", "f"]].stack(sample=("chain", "draw")).drop_vars(["sample", "chain", "draw"])
    return draws.assign(ts=tree[constant]["ts"])


def _ribbon(ax: Axes, draws: xr.Dataset, prob: float, num_draws: int, color: str, label: bool) -> None:
    times = draws["ts"].values
    tails = [(1 - prob) / 2, (1 + prob) / 2]
    percent = f"{100 * prob:g}%"
    name = lambda text: text if label else None
    for variable, alpha, text in (("y", 0.18, f"{percent} with noise"), ("f", 0.35, f"{percent} noise-free")):
        low, high = draws[variable].quantile(tails, dim="sample").values
        ax.fill_between(times, low, high, color=color, alpha=alpha, lw=0, label=name(text))
    lines = draws["f"].transpose("time", "sample").values[:, :num_draws]
    for i, line in enumerate(lines.T):
        ax.plot(times, line, color=color, lw=0.5, alpha=0.6, label=name("draws") if i == 0 else None)
    ax.plot(times, draws["f"].median("sample"), color=color, lw=1.8, label=name("median"))

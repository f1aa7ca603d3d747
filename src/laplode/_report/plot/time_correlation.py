"""Correlations over times."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..._checks import check_from
from ..._predict.predictions import Predictions
from .shared import pick


def plot_time_correlation(
    predictions: Predictions,
    *,
    trajectory: int = 0,
    labels: Mapping[Any, str] | None = None,
) -> Figure:
    """How the noise-free prediction at one time goes with that at another: a heat map for each pair of channels.

    **Arguments:**

    - `predictions`: from `predict`: if linearized, correlations are in closed form, otherwise of the draws.
    - `trajectory`: which one, by its number.
    - `labels`: for "time", and of channels by their numbers, such as `{0: "hare", 1: "lynx"}`.

    **Returns:** the Matplotlib `Figure`: ArviZ's plots have no heat maps.

    **Raises:** `LaplodeError` when there is nothing to plot.
    """
    import matplotlib.pyplot as plt

    check_from("predictions", predictions, Predictions, "predict")
    num, length, num_channels = predictions.mean.shape
    pick("trajectory", [trajectory], range(num))
    labels = {"time": "time"} | {k: f"channel {k}" for k in range(num_channels)} | dict(labels or {})
    if predictions.method == "linearized":
        covariance = np.asarray(predictions.covariance()[trajectory])
    else:
        draws = np.asarray(predictions.f)[np.asarray(predictions.ok), trajectory]
        covariance = np.cov(draws.reshape(len(draws), -1).T)
    std = np.sqrt(np.diagonal(covariance))
    # What is known, as a given initial state, goes with nothing.
    std = np.where(std > 1e-9 * np.max(std), std, np.nan)
    blocks = (covariance / std / std[:, None]).reshape(length, num_channels, length, num_channels)
    side, ts = 3.2 if num_channels > 1 else 4.4, predictions.ts[trajectory]
    shape, size = (num_channels, num_channels), (side * num_channels + 1.0, side * num_channels)
    figure, panels = plt.subplots(*shape, figsize=size, layout="compressed", squeeze=False)
    for (row, column), panel in np.ndenumerate(panels):
        shown = blocks[:, row, :, column]
        mesh = panel.pcolormesh(ts, ts, shown, cmap="RdBu_r", vmin=-1, vmax=1, shading="nearest", rasterized=True)
        panel.set(aspect="equal", facecolor="0.85")
        panel.ticklabel_format(useOffset=False)  # years are not offsets from 1900
        panel.set(xlabel=f"{labels[column]}, {labels['time']}", ylabel=f"{labels[row]}, {labels['time']}")
        panel.label_outer()
    figure.colorbar(mesh, ax=list(panels.flat), label="correlation", shrink=0.8)
    return figure

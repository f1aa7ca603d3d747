"""Profiles beside the Gaussian's parabola."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..._diagnose.profile import Profile
from ..._errors import LaplodeError


def plot_profile(profiles: Profile | Sequence[Profile], *, axes: Any = None) -> Figure:
    """The drop of the log density along each profile, the Gaussian's parabola beside it, and the threshold.

    **Arguments:**

    - `profiles`: from `profile`, one or several.
    - `axes`: Matplotlib axes to draw on, as many as profiles; new ones by default, at most four in a row.

    **Returns:** the Matplotlib `Figure`.

    **Raises:** `LaplodeError` when something else than profiles is given, or `axes` are too few.
    """
    import matplotlib.pyplot as plt

    given: Any = (profiles,) if isinstance(profiles, Profile) else profiles
    if not isinstance(given, Sequence) or not given or not all(isinstance(each, Profile) for each in given):
        raise LaplodeError("`profiles` must come from laplode.profile, one or a list of them.")
    columns = min(4, len(given))
    if axes is None:
        rows = -(-len(given) // columns)
        _, axes = plt.subplots(
            rows, columns, figsize=(3.0 * columns + 0.6, 2.4 * rows + 0.5), layout="constrained", squeeze=False
        )
    panels = np.ravel(np.asarray(axes, dtype=object))
    if len(panels) < len(given):
        raise LaplodeError(f"`axes` must be {len(given)}, one for each profile; got {len(panels)}.")
    for panel, each in zip(panels, given, strict=False):
        _draw(panel, each)
    for panel in panels[::columns]:
        panel.set_ylabel("drop (nats)")
    for panel in panels[len(given) :]:
        panel.set_axis_off()
    figure = panels[0].figure
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def _draw(panel: Any, each: Profile) -> None:
    inside = each.drop <= 1.5 * each.threshold
    panel.plot(each.values[inside], each.drop[inside], "-o", ms=2.5, color="#0072B2", label="profile")
    half = (each.laplace[1] - each.laplace[0]) / 2
    low, high = panel.get_xlim()
    grid = np.linspace(low, high, 200)
    center = np.mean(each.laplace)
    panel.plot(grid, each.threshold * ((grid - center) / half) ** 2, "--", color="#D55E00", label="Gaussian")
    panel.axhline(each.threshold, color="0.5", lw=0.8, ls=":", label=f"{each.level:.0%}")
    for end in np.ravel(each.intervals):
        if np.isfinite(end):
            panel.axvline(end, color="0.8", lw=0.8)
    panel.set_ylim(0, 1.5 * each.threshold)
    panel.set_xlim(low, high)
    panel.set_title(each.verdict, fontsize=9)
    panel.set_xlabel(each.name)

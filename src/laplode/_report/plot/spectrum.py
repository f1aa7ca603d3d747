"""Eigenvalues against the prior's precision."""

from typing import Any

import numpy as np
import xarray as xr
from arviz_plots import visuals
from arviz_plots.plot_collection import PlotCollection

from ..._errors import LaplodeError
from ..._posterior.posterior import Posterior
from .shared import _COLORS, _GRAY, _grid, _label, _legend, _log_y, _put, _xy

# ---- Spectrum of the curvature


def plot_spectrum(posterior: Posterior, *, axes: Any = None, backend: str | None = None) -> PlotCollection:
    """The eigenvalues of the likelihood's curvature against the precision of the prior.

    Eigenvalues above the prior's precision are directions that the data determine. With a prior that is not the same
    for all parameters, they are those of Λ0^-½ H Λ0^-½, in units of the prior, and the line stands at 1. Negative ones
    are drawn by their absolute value, as open circles; of H as it was found, before regularization.

    **Arguments:**

    - `posterior`: from `laplace`.
    - `axes`: a Matplotlib axis to draw on.
    - `backend`: "matplotlib", "plotly" or "bokeh"; ArviZ's setting by default.

    **Returns:** ArviZ's `PlotCollection`, with "eigenvalues", "negative", "prior" and "effective_dof" under `.viz`.

    **Raises:** `LaplodeError` when `posterior` is none, or its prior is the posterior of other data.
    """
    if not isinstance(posterior, Posterior):
        raise LaplodeError(f"`posterior` must come from laplode.laplace, got {type(posterior).__name__}.")
    one = posterior
    local = one.problem.prior.local(one.parameters)
    local.refuse_rows("`posterior`", "no one line stands for it. Draw the posterior of all data together.")
    precision = np.asarray(local.precision)
    uniform = bool(np.all(precision == precision[0]))
    unit = float(precision[0]) if uniform else 1.0
    values = unit * np.sort(one.form.spectrum(precision))[::-1]
    rounding = one.size * np.finfo(float).eps * np.max(np.abs(values))
    number = np.arange(1, len(values) + 1)
    positive, negative = values > rounding, values < -rounding
    plots = _grid(_xy(np.stack([number, values])), size=(6.4, 4.2), log_y=True, axes=axes, backend=backend)
    entries: list[tuple[str, dict[str, Any]]] = []
    for chosen, label, text, style in (
        (positive, "eigenvalues", "eigenvalues of the likelihood's curvature", dict(color=_COLORS[0])),
        (negative, "negative", "negative ones, absolute value", dict(facecolor="white", edgecolor=_COLORS[1])),
    ):
        if np.any(chosen):
            dots = dict(**style, marker="C0", size=16)
            _put(plots, visuals.scatter_xy, label, _xy(np.stack([number, np.abs(values)])[:, chosen]), dots)
            entries.append((text, dict(marker="o", **style)))
    line = dict(color="black", width=1.2)
    _put(plots, visuals.hline, "prior", xr.Dataset({"f": unit}), line)
    entries.append((f"prior precision {unit:.3g}" if uniform else "prior", line))
    dof = float(one.diagnostics.effective_dof)
    dashed = dict(color=_GRAY, width=1.2, linestyle="C1")
    _put(plots, visuals.vline, "effective_dof", xr.Dataset({"f": dof}), dashed)
    entries.append((f"effective degrees of freedom {dof:.1f}", dashed))
    _label(
        plots,
        {},
        title=None,
        x=f"number, of P = {one.size}",
        y="eigenvalue" + ("" if uniform else " over prior precision"),
    )
    _log_y(plots)
    _legend(plots, entries, columns=2)
    return plots

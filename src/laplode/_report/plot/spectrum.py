"""Eigenvalues against the prior's precision."""

from typing import Any

import numpy as np
import xarray as xr
from arviz_plots import visuals
from arviz_plots.plot_collection import PlotCollection

from ..._algebra.whitening import whitening
from ..._checks import check_from
from ..._posterior.posterior import Posterior
from .shared import COLORS, GRAY, Layer, annotate, draw_layers, panels, xy


def plot_spectrum(posterior: Posterior, *, axes: Any = None, backend: str | None = None) -> PlotCollection:
    """The eigenvalues of the likelihood's curvature against the precision of the prior.

    Eigenvalues above the prior's precision are directions that the data determine. With a prior that is not the same
    for all parameters, or in which they depend on one another, they are those of Λ0^-½ H Λ0^-½, in units of the prior,
    and the line stands at 1. Negative ones are drawn by their absolute value, as open circles; of H as it was found,
    before regularization.

    **Arguments:**

    - `posterior`: from `laplace`.
    - `axes`: a Matplotlib axis to draw on.
    - `backend`: "matplotlib", "plotly" or "bokeh"; ArviZ's setting by default.

    **Returns:** ArviZ's `PlotCollection`, with "eigenvalues", "negative", "prior" and "effective_dof" under `.viz`.

    **Raises:** `LaplodeError` when `posterior` is none, or its prior is one in which parameters depend on one another,
    and the matrix (P, P) that this takes does not fit in memory.
    """
    check_from("posterior", posterior, Posterior, "laplace")
    local = posterior.problem.prior.local(posterior.parameters)
    precision, tied = np.asarray(local.precision), local.rows.shape[0] > 0
    uniform = not tied and bool(np.all(precision == precision[0]))
    unit = float(precision[0]) if uniform else 1.0
    if tied:
        root = whitening(local)
        spectrum = np.linalg.eigvalsh(root.T @ np.asarray(posterior.form.matrix) @ root)
    else:
        spectrum = posterior.form.spectrum(precision)
    values = unit * np.sort(spectrum)[::-1]
    rounding = posterior.size * np.finfo(float).eps * np.max(np.abs(values))
    points = np.stack([np.arange(1, len(values) + 1), np.abs(values)])
    dof = float(posterior.diagnostics.effective_dof)
    dots = {"marker": "C0", "size": 16}
    positive = dots | {"color": COLORS[0]}
    negative = dots | {"facecolor": "white", "edgecolor": COLORS[1]}
    kinds = (
        (values > rounding, "eigenvalues", "eigenvalues of the likelihood's curvature", positive),
        (values < -rounding, "negative", "negative ones, absolute value", negative),
    )
    layers = [
        Layer(label, visuals.scatter_xy, xy(points[:, chosen]), style, text)
        for chosen, label, text, style in kinds
        if np.any(chosen)
    ]
    at, style = xr.Dataset({"f": unit}), dict(color="black", width=1.2)
    text = f"prior precision {unit:.3g}" if uniform else "prior"
    layers.append(Layer("prior", visuals.hline, at, style, text))
    at, style = xr.Dataset({"f": dof}), dict(color=GRAY, width=1.2, linestyle="C1")
    layers.append(Layer("effective_dof", visuals.vline, at, style, f"effective degrees of freedom {dof:.1f}"))
    plots = panels(xy(points), size=(6.4, 4.2), log_y=True, axes=axes, backend=backend)
    of = "eigenvalue" + ("" if uniform else " over prior precision")
    annotate(plots, {}, x=f"number, of P = {posterior.size}", y=of)
    if plots.backend == "matplotlib":
        panel = plots.get_target(None, {})
        panel.set_yscale("log")
        panel.xaxis.get_major_locator().set_params(integer=True)
    elif plots.backend == "plotly":
        plots.get_viz("figure").update_yaxes(type="log")
    return draw_layers(plots, layers, columns=2)

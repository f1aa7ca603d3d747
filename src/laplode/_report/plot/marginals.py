"""Marginal densities against those of the prior."""

from collections.abc import Sequence
from typing import Any

import arviz_base
import numpy as np
import xarray as xr
from arviz_base.labels import IdxLabeller
from arviz_plots import visuals
from arviz_plots.plot_collection import PlotCollection
from arviz_stats.base.array import array_stats
from jaxtyping import PRNGKeyArray

from ..._checks import check_count
from ..._errors import LaplodeError
from ..._posterior.posterior import Posterior
from ..datatree import to_datatree
from .shared import COLORS, Layer, annotate, draw_layers, panels


def plot_marginals(
    source: xr.DataTree | Posterior,
    *,
    key: PRNGKeyArray | None = None,
    names: Sequence[str] | None = None,
    num: int = 8,
    axes: Any = None,
    backend: str | None = None,
) -> PlotCollection:
    """Marginal densities of parameters against those of their prior, from draws.

    Titles have the standard deviations of posterior and prior. Where the posterior is far narrower than the prior, the
    prior is seen as the almost level line at the foot.

    **Arguments:**

    - `source`: a DataTree from `to_datatree`, with draws of the prior and of all parameters; or a posterior, with
        `key`.
    - `key`: a JAX random key to draw with, for a posterior.
    - `names`: of parameters, whole (`vector_field.mlp.layers[0].bias`) or single entries of them (`….bias[2]`). By
        default those that the data narrow most, by the ratio of standard deviations.
    - `num`: how many, at most, by default.
    - `axes`: Matplotlib axes to draw on, as many as parameters.
    - `backend`: "matplotlib", "plotly" or "bokeh"; ArviZ's setting by default.

    **Returns:** ArviZ's `PlotCollection`, with "posterior" and "prior" under `.viz`.

    **Raises:** `LaplodeError` when draws are missing, or a name is unknown.
    """
    check_count("num", num)
    if isinstance(source, Posterior):
        source = to_datatree(source, key=key, parameters="all")
    if not isinstance(source, xr.DataTree):
        raise LaplodeError(f"`source` must be a DataTree from to_datatree or a posterior, got {type(source).__name__}.")
    if "prior" not in source.children or "posterior" not in source.children:
        raise LaplodeError("`source` has no draws of the prior: give to_datatree a `key`.")
    if source["posterior"].attrs.get("parameters") == "layers":
        raise LaplodeError('`source` has parameters by layers: make it by to_datatree(..., parameters="all").')
    flat = lambda group: arviz_base.xarray_to_ndarray(group.to_dataset(), label_fun=IdxLabeller().make_label_flat)
    drawn = {group: dict(zip(*flat(source[group]), strict=True)) for group in ("prior", "posterior")}
    std = {group: {name: np.std(draws) for name, draws in scalars.items()} for group, scalars in drawn.items()}
    known = list(drawn["posterior"])
    if names is None:
        kept = sorted(known, key=lambda name: std["posterior"][name] / std["prior"][name])[:num]
        chosen = [name for name in known if name in kept]
    else:
        chosen = _named(names, known)
    columns = min(4, len(chosen))
    layers = [
        Layer(group, visuals.line_xy, _densities(drawn[group], std, drawn["posterior"], chosen), style, group)
        for group, style in (
            ("prior", dict(color=COLORS[1], width=1.4)),
            ("posterior", dict(color=COLORS[0], width=1.8)),
        )
    ]
    size = (3.0 * columns, 2.0 * -(-len(chosen) // columns) + 0.4)
    plots = panels(layers[1].data, cols="parameter", wrap=columns, size=size, axes=axes, backend=backend)
    for i, name in enumerate(chosen):
        title = f"{name}\nsd {std['posterior'][name]:.2g}, prior {std['prior'][name]:.2g}"
        x = "value" if i >= len(chosen) - columns else None
        annotate(plots, {"parameter": name}, title=title, x=x, y="density" if i % columns == 0 else None, size=9)
    return draw_layers(plots, layers)


def _named(names: Any, known: list[str]) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise LaplodeError(f"`names` must be a list of names of parameters, got {names!r}.")
    chosen = []
    for wanted in names:
        found = [name for name in known if name == wanted or name.startswith(f"{wanted}[")]
        if not found:
            raise LaplodeError(f"`names`: there is no parameter {wanted!r}; there are {', '.join(known)[:300]}.")
        chosen += found
    return chosen


def _densities(draws, std, posterior, names: list[str]) -> xr.Dataset:
    """Curves (parameter, x and y, point) in a window that shows the posterior, which ArviZ's own picture of prior and
    posterior does not have.
    """
    curves = []
    for name in names:
        center, width, values = np.mean(posterior[name]), std["posterior"][name], draws[name]
        reach = max(6 * width, min(3 * std["prior"][name], 12 * width))
        # Room on both sides, where the density falls to zero.
        limits = (float(values.min() - np.std(values)), float(values.max() + np.std(values)))
        at, density, _ = array_stats.kde(values, custom_lims=limits, bound_correction=False, bw="scott")
        grid = np.linspace(center - reach, center + reach, 400)
        curves.append(np.stack([grid, np.interp(grid, at, density, left=0.0, right=0.0)]))
    dims = ("parameter", "plot_axis", "point")
    return xr.Dataset({"density": (dims, np.stack(curves))}, {"parameter": names, "plot_axis": ["x", "y"]})

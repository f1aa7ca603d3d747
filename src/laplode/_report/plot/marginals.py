"""Marginal densities against those of the prior."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from arviz_plots import visuals
from arviz_plots.plot_collection import PlotCollection
from arviz_stats.base.array import array_stats
from jaxtyping import PRNGKeyArray

from ..._checks import check_count, check_key
from ..._errors import LaplodeError
from ..._posterior.posterior import Posterior
from ..datatree import to_datatree
from .shared import _COLORS, _grid, _label, _legend, _put

# ---- Marginals of the parameters


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
        if key is None:
            raise LaplodeError("`key` is needed to draw from a posterior.")
        check_key("key", key)
        source = to_datatree(source, key=key, parameters="all")
    if not isinstance(source, xr.DataTree):
        raise LaplodeError(f"`source` must be a DataTree from to_datatree or a posterior, got {type(source).__name__}.")
    if "prior" not in source.children or "posterior" not in source.children:
        raise LaplodeError("`source` has no draws of the prior: give to_datatree a `key`.")
    if source["posterior"].attrs.get("parameters") == "layers":
        raise LaplodeError('`source` has parameters by layers: make it by to_datatree(..., parameters="all").')
    drawn = {group: _scalars(source[group].to_dataset()) for group in ("posterior", "prior")}
    posterior, prior, entries = drawn["posterior"], drawn["prior"], []
    if names is None:
        narrow = {name: np.std(draws) / np.std(prior[name]) for name, draws in posterior.items()}
        kept = sorted(narrow, key=narrow.__getitem__)[:num]
        chosen = [name for name in posterior if name in kept]
    else:
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise LaplodeError(f"`names` must be a list of names of parameters, got {names!r}.")
        chosen = []
        for wanted in names:
            found = [name for name in posterior if name == wanted or name.startswith(f"{wanted}[")]
            if not found:
                raise LaplodeError(
                    f"`names`: there is no parameter {wanted!r}; there are {', '.join(posterior)[:300]}."
                )
            chosen += found
    columns = min(4, len(chosen))
    densities = {group: _densities(draws, posterior, prior, chosen) for group, draws in drawn.items()}
    size = (3.0 * columns, 2.0 * -(-len(chosen) // columns) + 0.4)
    plots = _grid(densities["posterior"], cols="parameter", wrap=columns, size=size, axes=axes, backend=backend)
    for group, style in (
        ("prior", dict(color=_COLORS[1], width=1.4)),
        ("posterior", dict(color=_COLORS[0], width=1.8)),
    ):
        _put(plots, visuals.line_xy, group, densities[group], style)
        entries.append((group, style))
    bottom = len(chosen) - columns
    for i, name in enumerate(chosen):
        title = f"{name}\nsd {np.std(posterior[name]):.2g}, prior {np.std(prior[name]):.2g}"
        x = "value" if i >= bottom else None
        _label(plots, {"parameter": name}, title=title, x=x, y="density" if i % columns == 0 else None, size=9)
    _legend(plots, entries)
    return plots


def _scalars(group: xr.Dataset) -> dict[str, np.ndarray]:
    """The draws of each single parameter, by name."""
    scalars = {}
    for name, values in group.data_vars.items():
        draws = values.values.reshape(values.shape[0] * values.shape[1], *values.shape[2:])
        for place in np.ndindex(draws.shape[1:]):
            entry = f"{name}[{', '.join(map(str, place))}]" if place else str(name)
            scalars[entry] = draws[:, *place]
    return scalars


def _densities(draws, posterior, prior, names: list[str]) -> xr.Dataset:
    """Curves (parameter, x and y, point) in a window that shows the posterior."""
    curves = []
    for name in names:
        center, width = np.mean(posterior[name]), np.std(posterior[name])
        reach = max(6 * width, min(3 * np.std(prior[name]), 12 * width))
        values, margin = draws[name], np.std(draws[name])
        # Room on both sides, where the density falls to zero.
        limits = (float(values.min() - margin), float(values.max() + margin))
        at, density, _ = array_stats.kde(values, custom_lims=limits, bound_correction=False, bw="scott")
        grid = np.linspace(center - reach, center + reach, 400)
        curves.append(np.stack([grid, np.interp(grid, at, density, left=0.0, right=0.0)]))
    dims = ("parameter", "plot_axis", "point")
    return xr.Dataset({"density": (dims, np.stack(curves))}, {"parameter": names, "plot_axis": ["x", "y"]})

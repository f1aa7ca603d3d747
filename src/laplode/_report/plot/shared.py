"""What the pictures share: panels, layers, legends."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import xarray as xr
from arviz_base import rcParams
from arviz_plots import visuals
from arviz_plots.plot_collection import PlotCollection
from jaxtyping import Float
from matplotlib.colors import to_hex, to_rgb
from matplotlib.lines import Line2D

from ..._errors import LaplodeError, choose

# From the color-blind safe palette of Okabe and Ito.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


_GRAY = "#595959"


_BACKENDS = ("matplotlib", "plotly", "bokeh")


def _check_prob(prob: Any) -> None:
    if not isinstance(prob, float | np.floating) or not 0 < prob < 1:
        raise LaplodeError(f"`prob` must lie between 0 and 1, got {prob!r}.")


# ---- What the pictures share


def _grid(
    data: xr.Dataset,
    *,
    size: tuple[float, float],
    rows: str | None = None,
    cols: str | None = None,
    wrap: int | None = None,
    log_y: bool = False,
    square: bool = False,
    axes: Any = None,
    backend: str | None = None,
    **aesthetics: Any,
) -> PlotCollection:
    """Panels for the values of two dimensions, or of one, `wrap` in a row; new ones or those of `axes`."""
    if axes is not None:
        if backend not in (None, "matplotlib"):
            raise LaplodeError(f"`axes` are Matplotlib's; they do not go with `backend`={backend!r}.")
        backend = "matplotlib"
    backend = str(rcParams["plot.backend"]) if backend is None else backend
    choose("backend", backend, dict.fromkeys(_BACKENDS))
    try:
        import_module(f"arviz_plots.backend.{backend}")
    except ImportError as error:
        raise LaplodeError(
            f'`backend`="{backend}" is not installed: pip install "arviz-plots[{backend}]". ({error})'
        ) from error
    dims = [dim for dim in (rows, cols) if dim is not None]
    if axes is not None:
        shape = tuple(data.sizes[dim] for dim in dims)
        panels = np.asarray(axes, dtype=object)
        if panels.size != np.prod(shape):
            raise LaplodeError(f"`axes` must be {int(np.prod(shape))}, of shape {shape}; got {panels.size}.")
        panels = panels.reshape(shape)
        place = np.indices((1, *shape)[-2:] if len(shape) < 2 else shape)
        numbers = {
            name: (dims, index.reshape(shape)) for name, index in zip(("row_index", "col_index"), place, strict=True)
        }
        figure = np.array(panels.flat[0].figure, dtype=object)
        coords = {dim: data[dim] for dim in dims}
        viz = xr.DataTree(xr.Dataset({"figure": ((), figure), "plot": (dims, panels), **numbers}, coords))
        return PlotCollection(data, viz, backend=backend, **aesthetics)
    options: dict[str, Any] = {"figsize": size}
    if backend != "matplotlib":
        options = {"figsize": (100 * size[0], 100 * size[1]), "figsize_units": "dots"}
    if backend == "bokeh" and log_y:  # which is fixed when a panel is made
        options["subplot_kws"] = {"y_axis_type": "log"}
    if backend == "matplotlib":
        options |= {"layout": "compressed" if square else "constrained", "sharex": wrap is None and not square}
    if wrap is not None:
        return PlotCollection.wrap(data, cols=dims, col_wrap=wrap, backend=backend, figure_kwargs=options, **aesthetics)
    sides = {"rows": [] if rows is None else [rows], "cols": [] if cols is None else [cols]}
    return PlotCollection.grid(data, **sides, backend=backend, figure_kwargs=options, **aesthetics)


def _drawing(plots: PlotCollection) -> Any:
    """ArviZ's drawing functions for the backend of a picture."""
    return import_module(f"arviz_plots.backend.{plots.backend}")


def _put(
    plots: PlotCollection, draw: Callable[..., Any], label: str, data: xr.Dataset, style: dict[str, Any], **inputs: Any
) -> None:
    """Draw `data` on every panel, with the panel's color unless `style` has one; kept as plots.viz[label]."""
    own = {"color"} if {"color", "facecolor"} & set(style) else set()
    plots.map(draw, label, data=data, ignore_aes=frozenset(own), **{**inputs, **style})


def _title(kind: str, label: Any) -> str:
    return str(label) if isinstance(label, str) else f"{kind} {label}"


def _label(plots: PlotCollection, place: dict[str, Any], *, title, x, y, size: float | None = None) -> None:
    drawing, panel = _drawing(plots), plots.get_target(None, place)
    options = {} if size is None else {"size": size}
    if title is not None:
        drawing.title(title, panel, **options)
    if x is not None:
        drawing.xlabel(x, panel)
    if y is not None:
        drawing.ylabel(y, panel)
    if plots.backend == "matplotlib" and panel.get_xscale() == panel.get_yscale() == "linear":
        panel.ticklabel_format(useOffset=False)  # years are not offsets from 1900


def _legend(plots: PlotCollection, entries: list[tuple[str, dict[str, Any]]], columns: int = 6) -> None:
    texts = [text for text, _ in entries]
    if plots.backend != "matplotlib":  # whose legends have only lines, and opaque ones
        lines = []
        for _, style in entries:
            color = np.array(to_rgb(style["color"] if "color" in style else style["edgecolor"]))
            opaque = to_hex(1 + style.get("alpha", 1.0) * (color - 1))
            lines.append({"color": opaque, **{k: v for k, v in style.items() if k in ("width", "linestyle")}})
        _drawing(plots).legend(plots, lines, texts, legend_dim=(), update_visuals=False)
        return
    dashes = {"C1": "--", "C2": ":"}
    handles = []
    for _, style in entries:
        if "marker" in style:
            face = style.get("facecolor", style.get("color"))
            edge = style.get("edgecolor", style.get("color"))
            handles.append(Line2D([], [], ls="", marker="o", ms=4.5, mfc=face, mec=edge))
        else:
            line = dashes.get(style.get("linestyle", ""), "-")
            alpha = style.get("alpha")
            handles.append(Line2D([], [], color=style["color"], alpha=alpha, lw=style["width"], ls=line))
    plots.get_viz("figure").legend(
        handles, texts, loc="outside lower center", ncols=min(len(texts), columns), frameon=False, fontsize="small"
    )


def _log_y(plots: PlotCollection) -> None:
    if plots.backend == "matplotlib":
        plots.get_target(None, {}).set_yscale("log")
    elif plots.backend == "plotly":
        plots.get_viz("figure").update_yaxes(type="log")


def _xy(values: np.ndarray) -> xr.Dataset:
    """Points (2, n) as ArviZ's drawing functions take them."""
    return xr.Dataset({"f": (("plot_axis", "point"), values)}, {"plot_axis": ["x", "y"]})


def _broken(paths: Float[np.ndarray, "2 G n"]) -> Float[np.ndarray, "2 G*(n+1)"]:
    """Many paths as one, with gaps."""
    gaps = np.full((*paths.shape[:2], 1), np.nan)
    return np.concatenate([paths, gaps], axis=-1).reshape(2, -1)


def _ribbon(da: xr.DataArray, target: Any, *, x: xr.DataArray, high: xr.DataArray, **style: Any) -> Any:
    return visuals.fill_between_y(da, target, x=x.values, y_bottom=da.values, y_top=high.values, **style)


def _lines(da: xr.DataArray, target: Any, *, x: xr.DataArray, **style: Any) -> Any:
    return visuals.multiple_lines(da, target, "time", xvalues=x.values, **style)

"""What the pictures share: panels, layers, legends."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

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
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


GRAY = "#595959"


# How observations are drawn, those that were fitted and those that were not.
DATA = {"color": "black", "marker": "C0"}


HELD_OUT = {"facecolor": "white", "edgecolor": "black", "marker": "C0"}


_BACKENDS = ("matplotlib", "plotly", "bokeh")


_DASHES = {"C1": "--", "C2": ":"}


class Layer(NamedTuple):
    """One thing that is drawn on every panel.

    - `label`: the name under which ArviZ's collection keeps it.
    - `draw`: ArviZ's function that draws `data`, or one like it.
    - `style`: its options, in the words that all backends know; without a color the layer has that of its panel.
    - `text`: what the legend calls it; None for no line there.
    - `swatch`: how the legend's line differs from `style`.
    - `inputs`: further data that `draw` takes, such as `x`.
    """

    label: str
    draw: Callable[..., Any]
    data: xr.Dataset
    style: dict[str, Any]
    text: str | None = None
    swatch: dict[str, Any] | None = None
    inputs: dict[str, Any] | None = None


def draw_layers(plots: PlotCollection, layers: Sequence[Layer], columns: int = 6) -> PlotCollection:
    """Draw layers, the first at the bottom, and a legend of at most `columns` columns, fewer in a narrow figure."""
    for label, draw, data, style, _, _, inputs in layers:
        own = {"color"} if {"color", "facecolor"} & set(style) else set()
        plots.map(draw, label, data=data, ignore_aes=frozenset(own), **(inputs or {}), **style)
    swatches = {layer.text: layer.style | (layer.swatch or {}) for layer in layers if layer.text is not None}
    if plots.backend == "matplotlib":
        figure = plots.get_viz("figure")
        columns = max(1, min(columns, int(figure.get_size_inches()[0] / 1.55)))
        figure.legend(
            [_handle(swatch) for swatch in swatches.values()],
            list(swatches),
            loc="outside lower center",
            ncols=-(-len(swatches) // -(-len(swatches) // columns)),  # as many in each row, but for the last
            frameon=False,
            fontsize="small",
        )
    else:
        lines = [_opaque(swatch) for swatch in swatches.values()]
        drawing(plots).legend(plots, lines, list(swatches), legend_dim=(), update_visuals=False)
    return plots


def _handle(swatch: dict[str, Any]) -> Line2D:
    """A line of a legend of Matplotlib."""
    if "marker" in swatch:
        face, edge = (swatch.get(name, swatch.get("color")) for name in ("facecolor", "edgecolor"))
        return Line2D([], [], ls="", marker="o", ms=4.5, mfc=face, mec=edge)
    dashes = _DASHES.get(swatch.get("linestyle", ""), "-")
    return Line2D([], [], color=swatch["color"], alpha=swatch.get("alpha"), lw=swatch["width"], ls=dashes)


def _opaque(swatch: dict[str, Any]) -> dict[str, Any]:
    """A line of a legend of the other backends, whose legends have only lines, and opaque ones."""
    color = np.array(to_rgb(swatch["color"] if "color" in swatch else swatch["edgecolor"]))
    lines = {name: value for name, value in swatch.items() if name in ("width", "linestyle")}
    return {"color": to_hex(1 + swatch.get("alpha", 1.0) * (color - 1)), **lines}


def panels(
    data: xr.Dataset,
    *,
    size: tuple[float, float],
    rows: str | None = None,
    cols: str | None = None,
    wrap: int | None = None,
    log_y: bool = False,
    axes: Any = None,
    backend: str | None = None,
    **aesthetics: Any,
) -> PlotCollection:
    """Panels for the values of two dimensions, or of one, `wrap` in a row; new ones or those of `axes`."""
    dims = [dim for dim in (rows, cols) if dim is not None]
    if axes is not None:
        if backend not in (None, "matplotlib"):
            raise LaplodeError(f"`axes` are Matplotlib's; they do not go with `backend`={backend!r}.")
        return _on_axes(np.asarray(axes, dtype=object), data, dims, aesthetics)
    backend = str(rcParams["plot.backend"]) if backend is None else backend
    choose("backend", backend, dict.fromkeys(_BACKENDS))
    try:
        import_module(f"arviz_plots.backend.{backend}")
    except ImportError as error:
        raise LaplodeError(
            f'`backend`="{backend}" is not installed: pip install "arviz-plots[{backend}]". ({error})'
        ) from error
    if backend == "matplotlib":
        options: dict[str, Any] = {"figsize": size, "layout": "constrained", "sharex": wrap is None}
    else:
        options = {"figsize": (100 * size[0], 100 * size[1]), "figsize_units": "dots"}
    if backend == "bokeh" and log_y:  # which is fixed when a panel is made
        options["subplot_kws"] = {"y_axis_type": "log"}
    if wrap is not None:
        return PlotCollection.wrap(data, cols=dims, col_wrap=wrap, backend=backend, figure_kwargs=options, **aesthetics)
    sides = {"rows": [] if rows is None else [rows], "cols": [] if cols is None else [cols]}
    return PlotCollection.grid(data, **sides, backend=backend, figure_kwargs=options, **aesthetics)


def _on_axes(axes: np.ndarray, data: xr.Dataset, dims: list[str], aesthetics: dict[str, Any]) -> PlotCollection:
    shape = tuple(data.sizes[dim] for dim in dims)
    if axes.size != np.prod(shape):
        raise LaplodeError(f"`axes` must be {int(np.prod(shape))}, of shape {shape}; got {axes.size}.")
    figure = np.array(axes.flat[0].figure, dtype=object)
    known = {"figure": ((), figure), "plot": (dims, axes.reshape(shape))}
    viz = xr.DataTree(xr.Dataset(known, {dim: data[dim] for dim in dims}))
    return PlotCollection(data, viz, backend="matplotlib", **aesthetics)


def drawing(plots: PlotCollection) -> Any:
    """ArviZ's drawing functions for the backend of a picture."""
    return import_module(f"arviz_plots.backend.{plots.backend}")


def pick(name: str, wanted: Sequence[Any], known: Sequence[Any]) -> list[int]:
    """The places of what is wanted among the labels that are known, or an error that lists them."""
    if isinstance(wanted, str) or not len(wanted) or any(label not in known for label in wanted):
        raise LaplodeError(f"`{name}` must be some of {list(known)}, got {wanted!r}.")
    return [list(known).index(label) for label in wanted]


def titled(kind: str, label: Any) -> str:
    """A name as it is, a number with what it is a number of."""
    return str(label) if isinstance(label, str) else f"{kind} {label}"


def annotate(
    plots: PlotCollection, place: dict[str, Any], *, x: str | None, y: str | None, title: str | None = None, **options
) -> None:
    """Write what a panel shows, and along its axes."""
    panel = plots.get_target(None, place)
    for write, text in ((drawing(plots).xlabel, x), (drawing(plots).ylabel, y)):
        if text is not None:
            write(text, panel)
    if title is not None:
        drawing(plots).title(title, panel, **options)
    if plots.backend == "matplotlib" and panel.get_xscale() == panel.get_yscale() == "linear":
        panel.ticklabel_format(useOffset=False)  # years are not offsets from 1900


def xy(values: np.ndarray) -> xr.Dataset:
    """Points (2, n) as ArviZ's drawing functions take them."""
    return xr.Dataset({"f": (("plot_axis", "point"), values)}, {"plot_axis": ["x", "y"]})


def broken(paths: Float[np.ndarray, "2 G n"]) -> xr.Dataset:
    """Many paths as one, with gaps."""
    gaps = np.full((*paths.shape[:2], 1), np.nan)
    return xy(np.concatenate([paths, gaps], axis=-1).reshape(2, -1))


def ribbon(da: xr.DataArray, target: Any, *, x: xr.DataArray, high: xr.DataArray, **style: Any) -> Any:
    """Fill from `da` up to `high`."""
    return visuals.fill_between_y(da, target, x=x.values, y_bottom=da.values, y_top=high.values, **style)


def lines(da: xr.DataArray, target: Any, *, x: xr.DataArray, **style: Any) -> Any:
    """One line for each draw."""
    return visuals.multiple_lines(da, target, "time", xvalues=x.values, **style)

"""Pictures that ArviZ does not have, on its PlotCollection."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from arviz_base import rcParams
from arviz_plots import visuals
from arviz_plots.plot_collection import PlotCollection
from arviz_stats.base import array_stats  # pyright: ignore[reportPrivateImportUsage]
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.colors import to_hex, to_rgb
from matplotlib.lines import Line2D

from ._arviz import to_datatree
from ._curvature import (
    AbstractCurvature,
    BlockCurvature,
    DenseCurvature,
    DiagonalCurvature,
    EigenCurvature,
    FactoredCurvature,
)
from ._errors import LaplodeError, choose
from ._function import predict_field
from ._model import NeuralODE, starts
from ._posterior import AbstractPosterior, Posterior
from ._predict import Predictions
from ._prior import check_independent, prior_vectors
from ._problem import AbstractLikelihood, Trajectories, check_count, check_key

# From the color-blind safe palette of Okabe and Ito.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GRAY = "#595959"
_BACKENDS = ("matplotlib", "plotly", "bokeh")


# ---- Trajectories over time


def plot_trajectories(
    source: xr.DataTree | AbstractPosterior,
    *predictions: Predictions,
    held_out: Trajectories | None = None,
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
    - `prob`: probability within the central ribbons.
    - `num_draws`: how many noise-free draws to show.
    - `trajectories`: labels of the trajectories to show; the first four by default.
    - `labels`: for "time" and "y".
    - `axes`: Matplotlib axes to draw on, of shape (trajectories, channels).
    - `backend`: "matplotlib", "plotly" or "bokeh"; ArviZ's setting by default.

    **Returns:** ArviZ's `PlotCollection`: `.savefig(path)` and `.show()`, the axes under `.viz["plot"]`, shape
    (trajectories, channels), and what is drawn on them under `.viz["ribbon"]`, "noise_ribbon", "draws", "median",
    "data", "held_out" and "horizon", with "_forecast" after the name where a second prediction is drawn.

    **Raises:** `LaplodeError` when there is nothing to plot, or a trajectory is unknown.
    """
    _check_prob(prob)
    tree = to_datatree(source, *predictions) if isinstance(source, AbstractPosterior) else source
    if not isinstance(tree, xr.DataTree):
        raise LaplodeError(f"`source` must be a DataTree from to_datatree, or a posterior; got {type(tree).__name__}.")
    groups = [name for name in ("posterior_predictive", "predictions") if name in tree.children]
    if not groups:
        raise LaplodeError("`source` has no predictions: pass some from laplode.predict to to_datatree.")
    segments = [_segment(tree, name) for name in groups]
    if len(segments) == 2 and _covers(segments[1]["ts"], segments[0]["ts"]):
        segments = segments[1:]
    observed = tree["observed_data"].to_dataset()["y"]
    same = all(np.array_equal(s["trajectory"], observed["trajectory"]) for s in segments)
    known = list(segments[0]["trajectory"].values)
    names = known[:4] if trajectories is None else list(trajectories)
    if not names or any(name not in known for name in names):
        raise LaplodeError(f"`trajectories` must be some of {known}, got {names}.")
    segments = [segment.sel(trajectory=names) for segment in segments]
    channels = segments[0]["channel"].values
    plots = _grid(
        segments[0][["f"]],
        rows="trajectory",
        cols="channel",
        size=(4.8 * len(channels), 2.9 * len(names) + 0.4),
        axes=axes,
        backend=backend,
        aes={"color": ["channel"]},
        color=_COLORS,
    )
    for end, segment in zip(("", "_forecast"), segments, strict=False):
        _draw_segment(plots, segment, prob, num_draws, end)
    percent = f"{100 * prob:g}%"
    entries = [
        (f"{percent} with noise", dict(color=_COLORS[0], alpha=0.18, width=8)),
        (f"{percent} noise-free", dict(color=_COLORS[0], alpha=0.45, width=8)),
        ("draws", dict(color=_COLORS[0], alpha=0.6, width=0.5)),
        ("median", dict(color=_COLORS[0], width=1.8)),
    ]
    if same:
        observed = observed.sel(trajectory=names)
        times = tree["constant_data"].to_dataset()["ts"].sel(trajectory=names)
        entries += _draw_observations(plots, observed, times, segments)
        if held_out is not None:
            rows = [known.index(name) for name in names]
            # Of the shape of the observations but for the times, which have no coordinates here.
            like = dict(trajectory=names, channel=channels)
            ys = xr.DataArray(held_out.ys[rows], like, ["trajectory", "time", "channel"], name="y")
            ts = xr.DataArray(held_out.ts[rows], dict(trajectory=names), ["trajectory", "time"])
            style = dict(facecolor="white", edgecolor="black", marker="C0", size=22)
            _put(plots, visuals.scatter_xy, "held_out", ys.to_dataset(), style, x=ts)
            entries.append(("held out", dict(edgecolor="black", marker="o", facecolor="white")))
    labels = labels or {}
    for row, name in enumerate(names):
        for column, channel in enumerate(channels):
            place = {"trajectory": name, "channel": channel}
            title = _title("channel", channel) + (f", {_title('trajectory', name)}" if len(names) > 1 else "")
            _label(
                plots,
                place,
                title=title,
                x=labels.get("time", "time") if row == len(names) - 1 else None,
                y=labels.get("y", "y") if column == 0 else None,
            )
    _legend(plots, entries)
    return plots


def _check_prob(prob: Any) -> None:
    if not isinstance(prob, float | np.floating) or not 0 < prob < 1:
        raise LaplodeError(f"`prob` must lie between 0 and 1, got {prob!r}.")


def _covers(these: xr.DataArray, those: xr.DataArray) -> bool:
    return bool(these.min() <= those.min() and these.max() >= those.max())


def _segment(tree: xr.DataTree, group: str) -> xr.Dataset:
    """Noisy draws y and noise-free draws f of one group, with their times ts."""
    constant = "constant_data" if group == "posterior_predictive" else "predictions_constant_data"
    draws = tree[group].to_dataset()[["y", "f"]].stack(sample=("chain", "draw")).drop_vars(["sample", "chain", "draw"])
    return draws.assign(ts=tree[constant].to_dataset()["ts"])


def _draw_segment(plots: PlotCollection, segment: xr.Dataset, prob: float, num_draws: int, end: str) -> None:
    tails = [(1 - prob) / 2, (1 + prob) / 2]
    ts = segment["ts"]
    for variable, alpha, label in (("y", 0.18, "noise_ribbon"), ("f", 0.35, "ribbon")):
        low, high = segment[variable].quantile(tails, dim="sample").transpose("quantile", ...)
        data = low.drop_vars("quantile").to_dataset(name="f")
        _put(plots, _ribbon, label + end, data, dict(alpha=alpha), x=ts, high=high.drop_vars("quantile"))
    few = segment[["f"]].isel(sample=slice(num_draws))
    if num_draws > 0:
        _put(plots, _lines, "draws" + end, few, dict(width=0.5, alpha=0.6), x=ts)
    _put(plots, visuals.line_xy, "median" + end, segment[["f"]].median("sample"), dict(width=1.8), x=ts)


def _draw_observations(
    plots: PlotCollection, observed: xr.DataArray, times: xr.DataArray, segments: list[xr.Dataset]
) -> list[tuple[str, dict[str, Any]]]:
    """The data, and where forecasting starts; what to say of them in a legend."""
    style = dict(color="black", marker="C0", size=16)
    data = observed.to_dataset(name="y")
    _put(plots, visuals.scatter_xy, "data", data, style, x=times)
    entries: list[tuple[str, dict[str, Any]]] = [("data", dict(color="black", marker="o"))]
    # One horizon a trajectory: the last time at which anything was seen of it.
    seen = observed.notnull().any("channel").transpose("trajectory", "time")
    horizon = xr.where(seen, times, -np.inf).max("time")
    last = xr.concat([segment["ts"].max("time") for segment in segments], "segment").max("segment")
    horizon = horizon.where(last > horizon)
    if np.any(np.isfinite(horizon)):
        lines = horizon.expand_dims(channel=observed["channel"]).transpose("trajectory", "channel").to_dataset(name="y")
        dashed = dict(color=_GRAY, linestyle="C1", width=1)
        _put(plots, visuals.vline, "horizon", lines, dashed)
        entries.append(("last observation fitted", dashed))
    return entries


# ---- Phase portrait


def plot_phase(
    posterior: AbstractPosterior,
    *predictions: Predictions,
    channels: tuple[int, int] = (0, 1),
    trajectory: int = 0,
    prob: float = 0.9,
    num_draws: int = 12,
    field: bool | None = None,
    labels: Sequence[str] | None = None,
    held_out: Trajectories | None = None,
    axes: Any = None,
    backend: str | None = None,
) -> PlotCollection:
    """One channel against another: trajectories from the posterior over the vector field.

    Thin lines are noise-free draws, orange after the last observation. Each ring holds `prob` of the prediction at one
    time, by the covariance of the draws. Arrows have the direction of the fitted vector field, seen through `observe`;
    they are pale where the posterior hardly knows it: where the field's standard deviation is above a third of its
    length, and almost white where it is above its length.

    **Arguments:**

    - `posterior`: from `laplace` or `mixture`.
    - `predictions`: from `predict`, on the observed times or others, fine enough to draw lines through.
    - `channels`: which two, horizontal and vertical.
    - `trajectory`: which one, by its number.
    - `prob`: probability within a ring.
    - `num_draws`: how many draws to show.
    - `field`: whether to draw the vector field, which takes a `NeuralODE` of D = 2 states without `args`. By default
        wherever there is such a model.
    - `labels`: of the two axes.
    - `held_out`: trajectories that were not fitted, drawn as open circles.
    - `axes`: a Matplotlib axis to draw on.
    - `backend`: "matplotlib", "plotly" or "bokeh"; ArviZ's setting by default.

    **Returns:** ArviZ's `PlotCollection`, with "draws", "draws_forecast", "median", "rings", "data", "held_out" and
    "field", "field_uncertain", "field_unknown" under `.viz`.

    **Raises:** `LaplodeError` when there is nothing to plot, or the vector field was asked for and can't be drawn.
    """
    _check_prob(prob)
    if not isinstance(posterior, AbstractPosterior):
        raise LaplodeError(f"`posterior` must come from laplode.laplace, got {type(posterior).__name__}.")
    if not predictions or not all(isinstance(item, Predictions) for item in predictions):
        raise LaplodeError("`predictions` must be some from laplode.predict.")
    item = max(predictions, key=lambda item: item.ts.shape[1])
    num, _, num_channels = item.mean.shape
    if len(set(channels)) != 2 or not all(0 <= k < num_channels for k in channels):
        raise LaplodeError(f"`channels` must be two of the {num_channels} channels by number, got {channels}.")
    if not 0 <= trajectory < num:
        raise LaplodeError(f"`trajectory` must be one of {num} by number, got {trajectory}.")
    model, data, likelihood = posterior.parameters.model, posterior.problem.data, posterior.problem.likelihood
    can = isinstance(model, NeuralODE) and data.args is None and _num_states(model, data) == 2
    if field and not can:
        raise LaplodeError("`field`: only of a NeuralODE with D = 2 states and without `args` is the field a picture.")
    pair = list(channels)
    ts, draws = item.ts[trajectory], np.asarray(item.epistemic)[np.asarray(item.ok), trajectory][..., pair]
    median = np.median(draws, axis=0)
    paths = xr.Dataset({"f": (("plot_axis", "draw", "time"), np.moveaxis(draws, -1, 0))}, {"plot_axis": ["x", "y"]})
    plots = _grid(paths, size=(6.4, 5.6), axes=axes, backend=backend)
    names = list(labels) if labels is not None else [_title("channel", k) for k in pair]
    same = num == data.ts.shape[0]
    ys = data.ys[trajectory][:, pair] if same else np.full((1, 2), np.nan)
    later = same & (ts >= data.ts[trajectory][np.any(data.observed[trajectory], axis=1)].max())
    # A few draws that go far away would leave no room for the others.
    most = np.quantile(draws.reshape(-1, 2), [0.02, 0.98], axis=0)
    shown = [median, ys, most] + ([] if held_out is None else [held_out.ys[trajectory][:, pair]])
    low, high = np.nanmin(np.concatenate(shown), axis=0), np.nanmax(np.concatenate(shown), axis=0)
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)

    entries: list[tuple[str, dict[str, Any]]] = []
    if can if field is None else field:
        entries += _draw_field(plots, posterior, item, trajectory, pair, low, high)
    few = paths["f"].isel(draw=slice(num_draws))
    parts = [("draws", "draws", ~later | np.roll(~later, 1), _COLORS[0])]  # up to the first later time, to join them
    if np.sum(later) > 1 and not np.all(later):
        parts.append(("draws_forecast", "draws, forecast", later, _COLORS[1]))
    elif np.all(later):
        parts = [("draws", "draws, forecast", later, _COLORS[1])]
    for label, text, where, color in parts:
        style = dict(color=color, width=0.6, alpha=0.45)
        lines = _broken(few.values[:, :, where])
        _put(plots, visuals.line_xy, label, _xy(lines), style)
        entries.append((text, style))
    style = dict(color="black", width=1.6)
    _put(plots, visuals.line_xy, "median", _xy(median.T), style)
    entries.append(("median", style))
    chosen = np.unique(np.linspace(0, len(ts) - 1, 6).astype(int))
    rings = _broken(
        np.stack([_ring(None if item.scale is not None else likelihood, draws[:, i], prob) for i in chosen], axis=1)
    )
    style = dict(color="black", width=0.8, linestyle="C2")
    _put(plots, visuals.line_xy, "rings", _xy(rings), style)
    entries.append((f"{100 * prob:g}% at one time", style))
    if same:
        style = dict(color="black", marker="C0", size=20)
        _put(plots, visuals.scatter_xy, "data", _xy(ys.T), style)
        entries.append(("data", dict(color="black", marker="o")))
    if held_out is not None:
        style = dict(facecolor="white", edgecolor="black", marker="C0", size=24)
        _put(plots, visuals.scatter_xy, "held_out", _xy(held_out.ys[trajectory][:, pair].T), style)
        entries.append(("held out", dict(edgecolor="black", marker="o", facecolor="white")))
    _label(plots, {}, title=None, x=names[0], y=names[1])
    drawing, panel = _drawing(plots), plots.get_target(None, {})
    drawing.xlim((low[0], high[0]), panel)
    drawing.ylim((low[1], high[1]), panel)
    _legend(plots, entries, columns=3)
    return plots


def _num_states(model: NeuralODE, data: Trajectories) -> int:
    return data.y0.shape[1] if data.y0 is not None else 0 if model.y0 is None else model.y0.shape[-1]


def _ring(
    likelihood: AbstractLikelihood | None, draws: Float[np.ndarray, "S 2"], prob: float
) -> Float[np.ndarray, "2 A"]:
    """What holds `prob` of draws: an ellipse, in the coordinate in which linearized predictions are Gaussian."""
    if likelihood is not None:
        draws = np.asarray(likelihood.stabilize(jnp.asarray(draws)))
    angle = np.linspace(0, 2 * np.pi, 41)
    eigenvalues, vectors = np.linalg.eigh(np.cov(draws.T))
    root = vectors * np.sqrt(np.maximum(eigenvalues, 0))
    radius = np.sqrt(-2 * np.log1p(-prob))  # of a chi-squared with two degrees of freedom
    ring = np.mean(draws, axis=0)[:, None] + radius * root @ np.stack([np.cos(angle), np.sin(angle)])
    return ring if likelihood is None else np.asarray(likelihood.unstabilize(jnp.asarray(ring)))


# Arrows along each axis.
_CELLS = 15
# The standard deviation of the vector field over its length, beyond which arrows are paler, and how they are drawn.
_ARROWS = (
    (0.0, "field", "vector field", "#6b6b6b"),
    (1 / 3, "field_uncertain", "the same, sd above 1/3 of it", "#b3b3b3"),
    (1.0, "field_unknown", "the same, sd above itself", "#dedede"),
)


def _draw_field(
    plots: PlotCollection, posterior: AbstractPosterior, item: Predictions, trajectory: int, pair: list[int], low, high
) -> list[tuple[str, dict[str, Any]]]:
    model = posterior.parameters.model
    assert isinstance(model, NeuralODE)
    y0 = starts(model, posterior.problem.data.y0, len(posterior.problem.data.ts))
    y0 = None if y0 is None else y0[trajectory]
    see = lambda y: model.observe_states(y[None], None)[0][jnp.asarray(pair)]
    lower, upper = low, high
    if model.observe is not None:  # the states behind the picture lie around those that the fitted model goes through
        ts = np.concatenate([posterior.problem.data.ts[trajectory, :1], item.ts[trajectory]])
        states = np.asarray(_states(model, np.unique(ts), y0))
        lower, upper = np.min(states, axis=0), np.max(states, axis=0)
        lower, upper = lower - 0.5 * (upper - lower), upper + 0.5 * (upper - lower)
    elif pair == [1, 0]:
        lower, upper = low[::-1], high[::-1]
    mesh = np.meshgrid(*(np.linspace(a, b, 61) for a, b in zip(lower, upper, strict=True)), indexing="ij")
    states = np.stack([axis.ravel() for axis in mesh], axis=-1)
    # One arrow for each cell of the picture.
    cells = _CELLS * (np.asarray(jax.vmap(see)(jnp.asarray(states))) - low) / (high - low)
    states, cells = (x[np.all((cells >= 0) & (cells < _CELLS), axis=1)] for x in (states, cells))
    off = np.sum((cells % 1 - 0.5) ** 2, axis=1)
    order = np.argsort(off, kind="stable")
    states = states[order[np.unique(np.floor(cells[order]), axis=0, return_index=True)[1]]]
    found = predict_field(posterior, states, num_samples=1, key=jax.random.key(0), progress=False)  # no draws are used
    ratio = np.linalg.norm(found.std, axis=1) / np.linalg.norm(found.mean, axis=1)
    at, along = jax.vmap(lambda y, dy: jax.jvp(see, (y,), (dy,)))(jnp.asarray(states), found.mean)
    arrows = _arrows(np.asarray(at), np.asarray(along), high - low)
    entries = []
    edges = [edge for edge, *_ in _ARROWS] + [np.inf]
    for (edge, label, text, color), following in zip(_ARROWS, edges[1:], strict=True):
        chosen = (ratio >= edge) & (ratio < following)
        if np.any(chosen):
            style = dict(color=color, width=0.8)
            _put(plots, visuals.line_xy, label, _xy(_broken(arrows[:, chosen])), style)
            entries.append((text, style))
    return entries


def _states(model: NeuralODE, ts, y0) -> Float[Array, "T D"]:
    plain = NeuralODE(
        model.vector_field,
        y0=model.y0,
        solver=model.solver,
        stepsize_controller=model.stepsize_controller,
        dt0=model.dt0,
        max_steps=model.max_steps,
    )
    return plain(ts, y0)


def _arrows(at: Float[np.ndarray, "G 2"], along: Float[np.ndarray, "G 2"], size: Float[np.ndarray, " 2"]):
    """Arrows of one length on the screen as paths (2, G, 5): to the tip, to one side, to the tip, to the other side."""
    unit = along / size
    unit = 0.042 * unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-300)
    side = np.stack([-unit[:, 1], unit[:, 0]], axis=1)
    tail, tip = at / size - unit / 2, at / size + unit / 2
    barbs = [tip - 0.3 * unit + 0.16 * side, tip - 0.3 * unit - 0.16 * side]
    return np.moveaxis(np.stack([tail, tip, barbs[0], tip, barbs[1]], axis=1) * size, -1, 0)


# ---- Spectrum of the curvature


def plot_spectrum(posterior: AbstractPosterior, *, axes: Any = None, backend: str | None = None) -> PlotCollection:
    """The eigenvalues of the likelihood's curvature against the precision of the prior.

    Eigenvalues above the prior's precision are directions that the data determine. With a prior that is not the same
    for all parameters, they are those of Λ0^-½ H Λ0^-½, in units of the prior, and the line stands at 1. Negative ones
    are drawn by their absolute value, as open circles; of H as it was found, before regularization.

    **Arguments:**

    - `posterior`: from `laplace`. Of a mixture, its heaviest component is drawn.
    - `axes`: a Matplotlib axis to draw on.
    - `backend`: "matplotlib", "plotly" or "bokeh"; ArviZ's setting by default.

    **Returns:** ArviZ's `PlotCollection`, with "eigenvalues", "negative", "prior" and "effective_dof" under `.viz`.

    **Raises:** `LaplodeError` when `posterior` is none, or its prior is the posterior of other data.
    """
    if not isinstance(posterior, AbstractPosterior):
        raise LaplodeError(f"`posterior` must come from laplode.laplace, got {type(posterior).__name__}.")
    one: Posterior = posterior.components[0]
    check_independent(
        one.problem.prior, "`posterior`", "no one line stands for it. Draw the posterior of all data together."
    )
    _, precision = prior_vectors(one.problem.prior, one.parameters)
    precision = np.asarray(precision)
    uniform = bool(np.all(precision == precision[0]))
    unit = float(precision[0]) if uniform else 1.0
    values = unit * np.sort(_relative_spectrum(one.curvature, precision))[::-1]
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


def _relative_spectrum(curvature: AbstractCurvature, precision: Float[np.ndarray, " P"]) -> Float[np.ndarray, " R"]:
    """Eigenvalues of Λ0^-½ H Λ0^-½, as many as the curvature knows of."""
    root = np.sqrt(precision)
    if isinstance(curvature, DenseCurvature):
        return np.linalg.eigvalsh(np.asarray(curvature.matrix) / root / root[:, None])
    if isinstance(curvature, BlockCurvature):
        stops = np.cumsum([len(block.matrix) for block in curvature.blocks])[:-1]
        pieces = zip(curvature.blocks, np.split(precision, stops), strict=True)
        return np.concatenate([_relative_spectrum(block, piece) for block, piece in pieces])
    if isinstance(curvature, DiagonalCurvature):
        return np.asarray(curvature.diagonal) / precision
    if isinstance(curvature, FactoredCurvature):
        half = np.sqrt(np.asarray(curvature.weights))[:, None] * np.asarray(curvature.factor) / root
        return np.linalg.eigvalsh(half @ half.T if half.shape[0] <= half.shape[1] else half.T @ half)
    assert isinstance(curvature, EigenCurvature)
    # Λ0^-½ V diag(x) Vᵀ Λ0^-½ has the eigenvalues of the small matrix R diag(x) Rᵀ, with Λ0^-½ V = Q R.
    small: Any = np.linalg.qr((np.asarray(curvature.vectors) / root).T, mode="r")
    return np.linalg.eigvalsh((small * np.asarray(curvature.eigenvalues)) @ small.T)


# ---- Correlation in time


def plot_time_correlation(
    predictions: Predictions | xr.DataTree,
    *,
    trajectory: int = 0,
    channels: Sequence[Any] | None = None,
    labels: Mapping[str, str] | None = None,
) -> PlotCollection:
    """How the noise-free prediction at one time goes with that at another: a heat map for each pair of channels.

    **Arguments:**

    - `predictions`: from `predict`: if linearized, correlations are in closed form, otherwise of the draws. Or a
        DataTree from `to_datatree`, for the draws of its `predictions`, or else of its `posterior_predictive`, and for
        the names of its channels.
    - `trajectory`: which one, by its number.
    - `channels`: names of the channels, where `predictions` do not have them.
    - `labels`: for "time".

    **Returns:** ArviZ's `PlotCollection`, with "correlation" under `.viz`. It is drawn by Matplotlib:
    ArviZ's plots have no heat maps.

    **Raises:** `LaplodeError` when there is nothing to plot.
    """
    if isinstance(predictions, xr.DataTree):
        groups = [name for name in ("predictions", "posterior_predictive") if name in predictions.children]
        if not groups:
            raise LaplodeError("`predictions` is a DataTree without predictions: pass some to to_datatree.")
        segment = _segment(predictions, groups[0])
        ts = segment["ts"].transpose("trajectory", "time").values
        draws = segment["f"].transpose("sample", "trajectory", "time", "channel").values
        channels = list(segment["channel"].values) if channels is None else channels
    elif isinstance(predictions, Predictions):
        ts, draws = predictions.ts, np.asarray(predictions.epistemic)[np.asarray(predictions.ok)]
    else:
        got = type(predictions).__name__
        raise LaplodeError(f"`predictions` must come from laplode.predict or laplode.to_datatree, got {got}.")
    num, length, num_channels = draws.shape[1:]
    if not 0 <= trajectory < num:
        raise LaplodeError(f"`trajectory` must be one of {num} by number, got {trajectory}.")
    names = [_title("channel", k) for k in (range(num_channels) if channels is None else channels)]
    if len(names) != num_channels:
        raise LaplodeError(f"`channels` has {len(names)} names, but there are {num_channels}.")
    if isinstance(predictions, Predictions) and predictions.method == "linearized":
        covariance = np.asarray(predictions.covariance()[trajectory])
    else:
        covariance = np.cov(draws[:, trajectory].reshape(len(draws), -1).T)
    std = np.sqrt(np.diagonal(covariance))
    # What is known, as a given initial state, goes with nothing.
    std = np.where(std > 1e-9 * np.max(std), std, np.nan)
    correlation = (covariance / std / std[:, None]).reshape(length, num_channels, length, num_channels)
    dims = ("time", "channel", "other_time", "other_channel")
    data = xr.Dataset({"correlation": (dims, correlation)}, {"channel": names, "other_channel": names})
    side = 3.2 if num_channels > 1 else 4.4
    plots = _grid(
        data,
        rows="channel",
        cols="other_channel",
        size=(side * num_channels + 1.0, side * num_channels),
        square=True,
        backend="matplotlib",
    )
    _put(plots, _heat, "correlation", data, {}, ts=ts[trajectory])
    time = (labels or {}).get("time", "time")
    for row, name in enumerate(names):
        for column, other in enumerate(names):
            place = {"channel": name, "other_channel": other}
            _label(
                plots,
                place,
                title=None,
                x=f"{other}, {time}" if row == num_channels - 1 else None,
                y=f"{name}, {time}" if column == 0 else None,
            )
            _drawing(plots).set_ticklabel_visibility(
                plots.get_target(None, place), axis="x", visible=row == num_channels - 1
            )
            _drawing(plots).set_ticklabel_visibility(plots.get_target(None, place), axis="y", visible=column == 0)
    panels: np.ndarray = plots.viz["plot"].to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
    figure = panels.flat[0].figure
    drawn = plots.viz["correlation"]["correlation"].to_numpy().flat[0]
    figure.colorbar(drawn, ax=list(panels.flat), label="correlation", shrink=0.8)
    return plots


def _heat(da: xr.DataArray, target: Any, *, ts: Float[np.ndarray, " T"]) -> Any:
    values = da.transpose("time", "other_time").values
    target.set_aspect("equal")
    target.set_facecolor("0.85")
    return target.pcolormesh(ts, ts, values, shading="nearest", cmap="RdBu_r", vmin=-1, vmax=1, rasterized=True)


# ---- Marginals of the parameters


def plot_marginals(
    source: xr.DataTree | AbstractPosterior,
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
    if isinstance(source, AbstractPosterior):
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

"""A phase portrait over the vector field."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from arviz_plots import visuals
from arviz_plots.plot_collection import PlotCollection
from jaxtyping import Array, Float

from ..._errors import LaplodeError
from ..._model.neural_ode import NeuralODE, starts
from ..._posterior.posterior import Posterior
from ..._predict.function import field_at, predict_function
from ..._predict.predictions import Predictions
from ..._problem.data import Trajectories
from ..._problem.likelihood import AbstractLikelihood
from .shared import _COLORS, _broken, _check_prob, _drawing, _grid, _label, _legend, _put, _title, _xy

# ---- Phase portrait


def plot_phase(
    posterior: Posterior,
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

    - `posterior`: from `laplace`.
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
    if not isinstance(posterior, Posterior):
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
    ts, draws = item.ts[trajectory], np.asarray(item.f)[np.asarray(item.ok), trajectory][..., pair]
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
    plots: PlotCollection, posterior: Posterior, item: Predictions, trajectory: int, pair: list[int], low, high
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
    # No draws are used.
    found = predict_function(posterior, field_at(states), num_samples=1, key=jax.random.key(0), progress=False)
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

"""A phase portrait over the vector field."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from arviz_plots import visuals
from arviz_plots.plot_collection import PlotCollection
from jaxtyping import Bool, Float

from ..._checks import check_fraction, check_from
from ..._errors import LaplodeError
from ..._model.neural_ode import NeuralODE, starts
from ..._posterior.posterior import Posterior
from ..._predict.function import field_at, predict_function
from ..._predict.predictions import Predictions
from ..._problem.data import Trajectories
from ..._problem.likelihood import AbstractLikelihood
from .shared import COLORS, DATA, HELD_OUT, Layer, annotate, broken, draw_layers, drawing, panels, pick, titled, xy


def plot_phase(
    posterior: Posterior,
    *predictions: Predictions,
    channels: Sequence[Any] | None = None,
    trajectory: Any = None,
    prob: float = 0.9,
    num_draws: int = 12,
    field: bool | None = None,
    labels: Mapping[Any, str] | None = None,
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
    - `channels`: which two, horizontal and vertical, by the names in the data, or by number where those have none; the
        first two by default.
    - `trajectory`: which one, by name or number likewise; the first by default.
    - `prob`: probability within a ring.
    - `num_draws`: how many draws to show.
    - `field`: whether to draw the vector field, which takes a `NeuralODE` of D = 2 states without `args`. By default
        wherever there is such a model.
    - `labels`: of channels, for the axes, such as `{"hare": "hares (thousands)"}`.
    - `held_out`: trajectories that were not fitted, drawn as open circles.
    - `axes`: a Matplotlib axis to draw on.
    - `backend`: "matplotlib", "plotly" or "bokeh"; ArviZ's setting by default.

    **Returns:** ArviZ's `PlotCollection`, with "draws", "draws_forecast", "median", "rings", "data", "held_out" and
    "field", "field_uncertain", "field_unknown" under `.viz`.

    **Raises:** `LaplodeError` when there is nothing to plot, or the vector field was asked for and can't be drawn.
    """
    check_fraction("prob", prob)
    check_from("posterior", posterior, Posterior, "laplace")
    if not predictions or not all(isinstance(item, Predictions) for item in predictions):
        raise LaplodeError("`predictions` must be some from laplode.predict.")
    item, data = max(predictions, key=lambda item: item.ts.shape[1]), posterior.problem.data
    num, _, num_channels = item.mean.shape
    same = num == data.ts.shape[0]
    known = list(data.channels or range(num_channels))
    chosen = known[:2] if channels is None else list(channels)
    pair = pick("channels", chosen, known)
    if len(set(pair)) != 2 or len(pair) != 2:
        raise LaplodeError(f"`channels` must be two of {known}, got {chosen}.")
    numbered = list((data.trajectories if same else None) or range(num))
    (row,) = pick("trajectory", [numbered[0] if trajectory is None else trajectory], numbered)
    can = data.args is None and posterior.flow.num_states == 2
    if field and not can:
        raise LaplodeError("`field`: only of a NeuralODE with D = 2 states and without `args` is the field a picture.")
    every = np.asarray(item.f)[np.asarray(item.ok), row]
    draws = every[..., pair]
    median = np.median(draws, axis=0)
    seen = [data.ys[row][:, pair]] if same else []
    unseen = [] if held_out is None else [held_out.ys[row][:, pair]]
    # The draws of a noise scale that the model predicts are not among these.
    likelihood = None if item.scale is not None else posterior.problem.likelihood
    times = np.unique(np.linspace(0, draws.shape[1] - 1, 6).astype(int))
    rings = np.stack([_ring(likelihood, every[:, i], pair, prob) for i in times], axis=1)
    low, high = _window(draws, rings, [median, *seen, *unseen])
    layers = [*_field_layers(posterior, item, row, pair, low, high)] if (can if field is None else field) else []
    last = data.ts[row][np.any(data.observed[row], axis=1)].max() if same else np.inf
    layers += _draw_layers(draws[:num_draws], item.ts[row] >= last)
    layers.append(Layer("median", visuals.line_xy, xy(median.T), dict(color="black", width=1.6), "median"))
    dotted = dict(color="black", width=0.8, linestyle="C2")
    layers.append(Layer("rings", visuals.line_xy, broken(rings), dotted, f"{100 * prob:g}% at one time"))
    layers += [Layer("data", visuals.scatter_xy, xy(ys.T), DATA | {"size": 20}, "data") for ys in seen]
    layers += [Layer("held_out", visuals.scatter_xy, xy(ys.T), HELD_OUT | {"size": 24}, "held out") for ys in unseen]
    plots = panels(xy(median.T), size=(6.4, 5.6), axes=axes, backend=backend)
    x, y = ((labels or {}).get(name, titled("channel", name)) for name in chosen)
    annotate(plots, {}, x=x, y=y)
    draw_layers(plots, layers, columns=3)
    panel = plots.get_target(None, {})
    drawing(plots).xlim((low[0], high[0]), panel)
    drawing(plots).ylim((low[1], high[1]), panel)
    return plots


def _window(
    draws: Float[np.ndarray, "S T 2"], rings: Float[np.ndarray, "2 R A"], others: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest values shown."""
    # A few draws that go far away would leave no room for the others.
    most = np.quantile(draws.reshape(-1, 2), [0.02, 0.98], axis=0)
    shown = np.concatenate([most, *others])
    low, high = np.nanmin(shown, axis=0), np.nanmax(shown, axis=0)
    # There is room for rings too, unless these go far beyond the rest.
    some, room = rings.reshape(2, -1).T, (high - low) / 2
    low = np.maximum(np.minimum(low, np.nanmin(some, axis=0)), low - room)
    high = np.minimum(np.maximum(high, np.nanmax(some, axis=0)), high + room)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _draw_layers(draws: Float[np.ndarray, "S T 2"], later: Bool[np.ndarray, " T"]) -> Iterator[Layer]:
    """Draws until the last observation, and after it."""
    before = ~later | np.roll(~later, 1)  # up to the first later time, to join them
    parts = [("draws", "draws", before, COLORS[0])] if not np.all(later) else []
    if np.sum(later) > 1:
        parts.append(("draws_forecast", "draws, forecast", later, COLORS[1]))
    for label, text, where, color in parts:
        paths = broken(np.moveaxis(draws[:, where], -1, 0))
        yield Layer(label, visuals.line_xy, paths, dict(color=color, width=0.6, alpha=0.45), text)


def _ring(
    likelihood: AbstractLikelihood | None, draws: Float[np.ndarray, "S K"], pair: list[int], prob: float
) -> Float[np.ndarray, "2 A"]:
    """What holds `prob` of draws: an ellipse, in the coordinate in which linearized predictions are Gaussian."""
    if likelihood is not None:
        draws = np.asarray(likelihood.stabilize(jnp.asarray(draws)))
    middle = np.mean(draws, axis=0)
    angle = np.linspace(0, 2 * np.pi, 41)
    eigenvalues, vectors = np.linalg.eigh(np.cov(draws[:, pair].T))
    root = vectors * np.sqrt(np.maximum(eigenvalues, 0))
    radius = np.sqrt(-2 * np.log1p(-prob))  # of a chi-squared with two degrees of freedom
    ring = np.tile(middle, (len(angle), 1))
    ring[:, pair] += radius * np.stack([np.cos(angle), np.sin(angle)], axis=1) @ root.T
    return (ring if likelihood is None else np.asarray(likelihood.unstabilize(jnp.asarray(ring))))[:, pair].T


# Arrows along each axis.
_CELLS = 15


# The standard deviation of the vector field over its length, beyond which arrows are paler, and how they are drawn.
_ARROWS = (
    (0.0, "field", "vector field", "#6b6b6b"),
    (1 / 3, "field_uncertain", "the same, sd above 1/3 of it", "#b3b3b3"),
    (1.0, "field_unknown", "the same, sd above itself", "#dedede"),
)


def _field_layers(
    posterior: Posterior, item: Predictions, row: int, pair: list[int], low: np.ndarray, high: np.ndarray
) -> Iterator[Layer]:
    model = posterior.parameters.model
    assert isinstance(model, NeuralODE)
    see = lambda y: model.observe_states(y[None], None)[0][jnp.asarray(pair)]
    if model.observe is not None:  # the states behind the picture lie around those that the fitted model goes through
        y0 = starts(model, posterior.problem.data.y0, len(posterior.problem.data.ts))
        ts = np.unique(np.concatenate([posterior.problem.data.ts[row, :1], item.ts[row]]))
        whole = eqx.tree_at(lambda m: (m.observe, m.scale), model, (None, None), is_leaf=lambda x: x is None)
        states = np.asarray(whole(ts, None if y0 is None else y0[row]))
        lower, upper = np.min(states, axis=0), np.max(states, axis=0)
        lower, upper = lower - 0.5 * (upper - lower), upper + 0.5 * (upper - lower)
    else:
        lower, upper = low[pair], high[pair]
    mesh = np.meshgrid(*(np.linspace(a, b, 61) for a, b in zip(lower, upper, strict=True)), indexing="ij")
    states = np.stack([axis.ravel() for axis in mesh], axis=-1)
    # One arrow for each cell of the picture.
    cells = _CELLS * (np.asarray(jax.vmap(see)(jnp.asarray(states))) - low) / (high - low)
    states, cells = (x[np.all((cells >= 0) & (cells < _CELLS), axis=1)] for x in (states, cells))
    order = np.argsort(np.sum((cells % 1 - 0.5) ** 2, axis=1), kind="stable")
    states = states[order[np.unique(np.floor(cells[order]), axis=0, return_index=True)[1]]]
    # No draws are used.
    found = predict_function(posterior, field_at(states), num_samples=1, key=jax.random.key(0), progress=False)
    ratio = np.linalg.norm(found.std, axis=1) / np.linalg.norm(found.mean, axis=1)
    at, along = jax.vmap(lambda y, dy: jax.jvp(see, (y,), (dy,)))(jnp.asarray(states), found.mean)
    arrows = _arrows(np.asarray(at), np.asarray(along), high - low)
    kind = np.searchsorted([edge for edge, *_ in _ARROWS], ratio, side="right") - 1
    for i, (_, label, text, color) in enumerate(_ARROWS):
        if np.any(kind == i):
            yield Layer(label, visuals.line_xy, broken(arrows[:, kind == i]), dict(color=color, width=0.8), text)


def _arrows(at: Float[np.ndarray, "G 2"], along: Float[np.ndarray, "G 2"], size: Float[np.ndarray, " 2"]):
    """Arrows of one length on the screen as paths (2, G, 5): to the tip, to one side, to the tip, to the other side."""
    unit = along / size
    unit = 0.042 * unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-300)
    side = np.stack([-unit[:, 1], unit[:, 0]], axis=1)
    tail, tip = at / size - unit / 2, at / size + unit / 2
    barbs = [tip - 0.3 * unit + 0.16 * side, tip - 0.3 * unit - 0.16 * side]
    return np.moveaxis(np.stack([tail, tip, barbs[0], tip, barbs[1]], axis=1) * size, -1, 0)

"""Profiles: the best fit at each value of a quantity, and the interval that the data allow for it."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._checks import check_count, check_from, real_array
from .._errors import FitError, LaplodeError
from .._late import pd
from .._model.parameters import Parameters
from .._posterior.posterior import Posterior
from .._progress import tqdm
from .._show import preformatted
from .._solve.finite import check_slope
from .._solve.flows import OfModel
from .._solve.maps import linearize
from .constrained import Aim, Picture, corrected

# An end is found when the drop there is right to this, in nats.
_CROSSING = 1e-5

# The minimum of a profile is known to this, in nats.
_CENTERED, _MOST_TO_CENTER = 1e-9, 50

# A profile that gains less than this part of the threshold while its distance doubles has leveled off.
_LEVEL = 0.02

# A drop below this, in nats, is none.
_FLAT = 1e-3

# An optimum that is better by this, in nats, is another one.
_BETTER = 1e-2


class Profile(NamedTuple):
    """The profile of one quantity. Made by `profile`.

    - `name`: of the quantity; `estimate`: its value at the optimum, in the user's units.
    - `values`: at which it was held, in order, (n,); `drop`: by how much −log p(Y, θ), or −log p(Y | θ), is above its
        minimum there, in nats, (n,); `likelihood_drop`: the part of it that is the likelihood's, (n,).
    - `thetas`: the best parameters at each value, (n, P); `unravel(i)` is the model there.
    - `level`, `threshold`: of the interval, and the drop at its ends: half the quantile of χ² with one degree of
        freedom.
    - `intervals`: where the drop is at most the threshold, (low, high) each; an end that was not found is infinite, or
        the end of the prior's support.
    - `laplace`: the interval of the Gaussian posterior beside it.
    - `nonlinearity`: the largest distance between the signed root √(2 drop) and that of the Gaussian's parabola within
        the interval, as a part of the root at its ends: near 0 the Gaussian is right.
    - `verdict`: "identifiable", "one-sided", "practically not identifiable" or "structurally not identifiable", and
        `why`.
    - `moves`: the parameters that move most along the profile, by name.
    """

    name: str
    estimate: float
    values: Float[np.ndarray, " n"]
    drop: Float[np.ndarray, " n"]
    likelihood_drop: Float[np.ndarray, " n"]
    thetas: Float[np.ndarray, "n P"]
    level: float
    threshold: float
    intervals: tuple[tuple[float, float], ...]
    laplace: tuple[float, float]
    nonlinearity: float
    verdict: str
    why: str
    moves: tuple[str, ...]
    parameters: Parameters

    def unravel(self, index: int) -> Any:
        """The model at one of the values."""
        return self.parameters.unravel(jnp.asarray(self.thetas[index]))

    def row(self) -> dict[str, Any]:
        """What `profile_table` says of it."""
        low, high = self.intervals[0][0], self.intervals[-1][1]
        return {
            "estimate": self.estimate,
            "low": low,
            "high": high,
            "laplace_low": self.laplace[0],
            "laplace_high": self.laplace[1],
            "nonlinearity": self.nonlinearity,
            "verdict": self.verdict,
            "moves": ", ".join(self.moves[:3]),
        }

    def __repr__(self) -> str:
        parts = " and ".join(f"{low:.4g} to {high:.4g}" for low, high in self.intervals)
        return (
            f"{self.name} = {self.estimate:.4g}, {self.level:.0%} {parts} (Gaussian {self.laplace[0]:.4g} to "
            f"{self.laplace[1]:.4g}): {self.verdict}. {self.why}"
        )

    def _repr_html_(self) -> str:
        return preformatted(repr(self))


def profile_table(profiles: Sequence[Profile]) -> "pd.DataFrame":
    """A table of profiles, a row each: estimate, interval, that of the Gaussian, and the verdict.

    **Arguments:**

    - `profiles`: from `profile`.

    **Returns:** a `pandas.DataFrame` with the names of the quantities as its index.

    **Raises:** `LaplodeError` when something else than profiles is given.
    """
    if not isinstance(profiles, Sequence) or not all(isinstance(each, Profile) for each in profiles):
        raise LaplodeError("`profiles` must be a list of what laplode.profile returns.")
    return pd.DataFrame([each.row() for each in profiles], index=pd.Index([each.name for each in profiles]))


def profile(
    posterior: Posterior,
    of: str | Callable[[Any], Any] | Sequence[str | Callable[[Any], Any]],
    *,
    level: float = 0.95,
    num: int = 20,
    prior: bool = True,
    progress: bool = True,
) -> Any:
    """Profile likelihood: the best fit at each value of a quantity, and the interval of values that the data allow.

    L(θ) = −log p(Y | θ) − log p(θ) is minimized subject to g(θ) = c along a path of values c, from the optimum to both
    sides, until 2 (L − L*) crosses the quantile of χ² with one degree of freedom. Where the posterior is Gaussian that
    is the interval of `laplace`; where it is not, the profile is the answer.

    ```python
    print(laplode.profile(posterior, "vector_field.birth"))
    ```

    **Arguments:**

    - `posterior`: from `laplace`, at an optimum.
    - `of`: the name of a parameter, such as "vector_field.birth" or "y0[1]"; a function of the model to one number,
        such as `lambda m: m.birth / m.death`; or a list of those. The name of an array stands for all of its entries.
    - `level`: of the intervals, between 0 and 1.
    - `num`: points to each side, at most.
    - `prior`: whether the prior is part of L. Without it the profile is that of the likelihood, and directions that the
        data leave open are flat.
    - `progress`: whether to show a progress bar.

    **Returns:** a `Profile`; a tuple of them for a list or an array.

    **Raises:** `LaplodeError` when a name is unknown or a function is not a scalar; `FitError` when a better optimum is
    met on the way, which is handed over as `.fit`.

    Raue et al. (2009), "Structural and practical identifiability analysis of partially observed dynamical models by
    exploiting the profile likelihood"; Kreutz, Raue and Timmer (2012), "Likelihood based observability analysis and
    confidence intervals for predictions of dynamic models".
    """
    check_from("posterior", posterior, Posterior, "laplace")
    check_count("num", num, 3)
    if np.ndim(level) or not 0 < float(real_array("level", level)) < 1:
        raise LaplodeError(f"`level` must lie between 0 and 1, got {level!r}.")
    given = list(of) if isinstance(of, Sequence) and not isinstance(of, str) else [of]
    quantities = [each for item in given for each in _quantities(item, posterior.parameters)]
    with tqdm(total=2 * len(quantities), desc="Profile", unit="side", disable=not progress) as bar:
        found = tuple(_profile(posterior, each, level, num, prior, bar) for each in quantities)
    single = len(found) == 1 and (isinstance(of, str) or not isinstance(of, Sequence))
    return found[0] if single else found


# ---- What is profiled


class _Entry(eqx.Module):
    """An entry of θ, shown as the model knows it."""

    name: str = eqx.field(static=True)
    index: Array

    def linear(self, view: Parameters) -> tuple[Array, Float[Array, " P"]]:
        """Its value and its gradient."""
        theta = view.vector
        return theta[self.index], jnp.zeros_like(theta).at[self.index].set(1.0)

    def bend(self, view: Parameters, step: Float[Array, " P"]) -> Array:
        """Its second derivative along a step."""
        return jnp.zeros(())

    def curvature(self, view: Parameters) -> Float[Array, "P P"]:
        """Its Hessian."""
        return jnp.zeros((view.size, view.size))

    def shown(self, view: Parameters, value: float) -> float:
        """A value in the user's units; of an infinite one the end of the support."""
        theta = np.asarray(view.vector).copy()
        theta[int(self.index)] = value
        leaves = jax.tree.leaves(view.constrained(view.with_vector(jnp.asarray(theta))))
        return float(np.concatenate([np.ravel(leaf) for leaf in leaves])[int(self.index)])


class _Function(eqx.Module):
    """A function of the model."""

    name: str = eqx.field(static=True)
    function: Callable[[Any], Array] = eqx.field(static=True)

    def _map(self, view: Parameters) -> OfModel:
        return OfModel(view, self.function)

    def linear(self, view):
        value, jacobian = linearize(self._map(view))
        return jnp.ravel(value)[0], jacobian[0]

    def bend(self, view, step):
        if not self._map(view).has_second_pushforward():
            return jnp.zeros(())
        return _second(self._map(view), view.vector, step)

    def curvature(self, view):
        return _hessian(self._map(view), view.vector)

    def shown(self, view, value):
        return float(value)


@eqx.filter_jit
def _second(of_model: OfModel, theta, step) -> Array:
    push = lambda at: jax.jvp(of_model, (at,), (step,))[1]
    return jnp.ravel(jax.jvp(push, (theta,), (step,))[1])[0]


@eqx.filter_jit
def _hessian(of_model: OfModel, theta) -> Array:
    return jax.jacfwd(jax.grad(lambda theta: jnp.ravel(of_model(theta))[0]))(theta)


def _quantities(item: Any, view: Parameters) -> list[Any]:
    if callable(item):
        name = getattr(item, "__name__", type(item).__name__)
        value = jnp.asarray(item(view.model))
        if value.size != 1:
            raise LaplodeError(
                f"`of` must be functions of the model to one number; {name} gives shape {value.shape}. Give one "
                "function for each number."
            )
        return [_Function(name, item)]  # pyright: ignore[reportArgumentType]
    names = [view.name(i) for i in range(view.size)]
    is_at = lambda name: isinstance(item, str) and (name == item or name.startswith((f"{item}[", f"{item}.")))
    found = [i for i, name in enumerate(names) if is_at(name)]
    if not found:
        known = ", ".join(name for name, *_ in view.leaves)
        raise LaplodeError(f"`of` = {item!r} is no parameter of the model. Its parameters are: {known}.")
    return [_Entry(names[i], jnp.asarray(i)) for i in found]


# ---- Along the path


class _Path(NamedTuple):
    """One side of a profile: its points in the order in which they were found, and how it ended."""

    points: list[tuple[float, Picture]]
    end: float
    leveled: bool


def _profile(posterior: Posterior, quantity: Any, level: float, num: int, prior: bool, bar: Any) -> Profile:
    from scipy.special import chdtri

    view, aim = posterior.parameters, Aim(posterior.problem, quantity, prior)
    start = Picture.at(posterior.flow, aim)
    check_slope("of", np.append(start.slope, start.value))
    # Of the posterior, so that it is finite where the likelihood alone is flat.
    unit = math.sqrt(Picture.at(posterior.flow, aim._replace(prior=True)).variance)
    start = _centered(start, aim, unit)
    threshold, center = 0.5 * float(chdtri(1, 1 - level)), start.value
    sides = []
    for sign in (-1, 1):
        sides.append(_walk(start, aim, threshold, num, sign * unit))
        bar.update(1)
    points = sorted([*sides[0].points[1:], *sides[1].points], key=lambda point: point[0])
    values = np.array([value for value, _ in points])
    drop = np.array([picture.loss - start.loss for _, picture in points])
    likelihood = np.array([picture.likelihood - start.likelihood for _, picture in points])
    thetas = np.stack([np.asarray(picture.flow.parameters.vector) for _, picture in points])
    if np.min(drop) < -_BETTER:
        best = int(np.argmin(drop))
        raise FitError(
            f"The profile of {quantity.name} met a better optimum, by {-drop[best]:.3g} nats. It is in `.fit` of this "
            "error: refine from there, and begin anew.",
            view.unravel(jnp.asarray(thetas[best])),
        )
    shown = lambda value: quantity.shown(view, value)
    root, sd = math.sqrt(2 * threshold), math.sqrt(start.variance)
    verdict, why = _verdict(sides, threshold, start, prior)
    moves = _moves(view, posterior, quantity, thetas)
    interval, laplace = (
        tuple(sorted(map(shown, pair)))
        for pair in ((sides[0].end, sides[1].end), (center - root * sd, center + root * sd))
    )
    order = np.argsort([shown(value) for value in values])
    return Profile(
        name=quantity.name,
        estimate=shown(center),
        values=np.array([shown(value) for value in values])[order],
        drop=drop[order],
        likelihood_drop=likelihood[order],
        thetas=thetas[order],
        level=level,
        threshold=threshold,
        intervals=(interval,),
        laplace=laplace,
        nonlinearity=_nonlinearity((values - center) / sd, drop, root),
        verdict=verdict,
        why=why + (f" {', '.join(moves[:3])} move with it." if moves and verdict != "identifiable" else ""),
        moves=moves,
        parameters=view,
    )


def _centered(start: Picture, aim: Aim, unit: float) -> Picture:
    """The minimum of the profile: Newton steps along it, of which dL/dc is the multiplier."""
    for _ in range(_MOST_TO_CENTER):
        if 0.5 * start.multiplier**2 * start.variance < _CENTERED:
            break
        step = float(np.clip(-start.multiplier * start.variance, -unit, unit))
        found = corrected(start, aim, start.value + step)
        if found is None or found.loss > start.loss:
            break
        start = found
    return start


def _walk(start: Picture, aim: Aim, threshold: float, num: int, unit: float) -> _Path:
    """From the optimum to one side, by even steps of the signed root √(2 drop), until that is past the threshold's."""
    most = math.sqrt(2 * threshold)
    points, open_end = [(start.value, start)], math.copysign(math.inf, unit)
    here, root, step, quiet = start, 0.0, 2 * most / num * unit, 0
    for _ in range(4 * num):
        value = here.value + step
        found = corrected(here, aim, value)
        if found is None:
            step *= 0.25
            if abs(step) < 1e-4 * most / num * abs(unit):
                break
            continue
        points.append((value, found))
        before, root = root, math.sqrt(2 * max(found.loss - start.loss, 0.0))
        if root >= most:
            return _Path(points, _crossing(points, start, aim, threshold), False)
        # It has leveled off where the last of many ever longer steps gained next to nothing.
        quiet = quiet + 1 if 0.5 * (root**2 - before**2) < _LEVEL * threshold and abs(step) > abs(unit) else 0
        if quiet > 4 or len(points) > 2 * num:
            return _Path(points, open_end, True)
        slope = (root - before) / abs(step)
        wanted = 2 * most / num / slope if slope > 0 else math.inf
        here, step = found, math.copysign(min(wanted, 3 * abs(step)), unit)
    return _Path(points, open_end, False)


def _crossing(points: list[tuple[float, Picture]], start: Picture, aim: Aim, threshold: float) -> float:
    """Where the drop is the threshold, between the last two points, by the Illinois method; its points are added."""
    gap = lambda picture: picture.loss - start.loss - threshold
    (low, at_low), (high, at_high) = points[-2:]
    f_low, f_high, side = gap(at_low), gap(at_high), 0
    nearest = at_high
    for _ in range(20):
        value = (low * f_high - high * f_low) / (f_high - f_low)
        found = corrected(nearest, aim, value)
        if found is None:
            break
        points.append((value, found))
        nearest, f = found, gap(found)
        if abs(f) < _CROSSING:
            return value
        if f > 0:
            high, f_high, f_low, side = value, f, f_low * (0.5 if side == 1 else 1), 1
        else:
            low, f_low, f_high, side = value, f, f_high * (0.5 if side == -1 else 1), -1
    return (low * f_high - high * f_low) / (f_high - f_low)


def _verdict(sides: list[_Path], threshold: float, start: Picture, prior: bool) -> tuple[str, str]:
    open_ends = [name for name, side in zip(("below", "above"), sides, strict=True) if not math.isfinite(side.end)]
    said = [max(picture.likelihood for _, picture in side.points) - start.likelihood for side in sides]
    if max(said) < _FLAT:
        return "structurally not identifiable", "The likelihood is the same everywhere along the profile."
    if len(open_ends) == 2:
        return "practically not identifiable", "The profile stays below the threshold to both sides."
    if open_ends:
        return "one-sided", f"The profile stays below the threshold {open_ends[0]}."
    if prior and min(said) < 0.1 * threshold:
        return "practically not identifiable", "At an end of the interval it is the prior that says no, not the data."
    return "identifiable", "The profile crosses the threshold to both sides."


def _nonlinearity(offsets: Float[np.ndarray, " n"], drop: Float[np.ndarray, " n"], most: float) -> float:
    roots = np.sign(offsets) * np.sqrt(2 * np.maximum(drop, 0))
    inside = np.abs(roots) <= 1.001 * most
    return float(np.max(np.abs(roots - offsets)[inside], initial=0.0) / most)


def _moves(view: Parameters, posterior: Posterior, quantity: Any, thetas: Float[np.ndarray, "n P"]) -> tuple[str, ...]:
    """Of all parameters but the one profiled, those that the path moves by more than a standard deviation."""
    moved = np.ptp(thetas, axis=0) / np.asarray(posterior.marginal_std())
    return tuple(view.name(int(i)) for i in np.argsort(-moved) if moved[i] > 1 and view.name(int(i)) != quantity.name)

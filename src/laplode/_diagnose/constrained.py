"""The best parameters where a quantity is held at a value: constrained Gauss-Newton steps, of many points at once."""

import dataclasses
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from .._algebra.forms import FactoredForm
from .._algebra.low_rank import low_rank
from .._curvature.hessian import hessian
from .._devices import compiled, everywhere, num_devices, over_rows
from .._errors import LaplodeError
from .._fit.trust_region import MOST_BENT, bent
from .._model.parameters import Parameters
from .._problem.problem import Problem
from .._solve.autodiff import twice_along
from .._solve.flows import AbstractFlow
from .._solve.maps import DIFFERENCE, flow
from .quantity import AbstractQuantity

# A point has converged when its constrained Newton decrement is below this, in nats, and it is as near to its target as
# this part of the way there.
CONVERGED, _NEAR = 1e-7, 1e-6

# Gauss-Newton steps and, where so many in a row come no nearer, Newton steps for one point, at most; and how often its
# grid is renewed, until that no longer matters.
_MOST_STEPS, _MOST_TRIES, _MOST_NEWTON, _MOST_GRIDS = 100, 12, 15, 3

# Where the prior is left out, this part of the data's own information makes a metric, too small to pull.
_METRIC_ALONE = 1e-9

# Less than this may not be divided by.
_LEAST = float(np.sqrt(np.finfo(float).tiny))

# Damping after a step that came no nearer, at least, and the part of the strongest mode that it is at least.
_LEAST_DAMPING, _OF_STRONGEST = 1e-2, 1e-3

# Points looked for together: a program for two, as one quantity has two sides, and one for more. Their Jacobians take
# no more than so many bytes.
_TWO, _SEVERAL, _TOGETHER_BYTES = 2, 16, 2**26


class Held(eqx.Module):
    """What is minimized, −log p(Y | θ) − `weight` · log p(θ), and where. Of `quantity` what all points share."""

    flow: AbstractFlow
    problem: Problem
    quantity: AbstractQuantity
    weight: Float[Array, ""]
    route: str = eqx.field(static=True)
    bends: bool = eqx.field(static=True)

    @property
    def view(self) -> Parameters:
        """The parameters at which the flow was made, for their form."""
        return self.flow.parameters

    def counted(self, x: Array) -> Array:
        """What the prior has to say, times its weight. Without any it may be infinite."""
        return jnp.where(self.weight > 0, self.weight * x, 0.0)

    def at(self, theta: Float[Array, " P"]) -> Parameters:
        """The parameters θ."""
        return self.view.at(theta)


class Picture(eqx.Module):
    """A point, as constrained steps see it: L with or without the prior, and the quantity.

    `multiplier` is dL/dc at a constrained optimum, `decrement` what is left to gain in the directions that the
    constraint allows, in nats, and `variance` that of the quantity under Normal(θ, Λ⁻¹).
    """

    loss: Float[Array, ""]
    likelihood: Float[Array, ""]
    gradient: Float[Array, " P"]
    value: Float[Array, ""]
    slope: Float[Array, " P"]
    multiplier: Float[Array, ""]
    decrement: Float[Array, ""]
    variance: Float[Array, ""]

    def merit(self, loss: Array, value: Array, lane: "_Lane") -> Array:
        """The augmented Lagrangian of another point, by which a step from this one is judged.

        To reach the target is worth ten nats at least: a flat direction may lead there along a curve.
        """
        off = value - lane.target
        return loss - self.multiplier * off + 5 * off**2 / self.variance + 10 * (off / lane.far) ** 2

    def better(self, loss: Array, value: Array, lane: "_Lane") -> Array:
        """Whether another point is; not where it has no loss or no value."""
        before = self.merit(self.loss, self.value, lane)
        return self.merit(loss, value, lane) < before + 1e-12 * jnp.abs(before)

    def arrived(self, lane: "_Lane", within: float = CONVERGED) -> Array:
        """Whether the point is at its optimum, and at the target to a small part of the way there."""
        return (self.decrement < within) & (jnp.abs(self.value - lane.target) <= _NEAR * lane.far)


class _Lane(eqx.Module):
    """A point under way: the steps of the solve there, the quantity's own part, its target, and how far that was."""

    theta: Float[Array, " P"]
    grid: tuple[Array, ...]
    quantity: AbstractQuantity
    target: Float[Array, ""]
    far: Float[Array, ""]
    damping: Float[Array, ""]


class _Attempt(eqx.Module):
    """A point's picture, where the step from it leads, and whether that is better."""

    here: Picture
    theta: Float[Array, " P"]
    kept: Bool[Array, ""]
    damping: Float[Array, ""]


def _pictured(held: Held, lane: _Lane):
    """The picture, the quantity there, and the Gauss-Newton precision with its Jacobian and weights."""
    view, around = held.at(lane.theta), held.flow.on(lane.grid)
    predictions, jacobian = around.linearized(lane.theta, held.route)
    weights = held.problem.information(predictions).ravel()
    score = held.problem.likelihood.score(predictions, held.problem.ys).ravel()
    prior = held.problem.prior.local(view)
    found = FactoredForm(jacobian, weights, np.zeros(weights.size, int))
    if prior.rows.shape[0]:
        found = found.plus_rows(jnp.sqrt(held.weight) * prior.rows)
    own = _METRIC_ALONE * found.diagonal
    flat = jnp.where(jnp.isfinite(prior.precision), prior.precision, 1.0)
    metric = jnp.where(held.weight > 0, prior.precision, jnp.where(own > _LEAST, own, flat))
    precision = low_rank(found.factor, found.weights, metric)
    likelihood = -held.problem.log_likelihood(predictions)
    gradient = held.counted(prior.gradient) - score @ jacobian
    local = lane.quantity.local(held.view, lane.theta)
    along = precision.covariance_product(local.slope)
    variance = local.slope @ along
    multiplier = along @ gradient / variance
    rest = gradient - multiplier * local.slope
    picture = Picture(
        loss=likelihood - held.counted(prior.log_density),
        likelihood=likelihood,
        gradient=gradient,
        value=local.value,
        slope=local.slope,
        multiplier=multiplier,
        decrement=0.5 * rest @ precision.covariance_product(rest),
        variance=variance,
    )
    return picture, local, precision, (jacobian, weights, predictions)


def _second_along(held: Held, around: AbstractFlow, theta: Array, step: Array, here: Array) -> Array:
    """The second derivative of the predictions along a step; on frozen steps a difference, which is as smooth."""
    if around.is_frozen:
        before, after = around(theta - DIFFERENCE * step), around(theta + DIFFERENCE * step)
        return ((before + after - 2 * here) / DIFFERENCE**2).ravel()
    return twice_along(around, theta, step).ravel()


def _attempt(held: Held, lane: _Lane) -> _Attempt:
    """The damped Gauss-Newton step that keeps to the linearized constraint, bent by its geodesic acceleration."""
    lane = eqx.tree_at(lambda lane: lane.quantity, lane, eqx.combine(lane.quantity, held.quantity))
    here, local, precision, (jacobian, weights, predictions) = _pictured(held, lane)
    around = held.flow.on(lane.grid)
    damped = precision.damped(lane.damping)
    along = damped.covariance_product(here.slope)
    free = damped.covariance_product(here.gradient)
    stretch = here.slope @ along
    step = -free + along * (lane.target - here.value + here.slope @ free) / stretch
    theta, straight = lane.theta + step, jnp.asarray(True)
    if held.bends:
        second = _second_along(held, around, lane.theta, step, predictions)
        free = damped.covariance_product((weights * second) @ jacobian[: weights.size])
        acceleration = -free - along * (local.bend(step) - here.slope @ free) / stretch
        moved, ratio = bent(step, acceleration, jnp.sqrt(precision.prior_precision))
        theta, straight = lane.theta + moved, ratio <= 2 * MOST_BENT
    kept = straight & here.better(*_values(held, lane, theta), lane)
    strongest = jnp.max(precision.strengths)
    more = jnp.maximum(8 * lane.damping, _LEAST_DAMPING * jnp.maximum(1.0, _OF_STRONGEST * strongest))
    less = jnp.where(lane.damping > 1e-3, lane.damping / 8, 0.0)
    return _Attempt(here, jnp.where(kept, theta, lane.theta), kept, jnp.where(kept, less, more))


def _values(held: Held, lane: _Lane, theta: Float[Array, " P"]) -> tuple[Array, Array]:
    """L and the quantity at other parameters, on the lane's steps."""
    log_prior = held.problem.prior.log_density(held.view, theta)
    loss = -held.problem.log_likelihood(held.flow.on(lane.grid)(theta)) - held.counted(log_prior)
    return loss, lane.quantity.value(held.view, theta)


@compiled
def _advance(held: Held, lanes: _Lane, _):
    return jax.vmap(lambda lane: _attempt(held, lane))(lanes), ()


@compiled
def _values_along(held: Held, lane: _Lane, thetas: Float[Array, "n P"]):
    lane = eqx.tree_at(lambda lane: lane.quantity, lane, eqx.combine(lane.quantity, held.quantity))
    return jax.vmap(lambda theta: _values(held, lane, theta))(thetas)


# ---- Points, one after another, of which the attempts are made together with those of others


class Point(NamedTuple):
    """A point that was found, the steps of the solve there, and what is in its `Picture`."""

    theta: Float[np.ndarray, " P"]
    grid: tuple[Array, ...]
    value: float
    loss: float
    likelihood: float
    multiplier: float
    decrement: float
    variance: float

    @classmethod
    def of(cls, lane: _Lane, here: Picture) -> "Point":
        """Of what was found."""
        return cls(np.asarray(lane.theta), lane.grid, *(float(getattr(here, name)) for name in cls._fields[2:]))


# What looks for points: it hands out one lane after another, and is sent the attempt that was made on each.
Walker = Generator[_Lane, _Attempt, Any]


class Aim(NamedTuple):
    """What is held: all that is shared with other quantities, and the arrays of this one."""

    held: Held
    quantity: AbstractQuantity

    @property
    def whole(self) -> AbstractQuantity:
        """The quantity."""
        return eqx.combine(self.quantity, self.held.quantity)

    def grid(self, theta: Float[np.ndarray, " P"]) -> tuple[Array, ...]:
        """The steps that a solve at θ takes. Raises `LaplodeError` where it fails."""
        data, seen, held = self.held.problem.data, self.held.problem.seen, self.held
        return flow(held.at(jnp.asarray(theta)), data.ts, data.y0, data.args, like=held.flow, seen=seen).grid

    def lane(self, theta: Array | np.ndarray, grid: tuple[Array, ...], target: float, far: float) -> _Lane:
        """A point with a target."""
        number = lambda x: np.asarray(x, dtype=float)
        return _Lane(np.asarray(theta), grid, self.quantity, number(target), number(far), number(0.0))  # pyright: ignore


def measured(aim: Aim, theta: Float[np.ndarray, " P"]) -> Generator[_Lane, _Attempt, Point]:
    """The point at θ. Raises `LaplodeError` where the solve fails there."""
    lane = aim.lane(theta, aim.grid(theta), np.nan, 1.0)
    found = yield lane
    return Point.of(lane, found.here)


def corrected(aim: Aim, here: Point, target: float) -> Generator[_Lane, _Attempt, Point | None]:
    """The best point where the quantity is `target`, searched from `here`; None where there is none to be found."""
    lane = aim.lane(here.theta, here.grid, target, abs(target - here.value) or 1.0)
    found = yield lane
    for _ in range(_MOST_GRIDS):  # on grids of its own, until the grid no longer matters
        arrived = yield from _descended(aim, lane, found)
        if arrived is None:
            return None
        lane, found = arrived
        if not lane.grid:
            return Point.of(lane, found.here)
        try:
            lane = dataclasses.replace(lane, grid=aim.grid(np.asarray(lane.theta)))
        except LaplodeError:
            return None
        found = yield lane
        if found.here.arrived(lane):
            return Point.of(lane, found.here)
    return Point.of(lane, found.here) if found.here.arrived(lane, 100 * CONVERGED) else None


_Arrived = Generator[_Lane, _Attempt, "tuple[_Lane, _Attempt] | None"]


def _descended(aim: Aim, lane: _Lane, found: _Attempt) -> _Arrived:
    """On the lane's grid: Gauss-Newton steps, then Newton steps where these stall."""
    tries = 0
    for _ in range(_MOST_STEPS):
        if found.here.arrived(lane):
            return lane, found
        tries = 0 if found.kept else tries + 1
        if not np.isfinite(found.here.decrement) or tries == _MOST_TRIES:
            break
        lane = dataclasses.replace(lane, theta=found.theta, damping=found.damping)
        found = yield lane
    return (yield from _by_newton(aim, lane, found))


def _by_newton(aim: Aim, lane: _Lane, found: _Attempt) -> _Arrived:
    """Newton steps on the Hessian of the Lagrangian, within the directions that the constraint leaves."""
    for _ in range(_MOST_NEWTON):
        if found.here.arrived(lane):
            return lane, found
        if not np.isfinite(found.here.decrement) or not has_second_order(aim.held.flow):
            return None
        step = newton_step(aim, lane, found.here)
        thetas = lane.theta + 0.5 ** np.arange(12)[:, None] * step
        losses, values = _values_along(aim.held, lane, thetas)
        better = np.flatnonzero(found.here.better(losses, values, lane))
        if not better.size:
            return None
        lane = dataclasses.replace(lane, theta=thetas[better[0]])
        found = yield lane
    return (lane, found) if found.here.arrived(lane) else None


def has_second_order(around: AbstractFlow) -> bool:
    """Whether there is an exact Hessian."""
    try:
        around.check_second_order()
    except LaplodeError:
        return False
    return True


def newton_step(aim: Aim, lane: _Lane, here: Picture) -> Float[np.ndarray, " P"]:
    """To the constraint and, within it, to where the quadratic of the exact Lagrangian is least."""
    held, theta = aim.held, jnp.asarray(lane.theta)
    view = held.at(theta)
    prior = held.problem.prior.local(view)
    around: Any = dataclasses.replace(held.flow.on(lane.grid), parameters=view)
    matrix = np.asarray(hessian(around, held.problem, batch_size=None).matrix)
    matrix = matrix + held.weight * (np.diag(prior.diagonal) + np.asarray(prior.rows.T @ prior.rows))
    matrix = matrix - here.multiplier * np.asarray(aim.whole.curvature(held.view, theta))
    slope = here.slope
    back = slope * (lane.target - here.value) / (slope @ slope)  # to the constraint
    basis = np.linalg.svd(slope[None])[2][1:].T
    values, vectors = np.linalg.eigh(basis.T @ matrix @ basis)
    inner = vectors.T @ (basis.T @ (here.gradient + matrix @ back))
    floor = 1e-10 * np.max(np.abs(values), initial=0.0)  # of one parameter nothing is left to move
    return np.asarray(back - basis @ (vectors @ (inner / np.maximum(np.abs(values), floor))))


_Key = TypeVar("_Key")


def together(held: Held, walkers: Mapping[_Key, Walker], done: Callable[[_Key, Any], None], mesh: Mesh | None) -> None:
    """All walkers to their ends, whose results are handed to `done` under their keys.

    The attempts of many are one program, each device of the `mesh` with some of them. Ctrl-C is handed to those that
    are still under way, and then raised.
    """
    waiting: dict[_Key, _Lane] = {}

    def follow(key: _Key, go_on: Callable[[], _Lane]) -> None:
        try:
            waiting[key] = go_on()
        except StopIteration as end:
            waiting.pop(key, None)
            done(key, end.value)

    for key, walker in walkers.items():
        follow(key, lambda walker=walker: next(walker))
    width, shared = _width(held, len(walkers), mesh), everywhere(mesh, held)
    try:
        while waiting:
            some = list(waiting.items())[:width]
            lanes = [lane for _, lane in some]
            found = over_rows(mesh, _advance, shared, _stacked([*lanes, *lanes[:1] * (width - len(lanes))]))[0]
            found = jax.tree.map(np.asarray, found)
            for i, (key, _) in enumerate(some):
                own = jax.tree.map(lambda x, i=i: x[i], found)
                follow(key, lambda key=key, own=own: walkers[key].send(own))
    except KeyboardInterrupt:
        for key in list(waiting):
            try:
                follow(key, lambda key=key: walkers[key].throw(KeyboardInterrupt()))
            except KeyboardInterrupt:
                del waiting[key]
        raise


def _width(held: Held, num: int, mesh: Mesh | None) -> int:
    """How many attempts are made together: few sizes only, each of which is a program."""
    each = 24 * held.problem.informed.size * held.view.size
    some = _TWO if num <= _TWO else min(_SEVERAL, max(_TWO, _TOGETHER_BYTES // each))
    return -(-some // num_devices(mesh)) * num_devices(mesh)


def _stacked(lanes: list[_Lane]) -> _Lane:
    """One after another; grids of fewer steps get more of length zero."""
    room = max((lane.grid[0].shape[-1] for lane in lanes if lane.grid), default=0)

    def filled(lane: _Lane) -> _Lane:
        rest = np.repeat(lane.grid[1][:, -1:], room - lane.grid[0].shape[-1], axis=1) if lane.grid else None
        return dataclasses.replace(lane, grid=tuple(np.concatenate([x, rest], axis=1) for x in lane.grid))  # pyright: ignore

    padded = [filled(lane) for lane in lanes]
    return jax.tree.map(lambda *x: np.stack(x), *padded)

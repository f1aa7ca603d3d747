"""The best parameters where a quantity is held at a value: a constrained Gauss-Newton step, repeated."""

from typing import NamedTuple, Protocol

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._algebra.forms import FactoredForm
from .._algebra.low_rank import LowRankPrecision, ModesPrecision, low_rank
from .._curvature.hessian import hessian
from .._errors import LaplodeError
from .._fit.trust_region import MOST_BENT, bent
from .._model.parameters import Parameters
from .._problem.problem import Problem
from .._solve.flows import AbstractFlow
from .._solve.maps import flow, linearize, second_along
from .._solve.objective import negative_log_joint

# A point has converged when its constrained Newton decrement is below this, in nats.
CONVERGED = 1e-7

# Gauss-Newton steps and, where these stall, Newton steps for one point, at most.
_MOST_STEPS, _MOST_NEWTON = 40, 15

# Where the prior is left out, this part of the data's own information makes a metric, too small to pull.
_METRIC_ALONE = 1e-9


class Quantity(Protocol):
    """g(θ), a number that is held at a value."""

    def linear(self, view: Parameters) -> tuple[Array, Float[Array, " P"]]:
        """Its value and its gradient."""
        ...

    def bend(self, view: Parameters, step: Float[Array, " P"]) -> Array:
        """Its second derivative along a step."""
        ...

    def curvature(self, view: Parameters) -> Float[Array, "P P"]:
        """Its Hessian."""
        ...


class Aim(NamedTuple):
    """What is asked: the best parameters for a problem where a quantity is `target`, `far` from where it was.

    With or without the `prior` in what is minimized.
    """

    problem: Problem
    quantity: Quantity
    prior: bool
    target: float = 0.0
    far: float = 1.0

    @property
    def weight(self) -> float:
        """Of the prior."""
        return 1.0 if self.prior else 0.0


class _Local(eqx.Module):
    """The Gauss-Newton picture of L at a point: its value, its gradient, and Λ."""

    loss: Float[Array, ""]
    likelihood: Float[Array, ""]
    gradient: Float[Array, " P"]
    predictions: Float[Array, "N T F"]
    jacobian: Float[Array, "M P"]
    weights: Float[Array, " M"]
    precision: LowRankPrecision | ModesPrecision


class Picture(NamedTuple):
    """A point, and what a constrained step is made of: −log p(Y | θ) with or without the prior, and the quantity.

    `multiplier` is dL/dc at a constrained optimum, `decrement` what is left to gain in the directions that the
    constraint allows, in nats, and `variance` that of the quantity under Normal(θ, Λ⁻¹).
    """

    flow: AbstractFlow
    local: _Local
    loss: float
    likelihood: float
    value: float
    slope: Float[Array, " P"]
    multiplier: float
    decrement: float
    variance: float

    @classmethod
    def at(cls, around: AbstractFlow, aim: Aim) -> "Picture":
        """The picture at the flow's parameters."""
        local = _local(around.parameters, aim.problem, *linearize(around), aim.weight)
        value, slope = aim.quantity.linear(around.parameters)
        multiplier, decrement, variance = _held(local, slope)
        loss, likelihood, at = float(local.loss), float(local.likelihood), float(value)
        return cls(around, local, loss, likelihood, at, slope, float(multiplier), float(decrement), float(variance))

    def merit(self, loss: float, value: float, aim: Aim) -> float:
        """The augmented Lagrangian of another point, by which a step from this one is judged.

        To reach the target is worth ten nats at least: a flat direction may lead there along a curve.
        """
        off = value - aim.target
        return loss - self.multiplier * off + 5 * off**2 / self.variance + 10 * (off / aim.far) ** 2


@eqx.filter_jit
def _local(view: Parameters, problem: Problem, predictions: Array, jacobian: Array, weight: float) -> _Local:
    weights = problem.information(predictions).ravel()
    score = problem.likelihood.score(predictions, problem.ys).ravel()
    prior = problem.prior.local(view)
    found = FactoredForm(jacobian, weights, np.zeros(len(weights), int))
    if prior.rows.shape[0]:
        found = found.plus_rows(jnp.sqrt(weight) * prior.rows)
    own = _METRIC_ALONE * found.diagonal
    metric = jnp.where(weight > 0, prior.precision, jnp.where(own > 0, own, prior.precision))
    precision = low_rank(found.factor, found.weights, metric)
    likelihood = -problem.log_likelihood(predictions)
    loss = likelihood - weight * prior.log_density
    gradient = weight * prior.gradient - score @ jacobian
    return _Local(loss, likelihood, gradient, predictions, jacobian, weights, precision)


@eqx.filter_jit
def _held(local: _Local, slope: Float[Array, " P"]):
    """The multiplier, the decrement and the variance of a `Picture`."""
    along = local.precision.covariance_product(slope)
    variance = slope @ along
    multiplier = along @ local.gradient / variance
    rest = local.gradient - multiplier * slope
    return multiplier, 0.5 * rest @ local.precision.covariance_product(rest), variance


@eqx.filter_jit
def _step(local: _Local, slope: Float[Array, " P"], off: Array, damping: Array):
    """The step that minimizes the damped quadratic subject to the linearized constraint, and the solve behind it."""
    damped = local.precision.damped(damping)
    along = damped.covariance_product(slope)
    free = damped.covariance_product(local.gradient)
    return -free + along * (off + slope @ free) / (slope @ along), damped


@eqx.filter_jit
def _bent(
    second: Float[Array, " M"], local: _Local, damped: LowRankPrecision | ModesPrecision, slope, bend_of_quantity: Array
):
    """The acceleration of a curve that keeps to the residuals' and the constraint's second order."""
    free = damped.covariance_product((local.weights * second) @ local.jacobian)
    along = damped.covariance_product(slope)
    return -free - along * (bend_of_quantity - slope @ free) / (slope @ along)


def corrected(here: Picture, aim: Aim, target: float) -> Picture | None:
    """The best point where the quantity is `target`, searched from `here`; None where there is none to be found."""
    aim, start = aim._replace(target=target, far=abs(target - here.value)), here.flow
    for _ in range(3):  # on grids of its own, until the grid no longer matters
        found = _descended(here, aim)
        if found is None:
            return None
        around = found.flow
        try:
            data = aim.problem.data
            fresh = flow(around.parameters, data.ts, data.y0, data.args, like=start, seen=aim.problem.seen)
        except LaplodeError:
            return None
        here = Picture.at(fresh, aim)
        if _arrived(here, aim) or not around.is_frozen:
            return here
    return here if here.decrement < 100 * CONVERGED and abs(here.value - target) <= 1e-6 * aim.far else None


def _arrived(here: Picture, aim: Aim) -> bool:
    """Whether a point is at its optimum, and at the target to a small part of the way there."""
    return here.decrement < CONVERGED and abs(here.value - aim.target) <= 1e-6 * aim.far


def _descended(here: Picture, aim: Aim) -> Picture | None:
    """On the grid of `here`: Gauss-Newton steps, then Newton steps where these stall."""
    damping = 0.0
    for _ in range(_MOST_STEPS):
        if _arrived(here, aim):
            return here
        following = None
        for _ in range(12):
            following = _tried(here, aim, damping)
            if following is not None:
                damping = damping / 8 if damping > 1e-3 else 0.0
                break
            damping = max(8 * damping, 1e-2 * max(1.0, float(jnp.max(here.local.precision.strengths)) * 1e-3))
        if following is None:
            break
        here = Picture.at(following, aim)
    return _by_newton(here, aim)


def _tried(here: Picture, aim: Aim, damping: float) -> AbstractFlow | None:
    """The flow at the end of a damped step; None where it does not come nearer."""
    around, view = here.flow, here.flow.parameters
    step, damped = _step(here.local, here.slope, jnp.asarray(aim.target - here.value), jnp.asarray(damping))
    if not around.has_second_pushforward():
        return _kept(here, aim, view.vector + step)
    second = second_along(around, step, (here.local.predictions, here.local.jacobian)).ravel()
    acceleration = _bent(second, here.local, damped, here.slope, aim.quantity.bend(view, step))
    moved, ratio = bent(step, acceleration, jnp.sqrt(here.local.precision.prior_precision))
    return _kept(here, aim, view.vector + moved) if float(ratio) <= 2 * MOST_BENT else None


def _kept(here: Picture, aim: Aim, theta: Array) -> AbstractFlow | None:
    """The flow at θ, if that is better than here."""
    around, view = here.flow, here.flow.parameters
    there = eqx.tree_at(lambda f: f.parameters.selected, around, view.with_vector(theta))
    loss = float(negative_log_joint(around, aim.problem, theta, aim.weight))
    value = float(aim.quantity.linear(there.parameters)[0])
    before = here.merit(here.loss, here.value, aim)
    return there if here.merit(loss, value, aim) < before + 1e-12 * abs(before) else None


def _by_newton(here: Picture, aim: Aim) -> Picture | None:
    """Newton steps on the Hessian of the Lagrangian, within the directions that the constraint leaves."""
    for _ in range(_MOST_NEWTON):
        if _arrived(here, aim):
            return here
        try:
            here.flow.check_second_order()
        except LaplodeError:
            return None
        step, vector = _newton_step(here, aim), here.flow.parameters.vector
        tries = (_kept(here, aim, vector + jnp.asarray(length * step)) for length in 0.5 ** np.arange(12))
        following = next((each for each in tries if each is not None), None)
        if following is None:
            return None
        here = Picture.at(following, aim)
    return here if _arrived(here, aim) else None


def _newton_step(here: Picture, aim: Aim) -> Float[np.ndarray, " P"]:
    view = here.flow.parameters
    prior = aim.problem.prior.local(view)
    matrix = np.asarray(hessian(here.flow, aim.problem, batch_size=None).matrix)
    matrix = matrix + aim.weight * (np.diag(prior.diagonal) + np.asarray(prior.rows.T @ prior.rows))
    matrix = matrix - here.multiplier * np.asarray(aim.quantity.curvature(view))
    slope, gradient = np.asarray(here.slope), np.asarray(here.local.gradient)
    back = slope * (aim.target - here.value) / (slope @ slope)  # to the constraint
    basis = np.linalg.svd(slope[None])[2][1:].T
    values, vectors = np.linalg.eigh(basis.T @ matrix @ basis)
    inner = vectors.T @ (basis.T @ (gradient + matrix @ back))
    return back - basis @ (vectors @ (inner / np.maximum(np.abs(values), 1e-10 * np.max(np.abs(values)))))

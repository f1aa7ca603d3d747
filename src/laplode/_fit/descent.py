"""Descents to a stationary point: Levenberg-Marquardt steps, and Newton steps on the exact Hessian."""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._algebra.forms import FactoredForm
from .._algebra.low_rank import AbstractModesPrecision, low_rank
from .._curvature.hessian import hessian
from .._errors import LaplodeError
from .._model.parameters import Parameters
from .._problem.problem import Problem
from .._solve.flows import AbstractFlow
from .._solve.maps import flow, linearize, second_along
from .._solve.objective import negative_log_joint
from .trust_region import MOST_BENT, bent, within

# A step that gains less than this, in nats, keeps the grid; so many of them at most.
_SMALL_GAIN = 0.1


_MOST_MOVES = 50


# The loss of a model that chooses the steps of its solve anew at every call has ripples. Steps may lead over them: to
# anywhere below the worst of so many last losses (Grippo, Lampariello and Lucidi, 1986), and to so many nats above the
# best at most. After so many steps without a better point the descent is over.
_MEMORY = 10


_RIPPLE = 10.0


_PATIENCE = 30


# After a step that gained at once, the damping falls to this part.
_LESS = 0.25


class Point(NamedTuple):
    """Where the refinement is, and the loss there.

    The grid of steps stays frozen while the parameters move little, so that the loss is a smooth function of them: that
    of an adaptive solve has the noise of its tolerance, in which small gains drown. `moves` counts them.
    """

    flow: AbstractFlow
    loss: float
    moves: int

    @classmethod
    def at(cls, view: Parameters, problem: Problem, like: AbstractFlow | None = None) -> "Point":
        """The point on a grid of its own."""
        data = problem.data
        around = flow(view, data.ts, data.y0, data.args, like=like, seen=problem.seen)
        return cls(around, float(negative_log_joint(around, problem, view.vector)), 0)

    def moved(self, theta: Float[Array, " P"], loss: float, problem: Problem) -> "Point | None":
        """The point at `theta`, where the loss on the present grid is `loss`; None where it can't be solved."""
        there = self.flow.at(theta)
        if not there.is_frozen:
            return Point(there, loss, 0)
        if self.loss - loss < _SMALL_GAIN and self.moves < _MOST_MOVES:
            return Point(there, loss, self.moves + 1)
        return Point(there, loss, self.moves).renewed(problem, below=self.loss)

    def renewed(self, problem: Problem, below: float = math.inf) -> "Point | None":
        """The same point on a grid of its own; None where it can't be solved or its loss is not below that given."""
        try:
            point = Point.at(self.flow.parameters, problem, self.flow)
        except LaplodeError:
            return None
        return point if point.loss < below else None


# ---- The descent


class Objective(NamedTuple):
    """What is descended: the loss of a problem, the route to its Jacobian, and whether steps on it can be bent."""

    problem: Problem
    route: str
    bent: bool


class Descent(NamedTuple):
    """The state of a descent: where it is, the best point, all losses, and the damping or the radius of its steps.

    `steps` were taken, the last `idle` of them without a better point.
    """

    point: Point
    best: Point
    losses: tuple[float, ...]
    size: float
    steps: int = 0
    idle: int = 0

    def to(self, point: Point, size: float) -> "Descent":
        """The state after a step."""
        better = point.loss < self.best.loss
        losses, idle = (*self.losses, point.loss), 0 if better else self.idle + 1
        return Descent(point, point if better else self.best, losses, size, self.steps + 1, idle)

    def again(self) -> "Descent":
        """The start of another descent from the best point."""
        return Descent(self.best, self.best, self.losses, 1.0)


class End(NamedTuple):
    """How a descent ended, and the last picture of the loss."""

    descent: Descent
    reason: str
    picture: "LinearizedLoss | QuadraticLoss | None"


def descend(descent: Descent, by: Any, bar: Any) -> End:
    """Steps until there is no need of another, none that gains, or a bound or Ctrl-C ends them."""
    try:
        while True:
            picture = by.picture(descent.point)
            if by.has_converged(descent, picture):
                # On a grid of its own, and by the curvature as it is.
                descent, picture = by.settled(descent, picture)
                if by.has_converged(descent, picture):
                    return End(descent, "converged", picture)
            if descent.steps >= by.most:
                return End(descent, "budget", picture)
            following, size = by.step(descent, picture)
            if following is None:
                return End(descent._replace(steps=descent.steps + 1), "no progress", picture)
            descent = descent.to(following, size)
            bar.update(1)
            found = f"{float(picture.decrement):.2g} nats"
            bar.set_postfix(loss=f"{following.loss:.6g}", decrement=found, by=by.name)
            if by.is_slow(descent):
                return End(descent, "no progress", picture)
    except KeyboardInterrupt:
        return End(descent, "interrupted", None)


# ---- Levenberg-Marquardt


class LinearizedLoss(eqx.Module):
    """The Gauss-Newton picture of the loss at a point: its gradient, and Λ = Jᵀ R J and the prior's precision."""

    predictions: Float[Array, "N T F"]
    jacobian: Float[Array, "NTF P"]
    weights: Float[Array, " NTF"]
    structure: AbstractModesPrecision
    gradient: Float[Array, " P"]
    decrement: Float[Array, ""]


def linearized_loss(around: AbstractFlow, problem: Problem, route: str) -> LinearizedLoss:
    predictions, jacobian = linearize(around, route)
    weights, gradient, rows, precision = _whitened(around.parameters, problem, predictions, jacobian)
    # Outside of any transformation, where a Gram matrix is a matter of NumPy's BLAS.
    found = FactoredForm(jacobian, weights, np.zeros(len(weights), int)).plus_rows(rows)
    structure = low_rank(found.factor, found.weights, precision)
    return LinearizedLoss(predictions, jacobian, weights, structure, gradient, _decrement(structure, gradient))


@eqx.filter_jit
def _whitened(view: Parameters, problem: Problem, predictions, jacobian: Float[Array, "NTF P"]):
    weights = problem.information(predictions).ravel()
    score = problem.likelihood.score(predictions, problem.ys).ravel()
    prior = problem.prior.local(view)
    return weights, prior.gradient - score @ jacobian, prior.rows, prior.precision


@eqx.filter_jit
def _decrement(structure: AbstractModesPrecision, gradient: Float[Array, " P"]) -> Float[Array, ""]:
    return 0.5 * structure.inverse_quadratic(gradient)


@eqx.filter_jit
def _damped_step(local: LinearizedLoss, damping) -> tuple[LinearizedLoss, Float[Array, " P"]]:
    """The Gauss-Newton picture with damping in it, and the step to its minimum."""
    damped = eqx.tree_at(lambda l: l.structure, local, local.structure.damped(damping))
    return damped, -damped.structure.covariance_product(local.gradient)


class LevenbergMarquardt(NamedTuple):
    """Levenberg-Marquardt steps, and no other after them if they are the `last`."""

    objective: Objective
    decrement: float
    most: int
    last: bool
    name: str = "Levenberg-Marquardt"

    def picture(self, point: Point) -> LinearizedLoss:
        """The loss at a point, as far as a step needs it."""
        return linearized_loss(point.flow, self.objective.problem, self.objective.route)

    def has_converged(self, descent: Descent, local: LinearizedLoss) -> bool:
        """Whether nothing is left to gain."""
        at_best = descent.point.loss <= descent.best.loss + self.decrement
        return self.last and at_best and 0 <= float(local.decrement) < self.decrement

    def settled(self, descent: Descent, local: LinearizedLoss) -> tuple[Descent, LinearizedLoss]:
        """The state to end with."""
        return descent, local

    def step(self, descent: Descent, local: LinearizedLoss) -> tuple[Point | None, float]:
        """The next point, None if there is none that is low enough, and the damping to begin with there."""
        point, damping, below, factor = descent.point, descent.size, descent.point.loss, _LESS
        if not point.flow.is_frozen:
            below = min(max(descent.losses[-_MEMORY:]), descent.best.loss + min(_RIPPLE, 2 * float(local.decrement)))
        for _ in range(30):
            damped, step = _damped_step(local, jnp.asarray(damping))
            theta, ratio, loss = _tried(point.flow, self.objective, damped, step)
            if loss < below and ratio < MOST_BENT:
                following = point.moved(theta, loss, self.objective.problem)
                if following is not None:
                    return following, factor * damping
            damping, factor = max(4 * damping, 1e-8), 1.0  # what had to be raised is not lowered at once
        return None, damping

    def is_slow(self, descent: Descent) -> bool:
        """Whether steps gain no more, or what Newton steps gain faster."""
        if self.last:
            return descent.idle > _PATIENCE
        losses, window = descent.losses, 10 if descent.point.flow.is_frozen else _PATIENCE
        slow = len(losses) > 2 * window and min(losses[:-window]) - min(losses) < 0.02
        return slow or abs(losses[-2] - losses[-1]) < 1e-3 * self.decrement


# ---- Newton


class QuadraticLoss(NamedTuple):
    """The second-order picture of the loss at a point, in the eigenvectors of Λ in the metric of the prior.

    Neural ODEs have narrow, curved valleys: a straight step along one leaves it at once. Steps are bent by their
    geodesic acceleration here too, and in such coordinates the Hessian is that of a loss whose residuals have taken the
    Gauss-Newton step already: the exact one once there is none to take.
    """

    local: LinearizedLoss
    eigenvalues: np.ndarray
    vectors: np.ndarray
    gradient: np.ndarray
    num_negative: int
    decrement: float

    @classmethod
    def at(cls, point: Point, objective: Objective, batch_size: int | None, *, geodesic: bool) -> "QuadraticLoss":
        around, problem = point.flow, objective.problem
        local = linearized_loss(around, problem, objective.route)
        tilt = _tilt(local).reshape(problem.informed.shape) if geodesic else None
        found = hessian(around, problem, batch_size=batch_size, tilt=tilt)
        prior = problem.prior.local(around.parameters)
        precision, rows = np.asarray(prior.precision), np.asarray(prior.rows)
        matrix = np.asarray(found.matrix) + rows.T @ rows + np.diag(prior.diagonal)
        root = 1 / np.sqrt(precision)
        eigenvalues, vectors = np.linalg.eigh(root[:, None] * matrix * root)
        spectrum = eigenvalues if np.all(precision == precision[0]) else np.linalg.eigvalsh(matrix)
        rounding = len(spectrum) * np.finfo(float).eps * spectrum[-1]
        num_negative = int(np.sum(spectrum < -rounding))
        along = vectors.T @ (root * np.asarray(local.gradient))
        decrement = 0.5 * float(np.sum(along**2 / np.maximum(np.abs(eigenvalues), rounding)))
        return cls(local, eigenvalues, root[:, None] * vectors, along, num_negative, decrement)


@eqx.filter_jit
def _tilt(local: LinearizedLoss) -> Float[Array, " NTF"]:
    """R J times the Gauss-Newton step."""
    return local.weights * (local.jacobian @ -local.structure.covariance_product(local.gradient))


def _tried(
    around: AbstractFlow, objective: Objective, local: LinearizedLoss, step: Array
) -> tuple[Array, float, float]:
    """The end of a step, by how much it was bent, and the loss there: infinite where the model can't be solved."""
    try:
        linear = (local.predictions, local.jacobian)
        second = second_along(around, step, linear) if objective.bent else jnp.zeros_like(local.predictions)
        moved, ratio = _bent(local, step, second.ravel())
        theta = around.parameters.vector + moved
        return theta, float(ratio), float(negative_log_joint(around, objective.problem, theta))
    except RuntimeError as error:  # thrown by the solve of a model of one's own
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        return around.parameters.vector, 0.0, math.inf


@eqx.filter_jit
def _bent(local: LinearizedLoss, step: Float[Array, " P"], second: Float[Array, " NTF"]):
    acceleration = -local.structure.covariance_product((local.weights * second) @ local.jacobian)
    return bent(step, acceleration, jnp.sqrt(local.structure.prior_precision))


class Newton(NamedTuple):
    """Newton steps in a trust region, on the exact Hessian."""

    objective: Objective
    decrement: float
    most: int
    batch_size: int | None
    name: str = "Newton"

    def picture(self, point: Point) -> QuadraticLoss:
        """The loss at a point, as far as a step needs it."""
        return QuadraticLoss.at(point, self.objective, self.batch_size, geodesic=self.objective.bent)

    def has_converged(self, descent: Descent, region: QuadraticLoss) -> bool:
        """Whether the point is a minimum, and nothing is left to gain."""
        return region.num_negative == 0 and 0 <= region.decrement < self.decrement

    def settled(self, descent: Descent, region: QuadraticLoss) -> tuple[Descent, QuadraticLoss]:
        """The state to end with."""
        point = descent.point.renewed(self.objective.problem) or descent.point
        region = QuadraticLoss.at(point, self.objective, self.batch_size, geodesic=False)
        return descent._replace(point=point, best=point), region

    def step(self, descent: Descent, region: QuadraticLoss) -> tuple[Point | None, float]:
        """The next point, None if there is none, and the radius to begin with there."""
        point, radius = descent.point, descent.size
        while radius > 1e-9:
            step, promised = within(region.eigenvalues, region.gradient, radius)
            length = float(np.linalg.norm(step))
            theta, ratio, loss = _tried(point.flow, self.objective, region.local, jnp.asarray(region.vectors @ step))
            good = math.isfinite(loss) and promised > 0 and ratio < MOST_BENT
            kept = (point.loss - loss) / promised if good else -1.0
            if kept > 0.05:
                following = point.moved(theta, loss, self.objective.problem)
                if following is not None:
                    grown = 2 * radius if kept > 0.75 and length > 0.9 * radius else radius
                    return following, grown if kept > 0.25 else 0.5 * length
            radius = 0.25 * min(length, radius)
        return None, radius

    def is_slow(self, descent: Descent) -> bool:
        """Every step gains, or there is none."""
        return False

"""From a fitted model to a stationary point: Levenberg-Marquardt, then Newton steps on the exact Hessian."""

import math
import warnings
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._algebra.forms import FactoredForm
from .._algebra.low_rank import LowRankPrecision, ModesPrecision, low_rank
from .._checks import check_count, check_x64
from .._curvature.hessian import hessian, hessian_batch_size
from .._errors import LaplodeError, LaplodeWarning, choose
from .._model.given import with_given
from .._model.own import check_model
from .._model.parameters import Parameters, Where, parameters
from .._problem.problem import Problem, check_problem, check_scale
from .._progress import tqdm
from .._solve.finite import check_finite
from .._solve.frozen import check_influence, unfrozen
from .._solve.maps import AbstractFlow, flow, linearize, second_along
from .._solve.objective import negative_log_joint
from .result import Fit
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


# So few nats are left to gain that the posterior is not the worse for it.
_NEAR = 0.1


def refine(
    model: Any,
    problem: Problem,
    *,
    curvature: str = "hessian",
    decrement: float = 1e-4,
    steps: int = 500,
    newton_steps: int = 100,
    where: Where = None,
    progress: bool = True,
) -> Fit:
    """Move a fitted model to a stationary point of −log p(Y | θ) − log p(θ), and off saddles.

    Levenberg-Marquardt with geodesic acceleration on the Gauss-Newton matrix first, whitened by the likelihood's Fisher
    information and damped in the metric of the prior; then Newton steps in a trust region on the exact Hessian, which
    also leave saddles along negative curvature. Noise scales stay as they are.

    **Arguments:**

    - `model`: a fitted model; cast to float64.
    - `problem`: what it was fitted to, such as `fit.problem`.
    - `curvature`: "hessian" to end with Newton steps, each at the cost of an exact Hessian; "ggn" for
        Levenberg-Marquardt steps only, for many parameters and models without second derivatives.
    - `decrement`: where to stop, in nats: at a Newton decrement ½ gᵀΛ⁻¹g below this, with Λ positive definite.
        The Newton steps come far below it. Levenberg-Marquardt alone may leave standard errors off by several percent
        where the curvature is weak, as where two rates can hardly be told apart: take 1e-8 there.
    - `steps`, `newton_steps`: the largest number of steps of each kind.
    - `where`: the parameters to move, as in `laplace`.
    - `progress`: whether to show a progress bar with the loss and the decrement, in nats.

    **Returns:** a `Fit` at least as good as `model`, with the loss before each step in `.losses`. Warns
    (`LaplodeWarning`) unless converged, or stopped where 0.1 nats or less are left: the loss of a model that chooses
    the steps of its solve anew at every call has ripples, and it can come no nearer than those allow.

    **Raises:** `LaplodeError` when 64-bit JAX is off, model and data disagree, or the solve fails at `model`.

    Transtrum and Sethna (2012), "Improvements to the Levenberg-Marquardt algorithm for nonlinear least-squares
    minimization"; Moré and Sorensen (1983), "Computing a trust region step".
    """
    check_x64()
    exact = choose("curvature", curvature, {"hessian": True, "ggn": False})
    check_problem(problem)
    check_scale(problem)
    if not isinstance(decrement, int | float) or not 0 < decrement < math.inf:
        raise LaplodeError(f"`decrement` must be a positive number of nats, got {decrement!r}.")
    for name, value in (("steps", steps), ("newton_steps", newton_steps)):
        check_count(name, value, 0)
    model = check_model(model, problem)
    view = parameters(model, where, problem.prior)
    problem = with_given(view, problem)
    start = _Point.at(view, problem)
    if exact:
        start.flow.check_second_order()
    route = start.flow.jacobian_route()
    first = _linearized(start.flow, problem, route)
    check_finite(first.decrement, start.flow, problem)
    seen = jnp.max(jnp.abs(first.jacobian), axis=0)
    check_influence(seen)
    inferred = unfrozen(start.flow, problem, seen)
    if inferred is not start.flow:
        start = _Point.at(inferred.parameters, problem)
    surface = _Surface(problem, route, start.flow.is_frozen or start.flow.has_second_pushforward())
    total = steps + (newton_steps if exact else 0)
    with tqdm(total=total, desc="Refine", unit="step", disable=not progress) as bar:
        descent = _Descent(start, start, (start.loss,), 1e-3 * float(jnp.max(first.structure.strengths)))
        end = _descend(descent, _GaussNewton(surface, decrement, steps, not exact), bar)
        counts = [end.descent.steps, 0]
        if exact and end.reason != "interrupted":
            batch_size = hessian_batch_size(end.descent.best.flow, problem)
            end = _descend(end.descent.again(), _Newton(surface, decrement, newton_steps, batch_size), bar)
            counts[1] = end.descent.steps
    return _ended(end, surface, start, counts)


def _ended(end: "_End", surface: "_Surface", start: "_Point", counts: list[int]) -> Fit:
    """What is returned, on a grid of its own, so that what was gained is no matter of the grid."""
    problem, reason = surface.problem, end.reason
    point = end.descent.point if reason == "converged" else end.descent.best
    settled = point.renewed(problem) if point.moves else point
    newton = end.picture if isinstance(end.picture, _Quadratic) else None
    if settled is None or not settled.loss <= start.loss:
        settled, newton = start, None
        reason = "no progress" if reason == "converged" else reason
    local = newton or _linearized(settled.flow, problem, surface.route)
    decrement, num_negative = float(local.decrement), newton.num_negative if newton else None
    near = reason == "no progress" and 0 <= decrement < _NEAR and not num_negative
    if reason != "converged" and not near:
        remedy = {
            "budget": "Allow more `steps` or `newton_steps`.",
            "no progress": "No step lowers the loss any more: a tighter tolerance of the solver makes it smoother.",
            "interrupted": "This is the point reached.",
        }[reason]
        saddle = f" and {num_negative} directions of negative curvature" if num_negative else ""
        warnings.warn(
            f"refine stopped ({reason}) at a Newton decrement of {decrement:.2g} nats{saddle}. {remedy}",
            LaplodeWarning,
            stacklevel=3,
        )
    return Fit(
        settled.flow.parameters.model,
        np.asarray(end.descent.losses),
        problem,
        loss=settled.loss,
        reason=reason,
        steps=counts[0],
        newton_steps=counts[1],
        newton_decrement=decrement,
        num_negative=num_negative,
    )


class _Point(NamedTuple):
    """Where the refinement is, and the loss there.

    The grid of steps stays frozen while the parameters move little, so that the loss is a smooth function of them: that
    of an adaptive solve has the noise of its tolerance, in which small gains drown. `moves` counts them.
    """

    flow: AbstractFlow
    loss: float
    moves: int

    @classmethod
    def at(cls, view: Parameters, problem: Problem, like: AbstractFlow | None = None) -> "_Point":
        """The point on a grid of its own."""
        data = problem.data
        around = flow(view, data.ts, data.y0, data.args, like=like, seen=problem.seen)
        return cls(around, float(negative_log_joint(around, problem, view.vector)), 0)

    def moved(self, theta: Float[Array, " P"], loss: float, problem: Problem) -> "_Point | None":
        """The point at `theta`, where the loss on the present grid is `loss`; None where it can't be solved."""
        view = self.flow.parameters
        there = eqx.tree_at(lambda f: f.parameters.selected, self.flow, view.with_vector(theta))
        if not there.is_frozen:
            return _Point(there, loss, 0)
        if self.loss - loss < _SMALL_GAIN and self.moves < _MOST_MOVES:
            return _Point(there, loss, self.moves + 1)
        return _Point(there, loss, self.moves).renewed(problem, below=self.loss)

    def renewed(self, problem: Problem, below: float = math.inf) -> "_Point | None":
        """The same point on a grid of its own; None where it can't be solved or its loss is not below that given."""
        try:
            point = _Point.at(self.flow.parameters, problem, self.flow)
        except LaplodeError:
            return None
        return point if point.loss < below else None


# ---- The descent


class _Surface(NamedTuple):
    """What is descended: the loss of a problem, the route to its Jacobian, and whether steps on it can be bent."""

    problem: Problem
    route: str
    bent: bool


class _Descent(NamedTuple):
    """The state of a descent: where it is, the best point, all losses, and the damping or the radius of its steps.

    `steps` were taken, the last `idle` of them without a better point.
    """

    point: _Point
    best: _Point
    losses: tuple[float, ...]
    size: float
    steps: int = 0
    idle: int = 0

    def to(self, point: _Point, size: float) -> "_Descent":
        """The state after a step."""
        better = point.loss < self.best.loss
        losses, idle = (*self.losses, point.loss), 0 if better else self.idle + 1
        return _Descent(point, point if better else self.best, losses, size, self.steps + 1, idle)

    def again(self) -> "_Descent":
        """The start of another descent from the best point."""
        return _Descent(self.best, self.best, self.losses, 1.0)


class _End(NamedTuple):
    """How a descent ended, and the last picture of the loss."""

    descent: _Descent
    reason: str
    picture: "_Linearized | _Quadratic | None"


def _descend(descent: _Descent, by: Any, bar: Any) -> _End:
    """Steps until there is no need of another, none that gains, or a bound or Ctrl-C ends them."""
    try:
        while True:
            picture = by.picture(descent.point)
            if by.has_converged(descent, picture):
                # On a grid of its own, and by the curvature as it is.
                descent, picture = by.settled(descent, picture)
                if by.has_converged(descent, picture):
                    return _End(descent, "converged", picture)
            if descent.steps >= by.most:
                return _End(descent, "budget", picture)
            following, size = by.step(descent, picture)
            if following is None:
                return _End(descent._replace(steps=descent.steps + 1), "no progress", picture)
            descent = descent.to(following, size)
            bar.update(1)
            found = f"{float(picture.decrement):.2g} nats"
            bar.set_postfix(loss=f"{following.loss:.6g}", decrement=found, by=by.name)
            if by.is_slow(descent):
                return _End(descent, "no progress", picture)
    except KeyboardInterrupt:
        return _End(descent, "interrupted", None)


# ---- Levenberg-Marquardt


class _Linearized(eqx.Module):
    """The Gauss-Newton picture of the loss at a point: its gradient, and Λ = Jᵀ R J and the prior's precision."""

    jacobian: Float[Array, "N*T*K P"]
    weights: Float[Array, " N*T*K"]
    structure: LowRankPrecision | ModesPrecision
    gradient: Float[Array, " P"]
    decrement: Float[Array, ""]


def _linearized(around: AbstractFlow, problem: Problem, route: str) -> _Linearized:
    predictions, jacobian = linearize(around, route)
    weights, gradient, rows, precision = _whitened(around.parameters, problem, predictions, jacobian)
    # Outside of any transformation, where a Gram matrix is a matter of NumPy's BLAS.
    found = FactoredForm(jacobian, weights, np.zeros(len(weights), int)).plus_rows(rows)
    structure = low_rank(found.factor, found.weights, precision)
    return _Linearized(jacobian, weights, structure, gradient, _decrement(structure, gradient))


@eqx.filter_jit
def _whitened(view: Parameters, problem: Problem, predictions, jacobian: Float[Array, "N*T*K P"]):
    weights = problem.information(predictions).ravel()
    score = problem.likelihood.score(predictions, problem.ys).ravel()
    prior = problem.prior.local(view)
    return weights, prior.gradient - score @ jacobian, prior.rows, prior.precision


@eqx.filter_jit
def _decrement(structure: LowRankPrecision | ModesPrecision, gradient: Float[Array, " P"]) -> Float[Array, ""]:
    return 0.5 * structure.inverse_quadratic(gradient)


@eqx.filter_jit
def _damped_step(local: _Linearized, damping) -> tuple[_Linearized, Float[Array, " P"]]:
    """The Gauss-Newton picture with damping in it, and the step to its minimum."""
    damped = eqx.tree_at(lambda l: l.structure, local, local.structure.damped(damping))
    return damped, -damped.structure.covariance_product(local.gradient)


class _GaussNewton(NamedTuple):
    """Levenberg-Marquardt steps, and no other after them if they are the `last`."""

    surface: _Surface
    decrement: float
    most: int
    last: bool
    name: str = "Levenberg-Marquardt"

    def picture(self, point: _Point) -> _Linearized:
        """The loss at a point, as far as a step needs it."""
        return _linearized(point.flow, self.surface.problem, self.surface.route)

    def has_converged(self, descent: _Descent, local: _Linearized) -> bool:
        """Whether nothing is left to gain."""
        at_best = descent.point.loss <= descent.best.loss + self.decrement
        return self.last and at_best and 0 <= float(local.decrement) < self.decrement

    def settled(self, descent: _Descent, local: _Linearized) -> tuple[_Descent, _Linearized]:
        """The state to end with."""
        return descent, local

    def step(self, descent: _Descent, local: _Linearized) -> tuple[_Point | None, float]:
        """The next point, None if there is none that is low enough, and the damping to begin with there."""
        point, damping, below = descent.point, descent.size, descent.point.loss
        if not point.flow.is_frozen:
            below = min(max(descent.losses[-_MEMORY:]), descent.best.loss + min(_RIPPLE, 2 * float(local.decrement)))
        for _ in range(30):
            damped, step = _damped_step(local, jnp.asarray(damping))
            theta, ratio, loss = _tried(point.flow, self.surface, damped, step)
            if loss < below and ratio < MOST_BENT:
                following = point.moved(theta, loss, self.surface.problem)
                if following is not None:
                    return following, damping / 4
            damping = max(4 * damping, 1e-8)
        return None, damping

    def is_slow(self, descent: _Descent) -> bool:
        """Whether steps gain no more, or what Newton steps gain faster."""
        if self.last:
            return descent.idle > _PATIENCE
        losses, window = descent.losses, 10 if descent.point.flow.is_frozen else _PATIENCE
        slow = len(losses) > 2 * window and min(losses[:-window]) - min(losses) < 0.02
        return slow or abs(losses[-2] - losses[-1]) < 1e-3 * self.decrement


# ---- Newton


class _Quadratic(NamedTuple):
    """The second-order picture of the loss at a point, in the eigenvectors of Λ in the metric of the prior.

    Neural ODEs have narrow, curved valleys: a straight step along one leaves it at once. Steps are bent by their
    geodesic acceleration here too, and in such coordinates the Hessian is that of a loss whose residuals have taken the
    Gauss-Newton step already: the exact one once there is none to take.
    """

    local: _Linearized
    eigenvalues: np.ndarray
    vectors: np.ndarray
    gradient: np.ndarray
    num_negative: int
    decrement: float

    @classmethod
    def at(cls, point: _Point, surface: _Surface, batch_size: int | None, *, geodesic: bool) -> "_Quadratic":
        around, problem = point.flow, surface.problem
        local = _linearized(around, problem, surface.route)
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
def _tilt(local: _Linearized) -> Float[Array, " N*T*K"]:
    """R J times the Gauss-Newton step."""
    return local.weights * (local.jacobian @ -local.structure.covariance_product(local.gradient))


def _tried(around: AbstractFlow, surface: _Surface, local: _Linearized, step: Array) -> tuple[Array, float, float]:
    """The end of a step, by how much it was bent, and the loss there: infinite where the model can't be solved."""
    try:
        second = second_along(around, step) if surface.bent else jnp.zeros(surface.problem.informed.shape)
        moved, ratio = _bent(local, step, second.ravel())
        theta = around.parameters.vector + moved
        return theta, float(ratio), float(negative_log_joint(around, surface.problem, theta))
    except RuntimeError as error:  # thrown by the solve of a model of one's own
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        return around.parameters.vector, 0.0, math.inf


@eqx.filter_jit
def _bent(local: _Linearized, step: Float[Array, " P"], second: Float[Array, " N*T*K"]):
    acceleration = -local.structure.covariance_product((local.weights * second) @ local.jacobian)
    return bent(step, acceleration, jnp.sqrt(local.structure.prior_precision))


class _Newton(NamedTuple):
    """Newton steps in a trust region, on the exact Hessian."""

    surface: _Surface
    decrement: float
    most: int
    batch_size: int | None
    name: str = "Newton"

    def picture(self, point: _Point) -> _Quadratic:
        """The loss at a point, as far as a step needs it."""
        return _Quadratic.at(point, self.surface, self.batch_size, geodesic=self.surface.bent)

    def has_converged(self, descent: _Descent, region: _Quadratic) -> bool:
        """Whether the point is a minimum, and nothing is left to gain."""
        return region.num_negative == 0 and 0 <= region.decrement < self.decrement

    def settled(self, descent: _Descent, region: _Quadratic) -> tuple[_Descent, _Quadratic]:
        """The state to end with."""
        point = descent.point.renewed(self.surface.problem) or descent.point
        region = _Quadratic.at(point, self.surface, self.batch_size, geodesic=False)
        return descent._replace(point=point, best=point), region

    def step(self, descent: _Descent, region: _Quadratic) -> tuple[_Point | None, float]:
        """The next point, None if there is none, and the radius to begin with there."""
        point, radius = descent.point, descent.size
        while radius > 1e-9:
            step, promised = within(region.eigenvalues, region.gradient, radius)
            length = float(np.linalg.norm(step))
            theta, ratio, loss = _tried(point.flow, self.surface, region.local, jnp.asarray(region.vectors @ step))
            good = math.isfinite(loss) and promised > 0 and ratio < MOST_BENT
            kept = (point.loss - loss) / promised if good else -1.0
            if kept > 0.05:
                following = point.moved(theta, loss, self.surface.problem)
                if following is not None:
                    grown = 2 * radius if kept > 0.75 and length > 0.9 * radius else radius
                    return following, grown if kept > 0.25 else 0.5 * length
            radius = 0.25 * min(length, radius)
        return None, radius

    def is_slow(self, descent: _Descent) -> bool:
        """Every step gains, or there is none."""
        return False

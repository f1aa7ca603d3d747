"""From a fitted model to a stationary point: Levenberg-Marquardt, then Newton steps on the exact Hessian."""

import math
import warnings
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from .._algebra.forms import FactoredForm
from .._algebra.low_rank import LowRankPrecision, ModesPrecision, low_rank
from .._checks import check_count, check_x64
from .._curvature.hessian import hessian, hessian_batch_size
from .._errors import LaplodeError, LaplodeWarning, choose
from .._model.given import with_given
from .._model.own import check_model
from .._model.parameters import Parameters, Where, parameters
from .._problem.problem import Problem, check_problem, check_scale
from .._solve.finite import check_finite
from .._solve.frozen import check_influence, unfrozen
from .._solve.maps import AbstractFlow, flow, linearize
from .._solve.objective import NegativeLogJoint
from .result import Fit

# A step that gains less than this, in nats, keeps the grid; so many of them at most.
_SMALL_GAIN = 0.1


_MOST_MOVES = 50


# Room for more steps of the solve, as a part of those at the start: without it, a point that takes more compiles anew.
_SPARE = 1.0


# The loss of a model that chooses the steps of its solve anew at every call has ripples. Steps may lead over them, to
# so many nats above the best point at most; after so many without a better one they only go down.
_RIPPLE = 10.0


_PATIENCE = 30


# So few nats are left to gain that the posterior is not the worse for it.
_NEAR = 0.1


# A Levenberg-Marquardt step is bent by at most this part of its length (Transtrum and Sethna, 2012).
_MOST_BENT = 0.75


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
    start = point = _Point.at(view, problem)
    if exact:
        start.flow.check_second_order()
    route = start.flow.jacobian_route()
    first = _linearized(start.flow, problem, route)
    check_finite(first.decrement, start.flow, problem)
    seen = jnp.max(jnp.abs(first.jacobian), axis=0)
    check_influence(seen)
    inferred = unfrozen(start.flow, problem, seen)
    if inferred is not start.flow:
        start = point = _Point.at(inferred.parameters, problem)
    bent = point.flow.has_second_pushforward()
    rippled = not point.flow.is_frozen
    best, since_best = point, 0
    losses, counts, reason = [point.loss], [0, 0], "budget"
    ended: tuple[float, int | None] | None = None

    def show(bar, what, found):
        bar.update(1)
        bar.set_postfix(loss=f"{point.loss:.6g}", decrement=f"{found:.2g} nats", by=what)

    with tqdm(total=steps + (newton_steps if exact else 0), desc="Refine", unit="step", disable=not progress) as bar:
        try:
            damping = None
            while counts[0] < steps:
                local = _linearized(point.flow, problem, route)
                if damping is None:
                    damping = 1e-3 * float(jnp.max(local.structure.strengths))
                if not exact and local.decrement < decrement and point.loss <= best.loss + decrement:
                    reason = "converged"
                    break
                below = best.loss + min(_RIPPLE, 2 * float(local.decrement)) if rippled else point.loss
                following, damping = _levenberg_marquardt(point, problem, local, damping, bent, below)
                counts[0] += 1
                if following is None and point.loss > best.loss:
                    rippled, point, damping = False, best, None  # downhill from here
                    losses.append(point.loss)
                    continue
                if following is None:
                    reason = "no progress"
                    break
                gained, point = point.loss - following.loss, following
                losses.append(point.loss)
                best, since_best = (point, 0) if point.loss < best.loss else (best, since_best + 1)
                if rippled and since_best > _PATIENCE:
                    rippled, point, damping = False, best, None
                    losses.append(point.loss)
                show(bar, "Levenberg-Marquardt", float(local.decrement))
                # What Gauss-Newton steps gain slowly, Newton steps gain fast.
                window = _PATIENCE if rippled else 10
                slow = len(losses) > 2 * window and min(losses[:-window]) - min(losses) < 0.02
                if exact and (slow or abs(gained) < 1e-3 * decrement):
                    break
            point = point if reason == "converged" else best
            radius = 1.0
            batch_size = hessian_batch_size(point.flow, problem) if exact else None
            while exact:
                region = _Quadratic.at(point, problem, route, batch_size, geodesic=bent)
                ended = (region.decrement, region.num_negative)
                if region.num_negative == 0 and region.decrement < decrement:
                    # On a grid of its own, and by the Hessian as it is.
                    point = point.renewed(problem) or point
                    region = _Quadratic.at(point, problem, route, batch_size, geodesic=False)
                    ended = (region.decrement, region.num_negative)
                    if region.num_negative == 0 and region.decrement < decrement:
                        reason = "converged"
                        break
                if counts[1] >= newton_steps:
                    reason = "budget"
                    break
                following, radius = _trust_region(point, problem, region, radius, bent)
                counts[1] += 1
                if following is None:
                    reason = "no progress"
                    break
                point = following
                losses.append(point.loss)
                show(bar, "Newton", region.decrement)
        except KeyboardInterrupt:
            reason = "interrupted"
            point, ended = min(point, best, key=lambda at: at.loss), None
    # On grids of their own, so that what was gained is no matter of the grid.
    settled = point.renewed(problem) if point.moves else point
    if settled is None or not settled.loss <= start.loss:
        settled, ended = start, None
        reason = "no progress" if reason == "converged" else reason
    if ended is None:
        ended = (float(_linearized(settled.flow, problem, route).decrement), None)
    near = reason == "no progress" and ended[0] < _NEAR and not ended[1]
    if reason != "converged" and not near:
        remedy = {
            "budget": "Allow more `steps` or `newton_steps`.",
            "no progress": "No step lowers the loss any more: a tighter tolerance of the solver makes it smoother.",
            "interrupted": "This is the point reached.",
        }[reason]
        saddle = f" and {ended[1]} directions of negative curvature" if ended[1] else ""
        warnings.warn(
            f"refine stopped ({reason}) at a Newton decrement of {ended[0]:.2g} nats{saddle}. {remedy}",
            LaplodeWarning,
            stacklevel=2,
        )
    return Fit(
        settled.flow.parameters.model,
        np.asarray(losses),
        problem,
        loss=settled.loss,
        reason=reason,
        steps=counts[0],
        newton_steps=counts[1],
        newton_decrement=ended[0],
        num_negative=ended[1],
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
        around = flow(view, data.ts, data.y0, data.args, like=like, spare=_SPARE)
        return cls(around, float(_loss(around, problem, view.vector)), 0)

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


@eqx.filter_jit
def _loss(around: AbstractFlow, problem: Problem, theta: Float[Array, " P"]) -> Float[Array, ""]:
    """−log p(Y | θ) − log p(θ), on a frozen grid."""
    return NegativeLogJoint(around, problem)(theta)


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
    return _Linearized(jacobian, *_whitened(around.parameters, problem, predictions, jacobian))


@eqx.filter_jit
def _whitened(view: Parameters, problem: Problem, predictions, jacobian: Float[Array, "N*T*K P"]):
    weights = problem.information(predictions).ravel()
    score = problem.likelihood.score(predictions, problem.ys).ravel()
    prior = problem.prior.local(view)
    gradient = prior.gradient - score @ jacobian
    found = FactoredForm(jacobian, weights, np.zeros(len(weights), int)).plus_rows(prior.rows)
    structure = low_rank(found.factor, found.weights, prior.precision)
    return weights, structure, gradient, 0.5 * structure.inverse_quadratic(gradient)


@eqx.filter_jit
def _damped_step(local: _Linearized, damping) -> tuple[_Linearized, Float[Array, " P"]]:
    """The Gauss-Newton picture with damping in it, and the step to its minimum."""
    damped = eqx.tree_at(lambda l: l.structure, local, local.structure.damped(damping))
    return damped, -damped.structure.covariance_product(local.gradient)


def _levenberg_marquardt(point: _Point, problem: Problem, local: _Linearized, damping: float, bent: bool, below: float):
    """The next point, None if there is none below that loss, and the damping to begin with there."""
    for _ in range(30):
        damped, step = _damped_step(local, jnp.asarray(damping))
        theta, ratio, loss = _bend(point.flow, problem, damped, step, bent)
        if float(loss) < below and float(ratio) < _MOST_BENT:
            following = point.moved(theta, float(loss), problem)
            if following is not None:
                return following, damping / 4
        damping = max(4 * damping, 1e-8)
    return None, damping


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
    def at(cls, point: _Point, problem: Problem, route: str, batch_size: int | None, *, geodesic: bool) -> "_Quadratic":
        around = point.flow
        local = _linearized(around, problem, route)
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

    def step(self, radius: float) -> tuple[np.ndarray, float, float]:
        """The best step within `radius`, its length, and the decrease it promises."""
        lowest = self.eigenvalues[0]
        along = lambda shift: -self.gradient / (self.eigenvalues + shift)
        length = lambda shift: float(np.linalg.norm(along(shift)))
        scale = max(abs(lowest), abs(self.eigenvalues[-1]))
        least = max(0.0, -lowest) + 1e-12 * scale
        if lowest > 0 and length(0.0) <= radius:
            step = along(0.0)
        elif length(least) <= radius:  # the gradient has no part along the negative curvature: go there all the same
            step = along(least)
            step[0] += math.copysign(math.sqrt(max(radius**2 - length(least) ** 2, 0)), -self.gradient[0])
        else:
            low, high = least, least + float(np.linalg.norm(self.gradient)) / radius
            for _ in range(100):
                middle = math.sqrt(low * high)
                low, high = (middle, high) if length(middle) > radius else (low, middle)
            step = along(high)
        promised = -float(self.gradient @ step + 0.5 * np.sum(self.eigenvalues * step**2))
        return self.vectors @ step, float(np.linalg.norm(step)), promised


@eqx.filter_jit
def _tilt(local: _Linearized) -> Float[Array, " N*T*K"]:
    """R J times the Gauss-Newton step."""
    return local.weights * (local.jacobian @ -local.structure.covariance_product(local.gradient))


@eqx.filter_jit
def _bend(around: AbstractFlow, problem: Problem, local: _Linearized, step, bent: bool):
    """A step bent by its geodesic acceleration, the length of that beside its own, and the loss after it."""
    theta = around.parameters.vector
    bend = jnp.zeros_like(step)
    if bent:
        push = lambda at: jax.jvp(around, (at,), (step,))[1]
        second = jax.jvp(push, (theta,), (step,))[1]  # f''[step, step]
        bend = -local.structure.covariance_product((local.weights * second.ravel()) @ local.jacobian)
    metric = jnp.sqrt(local.structure.prior_precision)
    ratio = jnp.linalg.norm(metric * bend) / jnp.linalg.norm(metric * step)
    following = theta + step + 0.5 * bend
    return following, ratio, _loss(around, problem, following)


def _trust_region(point: _Point, problem: Problem, region: _Quadratic, radius: float, bent: bool):
    """The next point, None if there is none, and the radius to begin with there."""
    while radius > 1e-9:
        step, length, promised = region.step(radius)
        theta, ratio, loss = _bend(point.flow, problem, region.local, jnp.asarray(step), bent)
        loss = float(loss)
        good = math.isfinite(loss) and promised > 0 and float(ratio) < _MOST_BENT
        kept = (point.loss - loss) / promised if good else -1.0
        if kept > 0.05:
            following = point.moved(theta, loss, problem)
            if following is not None:
                grown = 2 * radius if kept > 0.75 and length > 0.9 * radius else radius
                return following, grown if kept > 0.25 else 0.5 * length
        radius = 0.25 * min(length, radius)
    return None, radius

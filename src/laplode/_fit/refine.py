"""From a fitted model to a stationary point: Levenberg-Marquardt, then Newton steps on the exact Hessian."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from .._checks import check_count, check_number, check_x64
from .._curvature.hessian import hessian_batch_size
from .._errors import choose, warn
from .._model.given import taken
from .._model.parameters import Where
from .._problem.problem import Problem
from .._progress import tqdm
from .._solve.finite import check_finite
from .._solve.frozen import check_influence, unfrozen
from .descent import Descent, End, LevenbergMarquardt, Newton, Objective, Point, QuadraticLoss, descend, linearized_loss
from .result import Fit

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
    check_number("decrement", decrement)
    for name, value in (("steps", steps), ("newton_steps", newton_steps)):
        check_count(name, value, 0)
    view, problem = taken(model, problem, where)
    start = Point.at(view, problem)
    if exact:
        start.flow.check_second_order()
    route = start.flow.jacobian_route()
    first = linearized_loss(start.flow, problem, route)
    check_finite(first.decrement, start.flow, problem)
    seen = jnp.max(jnp.abs(first.jacobian), axis=0)
    check_influence(seen)
    inferred = unfrozen(start.flow, problem, seen)
    if inferred is not start.flow:
        start = Point.at(inferred.parameters, problem)
    objective = Objective(problem, route, start.flow.is_frozen or start.flow.has_second_pushforward())
    with tqdm(desc="Refine", unit="step", disable=not progress) as bar:  # a few steps, of the many that are allowed
        descent = Descent(start, start, (start.loss,), 1e-3 * float(jnp.max(first.structure.strengths)))
        end = descend(descent, LevenbergMarquardt(objective, decrement, steps, not exact), bar)
        counts = [end.descent.steps, 0]
        if exact and end.reason != "interrupted":
            batch_size = hessian_batch_size(end.descent.best.flow, problem)
            end = descend(end.descent.again(), Newton(objective, decrement, newton_steps, batch_size), bar)
            counts[1] = end.descent.steps
    return _ended(end, objective, start, counts)


def _ended(end: End, objective: Objective, start: Point, counts: list[int]) -> Fit:
    """What is returned, on a grid of its own, so that what was gained is no matter of the grid."""
    problem, reason = objective.problem, end.reason
    point = end.descent.point if reason == "converged" else end.descent.best
    settled = point.renewed(problem) if point.moves else point
    newton = end.picture if isinstance(end.picture, QuadraticLoss) else None
    if settled is None or not settled.loss <= start.loss:
        settled, newton = start, None
        reason = "no progress" if reason == "converged" else reason
    local = newton or linearized_loss(settled.flow, problem, objective.route)
    decrement, num_negative = float(local.decrement), newton.num_negative if newton else None
    near = reason == "no progress" and 0 <= decrement < _NEAR and not num_negative
    if reason != "converged" and not near:
        remedy = {
            "budget": "Allow more `steps` or `newton_steps`.",
            "no progress": "No step lowers the loss any more: a tighter tolerance of the solver makes it smoother.",
            "interrupted": "This is the point reached.",
        }[reason]
        saddle = f" and {num_negative} directions of negative curvature" if num_negative else ""
        warn(f"refine stopped ({reason}) at a Newton decrement of {decrement:.2g} nats{saddle}. {remedy}", level=3)
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

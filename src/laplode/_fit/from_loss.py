"""From a loss that someone minimized in a training loop of their own to the problem that it solves."""

from collections.abc import Callable, Sequence
from typing import Any, Concatenate

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._checks import check_number, check_x64, is_number, real_array
from .._errors import LaplodeError, choose
from .._model.own import check_model
from .._model.parameters import Parameters, Where, parameters
from .._problem.data import Trajectories
from .._problem.prior import GaussianPrior
from .._problem.problem import Problem
from .._problem.scale import AbstractScaleLikelihood, Gaussian, LogNormal
from .._show import Shown
from .._solve.finite import check_finite
from .._solve.frozen import check_influence
from .._solve.maps import flow
from .match import Claim, SumOfSquares, by_parameter, compared, probed, value_and_gradient


class MatchedLoss(Shown):
    """What a loss amounts to as a problem. Made by `problem_from_loss`; `print` shows it in a line.

    - `scale`: the noise scale of its likelihood, given or estimated.
    - `nats_per_loss`: the factor from differences of the loss, weight decay included, to those of
        −log p(Y | θ) − log p(θ); near the model, where the loss is a function of the squares, such as their root.
    - `difference`: the largest relative difference between the gradient of the loss and that of what was said about it,
        at the model and at a point near by; None when no loss was given to compare with.
    - `imbalance`: at the model, ‖gradient of the squares + gradient of the penalty‖ over the sum of their norms: 0
        where they balance, which is the minimum, and near 1 where one pull has no answer, because training stopped
        early or the penalty was not the one named. None without a penalty.
    - `found`: in words, what the loss does with the squares; "not compared" without a loss.
    """

    scale: float
    nats_per_loss: float
    difference: float | None
    imbalance: float | None
    found: str = "not compared"

    def _shown(self):
        checked = self.found + (
            "" if self.difference is None else f", gradients differ by {self.difference:.1e} (relative)"
        )
        balance = "no penalty" if self.imbalance is None else f"imbalance at the model {self.imbalance:.2g}"
        return f"noise scale {self.scale:.4g}, {self.nats_per_loss:.4g} nats per unit of loss; {checked}, {balance}"


_ERRORS: dict[str, tuple[type[AbstractScaleLikelihood], Callable[[Array], Array]]] = {
    "absolute": (Gaussian, lambda y: y),
    "log": (LogNormal, jnp.log),
}


_REDUCTIONS: dict[str, Callable[[int], float]] = {"mean": lambda num: 1 / num, "sum": lambda num: 1.0}


def problem_from_loss(
    model: Any,
    data: Trajectories,
    loss: Callable[Concatenate[Any, ...], Any] | None = None,
    *,
    batches: Sequence[Sequence[Any]] | None = None,
    squares: str | float = "mean",
    errors: str = "absolute",
    weights: Any = None,
    where: Where = None,
    l2: float = 0.0,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    penalized: Where = None,
    precision: float | None = None,
    scale: float | None = None,
) -> tuple[Problem, MatchedLoss]:
    """The problem that a training loop of your own has solved: noise scale and prior precision from its loss.

    Minimizing squares · Σ (f − y)² + l2 · ‖θ‖² + weight_decay/2 · ‖θ‖² is maximum a posteriori under
    `Gaussian(scale)` with prior precision (2 · l2 + weight_decay) / (2 · squares · scale²), whatever the scale is: a
    loss does not know the noise. It is given, or taken from the residuals. A root or a logarithm of the squares has the
    same minimum where there is no penalty, and counts as the squares.

    ```python
    def loss(model):  # what the training loop minimized
        return jnp.mean((jax.vmap(model, (None, 0))(ts, y0) - ys) ** 2)

    problem, match = laplode.problem_from_loss(model, data, loss, squares="mean", precision=1.0)
    ```

    **Arguments:**

    - `model`: the fitted model.
    - `data`: what it was fitted to, all of it.
    - `loss`: the loss on all of `data`, a function `model -> scalar` of JAX operations, with its L2 penalty and without
        the optimizer's weight decay. Its gradient is compared with that of what the other arguments say, at models in
        the precision of `model`. None compares nothing.
    - `batches`: the minibatches of an epoch, a tuple each, where the loss is one of a minibatch, called as
        `loss(model, *batch)`. What training descends is its expectation, the mean over all of them.
    - `squares`: the factor before Σ (f − y)²: "mean" (1 over the number of observed values), "sum" (1), or a number,
        such as 0.5 for half the sum, or 0.5 / ys.size for half the mean.
    - `errors`: "absolute" for y − f, or "log" for log y − log f, which is a `LogNormal` likelihood.
    - `weights`: w of Σ w (f − y)², one per channel (K,), or any array that broadcasts to (N, T, K). The noise scale is
        then scale / √w: of a channel, or of each value where weights differ within one, and then `predict` is told the
        `scale` of other values. Zeros are a mask: these values are not observed.
    - `where`: the parameters that were trained, as in `laplace`; all by default. Give it to `laplace` too.
    - `l2`: λ of a penalty λ‖θ‖² in the loss; of (λ/2)‖θ‖² give λ/2.
    - `weight_decay`: that of `optax.add_decayed_weights` at the start of the chain, before gradients are rescaled: the
        gradient of (weight_decay/2)‖θ‖².
    - `decoupled`: True for the weight decay of `optax.adamw` and its like, which is added after the gradients are
        rescaled. It is the gradient of no penalty, and on full batches it moves the optimum hardly at all: the
        rescaling outgrows it as the gradient falls. It makes no prior, so that `precision` must be given.
    - `penalized`: the parameters that `l2` and `weight_decay` act on, as `where` in `laplace`; all by default.
    - `precision`: prior precision of the parameters without a penalty, a number. Without one they have no prior, and a
        posterior needs it. Call `refine` afterwards: the optimum moves a little.
    - `scale`: standard deviation of the noise at a weight of 1, in the units of `ys` (of log y for "log"). None takes
        the root mean square of the residuals, without those that are exactly zero (an initial state taken from the
        data). That is too small by about √(1 − effective_dof / M), for which `maximize_evidence` makes up.

    **Returns:** `(problem, match)`: the `Problem` with the same minimum, and the `MatchedLoss` that says what the loss
    amounts to.

    **Raises:** `LaplodeError` when an argument does not fit, parameters are left without a prior, or the gradient of
    `loss` is not the one claimed, with what it is instead.

    The limit of decoupled decay: Xie and Li (2024), "Implicit bias of AdamW: ℓ∞-norm constrained optimization".
    """
    check_x64()
    if not isinstance(data, Trajectories):
        raise LaplodeError(f"`data` must be laplode.Trajectories(ts, ys, ...), got {type(data).__name__}.")
    kind, transform = choose("errors", errors, _ERRORS)
    for name, value in (("l2", l2), ("weight_decay", weight_decay)):
        if not is_number(value) or value < 0:
            raise LaplodeError(f"`{name}` must be a number of at least 0, got {value!r}.")
    for name, value in (("precision", precision), ("scale", scale)):
        if value is not None:
            check_number(name, value)
    data, weights = _weighted(weights, data)
    factor = _factor(squares, data)
    plain = Problem(data, kind(1.0), 1.0)  # pyright: ignore[reportCallIssue]
    model = check_model(model, plain)
    view = parameters(model, where)
    chosen = {name for name, *_ in parameters(model, penalized).leaves}
    within = np.array([name in chosen for name, *_ in view.leaves], dtype=float)  # a number for each leaf
    decay = within * (2 * l2 + (0.0 if decoupled else weight_decay))
    _check_priors(view, decay, precision, decoupled and weight_decay > 0)

    of_squares = SumOfSquares(view, model, data, weights, transform)
    theta = view.vector
    gradient = _checked_gradient(of_squares, plain)
    difference, found = None, "not compared"
    if loss is not None:
        claim = Claim(squares, factor, within * 2 * l2, bool(np.any(decay)))
        difference, factor, found = compared(probed(loss, batches, of_squares), of_squares, claim)
    if scale is None:
        scale = _residual_scale(eqx.tree_at(lambda f: f.like, of_squares, view.model), theta)
    nats = 1 / (2 * factor * scale**2)
    noise = scale if np.all(weights == 1) else scale / np.sqrt(weights)
    precisions = [nats * each or precision for each in decay]
    one = len(set(precisions)) == 1
    prior = GaussianPrior(precisions[0] if one else jax.tree.unflatten(jax.tree.structure(view.selected), precisions))
    problem = Problem(data, kind(noise), prior)  # pyright: ignore[reportCallIssue]
    pull = by_parameter(view, decay) * np.asarray(theta)
    sizes = factor * np.linalg.norm(gradient) + np.linalg.norm(pull)
    imbalance = float(np.linalg.norm(factor * gradient + pull) / sizes) if np.any(pull) and sizes else None
    return problem, MatchedLoss(float(scale), float(nats), difference, imbalance, found)


def _weighted(weights: Any, data: Trajectories) -> tuple[Trajectories, Float[np.ndarray, "..."]]:
    """The data without what has no weight, and the weights, of each value where they differ within a channel."""
    if weights is None:
        return data, np.ones(data.ys.shape[-1])
    weights = real_array("weights", weights)
    try:
        weights = np.broadcast_to(weights, data.ys.shape)
    except ValueError:
        raise LaplodeError(
            f"`weights` must have shape (K,) or (N, T, K), here {data.ys.shape}; got {weights.shape}."
        ) from None
    if not np.all(np.isfinite(weights)) or np.any(weights < 0) or not np.any(data.observed & (weights > 0)):
        raise LaplodeError("`weights` must be finite and at least 0, and not 0 wherever something was observed.")
    masked = eqx.tree_at(lambda d: d.ys, data, np.where(weights == 0, np.nan, data.ys))
    by_channel = np.max(weights, axis=(0, 1))
    alike = np.all((weights == 0) | np.isclose(weights, by_channel, rtol=1e-6, atol=0))
    weights = by_channel if alike else weights
    return masked, np.where(weights > 0, weights, 1.0)


def _factor(squares: Any, data: Trajectories) -> float:
    if isinstance(squares, str):
        return choose("squares", squares, _REDUCTIONS)(int(np.sum(data.observed)))
    if not is_number(squares) or squares <= 0:
        raise LaplodeError(f'`squares` must be "mean", "sum" or a positive factor before the sum; got {squares!r}.')
    return float(squares)


def _check_priors(view: Parameters, decay: Float[np.ndarray, " L"], precision: float | None, decoupled: bool) -> None:
    without = [name for (name, *_), each in zip(view.leaves, decay, strict=True) if not each]
    if precision is not None or not without:
        return
    more = f" and {len(without) - 6} more" if len(without) > 6 else ""
    which = "any parameter" if len(without) == len(decay) else ", ".join(without[:6]) + more
    why = (
        "Decoupled weight decay (optax.adamw) is the gradient of no penalty, so it gives no prior."
        if decoupled
        else f"The loss has no penalty on {which}."
    )
    raise LaplodeError(
        f"`precision` is needed. {why} Name a prior precision, as in precision=1.0 (maximize_evidence can then find a "
        "better one), and call laplode.refine before laplace, since the optimum moves with it."
    )


def _checked_gradient(of_squares: SumOfSquares, problem: Problem) -> Float[Array, " P"]:
    """The gradient at the model, or a `LaplodeError` about what keeps it from being one."""
    data, view = of_squares.data, of_squares.view
    around = lambda: flow(view, data.ts, data.y0, data.args)
    try:
        total, gradient = value_and_gradient(of_squares, view.vector)
    except Exception as error:
        around().jacobian_route()
        raise LaplodeError(f"`model` can't be differentiated: {type(error).__name__}: {error}") from error
    if not np.isfinite(total) or not np.all(np.isfinite(gradient)):
        check_finite(np.append(gradient, total), around(), problem)
    check_influence(gradient if total else 1.0)
    return gradient


def _residual_scale(of_squares: SumOfSquares, theta: Float[Array, " P"]) -> float:
    errors = np.sqrt(of_squares.weights) * np.asarray(eqx.filter_jit(SumOfSquares.errors)(of_squares, theta))
    errors = errors[errors != 0]
    if not errors.size:
        raise LaplodeError("`scale` is needed: the model meets the data exactly, so that no residual shows the noise.")
    return float(np.sqrt(np.mean(errors**2)))

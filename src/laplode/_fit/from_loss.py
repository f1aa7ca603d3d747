"""From a loss that someone minimized in a training loop of their own to the problem that it solves."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._checks import check_x64, is_real_array, real_array
from .._errors import LaplodeError, choose
from .._model.neural_ode import starts
from .._model.own import check_model, predict_trajectory
from .._model.parameters import Parameters, Where, parameters
from .._problem.data import Trajectories
from .._problem.prior import GaussianPrior
from .._problem.problem import Problem
from .._problem.scale import AbstractScaleLikelihood, Gaussian, LogNormal
from .._show import Shown
from .._solve.finite import check_finite
from .._solve.frozen import check_influence
from .._solve.maps import flow

# Two gradients are the same when they agree to this, relative to their parts: a wrong factor costs a half.
_SAME = 1e-3


# How far, relative to a leaf's size, the points lie from the fitted model at which gradients are compared too: at a
# minimum the gradient of any multiple of the loss is zero.
_AWAY = 0.02


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
    loss: Callable[[Any], Any] | None = None,
    *,
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
        the optimizer's weight decay. Of minibatches give the loss of all that they are drawn from. Its gradient is
        compared with that of what the other arguments say, at models in the precision of `model`. None compares
        nothing.
    - `squares`: the factor before Σ (f − y)²: "mean" (1 over the number of observed values), "sum" (1), or a number,
        such as 0.5 for half the sum, or 0.5 / ys.size for half the mean.
    - `errors`: "absolute" for y − f, or "log" for log y − log f, which is a `LogNormal` likelihood.
    - `weights`: w of Σ w (f − y)², one per channel (K,) or for all values (N, T, K): the noise scale of a channel is
        then scale / √w. Zeros are a mask: these values are not observed. Others must not differ within a channel.
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
        if not _is_number(value) or value < 0:
            raise LaplodeError(f"`{name}` must be a number of at least 0, got {value!r}.")
    for name, value in (("precision", precision), ("scale", scale)):
        if value is not None and (not _is_number(value) or value <= 0):
            raise LaplodeError(f"`{name}` must be a positive number or None, got {value!r}.")
    data, by_channel = _weighted(weights, data)
    factor = _factor(squares, data)
    plain = Problem(data, kind(1.0), 1.0)  # pyright: ignore[reportCallIssue]
    model = check_model(model, plain)
    view = parameters(model, where)
    chosen = parameters(model, penalized)
    in_loss = _spread(chosen, view, 2 * l2)
    decay = _spread(chosen, view, 2 * l2 + (0.0 if decoupled else weight_decay))
    _check_priors(view, decay, precision, decoupled and weight_decay > 0)

    of_squares = _SumOfSquares(view, model, data, by_channel, transform)
    theta = view.vector
    gradient = _checked_gradient(of_squares, plain)
    difference, found = None, "not compared"
    if loss is not None:
        claim = _Claim(squares, factor, in_loss, decay)
        difference, factor, found = _compare(_OfLoss(view, model, loss), of_squares, claim)
    if scale is None:
        scale = _residual_scale(eqx.tree_at(lambda f: f.like, of_squares, view.model), theta)
    nats = 1 / (2 * factor * scale**2)
    noise = scale if weights is None else scale / np.sqrt(by_channel)
    problem = Problem(data, kind(noise), _prior(view, decay, nats, precision))  # pyright: ignore[reportCallIssue]
    pull = decay * np.asarray(theta)
    sizes = factor * np.linalg.norm(gradient) + np.linalg.norm(pull)
    imbalance = float(np.linalg.norm(factor * gradient + pull) / sizes) if np.any(pull) and sizes else None
    return problem, MatchedLoss(float(scale), float(nats), difference, imbalance, found)


def _weighted(weights: Any, data: Trajectories) -> tuple[Trajectories, Float[np.ndarray, " K"]]:
    """The data without what has no weight, and the weight of each channel."""
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
    by_channel = np.max(weights, axis=(0, 1))
    if not np.all((weights == 0) | np.isclose(weights, by_channel, rtol=1e-6, atol=0)):
        raise LaplodeError(
            "`weights` differ within a channel, and a likelihood has one noise scale for each: where the noise grows "
            'with y, take errors="log", or a noise scale that the model predicts, laplode.Gaussian().'
        )
    masked = eqx.tree_at(lambda d: d.ys, data, np.where(weights == 0, np.nan, data.ys))
    return masked, np.where(by_channel > 0, by_channel, 1.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(np.isfinite(value))


def _factor(squares: Any, data: Trajectories) -> float:
    if isinstance(squares, str):
        return choose("squares", squares, _REDUCTIONS)(int(np.sum(data.observed)))
    if not _is_number(squares) or squares <= 0:
        raise LaplodeError(f'`squares` must be "mean", "sum" or a positive factor before the sum; got {squares!r}.')
    return float(squares)


def _spread(chosen: Parameters, view: Parameters, value: float) -> Float[np.ndarray, " P"]:
    """`value` at the chosen parameters and 0 at the others."""
    names = {name for name, *_ in chosen.leaves}
    return np.concatenate([np.full(stop - start, value * (name in names)) for name, _, start, stop in view.leaves])


def _check_priors(view: Parameters, decay: Float[np.ndarray, " P"], precision: float | None, decoupled: bool) -> None:
    without = np.flatnonzero(decay == 0)
    if precision is not None or not without.size:
        return
    why = (
        "Decoupled weight decay (optax.adamw) is the gradient of no penalty, so it gives no prior."
        if decoupled
        else "The loss has no penalty on " + ("any parameter." if without.size == view.size else _listed(view, without))
    )
    raise LaplodeError(
        f"`precision` is needed. {why} Name a prior precision, as in precision=1.0 (maximize_evidence can then find a "
        "better one), and call laplode.refine before laplace, since the optimum moves with it."
    )


def _listed(view: Parameters, places: np.ndarray) -> str:
    names = view.names(places)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more." if len(names) > 6 else ".")


def _prior(view: Parameters, decay: Float[np.ndarray, " P"], nats: float, precision: float | None) -> GaussianPrior:
    values = [nats * decay[start] or precision for _, _, start, _ in view.leaves]
    if len(set(values)) == 1:
        return GaussianPrior(values[0])
    return GaussianPrior(jax.tree.unflatten(jax.tree.structure(view.selected), values))


def _in_precision_of(like: Any, model: Any) -> Any:
    same = lambda leaf, other: leaf.astype(other.dtype) if eqx.is_inexact_array(other) else leaf
    return jax.tree.map(same, model, like)


class _SumOfSquares(eqx.Module):
    """θ ↦ Σ w (f − y)² over what was observed, of a model and data in the precision of `like`.

    Times and states in another precision are solved on other steps, where a tolerance is loose.
    """

    view: Parameters
    like: Any
    data: Trajectories
    weights: Float[np.ndarray, " K"]
    transform: Callable[[Array], Array] = eqx.field(static=True)
    size: Callable[[Array], Array] = eqx.field(static=True, default=jnp.square)

    @property
    def dtype(self) -> Any:
        """The precision."""
        return jnp.result_type(*[leaf for leaf in jax.tree.leaves(self.like) if eqx.is_inexact_array(leaf)])

    def errors(self, theta: Float[Array, " P"]) -> Float[Array, "N T K"]:
        """f − y, and 0 where nothing was observed."""
        data, dtype = self.data, self.dtype
        cast = lambda leaf: jnp.asarray(leaf, dtype=dtype) if is_real_array(leaf) else leaf
        model = _in_precision_of(self.like, self.view.unravel(theta))
        one = lambda ts, y0, args: predict_trajectory(model, ts, y0, args, dtype)
        y0 = starts(model, data.y0, len(data.ts))
        predictions = jax.vmap(one)(*jax.tree.map(cast, (data.ts, y0, data.args)))
        observed = ~jnp.isnan(data.ys)
        ys = jnp.where(observed, cast(data.ys), 1)
        return self.transform(jnp.where(observed, predictions, 1)) - self.transform(ys)

    def __call__(self, theta: Float[Array, " P"]) -> Float[Array, ""]:
        return jnp.sum(jnp.asarray(self.weights, self.dtype) * self.size(self.errors(theta)))


@eqx.filter_jit
def _value_and_gradient(function: Callable[[Array], Array], theta: Float[Array, " P"]):
    try:
        return jax.value_and_grad(function)(theta)
    except Exception:  # of models without reverse mode; the function's own mistakes are raised by this too
        return function(theta), jax.jacfwd(function)(theta)


def _checked_gradient(of_squares: _SumOfSquares, problem: Problem) -> Float[Array, " P"]:
    """The gradient at the model, or a `LaplodeError` about what keeps it from being one."""
    data, view = of_squares.data, of_squares.view
    around = lambda: flow(view, data.ts, data.y0, data.args)
    try:
        total, gradient = _value_and_gradient(of_squares, view.vector)
    except Exception as error:
        around().jacobian_route()
        raise LaplodeError(f"`model` can't be differentiated: {type(error).__name__}: {error}") from error
    if not np.isfinite(total) or not np.all(np.isfinite(gradient)):
        check_finite(np.append(gradient, total), around(), problem)
    check_influence(gradient if total else 1.0)
    return gradient


def _residual_scale(of_squares: _SumOfSquares, theta: Float[Array, " P"]) -> float:
    errors = np.sqrt(of_squares.weights) * np.asarray(eqx.filter_jit(_SumOfSquares.errors)(of_squares, theta))
    errors = errors[errors != 0]
    if not errors.size:
        raise LaplodeError("`scale` is needed: the model meets the data exactly, so that no residual shows the noise.")
    return float(np.sqrt(np.mean(errors**2)))


# ---- Whether a loss is what it is said to be


class _Claim(NamedTuple):
    squares: Any
    factor: float
    decay: Float[np.ndarray, " P"]
    pull: Float[np.ndarray, " P"]  # with what the optimizer adds


class _OfLoss(eqx.Module):
    """θ ↦ the user's loss, of a model in the precision in which it was trained: its data may be in no other."""

    view: Parameters
    like: Any
    loss: Callable[[Any], Any] = eqx.field(static=True)

    def __call__(self, theta: Float[Array, " P"]) -> Float[Array, ""]:
        value = self.loss(_in_precision_of(self.like, self.view.unravel(theta)))
        if not eqx.is_array_like(value) or jnp.shape(value) != ():
            found = f"shape {jnp.shape(value)}" if eqx.is_array_like(value) else type(value).__name__
            raise LaplodeError(
                f"`loss` must return one number, got {found}. Give the function that was differentiated, without its "
                "gradient or other outputs: loss=lambda model: your_loss(model, ts, ys)."
            )
        return jnp.asarray(value, dtype=float)


def _points(view: Parameters, like: Any) -> list[Float[np.ndarray, " P"]]:
    """The model, and a point near it, both of which the precision of `like` has."""
    theta = np.asarray(view.vector)
    size = np.concatenate(
        [np.full(stop - start, np.sqrt(np.mean(theta[start:stop] ** 2))) for _, _, start, stop in view.leaves]
    )
    size = np.where(size > 0, size, np.sqrt(np.mean(theta**2)) or 1.0)
    count = np.arange(theta.size)
    # Any direction will do, as long as no parameter stays where it is.
    points = (theta, theta + _AWAY * size * np.cos(1 + 2.4 * count))
    rounded = lambda point: _in_precision_of(like, view.unravel(jnp.asarray(point)))
    return [np.asarray(parameters(rounded(point), view.where).vector) for point in points]


class _Probes(NamedTuple):
    """Values and gradients of the loss and of the squares at points near the model."""

    thetas: Float[np.ndarray, "A P"]
    values: Float[np.ndarray, " A"]
    gradients: Float[np.ndarray, "A P"]
    totals: Float[np.ndarray, " A"]
    squares: Float[np.ndarray, "A P"]

    def is_function_of_squares(self, claimed: float) -> bool:
        """Whether the gradient is along that of the squares, but by a factor that depends on where."""
        along = self.gradients[1] @ self.squares[1] / (self.squares[1] @ self.squares[1])
        rest = np.linalg.norm(self.gradients[1] - along * self.squares[1])
        rise, of_squares = (np.diff(rows)[0] for rows in (self.values, self.totals))
        parallel = rest < _SAME * np.linalg.norm(self.gradients[1]) and abs(along / claimed - 1) > _SAME
        return bool(parallel and abs(rise - along * of_squares) > 3e-3 * abs(rise))


def _probed(of_loss: _OfLoss, of_squares: _SumOfSquares) -> _Probes:
    if not callable(of_loss.loss):
        found = type(of_loss.loss).__name__
        raise LaplodeError(f"`loss` must be a function of the model, model -> scalar, got {found}.")
    rows = []
    for theta in _points(of_squares.view, of_squares.like):
        try:
            value, gradient = _value_and_gradient(of_loss, jnp.asarray(theta))
        except LaplodeError:
            raise
        except Exception as error:
            raise LaplodeError(
                f"`loss` can't be differentiated at the model: {type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error
        rows.append((theta, value, gradient, *_value_and_gradient(of_squares, jnp.asarray(theta))))
    found = _Probes(*(np.stack([np.asarray(x, float) for x in column]) for column in zip(*rows, strict=True)))
    if not all(np.all(np.isfinite(column)) for column in found):
        raise LaplodeError(
            "The gradient of `loss` is not finite at the model or near it: there is nothing to compare. The gradient "
            "of `nansum` and `nanmean` is NaN where NaN went into a square: put 0 in its place before, by jnp.where."
        )
    return found


def _compare(of_loss: _OfLoss, of_squares: _SumOfSquares, claim: _Claim) -> tuple[float, float, str]:
    """How far the gradients of the loss and of what is claimed of it differ, its factor, and what it is in words."""
    view, data = of_squares.view, of_squares.data
    probes = _probed(of_loss, of_squares)
    norm = lambda rows: np.linalg.norm(rows, axis=1)
    if not np.any(claim.pull) and probes.is_function_of_squares(claim.factor):
        factor = float(norm(probes.gradients)[1] / norm(probes.squares)[1])
        rest = norm(probes.gradients - factor * probes.squares)[1] / norm(probes.gradients)[1]
        return float(rest), factor, "a function of Σ (f − y)², such as its root or logarithm, with the same minimum"
    claimed = claim.factor * probes.squares + claim.decay * probes.thetas
    parts = claim.factor * norm(probes.squares) + norm(claim.decay * probes.thetas)
    # At the minimum of a loss without a penalty there is rounding only.
    difference = float(np.max(norm(probes.gradients - claimed) / np.maximum(parts, 1e-3 * parts.max())))
    epsilon = float(jnp.finfo(of_squares.dtype).eps)
    found = _measured(probes.thetas, probes.gradients, probes.squares, view, epsilon)
    if found.unexplained > _SAME:
        raise LaplodeError(_unexplained(found, probes, of_squares))
    _check_measured(found, claim, view, data)
    known = _name_of(claim.factor, data) or f"{claim.factor:.4g} times the sum"
    return difference, claim.factor, f"{known} of {'' if np.all(of_squares.weights == 1) else 'weighted '}squares"


def _unexplained(found: "_Measured", probes: _Probes, of_squares: _SumOfSquares) -> str:
    """What a loss is that is no multiple of the squares, as far as it is one of the usual kinds."""
    view, num = of_squares.view, of_squares.weights.size
    penalties = np.concatenate([_by_leaf(view, theta) for theta in probes.thetas], axis=1)

    def coefficients(functions: list[_SumOfSquares]) -> np.ndarray | None:
        at = lambda function, theta: np.asarray(_value_and_gradient(function, jnp.asarray(theta))[1], float)
        rows = [np.concatenate([at(function, theta) for theta in probes.thetas]) for function in functions]
        basis = np.concatenate([rows, penalties])
        size = np.linalg.norm(basis, axis=1)
        basis, gradient = basis / np.where(size > 0, size, 1.0)[:, None], probes.gradients.ravel()
        solved = np.linalg.lstsq(basis.T, gradient, rcond=None)[0]
        rest = np.linalg.norm(gradient - solved @ basis)
        alike = rest < _SAME * np.linalg.norm(gradient) and len(basis) < len(gradient)
        return solved[: len(rows)] / np.where(size > 0, size, 1.0)[: len(rows)] if alike else None

    change = lambda **fields: dataclasses.replace(of_squares, **fields)
    robust = "laplode.Problem(data, laplode.StudentT(4.0, scale), prior), and refine"
    alone = coefficients([change(weights=row) for row in np.eye(num)]) if num > 1 else None
    if alone is not None and np.all(alone > 0):
        listed = ", ".join(f"{value:.6g}" for value in alone / alone[0])
        return f"`loss` weighs the squares of each channel apart: pass weights=[{listed}] and squares={alone[0]:.6g}."
    for name, size in (("absolute errors (L1)", jnp.abs), ("Huber's errors (delta=1)", _huber)):
        if coefficients([change(size=size)]) is not None:
            return (
                f"`loss` is made of {name}, whose second derivative is 0 or jumps: it has no curvature to take. "
                f"The likelihood that is as robust and smooth is Student's t: {robust} the model."
            )
    return (
        "`loss` is no multiple of Σ (f − y)² over `data` with an L2 penalty: "
        f"{100 * found.unexplained:.2g}% of its gradient is neither. Other errors (`errors`, Huber), `weights`, a "
        "part of the data, or a penalty on something else would show like this. State likelihood and prior "
        f"yourself, such as {robust}."
    )


def _huber(errors: Array) -> Array:
    return jnp.where(jnp.abs(errors) < 1, 0.5 * errors**2, jnp.abs(errors) - 0.5)


def _by_leaf(view: Parameters, theta: np.ndarray) -> Float[np.ndarray, "L P"]:
    """Each leaf of θ in a row of its own."""
    place = np.concatenate([np.full(stop - start, i) for i, (_, _, start, stop) in enumerate(view.leaves)])
    return np.where(place == np.arange(len(view.leaves))[:, None], theta, 0.0)


class _Measured(NamedTuple):
    """The gradient of a loss as factor · ∇Σ(f − y)² + decay · θ, by least squares, a decay for each leaf.

    `unexplained` is the part of it that is neither; `error` the standard error of each decay.
    """

    factor: float
    decay: Float[np.ndarray, " L"]
    error: Float[np.ndarray, " L"]
    unexplained: float


def _measured(thetas, gradients, squares, view: Parameters, epsilon: float) -> _Measured:
    leaves = [slice(start, stop) for _, _, start, stop in view.leaves]
    # Each point counts alike, so that the model itself does, where the squares' gradient balances the penalty.
    size = np.linalg.norm(squares, axis=1, keepdims=True)
    weight = 1 / np.maximum(size, 1e-3 * size.max())
    x, y, z = weight * thetas, weight * gradients, weight * squares
    squared = np.array([np.sum(x[:, leaf] ** 2) for leaf in leaves])
    along = lambda rows: np.array([np.sum(x[:, leaf] * rows[:, leaf]) for leaf in leaves]) / squared
    spread = lambda values: np.concatenate(
        [np.full(leaf.stop - leaf.start, value) for leaf, value in zip(leaves, values, strict=True)]
    )
    alone, other = (rows - spread(along(rows)) * x for rows in (z, y))
    factor = float(np.sum(alone * other) / np.sum(alone**2))
    decay = along(y - factor * z)
    freedom = max(x.size - len(leaves) - 1, 1)
    rounding = max(1e-10, 100 * epsilon) * abs(factor)  # of gradients whose norm is about the factor
    error = np.hypot(np.linalg.norm(other - factor * alone) / np.sqrt(freedom), rounding) / np.sqrt(squared)
    # At a minimum rounding may be most of the gradient, so that this counts as gradients come.
    rest = gradients - factor * squares - spread(decay) * thetas
    return _Measured(factor, decay, error, float(np.linalg.norm(rest) / max(np.linalg.norm(gradients), 1e-300)))


def _check_measured(found: _Measured, claim: _Claim, view: Parameters, data: Trajectories) -> None:
    if abs(found.factor / claim.factor - 1) > _SAME:
        known = _name_of(found.factor, data)
        raise LaplodeError(
            f"`squares`={claim.squares!r} is not what `loss` has: its gradient holds {found.factor:.6g} · Σ (f − y)², "
            f"{found.factor / claim.factor:.4g} times what was said{known and ', which is ' + known}. Pass "
            f"squares={found.factor:.6g}."
        )
    said = np.array([claim.decay[start] for _, _, start, _ in view.leaves])
    names = [name for name, *_ in view.leaves]
    apart = np.abs(found.decay - said)
    wrong = np.flatnonzero(apart > 1e-2 * np.maximum(np.abs(found.decay), said) + 10 * found.error)
    if wrong.size:
        tell = lambda i: f"{names[i]} ({found.decay[i] / 2:.3g} in place of {said[i] / 2:.3g})"
        more = f" and {wrong.size - 6} more" if wrong.size > 6 else ""
        raise LaplodeError(
            "`l2` and `penalized` are not what `loss` has. By its gradient, the coefficient of ‖·‖² is another for "
            f"{', '.join(tell(i) for i in wrong[:6])}{more}. A penalty (λ/2)‖θ‖² is l2=λ/2; for parameters without "
            "one, such as biases, choose the others by `penalized`; the optimizer's own goes into `weight_decay`."
        )


def _name_of(factor: float, data: Trajectories) -> str:
    num, (trajectories, times, channels) = int(np.sum(data.observed)), data.ys.shape
    known = {
        "the sum": 1.0,
        "the mean": 1 / num,
        "the mean over all cells, missing ones included": 1 / data.ys.size,
        "the sum over channels and mean over the rest": channels / num,
        "the sum over times and channels and mean over trajectories": 1 / trajectories,
        "the sum over trajectories and mean over the rest": trajectories / num,
        "the sum over trajectories and channels and mean over times": 1 / times,
    }
    for name, value in known.items():
        for times_it, prefix in ((1.0, ""), (0.5, "half ")):
            if abs(factor / (times_it * value) - 1) < _SAME:
                return prefix + name
    return ""

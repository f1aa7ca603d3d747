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
    chosen = {name for name, *_ in parameters(model, penalized).leaves}
    within = np.array([name in chosen for name, *_ in view.leaves], dtype=float)  # a number for each leaf
    decay = within * (2 * l2 + (0.0 if decoupled else weight_decay))
    _check_priors(view, decay, precision, decoupled and weight_decay > 0)

    of_squares = _SumOfSquares(view, model, data, by_channel, transform)
    theta = view.vector
    gradient = _checked_gradient(of_squares, plain)
    difference, found = None, "not compared"
    if loss is not None:
        claim = _Claim(squares, factor, within * 2 * l2, bool(np.any(decay)))
        difference, factor, found = _compare(_probed(loss, of_squares), of_squares, claim)
    if scale is None:
        scale = _residual_scale(eqx.tree_at(lambda f: f.like, of_squares, view.model), theta)
    nats = 1 / (2 * factor * scale**2)
    noise = scale if weights is None else scale / np.sqrt(by_channel)
    precisions = [nats * each or precision for each in decay]
    one = len(set(precisions)) == 1
    prior = GaussianPrior(precisions[0] if one else jax.tree.unflatten(jax.tree.structure(view.selected), precisions))
    problem = Problem(data, kind(noise), prior)  # pyright: ignore[reportCallIssue]
    pull = _spread(view, decay) * np.asarray(theta)
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


def _spread(view: Parameters, by_leaf: Float[np.ndarray, "... L"]) -> Float[np.ndarray, "... P"]:
    """The number of each leaf at each of its parameters."""
    return np.repeat(by_leaf, [stop - start for _, _, start, stop in view.leaves], axis=-1)


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
    decay: Float[np.ndarray, " L"]  # in the loss
    penalized: bool  # by the loss or the optimizer


class _Probes(NamedTuple):
    """Values and gradients of the loss and of the squares, at the model and at a point near it."""

    thetas: Float[np.ndarray, "2 P"]
    values: Float[np.ndarray, "2"]
    gradients: Float[np.ndarray, "2 P"]
    totals: Float[np.ndarray, "2"]
    squares: Float[np.ndarray, "2 P"]


def _probed(loss: Any, of_squares: _SumOfSquares) -> _Probes:
    if not callable(loss):
        raise LaplodeError(f"`loss` must be a function of the model, model -> scalar, got {type(loss).__name__}.")
    view, like = of_squares.view, of_squares.like

    def of_loss(theta):  # of a model in the precision in which it was trained: its data may be in no other
        value: Any = loss(_in_precision_of(like, view.unravel(theta)))
        if not eqx.is_array_like(value) or jnp.shape(value) != ():
            found = f"shape {jnp.shape(value)}" if eqx.is_array_like(value) else type(value).__name__
            raise LaplodeError(
                f"`loss` must return one number, got {found}. Give the function that was differentiated, without its "
                "gradient or other outputs: loss=lambda model: your_loss(model, ts, ys)."
            )
        return jnp.asarray(value, dtype=float)

    theta = np.asarray(view.vector)
    size = _spread(view, np.array([np.sqrt(np.mean(theta[a:b] ** 2)) for _, _, a, b in view.leaves]))
    size = np.where(size > 0, size, np.sqrt(np.mean(theta**2)) or 1.0)
    # Any direction will do, as long as no parameter stays where it is.
    points = (theta, theta + _AWAY * size * np.cos(1 + 2.4 * np.arange(theta.size)))
    rows = []
    for point in points:
        rounded = parameters(_in_precision_of(like, view.unravel(jnp.asarray(point))), view.where).vector
        try:
            at = _value_and_gradient(of_loss, rounded)
        except LaplodeError:
            raise
        except Exception as error:
            raise LaplodeError(
                f"`loss` can't be differentiated at the model: {type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error
        rows.append((rounded, *at, *_value_and_gradient(of_squares, rounded)))
    found = _Probes(*(np.stack([np.asarray(x, float) for x in column]) for column in zip(*rows, strict=True)))
    if not all(np.all(np.isfinite(column)) for column in found):
        raise LaplodeError(
            "The gradient of `loss` is not finite at the model or near it: there is nothing to compare. The gradient "
            "of `nansum` and `nanmean` is NaN where NaN went into a square: put 0 in its place before, by jnp.where."
        )
    return found


class _Explained(NamedTuple):
    """The gradients of a loss as Σ factor · row + decay · θ, by least squares, a decay for each leaf.

    `unexplained` is the part of them that is neither; `error` the standard error of each decay.
    """

    factors: Float[np.ndarray, " R"]
    decay: Float[np.ndarray, " L"]
    error: Float[np.ndarray, " L"]
    unexplained: float
    freedom: int  # derivatives beyond as many as could be explained by anything


def _explained(probes: _Probes, rows: Float[np.ndarray, "R 2 P"], of_squares: _SumOfSquares) -> _Explained:
    view, num = of_squares.view, len(rows)
    penalties = _spread(view, np.eye(len(view.leaves)))[:, None] * probes.thetas
    basis = np.concatenate([rows, penalties])
    # Each point counts alike, so that the model itself does, where the squares' gradient balances the penalty.
    size = np.linalg.norm(probes.squares, axis=1, keepdims=True)
    weight = 1 / np.maximum(size, 1e-3 * size.max())
    columns = (weight * basis).reshape(len(basis), -1)
    length = np.linalg.norm(columns, axis=1)
    length = np.where(length > 0, length, 1.0)
    inverse = np.linalg.pinv(columns.T / length) / length[:, None]
    found = inverse @ (weight * probes.gradients).ravel()
    rest = probes.gradients - np.tensordot(found, basis, 1)
    freedom = weight.size * view.size - len(basis)
    rounding = max(1e-10, 100 * float(jnp.finfo(of_squares.dtype).eps)) * abs(found[0])  # of gradients of that norm
    noise = np.hypot(np.linalg.norm(weight * rest) / np.sqrt(max(freedom, 1)), rounding)
    # At a minimum rounding may be most of the gradient, so that this counts as gradients come.
    unexplained = np.linalg.norm(rest) / max(np.linalg.norm(probes.gradients), 1e-300)
    return _Explained(
        found[:num], found[num:], noise * np.linalg.norm(inverse[num:], axis=1), float(unexplained), freedom
    )


def _compare(probes: _Probes, of_squares: _SumOfSquares, claim: _Claim) -> tuple[float, float, str]:
    """How far the gradients of the loss and of what is claimed of it differ, its factor, and what it is in words."""
    norm = lambda rows: np.linalg.norm(rows, axis=1)
    if not claim.penalized and (along := _slope(probes, claim.factor)) is not None:
        rest = norm(probes.gradients - along * probes.squares)[1] / norm(probes.gradients)[1]
        return float(rest), along, "a function of Σ (f − y)², such as its root or logarithm, with the same minimum"
    pull = _spread(of_squares.view, claim.decay) * probes.thetas
    parts = claim.factor * norm(probes.squares) + norm(pull)
    # At the minimum of a loss without a penalty there is rounding only.
    apart = norm(probes.gradients - claim.factor * probes.squares - pull)
    difference = float(np.max(apart / np.maximum(parts, 1e-3 * parts.max())))
    found = _explained(probes, probes.squares[None], of_squares)
    if found.unexplained > _SAME:
        raise LaplodeError(_otherwise(probes, of_squares, found.unexplained))
    _check_explained(found, claim, of_squares)
    known = _name_of(claim.factor, of_squares.data) or f"{claim.factor:.4g} times the sum"
    return difference, claim.factor, f"{known} of {'' if np.all(of_squares.weights == 1) else 'weighted '}squares"


def _slope(probes: _Probes, claimed: float) -> float | None:
    """The factor near the model between the gradients of a loss and of the squares, where they are parallel and the
    factor depends on where; else None.
    """
    gradient, squares = probes.gradients[1], probes.squares[1]
    along = float(gradient @ squares / (squares @ squares))
    parallel = np.linalg.norm(gradient - along * squares) < _SAME * np.linalg.norm(gradient)
    rise, of_squares = np.diff(probes.values)[0], np.diff(probes.totals)[0]
    varies = abs(along / claimed - 1) > _SAME and abs(rise - along * of_squares) > 3e-3 * abs(rise)
    return along if parallel and varies else None


def _otherwise(probes: _Probes, of_squares: _SumOfSquares, unexplained: float) -> str:
    """What a loss is that is no multiple of the squares, as far as it is one of the usual kinds."""

    def factors(*functions: _SumOfSquares) -> np.ndarray:
        """How much of each a loss holds that is made of nothing else; empty where it is not."""
        at = lambda function, theta: np.asarray(_value_and_gradient(function, jnp.asarray(theta))[1], float)
        rows = np.array([[at(function, theta) for theta in probes.thetas] for function in functions])
        found = _explained(probes, rows, of_squares)
        return found.factors if found.unexplained < _SAME and found.freedom > 0 else np.zeros(0)

    robust = "laplode.Problem(data, laplode.StudentT(4.0, scale), prior), and refine"
    change, num = lambda **fields: dataclasses.replace(of_squares, **fields), of_squares.weights.size
    alone = factors(*(change(weights=row) for row in np.eye(num))) if num > 1 else np.zeros(0)
    if alone.size and np.all(alone > 0):
        listed = ", ".join(f"{value:.6g}" for value in alone / alone[0])
        return f"`loss` weighs the squares of each channel apart: pass weights=[{listed}] and squares={alone[0]:.6g}."
    if factors(change(size=jnp.abs)).size:
        return (
            "`loss` is made of absolute errors (L1), whose second derivative is 0 or jumps: it has no curvature to "
            f"take. The likelihood that is as robust and smooth is Student's t: {robust} the model."
        )
    return (
        "`loss` is no multiple of Σ (f − y)² over `data` with an L2 penalty: "
        f"{100 * unexplained:.2g}% of its gradient is neither. Other errors (`errors`, Huber), `weights`, a "
        "part of the data, or a penalty on something else would show like this. State likelihood and prior "
        f"yourself, such as {robust}."
    )


def _check_explained(found: _Explained, claim: _Claim, of_squares: _SumOfSquares) -> None:
    factor = float(found.factors[0])
    if abs(factor / claim.factor - 1) > _SAME:
        known = _name_of(factor, of_squares.data)
        raise LaplodeError(
            f"`squares`={claim.squares!r} is not what `loss` has: its gradient holds {factor:.6g} · Σ (f − y)², "
            f"{factor / claim.factor:.4g} times what was said{known and ', which is ' + known}. Pass "
            f"squares={factor:.6g}."
        )
    apart, said = np.abs(found.decay - claim.decay), claim.decay
    wrong = np.flatnonzero(apart > 1e-2 * np.maximum(np.abs(found.decay), said) + 10 * found.error)
    if wrong.size:
        names = [name for name, *_ in of_squares.view.leaves]
        tell = lambda i: f"{names[i]} ({found.decay[i] / 2:.3g} in place of {said[i] / 2:.3g})"
        more = f" and {wrong.size - 6} more" if wrong.size > 6 else ""
        raise LaplodeError(
            "`l2` and `penalized` are not what `loss` has. By its gradient, the coefficient of ‖·‖² is another for "
            f"{', '.join(tell(i) for i in wrong[:6])}{more}. A penalty (λ/2)‖θ‖² is l2=λ/2; for parameters without "
            "one, such as biases, choose the others by `penalized`; the optimizer's own goes into `weight_decay`."
        )


def _name_of(factor: float, data: Trajectories) -> str:
    num = int(np.sum(data.observed))
    known = {"the sum": 1.0, "the mean": 1 / num, "the mean over all cells, missing ones included": 1 / data.ys.size}
    halves = {f"half {name}": value / 2 for name, value in known.items()}
    return next((name for name, value in (known | halves).items() if abs(factor / value - 1) < _SAME), "")

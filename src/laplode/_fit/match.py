"""The squares that a loss may be made of, and whether it is what it is said to be."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from .._checks import is_real_array
from .._errors import LaplodeError
from .._model.neural_ode import starts
from .._model.own import predict_trajectory
from .._model.parameters import Parameters, parameters
from .._problem.data import Trajectories

# Two gradients are the same when they agree to this, relative to their parts: a wrong factor costs a half.
_SAME = 1e-3


# How far, relative to a leaf's size, the points lie from the fitted model at which gradients are compared too: at a
# minimum the gradient of any multiple of the loss is zero. Farther away a root of the squares has another slope.
_AWAY, _FAR = 0.02, 0.2


def by_parameter(view: Parameters, by_leaf: Float[np.ndarray, "... L"]) -> Float[np.ndarray, "... P"]:
    """The number of each leaf at each of its parameters."""
    return np.repeat(by_leaf, [stop - start for _, _, start, stop in view.leaves], axis=-1)


def in_precision_of(like: Any, model: Any) -> Any:
    same = lambda leaf, other: leaf.astype(other.dtype) if eqx.is_inexact_array(other) else leaf
    return jax.tree.map(same, model, like)


class SumOfSquares(eqx.Module):
    """θ ↦ Σ w (f − y)² over what was observed, of a model and data in the precision of `like`.

    Times and states in another precision are solved on other steps, where a tolerance is loose.
    """

    view: Parameters
    like: Any
    data: Trajectories
    weights: Float[np.ndarray, "..."]
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
        model = in_precision_of(self.like, self.view.unravel(theta))
        one = lambda ts, y0, args: predict_trajectory(model, ts, y0, args, dtype)
        y0 = starts(model, data.y0, len(data.ts))
        predictions = jax.vmap(one)(*jax.tree.map(cast, (data.ts, y0, data.args)))
        observed = ~jnp.isnan(data.ys)
        ys = jnp.where(observed, cast(data.ys), 1)
        return self.transform(jnp.where(observed, predictions, 1)) - self.transform(ys)

    def __call__(self, theta: Float[Array, " P"]) -> Float[Array, ""]:
        return jnp.sum(jnp.asarray(self.weights, self.dtype) * self.size(self.errors(theta)))


@eqx.filter_jit
def value_and_gradient(function: Callable[..., Array], theta: Float[Array, " P"], *rest: Any):
    try:
        return jax.value_and_grad(function)(theta, *rest)
    except Exception:  # of models without reverse mode; the function's own mistakes are raised by this too
        return function(theta, *rest), jax.jacfwd(function)(theta, *rest)


# ---- Whether a loss is what it is said to be


class Claim(NamedTuple):
    squares: Any
    factor: float
    decay: Float[np.ndarray, " L"]  # in the loss
    penalized: bool  # by the loss or the optimizer


class _Probes(NamedTuple):
    """Gradients of the loss and of the squares, at the model, at a point near it, and at one farther away."""

    thetas: Float[np.ndarray, "points P"]
    gradients: Float[np.ndarray, "points P"]
    squares: Float[np.ndarray, "points P"]

    @property
    def near(self) -> "_Probes":
        """Without the point that is farther away, where the loss may not be finite."""
        return _Probes(*(rows[:2] for rows in self))


def probed(loss: Any, batches: Any, of_squares: SumOfSquares) -> _Probes:
    if not callable(loss):
        raise LaplodeError(f"`loss` must be a function of the model, model -> scalar, got {type(loss).__name__}.")
    batches = [()] if batches is None else batches
    if not isinstance(batches, list | tuple) or not batches or not all(isinstance(b, list | tuple) for b in batches):
        raise LaplodeError("`batches` must be a list of tuples, of what `loss` takes after the model, for one epoch.")
    view, like = of_squares.view, of_squares.like

    def of_loss(theta, *batch):  # of a model in the precision in which it was trained: its data may be in no other
        value: Any = loss(in_precision_of(like, view.unravel(theta)), *batch)
        if not eqx.is_array_like(value) or jnp.shape(value) != ():
            found = f"shape {jnp.shape(value)}" if eqx.is_array_like(value) else type(value).__name__
            raise LaplodeError(
                f"`loss` must return one number, got {found}. Give the function that was differentiated, without its "
                "gradient or other outputs: loss=lambda model: your_loss(model, ts, ys)."
            )
        return jnp.asarray(value, dtype=float)

    theta = np.asarray(view.vector)
    size = by_parameter(view, np.array([np.sqrt(np.mean(theta[a:b] ** 2)) for _, _, a, b in view.leaves]))
    size = np.where(size > 0, size, np.sqrt(np.mean(theta**2)) or 1.0)
    # Any direction will do, as long as no parameter stays where it is.
    points = (theta + part * size * np.cos(1 + 2.4 * np.arange(theta.size)) for part in (0, _AWAY, _FAR))
    rows = []
    for point in points:
        rounded = parameters(in_precision_of(like, view.unravel(jnp.asarray(point))), view.where).vector
        try:
            each = [value_and_gradient(of_loss, rounded, *batch) for batch in batches]
        except LaplodeError:
            raise
        except Exception as error:
            raise LaplodeError(
                f"`loss` can't be differentiated at the model: {type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error
        gradient = np.mean([np.asarray(g, float) for _, g in each], axis=0)
        rows.append((rounded, gradient, value_and_gradient(of_squares, rounded)[1]))
    found = _Probes(*(np.stack([np.asarray(x, float) for x in column]) for column in zip(*rows, strict=True)))
    if not all(np.all(np.isfinite(column)) for column in found.near):
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


def _explained(probes: _Probes, rows: Float[np.ndarray, "R 2 P"], of_squares: SumOfSquares) -> _Explained:
    view, num = of_squares.view, len(rows)
    penalties = by_parameter(view, np.eye(len(view.leaves)))[:, None] * probes.thetas
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


def compared(probes: _Probes, of_squares: SumOfSquares, claim: Claim) -> tuple[float, float, str]:
    """How far the gradients of the loss and of what is claimed of it differ, its factor, and what it is in words."""
    norm = lambda rows: np.linalg.norm(rows, axis=1)
    far, probes = probes, probes.near
    if not claim.penalized and (along := _slope(far)) is not None:
        rest = norm(probes.gradients - along * probes.squares)[1] / norm(probes.gradients)[1]
        return float(rest), along, "a function of Σ (f − y)², such as its root or logarithm, with the same minimum"
    pull = by_parameter(of_squares.view, claim.decay) * probes.thetas
    parts = claim.factor * norm(probes.squares) + norm(pull)
    # At the minimum of a loss without a penalty there is rounding only.
    apart = norm(probes.gradients - claim.factor * probes.squares - pull)
    difference = float(np.max(apart / np.maximum(parts, 1e-3 * parts.max())))
    found = _explained(probes, probes.squares[None], of_squares)
    if found.unexplained > _SAME:
        farther = all(np.all(np.isfinite(rows)) for rows in far)
        raise LaplodeError(_otherwise(far if farther else probes, of_squares, found.unexplained))
    _check_explained(found, claim, of_squares)
    known = _name_of(claim.factor, of_squares.data) or f"{claim.factor:.4g} times the sum"
    return difference, claim.factor, f"{known} of {'' if np.all(of_squares.weights == 1) else 'weighted '}squares"


def _slope(probes: _Probes) -> float | None:
    """The factor near the model between the gradients of a loss and of the squares, where they are parallel and the
    factor depends on where; else None.
    """
    gradients, squares = probes.gradients[1:], probes.squares[1:]
    along = np.sum(gradients * squares, axis=1) / np.sum(squares**2, axis=1)
    apart = np.linalg.norm(gradients - along[:, None] * squares, axis=1)
    parallel = np.all(apart < _SAME * np.linalg.norm(gradients, axis=1))
    return float(along[0]) if parallel and abs(along[1] / along[0] - 1) > _SAME else None


# Losses of single errors that are no squares, each with what keeps it from a curvature.
_ROBUST: dict[str, Callable[[Array], Array]] = {
    "absolute errors (L1, a Laplace distribution), whose second derivative is 0 or jumps": jnp.abs,
    "Huber's errors (delta = 1), whose second derivative jumps to 0": optax.losses.huber_loss,
    "log cosh of the errors, a distribution that laplode has not": optax.losses.log_cosh,
}

# Weights of more slices of the data than this are not looked for.
_MOST_SLICES = 64


def _otherwise(probes: _Probes, of_squares: SumOfSquares, unexplained: float) -> str:
    """What a loss is that is no multiple of the squares, as far as it is one of the usual kinds."""

    def factors(**fields: Sequence[Any]) -> np.ndarray:
        """How much of each a loss holds that is made of nothing else; empty where it is not."""
        ((name, values),) = fields.items()
        kinds = [dataclasses.replace(of_squares, **{name: value}) for value in values]
        at = lambda function, theta: np.asarray(value_and_gradient(function, jnp.asarray(theta))[1], float)
        rows = np.array([[at(kind, theta) for theta in probes.thetas] for kind in kinds])
        found = _explained(probes, rows, of_squares)
        share = np.abs(found.factors) * np.linalg.norm(rows, axis=(1, 2)) / np.linalg.norm(probes.gradients)
        factors = np.where(share < 0.1 * _SAME, 0, found.factors)  # of rounding
        known = found.unexplained < _SAME and found.freedom > 0 and np.all(factors >= 0) and np.any(factors)
        return factors if known else np.zeros(0)

    shape = of_squares.data.ys.shape
    later = factors(weights=[(np.arange(shape[1]) > 0)[:, None] * 1.0])
    if later.size:
        return (
            "`loss` leaves out the first time: pass weights=(np.arange(T) > 0)[:, None], T the number of times, and "
            f"squares={later[0]:.6g}."
        )
    for what, axis in (("channel", 2), ("trajectory", 0), ("time", 1)):
        if not 1 < shape[axis] <= _MOST_SLICES:
            continue
        alone = factors(weights=[row.reshape(-1, *(1,) * (2 - axis)) for row in np.eye(shape[axis])])
        if alone.size:
            listed = f"[{', '.join(f'{value:.6g}' for value in alone / alone.max())}]"
            wanted = listed if axis == 2 else f"np.array({listed})[:{', None' * (2 - axis)}]"
            return (
                f"`loss` weighs the squares of each {what} apart: pass weights={wanted} and squares={alone.max():.6g}."
            )
    robust = "laplode.Problem(data, laplode.StudentT(4.0, scale), prior), and refine"
    for kind, function in _ROBUST.items():
        if factors(size=[function]).size:
            return (
                f"`loss` is made of {kind}: there is no Gaussian of the same minimum and curvature. The likelihood "
                f"that is as robust and smooth is Student's t: {robust} the model."
            )
    return (
        "`loss` is no multiple of Σ (f − y)² over `data` with an L2 penalty: "
        f"{100 * unexplained:.2g}% of its gradient is neither. Other errors (`errors`, Huber), `weights`, a "
        "part of the data, or a penalty on something else would show like this. State likelihood and prior "
        f"yourself, such as {robust}."
    )


def _check_explained(found: _Explained, claim: Claim, of_squares: SumOfSquares) -> None:
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

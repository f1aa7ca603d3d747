"""What is being inferred: observed trajectories, a likelihood, a prior."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, PyTree

from ._errors import LaplodeError


def _real_array(name: str, value: Any, unit: str = "numbers") -> np.ndarray:
    try:
        array = np.asarray(value)
        if array.dtype == object or np.iscomplexobj(array):
            raise TypeError
        return array.astype(np.float64)
    except (TypeError, ValueError):
        raise LaplodeError(f"`{name}` must be an array of real {unit}, got {type(value).__name__}.") from None


def check_times(name: str, ts: Any) -> np.ndarray:
    """Return `ts` as a float64 array of shape (T,) or (N, T), or say what is wrong with it."""
    ts = _real_array(name, ts, "times")
    if ts.ndim not in (1, 2) or ts.shape[-1] < 1:
        raise LaplodeError(f"`{name}` must have shape (T,) or (N, T), got shape {ts.shape}.")
    if not np.all(np.isfinite(ts)):
        raise LaplodeError(f"`{name}` must be finite, got {int(np.sum(~np.isfinite(ts)))} NaN or infinite times.")
    decreasing = np.argwhere(np.diff(ts, axis=-1) <= 0)
    if decreasing.size:
        index = tuple(int(i) for i in decreasing[0])
        later = (*index[:-1], index[-1] + 1)
        raise LaplodeError(
            f"`{name}` must be strictly increasing along its last axis, but {name}[{', '.join(map(str, index))}] = "
            f"{ts[index]:g} is followed by {ts[later]:g}. Sort the times, and merge observations made at the same time."
        )
    return ts


def check_solvable(name: str, ts: np.ndarray) -> None:
    """Raise `LaplodeError` unless there is a time after the first."""
    if ts.shape[-1] < 2:
        raise LaplodeError(
            f"`{name}` must have at least two times, the first of them the time of the initial state; got shape "
            f"{ts.shape}."
        )


def check_initial_state(name: str, y0: Any, num_trajectories: int) -> np.ndarray:
    """Return `y0` as a float64 array of shape (N, D), or say what is wrong with it."""
    y0 = _real_array(name, y0, "states")
    if y0.ndim == 1 and num_trajectories == 1:
        y0 = y0[None]
    if y0.ndim != 2 or y0.shape[0] != num_trajectories:
        raise LaplodeError(
            f"`{name}` must have shape (N, D) with N = {num_trajectories} trajectories, got shape {y0.shape}. For one "
            f"initial state shared by all trajectories pass `np.tile(y0, ({num_trajectories}, 1))`."
        )
    if not np.all(np.isfinite(y0)):
        row = int(np.argwhere(~np.isfinite(y0))[0][0])
        raise LaplodeError(
            f"`{name}` must be finite, but trajectory {row} starts at {y0[row]}. Where an initial state is unknown, "
            "let the model learn it: NeuralODE(vector_field, y0=first_guess)."
        )
    return y0


def check_args(name: str, args: PyTree, num_trajectories: int) -> PyTree:
    """Check that every leaf of `args` is an array with leading axis N."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        shape = getattr(leaf, "shape", None)
        if shape is None or len(shape) == 0 or shape[0] != num_trajectories:
            found = "a " + type(leaf).__name__ if shape is None else f"shape {shape}"
            raise LaplodeError(
                f"`{name}{jax.tree_util.keystr(path)}` must be an array with leading axis N = {num_trajectories} (one "
                f"entry per trajectory), got {found}."
            )
    return args


class Trajectories(eqx.Module):
    """A batch of N observed trajectories.

    Kept as NumPy float64, so that nothing is rounded when 64-bit JAX is switched on later.

    **Arguments:**

    - `ts`: times, shape (T,) or (N, T), strictly increasing. The first is the time of the initial state; where nothing
        was observed then, make the first row of `ys` NaN.
    - `ys`: observations, shape (N, T, K), or (T, K) for a single trajectory. NaN marks a missing value.
    - `y0`: initial states, shape (N, D) (or (D,) for a single trajectory). None when the model carries its own.
    - `args`: any pytree of arrays with leading axis N (forcing, covariates, dose), handed to the vector field.

    **Raises:** `LaplodeError` naming the argument when shapes disagree, times do not increase, a trajectory holds no
    observation, or a value is not finite.
    """

    ts: Float[np.ndarray, "N T"]
    ys: Float[np.ndarray, "N T K"]
    y0: Float[np.ndarray, "N D"] | None
    args: PyTree

    def __init__(self, ts: Any, ys: Any, y0: Any = None, args: PyTree = None):
        ts = check_times("ts", ts)
        check_solvable("ts", ts)
        ys = _real_array("ys", ys, "observations")
        if ys.ndim == 2:
            ys = ys[None]
        if ys.ndim != 3:
            hint = " For one channel use ys[:, None]." if ys.ndim == 1 else ""
            raise LaplodeError(f"`ys` must have shape (N, T, K), or (T, K) for one trajectory; got {ys.shape}.{hint}")
        num, length = ys.shape[:2]
        if ts.shape not in ((length,), (num, length)):
            raise LaplodeError(
                f"`ts` and `ys` disagree: ts has shape {ts.shape} but ys has N = {num} trajectories of T = {length} "
                f"times, which wants ts of shape ({length},) or ({num}, {length})."
            )
        if np.any(np.isinf(ys)):
            raise LaplodeError("`ys` holds infinite values. Mark missing observations by NaN.")
        empty = np.flatnonzero(np.all(np.isnan(ys), axis=(1, 2)))
        if empty.size:
            raise LaplodeError(f"`ys` holds no observation (all NaN) in trajectory {int(empty[0])}. Leave it out.")
        self.ts = np.broadcast_to(ts, (num, length)).copy()
        self.ys = ys
        self.y0 = None if y0 is None else check_initial_state("y0", y0, num)
        self.args = check_args("args", args, num)

    @property
    def observed(self) -> Bool[np.ndarray, "N T K"]:
        """True where a value was observed."""
        return ~np.isnan(self.ys)

    def until(self, length: int) -> "Trajectories":
        """The first `length` times of every trajectory (a trajectory may have no observation left in them)."""
        return eqx.tree_at(lambda t: (t.ts, t.ys), self, (self.ts[:, :length], self.ys[:, :length]))


def _an_observed_value(ys: Float[Array, "... K"]) -> Float[Array, " K"]:
    """Of each channel; of any channel where it has none; else 1."""
    largest = lambda x, axis: jnp.max(jnp.where(jnp.isnan(x), -jnp.inf, x), axis=axis)
    first = lambda x, otherwise: jnp.where(jnp.isfinite(x), x, otherwise)
    return first(largest(ys, tuple(range(ys.ndim - 1))), first(largest(ys, None), 1.0))


class AbstractLikelihood(eqx.Module):
    """p(y | prediction), independent over observations given the prediction."""

    @abc.abstractmethod
    def distribution(self, prediction: Float[Array, "... K"]) -> dist.Distribution:
        """The NumPyro distribution of the observations, elementwise in `prediction`."""

    def log_prob(self, prediction: Float[Array, "... K"], ys: Float[Array, "... K"]) -> Float[Array, "... K"]:
        """log p(y | prediction) of each observation, in nats; 0 where `ys` is NaN."""
        observed = ~jnp.isnan(ys)
        # An observed value lies in the support, so that no NaN enters a gradient through the unused branch.
        log_prob = self.distribution(prediction).log_prob(jnp.where(observed, ys, _an_observed_value(ys)))
        return jnp.where(observed, log_prob, 0.0)

    def score(self, prediction: Float[Array, "... K"], ys: Float[Array, "... K"]) -> Float[Array, "... K"]:
        """∂ log p(y | prediction) / ∂ prediction of each observation; 0 where `ys` is NaN."""
        return jax.grad(lambda f: jnp.sum(self.log_prob(f, ys)))(prediction)

    @abc.abstractmethod
    def fisher(self, prediction: Float[Array, "... K"], ys: Float[Array, "... K"]) -> Float[Array, "... K"]:
        """Fisher information of one observation in its prediction, never negative.

        `ys` matters only where the information has no closed form and the observed one stands in for it.
        """

    def stabilize(self, prediction: Float[Array, "... K"]) -> Float[Array, "... K"]:
        """The prediction in the coordinate whose Fisher information is constant, in which it is linearized."""
        return prediction

    def unstabilize(self, stabilized: Float[Array, "... K"]) -> Float[Array, "... K"]:
        """Inverse of `stabilize`."""
        return stabilized

    def check(self, ys: Float[np.ndarray, "N T K"]) -> None:
        """Raise `LaplodeError` where the observations lie outside the support."""


def _check_positive(name: str, value: Any) -> np.ndarray:
    array = _real_array(name, value)
    if not np.all(np.isfinite(array)) or np.any(array <= 0):
        raise LaplodeError(f"`{name}` must be positive and finite, got {value}.")
    return array


class AbstractScaleLikelihood(AbstractLikelihood):
    """A likelihood with a noise scale, one for all channels or one each; its Fisher information falls as scale⁻².

    `quadratic` says whether −log p is a square over scale², so that all of its derivatives fall like that.
    """

    scale: eqx.AbstractVar[Array | np.ndarray]
    learned: eqx.AbstractVar[bool]
    quadratic: ClassVar[bool]


def _check_scale(scale: Any) -> np.ndarray:
    scale = _check_positive("scale", scale)
    if scale.ndim > 1:
        raise LaplodeError(f"`scale` must be a scalar or have shape (K,), got shape {scale.shape}.")
    return scale


class Gaussian(AbstractScaleLikelihood):
    """y ~ Normal(prediction, scale).

    **Arguments:**

    - `scale`: standard deviation of the noise in the units of `ys`, a scalar or one per channel (K,).
    - `learned`: whether `fit` adjusts the scale, channel by channel, starting from `scale`. The posterior then
        conditions on the value found.

    **Raises:** `LaplodeError` when `scale` is not positive and finite.
    """

    scale: Array | np.ndarray
    learned: bool = eqx.field(static=True)
    quadratic: ClassVar[bool] = True

    def __init__(self, scale: Any, *, learned: bool = False):
        self.scale = _check_scale(scale)
        self.learned = learned

    def distribution(self, prediction):
        return dist.Normal(prediction, self.scale, validate_args=False)

    def fisher(self, prediction, ys):
        return jnp.broadcast_to(1 / jnp.asarray(self.scale) ** 2, prediction.shape)


class LogNormal(AbstractScaleLikelihood):
    """log y ~ Normal(log prediction, scale): the prediction is the median, and must be positive.

    **Arguments:**

    - `scale`: standard deviation of log y (0.1 is about 10% relative noise), a scalar or one per channel (K,).
    - `learned`: whether `fit` adjusts the scale, channel by channel, starting from `scale`. The posterior then
        conditions on the value found.

    **Raises:** `LaplodeError` when `scale` is not positive and finite.
    """

    scale: Array | np.ndarray
    learned: bool = eqx.field(static=True)
    quadratic: ClassVar[bool] = True

    def __init__(self, scale: Any, *, learned: bool = False):
        self.scale = _check_scale(scale)
        self.learned = learned

    def distribution(self, prediction):
        return dist.LogNormal(jnp.log(prediction), self.scale, validate_args=False)

    def fisher(self, prediction, ys):
        return 1 / (self.scale * prediction) ** 2

    def stabilize(self, prediction):
        return jnp.log(prediction)

    def unstabilize(self, stabilized):
        return jnp.exp(stabilized)

    def check(self, ys):
        if np.any(ys <= 0):
            index = tuple(int(i) for i in np.argwhere(ys <= 0)[0])
            raise LaplodeError(
                f"`ys` must be positive under a LogNormal likelihood, but ys{list(index)} = {ys[index]}."
            )


class StudentT(AbstractScaleLikelihood):
    """y ~ prediction + scale · StudentT(df): robust to outliers.

    **Arguments:**

    - `df`: degrees of freedom, positive.
    - `scale`: scale of the noise in the units of `ys`, a scalar or one per channel (K,).
    - `learned`: whether `fit` adjusts the scale, channel by channel, starting from `scale`.

    The Fisher information is (df + 1) / ((df + 3) scale²) (Lange, Little and Taylor, 1989).

    **Raises:** `LaplodeError` when `df` or `scale` is not positive and finite.
    """

    df: Array | np.ndarray
    scale: Array | np.ndarray
    learned: bool = eqx.field(static=True)
    quadratic: ClassVar[bool] = False

    def __init__(self, df: Any, scale: Any, *, learned: bool = False):
        self.df = _check_positive("df", df)
        self.scale = _check_scale(scale)
        self.learned = learned

    def distribution(self, prediction):
        return dist.StudentT(self.df, prediction, self.scale, validate_args=False)

    def fisher(self, prediction, ys):
        information = (self.df + 1) / ((self.df + 3) * jnp.asarray(self.scale) ** 2)
        return jnp.broadcast_to(information, prediction.shape)


class Poisson(AbstractLikelihood):
    """y ~ Poisson(prediction): counts, with a positive prediction."""

    def distribution(self, prediction):
        return dist.Poisson(prediction, validate_args=False)

    def fisher(self, prediction, ys):
        return 1 / prediction

    def stabilize(self, prediction):
        return 2 * jnp.sqrt(prediction)

    def unstabilize(self, stabilized):
        return jnp.maximum(stabilized, 0) ** 2 / 4

    def check(self, ys):
        wrong = (ys < 0) | (ys != np.round(ys))
        wrong &= ~np.isnan(ys)
        if np.any(wrong):
            index = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise LaplodeError(f"`ys` must hold counts under a Poisson likelihood, but ys{list(index)} = {ys[index]}.")


class FromDistribution(AbstractLikelihood):
    """Any function from predictions to a NumPyro distribution, elementwise.

    The Fisher information falls back on the observed one, −∂² log p / ∂prediction² by automatic differentiation,
    clipped at 0 where the likelihood is not log-concave.
    """

    function: Callable[[Array], dist.Distribution]

    def distribution(self, prediction):
        return self.function(prediction)

    def fisher(self, prediction, ys):
        score = lambda f: self.score(f, ys)
        _, curvature = jax.jvp(score, (prediction,), (jnp.ones_like(prediction),))
        return jnp.maximum(-curvature, 0)


class GaussianPrior(eqx.Module):
    """θ ~ Normal(mean, 1 / precision), independent over parameters.

    **Arguments:**

    - `precision`: a positive scalar; a pytree prefix of the model (one value per layer, say); or one value per
        parameter, as an array of shape (P,). An L2 penalty (λ/2)‖θ‖² on the summed negative log-likelihood is a
        precision of λ.
    - `mean`: in the same three forms; zero by default.

    **Raises:** `LaplodeError` when a precision is not positive and finite.
    """

    precision: PyTree
    mean: PyTree

    def __init__(self, precision: PyTree, mean: PyTree = 0.0):
        def finite(name, leaf):
            array = _real_array(name, leaf)
            if not np.all(np.isfinite(array)):
                raise LaplodeError(f"`{name}` must be finite, got {leaf}.")
            return array

        def each(check, name, tree):
            if not jax.tree.leaves(tree):
                raise LaplodeError(f"`{name}` of the prior is missing: it must be a number, an array, or a pytree.")
            # Arrays, not Python floats: with these, each new value would be compiled anew.
            return jax.tree_util.tree_map_with_path(lambda p, x: check(name + jax.tree_util.keystr(p), x), tree)

        self.precision = each(_check_positive, "precision", precision)
        self.mean = each(finite, "mean", mean)


class Problem(eqx.Module):
    """Data, likelihood and prior: everything about the inference but the model.

    **Arguments:**

    - `data`: the observed `Trajectories`.
    - `likelihood`: `Gaussian`, `LogNormal`, `StudentT`, `Poisson`, or any function from predictions (..., K) to a
        NumPyro distribution of the same batch shape.
    - `prior`: a `GaussianPrior`, or its precision as a positive number.

    **Raises:** `LaplodeError` when an argument is of the wrong kind, a noise scale does not fit the channels, or an
    observation lies outside the likelihood's support.
    """

    data: Trajectories
    likelihood: AbstractLikelihood
    prior: GaussianPrior

    def __init__(self, data: Trajectories, likelihood: Any, prior: Any):
        if not isinstance(data, Trajectories):
            raise LaplodeError(f"`data` must be laplode.Trajectories(ts, ys, ...), got {type(data).__name__}.")
        if isinstance(likelihood, type):
            raise LaplodeError(f"`likelihood` must be an instance, as in {likelihood.__name__}(...), got the class.")
        if not isinstance(likelihood, AbstractLikelihood):
            if not callable(likelihood):
                raise LaplodeError(
                    "`likelihood` must be Gaussian(scale), LogNormal(scale), StudentT(df, scale), Poisson(), or a "
                    f"function `prediction -> numpyro distribution`; got {type(likelihood).__name__}."
                )
            likelihood = FromDistribution(likelihood)  # pyright: ignore[reportArgumentType]
        if isinstance(prior, AbstractLikelihood | Trajectories):
            raise LaplodeError(
                f"`prior` must be laplode.GaussianPrior(precision) or a precision, got {type(prior).__name__}."
            )
        if not isinstance(prior, GaussianPrior):
            prior = GaussianPrior(prior)
        channels = data.ys.shape[-1]
        if isinstance(likelihood, AbstractScaleLikelihood):
            if np.shape(likelihood.scale) not in ((), (channels,)):
                raise LaplodeError(
                    f"`scale` has shape {np.shape(likelihood.scale)} but ys has K = {channels} channels: give one "
                    f"scale, or an array of shape ({channels},)."
                )
            if likelihood.learned:  # one for each channel from here on
                scale = np.broadcast_to(likelihood.scale, (channels,)).copy()
                likelihood = eqx.tree_at(lambda l: l.scale, likelihood, scale)
        likelihood.check(data.ys)
        _check_distribution(likelihood, data.ys.shape)
        self.data = data
        self.likelihood = likelihood
        self.prior = prior

    def log_likelihood(self, predictions: Float[Array, "N T K"]) -> Float[Array, ""]:
        """log p(Y | predictions) in nats, summed over all observations."""
        return jnp.sum(self.likelihood.log_prob(predictions, jnp.asarray(self.data.ys)))


def _check_distribution(likelihood: AbstractLikelihood, shape: tuple[int, ...]) -> None:
    def batch_shape(prediction):
        found = likelihood.distribution(prediction)
        if not isinstance(found, dist.Distribution):
            raise LaplodeError(
                f"`likelihood` must return a NumPyro distribution, got {type(found).__name__}: write, for example, "
                "lambda prediction: numpyro.distributions.Laplace(prediction, 0.1)."
            )
        if found.event_shape or found.batch_shape != shape:
            raise LaplodeError(
                f"`likelihood` must treat observations one by one: for predictions of shape {shape} its batch shape "
                f"is {found.batch_shape} and its event shape {found.event_shape}. Drop event dimensions (no "
                "`.to_event`)."
            )
        return prediction

    try:
        jax.eval_shape(batch_shape, jax.ShapeDtypeStruct(shape, jnp.result_type(float)))
    except LaplodeError:
        raise
    except Exception as error:
        raise LaplodeError(
            f"`likelihood` can't be evaluated on predictions of shape {shape}: {type(error).__name__}: {error}"
        ) from error


def check_problem(problem: Any) -> None:
    """Raise `LaplodeError` unless `problem` is a `Problem`."""
    if not isinstance(problem, Problem):
        raise LaplodeError(f"`problem` must be laplode.Problem(data, likelihood, prior), got {type(problem).__name__}.")

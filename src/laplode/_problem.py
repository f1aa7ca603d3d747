"""What is being inferred: observed trajectories, a likelihood, a prior."""

import abc
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import log_ndtr, ndtr
from jax.scipy.stats import norm
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from ._errors import LaplodeError


def real_array(name: str, value: Any, unit: str = "numbers") -> np.ndarray:
    """Return `value` as a float64 array, or say that it is none of real numbers."""
    try:
        array = np.asarray(value)
        if array.dtype == object or np.iscomplexobj(array):
            raise TypeError
        return array.astype(np.float64)
    except (TypeError, ValueError):
        raise LaplodeError(f"`{name}` must be an array of real {unit}, got {type(value).__name__}.") from None


def check_key(name: str, key: Any) -> PRNGKeyArray:
    """Return `key`, or say that it is no JAX random key."""
    array = isinstance(key, jax.Array | np.ndarray)
    typed = array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    raw = array and key.dtype == np.uint32 and key.shape in ((2,), (4,))
    if not typed and not raw:
        got = f"an array of {key.dtype} and shape {key.shape}" if array else repr(key)
        raise LaplodeError(f"`{name}` must be one JAX random key, such as jax.random.key(0); got {got}.")
    return key  # pyright: ignore[reportReturnType]


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Return `value` as an integer of at least `least`, or say that it is none."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise LaplodeError(f"`{name}` must be {wanted}, got {value!r}.")
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    """Return `value` as True or False, or say that it is neither."""
    if not isinstance(value, bool | np.bool_):
        raise LaplodeError(f"`{name}` must be True or False, got {value!r}.")
    return bool(value)


def check_times(name: str, ts: Any) -> np.ndarray:
    """Return `ts` as a float64 array of shape (T,) or (N, T), or say what is wrong with it."""
    ts = real_array(name, ts, "times")
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
    y0 = real_array(name, y0, "states")
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
        ys = real_array("ys", ys, "observations")
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
    """p(y | prediction), independent over observations given the prediction.

    Of each time there are F predictions: one for each of the K channels or, where the model predicts the noise scale
    too, two, of which the first K are locations.
    """

    def num_predictions(self, channels: int) -> int:
        """F, for K channels."""
        return channels

    @abc.abstractmethod
    def distribution(self, prediction: Float[Array, "... F"]) -> dist.Distribution:
        """The NumPyro distribution of the observations (..., K)."""

    @eqx.filter_jit
    def sample(self, key: PRNGKeyArray, prediction: Float[Array, "... F"]) -> Float[Array, "... K"]:
        """Observations as they would be recorded."""
        return jnp.asarray(self.distribution(prediction).sample(key), dtype=float)

    @eqx.filter_jit
    def log_prob(self, prediction: Float[Array, "... F"], ys: Float[Array, "... K"]) -> Float[Array, "... K"]:
        """log p(y | prediction) of each observation, in nats; 0 where `ys` is NaN."""
        observed = ~jnp.isnan(ys)
        # An observed value lies in the support, so that no NaN enters a gradient through the unused branch.
        values = jnp.where(observed, ys, _an_observed_value(ys))
        log_prob = self.distribution(self._possible(prediction, ys)).log_prob(values)
        return jnp.where(observed, log_prob, 0.0)

    def _possible(self, prediction: Float[Array, "... F"], ys: Float[Array, "... K"]) -> Float[Array, "... F"]:
        """The prediction, and in the place of one that no value can have, where none is observed, one that can.

        A state that starts at 0 is no median of a LogNormal, and its derivative there must not count.
        """
        value, channels = _an_observed_value(ys), ys.shape[-1]
        possible = ~jnp.isnan(ys) | _has_density(self, jax.lax.stop_gradient(prediction), value)
        location = jnp.where(possible, prediction[..., :channels], value)
        return jnp.concatenate([location, prediction[..., channels:]], axis=-1)

    @eqx.filter_jit
    def score(self, prediction: Float[Array, "... F"], ys: Float[Array, "... K"]) -> Float[Array, "... F"]:
        """∂ log p(y | prediction) / ∂ prediction of each observation; 0 where `ys` is NaN."""
        return jax.grad(lambda f: jnp.sum(self.log_prob(f, ys)))(prediction)

    @abc.abstractmethod
    def fisher(self, prediction: Float[Array, "... F"], ys: Float[Array, "... K"]) -> Float[Array, "... F"]:
        """Fisher information of one observation in its prediction, never negative; location and scale share none.

        `ys` matters only where the information has no closed form and the observed one stands in for it.
        """

    def stabilize(self, prediction: Float[Array, "... F"]) -> Float[Array, "... F"]:
        """The prediction in the coordinate whose Fisher information is constant, in which it is linearized."""
        return prediction

    def unstabilize(self, stabilized: Float[Array, "... F"]) -> Float[Array, "... F"]:
        """Inverse of `stabilize`."""
        return stabilized

    def check(self, ys: Float[np.ndarray, "N T K"]) -> None:
        """Raise `LaplodeError` where the observations lie outside the support."""


# Traced, a distribution does not refuse what is looked for here.
@eqx.filter_jit
def _has_density(likelihood: AbstractLikelihood, prediction: Float[Array, "... F"], ys: Float[Array, " K"]):
    return jnp.isfinite(likelihood.distribution(prediction).log_prob(ys))


def check_positive(name: str, value: Any) -> np.ndarray:
    """Return `value` as an array of positive numbers, or say that it is none."""
    array = real_array(name, value)
    if not np.all(np.isfinite(array)) or np.any(array <= 0):
        raise LaplodeError(f"`{name}` must be positive and finite, got {value}.")
    return array


class AbstractScaleLikelihood(AbstractLikelihood):
    """A likelihood with a location and a noise scale, which is given, one for all channels or one each, or predicted.

    Where `scale` is None the model predicts 2K numbers at each time: the locations, then the logarithms of the scales.
    """

    scale: eqx.AbstractVar[Array | np.ndarray | None]
    learned: eqx.AbstractVar[bool]

    @property
    @abc.abstractmethod
    def quadratic(self) -> bool:
        """Whether −log p is a square over scale², so that all of its derivatives fall like that."""

    @property
    def scalable(self) -> bool:
        """Whether there is a scale, and the Fisher information falls as scale⁻²."""
        return self.scale is not None

    @abc.abstractmethod
    def family(self, location: Float[Array, "... K"], scale: Float[Array, "... K"]) -> dist.Distribution:
        """The NumPyro distribution of a location and a scale."""

    @abc.abstractmethod
    def information(
        self, location: Float[Array, "... K"], scale: Float[Array, "... K"]
    ) -> tuple[Float[Array, "... K"], float]:
        """Fisher information in the location, and in the logarithm of the scale."""

    def num_predictions(self, channels):
        return channels if self.scale is not None else 2 * channels

    def parts(self, prediction: Float[Array, "... F"]) -> tuple[Float[Array, "... K"], Float[Array, "... K"]]:
        """Location and scale, of one shape."""
        if self.scale is None:
            location, log_scale = jnp.split(prediction, 2, axis=-1)
            return location, jnp.exp(log_scale)
        return prediction, jnp.broadcast_to(jnp.asarray(self.scale), prediction.shape)

    def distribution(self, prediction):
        return self.family(*self.parts(prediction))

    def fisher(self, prediction, ys):
        location, scale = self.parts(prediction)
        of_location, of_log_scale = self.information(location, scale)
        if self.scale is not None:
            return of_location
        return jnp.concatenate([of_location, jnp.full_like(scale, of_log_scale)], axis=-1)


def _check_scale(scale: Any, learned: Any) -> np.ndarray | None:
    check_flag("learned", learned)
    if scale is None:
        if learned:
            raise LaplodeError(
                "`learned`=True adjusts a given scale; without one the model predicts it. Give the scale to start from."
            )
        return None
    scale = check_positive("scale", scale)
    if scale.ndim > 1:
        raise LaplodeError(f"`scale` must be a scalar or have shape (K,), got shape {scale.shape}.")
    return scale


class AbstractNormal(AbstractScaleLikelihood):
    """A normal distribution of the observation in a coordinate of its own, perhaps seen between limits only.

    Observations at a limit or beyond it are known to lie there, no more.
    """

    lower: eqx.AbstractVar[Array | np.ndarray | None]
    upper: eqx.AbstractVar[Array | np.ndarray | None]

    @abc.abstractmethod
    def normal(self, y: Float[Array, "... K"]) -> Float[Array, "... K"]:
        """The coordinate in which observations are normal around their location."""

    @abc.abstractmethod
    def unnormal(self, x: Float[Array, "... K"]) -> Float[Array, "... K"]:
        """Inverse of `normal`."""

    @property
    def censored(self) -> bool:
        """Whether there are limits."""
        return self.lower is not None or self.upper is not None

    @property
    def quadratic(self):
        return self.scalable

    @property
    def scalable(self):
        return self.scale is not None and not self.censored

    def _beyond(self, ys) -> tuple[Array, Array]:
        """Where observations are at or beyond the lower and the upper limit."""
        below = jnp.zeros(jnp.shape(ys), bool) if self.lower is None else ys <= self.lower
        return below, jnp.zeros(jnp.shape(ys), bool) if self.upper is None else ys >= self.upper

    def _margins(self, location, scale) -> tuple[Array | None, Array | None]:
        """How far the limits lie above the location, in scales."""
        margin = lambda limit: None if limit is None else (self.normal(limit) - self.normal(location)) / scale
        return margin(self.lower), margin(self.upper)

    def sample(self, key, prediction):
        drawn = super().sample(key, prediction)
        return jnp.clip(drawn, self.lower, self.upper) if self.censored else drawn

    @eqx.filter_jit
    def log_prob(self, prediction, ys):
        if not self.censored:
            return super().log_prob(prediction, ys)
        prediction = self._possible(prediction, ys)
        inside = super().log_prob(prediction, jnp.clip(ys, self.lower, self.upper))
        lower, upper = self._margins(*self.parts(prediction))
        below, above = self._beyond(ys)
        if lower is not None:
            inside = jnp.where(below, log_ndtr(lower), inside)
        return inside if upper is None else jnp.where(above, log_ndtr(-upper), inside)

    def information(self, location, scale):
        slope = jax.jvp(self.normal, (location,), (jnp.ones_like(location),))[1]
        lower, upper = self._margins(location, scale)
        seen = jnp.ones_like(location)
        # E[score²]: of what is seen ∫ z² φ(z) dz between the limits, of what is not φ(z)²/Φ(z).
        if lower is not None:
            seen += lower * norm.pdf(lower) - ndtr(lower) + jnp.exp(2 * norm.logpdf(lower) - log_ndtr(lower))
        if upper is not None:
            seen += -upper * norm.pdf(upper) - ndtr(-upper) + jnp.exp(2 * norm.logpdf(upper) - log_ndtr(-upper))
        return seen * (slope / scale) ** 2, 2.0

    def stabilize(self, prediction):
        return self._on_locations(self.normal, prediction)

    def unstabilize(self, stabilized):
        return self._on_locations(self.unnormal, stabilized)

    def _on_locations(self, function: Callable[[Array], Array], prediction: Float[Array, "... F"]) -> Array:
        if self.scale is not None:
            return function(prediction)
        location, log_scale = jnp.split(prediction, 2, axis=-1)
        return jnp.concatenate([function(location), log_scale], axis=-1)


def _check_limits(lower: Any, upper: Any, scale: Any, positive: bool) -> tuple[np.ndarray | None, np.ndarray | None]:
    limits = []
    for name, limit in (("lower", lower), ("upper", upper)):
        if limit is None:
            limits.append(None)
            continue
        limit = check_positive(name, limit) if positive else real_array(name, limit)
        if limit.ndim > 1 or not np.all(np.isfinite(limit)):
            raise LaplodeError(f"`{name}` must be a finite number or have shape (K,), got {limit}.")
        limits.append(limit)
    if lower is not None and upper is not None and not np.all(limits[0] < limits[1]):
        raise LaplodeError(f"`lower` must lie below `upper`, got {lower} and {upper}.")
    if scale is None and (lower is not None or upper is not None):
        raise LaplodeError(
            "`scale` must be given with `lower` or `upper`: beyond a limit, location and scale can't be told apart one "
            "by one."
        )
    return limits[0], limits[1]


class Gaussian(AbstractNormal):
    """y ~ Normal(prediction, scale).

    **Arguments:**

    - `scale`: standard deviation of the noise in the units of `ys`, a scalar or one per channel (K,). None when the
        model predicts it: then its predictions are (T, 2K), the means and the logarithms of the standard deviations.
        `NeuralODE(..., scale=...)` does so with a standard deviation for each channel that is a parameter.
    - `learned`: whether `fit` adjusts the scale, channel by channel, starting from `scale`. The posterior then
        conditions on the value found.
    - `lower`, `upper`: limits of detection in the units of `ys`, a scalar or one per channel (K,): an observation at
        one or beyond it is known to lie there, no more.

    **Raises:** `LaplodeError` when `scale` is not positive and finite, or limits do not fit.
    """

    scale: Array | np.ndarray | None
    learned: bool = eqx.field(static=True)
    lower: Array | np.ndarray | None
    upper: Array | np.ndarray | None

    def __init__(self, scale: Any = None, *, learned: bool = False, lower: Any = None, upper: Any = None):
        self.scale = _check_scale(scale, learned)
        self.learned = bool(learned)
        self.lower, self.upper = _check_limits(lower, upper, scale, positive=False)

    def family(self, location, scale):
        return dist.Normal(location, scale, validate_args=False)

    def normal(self, y):
        return y

    def unnormal(self, x):
        return x


class LogNormal(AbstractNormal):
    """log y ~ Normal(log prediction, scale): the prediction is the median, and must be positive.

    **Arguments:**

    - `scale`: standard deviation of log y (0.1 is about 10% relative noise), a scalar or one per channel (K,), or None
        when the model predicts it, as in `Gaussian`.
    - `learned`: whether `fit` adjusts the scale, channel by channel, starting from `scale`. The posterior then
        conditions on the value found.
    - `lower`, `upper`: limits of detection in the units of `ys`, as in `Gaussian`. What lies below may be given as 0.

    **Raises:** `LaplodeError` when `scale` is not positive and finite, or limits do not fit.
    """

    scale: Array | np.ndarray | None
    learned: bool = eqx.field(static=True)
    lower: Array | np.ndarray | None
    upper: Array | np.ndarray | None

    def __init__(self, scale: Any = None, *, learned: bool = False, lower: Any = None, upper: Any = None):
        self.scale = _check_scale(scale, learned)
        self.learned = bool(learned)
        self.lower, self.upper = _check_limits(lower, upper, scale, positive=True)

    def family(self, location, scale):
        return dist.LogNormal(jnp.log(location), scale, validate_args=False)

    def normal(self, y):
        return jnp.log(y)

    def unnormal(self, x):
        return jnp.exp(x)

    def check(self, ys):
        seen = np.full(ys.shape, True) if self.lower is None else ys > self.lower
        if np.any(wrong := seen & (ys <= 0)):
            index = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise LaplodeError(
                f"`ys` must be positive under a LogNormal likelihood, but ys{list(index)} = {ys[index]}. What lies "
                "below a detection limit is told by LogNormal(scale, lower=limit)."
            )


class StudentT(AbstractScaleLikelihood):
    """y ~ prediction + scale · StudentT(df): robust to outliers.

    **Arguments:**

    - `df`: degrees of freedom, positive.
    - `scale`: scale of the noise in the units of `ys`, a scalar or one per channel (K,), or None when the model
        predicts it, as in `Gaussian`.
    - `learned`: whether `fit` adjusts the scale, channel by channel, starting from `scale`.

    The Fisher information is (df + 1) / ((df + 3) scale²), and 2 df / (df + 3) in log scale (Lange, Little and Taylor,
    1989).

    **Raises:** `LaplodeError` when `df` or `scale` is not positive and finite.
    """

    df: Array | np.ndarray
    scale: Array | np.ndarray | None
    learned: bool = eqx.field(static=True)

    def __init__(self, df: Any, scale: Any = None, *, learned: bool = False):
        df = check_positive("df", df)
        if df.ndim:
            raise LaplodeError(f"`df` must be a number, got shape {df.shape}.")
        self.df = df
        self.scale = _check_scale(scale, learned)
        self.learned = bool(learned)

    @property
    def quadratic(self):
        return False

    def family(self, location, scale):
        return dist.StudentT(self.df, location, scale, validate_args=False)

    def information(self, location, scale):
        return (self.df + 1) / ((self.df + 3) * scale**2), 2 * self.df / (self.df + 3)


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
        _check_counts(ys, "Poisson")


class NegativeBinomial(AbstractLikelihood):
    """y ~ NegativeBinomial of mean prediction and variance prediction + prediction² / concentration: uneven counts.

    **Arguments:**

    - `concentration`: positive, a scalar or one per channel (K,); towards infinity the counts are Poisson. None if the
        model predicts it, as `NeuralODE(..., scale=concentration)` does: 2K numbers at each time, the means and then
        the logarithms of the concentrations.

    **Raises:** `LaplodeError` when `concentration` is not positive and finite.
    """

    concentration: Array | np.ndarray | None

    def __init__(self, concentration: Any = None):
        if concentration is not None:
            concentration = check_positive("concentration", concentration)
            if concentration.ndim > 1:
                raise LaplodeError(
                    f"`concentration` must be a scalar or have shape (K,), got shape {concentration.shape}."
                )
        self.concentration = concentration

    def num_predictions(self, channels):
        return channels if self.concentration is not None else 2 * channels

    def _parts(self, prediction: Float[Array, "... F"]) -> tuple[Float[Array, "... K"], Float[Array, "... K"]]:
        if self.concentration is None:
            mean, log_concentration = jnp.split(prediction, 2, axis=-1)
            return mean, jnp.exp(log_concentration)
        return prediction, jnp.asarray(self.concentration)

    def distribution(self, prediction):
        return dist.NegativeBinomial2(*self._parts(prediction), validate_args=False)

    def fisher(self, prediction, ys):
        mean, concentration = self._parts(prediction)
        of_mean = concentration / (mean * (mean + concentration))
        if self.concentration is not None:
            return of_mean
        return jnp.concatenate([of_mean, _concentration_information(mean, concentration)], axis=-1)

    def stabilize(self, prediction):
        if self.concentration is None:  # there is no coordinate for both
            mean, log_concentration = jnp.split(prediction, 2, axis=-1)
            return jnp.concatenate([2 * jnp.sqrt(mean), log_concentration], axis=-1)
        root = jnp.sqrt(jnp.asarray(self.concentration))
        return 2 * root * jnp.arcsinh(jnp.sqrt(prediction) / root)

    def unstabilize(self, stabilized):
        if self.concentration is None:
            of_mean, log_concentration = jnp.split(stabilized, 2, axis=-1)
            return jnp.concatenate([jnp.maximum(of_mean, 0) ** 2 / 4, log_concentration], axis=-1)
        root = jnp.sqrt(jnp.asarray(self.concentration))
        return (root * jnp.sinh(jnp.maximum(stabilized, 0) / (2 * root))) ** 2

    def check(self, ys):
        _check_counts(ys, "NegativeBinomial")


def _concentration_information(mean: Float[Array, "... K"], concentration: Float[Array, "... K"]) -> Array:
    """Fisher information of a negative binomial in the logarithm of its concentration c, the mean m being held.

    It is c² (ψ'(c) − E ψ'(y + c)) − c m / (c + m). With ψ'(x) = ∫ t e^(−xt) / (1 − e^(−t)) dt over t > 0 the mean over
    y is that of a power of e^(−t), which is known: what is left is one smooth integral, taken here over log t.
    """
    m, c = mean[..., None], concentration[..., None]
    low, high = -jnp.log(1 + m + c) - 20, jnp.log(40 / c)
    x = low + (high - low) * jnp.linspace(0, 1, 257)
    t = jnp.exp(x)
    fall = -jnp.expm1(-t)
    integrand = t**2 / fall * jnp.exp(-c * t) * -jnp.expm1(-c * jnp.log1p(m / c * fall))
    integral = jnp.trapezoid(integrand, x, axis=-1)
    c, m = concentration, mean
    return jnp.maximum(c**2 * integral - c * m / (c + m), 0)


def _check_counts(ys: Float[np.ndarray, "N T K"], name: str) -> None:
    wrong = ((ys < 0) | (ys != np.round(ys))) & ~np.isnan(ys)
    if np.any(wrong):
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise LaplodeError(f"`ys` must hold counts under a {name} likelihood, but ys{list(index)} = {ys[index]}.")


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


class AbstractPrior(eqx.Module):
    """p(θ)."""


class GaussianPrior(AbstractPrior):
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
            array = real_array(name, leaf)
            if not np.all(np.isfinite(array)):
                raise LaplodeError(f"`{name}` must be finite, got {leaf}.")
            return array

        def each(check, name, tree):
            if not jax.tree.leaves(tree):
                raise LaplodeError(f"`{name}` of the prior is missing: it must be a number, an array, or a pytree.")
            # Arrays, not Python floats: with these, each new value would be compiled anew.
            return jax.tree_util.tree_map_with_path(lambda p, x: check(name + jax.tree_util.keystr(p), x), tree)

        self.precision = each(check_positive, "precision", precision)
        self.mean = each(finite, "mean", mean)


class NamedPriors(AbstractPrior):
    """Distributions of parameters by name, and a Gaussian for the rest.

    Where a distribution lives on a part of the numbers (a rate is positive, a fraction lies between 0 and 1), its
    parameter enters θ in NumPyro's unconstrained coordinate, such as its logarithm: there the posterior is taken to be
    Gaussian, with the Jacobian of the transformation in its density.

    ```python
    laplode.NamedPriors({"vector_field.rate": dist.LogNormal(-0.5, 0.5), "scale": dist.HalfNormal(1.0)}, rest=1.0)
    ```

    **Arguments:**

    - `named`: path of a leaf of the model, or of a part of it, such as `vector_field.rate` or
        `vector_field.rates[0]`, → NumPyro distribution of its numbers one by one, of a batch shape that fits the
        leaf's. `posterior.parameters.leaves` lists the paths.
    - `rest`: a `GaussianPrior`, or its precision, for all other parameters.

    **Raises:** `LaplodeError` when a distribution is not one of single real numbers.
    """

    named: dict[str, dist.Distribution]
    rest: GaussianPrior | None

    def __init__(self, named: Mapping[str, dist.Distribution], rest: Any = None):
        if not isinstance(named, Mapping) or not named:
            raise LaplodeError(
                '`named` must map paths of leaves to NumPyro distributions, as in {"vector_field.rate": '
                f"dist.LogNormal(0, 1)}}; got {named!r}."
            )
        for name, each in named.items():
            if not isinstance(name, str) or not isinstance(each, dist.Distribution):
                raise LaplodeError(
                    f"`named`[{name!r}] must be the NumPyro distribution of the leaf of that path, got "
                    f"{type(each).__name__}."
                )
            if each.event_shape or each.is_discrete:
                raise LaplodeError(
                    f"`named`[{name!r}] must be a distribution of real numbers one by one, but it is "
                    + ("discrete." if each.is_discrete else f"of arrays of shape {each.event_shape}.")
                )
        if rest is not None and not isinstance(rest, GaussianPrior):
            rest = GaussianPrior(rest)
        # Arrays, not Python floats: with these, each new value would be compiled anew.
        as_array = lambda x: jnp.asarray(x, dtype=float) if isinstance(x, float | int) else x
        self.named = {name: jax.tree.map(as_array, each) for name, each in named.items()}
        self.rest = rest


class PosteriorPrior(AbstractPrior):
    """θ ~ Normal(mean, Λ⁻¹) with Λ = diag(precision) + rowsᵀ rows: what was learned from data before.

    Made by `posterior.as_prior()`. `log_det` is log det Λ, `leaves` are names and shapes of the model's arrays in the
    order of θ, and `coordinates` are the priors that those data had, which say where θ is unconstrained.
    """

    mean: Float[Array, " P"]
    precision: Float[Array, " P"]
    rows: Float[Array, "R P"]
    log_det: Float[Array, ""]
    leaves: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True)
    coordinates: NamedPriors | None


class Problem(eqx.Module):
    """Data, likelihood and prior: everything about the inference but the model.

    **Arguments:**

    - `data`: the observed `Trajectories`.
    - `likelihood`: `Gaussian`, `LogNormal`, `StudentT`, `Poisson`, `NegativeBinomial`, or any function from predictions
        (..., K) to a NumPyro distribution of the same batch shape.
    - `prior`: a `GaussianPrior`, its precision as a positive number, `NamedPriors`, or `posterior.as_prior()`, what was
        learned from data before.

    **Raises:** `LaplodeError` when an argument is of the wrong kind, a noise scale does not fit the channels, or an
    observation lies outside the likelihood's support.
    """

    data: Trajectories
    likelihood: AbstractLikelihood
    prior: AbstractPrior

    def __init__(self, data: Trajectories, likelihood: Any, prior: Any):
        if not isinstance(data, Trajectories):
            raise LaplodeError(f"`data` must be laplode.Trajectories(ts, ys, ...), got {type(data).__name__}.")
        if isinstance(likelihood, type):
            raise LaplodeError(f"`likelihood` must be an instance, as in {likelihood.__name__}(...), got the class.")
        if not isinstance(likelihood, AbstractLikelihood):
            if not callable(likelihood):
                raise LaplodeError(
                    "`likelihood` must be Gaussian(scale), LogNormal(scale), StudentT(df, scale), Poisson(), "
                    "NegativeBinomial(concentration), or a "
                    f"function `prediction -> numpyro distribution`; got {type(likelihood).__name__}."
                )
            likelihood = FromDistribution(likelihood)  # pyright: ignore[reportArgumentType]
        if isinstance(prior, AbstractLikelihood | Trajectories | dist.Distribution):
            raise LaplodeError(
                "`prior` must be laplode.GaussianPrior(precision), a precision, or laplode.NamedPriors; got "
                f"{type(prior).__name__}."
            )
        if not isinstance(prior, AbstractPrior):
            try:
                prior = GaussianPrior(prior)
            except LaplodeError as error:
                raise LaplodeError(f"`prior` is no precision: {error}") from error
        channels = data.ys.shape[-1]
        for name in ("scale", "lower", "upper", "concentration"):
            value = getattr(likelihood, name, None)
            if isinstance(value, np.ndarray | Array) and value.shape not in ((), (channels,)):
                raise LaplodeError(
                    f"`{name}` has shape {value.shape} but ys has K = {channels} channels: give one {name}, or an "
                    f"array of shape ({channels},)."
                )
        if isinstance(likelihood, AbstractScaleLikelihood) and likelihood.learned:  # one for each channel from here on
            scale = np.broadcast_to(np.asarray(likelihood.scale), (channels,)).copy()
            likelihood = eqx.tree_at(lambda l: l.scale, likelihood, scale)
        likelihood.check(data.ys)
        _check_distribution(likelihood, data.ys.shape)
        self.data = data
        self.likelihood = likelihood
        self.prior = prior

    @property
    def prediction_shape(self) -> tuple[int, int]:
        """(T, F): the shape of a model's predictions of one trajectory."""
        _, num_times, channels = self.data.ys.shape
        return num_times, self.likelihood.num_predictions(channels)

    @property
    def informed(self) -> Bool[np.ndarray, "N T F"]:
        """True for the predictions of which something was observed."""
        observed = self.data.observed
        return np.tile(observed, (1, 1, self.prediction_shape[1] // observed.shape[2]))

    def information(self, predictions: Float[Array, "N T F"]) -> Float[Array, "N T F"]:
        """Fisher information of the data in each prediction: 0 where nothing was observed."""
        return _information(self.likelihood, predictions, jnp.asarray(self.data.ys))

    def log_likelihood(self, predictions: Float[Array, "N T F"]) -> Float[Array, ""]:
        """log p(Y | predictions) in nats, summed over all observations."""
        return jnp.sum(self.likelihood.log_prob(predictions, jnp.asarray(self.data.ys)))


@eqx.filter_jit
def _information(likelihood: AbstractLikelihood, predictions: Float[Array, "N T F"], ys: Float[Array, "N T K"]):
    observed = jnp.tile(~jnp.isnan(ys), (1, 1, predictions.shape[2] // ys.shape[2]))
    return jnp.where(observed, likelihood.fisher(predictions, ys), 0)


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

    predictions = (*shape[:2], likelihood.num_predictions(shape[2]))
    try:
        jax.eval_shape(batch_shape, jax.ShapeDtypeStruct(predictions, jnp.result_type(float)))
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

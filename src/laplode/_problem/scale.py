"""Likelihoods of a location and a noise scale."""

import abc
import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, ndtr
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from .._checks import check_flag, check_positive, real_array
from .._errors import LaplodeError
from .._late import dist
from .likelihood import AbstractFamily, Noise, check_scale_fits, check_values


class AbstractScaleLikelihood(AbstractFamily):
    """A likelihood with a location and a noise scale, which is predicted or given: for all, a channel, or a value.

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

    def noise(self, channels):
        if self.scale is None:
            return (None,) * channels
        return (Noise(type(self).__name__, self.learned, self.scalable, self.quadratic),) * channels

    def scaled(self, by):
        if self.scale is None:
            return self
        scale = jnp.asarray(self.scale)
        unknown = jnp.isnan(scale)
        scale = jnp.where(unknown, scale, jnp.where(unknown, 1.0, scale) * by)  # no NaN enters the gradient
        return eqx.tree_at(lambda likelihood: likelihood.scale, self, scale)

    def found(self):
        return dataclasses.replace(self, scale=np.asarray(self.scale), learned=False) if self.learned else self

    def with_data(self, data):
        fitting = super().with_data(data)
        if self.learned:  # one for each channel from here on
            scale = np.broadcast_to(np.asarray(self.scale), (data.ys.shape[2],)).copy()
            return eqx.tree_at(lambda l: l.scale, fitting, scale)
        if self.by_value and np.any(unknown := np.isnan(np.asarray(self.scale)) & data.observed):
            i, t, k = map(int, np.argwhere(unknown)[0])
            raise LaplodeError(
                f"`scale` is NaN at [{i}, {t}, {k}], where ys is {data.ys[i, t, k]:g}: give every observed value a "
                "scale, or make it NaN in ys if it is not to count."
            )
        return fitting

    @abc.abstractmethod
    def family(self, location: Float[Array, "... K"], scale: Float[Array, "... K"]) -> "dist.Distribution":
        """The NumPyro distribution of a location and a scale."""

    @abc.abstractmethod
    def information(
        self, location: Float[Array, "... K"], scale: Float[Array, "... K"]
    ) -> tuple[Float[Array, "... K"], float]:
        """Fisher information in the location, and in the logarithm of the scale."""

    @property
    def by_value(self):
        return np.ndim(self.scale) == 3  # pyright: ignore[reportArgumentType]

    def elsewhere(self, scale, shape, observed):
        if not self.by_value:
            return super().elsewhere(scale, shape, observed)
        if scale is None and observed and not np.any(np.isnan(np.asarray(self.scale))):
            return self
        if scale is None:
            where = "some values here were not observed" if observed else "these are other values"
            raise LaplodeError(
                f"`scale` is missing: the likelihood knows the noise scale of each observed value, and {where}. Give "
                f"that of what is predicted as `scale`, a number, (K,) = ({shape[2]},), or (N, T, K) = {shape}."
            )
        scale = check_positive("scale", scale)
        check_scale_fits(scale, shape)
        return dataclasses.replace(self, scale=scale)

    def channel_of(self, channels):
        return (*range(channels),) * (1 if self.scale is not None else 2)

    def parts(self, prediction: Float[Array, "... F"]) -> tuple[Float[Array, "... K"], Float[Array, "... K"]]:
        """Location and scale, of one shape."""
        if self.scale is None:
            location, log_scale = jnp.split(prediction, 2, axis=-1)
            return location, jnp.exp(log_scale)
        scale = jnp.asarray(self.scale)  # NaN, where nothing was observed, must not enter a gradient
        return prediction, jnp.broadcast_to(jnp.where(jnp.isnan(scale), 1.0, scale), prediction.shape)

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
    by_value = np.ndim(scale) == 3
    known = real_array("scale", scale)
    scale = check_positive("scale", np.where(np.isnan(known), 1.0, known) if by_value else known)
    if scale.ndim > 1 and not by_value:
        raise LaplodeError(f"`scale` must be a scalar or have shape (K,) or (N, T, K), got shape {scale.shape}.")
    if learned and by_value:
        raise LaplodeError(
            "`learned`=True adjusts one scale for each channel, and `scale` has one for each value: leave `learned` "
            'out, and let maximize_evidence(..., noise="one") find a factor on all of them.'
        )
    return known


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
        if lower is not None:
            inside = jnp.where(ys <= self.lower, log_ndtr(lower), inside)
        return inside if upper is None else jnp.where(ys >= self.upper, log_ndtr(-upper), inside)

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

    - `scale`: standard deviation of the noise in the units of `ys`, a scalar, one per channel (K,), or one for every
        value (N, T, K), NaN where nothing was observed; predictions of other values then ask for theirs. None when the
        model predicts it: then its predictions are (T, 2K), the means and the logarithms of the standard deviations.
        `NeuralODE(..., scale=...)` does so with a standard deviation for each channel that is a parameter.
    - `learned`: whether `fit` adjusts the scale, channel by channel, starting from `scale`; `fit.problem` holds what it
        found, and `refine` and `laplace` take that one.
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

    - `scale`: standard deviation of log y (0.1 is about 10% relative noise), a scalar, one per channel (K,), or one for
        every value (N, T, K), or None when the model predicts it, as in `Gaussian`.
    - `learned`: whether `fit` adjusts the scale, channel by channel, starting from `scale`; `fit.problem` holds what it
        found, and `refine` and `laplace` take that one.
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
        what, cure = "be positive under a LogNormal likelihood", "What lies below a detection limit is told by"
        check_values(ys, ~seen | ~(ys <= 0), what, f" {cure} LogNormal(scale, lower=limit).")


class StudentT(AbstractScaleLikelihood):
    """y ~ prediction + scale · StudentT(df): robust to outliers.

    **Arguments:**

    - `df`: degrees of freedom, positive.
    - `scale`: scale of the noise in the units of `ys`, a scalar, one per channel (K,), or one for every value
        (N, T, K), or None when the model predicts it, as in `Gaussian`.
    - `learned`: whether `fit` adjusts the scale, channel by channel, starting from `scale`, as in `Gaussian`.

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

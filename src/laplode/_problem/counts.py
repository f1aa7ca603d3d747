"""Likelihoods of counts."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._checks import check_positive
from .._errors import LaplodeError
from .._late import dist
from .likelihood import AbstractFamily, check_values


class Poisson(AbstractFamily):
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


class NegativeBinomial(AbstractFamily):
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

    def channel_of(self, channels):
        return (*range(channels),) * (1 if self.concentration is not None else 2)

    def _parts(self, prediction: Float[Array, "... F"]) -> tuple[Float[Array, "... K"], Float[Array, "..."]]:
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
            return self._on_locations(lambda mean: 2 * jnp.sqrt(mean), prediction)
        root = jnp.sqrt(jnp.asarray(self.concentration))
        return 2 * root * jnp.arcsinh(jnp.sqrt(prediction) / root)

    def unstabilize(self, stabilized):
        positive = lambda x: jnp.maximum(x, 0)
        if self.concentration is None:
            return self._on_locations(lambda x: positive(x) ** 2 / 4, stabilized)
        root = jnp.sqrt(jnp.asarray(self.concentration))
        return (root * jnp.sinh(positive(stabilized) / (2 * root))) ** 2

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
    good = np.isnan(ys) | ((ys >= 0) & (ys == np.round(ys)))
    check_values(ys, good, f"hold counts under a {name} likelihood")

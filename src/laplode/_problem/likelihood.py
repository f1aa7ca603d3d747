"""p(y | prediction): what every likelihood does."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._errors import LaplodeError
from .._late import dist


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
    def distribution(self, prediction: Float[Array, "... F"]) -> "dist.Distribution":
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

    def elsewhere(self, scale: Any, shape: tuple[int, int, int], observed: bool) -> "AbstractLikelihood":
        """The likelihood of values (N, T, K) that are perhaps not those of the data.

        `scale` is their noise scale, where the likelihood has one for each value of the data and needs it; `observed`
        says whether they are at the times and initial states of the data.

        **Raises:** `LaplodeError` when a scale is needed and missing, does not fit, or is not needed.
        """
        del shape, observed
        if scale is not None:
            raise LaplodeError(
                "`scale` is for a likelihood with a noise scale for each observed value; this one knows the noise of "
                "any value. Leave `scale` out."
            )
        return self


# Traced, a distribution does not refuse what is looked for here.
@eqx.filter_jit
def _has_density(likelihood: AbstractLikelihood, prediction: Float[Array, "... F"], ys: Float[Array, " K"]):
    return jnp.isfinite(likelihood.distribution(prediction).log_prob(ys))


class FromDistribution(AbstractLikelihood):
    """Any function from predictions to a NumPyro distribution, elementwise.

    The Fisher information falls back on the observed one, −∂² log p / ∂prediction² by automatic differentiation,
    clipped at 0 where the likelihood is not log-concave.
    """

    function: "Callable[[Array], dist.Distribution]"

    def distribution(self, prediction):
        return self.function(prediction)

    def fisher(self, prediction, ys):
        score = lambda f: self.score(f, ys)
        _, curvature = jax.jvp(score, (prediction,), (jnp.ones_like(prediction),))
        return jnp.maximum(-curvature, 0)

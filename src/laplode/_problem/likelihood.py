"""p(y | prediction): what every likelihood does."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._errors import LaplodeError
from .._late import dist
from .._show import Shown
from .data import Trajectories

# Observations drawn for the expected information of a distribution that names no closed form.
_DRAWS = 1000


def _an_observed_value(ys: Float[Array, "... K"]) -> Float[Array, " K"]:
    """Of each channel; of any channel where it has none; else 1."""
    largest = lambda x, axis: jnp.max(jnp.where(jnp.isnan(x), -jnp.inf, x), axis=axis)
    first = lambda x, otherwise: jnp.where(jnp.isfinite(x), x, otherwise)
    return first(largest(ys, tuple(range(ys.ndim - 1))), first(largest(ys, None), 1.0))


class Noise(NamedTuple):
    """What is known of the noise scale of a channel, where the likelihood holds one.

    - `family`: the name of the likelihood.
    - `learned`: whether `fit` is still to learn it.
    - `scalable`: whether the Fisher information falls as scale⁻².
    - `quadratic`: whether −log p is a square over scale², so that all of its derivatives fall like that.
    """

    family: str
    learned: bool
    scalable: bool
    quadratic: bool


class AbstractLikelihood(Shown):
    """p(y | prediction), independent over observations given the prediction.

    Of each time there are F predictions: a location for each of the K channels, then the logarithms of the noise scales
    that the model predicts, if any.
    """

    def channel_of(self, channels: int) -> tuple[int, ...]:
        """The channel of each of the F predictions, for K channels: 0, …, K − 1, then those of the predicted scales."""
        return tuple(range(channels))

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray, prediction: Float[Array, "... F"]) -> Float[Array, "... K"]:
        """Observations as they would be recorded."""

    @abc.abstractmethod
    def log_prob(self, prediction: Float[Array, "... F"], ys: Float[Array, "... K"]) -> Float[Array, "... K"]:
        """log p(y | prediction) of each observation, in nats; 0 where `ys` is NaN."""

    @eqx.filter_jit
    def score(self, prediction: Float[Array, "... F"], ys: Float[Array, "... K"]) -> Float[Array, "... F"]:
        """∂ log p(y | prediction) / ∂ prediction of each observation; 0 where `ys` is NaN."""
        return jax.grad(lambda f: jnp.sum(self.log_prob(f, ys)))(prediction)

    @abc.abstractmethod
    def fisher(self, prediction: Float[Array, "... F"], ys: Float[Array, "... K"]) -> Float[Array, "... F"]:
        """Fisher information of one observation in its prediction, never negative; location and scale share none.

        `ys` matters only where the information has no closed form and the observed one stands in for it.
        """

    def expected_fisher(self, prediction: Float[Array, "... F"]) -> Float[Array, "... F"]:
        """Fisher information of one observation that is yet to be made."""
        return self.fisher(prediction, prediction)  # a closed form does not look at observations

    def stabilize(self, prediction: Float[Array, "... F"]) -> Float[Array, "... F"]:
        """The prediction in the coordinate whose Fisher information is constant, in which it is linearized."""
        return prediction

    def unstabilize(self, stabilized: Float[Array, "... F"]) -> Float[Array, "... F"]:
        """Inverse of `stabilize`."""
        return stabilized

    def noise(self, channels: int) -> tuple[Noise | None, ...]:
        """Of each of K channels what is known of the noise scale that the likelihood holds; None without one."""
        return (None,) * channels

    def scaled(self, by: Float[Array, "*K"]) -> "AbstractLikelihood":
        """The likelihood with its noise scales times `by`: one number, or one for each channel."""
        return self

    def found(self) -> "AbstractLikelihood":
        """The likelihood with learned noise scales, which are given from here on."""
        return self

    @abc.abstractmethod
    def with_data(self, data: Trajectories) -> "AbstractLikelihood":
        """The likelihood as it is for the channels of these data.

        **Raises:** `LaplodeError` when it does not fit them.
        """

    def check(self, ys: Float[np.ndarray, "N T K"]) -> None:
        """Raise `LaplodeError` where the observations lie outside the support."""

    @property
    def by_value(self) -> bool:
        """Whether each value of the data has a noise scale of its own."""
        return False

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


def check_values(ys: Float[np.ndarray, "N T K"], good: Bool[np.ndarray, "N T K"], what: str, cure: str = "") -> None:
    """Raise `LaplodeError` about the first observation that is not `good`."""
    if not np.all(good):
        index = tuple(map(int, np.argwhere(~good)[0]))
        raise LaplodeError(f"`ys` must {what}, but ys{list(index)} = {ys[index]}.{cure}")


def check_scale_fits(scale: Any, shape: tuple[int, int, int]) -> None:
    """Raise `LaplodeError` unless `scale` is a number, or one for each channel or value of values (N, T, K)."""
    if np.shape(scale) not in ((), shape[2:], shape):
        raise LaplodeError(f"`scale` must be a number, or have shape {shape[2:]} or {shape}, got {np.shape(scale)}.")


class AbstractFamily(AbstractLikelihood):
    """A likelihood whose channels have one NumPyro distribution, with parameters for all of them or one for each."""

    @abc.abstractmethod
    def distribution(self, prediction: Float[Array, "... F"]) -> "dist.Distribution":
        """The NumPyro distribution of the observations (..., K)."""

    @eqx.filter_jit
    def sample(self, key, prediction):
        return jnp.asarray(self.distribution(prediction).sample(key), dtype=float)

    @eqx.filter_jit
    def log_prob(self, prediction, ys):
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

    def _on_locations(self, function: Callable[[Array], Array], prediction: Float[Array, "... F"]) -> Array:
        """A function of the locations, beside the other parameters where these are predicted."""
        if len(self.channel_of(1)) == 1:
            return function(prediction)
        locations, others = jnp.split(prediction, 2, axis=-1)
        return jnp.concatenate([function(locations), others], axis=-1)

    def with_data(self, data):
        channels = data.ys.shape[2]
        for name, value in vars(self).items():
            allowed = ((), (channels,), data.ys.shape) if name == "scale" else ((), (channels,))
            if isinstance(value, np.ndarray | Array) and value.shape not in allowed:
                raise LaplodeError(
                    f"`{name}` has shape {value.shape} but ys has K = {channels} channels: give one {name}, or an "
                    f"array of shape {' or '.join(str(shape) for shape in allowed[1:])}."
                )
        _check_distribution(self, data.ys.shape)
        return self


# Traced, a distribution does not refuse what is looked for here.
@eqx.filter_jit
def _has_density(likelihood: AbstractFamily, prediction: Float[Array, "... F"], ys: Float[Array, " K"]):
    return jnp.isfinite(likelihood.distribution(prediction).log_prob(ys))


def _check_distribution(likelihood: AbstractFamily, shape: tuple[int, ...]) -> None:
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

    predictions = (*shape[:2], len(likelihood.channel_of(shape[2])))
    try:
        jax.eval_shape(batch_shape, jax.ShapeDtypeStruct(predictions, jnp.result_type(float)))
    except LaplodeError:
        raise
    except Exception as error:
        raise LaplodeError(
            f"`likelihood` can't be evaluated on predictions of shape {shape}: {type(error).__name__}: {error}"
        ) from error


class FromDistribution(AbstractFamily):
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

    @eqx.filter_jit
    def expected_fisher(self, prediction):
        def add(total, key):
            return total + self.fisher(prediction, self.sample(key, prediction)), None

        keys = jax.random.split(jax.random.key(0), _DRAWS)
        return jax.lax.scan(add, jnp.zeros_like(prediction), keys)[0] / _DRAWS


def likelihood_of(name: str, given: Any) -> AbstractLikelihood:
    """A likelihood, or the one that a function from predictions to a NumPyro distribution makes."""
    if isinstance(given, type):
        raise LaplodeError(f"`{name}` must be an instance, as in {given.__name__}(...), got the class.")
    if isinstance(given, AbstractLikelihood):
        return given
    if not callable(given):
        raise LaplodeError(
            f"`{name}` must be Gaussian(scale), LogNormal(scale), StudentT(df, scale), Poisson(), "
            "NegativeBinomial(concentration), PerChannel(...) of these, or a "
            f"function `prediction -> numpyro distribution`; got {type(given).__name__}."
        )
    return FromDistribution(given)  # pyright: ignore[reportArgumentType]

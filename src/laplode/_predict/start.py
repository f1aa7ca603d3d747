"""Initial states that are known up to a distribution."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._errors import LaplodeError
from .._late import dist
from .._model.parameters import parameters
from .._solve.flows import AbstractFlow, OfModel
from .._solve.maps import linearize


class _State(eqx.Module):
    """An initial state in the place of a model, so that a derivative may be taken in it."""

    y0: Array


class _FromState(eqx.Module):
    """The predictions of one trajectory from an initial state, at the parameters as they are."""

    flow: AbstractFlow

    def __call__(self, state: _State) -> Float[Array, "1 T F"]:
        around = self.flow.starting(state.y0[None])
        return around(around.parameters.vector)


class UncertainStart(eqx.Module):
    """A distribution of the initial states of N trajectories, independent of one another and of θ.

    - `mean`: (N, D); `root`: of the covariance of each trajectory's, (N, D, D).
    """

    distribution: "dist.Distribution"
    mean: Float[np.ndarray, "N D"]
    root: Float[np.ndarray, "N D D"]

    @classmethod
    def of(cls, y0: "dist.Distribution") -> "UncertainStart":
        """**Raises:** `LaplodeError` when it is no distribution of N states with finite variances."""
        shape = tuple(y0.batch_shape) + tuple(y0.event_shape)
        if y0.is_discrete or len(y0.event_shape) > 1 or len(shape) not in (1, 2):
            raise LaplodeError(
                "`y0` must be a distribution of batch shape (N, D), or of batch shape (N,) and event shape (D,), of "
                f"real numbers; got {type(y0).__name__} of batch shape {y0.batch_shape} and event shape "
                f"{y0.event_shape}."
            )
        mean = np.asarray(y0.mean, dtype=float)
        shape = shape if len(shape) == 2 else (1, *shape)
        covariance = _covariance(y0).reshape(*shape, shape[1])
        if not np.all(np.isfinite(mean)) or not np.all(np.isfinite(covariance)):
            raise LaplodeError("`y0` must have a finite mean and variance, which its linearized prediction is made of.")
        eigenvalues, vectors = np.linalg.eigh(covariance)
        root = vectors * np.sqrt(np.maximum(eigenvalues, 0))[:, None]
        return cls(y0, np.broadcast_to(mean.reshape(-1, shape[1]), shape).copy(), root)

    def sample(self, key: PRNGKeyArray, num: int) -> Float[Array, "S N D"]:
        """Initial states, `num` of each trajectory."""
        return jnp.asarray(self.distribution.sample(key, (num,)), dtype=float).reshape(num, *self.mean.shape)


def _covariance(y0: "dist.Distribution") -> np.ndarray:
    if hasattr(y0, "covariance_matrix"):
        covariance = np.asarray(y0.covariance_matrix)  # pyright: ignore[reportAttributeAccessIssue]
        return np.broadcast_to(covariance, (*y0.batch_shape, *covariance.shape[-2:]))
    if y0.event_shape and not isinstance(y0, dist.Independent):
        raise LaplodeError(
            f"`y0` is a {type(y0).__name__}, whose covariance is not known: give a MultivariateNormal, or independent "
            "numbers of batch shape (N, D)."
        )
    variance = np.asarray(y0.variance, dtype=float)
    return variance[..., None] * np.eye(variance.shape[-1])


def sensitivity(around: AbstractFlow) -> Float[Array, "N T F D"]:
    """∂ predictions / ∂ initial state of each trajectory, at the parameters and initial states as they are."""
    assert around.y0 is not None
    parts = [(state, around.part(slice(i, i + 1))) for i, state in enumerate(around.y0)]
    maps = [OfModel(parameters(_State(state)), _FromState(part)) for state, part in parts]
    route = maps[0].jacobian_route()
    jacobians = []
    for each in maps:
        values, jacobian = linearize(each, route)
        jacobians.append(jacobian.reshape(*values.shape[1:], -1))
    return jnp.stack(jacobians)

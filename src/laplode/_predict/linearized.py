"""Predictions that are linear in the parameters."""

from collections.abc import Iterator
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from .._algebra.columns import over_columns
from .._algebra.precision import AbstractPrecision
from .._devices import num_devices
from .._problem.likelihood import AbstractLikelihood
from .._solve.finite import check_finite
from .._solve.flows import AbstractFlow, OfModel
from .._solve.maps import flow, linearize
from .grid import Grid
from .method import AbstractMethod, Proposal, straight, straight_log_density
from .predictions import AbstractClosedForm
from .start import sensitivity

# Bytes of Jacobian held at once: that of a few trajectories, where parameters are many.
_JACOBIAN_BYTES = 2**28


class Linearized(AbstractMethod):
    """The model to first order around θ*: f(θ*) + J (θ − θ*), at draws of θ from the posterior.

    It is linear in the coordinate in which the likelihood's information is constant (the logarithm for `LogNormal`, so
    that draws stay positive). Nothing is solved at the draws, so none fails.
    """

    name: ClassVar[str] = "linearized"
    weighs: ClassVar[bool] = False

    def propose(self, posterior, key, num, *, mesh, progress):
        thetas = straight(posterior, None, key, num)
        return Proposal(thetas, jnp.ones(num, bool), lambda: straight_log_density(posterior, None, thetas))

    def trajectories(self, posterior, grid, thetas, states, *, mesh, progress):
        around = flow(posterior.parameters, grid.solve_ts, grid.y0, grid.args)
        likelihood, width, parts = posterior.problem.likelihood, posterior.problem.prediction_shape[1], []
        for some, new, mean, jacobian in _in_parts(around, width, mesh):
            shift = jnp.zeros(())
            if grid.start is not None:
                by_state = sensitivity(around.part(some))
                shift = jnp.einsum("ntfd,snd->sntf", by_state, states[:, some] - grid.start.mean[some])
            draws = _linear_draws(likelihood, mean, jacobian, posterior.mean, thetas, shift)
            if not jnp.all(jnp.isfinite(draws)):  # times at which a model has none are left to `ok`
                check_finite(jnp.where(jnp.isfinite(mean).reshape(-1, 1), jacobian, 0), around.part(some))
            parts.append((mean[new:, grid.skip :], draws[:, new:, grid.skip :]))
            del jacobian
        means, draws = zip(*parts, strict=True)
        channels = posterior.problem.data.ys.shape[2]
        closed_form = LinearTrajectories(around, posterior.built, grid, width, channels)
        return jnp.concatenate(means), jnp.concatenate(draws, axis=1), closed_form

    def values(self, posterior, function, thetas, *, progress):
        value, jacobian = linearize(function)
        draws = value + ((thetas - posterior.mean) @ jacobian.T).reshape(-1, *value.shape)
        std = jnp.sqrt(_variance(posterior.built, jacobian)).reshape(value.shape)
        return draws, LinearFunction(function, posterior.built, std)


class LinearTrajectories(AbstractClosedForm):
    """The linearized predictions `around` θ* at a grid of times."""

    around: AbstractFlow
    precision: AbstractPrecision
    grid: Grid
    width: int = eqx.field(static=True)  # F, of which the first K are the channels
    channels: int = eqx.field(static=True)

    def covariance(self) -> Float[Array, "N TK TK"]:
        """J Λ⁻¹ Jᵀ of each trajectory; of an uncertain initial state there is (∂f/∂y0) Cov[y0] (∂f/∂y0)ᵀ more."""
        start, skip, parts = self.grid.start, self.grid.skip, []
        for some, new, mean, jacobian in _in_parts(self.around, self.width, None):
            covariance = _trajectory_covariances(self.precision, jacobian, mean.shape, self.channels, skip)
            if start is not None:
                by_state = sensitivity(self.around.part(some))[:, skip:, : self.channels]
                spread = (by_state @ start.root[some, None]).reshape(*covariance.shape[:2], -1)
                covariance += spread @ jnp.swapaxes(spread, 1, 2)
            parts.append(covariance[new:])
        return jnp.concatenate(parts)


class LinearFunction(AbstractClosedForm):
    """A linearized function of the model."""

    function: OfModel
    precision: AbstractPrecision
    std: Float[Array, "..."]

    def covariance(self) -> Float[Array, "M M"]:
        """J Λ⁻¹ Jᵀ, known as the delta method."""
        return self.precision.predictive_covariance(linearize(self.function)[1])


def _in_parts(around: AbstractFlow, width: int, mesh: Mesh | None) -> Iterator[tuple[slice, int, Array, Array]]:
    """A few trajectories at a time: which, from which on they are new, their predictions at θ*, and their Jacobian."""
    num = around.num_trajectories
    row_bytes = 8 * around.parameters.size * around.ts.shape[1] * width
    most = min(max(_JACOBIAN_BYTES // row_bytes, num_devices(mesh)), num)
    together = -(-num // -(-num // most))  # as many parts, of one size
    for start in range(0, num, together):
        first = min(start, num - together)  # one compiled shape for all
        some = slice(first, first + together)
        yield some, start - first, *linearize(around.part(some), mesh=mesh)


@eqx.filter_jit
def _linear_draws(
    likelihood: AbstractLikelihood, mean, jacobian: Float[Array, "NTF P"], center: Float[Array, " P"], thetas, shift
) -> Float[Array, "S N T F"]:
    # stabilize is elementwise, so its derivative is a scale.
    stabilized, scale = jax.jvp(likelihood.stabilize, (mean,), (jnp.ones_like(mean),))
    add = lambda total, take: total + (take(thetas) - take(center)) @ take(jacobian).T
    change = over_columns(add, jnp.zeros((len(thetas), len(jacobian))), center.size)
    moved = change.reshape(-1, *mean.shape) + shift
    # What no parameter moves stays: where it is 0, its stabilized value and the derivative may be infinite.
    return jnp.where(moved == 0, mean, likelihood.unstabilize(stabilized + scale * moved))


@eqx.filter_jit
def _trajectory_covariances(
    precision: AbstractPrecision, jacobian, shape: tuple[int, ...], channels: int, skip: int
) -> Float[Array, "N TK TK"]:
    """J Λ⁻¹ Jᵀ for each trajectory, of the locations."""
    num, num_times, _ = shape
    rows = jacobian.reshape(*shape, -1)[:, skip:, :channels].reshape(num, (num_times - skip) * channels, -1)
    return jax.lax.map(precision.predictive_covariance, rows)


@eqx.filter_jit
def _variance(precision: AbstractPrecision, jacobian: Float[Array, "M P"]) -> Float[Array, " M"]:
    """The diagonal of J Λ⁻¹ Jᵀ, which is not formed."""
    return jax.lax.map(lambda row: precision.predictive_covariance(row[None])[0, 0], jacobian, batch_size=64)

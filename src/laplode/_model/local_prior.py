"""The prior as a density over θ: its value, the Gaussian that it looks like from a point, and draws from it."""

from collections.abc import Callable, Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree
from numpyro.distributions.transforms import Transform

from .._checks import is_real_array
from .._errors import LaplodeError
from .._problem.prior import AbstractPrior, GaussianPrior, NamedPriors, PosteriorPrior
from .parameters import Parameters, all_parameters, prior_of

# Where a named prior bends upward it has no precision, but what divides by that needs some.
_LEAST_PRECISION = 1e-6


def _named(
    prior: AbstractPrior, view: Parameters
) -> Iterator[tuple[dist.Distribution, Transform | None, tuple, slice]]:
    """Of each leaf with a distribution of its own: that, its transform, its shape, its place in θ."""
    for (name, shape, start, stop), transform in zip(view.leaves, view.transforms, strict=True):
        if (found := prior_of(prior, name)) is not None:
            yield found, transform, shape, slice(start, stop)


def is_gaussian(prior: AbstractPrior, view: Parameters) -> Bool[np.ndarray, " P"]:
    """Which entries of θ have the `GaussianPrior`, rather than a distribution of their own."""
    rest = np.ones(view.size, bool)
    for *_, place in _named(prior, view):
        rest[place] = False
    return rest


def gaussian_part(prior: AbstractPrior) -> GaussianPrior | None:
    """The `GaussianPrior` of all parameters, or of the rest."""
    if isinstance(prior, NamedPriors):
        return prior.rest
    assert isinstance(prior, GaussianPrior)
    return prior


def _rest(prior: AbstractPrior, view: Parameters) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
    """Mean and precision of the Gaussian part; of named parameters 0 and 1, which nobody uses."""
    if isinstance(prior, PosteriorPrior):
        return prior.mean, prior.precision
    part, among = gaussian_part(prior), is_gaussian(prior, view)
    if part is None:
        if np.any(among):
            missing = ", ".join(view.names(np.flatnonzero(among))[:5])
            raise LaplodeError(
                f"`rest` of the prior is missing, and it says nothing of {missing}: give "
                "NamedPriors(named, rest=precision) for all that is not named."
            )
        return jnp.zeros(view.size), jnp.ones(view.size)
    mean, precision = _broadcast("mean", part.mean, view), _broadcast("precision", part.precision, view)
    return jnp.where(among, mean, 0), jnp.where(among, precision, 1)


def _density(prior: dist.Distribution, transform: Transform | None) -> Callable[[Array], Array]:
    """log p of each number in its unconstrained coordinate."""

    def log_prob(free):
        if transform is None:
            return jnp.asarray(prior.log_prob(free))
        return jnp.asarray(prior.log_prob(transform(free)) + transform.log_abs_det_jacobian(free, transform(free)))

    return log_prob


@eqx.filter_jit
def prior_vectors(prior: AbstractPrior, view: Parameters) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
    """Mean and precision, both (P,), of the Gaussian that the prior looks like from the parameters as they are.

    Its gradient and its curvature there are those of the prior, but for what `prior_deficit` and `prior_rows` say. A
    Gaussian prior looks the same from everywhere.

    **Raises:** `LaplodeError` when a pytree of means or precisions is not a prefix of the model.
    """
    mean, precision = _rest(prior, view)
    for each, transform, shape, place in _named(prior, view):
        slope, curvature = _derivatives(each, transform, view.vector[place].reshape(shape))
        local = jnp.maximum(-curvature, _LEAST_PRECISION)
        mean = mean.at[place].set(view.vector[place] + slope / local)
        precision = precision.at[place].set(local)
    return mean, precision


def _derivatives(prior: dist.Distribution, transform: Transform | None, free: Array) -> tuple[Array, Array]:
    slope = lambda x: jax.grad(lambda x: jnp.sum(_density(prior, transform)(x)))(x)
    first, second = jax.jvp(slope, (free,), (jnp.ones_like(free),))
    return first.ravel(), second.ravel()


@eqx.filter_jit
def prior_deficit(prior: AbstractPrior, view: Parameters) -> Float[Array, " P"]:
    """What the precision of `prior_vectors` has more than the prior's curvature: positive where that bends upward."""
    deficit = jnp.zeros(view.size)
    for each, transform, shape, place in _named(prior, view):
        _, curvature = _derivatives(each, transform, view.vector[place].reshape(shape))
        deficit = deficit.at[place].set(jnp.maximum(_LEAST_PRECISION + curvature, 0))
    return deficit


def prior_rows(prior: AbstractPrior, view: Parameters) -> Float[Array, "R P"]:
    """X with Xᵀ X what the prior's precision has beside the diagonal of `prior_vectors`, and the same mean."""
    return prior.rows if isinstance(prior, PosteriorPrior) else jnp.zeros((0, view.size))


def check_independent(prior: AbstractPrior, argument: str, instead: str) -> None:
    """Raise `LaplodeError` for a prior in which parameters depend on one another."""
    if isinstance(prior, PosteriorPrior) and prior.rows.shape[0]:
        raise LaplodeError(
            f"{argument} has a prior that is the posterior of other data, in which parameters depend on one another: "
            f"{instead}"
        )


@eqx.filter_jit
def log_prior(prior: AbstractPrior, view: Parameters, theta: Float[Array, "... P"]) -> Float[Array, "..."]:
    """log p(θ) in nats, of each vector along the last axis."""
    if isinstance(prior, PosteriorPrior):
        offset = theta - prior.mean
        quadratic = jnp.sum(prior.precision * offset**2, axis=-1) + jnp.sum((offset @ prior.rows.T) ** 2, axis=-1)
        return 0.5 * (prior.log_det - view.size * jnp.log(2 * jnp.pi) - quadratic)
    mean, precision = _rest(prior, view)
    terms = 0.5 * (jnp.log(precision / (2 * jnp.pi)) - precision * (theta - mean) ** 2)
    total = jnp.sum(jnp.where(is_gaussian(prior, view), terms, 0), axis=-1)
    for each, transform, shape, place in _named(prior, view):
        values = _density(each, transform)(theta[..., place].reshape(*theta.shape[:-1], *shape))
        total += jnp.sum(values.reshape(*theta.shape[:-1], -1), axis=-1)
    return total


@eqx.filter_jit
def prior_draws(prior: AbstractPrior, view: Parameters, key: PRNGKeyArray, n: int) -> Float[Array, "n P"]:
    """Draws of θ from the prior."""
    mean, precision = _rest(prior, view)
    draws = mean + jax.random.normal(key, (n, view.size)) / jnp.sqrt(precision)
    if isinstance(prior, PosteriorPrior):
        return _conditioned(prior, draws, jax.random.fold_in(key, 0))
    for i, (each, transform, shape, place) in enumerate(_named(prior, view)):
        spread_out = each.expand(jnp.broadcast_shapes(each.batch_shape, shape))
        values = jnp.asarray(spread_out.sample(jax.random.fold_in(key, i), (n,)))
        free = values if transform is None else jnp.asarray(transform.inv(values))
        draws = draws.at[:, place].set(free.reshape(n, -1))
    return draws


def _conditioned(prior: PosteriorPrior, draws: Float[Array, "n P"], key: PRNGKeyArray) -> Float[Array, "n P"]:
    """Draws of Normal(mean, diag(precision)⁻¹), made draws of the prior by the rows (Matheron's rule)."""
    rows = prior.rows
    gain = rows / prior.precision
    noise = jax.random.normal(key, (draws.shape[0], rows.shape[0]))
    seen = (draws - prior.mean) @ rows.T + noise
    return draws - jsl.solve(jnp.eye(rows.shape[0]) + rows @ gain.T, seen.T, assume_a="pos").T @ gain


def _broadcast(name: str, prefix: PyTree, view: Parameters) -> Float[Array, " P"]:
    if eqx.is_array_like(prefix) and jnp.ndim(prefix) <= 1:  # pyright: ignore[reportArgumentType]
        values = jnp.asarray(prefix, dtype=float)
        if values.ndim == 0 or values.shape == (view.size,):
            return jnp.broadcast_to(values, (view.size,))
        everything = eqx.combine(
            jax.tree.map(lambda x: np.ones(x.shape, bool), view.selected),
            jax.tree.map(lambda x: np.zeros(x.shape, bool), eqx.filter(view.rest, is_real_array)),
        )
        everything = eqx.filter(everything, all_parameters(view.model))
        chosen = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(everything)])
        if values.shape == chosen.shape:  # given for the whole model, of which this is a part
            return values[chosen]
        raise LaplodeError(
            f"`{name}` of the prior has shape {values.shape}, but the model has P = {view.size} parameters: give a "
            "scalar, an array of shape (P,), or a pytree prefix of the model."
        )
    spread = lambda p, sub: jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(p, dtype=float), x.shape), sub)
    try:
        spread_out = jax.tree.map(spread, prefix, view.selected, is_leaf=lambda node: node is None)
        return ravel_pytree(spread_out)[0]
    except (ValueError, TypeError) as error:
        raise LaplodeError(
            f"`{name}` of the prior is neither a scalar, nor an array of shape ({view.size},), nor a pytree prefix of "
            f"the model: {error}"
        ) from error

"""The surface on which models that fit alike lie near each other."""

import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Float, Int

from .._devices import compiled, free_bytes
from .._errors import LaplodeError
from .._posterior.posterior import Posterior
from .._problem.likelihood import AbstractLikelihood
from .._problem.prior import AbstractPrior
from .._solve.autodiff import twice_along
from .._solve.flows import AbstractFlow
from .._solve.maps import DIFFERENCE, evaluate, flow, second_difference

# Up to so many parameters the density of draws is exact, at the price of this number squared of tangents.
_FEW = 32


class Surface(eqx.Module):
    """θ ↦ (Λ0^½ (θ − θ*), R^½ g(θ)), of which M are observed predictions; `root_information` is R^½.

    R is constant for every likelihood that names the coordinate g; for others it is taken at θ*. Derivatives are of
    the frozen grid of `flow`. What ties parameters together in the prior, its residual of which the square is in
    −log p(θ), is as more observations.
    """

    flow: AbstractFlow
    likelihood: AbstractLikelihood
    observed: Int[Array, " M"]
    root_information: Float[Array, " M"]
    root_prior: Float[Array, " P"]
    prior: AbstractPrior
    route: str = eqx.field(static=True)
    bends: bool = eqx.field(static=True)  # whether the model has the second derivatives that steps are bent by

    @classmethod
    def of(cls, posterior: Posterior, tolerance: float) -> "tuple[Surface, Origin]":
        """The surface around a posterior's mean, and that point of it; `tolerance` ends the search for others.

        **Raises:** `LaplodeError` when memory holds no Jacobian.
        """
        problem, data = posterior.problem, posterior.problem.data
        around = flow(posterior.parameters, data.ts, data.y0, data.args, spare=_SPARE).trimmed(_SPARE)
        predictions = evaluate(around, posterior.mean)
        observed = jnp.asarray(np.flatnonzero(problem.informed))
        prior = problem.prior.local(posterior.parameters)
        surface = cls(
            flow=around,
            likelihood=problem.likelihood,
            observed=observed,
            root_information=_root_information(
                problem.likelihood, predictions, problem.information(predictions), observed
            ),
            root_prior=jnp.sqrt(prior.precision),
            prior=problem.prior,
            route=around.jacobian_route(),
            bends=around.has_second_pushforward() and problem.prior.bends(posterior.parameters),
        )
        needed, free = surface.lane_bytes(), free_bytes()
        if needed > free:
            raise LaplodeError(
                f'`method`="geodesic" holds the Jacobian of the data in every parameter, '
                f"about {needed / 2**30:.3g} GiB for {predictions.size} predictions and P = {posterior.size}; "
                f"{free / 2**30:.3g} GiB are free. Take "
                'method="linearized", or a part of the parameters with `where` in laplode.laplace.'
            )
        # An array, so that another tolerance is not compiled anew.
        limit = jnp.asarray(tolerance, dtype=float)
        return surface, Origin(posterior.mean, surface.seen(posterior.mean, predictions), limit)

    def lane_bytes(self) -> int:
        """What one geodesic takes."""
        theta = self.flow.parameters.vector
        num_predictions = jax.eval_shape(self.flow, theta).size
        size, num = self.root_prior.size, self.observed.size + jax.eval_shape(self.tied, theta).size
        return 8 * ((num_predictions + 2 * num) * size + 3 * min(num, size) ** 2)

    def seen(self, theta: Float[Array, " P"], predictions: Float[Array, "N T K"]) -> Float[Array, " MR"]:
        """R^½ g where something was observed, and after it the residual of the prior."""
        # Where nothing was observed g may be infinite, as the logarithm of 0 is: these are left out, not weighted by 0.
        stable = self.likelihood.stabilize(predictions).ravel()[self.observed]
        return jnp.concatenate([self.root_information * stable, self.tied(theta)])

    def tied(self, theta: Float[Array, " P"]) -> Float[Array, " R"]:
        """The residual of the prior."""
        return self.prior.residual(self.flow.parameters, theta)

    def on(self, grid: tuple[Array, ...]) -> "Surface":
        """The same surface, with derivatives on another grid of steps."""
        return eqx.tree_at(lambda s: s.flow, self, self.flow.on(grid))

    def renewed(self, theta: Float[Array, " P"]) -> "tuple[Surface, Float[Array, ' MR']]":
        """The same surface on the grid that a solve at θ chooses, and what is seen by it; not finite where it fails."""
        around, predictions = self.flow.renewed(theta)
        return eqx.tree_at(lambda s: s.flow, self, around), self.seen(theta, predictions)

    def tangent(self, theta: Float[Array, " P"]) -> Float[Array, "MR P"]:
        """A = R^½ ∂g/∂θ Λ0^-½, and the same of the residual of the prior below it."""
        predictions, jacobian = self.flow.linearized(theta, self.route)
        _, scale = jax.jvp(self.likelihood.stabilize, (predictions,), (jnp.ones_like(predictions),))
        seen = (self.root_information * scale.ravel()[self.observed])[:, None] * jacobian[self.observed]
        return jnp.concatenate([seen, jax.jacrev(self.tied)(theta)]) / self.root_prior

    def bend(
        self,
        theta: Float[Array, " P"],
        seen: Float[Array, " MR"],
        step: Float[Array, " P"],
        along: Float[Array, " MR"],
    ) -> Float[Array, " MR"]:
        """The second derivative of what is seen along a step in units of the prior; `along` is the first.

        On frozen steps it is a difference: what is seen there is smooth, and a replay is cheap.
        """
        at = lambda theta: self.seen(theta, self.flow(theta))
        direction = step / self.root_prior
        if self.flow.is_frozen:
            return second_difference(at(theta + DIFFERENCE * direction), seen, along)
        if not self.bends:
            return jnp.zeros_like(seen)
        return twice_along(at, theta, direction)

    def log_volume(self, origin: "Origin", start: Float[Array, "MR P"], line: Float[Array, " P"], theta):
        """log |det dv/dθ| of a draw θ and the `line` v (P,) that it is the end of; `start` is the tangent A at θ*."""
        surface, seen = self.renewed(theta)
        tangent = surface.tangent(theta)
        num, size = tangent.shape
        small = num < size and not self.is_exact  # the smaller side
        product = lambda other: jnp.eye(num if small else size) + (other @ tangent.T if small else tangent.T @ other)
        metric = product(tangent)
        if self.is_exact:
            white = line * self.root_prior
            off_theta = (theta - origin.theta) * self.root_prior - white
            off_seen = seen - origin.seen - start @ white
            # Where the search has ended a little early, the part of it along the surface isn't zero yet.
            normal = off_seen - tangent @ jnp.linalg.solve(metric, off_theta + off_seen @ tangent)
            along = lambda theta: normal @ surface.seen(theta, surface.flow(theta))
            metric += jax.jacfwd(jax.jacfwd(along))(theta) / jnp.outer(self.root_prior, self.root_prior)
        return jnp.linalg.slogdet(metric)[1] - jnp.linalg.slogdet(product(start))[1]

    @property
    def is_exact(self) -> bool:
        """Whether the density of draws takes second derivatives in all pairs of parameters into account."""
        return self.bends and self.root_prior.size <= _FEW


@compiled
def log_volume(
    surface: Surface, origin: "Origin", lines: Float[Array, "S P"], thetas: Float[Array, "S P"]
) -> Float[Array, " S"]:
    """log |det dv/dθ| of draws, v where a line ends: how much wider they lie in v than in θ.

    The nearest point has X'(θ)ᵀ r = 0, r = X(θ) − X(θ*) − X'(θ*) v. Differentiated, that is

        (X'(θ)ᵀ X'(θ) + Σ_i r_i X_i''(θ)) dθ = X'(θ)ᵀ X'(θ*) dv,

    of which the sum over second derivatives is left out where there are more than a few parameters.
    """
    start = surface.tangent(origin.theta)
    return jax.lax.map(lambda each: surface.log_volume(origin, start, *each), (lines, thetas))


class Origin(eqx.Module):
    """Where all lines begin, and what ends the search."""

    theta: Float[Array, " P"]
    seen: Float[Array, " MR"]
    tolerance: Float[Array, ""]


def damped_solve(tangent: Float[Array, "MR P"], ridge: Float[Array, ""]) -> Callable[[Array], Array]:
    """v ↦ (ridge + Aᵀ A)⁻¹ v, on the smaller side."""
    num, size = tangent.shape
    gram = tangent @ tangent.T if num < size else tangent.T @ tangent
    inner = ft.partial(jsl.cho_solve, jsl.cho_factor(ridge * jnp.eye(len(gram)) + gram, lower=True))
    if num < size:
        return lambda v: (v - inner(tangent @ v) @ tangent) / ridge
    return inner


@eqx.filter_jit
def _root_information(likelihood: AbstractLikelihood, predictions: Array, information: Array, observed: Array):
    """In the coordinate in which the likelihood is stable."""
    _, scale = jax.jvp(likelihood.stabilize, (predictions,), (jnp.ones_like(predictions),))
    return jnp.sqrt((information / scale**2).ravel()[observed])


# Room for more steps of the solve than it takes at θ*, as a part of those.
_SPARE = 0.25

"""The Gaussian posterior over parameters, and the structures its precision matrix may have."""

import abc
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jaxtyping import Array, Float, PRNGKeyArray

from ._curvature import DenseCurvature, FactoredCurvature, free_bytes
from ._errors import LaplodeError
from ._problem import Problem
from ._solve import AbstractFlow
from ._vector import Parameters


class AbstractStructure(eqx.Module):
    """A precision matrix Λ (P, P), positive definite, as a few products. Vectors lie along the last axis."""

    log_det: eqx.AbstractVar[Float[Array, ""]]

    @abc.abstractmethod
    def precision_product(self, v: Float[Array, "... P"]) -> Float[Array, "... P"]:
        """Λ v."""

    @abc.abstractmethod
    def covariance_product(self, v: Float[Array, "... P"]) -> Float[Array, "... P"]:
        """Λ⁻¹ v."""

    @abc.abstractmethod
    def root_product(self, z: Float[Array, "... P"]) -> Float[Array, "... P"]:
        """C z with C Cᵀ = Λ⁻¹: standard normal z becomes a draw from the posterior."""

    @abc.abstractmethod
    def variance(self) -> Float[Array, " P"]:
        """The diagonal of Λ⁻¹."""

    @abc.abstractmethod
    def predictive_covariance(self, jacobian: Float[Array, "R P"]) -> Float[Array, "R R"]:
        """J Λ⁻¹ Jᵀ."""


class Full(AbstractStructure):
    """Any Λ, by its Cholesky factor: Λ = L Lᵀ."""

    cholesky: Float[Array, "P P"]
    log_det: Float[Array, ""]

    def __init__(self, cholesky: Float[Array, "P P"]):
        self.cholesky = cholesky
        self.log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(cholesky)))

    def _solve(self, v: Array, trans: int) -> Array:
        columns = v.reshape(-1, v.shape[-1]).T
        return jsl.solve_triangular(self.cholesky, columns, lower=True, trans=trans).T.reshape(v.shape)

    def precision_product(self, v):
        return (v @ self.cholesky) @ self.cholesky.T

    def covariance_product(self, v):
        return self._solve(self._solve(v, 0), 1)

    def root_product(self, z):
        return self._solve(z, 1)

    def variance(self):
        inverse = jsl.solve_triangular(self.cholesky, jnp.eye(self.cholesky.shape[0]), lower=True)
        return jnp.sum(inverse**2, axis=0)

    def predictive_covariance(self, jacobian):
        half = self._solve(jacobian, 0)
        return half @ half.T


class Diagnostics(eqx.Module):
    """What was found on the way to a posterior.

    - `symmetry_defect`: ‖H − Hᵀ‖ / ‖H‖ before symmetrization; 0 for curvatures that are symmetric by construction.
    - `eigenvalue_min`, `eigenvalue_max`: of the precision Λ before regularization.
    - `condition_number`: of the precision Λ that is used.
    - `num_negative`: negative eigenvalues of the likelihood's curvature, beyond rounding.
    - `regularized`: what was changed, None if nothing.
    - `gradient_norm`, `newton_decrement`: ‖g‖ and ½ gᵀΛ⁻¹g (nats), g the gradient of −log p(Y | θ) − log p(θ).
    - `effective_dof`: tr((Λ − Λ0) Λ⁻¹), the number of directions that the data determine, Λ0 the prior's precision.
    - `inert`: the names of parameters without any influence on the predictions.
    """

    num_parameters: int = eqx.field(static=True)
    num_observations: int = eqx.field(static=True)
    symmetry_defect: float
    eigenvalue_min: float
    eigenvalue_max: float
    condition_number: float
    num_negative: int
    regularized: "Regularized | None"
    gradient_norm: float
    newton_decrement: float
    effective_dof: float
    inert: tuple[str, ...] = eqx.field(static=True)

    def __str__(self) -> str:
        inert = ", ".join(self.inert[:5]) + (f", … ({len(self.inert)} in all)" if len(self.inert) > 5 else "")
        rows = {
            "parameters": f"{self.num_parameters}, {self.effective_dof:.2f} determined by the data",
            "observations": f"{self.num_observations}",
            "symmetry defect": f"{self.symmetry_defect:.1e}",
            "eigenvalues of Λ": f"{self.eigenvalue_min:.3g} … {self.eigenvalue_max:.3g}",
            "condition number": f"{self.condition_number:.3g}",
            "negative eigenvalues": f"{self.num_negative} of the likelihood's curvature",
            "regularized": "nothing" if self.regularized is None else str(self.regularized),
            "gradient norm": f"{self.gradient_norm:.3g}",
            "Newton decrement": f"{self.newton_decrement:.3g} nats",
            "without influence": inert or "none",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


class Regularized(eqx.Module):
    """What regularization did to the curvature: `count` eigenvalues changed, the largest change, and their sum."""

    kind: str = eqx.field(static=True)
    count: int
    largest: float
    total: float

    def __str__(self) -> str:
        return f"{self.kind}: {self.count} eigenvalues, by at most {self.largest:.3g}, {self.total:.3g} in all"


class AbstractPosterior(eqx.Module):
    """A distribution over the parameters θ of a model, given a `Problem`."""

    parameters: eqx.AbstractVar[Parameters]
    problem: eqx.AbstractVar[Problem]

    @property
    @abc.abstractmethod
    def mean(self) -> Float[Array, " P"]:
        """The posterior mean of θ."""

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, "n P"]:
        """Draw `n` parameter vectors."""

    @abc.abstractmethod
    def log_prob(self, theta: Float[Array, "... P"]) -> Float[Array, "..."]:
        """The log density at `theta`, in nats."""

    def unravel(self, theta: Float[Array, " P"]) -> Any:
        """The model with parameters `theta`."""
        return self.parameters.unravel(theta)


class Posterior(AbstractPosterior):
    """θ ~ Normal(mean, Λ⁻¹): the Laplace approximation around the model's parameters.

    Made by `laplace`. Immutable; may be passed through `jit` and `vmap`.
    """

    parameters: Parameters
    problem: Problem
    flow: AbstractFlow
    curvature: DenseCurvature | FactoredCurvature
    structure: AbstractStructure
    log_joint: Float[Array, ""]
    diagnostics: Diagnostics

    @property
    def mean(self) -> Float[Array, " P"]:
        """θ*, the parameters of the fitted model, shape (P,)."""
        return self.parameters.vector

    @property
    def size(self) -> int:
        """P."""
        return self.parameters.size

    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, "n P"]:
        """Draw `n` parameter vectors, shape (n, P)."""
        z = jax.random.normal(key, (n, self.size))
        return self.mean + self.structure.root_product(z)

    def log_prob(self, theta: Float[Array, "... P"]) -> Float[Array, "..."]:
        """log Normal(theta; mean, Λ⁻¹), in nats."""
        offset = theta - self.mean
        quadratic = jnp.sum(offset * self.structure.precision_product(offset), axis=-1)
        return 0.5 * (self.structure.log_det - self.size * math.log(2 * math.pi) - quadratic)

    def covariance(self) -> Float[Array, "P P"]:
        """Λ⁻¹, formed only when asked for."""
        self._refuse_if_large("covariance")
        covariance = self.structure.covariance_product(jnp.eye(self.size))
        return (covariance + covariance.T) / 2

    def precision(self) -> Float[Array, "P P"]:
        """Λ, formed only when asked for."""
        self._refuse_if_large("precision")
        return self.structure.precision_product(jnp.eye(self.size))

    def marginal_std(self) -> Float[Array, " P"]:
        """The standard deviation of each parameter, shape (P,)."""
        return jnp.sqrt(self.structure.variance())

    @property
    def log_evidence(self) -> Float[Array, ""]:
        """log p(Y) ≈ log p(Y, θ*) + P/2 log 2π − ½ log det Λ, in nats (MacKay, 1992)."""
        return self.log_joint + 0.5 * (self.size * math.log(2 * math.pi) - self.structure.log_det)

    def _refuse_if_large(self, name: str) -> None:
        needed = 3 * 8 * self.size**2
        if needed > free_bytes():
            raise LaplodeError(
                f"`{name}()` would form a {self.size} × {self.size} matrix ({8 * self.size**2 / 2**30:.1f} GiB), more "
                "than fits. Use marginal_std(), sample(), or posterior.structure.covariance_product(v)."
            )

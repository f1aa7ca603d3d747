"""The Gaussian posterior over parameters."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._algebra.forms import AbstractForm
from .._algebra.precision import AbstractPrecision
from .._algebra.regularization import AbstractRegularization, Regularized
from .._algebra.structure import AbstractCurvature, AbstractStructure
from .._devices import compiled_draws, free_bytes
from .._errors import LaplodeError
from .._late import dist, pd
from .._model.parameters import Parameters
from .._problem.prior import PosteriorPrior
from .._problem.problem import Problem
from .._show import Shown, rows
from .._solve.flows import AbstractFlow
from .summary import summary_table


class Diagnostics(Shown):
    """What was found on the way to a posterior.

    - `symmetry_defect`: ‖H − Hᵀ‖ / ‖H‖ before symmetrization; 0 for curvatures that are symmetric by construction.
    - `eigenvalue_min`, `eigenvalue_max`: of the precision Λ before regularization, in the metric of the prior: 1 where
        the data say nothing, and the same in all units of the parameters.
    - `condition_number`: of the precision Λ that is used, in that metric.
    - `num_negative`: negative eigenvalues of the curvature of the data, beyond rounding; of the data behind `as_prior`
        too.
    - `regularized`: what was changed, None if nothing.
    - `gradient_norm`, `newton_decrement`: ‖g‖ and ½ gᵀΛ⁻¹g (nats), g the gradient of −log p(Y | θ) − log p(θ).
    - `effective_dof`: tr((Λ − Λ0) Λ⁻¹), the number of directions that the data determine, Λ0 the prior's precision.
        Directions in which the likelihood's curvature is negative count as 0.
    - `inert`: the names of parameters without any influence on the predictions.
    """

    num_parameters: int = eqx.field(static=True)
    num_observations: int = eqx.field(static=True)
    symmetry_defect: float
    eigenvalue_min: float
    eigenvalue_max: float
    condition_number: float
    num_negative: int
    regularized: Regularized | None
    gradient_norm: float
    newton_decrement: float
    effective_dof: float
    inert: tuple[str, ...] = eqx.field(static=True)

    def _shown(self):
        inert = ", ".join(self.inert[:5]) + (f", … ({len(self.inert)} in all)" if len(self.inert) > 5 else "")
        named = {
            "parameters": f"{self.num_parameters}, {self.effective_dof:.2f} determined by the data",
            "observations": f"{self.num_observations}",
            "symmetry defect": f"{self.symmetry_defect:.1e}",
            "eigenvalues of Λ": f"{self.eigenvalue_min:.3g} … {self.eigenvalue_max:.3g} times the prior's",
            "condition number": f"{self.condition_number:.3g}",
            "negative eigenvalues": f"{self.num_negative} of the likelihood's curvature",
            "regularized": "nothing" if self.regularized is None else str(self.regularized),
            "gradient norm": f"{self.gradient_norm:.3g}",
            "Newton decrement": f"{self.newton_decrement:.3g} nats",
            "without influence": inert or "none",
        }
        return rows(named)


# Bytes of normal random numbers made at once: several times as much goes into their making.
_NORMAL_BYTES = 2**24


def _normals(keys: Array, size: int) -> Float[Array, "n P"]:
    num = len(keys)
    block = min(max(_NORMAL_BYTES // (8 * size), 1), num)

    def fill(i, normals):
        start = jnp.minimum(i * block, num - block)  # the last block overlaps its neighbor
        some = jax.lax.dynamic_slice_in_dim(keys, start, block)
        rows = jax.vmap(lambda key: jax.random.normal(key, (size,)))(some)
        return jax.lax.dynamic_update_slice(normals, rows, (start, 0))

    return jax.lax.fori_loop(0, -(-num // block), fill, jnp.zeros((num, size)))


@compiled_draws
def _draw(mean: Float[Array, " P"], structure: AbstractPrecision, keys: Array) -> Float[Array, "n P"]:
    return mean + structure.root_product(_normals(keys, mean.size))


class Posterior(Shown):
    """θ ~ Normal(mean, Λ⁻¹): the Laplace approximation around the model's parameters.

    Made by `laplace`. Immutable; may be passed through `jit` and `vmap`.

    - `parameters`, `problem`, `flow`: what it is of: the parameters of the fitted model, the data with likelihood and
        prior, and the map from parameters to predictions.
    - `form`: the curvature of −log p(Y | θ), and `built`: the precision Λ that was made of it.
    - `log_joint`: log p(Y, θ*), in nats.
    - `diagnostics`: what was found on the way.
    - `curvature`, `structure`, `regularization`: the strategies that `laplace` was given.
    """

    parameters: Parameters
    problem: Problem
    flow: AbstractFlow
    form: AbstractForm
    built: AbstractPrecision
    log_joint: Float[Array, ""]
    diagnostics: Diagnostics
    curvature: AbstractCurvature
    structure: AbstractStructure
    regularization: AbstractRegularization

    def _shown(self):
        found, how = self.diagnostics, f"{self.curvature.name}, {self.structure.name}"
        changed = "" if found.regularized is None else f", {found.regularized}"
        named = {
            "parameters": f"{self.size}, {found.effective_dof:.2f} determined by {found.num_observations} observations",
            "curvature": f"{how}{changed}",
            "decrement": f"{found.newton_decrement:.2g} nats left to gain",
            "log evidence": f"{float(self.log_evidence):.6g} nats",
            "next": "predict(posterior, ts, key=...), posterior.summary(), posterior.diagnostics",
        }
        return rows(named, f"Posterior of {type(self.parameters.rest).__name__}")

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return self.parameters.size

    @property
    def model(self) -> Any:
        """The fitted model, with parameters in float64."""
        return self.parameters.model

    @property
    def mean(self) -> Float[Array, " P"]:
        """θ*, the parameters of the fitted model, shape (P,)."""
        return self.parameters.vector

    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, "n P"]:
        """Draw `n` parameter vectors, shape (n, P)."""
        return _draw(self.mean, self.built, jax.random.split(key, n))

    def log_prob(self, theta: Float[Array, "... P"]) -> Float[Array, "..."]:
        """log Normal(theta; mean, Λ⁻¹), in nats."""
        return self.built.log_prob(theta - self.mean)

    def summary(self, prob: float = 0.94) -> "pd.DataFrame":
        """A table of the parameters by name, as the model knows them: mean, sd, and central interval.

        ```python
        print(posterior.summary())
        ```

        The interval holds `prob` of the marginal, Gaussian in unconstrained coordinates, between its quantiles.
        """
        return summary_table(self.parameters, self.mean, self.marginal_std(), prob)

    def unravel(self, theta: Float[Array, " P"]) -> Any:
        """The model with parameters `theta`."""
        return self.parameters.unravel(theta)

    def to_numpyro(self) -> "dist.Distribution":
        """The distribution of θ for a NumPyro model or guide, with event shape (P,).

        ```python
        theta = numpyro.sample("theta", posterior.to_numpyro())
        model = posterior.unravel(theta)
        ```
        """
        from .distribution import Gaussian  # NumPyro takes long to import

        return Gaussian(self.mean, self.built)

    def as_prior(self) -> PosteriorPrior:
        """This posterior as the prior of further trajectories: θ ~ Normal(θ*, Λ⁻¹), in unconstrained coordinates.

        ```python
        more = laplode.Problem(more_data, likelihood, posterior.as_prior())
        fit = laplode.refine(posterior.parameters.model, more)
        updated = laplode.laplace(fit.model, more)
        ```

        Where trajectories are linear in θ and the noise is Gaussian, this is the posterior of all data at once, and the
        evidences multiply: p(Y₁) p(Y₂ | Y₁) = p(Y₁, Y₂). Otherwise the first data are held at their Gaussian, which is
        as good as the Laplace approximation of them is where the second move θ to. The parameters must be the same,
        those of `where` included, and what is fixed stay as it was; a learned `y0` of shape (N, D) is that of the same
        trajectories, seen again.

        **Returns:** a prior for `Problem`.

        **Raises:** `LaplodeError` when the blocks of a `block_diagonal` posterior don't fit in memory side by side.
        """
        prior = self.problem.prior
        diagonal, rows = self.built.split(prior.local(self.parameters).precision)
        return PosteriorPrior(
            mean=self.mean,
            precision=diagonal,
            rows=rows,
            log_det=self.built.log_det,
            leaves=tuple(leaf[:2] for leaf in self.parameters.leaves),
            coordinates=prior.coordinates,
        )

    def covariance(self) -> Float[Array, "P P"]:
        """Λ⁻¹, formed only when asked for."""
        self._refuse_if_large("covariance")
        covariance = self.built.covariance_product(jnp.eye(self.size))
        return (covariance + covariance.T) / 2

    def precision(self) -> Float[Array, "P P"]:
        """Λ, formed only when asked for."""
        self._refuse_if_large("precision")
        return self.built.precision_product(jnp.eye(self.size))

    def marginal_std(self) -> Float[Array, " P"]:
        """The standard deviation of each parameter, shape (P,)."""
        return jnp.sqrt(self.built.variance())

    @property
    def log_evidence(self) -> Float[Array, ""]:
        """log p(Y) ≈ log p(Y, θ*) + P/2 log 2π − ½ log det Λ, in nats (MacKay, 1992)."""
        return self.log_joint + 0.5 * (self.size * math.log(2 * math.pi) - self.built.log_det)

    def _refuse_if_large(self, name: str) -> None:
        needed = 3 * 8 * self.size**2
        if needed > free_bytes():
            raise LaplodeError(
                f"`{name}()` would form a {self.size} × {self.size} matrix ({8 * self.size**2 / 2**30:.1f} GiB), more "
                "than fits. Use marginal_std(), sample(), or posterior.built.covariance_product(v)."
            )

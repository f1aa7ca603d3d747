"""Whether the solver's tolerance is tight enough for a curvature."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_count, check_from, check_key, check_x64
from .._curvature.products import CurvatureProducts
from .._errors import LaplodeWarning
from .._posterior.posterior import Posterior

# How much smaller the tolerances are that those of the posterior are compared with, and what change is too large.
_FACTOR = 100.0


_LARGE = 1e-2


def check_tolerance(posterior: Posterior, *, num_probes: int = 4, key: PRNGKeyArray) -> float:
    """How much the curvature changes when the solver's `rtol` and `atol` are 100 times smaller.

    **Arguments:**

    - `posterior`: from `laplace`, of a `NeuralODE`.
    - `num_probes`: how many random directions are looked at.
    - `key`: a JAX random key for them.

    **Returns:** an estimate of ‖Λ^-½ (H' − H) Λ^-½‖ (Frobenius), H and H' the curvature at both tolerances: to first
    order no posterior variance changes by a larger part. Products with H are those with the exact Hessian for
    curvature="hessian", with the Gauss-Newton matrix otherwise. It costs a compilation or two and a few solves.

    **Raises:** `LaplodeError` when the model is no `NeuralODE`, its steps are of fixed size, or the solve does not
    arrive with smaller tolerances. Warns (`LaplodeWarning`) above 0.01.

    With z standard normal, v = Λ^-½ z and d = (H' − H) v, the mean of dᵀ Λ⁻¹ d is the square of that norm (Hutchinson,
    1990).
    """
    check_x64()
    check_from("posterior", posterior, Posterior, "laplace")
    check_count("num_probes", num_probes)
    check_key("key", key)
    loose = posterior.flow
    tight = loose.tightened(_FACTOR)
    probes = posterior.built.root_product(jax.random.normal(key, (num_probes, posterior.size)))
    exact = posterior.curvature.signed
    at = [_products(CurvatureProducts(flow, posterior.problem), probes, exact) for flow in (loose, tight)]
    change = at[1] - at[0]
    squares = jnp.sum(change * posterior.built.covariance_product(change), axis=-1)
    found = float(jnp.sqrt(jnp.mean(squares)))
    if not found <= _LARGE:
        controller = posterior.parameters.rest.stepsize_controller
        warnings.warn(
            f"With tolerances {_FACTOR:g} times smaller the curvature changes by {found:.2g}, as a part of the "
            f"posterior precision: the tolerance of the solver is too loose ({controller}). Take a smaller one, and "
            "refine again.",
            LaplodeWarning,
            stacklevel=2,
        )
    return found


@eqx.filter_jit
def _products(products: CurvatureProducts, vectors: Float[Array, "V P"], exact: bool) -> Float[Array, "V P"]:
    return jax.lax.map(products.hessian if exact else products.gauss_newton, vectors)

"""Curvature of the negative log-likelihood in the parameters: Hessian, Gauss-Newton, empirical Fisher.

It is a sum over all observations, never a mean, and knows nothing of the prior.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from ._problem import Problem
from ._solve import AbstractFlow, check_second_order, linearize

# Tangents pushed through a solve at once: past a few dozen a processor gains nothing more.
_MAX_CHUNK = 64


class DenseCurvature(eqx.Module):
    """A symmetric matrix (P, P), not necessarily positive semidefinite.

    `symmetry_defect` is ‖H − Hᵀ‖ / ‖H‖ (Frobenius) from before it was symmetrized.
    """

    matrix: Float[Array, "P P"]
    symmetry_defect: float

    def influence(self) -> Float[Array, " P"]:
        """Per parameter, the largest entry of its row: 0 where it has no influence."""
        return jnp.max(jnp.abs(self.matrix), axis=1)


class FactoredCurvature(eqx.Module):
    """Jᵀ W J, kept as the Jacobian J (M, P) of the predictions and the weights (M,), never negative."""

    jacobian: Float[Array, "M P"]
    weights: Float[Array, " M"]

    def influence(self) -> Float[Array, " P"]:
        """Per parameter, the largest entry of its column in J: 0 where it has no influence."""
        return jnp.max(jnp.abs(self.jacobian), axis=0)

    def matrix(self) -> Float[Array, "P P"]:
        """Jᵀ W J."""
        factor = jnp.sqrt(self.weights)[:, None] * self.jacobian
        return factor.T @ factor


def free_bytes() -> int:
    """Memory that is free where JAX computes."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return psutil.virtual_memory().available


def negative_log_likelihood(flow: AbstractFlow, problem: Problem) -> Callable[[Float[Array, " P"]], Float[Array, ""]]:
    """θ ↦ −log p(Y | θ), in nats."""
    return lambda theta: -problem.log_likelihood(flow(theta))


@eqx.filter_jit
def value_and_gradient(flow: AbstractFlow, problem: Problem, theta: Float[Array, " P"]):
    """−log p(Y | θ) and its gradient, shape (P,)."""
    return jax.value_and_grad(negative_log_likelihood(flow, problem))(theta)


def hessian_vector_product(flow: AbstractFlow, problem: Problem, theta: Float[Array, " P"], vector: Float[Array, " P"]):
    """∇²(−log p(Y | θ)) · vector by forward over reverse differentiation, shape (P,)."""
    gradient = jax.grad(negative_log_likelihood(flow, problem))
    return jax.jvp(gradient, (theta,), (vector,))[1]


@eqx.filter_jit
def _hessian_rows(flow: AbstractFlow, problem: Problem, theta: Float[Array, " P"], start: Array, num: int):
    """Rows start … start + num of the Hessian."""
    tangent = lambda i: jnp.zeros_like(theta).at[i].set(1)
    return jax.vmap(lambda i: hessian_vector_product(flow, problem, theta, tangent(i)))(start + jnp.arange(num))


def _chunk_size(flow: AbstractFlow, problem: Problem) -> int:
    """Tangents to push at once: what reverse differentiation keeps of one solve, within a share of the free memory."""
    theta = flow.parameters.vector
    pull = jax.eval_shape(lambda: jax.vjp(negative_log_likelihood(flow, problem), theta)[1])
    kept = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))
    # Each tangent keeps as much again for itself, and works on a copy.
    each = 3 * kept + 8 * theta.nbytes
    budget = min(free_bytes() // 4, 2**29)
    return int(min(max(budget // each, 1), _MAX_CHUNK, theta.size))


def hessian(
    flow: AbstractFlow, problem: Problem, *, batch_size: int | None = None, progress: bool = True
) -> DenseCurvature:
    """The exact Hessian of −log p(Y | θ) at the flow's parameters, by forward-over-reverse in chunks of tangents.

    `jax.hessian` pushes all P tangents at once, which takes P times the memory of a gradient; here only `batch_size`
    are under way (chosen from the free memory by default), and only the matrix itself grows with P².

    **Raises:** `LaplodeError` when the model has no second derivatives, with the line to change.
    """
    check_second_order(flow)
    theta = flow.parameters.vector
    size = theta.size
    chunk = min(_chunk_size(flow, problem) if batch_size is None else batch_size, size)
    matrix = np.empty((size, size))
    with tqdm(total=size, desc="Hessian", unit="tangent", disable=not progress) as bar:
        for start in range(0, size, chunk):
            first = min(start, size - chunk)  # the last chunk overlaps its neighbor, so that one program serves all
            matrix[first : first + chunk] = _hessian_rows(flow, problem, theta, jnp.asarray(first), chunk)
            bar.update(first + chunk - start)
    return symmetrized(matrix)


def symmetrized(matrix: np.ndarray) -> DenseCurvature:
    """(H + Hᵀ) / 2, with the defect it had."""
    norm = np.linalg.norm(matrix)
    defect = float(np.linalg.norm(matrix - matrix.T) / norm) if norm > 0 else 0.0
    return DenseCurvature(jnp.asarray((matrix + matrix.T) / 2), defect)


def ggn(flow: AbstractFlow, problem: Problem) -> FactoredCurvature:
    """The generalized Gauss-Newton matrix Jᵀ R J, R the Fisher information of each observation in its prediction."""
    predictions, jacobian = linearize(flow)
    return _factored(problem, jacobian, problem.likelihood.fisher(predictions, jnp.asarray(problem.data.ys)))


def fisher(flow: AbstractFlow, problem: Problem) -> FactoredCurvature:
    """The empirical Fisher matrix Σ_m s_m s_mᵀ, s_m the gradient of the log-likelihood of observation m."""
    predictions, jacobian = linearize(flow)
    return _factored(problem, jacobian, problem.likelihood.score(predictions, jnp.asarray(problem.data.ys)) ** 2)


def _factored(problem: Problem, jacobian: Float[Array, "N T K P"], weights: Float[Array, "N T K"]) -> FactoredCurvature:
    observed = problem.data.observed.ravel()
    jacobian = jacobian.reshape(observed.size, -1)
    if not np.all(observed):
        jacobian = jacobian[observed]
    return FactoredCurvature(jacobian, weights.ravel()[observed])

"""Curvature of the negative log-likelihood in the parameters: Hessian, Gauss-Newton, empirical Fisher.

It is a sum over all observations, never a mean, and knows nothing of the prior.
"""

import abc
import math
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matfree.decomp
import matfree.eig
import matfree.stochtrace
import numpy as np
import psutil
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray
from tqdm.auto import tqdm

from ._errors import LaplodeError
from ._model import check_model
from ._problem import Problem, check_problem
from ._solve import (
    AbstractFlow,
    check_second_order,
    flow,
    has_reverse,
    linearize,
    local_hessian,
    local_hessian_bytes,
)
from ._vector import Where, parameters

# Tangents between two looks at the progress bar; more at once gain a processor nothing.
_CHUNK = 64

# What one batch of tangents may keep where nothing is sequential: a processor's cache, roughly.
_CACHE_BYTES = 2**24


class AbstractCurvature(eqx.Module):
    """∇²(−log p(Y | θ)), or an approximation of it, in some form."""

    @abc.abstractmethod
    def influence(self) -> Float[Array, " P"]:
        """Per parameter, the largest entry that it has anywhere: 0 where it has no influence."""


class DenseCurvature(AbstractCurvature):
    """A symmetric matrix (P, P), not necessarily positive semidefinite.

    `symmetry_defect` is ‖H − Hᵀ‖ / ‖H‖ (Frobenius) from before it was symmetrized.
    """

    matrix: Float[Array, "P P"]
    symmetry_defect: float

    def influence(self):
        return jnp.max(jnp.abs(self.matrix), axis=1)


class BlockCurvature(AbstractCurvature):
    """The diagonal blocks of a symmetric matrix, in the order of θ, one for each leaf of the model."""

    blocks: tuple[DenseCurvature, ...]

    def influence(self):
        return jnp.concatenate([block.influence() for block in self.blocks])


class DiagonalCurvature(AbstractCurvature):
    """The diagonal of a symmetric matrix."""

    diagonal: Float[Array, " P"]

    def influence(self):
        return jnp.abs(self.diagonal)


class EigenCurvature(AbstractCurvature):
    """The leading part of a symmetric matrix: eigenvectors (R, P) as rows, eigenvalues (R,) of either sign."""

    vectors: Float[Array, "R P"]
    eigenvalues: Float[Array, " R"]

    def influence(self):
        return jnp.max(jnp.abs(self.vectors), axis=0)


class FactoredCurvature(AbstractCurvature):
    """Fᵀ W F, positive semidefinite, kept as the factor F (M, P) and the weights W (M,).

    F is the Jacobian of the predictions.
    """

    factor: Float[Array, "M P"]
    weights: Float[Array, " M"]

    @eqx.filter_jit
    def influence(self):
        # Row after row: a reduction over the first axis would copy the whole matrix.
        largest = lambda i, most: jnp.maximum(most, jnp.abs(self.factor[i]))
        return jax.lax.fori_loop(0, self.factor.shape[0], largest, jnp.zeros(self.factor.shape[1]))

    def matrix(self) -> Float[Array, "P P"]:
        """Fᵀ W F."""
        return gram(_weighted(self.factor, self.weights))

    @eqx.filter_jit
    def diagonal(self) -> Float[Array, " P"]:
        """The diagonal of Fᵀ W F."""
        return jnp.einsum("m,mp->p", self.weights, self.factor**2)

    def block(self, start: int, stop: int) -> Float[Array, "B B"]:
        """Rows and columns start … stop of Fᵀ W F."""
        return FactoredCurvature(self.factor[:, start:stop], self.weights).matrix()


@jax.jit
def _weighted(factor: Float[Array, "M P"], weights: Float[Array, " M"]) -> Float[Array, "M P"]:
    return jnp.sqrt(weights)[:, None] * factor


def gram(rows: Float[Array, "M P"]) -> Float[Array, "P P"]:
    """Xᵀ X."""
    if isinstance(rows, Tracer) or {device.platform for device in rows.devices()} != {"cpu"}:
        return rows.T @ rows
    # NumPy's BLAS uses that the result is symmetric, for half of the work; XLA does not.
    host = np.asarray(rows)
    return jnp.asarray(host.T @ host)


def check_x64() -> None:
    """Raise `LaplodeError` unless JAX computes in 64 bits."""
    if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise LaplodeError(
            "laplode computes curvature in float64, and 64-bit JAX is off: a float32 Hessian is asymmetric and its "
            'small eigenvalues are noise. Call jax.config.update("jax_enable_x64", True) at the top of your program. A '
            "model trained in float32 may stay as it is; it is cast."
        )


def free_bytes() -> int:
    """Memory that is free where JAX computes."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return psutil.virtual_memory().available


class NegativeLogLikelihood(eqx.Module):
    """θ ↦ −log p(Y | θ), in nats."""

    flow: AbstractFlow
    problem: Problem

    def __call__(self, theta: Float[Array, " P"]) -> Float[Array, ""]:
        return -self.problem.log_likelihood(self.flow(theta))


def value_and_gradient(flow: AbstractFlow, problem: Problem) -> tuple[Float[Array, ""], Float[Array, " P"]]:
    """−log p(Y | θ) and its gradient, shape (P,), at the flow's parameters."""
    if has_reverse(flow):
        return _value_and_gradient(flow, problem)
    predictions, jacobian = linearize(flow)
    return _value_and_score(problem, predictions, jacobian)


@eqx.filter_jit
def _value_and_gradient(flow: AbstractFlow, problem: Problem):
    return jax.value_and_grad(NegativeLogLikelihood(flow, problem))(flow.parameters.vector)


@eqx.filter_jit
def _value_and_score(problem: Problem, predictions: Float[Array, "N T K"], jacobian: Float[Array, "N*T*K P"]):
    score = problem.likelihood.score(predictions, jnp.asarray(problem.data.ys))
    return -problem.log_likelihood(predictions), -score.ravel() @ jacobian


def hessian_vector_product(flow: AbstractFlow, problem: Problem, theta: Float[Array, " P"], vector: Float[Array, " P"]):
    """∇²(−log p(Y | θ)) · vector by forward over reverse differentiation, shape (P,)."""
    gradient = jax.grad(NegativeLogLikelihood(flow, problem))
    return jax.jvp(gradient, (theta,), (vector,))[1]


class CurvatureProducts(eqx.Module):
    """Products with the derivatives of a model at its parameters θ*, for callers that need no matrix.

    Made by `curvature_products`. J is the Jacobian of the predictions (N, T, K) in θ, R their Fisher information.
    """

    flow: AbstractFlow
    problem: Problem

    @property
    def theta(self) -> Float[Array, " P"]:
        """θ*."""
        return self.flow.parameters.vector

    @eqx.filter_jit
    def jacobian(self, v: Float[Array, " P"]) -> Float[Array, "N T F"]:
        """J v."""
        return jax.jvp(self.flow, (self.theta,), (v,))[1]

    @eqx.filter_jit
    def jacobian_transposed(self, u: Float[Array, "N T F"]) -> Float[Array, " P"]:
        """Jᵀ u."""
        return jax.vjp(self.flow, self.theta)[1](u)[0]

    @eqx.filter_jit
    def gauss_newton(self, v: Float[Array, " P"]) -> Float[Array, " P"]:
        """Jᵀ R J v; missing observations have no information."""
        predictions, push = jax.jvp(self.flow, (self.theta,), (v,))
        return self.jacobian_transposed(self.problem.information(predictions) * push)

    @eqx.filter_jit
    def hessian(self, v: Float[Array, " P"]) -> Float[Array, " P"]:
        """∇²(−log p(Y | θ)) v."""
        return hessian_vector_product(self.flow, self.problem, self.theta, v)


def curvature_products(model: Any, problem: Problem, *, where: Where = None) -> CurvatureProducts:
    """Jacobian, Gauss-Newton and Hessian products of a fitted model, each at the cost of a solve or two.

    **Arguments:** as for `laplace`.

    **Returns:** `CurvatureProducts`, with `.jacobian(v)`, `.jacobian_transposed(u)`, `.gauss_newton(v)`, `.hessian(v)`.

    **Raises:** `LaplodeError` when 64-bit JAX is off, model and data disagree, or the solve fails.
    """
    check_x64()
    check_problem(problem)
    check_model(model, problem)
    view = parameters(model, where, problem.prior)
    return CurvatureProducts(flow(view, problem.data.ts, problem.data.y0, problem.data.args), problem)


@eqx.filter_jit
def _hessian_rows(function: Callable[[Array], Array], theta: Float[Array, " P"], start: Array, num: int, batch: int):
    """Rows start … start + num of the Hessian of a scalar function (a pytree), `batch` tangents at a time."""
    gradient = jax.grad(function)
    tangent = lambda i: jnp.zeros_like(theta).at[i].set(1)
    row = lambda i: jax.jvp(gradient, (theta,), (tangent(i),))[1]
    return jax.lax.map(row, start + jnp.arange(num), batch_size=batch)


def _batch_size(function: Callable[[Array], Array], theta: Float[Array, " P"], budget: int) -> int:
    """Tangents to push at once, so that what reverse differentiation keeps of them stays within `budget` bytes."""
    pull = jax.eval_shape(lambda: jax.vjp(function, theta)[1])
    kept = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))
    # Each tangent keeps as much again for itself, and works on a copy.
    return int(min(max(budget // (3 * kept + 8 * theta.nbytes), 1), _CHUNK))


def _row_chunks(
    function: Callable[[Array], Array], theta: Float[Array, " P"], batch_size: int, progress: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of the Hessian, chunk after chunk, each with the index of its first row; chunks may overlap.

    `jax.hessian` pushes all P tangents at once, which takes P times the memory of a gradient; here only `batch_size`
    are under way.
    """
    chunk = min(max(_CHUNK, batch_size), theta.size)
    with tqdm(total=theta.size, desc="Hessian", unit="tangent", disable=not progress) as bar:
        for start in range(0, theta.size, chunk):
            first = min(start, theta.size - chunk)  # the last chunk overlaps its neighbor: one program serves all
            yield first, np.asarray(_hessian_rows(function, theta, jnp.asarray(first), chunk, min(batch_size, chunk)))
            bar.update(first + chunk - start)


def _solve_row_chunks(flow: AbstractFlow, problem: Problem, batch_size: int | None, progress: bool, tilt=None):
    """`_row_chunks` of the negative log-likelihood, each tangent pushed through the solve and back."""
    check_second_order(flow)
    function = NegativeLogLikelihood(flow, problem) if tilt is None else _Tilted(flow, problem, tilt)
    theta = flow.parameters.vector
    if batch_size is None:
        batch_size = _batch_size(function, theta, min(free_bytes() // 4, 2**29))
    return _row_chunks(function, theta, batch_size, progress)


# Below so many parameters, a few chunks of tangents pushed through the solve are done before the local way compiles.
_FEW_PARAMETERS = 100


class _Tilted(eqx.Module):
    """θ ↦ −log p(Y | θ) + ⟨tilt, f(θ)⟩, f the predictions."""

    flow: AbstractFlow
    problem: Problem
    tilt: Float[Array, "N T K"]

    def __call__(self, theta: Float[Array, " P"]) -> Float[Array, ""]:
        predictions = self.flow(theta)
        return jnp.sum(self.tilt * predictions) - self.problem.log_likelihood(predictions)


def hessian(
    flow: AbstractFlow,
    problem: Problem,
    *,
    batch_size: int | None,
    progress: bool,
    tilt: Float[Array, "N T K"] | None = None,
) -> DenseCurvature:
    """The exact Hessian of −log p(Y | θ) at the flow's parameters, by forward-over-reverse in chunks of tangents.

    Where the solve can be taken apart into local pieces (see `local_hessian`), the tangents need not go through it.
    With a `tilt`, that of −log p(Y | θ) + ⟨tilt, f(θ)⟩.

    **Raises:** `LaplodeError` when the model has no second derivatives, with the line to change.
    """
    theta = flow.parameters.vector
    matrix = np.zeros((theta.size, theta.size))
    if _is_local(flow):
        lagrangian, rest = _localized(flow, problem, tilt)
        matrix += np.asarray(rest)
        batch = _batch_size(lagrangian, theta, _CACHE_BYTES) if batch_size is None else batch_size
        chunks = _row_chunks(lagrangian, theta, batch, progress)
    else:
        chunks = _solve_row_chunks(flow, problem, batch_size, progress, tilt)
    done = 0
    for first, rows in chunks:
        matrix[done : first + len(rows)] += rows[done - first :]
        done = first + len(rows)
    return symmetrized(matrix)


def _is_local(flow: AbstractFlow) -> bool:
    needed = local_hessian_bytes(flow)
    return flow.parameters.size > _FEW_PARAMETERS and needed is not None and needed < free_bytes() // 4


def _localized(flow: AbstractFlow, problem: Problem, tilt: Float[Array, "N T K"] | None):
    cotangents, weights = _loss_derivatives(flow, problem)
    cotangents = cotangents if tilt is None else cotangents + tilt
    return local_hessian(flow, cotangents, weights)  # pyright: ignore[reportArgumentType]


def hessian_batch_size(flow: AbstractFlow, problem: Problem) -> int | None:
    """What `hessian` would find out about its `batch_size` by tracing, for who calls it often; None if no matter."""
    if not _is_local(flow):
        return None
    return _batch_size(_localized(flow, problem, None)[0], flow.parameters.vector, _CACHE_BYTES)


@eqx.filter_jit
def _loss_derivatives(flow: AbstractFlow, problem: Problem) -> tuple[Float[Array, "N T F"], Float[Array, "N T F F"]]:
    """First and second derivatives of −log p(y | f) in the predictions f at each time."""
    predictions = flow(flow.parameters.vector)
    score = problem.likelihood.score
    each = jax.vmap(jax.vmap(lambda f, y: (-score(f, y), -jax.jacfwd(score)(f, y))))
    return each(predictions, jnp.asarray(problem.data.ys))


def hessian_blocks(flow: AbstractFlow, problem: Problem, *, batch_size: int | None, progress: bool) -> BlockCurvature:
    """The blocks of the exact Hessian on its diagonal, one for each leaf of the model."""
    leaves = [(start, np.empty((stop - start, stop - start))) for _, _, start, stop in flow.parameters.leaves]
    for first, rows in _solve_row_chunks(flow, problem, batch_size, progress):
        for start, block in leaves:
            low, high = max(first, start), min(first + len(rows), start + len(block))
            if low < high:
                block[low - start : high - start] = rows[low - first : high - first, start : start + len(block)]
    return BlockCurvature(tuple(symmetrized(block) for _, block in leaves))


def hessian_diagonal(
    flow: AbstractFlow, problem: Problem, *, batch_size: int | None, progress: bool
) -> DiagonalCurvature:
    """The diagonal of the exact Hessian, at the cost of all of it but without its memory."""
    diagonal = np.empty(flow.parameters.size)
    for first, rows in _solve_row_chunks(flow, problem, batch_size, progress):
        diagonal[first : first + len(rows)] = np.diagonal(rows, offset=first)
    return DiagonalCurvature(jnp.asarray(diagonal))


def hessian_diagonal_stochastic(
    flow: AbstractFlow, problem: Problem, *, num_probes: int, key: PRNGKeyArray
) -> DiagonalCurvature:
    """The diagonal of the exact Hessian as the mean of v ∘ H v over random signs v (Bekas et al., 2007)."""
    check_second_order(flow)
    return DiagonalCurvature(_hutchinson(flow, problem, num_probes, key))


@eqx.filter_jit
def _hutchinson(flow: AbstractFlow, problem: Problem, num_probes: int, key: PRNGKeyArray) -> Float[Array, " P"]:
    theta = flow.parameters.vector
    probe = matfree.stochtrace.sampler_signs(theta, num=1)
    estimate = matfree.stochtrace.estimator_monte_carlo(matfree.stochtrace.monte_carlo_diagonal(), sampler=probe)
    product = lambda v: hessian_vector_product(flow, problem, theta, v)
    keys = jax.random.split(key, num_probes)
    # A few probes at a time: all at once would hold as many solves.
    return jnp.mean(jax.lax.map(lambda key: estimate(product, key), keys, batch_size=8), axis=0)


@eqx.filter_jit
def _lanczos(flow: AbstractFlow, problem: Problem, num_products: int):
    theta = flow.parameters.vector
    tridiagonalize = matfree.decomp.tridiag_sym(num_products, reortho="full", custom_vjp=False)
    start = jax.random.normal(jax.random.key(0), theta.shape)  # any start with a part in every direction
    return matfree.eig.eigh_partial(tridiagonalize)(lambda v: hessian_vector_product(flow, problem, theta, v), start)


def hessian_leading(flow: AbstractFlow, problem: Problem, *, rank: int) -> EigenCurvature:
    """The leading eigenpairs of the exact Hessian, largest in size first, by Lanczos over Hessian-vector products."""
    check_second_order(flow)
    # Lanczos finds the ends of the spectrum first; half of the pairs of a run have usually converged.
    num_products = min(flow.parameters.size, 2 * rank + 10)
    eigenvalues, vectors = _lanczos(flow, problem, num_products)
    leading = jnp.argsort(-jnp.abs(eigenvalues))[:rank]
    return EigenCurvature(vectors[leading], eigenvalues[leading])


def symmetrized(matrix: np.ndarray) -> DenseCurvature:
    """(H + Hᵀ) / 2, with the defect it had."""
    norm = np.linalg.norm(matrix)
    defect = float(np.linalg.norm(matrix - matrix.T) / norm) if norm > 0 else 0.0
    return DenseCurvature(jnp.asarray((matrix + matrix.T) / 2), defect)


def ggn(flow: AbstractFlow, problem: Problem) -> FactoredCurvature:
    """The generalized Gauss-Newton matrix Jᵀ R J, R the Fisher information of each observation in its prediction."""
    predictions, jacobian = linearize(flow)
    return _factored(problem, jacobian, problem.information(predictions))


def fisher(flow: AbstractFlow, problem: Problem) -> FactoredCurvature:
    """The empirical Fisher matrix Σ_m s_m s_mᵀ, s_m the gradient of the log-likelihood of observation m."""
    predictions, jacobian = linearize(flow)
    return _factored(problem, jacobian, problem.likelihood.score(predictions, jnp.asarray(problem.data.ys)) ** 2)


def _factored(problem: Problem, jacobian: Float[Array, "N*T*K P"], weights: Float[Array, "N T K"]) -> FactoredCurvature:
    informed = problem.informed.ravel()
    weights = weights.ravel()
    if np.all(informed):  # a matrix this large is not copied for nothing
        return FactoredCurvature(jacobian, weights)
    return FactoredCurvature(jacobian[informed], weights[informed])

"""From a curvature and a prior to a structure."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import matfree.decomp
import matfree.eig
import numpy as np
from jaxtyping import Array, Float

from .._errors import LaplodeError
from .forms import (
    AbstractCurvature,
    BlockCurvature,
    DenseCurvature,
    DiagonalCurvature,
    EigenCurvature,
    FactoredCurvature,
)
from .regularization import Regularize, Regularized
from .structure import AbstractStructure, BlockDiagonalPrecision, DiagonalPrecision, FullPrecision, LowRankPrecision


@dataclasses.dataclass(frozen=True)
class Sizes:
    """P, M, the sizes of the model's leaves in the order of θ, and the rank asked for."""

    parameters: int
    observations: int
    leaves: tuple[int, ...]
    rank: int | None


@dataclasses.dataclass(frozen=True)
class Built:
    structure: AbstractStructure
    eigenvalue_min: float
    eigenvalue_max: float
    condition_number: float
    num_negative: int
    regularized: Regularized | None


def _not_positive_definite(low: float, num_negative: int) -> LaplodeError:
    return LaplodeError(
        f"The precision is not positive definite: its smallest eigenvalue is {low:.3g}, and {num_negative} "
        "eigenvalues of the Hessian are negative. The model is not at a minimum: call laplode.refine(model, problem) "
        'first, or take `regularization`="clip" or `curvature`="ggn".'
    )


# The part of the smallest eigenvalue of a root of Λ that may be rounding.
_MOST_ROUNDING = 1e-3


def _from_factor(found: FactoredCurvature, prior_precision: Float[Array, " P"]) -> Built:
    """From a positive semidefinite curvature."""
    cholesky = jnp.linalg.cholesky(found.matrix() + jnp.diag(prior_precision))
    if not np.all(np.isfinite(cholesky)):
        # Where eigenvalues lie too far apart for Λ, they do not for its root, of which they are squares.
        rows = [jnp.sqrt(found.weights)[:, None] * found.factor, jnp.diag(jnp.sqrt(prior_precision))]
        root = jnp.linalg.qr(jnp.concatenate(rows), mode="r")
        spectrum = np.linalg.svd(np.asarray(root), compute_uv=False)
        rounding = len(spectrum) * np.finfo(float).eps * spectrum[0]
        if not rounding < _MOST_ROUNDING * spectrum[-1]:
            raise _too_far_apart()
        cholesky = (root * jnp.where(jnp.diagonal(root) < 0, -1, 1)[:, None]).T
    structure = FullPrecision(cholesky)
    if prior_precision.size <= _DENSE_SPECTRUM:
        spectrum = np.linalg.svd(np.asarray(cholesky), compute_uv=False) ** 2
        low, high = float(spectrum[-1]), float(spectrum[0])
    else:
        low, high = _extreme_eigenvalues(structure, prior_precision.size)
    return Built(structure, low, high, high / low, 0, None)


def _from_dense(matrix: np.ndarray, prior_precision: Float[Array, " P"], regularize: Regularize) -> Built:
    """From a curvature with eigenvalues of either sign."""
    prior = np.asarray(prior_precision)
    eigenvalues, vectors = np.linalg.eigh(matrix)
    changed, num_negative, regularized = regularize(eigenvalues)

    def extremes(matrix: np.ndarray, eigenvalues: np.ndarray) -> tuple[float, float]:
        uniform = np.all(prior == prior[0])
        spectrum = eigenvalues + prior[0] if uniform else np.linalg.eigvalsh(matrix + np.diag(prior))
        return float(spectrum.min()), float(spectrum.max())

    low, high = extremes(matrix, eigenvalues)
    low_used, high_used = low, high
    if regularized is not None:
        matrix = (vectors * changed) @ vectors.T
        low_used, high_used = extremes(matrix, changed)
    elif low <= 0:  # only "none" leaves it so
        raise _not_positive_definite(low, num_negative)
    structure = FullPrecision(_factored(jnp.asarray(matrix) + jnp.diag(prior_precision)))
    return Built(structure, low, high, high_used / low_used, num_negative, regularized)


def _factored(precision: Float[Array, "P P"]) -> Float[Array, "P P"]:
    cholesky = jnp.linalg.cholesky(precision)
    if not np.all(np.isfinite(cholesky)):
        raise _too_far_apart()
    return cholesky


def _too_far_apart() -> LaplodeError:
    return LaplodeError(
        "The precision can't be factored: its eigenvalues lie too far apart for float64. A larger prior precision "
        "bounds the small ones."
    )


def build_full(found: AbstractCurvature, prior_precision, regularize: Regularize, sizes: Sizes) -> Built:
    if isinstance(found, FactoredCurvature):
        return _from_factor(found, prior_precision)
    assert isinstance(found, DenseCurvature)
    return _from_dense(np.asarray(found.matrix), prior_precision, regularize)


# Up to so many parameters all eigenvalues are computed where the extreme ones are wanted.
_DENSE_SPECTRUM = 1000


def _extreme_eigenvalues(structure: AbstractStructure, size: int) -> tuple[float, float]:
    """The smallest and the largest eigenvalue of Λ; of many parameters, from Lanczos runs on Λ⁻¹ and on Λ."""
    if size <= _DENSE_SPECTRUM:
        spectrum = np.linalg.eigvalsh(np.asarray(structure.precision_product(jnp.eye(size))))
        return float(spectrum[0]), float(spectrum[-1])
    low, high = _lanczos_extremes(structure, size)
    return float(low), float(high)


@eqx.filter_jit
def _lanczos_extremes(structure: AbstractStructure, size: int):
    eigenpairs = matfree.eig.eigh_partial(matfree.decomp.tridiag_sym(40, reortho="full", custom_vjp=False))
    start = jax.random.normal(jax.random.key(0), (size,))  # any start with a part in every direction
    largest = lambda product: jnp.max(eigenpairs(product, start)[0])
    return 1 / largest(structure.covariance_product), largest(structure.precision_product)


def build_block_diagonal(found: AbstractCurvature, prior_precision, regularize: Regularize, sizes: Sizes) -> Built:
    built, start = [], 0
    if isinstance(found, BlockCurvature):
        for block in found.blocks:
            stop = start + len(block.matrix)
            built.append(_from_dense(np.asarray(block.matrix), prior_precision[start:stop], regularize))
            start = stop
    else:
        assert isinstance(found, FactoredCurvature)
        for size in sizes.leaves:
            part = FactoredCurvature(found.factor[:, start : start + size], found.weights)
            built.append(_from_factor(part, prior_precision[start : start + size]))
            start += size
    low, high = min(b.eigenvalue_min for b in built), max(b.eigenvalue_max for b in built)
    changes = [b.regularized for b in built if b.regularized is not None]
    regularized = None
    if changes:
        count, total = sum(c.count for c in changes), sum(c.total for c in changes)
        regularized = Regularized(regularize.kind, count, max(c.largest for c in changes), total)
    structure = BlockDiagonalPrecision(tuple(b.structure for b in built))
    # The used extremes of each block lie within its condition number of one another; over blocks they are taken anew.
    low_used, high_used = low, high
    if changes:
        low_used, high_used = _extreme_eigenvalues(structure, start)
    return Built(structure, low, high, high_used / low_used, sum(b.num_negative for b in built), regularized)


def build_diagonal(found: AbstractCurvature, prior_precision, regularize: Regularize, sizes: Sizes) -> Built:
    num_negative, regularized = 0, None
    if isinstance(found, FactoredCurvature):
        diagonal = changed = found.diagonal()
    else:
        assert isinstance(found, DiagonalCurvature)
        diagonal = found.diagonal
        changed, num_negative, regularized = regularize(np.asarray(diagonal))
    before, used = diagonal + prior_precision, jnp.asarray(changed) + prior_precision
    if jnp.min(used) <= 0:
        raise _not_positive_definite(float(jnp.min(used)), num_negative)
    condition = float(jnp.max(used) / jnp.min(used))
    return Built(
        DiagonalPrecision(used), float(jnp.min(before)), float(jnp.max(before)), condition, num_negative, regularized
    )


def build_low_rank(found: AbstractCurvature, prior_precision, regularize: Regularize, sizes: Sizes) -> Built:
    num_negative, regularized, lowest = 0, None, 0.0
    if isinstance(found, FactoredCurvature):
        structure = LowRankPrecision(found.factor, found.weights, prior_precision, sizes.rank)
    else:
        assert isinstance(found, EigenCurvature)
        changed, num_negative, regularized = regularize(np.asarray(found.eigenvalues))
        lowest = float(jnp.min(found.eigenvalues))
        if regularized is None and num_negative:
            raise _not_positive_definite(lowest, num_negative)
        structure = LowRankPrecision(found.vectors, jnp.maximum(jnp.asarray(changed), 0), prior_precision)
    size = prior_precision.size
    if bool(jnp.all(prior_precision == prior_precision[0])):
        scaled = float(prior_precision[0]) * (1 + np.asarray(structure.strengths))
        low = float(scaled.min()) if scaled.size == size else float(prior_precision[0])
        high = float(scaled.max())
    else:
        low, high = _extreme_eigenvalues(structure, size)
    low_before = low if regularized is None else min(low, lowest + float(jnp.min(prior_precision)))
    return Built(structure, low_before, high, high / low, num_negative, regularized)

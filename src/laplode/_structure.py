"""The structures that a precision matrix may have, and how they are made from a curvature and a prior."""

import abc
import dataclasses
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import matfree.decomp
import matfree.eig
import numpy as np
from jaxtyping import Array, Float

from ._curvature import (
    AbstractCurvature,
    BlockCurvature,
    DenseCurvature,
    DiagonalCurvature,
    EigenCurvature,
    FactoredCurvature,
    free_bytes,
    gram,
)
from ._errors import LaplodeError


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

    @abc.abstractmethod
    def split(self, base: Float[Array, " P"]) -> tuple[Float[Array, " P"], Float[Array, "R P"]]:
        """A positive diagonal d and rows X with Λ = diag(d) + Xᵀ X; d is `base` where that can be."""

    def effective_dof(self, prior_precision: Float[Array, " P"]) -> Float[Array, ""]:
        """tr((Λ − Λ0) Λ⁻¹) for a prior of precision Λ0 (P,)."""
        return prior_precision.size - jnp.sum(prior_precision * self.variance())


class Full(AbstractStructure):
    """Any Λ, by its Cholesky factor: Λ = L Lᵀ."""

    cholesky: Float[Array, "P P"]
    log_det: Float[Array, ""]

    def __init__(self, cholesky: Float[Array, "P P"]):
        self.cholesky = cholesky
        self.log_det = _log_det(cholesky)

    @eqx.filter_jit
    def _solve(self, v: Array, trans: int) -> Array:
        columns = v.reshape(-1, v.shape[-1]).T
        return jsl.solve_triangular(self.cholesky, columns, lower=True, trans=trans).T.reshape(v.shape)

    @eqx.filter_jit
    def precision_product(self, v):
        return (v @ self.cholesky) @ self.cholesky.T

    @eqx.filter_jit
    def covariance_product(self, v):
        return self._solve(self._solve(v, 0), 1)

    def root_product(self, z):
        return self._solve(z, 1)

    @eqx.filter_jit
    def variance(self):
        inverse = jsl.solve_triangular(self.cholesky, jnp.eye(self.cholesky.shape[0]), lower=True)
        return jnp.sum(inverse**2, axis=0)

    @eqx.filter_jit
    def predictive_covariance(self, jacobian):
        half = self._solve(jacobian, 0)
        return half @ half.T

    def split(self, base):
        strengths, rows = _beyond(self.cholesky, base)
        rounding = strengths.size * np.finfo(float).eps * np.max(strengths + 1)
        kept = strengths > rounding
        if not np.any(strengths < -rounding):
            return base, jnp.asarray(rows[kept] * np.sqrt(strengths[kept])[:, None])
        # Less than Λ in every direction: half of its smallest eigenvalue when its diagonal is scaled to 1.
        diagonal = jnp.sum(self.cholesky**2, axis=1)
        least = np.linalg.svd(np.asarray(self.cholesky / jnp.sqrt(diagonal)[:, None]), compute_uv=False)[-1] ** 2
        strengths, rows = _beyond(self.cholesky, 0.5 * least * diagonal)
        return 0.5 * least * diagonal, jnp.asarray(rows * np.sqrt(strengths)[:, None])


@jax.jit
def _log_det(cholesky: Float[Array, "P P"]) -> Float[Array, ""]:
    """Of L Lᵀ."""
    return 2 * jnp.sum(jnp.log(jnp.diagonal(cholesky)))


def _beyond(cholesky: Float[Array, "P P"], base: Float[Array, " P"]) -> tuple[np.ndarray, np.ndarray]:
    """Λ − diag(base) as Xᵀ diag(strengths) X: the strengths, and the rows of X."""
    root = np.sqrt(np.asarray(base))
    vectors, values, _ = np.linalg.svd(np.asarray(cholesky) / root[:, None])
    return values**2 - 1, vectors.T * root


class BlockDiagonal(AbstractStructure):
    """Λ in blocks on its diagonal, in the order of θ."""

    blocks: tuple[Full, ...]
    log_det: Float[Array, ""]

    def __init__(self, blocks: tuple[Full, ...]):
        self.blocks = blocks
        self.log_det = sum((block.log_det for block in blocks), jnp.zeros(()))

    def _each(self, product: Callable[[Full, Array], Array], v: Array) -> Array:
        stops = np.cumsum([block.cholesky.shape[0] for block in self.blocks])[:-1]
        parts = jnp.split(v, stops, axis=-1)
        return jnp.concatenate([product(block, part) for block, part in zip(self.blocks, parts, strict=True)], axis=-1)

    def precision_product(self, v):
        return self._each(Full.precision_product, v)

    def covariance_product(self, v):
        return self._each(Full.covariance_product, v)

    def root_product(self, z):
        return self._each(Full.root_product, z)

    def variance(self):
        return jnp.concatenate([block.variance() for block in self.blocks])

    def predictive_covariance(self, jacobian):
        half = self._each(lambda block, rows: block._solve(rows, 0), jacobian)
        return half @ half.T

    def split(self, base):
        stops = np.cumsum([block.cholesky.shape[0] for block in self.blocks])[:-1]
        pairs = zip(self.blocks, jnp.split(base, stops), strict=True)
        diagonals, rows = zip(*(block.split(part) for block, part in pairs), strict=True)
        needed = 2 * 8 * base.size * sum(len(each) for each in rows)
        if needed > free_bytes():
            raise LaplodeError(
                f"The blocks of a block_diagonal posterior would be written out as {needed / 2**31:.1f} GiB, more than "
                'fits. Take structure="low_rank" or "diagonal".'
            )
        return jnp.concatenate(diagonals), jsl.block_diag(*rows)


class Diagonal(AbstractStructure):
    """A diagonal Λ."""

    precision: Float[Array, " P"]
    log_det: Float[Array, ""]

    def __init__(self, precision: Float[Array, " P"]):
        self.precision = precision
        self.log_det = jnp.sum(jnp.log(precision))

    def precision_product(self, v):
        return self.precision * v

    def covariance_product(self, v):
        return v / self.precision

    def root_product(self, z):
        return z / jnp.sqrt(self.precision)

    def variance(self):
        return 1 / self.precision

    def predictive_covariance(self, jacobian):
        return _scaled_gram(jacobian, 1 / self.precision)

    def split(self, base):
        return self.precision, jnp.zeros((0, self.precision.size))


class LowRank(AbstractStructure):
    """Λ = Λ0 + Fᵀ W F with a factor F (M, P), in data space: nothing P×P, and no second matrix of the size of F.

    With A = W^½ F Λ0^-½ and A Aᵀ = U diag(x) Uᵀ the right singular vectors of A are V = Aᵀ U x^-½, and every function
    of Λ0^-½ Λ Λ0^-½ = I + V diag(x) Vᵀ acts through F and U alone. Exact when U holds all min(M, P) modes.
    """

    factor: Float[Array, "M P"]
    scale: Float[Array, " M"]
    prior_precision: Float[Array, " P"]
    modes: Float[Array, "M R"]
    strengths: Float[Array, " R"]
    log_det: Float[Array, ""]

    def __init__(self, factor, weights, prior_precision, rank: int | None = None):
        num, size = factor.shape
        if num > size:
            factor, weights = _by_eigenvectors(factor, weights, prior_precision)
        self.factor = factor
        self.prior_precision = prior_precision
        self.scale, self.modes, self.strengths, self.log_det = _modes(factor, weights, prior_precision, rank)

    def effective_dof(self, prior_precision):
        return jnp.sum(self.strengths / (1 + self.strengths))

    def _project(self, v: Array) -> Array:
        """Uᵀ A v."""
        seen = jnp.einsum("...p,mp->...m", v / jnp.sqrt(self.prior_precision), self.factor)
        return (seen * self.scale) @ self.modes

    def _lift(self, c: Array) -> Array:
        """Aᵀ U c."""
        return ((c @ self.modes.T) * self.scale) @ self.factor / jnp.sqrt(self.prior_precision)

    def right_vectors(self, kept: np.ndarray) -> Float[Array, "R P"]:
        """The right singular vectors V of the modes with the numbers `kept`, whose strength is not 0."""
        chosen = jnp.eye(self.strengths.size)[kept]
        return self._lift(chosen / jnp.sqrt(self.strengths[kept])[:, None])

    def _shrinkage(self) -> Array:
        """(1 − 1/√(1 + x)) / x, which tends to ½ with x."""
        x = self.strengths
        return jnp.where(x > 0, -jnp.expm1(-0.5 * jnp.log1p(x)) / jnp.where(x > 0, x, 1), 0.5)

    @eqx.filter_jit
    def precision_product(self, v):
        root = jnp.sqrt(self.prior_precision)
        return root * (root * v + self._lift(self._project(root * v)))

    @eqx.filter_jit
    def covariance_product(self, v):
        root = jnp.sqrt(self.prior_precision)
        return (v / root - self._lift(self._project(v / root) / (1 + self.strengths))) / root

    @eqx.filter_jit
    def root_product(self, z):
        inverse = 1 / jnp.sqrt(self.prior_precision)
        rows = z.reshape(-1, z.shape[-1])
        seen = ((_cross_gram(rows, self.factor, inverse) * self.scale) @ self.modes) * self._shrinkage()
        return _minus_product(rows, (seen @ self.modes.T) * self.scale, self.factor, inverse).reshape(z.shape)

    @eqx.filter_jit
    def variance(self):
        def block(rows):  # of Aᵀ U
            lifted = (rows * self.scale) @ self.modes
            return jnp.sum(lifted**2 / (1 + self.strengths), axis=-1)

        explained = jax.lax.map(lambda i: block(self.factor[:, i]), jnp.arange(self.factor.shape[1]), batch_size=4096)
        return (1 - explained / self.prior_precision) / self.prior_precision

    @eqx.filter_jit
    def predictive_covariance(self, jacobian):
        # As R Rᵀ with R = J Λ^-½: positive semidefinite, and not the small difference of two large matrices.
        inverse = 1 / self.prior_precision
        half = (_cross_gram(jacobian, self.factor, inverse) * self.scale) @ (self.modes * self._shrinkage())
        rows = (half @ self.modes.T) * self.scale
        return _scaled_gram(jacobian, inverse, minus=(rows, self.factor))

    @eqx.filter_jit
    def split(self, base):
        return self.prior_precision, (self.modes.T * self.scale) @ self.factor


@jax.jit
def _by_eigenvectors(factor: Float[Array, "M P"], weights: Float[Array, " M"], prior_precision: Float[Array, " P"]):
    """Factor and weights of the same matrix, P of them instead of M."""
    half = jnp.sqrt(weights)[:, None] * factor / jnp.sqrt(prior_precision)
    eigenvalues, vectors = jnp.linalg.eigh(half.T @ half)
    return vectors.T * jnp.sqrt(prior_precision), jnp.maximum(eigenvalues, 0)


@eqx.filter_jit
def _modes(factor: Float[Array, "M P"], weights: Float[Array, " M"], prior_precision: Array, rank: int | None):
    """√w, the strongest modes and their strengths, and log |Λ|."""
    scale = jnp.sqrt(weights)
    strengths, modes = jnp.linalg.eigh(scale[:, None] * _scaled_gram(factor, 1 / prior_precision) * scale)
    num = len(weights)
    kept = slice(num - min(num if rank is None else rank, num), num)
    strengths = jnp.maximum(strengths[kept], 0)
    return scale, modes[:, kept], strengths, jnp.sum(jnp.log(prior_precision)) + jnp.sum(jnp.log1p(strengths))


# Columns of a wide matrix taken at a time, so that what is made of them stays small beside it.
_COLUMNS = 2**15


def over_columns(add: Callable[[Array, Callable[[Array], Array]], Array], total: Array, size: int) -> Array:
    """Accumulate over blocks of columns: `add(total, take)`, where `take` cuts a block from a (..., P) array."""
    block = min(_COLUMNS, size)
    whole = size // block

    def cut(start, width):
        return lambda x: jax.lax.dynamic_slice_in_dim(x, start, width, axis=-1)

    total = jax.lax.fori_loop(0, whole, lambda i, total: add(total, cut(i * block, block)), total)
    rest = size - whole * block
    return add(total, cut(whole * block, rest)) if rest else total


@eqx.filter_jit
def _cross_gram(left: Float[Array, "A P"], right: Float[Array, "B P"], columns: Float[Array, " P"]):
    """left · diag(columns) · rightᵀ."""
    add = lambda total, take: total + (take(left) * take(columns)) @ take(right).T
    return over_columns(add, jnp.zeros((left.shape[0], right.shape[0])), left.shape[1])


@eqx.filter_jit
def _minus_product(rows: Float[Array, "A P"], left: Float[Array, "A B"], right: Float[Array, "B P"], columns: Array):
    """(rows − left · right · diag(columns)) · diag(columns), in the place of `rows` where it can be had."""
    size = rows.shape[1]
    block = min(_COLUMNS, size)

    # The last block overlaps its neighbor, and leaves alone what that has done.
    def put(i, result):
        start = jnp.minimum(i * block, size - block)
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, start, block, axis=-1)
        fresh = start + jnp.arange(block) >= i * block
        old, scale = take(result), take(columns)
        new = jnp.where(fresh, (old - (left @ take(right)) * scale) * scale, old)
        return jax.lax.dynamic_update_slice(result, new, (0, start))

    return jax.lax.fori_loop(0, -(-size // block), put, rows)


@eqx.filter_jit
def _scaled_gram(matrix: Float[Array, "A P"], columns: Float[Array, " P"], minus: tuple[Array, Array] | None = None):
    """(X) diag(columns) (X)ᵀ of X = matrix, or of X = matrix − minus[0] @ minus[1]."""

    def add(total, take):
        rows = take(matrix)
        if minus is not None:
            rows = rows - minus[0] @ take(minus[1])
        rows = rows * jnp.sqrt(take(columns))
        return total + rows @ rows.T

    return over_columns(add, jnp.zeros((matrix.shape[0],) * 2), matrix.shape[1])


# ---- From a curvature and a prior


class Regularized(eqx.Module):
    """What regularization did to the curvature: `count` eigenvalues changed, the largest change, and their sum."""

    kind: str = eqx.field(static=True)
    count: int
    largest: float
    total: float

    def __str__(self) -> str:
        return f"{self.kind}: {self.count} eigenvalues, by at most {self.largest:.3g}, {self.total:.3g} in all"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """P, M, the sizes of the model's leaves in the order of θ, and the rank asked for."""

    parameters: int
    observations: int
    leaves: tuple[int, ...]
    rank: int | None


@dataclasses.dataclass(frozen=True)
class Regularize:
    """A change of eigenvalues, with its name."""

    kind: str
    function: Callable[[np.ndarray], np.ndarray]

    def __call__(self, eigenvalues: np.ndarray) -> tuple[np.ndarray, int, Regularized | None]:
        """The eigenvalues after it, how many were negative beyond rounding, and what was changed."""
        rounding = eigenvalues.size * np.finfo(float).eps * np.abs(eigenvalues).max()
        num_negative = int(np.sum(eigenvalues < -rounding))
        changed = self.function(eigenvalues) if num_negative else eigenvalues
        change = np.abs(changed - eigenvalues)
        if not np.any(change):
            return changed, num_negative, None
        count = int(np.sum(change > rounding))
        return changed, num_negative, Regularized(self.kind, count, float(change.max()), float(change.sum()))


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


def lessened(
    found: AbstractCurvature, structure: str, diagonal: Float[Array, " P"], leaves: Sequence[tuple[int, int]]
) -> AbstractCurvature:
    """A curvature less a diagonal, as `structure` wants it: where a prior bends upward."""
    if isinstance(found, DiagonalCurvature):
        return DiagonalCurvature(found.diagonal - diagonal)
    if isinstance(found, DenseCurvature):
        return DenseCurvature(found.matrix - jnp.diag(diagonal), found.symmetry_defect)
    if isinstance(found, BlockCurvature):
        less = [jnp.diag(diagonal[start:stop]) for start, stop in leaves]
        pairs = zip(found.blocks, less, strict=True)
        return BlockCurvature(tuple(DenseCurvature(b.matrix - d, b.symmetry_defect) for b, d in pairs))
    assert isinstance(found, FactoredCurvature)
    if structure == "diagonal":
        return DiagonalCurvature(found.diagonal() - diagonal)
    if structure == "block_diagonal":
        blocks = tuple(DenseCurvature(found.block(*leaf), 0.0) for leaf in leaves)
        return lessened(BlockCurvature(blocks), structure, diagonal, leaves)
    return lessened(DenseCurvature(found.matrix(), 0.0), structure, diagonal, leaves)


def with_rows(found: AbstractCurvature, rows: Float[Array, "R P"]) -> AbstractCurvature:
    """A curvature and Xᵀ X of the rows X beside it, in the same form."""
    if isinstance(found, FactoredCurvature):
        return found.with_rows(rows)
    if isinstance(found, DenseCurvature):
        return DenseCurvature(found.matrix + gram(rows), found.symmetry_defect)
    if isinstance(found, BlockCurvature):
        stops = np.cumsum([len(block.matrix) for block in found.blocks])[:-1]
        pairs = zip(found.blocks, jnp.split(rows, stops, axis=1), strict=True)
        return BlockCurvature(tuple(DenseCurvature(b.matrix + gram(r), b.symmetry_defect) for b, r in pairs))
    if isinstance(found, DiagonalCurvature):
        return DiagonalCurvature(found.diagonal + jnp.sum(rows**2, axis=0))
    assert isinstance(found, EigenCurvature)
    basis, inside = jnp.linalg.qr(jnp.concatenate([found.vectors, rows]).T)
    values = jnp.concatenate([found.eigenvalues, jnp.ones(rows.shape[0])])
    eigenvalues, vectors = jnp.linalg.eigh((inside * values) @ inside.T)
    return EigenCurvature((basis @ vectors).T, eigenvalues)


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
    structure = Full(cholesky)
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
    structure = Full(_factored(jnp.asarray(matrix) + jnp.diag(prior_precision)))
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
    structure = BlockDiagonal(tuple(b.structure for b in built))
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
    return Built(Diagonal(used), float(jnp.min(before)), float(jnp.max(before)), condition, num_negative, regularized)


def build_low_rank(found: AbstractCurvature, prior_precision, regularize: Regularize, sizes: Sizes) -> Built:
    num_negative, regularized, lowest = 0, None, 0.0
    if isinstance(found, FactoredCurvature):
        structure = LowRank(found.factor, found.weights, prior_precision, sizes.rank)
    else:
        assert isinstance(found, EigenCurvature)
        changed, num_negative, regularized = regularize(np.asarray(found.eigenvalues))
        lowest = float(jnp.min(found.eigenvalues))
        if regularized is None and num_negative:
            raise _not_positive_definite(lowest, num_negative)
        structure = LowRank(found.vectors, jnp.maximum(jnp.asarray(changed), 0), prior_precision)
    size = prior_precision.size
    if bool(jnp.all(prior_precision == prior_precision[0])):
        scaled = float(prior_precision[0]) * (1 + np.asarray(structure.strengths))
        low = float(scaled.min()) if scaled.size == size else float(prior_precision[0])
        high = float(scaled.max())
    else:
        low, high = _extreme_eigenvalues(structure, size)
    low_before = low if regularized is None else min(low, lowest + float(jnp.min(prior_precision)))
    return Built(structure, low_before, high, high / low, num_negative, regularized)

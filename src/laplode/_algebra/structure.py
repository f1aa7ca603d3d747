"""The structures that a precision matrix may have, as a few products."""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Float

from .._devices import free_bytes
from .._errors import LaplodeError


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


class FullPrecision(AbstractStructure):
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


class BlockDiagonalPrecision(AbstractStructure):
    """Λ in blocks on its diagonal, in the order of θ."""

    blocks: tuple[FullPrecision, ...]
    log_det: Float[Array, ""]

    def __init__(self, blocks: tuple[FullPrecision, ...]):
        self.blocks = blocks
        self.log_det = sum((block.log_det for block in blocks), jnp.zeros(()))

    def _each(self, product: Callable[[FullPrecision, Array], Array], v: Array) -> Array:
        stops = np.cumsum([block.cholesky.shape[0] for block in self.blocks])[:-1]
        parts = jnp.split(v, stops, axis=-1)
        return jnp.concatenate([product(block, part) for block, part in zip(self.blocks, parts, strict=True)], axis=-1)

    def precision_product(self, v):
        return self._each(FullPrecision.precision_product, v)

    def covariance_product(self, v):
        return self._each(FullPrecision.covariance_product, v)

    def root_product(self, z):
        return self._each(FullPrecision.root_product, z)

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


class DiagonalPrecision(AbstractStructure):
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


class LowRankPrecision(AbstractStructure):
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

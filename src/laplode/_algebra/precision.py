"""Precision matrices, as a few products."""

import abc
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Float

from .._devices import free_bytes
from .._errors import LaplodeError
from .columns import scaled_gram


class AbstractPrecision(eqx.Module):
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

    @abc.abstractmethod
    def eigenpairs(self, prior_precision: Float[np.ndarray, " P"]) -> "Iterator[Eigenpairs]":
        """Eigenvalues x and eigenvectors of Λ0^-½ (Λ − Λ0) Λ0^-½ for a prior precision Λ0 (P,)."""

    def extremes(self, prior_precision: Float[Array, " P"]) -> tuple[float, float]:
        """The smallest and the largest eigenvalue of Λ0^-½ Λ Λ0^-½ for a prior precision Λ0 (P,)."""
        values = np.concatenate([1 + part.strengths for part in self.eigenpairs(np.asarray(prior_precision))])
        return float(values.min()), float(values.max())

    @eqx.filter_jit
    def log_prob(self, offset: Float[Array, "... P"]) -> Float[Array, "..."]:
        """log Normal(offset; 0, Λ⁻¹), in nats."""
        quadratic = jnp.sum(offset * self.precision_product(offset), axis=-1)
        return 0.5 * (self.log_det - offset.shape[-1] * math.log(2 * math.pi) - quadratic)

    @property
    def rounding(self) -> Array:
        """The part of the smallest variance that may be rounding, as far as the form of the precision brings it."""
        return jnp.zeros(())

    def inverse_quadratic(self, v: Float[Array, " P"]) -> Float[Array, ""]:
        """vᵀ Λ⁻¹ v, as a sum of squares: never negative."""
        return self.predictive_covariance(v[None])[0, 0]

    def effective_dof(self, prior_precision: Float[Array, " P"]) -> Float[Array, ""]:
        """tr((Λ − Λ0) Λ⁻¹) for a prior of precision Λ0 (P,)."""
        return prior_precision.size - jnp.sum(prior_precision * self.variance())


class Eigenpairs(NamedTuple):
    """Of the parameters from `start` on, `size` of them: eigenvalues, and orthonormal eigenvectors as rows.

    The vectors are None where they are the single parameters.
    """

    start: int
    size: int
    strengths: Float[np.ndarray, " R"]
    vectors: Float[np.ndarray, "R p"] | None


# Up to so many parameters all eigenvalues are computed where the extreme ones are wanted.
_DENSE_SPECTRUM = 1500


# The part of itself to which an extreme eigenvalue is then found.
_SPECTRUM_TOLERANCE = 1e-2


class FullPrecision(AbstractPrecision):
    """Any Λ, by its Cholesky factor: Λ = L Lᵀ. Its log-determinant may be given where it is known more exactly."""

    cholesky: Float[Array, "P P"]
    log_det: Float[Array, ""]

    def __init__(self, cholesky: Float[Array, "P P"], log_det: Float[Array, ""] | None = None):
        self.cholesky = cholesky
        self.log_det = _log_det(cholesky) if log_det is None else log_det

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

    def eigenpairs(self, prior_precision):
        half = np.asarray(self.cholesky) / np.sqrt(prior_precision)[:, None]
        strengths, vectors = np.linalg.eigh(half @ half.T - np.eye(len(half)))
        yield Eigenpairs(0, len(half), strengths, vectors.T)

    def extremes(self, prior_precision):
        half = np.asarray(self.cholesky) / np.sqrt(np.asarray(prior_precision))[:, None]
        if len(half) <= _DENSE_SPECTRUM:
            values = np.linalg.svd(half, compute_uv=False) ** 2
            return float(values[-1]), float(values[0])
        import scipy.linalg  # it takes a while to import
        import scipy.sparse.linalg

        # Lanczos runs on Λ and on Λ⁻¹, at the cost of a few products with a triangular matrix each.
        solve = lambda v, trans: scipy.linalg.solve_triangular(half, v, lower=True, trans=trans, check_finite=False)
        products = (lambda v: half @ (half.T @ v), lambda v: solve(solve(v, 0), 1))
        start = np.random.default_rng(0).normal(size=len(half))  # any vector with a part in every direction
        low, high = (
            scipy.sparse.linalg.eigsh(
                scipy.sparse.linalg.LinearOperator(half.shape, matvec=product, dtype=float),  # pyright: ignore[reportCallIssue]
                k=1,
                v0=start,
                tol=_SPECTRUM_TOLERANCE,  # pyright: ignore[reportArgumentType]
                return_eigenvectors=False,
            )[0]
            for product in reversed(products)
        )
        return 1 / float(low), float(high)

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
def full_in_metric(
    inner: Float[Array, "P P"], precision: Float[Array, " P"], log_det: Array | None = None
) -> FullPrecision:
    """Λ0^½ (I + inner) Λ0^½."""
    root = jnp.sqrt(precision)
    return FullPrecision(root[:, None] * jnp.linalg.cholesky(jnp.eye(root.size) + inner), log_det)


@jax.jit
def full_by_root(factor: Float[Array, "M P"], weights: Float[Array, " M"], precision: Float[Array, " P"]):
    """FᵀWF + Λ0, by the root of it."""
    scale = jnp.sqrt(precision)
    rows = jnp.concatenate([jnp.sqrt(weights)[:, None] * factor / scale, jnp.eye(scale.size)])
    root = jnp.linalg.qr(rows, mode="r")
    return FullPrecision(scale[:, None] * (root * jnp.where(jnp.diagonal(root) < 0, -1, 1)[:, None]).T)


@jax.jit
def _log_det(cholesky: Float[Array, "P P"]) -> Float[Array, ""]:
    """Of L Lᵀ."""
    return 2 * jnp.sum(jnp.log(jnp.diagonal(cholesky)))


def _beyond(cholesky: Float[Array, "P P"], base: Float[Array, " P"]) -> tuple[np.ndarray, np.ndarray]:
    """Λ − diag(base) as Xᵀ diag(strengths) X: the strengths, and the rows of X."""
    root = np.sqrt(np.asarray(base))
    vectors, values, _ = np.linalg.svd(np.asarray(cholesky) / root[:, None])
    return values**2 - 1, vectors.T * root


class BlockDiagonalPrecision(AbstractPrecision):
    """Λ in blocks on its diagonal, in the order of θ."""

    blocks: tuple[FullPrecision, ...]
    log_det: Float[Array, ""]

    def __init__(self, blocks: tuple[FullPrecision, ...]):
        self.blocks = blocks
        self.log_det = sum((block.log_det for block in blocks), jnp.zeros(()))

    @property
    def _stops(self) -> np.ndarray:
        return np.cumsum([block.cholesky.shape[0] for block in self.blocks])

    def _each(self, product: Callable[[FullPrecision, Array], Array], v: Array) -> Array:
        parts = jnp.split(v, self._stops[:-1], axis=-1)
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

    def eigenpairs(self, prior_precision):
        for block, part, stop in zip(
            self.blocks, np.split(prior_precision, self._stops[:-1]), self._stops, strict=True
        ):
            for found in block.eigenpairs(part):
                yield found._replace(start=int(stop) - len(part))

    def extremes(self, prior_precision):
        parts = jnp.split(prior_precision, self._stops[:-1])
        low, high = zip(*(block.extremes(part) for block, part in zip(self.blocks, parts, strict=True)), strict=True)
        return min(low), max(high)

    def split(self, base):
        pairs = zip(self.blocks, jnp.split(base, self._stops[:-1]), strict=True)
        diagonals, rows = zip(*(block.split(part) for block, part in pairs), strict=True)
        needed = 2 * 8 * base.size * sum(len(each) for each in rows)
        if needed > free_bytes():
            raise LaplodeError(
                f"The blocks of a block_diagonal posterior would be written out as {needed / 2**31:.1f} GiB, more than "
                'fits. Take structure="low_rank" or "diagonal".'
            )
        return jnp.concatenate(diagonals), jsl.block_diag(*rows)


class DiagonalPrecision(AbstractPrecision):
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
        return scaled_gram(jacobian, 1 / self.precision)

    def eigenpairs(self, prior_precision):
        yield Eigenpairs(0, prior_precision.size, np.asarray(self.precision) / prior_precision - 1, None)

    def split(self, base):
        return self.precision, jnp.zeros((0, self.precision.size))

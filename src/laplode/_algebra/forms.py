"""Forms of a symmetric matrix that is the curvature of a sum over data."""

import abc
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float


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

    def with_rows(self, rows: Float[Array, "R P"]) -> "FactoredCurvature":
        """Fᵀ W F + Xᵀ X of the rows X."""
        weights = jnp.concatenate([self.weights, jnp.ones(rows.shape[0])])
        return FactoredCurvature(jnp.concatenate([self.factor, rows]), weights)


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


def symmetrized(matrix: np.ndarray) -> DenseCurvature:
    """(H + Hᵀ) / 2, with the defect it had."""
    norm = np.linalg.norm(matrix)
    defect = float(np.linalg.norm(matrix - matrix.T) / norm) if norm > 0 else 0.0
    return DenseCurvature(jnp.asarray((matrix + matrix.T) / 2), defect)


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

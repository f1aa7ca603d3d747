"""Forms of a symmetric matrix that is the curvature of a sum over data."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Float, Int

from .._errors import LaplodeError
from .columns import gram
from .gram import GramForm
from .low_rank import ModesPrecision, low_rank
from .precision import AbstractPrecision, full_by_root, full_in_metric
from .regularization import AbstractRegularization

# The channel of a row that belongs to none, such as a row of the prior, which keeps its weight at all scales.
_NO_CHANNEL = -1


class Built(eqx.Module):
    """A precision, with the eigenvalues that the curvature had in the metric of the prior.

    `before` and `after` are those before and after regularization; both are empty where none can be negative.
    """

    precision: AbstractPrecision
    before: Float[Array, " R"] = eqx.field(default_factory=lambda: jnp.zeros(0))
    after: Float[Array, " R"] = eqx.field(default_factory=lambda: jnp.zeros(0))


class AbstractForm(eqx.Module):
    """∇²(−log p(Y | θ)), or an approximation of it, in some form."""

    @property
    def signed(self) -> bool:
        """Whether its eigenvalues may have either sign."""
        return True

    @property
    def symmetry_defect(self) -> Any:
        """‖H − Hᵀ‖ / ‖H‖ (Frobenius) from before it was symmetrized; 0 where it is symmetric by construction."""
        return 0.0

    @property
    def knows_channels(self) -> bool:
        """Whether it can be scaled by channel, or found for each channel alone."""
        return True

    @property
    def chosen_by_prior(self) -> bool:
        """Whether it is a part of the matrix, and under another prior another part would count."""
        return False

    @property
    @abc.abstractmethod
    def matrix(self) -> Float[Array, "P P"]:
        """The matrix, or as much as the form knows of it."""

    @abc.abstractmethod
    def scaled(self, by: Float[Array, "*K"]) -> "AbstractForm":
        """The form times `by`: one number, or one for each channel if the form knows its channels."""

    @abc.abstractmethod
    def plus_rows(self, rows: Float[Array, "R P"]) -> "AbstractForm":
        """The form with Xᵀ X of the rows X added."""

    @abc.abstractmethod
    def minus_diagonal(self, diagonal: Float[Array, " P"]) -> "AbstractForm":
        """The form less a diagonal matrix."""

    @abc.abstractmethod
    def spectrum(self, precision: Float[Array | np.ndarray, " P"]) -> Float[np.ndarray, " R"]:
        """The eigenvalues of Λ0^-½ H Λ0^-½ that the form knows of, for a prior precision Λ0 (P,)."""

    @abc.abstractmethod
    def influence(self) -> Float[Array, " P"]:
        """For each parameter the size of its largest entry: 0 where it has no influence."""

    def written_out(self) -> "AbstractForm":
        """The same matrix in a form that takes eigenvalues of either sign."""
        return self

    def by_roots(self) -> "AbstractForm":
        """The same matrix, of which a precision is made by its root where that is known."""
        return self

    def condensed(self) -> "AbstractForm":
        """The same matrix, by channel, without a row for each observation."""
        return self


def _parts_times(parts: Float[Array, "B *shape"], by: Float[Array, "*B"]) -> Float[Array, "B *shape"]:
    if by.size not in (1, len(parts)):
        raise LaplodeError(
            f"A curvature that is known for {len(parts)} channel{'s' * (len(parts) > 1)} can't be scaled by "
            f"{by.size} numbers."
        )
    return parts * by.reshape(-1, *(1,) * (parts.ndim - 1))


class DenseForm(AbstractForm):
    """A symmetric matrix (P, P), as the sum of its parts (B, P, P): one for each channel, or all in one."""

    parts: Float[Array, "B P P"]
    defect: Any
    semidefinite: bool = eqx.field(static=True, default=False)

    @property
    def signed(self):
        return not self.semidefinite

    @property
    def symmetry_defect(self):
        return self.defect

    @property
    def matrix(self):
        return jnp.sum(self.parts, axis=0) if len(self.parts) > 1 else self.parts[0]

    def scaled(self, by):
        return eqx.tree_at(lambda f: f.parts, self, _parts_times(self.parts, by))

    def plus_rows(self, rows):
        # In one part alone; a form is scaled before it gets rows.
        return eqx.tree_at(lambda f: f.parts, self, (self.matrix + gram(rows))[None])

    def minus_diagonal(self, diagonal):
        return eqx.tree_at(lambda f: f.parts, self, (self.matrix - jnp.diag(diagonal))[None])

    def spectrum(self, precision):
        return np.linalg.eigvalsh(np.asarray(_in_metric(self.matrix, precision)))

    def influence(self):
        return jnp.max(jnp.abs(self.matrix), axis=1)

    @eqx.filter_jit
    def full(self, precision: Float[Array, " P"], regularization: AbstractRegularization) -> Built:
        """Λ = H + diag(precision)."""
        inner = _in_metric(self.matrix, precision)
        if not self.signed:
            return Built(full_in_metric(inner, precision))
        before, vectors = jnp.linalg.eigh(inner)
        after = regularization(before)
        inner = jnp.where(jnp.any(after != before), (vectors * after) @ vectors.T, inner)
        log_det = jnp.sum(jnp.log(precision)) + jnp.sum(jnp.log1p(after))
        return Built(full_in_metric(inner, precision, log_det), before, after)

    def low_rank(
        self, precision: Float[Array, " P"], rank: int | None, regularization: AbstractRegularization
    ) -> Built:
        """Λ = H + diag(precision), which has all directions."""
        return self.full(precision, regularization)

    def leading(self, precision: Float[Array, " P"], rank: int | None) -> "DenseForm":
        """The form with the `rank` strongest modes in the metric of the prior alone, all by default."""
        if rank is None:
            return self
        values, vectors = jnp.linalg.eigh(_in_metric(self.matrix, precision))
        rows = jnp.sqrt(jnp.maximum(values, 0))[-rank:, None] * vectors.T[-rank:] * jnp.sqrt(precision)
        return DenseForm(gram(rows)[None], self.defect, self.semidefinite)


class BlockForm(AbstractForm):
    """The diagonal blocks of a symmetric matrix, in the order of θ, one for each leaf of the model."""

    blocks: tuple[Any, ...]

    @property
    def signed(self):
        return any(block.signed for block in self.blocks)

    @property
    def symmetry_defect(self):
        return max(block.symmetry_defect for block in self.blocks)

    @property
    def matrix(self):
        return jsl.block_diag(*(block.matrix for block in self.blocks))

    def cut(self, v: Any) -> list[Array]:
        """The part of `v` for each block, along the last axis."""
        return jnp.split(v, np.cumsum([block.influence().size for block in self.blocks])[:-1], axis=-1)

    def scaled(self, by):
        return BlockForm(tuple(block.scaled(by) for block in self.blocks))

    def plus_rows(self, rows):
        pairs = zip(self.blocks, self.cut(rows), strict=True)
        return BlockForm(tuple(block.plus_rows(part) for block, part in pairs))

    def minus_diagonal(self, diagonal):
        pairs = zip(self.blocks, self.cut(diagonal), strict=True)
        return BlockForm(tuple(block.minus_diagonal(part) for block, part in pairs))

    def spectrum(self, precision):
        pairs = zip(self.blocks, self.cut(precision), strict=True)
        return np.concatenate([block.spectrum(part) for block, part in pairs])

    def influence(self):
        return jnp.concatenate([block.influence() for block in self.blocks])

    def written_out(self):
        return BlockForm(tuple(block.written_out() for block in self.blocks))

    def by_roots(self):
        return BlockForm(tuple(block.by_roots() for block in self.blocks))

    def condensed(self):
        return BlockForm(tuple(block.condensed() for block in self.blocks))


class DiagonalForm(AbstractForm):
    """The diagonal of a symmetric matrix, as the sum of its parts (B, P): one for each channel, or all in one."""

    parts: Float[Array, "B P"]

    @property
    def diagonal(self) -> Float[Array, " P"]:
        """The diagonal."""
        return jnp.sum(self.parts, axis=0)

    @property
    def matrix(self):
        return jnp.diag(self.diagonal)

    def scaled(self, by):
        return DiagonalForm(_parts_times(self.parts, by))

    def plus_rows(self, rows):
        return DiagonalForm((self.diagonal + jnp.sum(rows**2, axis=0))[None])

    def minus_diagonal(self, diagonal):
        return DiagonalForm((self.diagonal - diagonal)[None])

    def spectrum(self, precision):
        return np.asarray(self.diagonal / precision)

    def influence(self):
        return jnp.abs(self.diagonal)


class EigenForm(AbstractForm):
    """The leading part Vᵀ diag(x) V of a symmetric matrix: vectors V (R, P) as rows, eigenvalues x (R,) of either sign.

    The vectors are orthonormal in some metric, such as that of a prior.
    """

    vectors: Float[Array, "R P"]
    eigenvalues: Float[Array, " R"]

    @property
    def knows_channels(self):
        return False

    @property
    def chosen_by_prior(self):
        return self.vectors.shape[0] < self.vectors.shape[1]

    @property
    def matrix(self):
        return (self.vectors.T * self.eigenvalues) @ self.vectors

    def scaled(self, by):
        if by.size > 1:
            raise LaplodeError("The leading eigenpairs of the exact Hessian are of all channels together.")
        return EigenForm(self.vectors, self.eigenvalues * by.reshape(()))

    def plus_rows(self, rows):
        basis, inside = jnp.linalg.qr(jnp.concatenate([self.vectors, rows]).T)
        values = jnp.concatenate([self.eigenvalues, jnp.ones(rows.shape[0])])
        eigenvalues, vectors = jnp.linalg.eigh((inside * values) @ inside.T)
        return EigenForm((basis @ vectors).T, eigenvalues)

    def minus_diagonal(self, diagonal):
        raise LaplodeError("Leading eigenpairs can't hold a diagonal matrix.")

    def spectrum(self, precision):
        return np.linalg.eigvalsh(np.asarray(self._inner(precision)[0]))

    def influence(self):
        return jnp.max(jnp.abs(self.vectors), axis=0)

    def _inner(self, precision):
        """A small matrix with the eigenvalues of Λ0^-½ H Λ0^-½, and the basis (R, P) that it is written in."""
        whitened = self.vectors / jnp.sqrt(precision)
        root = jnp.linalg.cholesky(whitened @ whitened.T)
        return (root.T * self.eigenvalues) @ root, jsl.solve_triangular(root, whitened, lower=True)

    @eqx.filter_jit
    def low_rank(
        self, precision: Float[Array, " P"], rank: int | None, regularization: AbstractRegularization
    ) -> Built:
        """Λ = H + diag(precision)."""
        inner, basis = self._inner(precision)
        before, vectors = jnp.linalg.eigh(inner)
        after = regularization(before)
        return Built(ModesPrecision(precision, vectors.T @ basis, after), before, after)

    def leading(self, precision: Float[Array, " P"], rank: int | None) -> "EigenForm":
        """Itself, which is a leading part already."""
        return self

    def gram(self, groups: Int[np.ndarray, " P"], rank: int | None) -> GramForm | None:
        """The form in data space, for a prior precision that is the same within each group of parameters."""
        return GramForm.of(self.vectors, self.eigenvalues, np.full(len(self.vectors), _NO_CHANNEL), groups, None, True)


class FactoredForm(AbstractForm):
    """Fᵀ W F, positive semidefinite, kept as the factor F (M, P), the weights W (M,) and the channel of each row (M,).

    F is the Jacobian of the predictions. With `by_root`, a precision is made of its root, of which its eigenvalues are
    the squares: where they lie too far apart for the matrix, they do not for its root.
    """

    factor: Float[Array, "M P"]
    weights: Float[Array, " M"]
    channel: Int[np.ndarray | Array, " M"]
    by_root: bool = eqx.field(static=True, default=False)

    @property
    def signed(self):
        return False

    @property
    def matrix(self):
        return gram(_weighted(self.factor, self.weights))

    @property
    @eqx.filter_jit
    def diagonal(self) -> Float[Array, " P"]:
        """The diagonal of the matrix."""
        return jnp.einsum("m,mp->p", self.weights, self.factor**2)

    def columns(self, start: int, stop: int) -> "FactoredForm":
        """The block of the parameters start … stop."""
        return FactoredForm(self.factor[:, start:stop], self.weights, self.channel, self.by_root)

    def by_channel(self) -> "list[FactoredForm]":
        """One form for each channel."""
        channel = np.asarray(self.channel)
        each = [np.flatnonzero(channel == k) for k in range(channel.max(initial=0) + 1)]
        if len(each) == 1:
            return [self]
        return [FactoredForm(self.factor[rows], self.weights[rows], channel[rows], self.by_root) for rows in each]

    def scaled(self, by):
        each = by.reshape(()) if by.size == 1 else by[self.channel]
        return eqx.tree_at(lambda f: f.weights, self, self.weights * jnp.where(self.channel == _NO_CHANNEL, 1, each))

    def plus_rows(self, rows):
        num = rows.shape[0]
        if not num:
            return self
        weights = jnp.concatenate([self.weights, jnp.ones(num)])
        channel = jnp.concatenate([self.channel, jnp.full(num, _NO_CHANNEL)])
        return FactoredForm(jnp.concatenate([self.factor, rows]), weights, channel, self.by_root)

    def minus_diagonal(self, diagonal):
        return self.written_out().minus_diagonal(diagonal)

    def spectrum(self, precision):
        half = np.asarray(_weighted(self.factor, self.weights)) / np.sqrt(np.asarray(precision))
        return np.linalg.eigvalsh(half @ half.T if half.shape[0] <= half.shape[1] else half.T @ half)

    @eqx.filter_jit
    def influence(self):
        # Row after row: a reduction over the first axis would copy the whole matrix.
        largest = lambda i, most: jnp.maximum(most, jnp.abs(self.factor[i]))
        return jax.lax.fori_loop(0, self.factor.shape[0], largest, jnp.zeros(self.factor.shape[1]))

    def written_out(self):
        return DenseForm(jnp.stack([each.matrix for each in self.by_channel()]), 0.0)

    def full(self, precision: Float[Array, " P"], regularization: AbstractRegularization) -> Built:
        """Λ = Fᵀ W F + diag(precision)."""
        if self.by_root:
            return Built(full_by_root(self.factor, self.weights, precision))
        return Built(full_in_metric(_in_metric(self.matrix, precision), precision))

    def low_rank(self, precision: Float[Array, " P"], rank: int | None, regularization: AbstractRegularization):
        """Λ = Fᵀ W F + diag(precision), with the `rank` strongest modes of Fᵀ W F in the metric of the prior."""
        return Built(low_rank(self.factor, self.weights, precision, rank))

    def leading(self, precision: Float[Array, " P"], rank: int | None) -> "FactoredForm":
        """The form with the `rank` strongest modes alone, all by default."""
        if rank is None:
            return self
        rows = low_rank(self.factor, self.weights, precision, rank).split(precision)[1]
        return FactoredForm(rows, jnp.ones(len(rows)), jnp.full(len(rows), _NO_CHANNEL))

    def gram(self, groups: Int[np.ndarray, " P"], rank: int | None) -> GramForm | None:
        """The form in data space, for a prior precision that is the same within each group of parameters.

        None where there is a row for each parameter, so that data space is the larger one, unless a `rank` asks for it.
        """
        if self.factor.shape[0] >= self.factor.shape[1] and rank is None:
            return None
        return GramForm.of(self.factor, self.weights, self.channel, groups, rank, False)

    def by_roots(self):
        return FactoredForm(self.factor, self.weights, self.channel, True)

    def condensed(self):
        if self.by_root:
            roots = [_root(each) for each in self.by_channel()]
            channel = np.repeat(np.arange(len(roots)), [len(root) for root in roots])
            return FactoredForm(jnp.concatenate(roots), jnp.ones(len(channel)), channel, True)
        if self.factor.shape[0] < self.factor.shape[1]:
            return self
        return DenseForm(self.written_out().parts, 0.0, semidefinite=True)


def _root(form: FactoredForm) -> Float[Array, "R P"]:
    """R with Rᵀ R the matrix."""
    return jnp.linalg.qr(_weighted(form.factor, form.weights), mode="r")


# ---- Matrices


@jax.jit
def _in_metric(matrix: Float[Array, "P P"], precision: Float[Array, " P"]) -> Float[Array, "P P"]:
    """Λ0^-½ H Λ0^-½."""
    root = jnp.sqrt(precision)
    return matrix / root / root[:, None]


@jax.jit
def _weighted(factor: Float[Array, "M P"], weights: Float[Array, " M"]) -> Float[Array, "M P"]:
    return jnp.sqrt(weights)[:, None] * factor


def symmetrized(matrix: np.ndarray) -> DenseForm:
    """(H + Hᵀ) / 2, with the defect it had."""
    norm = np.linalg.norm(matrix)
    defect = float(np.linalg.norm(matrix - matrix.T) / norm) if norm > 0 else 0.0
    return DenseForm(jnp.asarray((matrix + matrix.T) / 2)[None], defect)

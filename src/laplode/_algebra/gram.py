"""A curvature in data space, for the evidence at many prior precisions."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._devices import free_bytes
from .._errors import LaplodeError
from .columns import gram
from .regularization import AbstractRegularization


class GramForm(eqx.Module):
    """In data space: log det Λ = log det Λ0 + log det(I + W^½ F Λ0⁻¹ Fᵀ W^½), F (M, P), for many values of Λ0 and W.

    The prior's precision being the same within each group of parameters, F Λ0⁻¹ Fᵀ is a sum over the groups' Gram
    matrices; where every parameter is a group, the factor stands in their place. The `rank` leading modes count.
    """

    grams: Float[Array, "A M M"] | None
    factor: Float[Array, "M P"] | None
    first: Int[np.ndarray, " A"]  # a parameter of each group
    weights: Float[Array, " M"]
    channel: Int[np.ndarray | Array, " M"]
    rank: int | None = eqx.field(static=True)
    signed: bool = eqx.field(static=True)

    @classmethod
    def of(cls, factor, weights, channel, groups: Int[np.ndarray, " P"], rank: int | None, signed: bool) -> "GramForm":
        num, size = factor.shape
        found, first = np.unique(groups, return_index=True)
        if len(found) == size and size > 1:
            return cls(None, factor, first, weights, channel, rank, signed)
        needed = 8 * len(found) * num**2
        if needed > free_bytes() // 4:
            raise LaplodeError(
                f'`precision`="leaf" would keep {len(found)} matrices of {num} × {num}, {needed / 2**30:.1f} GiB, more '
                'than fits. Take "one".'
            )
        # Groups are runs of columns, or all of them.
        grams = [gram(factor[:, groups == g].T if len(found) > 1 else factor.T) for g in found]
        return cls(jnp.stack(grams), None, first, weights, channel, rank, signed)

    def scaled(self, by: Float[Array, "*K"]) -> "GramForm":
        """As `AbstractForm.scaled`."""
        each = by.reshape(()) if by.size == 1 else by[self.channel]
        return eqx.tree_at(lambda f: f.weights, self, self.weights * each)

    def log_det(self, precision: Float[Array, " P"], regularization: AbstractRegularization) -> Float[Array, ""]:
        """log det Λ."""
        if self.grams is None:
            assert self.factor is not None
            scaled = self.factor / jnp.sqrt(precision)
            inner = scaled @ scaled.T
        else:
            inner = jnp.tensordot(1 / precision[self.first], self.grams, 1)
        constant = jnp.sum(jnp.log(precision))
        if self.signed:
            root = jnp.linalg.cholesky(inner)
            strengths = regularization(jnp.linalg.eigvalsh((root.T * self.weights) @ root))
            return constant + jnp.sum(jnp.log1p(strengths))
        root = jnp.sqrt(self.weights)
        inner = root[:, None] * inner * root
        if self.rank is not None and self.rank < len(root):
            strengths = jnp.linalg.eigvalsh(inner)[-self.rank :]
            return constant + jnp.sum(jnp.log1p(jnp.maximum(strengths, 0)))
        cholesky = jnp.linalg.cholesky(jnp.eye(len(root)) + inner)
        return constant + 2 * jnp.sum(jnp.log(jnp.diagonal(cholesky)))

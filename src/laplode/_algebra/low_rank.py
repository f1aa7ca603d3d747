"""Precisions that are a prior's, and more in some directions."""

from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._errors import LaplodeError
from .columns import cross_gram, gram, minus_product, scaled_gram
from .precision import AbstractPrecision, Eigenpairs


def low_rank(
    factor: Float[Array, "M P"],
    weights: Float[Array, " M"],
    prior_precision: Float[Array, " P"],
    rank: int | None = None,
) -> "LowRankPrecision | ModesPrecision":
    """Λ = Λ0 + Fᵀ W F with a factor F (M, P), of which the `rank` strongest modes count, all by default."""
    if factor.shape[0] < factor.shape[1]:
        return LowRankPrecision(factor, weights, prior_precision, rank)
    return _of_gram(gram(_half(factor, weights, prior_precision)), prior_precision, rank)


_Modes = TypeVar("_Modes", bound="AbstractModesPrecision")


class AbstractModesPrecision(AbstractPrecision):
    """A precision whose eigenvalues in the metric of the prior are 1 + x, x the strengths of modes, and elsewhere 1."""

    prior_precision: eqx.AbstractVar[Float[Array, " P"]]
    strengths: eqx.AbstractVar[Float[Array, " R"]]

    @property
    def _complete(self) -> bool:
        return self.strengths.shape[-1] == self.prior_precision.shape[-1]

    @property
    def rounding(self):
        # Without a mode in every direction, variances are the prior's less what the modes explain.
        if self._complete:
            return jnp.zeros(())
        return self.strengths.size * np.finfo(float).eps * (1 + jnp.max(self.strengths, initial=0))

    def effective_dof(self, prior_precision):
        return jnp.sum(self.strengths / (1 + self.strengths))

    def damped(self: _Modes, damping: Float[Array, ""]) -> _Modes:
        """Λ + damping · Λ0: the same modes, weaker beside a stronger prior. Its `log_det` is not renewed."""
        more = 1 + damping
        where = lambda p: (p.strengths, p.prior_precision)
        return eqx.tree_at(where, self, (self.strengths / more, self.prior_precision * more))

    def extremes(self, prior_precision):
        # In the metric of the precision's own prior, which is that of `prior_precision`.
        both = 1 + np.append(np.asarray(self.strengths), [] if self._complete else 0.0)
        return float(both.min()), float(both.max())


class LowRankPrecision(AbstractModesPrecision):
    """Λ = Λ0 + Fᵀ W F with a factor F (M, P), M < P, in data space: nothing P×P.

    With A = W^½ F Λ0^-½ and A Aᵀ = U diag(x) Uᵀ the right singular vectors of A are V = Aᵀ U x^-½, and every function
    of Λ0^-½ Λ Λ0^-½ = I + V diag(x) Vᵀ acts through F and U alone. Exact when U holds all M modes.
    """

    factor: Float[Array, "M P"]
    scale: Float[Array, " M"]
    prior_precision: Float[Array, " P"]
    modes: Float[Array, "M R"]
    strengths: Float[Array, " R"]
    log_det: Float[Array, ""]

    def __init__(self, factor, weights, prior_precision, rank: int | None = None):
        self.factor = factor
        self.prior_precision = prior_precision
        self.scale, self.modes, self.strengths, self.log_det = _modes(factor, weights, prior_precision, rank)

    def _project(self, v: Array) -> Array:
        """Uᵀ A v."""
        seen = jnp.einsum("...p,mp->...m", v / jnp.sqrt(self.prior_precision), self.factor)
        return (seen * self.scale) @ self.modes

    def _lift(self, c: Array) -> Array:
        """Aᵀ U c."""
        return ((c @ self.modes.T) * self.scale) @ self.factor / jnp.sqrt(self.prior_precision)

    def eigenpairs(self, prior_precision):
        strengths = np.asarray(self.strengths)
        # The right singular vector of a mode without strength can't be had from the left one.
        kept = np.flatnonzero(strengths > 10 * strengths.size * np.finfo(float).eps * np.max(strengths, initial=1.0))
        chosen = jnp.eye(strengths.size)[kept]
        vectors = self._lift(chosen / jnp.sqrt(self.strengths[kept])[:, None])
        yield Eigenpairs(0, prior_precision.size, strengths[kept], np.asarray(vectors))

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
        seen = ((cross_gram(rows, self.factor, inverse) * self.scale) @ self.modes) * self._shrinkage()
        return minus_product(rows, (seen @ self.modes.T) * self.scale, self.factor, inverse).reshape(z.shape)

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
        half = (cross_gram(jacobian, self.factor, inverse) * self.scale) @ (self.modes * self._shrinkage())
        rows = (half @ self.modes.T) * self.scale
        return scaled_gram(jacobian, inverse, minus=(rows, self.factor))

    @eqx.filter_jit
    def split(self, base):
        return self.prior_precision, (self.modes.T * self.scale) @ self.factor


class ModesPrecision(AbstractModesPrecision):
    """Λ = Λ0^½ (I + Vᵀ diag(x) V) Λ0^½ with orthonormal rows V (R, P) and strengths x (R,) above −1.

    Where all P modes are at hand, nothing is the difference of two numbers: variances keep their digits however strong
    the data are.
    """

    prior_precision: Float[Array, " P"]
    vectors: Float[Array, "R P"]
    strengths: Float[Array, " R"]
    log_det: Float[Array, ""]

    def __init__(self, prior_precision, vectors, strengths):
        self.prior_precision, self.vectors, self.strengths = prior_precision, vectors, strengths
        self.log_det = jnp.sum(jnp.log(prior_precision)) + jnp.sum(jnp.log1p(strengths))

    def _function(self, along: Array, v: Array) -> Array:
        """The function of I + Vᵀ diag(x) V that is `along` in its modes and 1 elsewhere, times `v`."""
        seen = v @ self.vectors.T
        return (along * seen) @ self.vectors if self._complete else v + ((along - 1) * seen) @ self.vectors

    @eqx.filter_jit
    def precision_product(self, v):
        root = jnp.sqrt(self.prior_precision)
        return root * self._function(1 + self.strengths, root * v)

    @eqx.filter_jit
    def covariance_product(self, v):
        root = jnp.sqrt(self.prior_precision)
        return self._function(1 / (1 + self.strengths), v / root) / root

    @eqx.filter_jit
    def root_product(self, z):
        return self._function(1 / jnp.sqrt(1 + self.strengths), z) / jnp.sqrt(self.prior_precision)

    @eqx.filter_jit
    def variance(self):
        inside = jnp.einsum("r,rp->p", 1 / (1 + self.strengths), self.vectors**2)
        outside = 0 if self._complete else 1 - jnp.sum(self.vectors**2, axis=0)
        return (inside + outside) / self.prior_precision

    @eqx.filter_jit
    def predictive_covariance(self, jacobian):
        half = self._function(1 / jnp.sqrt(1 + self.strengths), jacobian / jnp.sqrt(self.prior_precision))
        return half @ half.T

    def eigenpairs(self, prior_precision):
        yield Eigenpairs(0, prior_precision.size, np.asarray(self.strengths), np.asarray(self.vectors))

    def split(self, base):
        least = float(jnp.min(self.strengths, initial=0))
        if least < 0 and not self._complete:
            raise LaplodeError(
                "This posterior is wider than its prior in some directions, and holds only a part of its spectrum: as "
                'a prior of other data, take one with structure="full".'
            )
        part = 1.0 if least >= 0 else 0.5 * (1 + least)
        rows = jnp.sqrt(jnp.maximum(1 + self.strengths - part, 0))[:, None] * self.vectors
        return part * self.prior_precision, rows * jnp.sqrt(self.prior_precision)


@jax.jit
def _half(factor: Float[Array, "M P"], weights: Float[Array, " M"], prior_precision: Array) -> Float[Array, "M P"]:
    return jnp.sqrt(weights)[:, None] * factor / jnp.sqrt(prior_precision)


@eqx.filter_jit
def _of_gram(matrix: Float[Array, "P P"], prior_precision: Float[Array, " P"], rank: int | None) -> ModesPrecision:
    strengths, vectors = jnp.linalg.eigh(matrix)
    kept = slice(0 if rank is None else max(len(strengths) - rank, 0), None)
    return ModesPrecision(prior_precision, vectors.T[kept], jnp.maximum(strengths[kept], 0))


@eqx.filter_jit
def _modes(factor: Float[Array, "M P"], weights: Float[Array, " M"], prior_precision: Array, rank: int | None):
    """√w, the strongest modes and their strengths, and log |Λ|."""
    scale = jnp.sqrt(weights)
    strengths, modes = jnp.linalg.eigh(scale[:, None] * scaled_gram(factor, 1 / prior_precision) * scale)
    num = len(weights)
    kept = slice(num - min(num if rank is None else rank, num), num)
    strengths = jnp.maximum(strengths[kept], 0)
    return scale, modes[:, kept], strengths, jnp.sum(jnp.log(prior_precision)) + jnp.sum(jnp.log1p(strengths))

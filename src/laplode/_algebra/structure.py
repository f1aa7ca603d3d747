"""What a precision is made of: all of a curvature, its strongest directions, or its parts on the diagonal."""

import abc
import dataclasses
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from .._checks import check_count
from .._errors import LaplodeError
from .forms import AbstractForm, BlockForm, Built, DiagonalForm, GramForm
from .precision import BlockDiagonalPrecision, DiagonalPrecision
from .regularization import AbstractRegularization


@dataclasses.dataclass(frozen=True)
class Sizes:
    """P, M with the rows of the prior, these alone, and the sizes of the model's leaves in the order of θ."""

    parameters: int
    rows: int
    prior_rows: int
    leaves: tuple[int, ...]


class AbstractCurvature(eqx.Module):
    """A way to find the curvature of −log p(Y | θ), in the form that a structure asks for.

    `at` is where: model, data, and how the work is done. `signed` says whether eigenvalues may have either sign; if
    not, the curvature is found as a factor with a row for each observation.
    """

    name: eqx.AbstractClassVar[str]
    signed: eqx.AbstractClassVar[bool]

    def falls_with_scale(self, quadratic: bool) -> bool:
        """Whether it falls with the square of the noise scale, for a likelihood that is `quadratic` or not."""
        return False

    @abc.abstractmethod
    def dense(self, at: Any) -> AbstractForm:
        """All of it."""

    @abc.abstractmethod
    def blocks(self, at: Any) -> BlockForm:
        """A block for each leaf of the model."""

    @abc.abstractmethod
    def diagonal(self, at: Any) -> DiagonalForm:
        """Its diagonal."""

    @abc.abstractmethod
    def leading(self, at: Any, rank: int) -> AbstractForm:
        """Its `rank` leading eigenpairs in the metric of the prior, or more of it where that is no more work."""


class AbstractStructure(eqx.Module):
    """A structure of the precision Λ: how it is made of a curvature and a prior, and what that takes.

    A local prior has `precision` (P,), `deficit` (P,) and `rows` (R, P): its negative log-density has the second
    derivative diag(precision − deficit) + rowsᵀ rows.
    """

    name: eqx.AbstractClassVar[str]
    whole: ClassVar[bool] = False
    holds_rows: ClassVar[bool] = True  # all that a prior says of several parameters together

    @abc.abstractmethod
    def form(self, curvature: AbstractCurvature, at: Any) -> AbstractForm:
        """The curvature in the form that `build` takes."""

    @abc.abstractmethod
    def num_bytes(self, sizes: Sizes, signed: bool) -> int:
        """What the curvature and the work on it take."""

    @abc.abstractmethod
    def build(self, form: Any, local: Any, regularization: AbstractRegularization) -> Built:
        """Λ for a local prior, in any transformation; not finite where it can't be made."""

    def check(self, curvature: AbstractCurvature, regularization: AbstractRegularization) -> None:
        """Raise `LaplodeError` where these do not go with this structure."""

    def check_prior(self, local: Any, names: Any) -> None:
        """Raise `LaplodeError` where the structure can't hold what a prior adds. `names(index)` names parameters."""

    def gram(self, form: Any, groups: Int[np.ndarray, " P"]) -> GramForm | None:
        """The form in data space, if that is smaller, for prior precisions that are the same within each group."""
        return None


def _beside(form: AbstractForm, local: Any) -> Any:
    """The form with all of the prior but its precision."""
    if form.signed:
        form = form.minus_diagonal(local.deficit)
    return form.plus_rows(local.rows) if local.rows.shape[0] else form


class Full(AbstractStructure):
    """All of Λ, P × P."""

    name: ClassVar[str] = "full"
    whole: ClassVar[bool] = True

    def form(self, curvature, at):
        return curvature.dense(at)

    def num_bytes(self, sizes, signed):
        # The curvature, its eigenvectors, the precision and its factor.
        return _factor_bytes(sizes, signed) + 4 * 8 * sizes.parameters**2

    def build(self, form, local, regularization):
        return _beside(form, local).full(local.precision, regularization)

    def gram(self, form, groups):
        return None if form.signed else form.gram(groups, None)


class LowRank(AbstractStructure):
    """The prior's precision and the strongest directions of the curvature in its metric; nothing is P × P.

    **Arguments:**

    - `rank`: how many directions. By default all min(M, P) for a factored curvature, of which the result is then exact,
        and min(100, P) for the exact Hessian.

    **Raises:** `LaplodeError` when the rank is no positive integer.
    """

    rank: int | None = eqx.field(static=True, default=None)
    name: ClassVar[str] = "low_rank"

    def __check_init__(self):
        if self.rank is not None:
            check_count("rank", self.rank)

    def form(self, curvature, at):
        return curvature.leading(at, self._rank)

    @property
    def _rank(self) -> int:
        return self.rank or _DEFAULT_RANK

    def num_bytes(self, sizes, signed):
        size = sizes.parameters
        if signed:
            return 3 * 8 * size * min(size, 2 * self._rank + 10 + sizes.prior_rows)
        if sizes.rows < size:
            return _factor_bytes(sizes, signed) + 4 * 8 * sizes.rows**2
        return 2 * _factor_bytes(sizes, signed) + 4 * 8 * size**2

    def build(self, form, local, regularization):
        if not local.rows.shape[0]:
            return form.low_rank(local.precision, self.rank, regularization)
        # The rank is that of these data alone: none of the rows of the prior is left out.
        leading = form.leading(local.precision, self.rank).plus_rows(local.rows)
        return leading.low_rank(local.precision, None, regularization)

    def check(self, curvature, regularization):
        if curvature.signed:
            regularization.check_partial()

    def check_prior(self, local, names):
        deficit = np.flatnonzero(local.deficit)
        if deficit.size:
            raise LaplodeError(
                f'`structure`="low_rank" builds on a prior that is log-concave, and that of {names(deficit[:1])[0]} '
                'bends upward at the fitted value, in its unconstrained coordinate. Take structure="full".'
            )

    def gram(self, form, groups):
        return form.gram(groups, self.rank)


# Leading eigenpairs of the exact Hessian that are kept by default.
_DEFAULT_RANK = 100


class BlockDiagonal(AbstractStructure):
    """A block of Λ for each leaf of the model."""

    name: ClassVar[str] = "block_diagonal"
    holds_rows: ClassVar[bool] = False

    def form(self, curvature, at):
        return curvature.blocks(at)

    def num_bytes(self, sizes, signed):
        return _factor_bytes(sizes, signed) + 4 * 8 * sum(size**2 for size in sizes.leaves)

    def build(self, form, local, regularization):
        form = _beside(form, local)
        pairs = zip(form.blocks, form.cut(local.precision), strict=True)
        each = [block.full(part, regularization) for block, part in pairs]
        precision = BlockDiagonalPrecision(tuple(one.precision for one in each))
        join = lambda name: jnp.concatenate([getattr(one, name) for one in each])
        return Built(precision, join("before"), join("after"))


class Diagonal(AbstractStructure):
    """The diagonal of Λ."""

    name: ClassVar[str] = "diagonal"
    holds_rows: ClassVar[bool] = False

    def form(self, curvature, at):
        return curvature.diagonal(at)

    def num_bytes(self, sizes, signed):
        return _factor_bytes(sizes, signed) + 8 * 8 * sizes.parameters

    def build(self, form, local, regularization):
        before = _beside(form, local).diagonal / local.precision
        after = regularization(before)
        return Built(DiagonalPrecision((1 + after) * local.precision), before, after)


def _factor_bytes(sizes: Sizes, signed: bool) -> int:
    return 0 if signed else 8 * sizes.parameters * sizes.rows


STRUCTURES = {each.name: each for each in (Full, LowRank, BlockDiagonal, Diagonal)}

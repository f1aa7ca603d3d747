"""What becomes of a precision that is not positive definite."""

import abc
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._checks import check_flag
from .._errors import LaplodeError


class AbstractRegularization(eqx.Module):
    """A change of the eigenvalues of the likelihood's curvature, in the metric of the prior.

    There the precision Λ has the eigenvalues 1 + x, for eigenvalues x of the likelihood's curvature. While all of
    these are positive, nothing is changed: the point may be a minimum, of which Λ is the exact curvature. With
    `always`, every negative x is changed.

    The metric makes the result independent of the units of the parameters.
    """

    kind: eqx.AbstractClassVar[str]
    always: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_flag("always", self.always)

    @abc.abstractmethod
    def changed(self, eigenvalues: Float[Array, " R"]) -> Float[Array, " R"]:
        """The eigenvalues where some are too negative."""

    def __call__(self, eigenvalues: Float[Array, " R"]) -> Float[Array, " R"]:
        """The eigenvalues to take in place of these."""
        return jnp.where(self._wanting(eigenvalues), self.changed(eigenvalues), eigenvalues)

    def _wanting(self, eigenvalues: Float[Array, " R"]) -> Array:
        if self.always:
            return jnp.min(eigenvalues, initial=0) < -_rounding(eigenvalues)
        return self.is_indefinite(eigenvalues)

    @staticmethod
    def is_indefinite(eigenvalues: Float[Array | np.ndarray, " R"]) -> Array:
        """Whether a precision with the eigenvalues 1 + x is not positive definite."""
        return 1 + jnp.min(eigenvalues, initial=0) <= 0

    def check_partial(self) -> None:
        """Raise `LaplodeError` where a part of the spectrum is not enough."""

    def examined(
        self, before: Float[np.ndarray, " R"], after: Float[np.ndarray, " R"]
    ) -> "tuple[int, Regularized | None]":
        """How many eigenvalues were negative beyond rounding, and what was changed."""
        rounding = _rounding(before)
        change = np.abs(after - before)
        regularized = None
        count = int(np.sum(change > rounding))
        if count:
            regularized = Regularized(self.kind, count, float(change.max()), float(change.sum()))
        return int(np.sum(before < -rounding)), regularized


def _rounding(eigenvalues: Array | np.ndarray) -> Array:
    return eigenvalues.size * np.finfo(float).eps * jnp.max(jnp.abs(eigenvalues), initial=0)


class Regularized(eqx.Module):
    """What regularization did to the curvature: `count` eigenvalues changed, the largest change, and their sum.

    Eigenvalues are in units of the prior's precision.
    """

    kind: str = eqx.field(static=True)
    count: int
    largest: float
    total: float

    def __str__(self) -> str:
        return (
            f"{self.kind}: {self.count} eigenvalues, by at most {self.largest:.3g} of the prior's precision, "
            f"{self.total:.3g} in all"
        )


class Clip(AbstractRegularization):
    """Negative eigenvalues of the likelihood's curvature become 0, which leaves the prior in charge.

    By default only where the precision Λ itself, the prior's part included, is not positive definite. Elsewhere the
    prior outweighs them, and a change would spoil the exact curvature of a minimum.

    **Arguments:**

    - `always`: whether to clip negative eigenvalues that the prior outweighs too, so that no direction is wider than
        under the prior.
    """

    kind: ClassVar[str] = "clip"

    def changed(self, eigenvalues):
        return jnp.maximum(eigenvalues, 0)


class Abs(AbstractRegularization):
    """Eigenvalues of the likelihood's curvature become their absolute values.

    **Arguments:**

    - `always`: whether to do so where the prior outweighs the negative ones too.
    """

    kind: ClassVar[str] = "abs"

    def changed(self, eigenvalues):
        return jnp.abs(eigenvalues)


class Jitter(AbstractRegularization):
    """The whole spectrum of the likelihood's curvature is raised, by a multiple of the prior's precision, until its
    smallest eigenvalue is 0.

    **Arguments:**

    - `always`: whether to do so where the prior outweighs the negative ones too.
    """

    kind: ClassVar[str] = "jitter"

    def changed(self, eigenvalues):
        return eigenvalues - jnp.min(eigenvalues)

    def check_partial(self):
        raise LaplodeError(
            '`regularization`="jitter" raises the whole spectrum, and structure="low_rank" has a part of it: take '
            '"clip".'
        )


class Refuse(AbstractRegularization):
    """Nothing is changed: a precision that is not positive definite is an error.

    **Arguments:**

    - `always`: of no effect here.
    """

    kind: ClassVar[str] = "none"

    def changed(self, eigenvalues):
        return eigenvalues


REGULARIZATIONS = {each.kind: each for each in (Clip, Abs, Jitter, Refuse)}

"""Ways to find the curvature of −log p(Y | θ), as objects that own their options."""

import abc
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._algebra.forms import BlockForm, DiagonalForm, FactoredForm
from .._algebra.structure import AbstractCurvature
from .._checks import check_count, check_key
from .._errors import LaplodeError
from .._problem.problem import Problem
from .._solve.finite import check_finite
from .._solve.flows import AbstractFlow
from .._solve.maps import linearize
from .hessian import (
    Work,
    hessian,
    hessian_blocks,
    hessian_diagonal,
    hessian_diagonal_stochastic,
    hessian_leading,
)

_BY_ROWS = 'curvature="hessian" and structure="full", "block_diagonal" or "diagonal", whose rows come one by one'


class At(NamedTuple):
    """Where a curvature is taken, and how the work is done; with predictions and their Jacobian, if they are known."""

    flow: AbstractFlow
    problem: Problem
    work: Work = Work(progress=False)
    known: tuple[Array, Array] | None = None

    def linear(self) -> tuple[Array, Array]:
        """Predictions (N, T, F) and their Jacobian (N·T·F, P)."""
        return self.known or linearize(self.flow, mesh=self.work.mesh)


def _refuse_checkpoint(at: At) -> None:
    if at.work.checkpoint is not None:
        raise LaplodeError(f"`checkpoint` goes with {_BY_ROWS}; what you ask for is done in one go.")


class Hessian(AbstractCurvature):
    """The exact Hessian of −log p(Y | θ), by forward-over-reverse differentiation.

    **Arguments:**

    - `batch_size`: tangents under way at once; chosen from the free memory by default.
    - `num_probes`, `key`: for structure="diagonal", estimate the diagonal from this many random probes, instead of
        taking it exactly at the cost of P Hessian-vector products.

    **Raises:** `LaplodeError` when a number is no positive integer, or probes have no random key.
    """

    batch_size: int | None = eqx.field(static=True, default=None)
    num_probes: int | None = eqx.field(static=True, default=None)
    key: PRNGKeyArray | None = None
    name: ClassVar[str] = "hessian"
    signed: ClassVar[bool] = True

    def __check_init__(self):
        for name in ("batch_size", "num_probes"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.num_probes is not None and self.key is None:
            raise LaplodeError("`key` is needed for random probes: key=jax.random.key(0).")
        if self.key is not None:
            check_key("key", self.key)

    def falls_with_scale(self, quadratic):
        return quadratic

    def _refuse_probes(self) -> None:
        if self.num_probes is not None:
            raise LaplodeError('`num_probes` goes with structure="diagonal".')

    @staticmethod
    def _refuse_rows(at: At) -> None:
        _refuse_checkpoint(at)
        if at.work.mesh is not None:
            raise LaplodeError(
                f'`mesh` goes with {_BY_ROWS}, and with "ggn" and "fisher"; of this Hessian each product waits for the '
                "one before."
            )

    def dense(self, at: At):
        self._refuse_probes()
        return hessian(at.flow, at.problem, batch_size=self.batch_size, work=at.work)

    def blocks(self, at: At):
        self._refuse_probes()
        return hessian_blocks(at.flow, at.problem, batch_size=self.batch_size, work=at.work)

    def diagonal(self, at: At):
        if self.num_probes is None:
            return hessian_diagonal(at.flow, at.problem, batch_size=self.batch_size, work=at.work)
        self._refuse_rows(at)
        assert self.key is not None
        return hessian_diagonal_stochastic(at.flow, at.problem, num_probes=self.num_probes, key=self.key)

    def leading(self, at: At, rank: int):
        self._refuse_probes()
        self._refuse_rows(at)
        return hessian_leading(at.flow, at.problem, rank=min(rank, at.flow.parameters.size))


class _Factored(AbstractCurvature):
    """A curvature that is found as a factor, with a row for each observation."""

    signed: ClassVar[bool] = False

    @abc.abstractmethod
    def weights(self, problem: Problem, predictions: Float[Array, "N T F"]) -> Float[Array, "N T F"]:
        """The weight of the square of each prediction's derivative."""

    def dense(self, at: At) -> FactoredForm:
        _refuse_checkpoint(at)
        predictions, jacobian = at.linear()
        weights = self.weights(at.problem, predictions)
        check_finite(jnp.sqrt(weights), at.flow, at.problem)
        informed = at.problem.informed
        channel = at.problem.channel[np.nonzero(informed)[2]]
        if np.all(informed):  # a matrix this large is not copied for nothing
            return FactoredForm(jacobian, weights.ravel(), channel)
        factor, kept = _rows(jacobian, weights.ravel(), jnp.asarray(np.flatnonzero(informed)))
        return FactoredForm(factor, kept, channel)

    def blocks(self, at: At):
        factor = self.dense(at)
        return BlockForm(tuple(factor.columns(*leaf[2:]) for leaf in at.flow.parameters.leaves))

    def diagonal(self, at: At):
        return DiagonalForm(jnp.stack([each.diagonal for each in self.dense(at).by_channel()]))

    def leading(self, at: At, rank: int):
        return self.dense(at)


@jax.jit
def _rows(jacobian: Float[Array, "NTF P"], weights: Float[Array, " NTF"], chosen: Int[Array, " M"]):
    return jacobian[chosen], weights[chosen]


class GaussNewton(_Factored):
    """The generalized Gauss-Newton matrix Jᵀ R J, R the Fisher information of each observation: never indefinite."""

    name: ClassVar[str] = "ggn"

    def falls_with_scale(self, quadratic):
        return True

    def weights(self, problem, predictions):
        return problem.information(predictions)


class EmpiricalFisher(_Factored):
    """The empirical Fisher matrix Σ s sᵀ, s the gradient of the log-likelihood of an observation."""

    name: ClassVar[str] = "fisher"

    def weights(self, problem, predictions):
        return problem.likelihood.score(predictions, problem.ys) ** 2


CURVATURES = {each.name: each for each in (Hessian, GaussNewton, EmpiricalFisher)}

"""The evidence as a function of hyperparameters, without a solve for each of their values."""

import abc
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float, Int

from .._algebra.forms import (
    AbstractCurvature,
    BlockCurvature,
    DenseCurvature,
    DiagonalCurvature,
    EigenCurvature,
    FactoredCurvature,
    gram,
)
from .._algebra.regularization import _with_eigenvalues
from .._algebra.structure import BlockDiagonalPrecision, DiagonalPrecision, FullPrecision, LowRankPrecision
from .._devices import free_bytes
from .._errors import LaplodeError, choose
from .._model.parameters import Parameters
from .._problem.prior import GROUPINGS, Grouping
from .._problem.problem import Problem
from .._problem.scale import AbstractScaleLikelihood
from .._solve.maps import evaluate
from .laplace import curvature_again
from .posterior import Posterior


class Hyperparameters(eqx.Module):
    """What the evidence is a function of; None for what is held fixed.

    - `log_precision`: log precisions of the Gaussian prior, one for each group of parameters that it is of, (A,).
    - `log_scale`: log noise scales as multiples of the present ones, one for each channel (K,) or one for all (1,).
    """

    log_precision: Float[Array, " A"] | None
    log_scale: Float[Array, " B"] | None


# ---- log det Λ as a function of precisions and scales


class _LogDet(eqx.Module):
    """log det of Λ0 + Σ_k shrink_k H_k, in the form that is cheapest for a structure."""

    @abc.abstractmethod
    def __call__(self, precision: Float[Array, " P"], shrink: Float[Array, " B"]) -> Float[Array, ""]:
        """For prior precisions (P,), the information of each part k shrunk to shrink_k of what it is."""


class _ByBlocks(_LogDet):
    """Blocks on the diagonal, each the sum of its parts (B, n, n); `regularize` changes the eigenvalues of the sum."""

    blocks: tuple[Float[Array, "B n n"], ...]
    regularize: Callable[[Array], Array] | None = eqx.field(static=True)

    def __call__(self, precision, shrink):
        total, start = jnp.zeros(()), 0
        for parts in self.blocks:
            stop = start + parts.shape[-1]
            matrix: Any = jnp.tensordot(shrink, parts, 1)
            if self.regularize is not None:
                matrix = _with_eigenvalues(self.regularize, matrix)
            total += _log_det_dense(matrix + jnp.diag(precision[start:stop]))
            start = stop
        return total


def _log_det_dense(matrix: Float[Array, "n n"]) -> Float[Array, ""]:
    return 2 * jnp.sum(jnp.log(jnp.diagonal(jnp.linalg.cholesky(matrix))))


class _ByDiagonal(_LogDet):
    """The sum of diagonal parts (B, P)."""

    diagonals: Float[Array, "B P"]
    regularize: Callable[[Array], Array] | None = eqx.field(static=True)

    def __call__(self, precision, shrink):
        diagonal = shrink @ self.diagonals
        return jnp.sum(jnp.log((diagonal if self.regularize is None else self.regularize(diagonal)) + precision))


class _ByRoot(_LogDet):
    """log det of Σ_b shrink_b R_bᵀ R_b + diag(precision), from the R_b: where eigenvalues are so far apart that the sum
    written out has lost the smallest."""

    roots: Float[Array, "B P P"]

    def __call__(self, precision, shrink):
        rows = [*(jnp.sqrt(shrink)[:, None, None] * self.roots), jnp.diag(jnp.sqrt(precision))]
        root = jnp.linalg.qr(jnp.concatenate(rows))[1]
        return 2 * jnp.sum(jnp.log(jnp.abs(jnp.diagonal(root))))


class _ByGram(_LogDet):
    """In data space: log det Λ0 + log det(I + W^½ F Λ0⁻¹ Fᵀ W^½), F (M, P), of which the `rank` leading modes count.

    The precision being the same within each group of parameters, F Λ0⁻¹ Fᵀ is a sum over the groups' Gram matrices.
    """

    grams: Float[Array, "A M M"] | None
    first: Int[np.ndarray, " A"]  # a parameter of each group
    factor: Float[Array, "M P"] | None  # in place of the Gram matrices, where every parameter is a group
    weights: Float[Array, " M"]
    part: Int[np.ndarray, " M"]  # to which an observation belongs
    rank: int | None = eqx.field(static=True)

    def __call__(self, precision, shrink):
        root = jnp.sqrt(self.weights) * jnp.sqrt(shrink[self.part])  # weights may be 0, where a root has no derivative
        if self.grams is None:
            assert self.factor is not None
            scaled = self.factor / jnp.sqrt(precision)
            inner = scaled @ scaled.T
        else:
            inner = jnp.tensordot(1 / precision[self.first], self.grams, 1)
        inner = root[:, None] * inner * root
        if self.rank is not None:
            strengths = jnp.linalg.eigvalsh(inner)[-self.rank :]
            data_part = jnp.sum(jnp.log1p(jnp.maximum(strengths, 0)))
        else:
            data_part = _log_det_dense(jnp.eye(len(root)) + inner)
        return jnp.sum(jnp.log(precision)) + data_part


def _log_det(posterior: Posterior, groups: Int[np.ndarray, " P"], by_channel: bool) -> _LogDet:
    """The log-determinant of a posterior's structure, in parts: one for each channel, or all in one."""
    found, structure = posterior.curvature, posterior.structure
    concave = not np.any(posterior.problem.prior.local(posterior.parameters).deficit)
    num_parts = posterior.problem.data.ys.shape[2] if by_channel else 1
    if isinstance(found, FactoredCurvature):
        channel = np.nonzero(posterior.problem.informed)[2]
        part = channel if by_channel else np.zeros_like(channel)
        rank = posterior.method.rank
        few = found.factor.shape[0] < posterior.size
        if (isinstance(structure, LowRankPrecision) and (few or rank is not None)) or (
            isinstance(structure, FullPrecision) and few and concave
        ):
            return _gram_parts(found.factor, found.weights, part, groups, rank)
        rows = [np.flatnonzero(part == k) for k in range(num_parts)]
        each = [FactoredCurvature(found.factor[r], found.weights[r]) for r in rows]
        if isinstance(structure, DiagonalPrecision):
            return _ByDiagonal(jnp.stack([e.diagonal() for e in each]), None)
        if isinstance(structure, BlockDiagonalPrecision):
            leaves = [(start, stop) for _, _, start, stop in posterior.parameters.leaves]
            return _ByBlocks(tuple(jnp.stack([e.block(*leaf) for e in each]) for leaf in leaves), None)
        if concave and posterior.diagnostics.condition_number > _FAR_APART:
            return _ByRoot(jnp.stack([_root(e) for e in each]))
        return _ByBlocks((jnp.stack([e.matrix() for e in each]),), None)
    if isinstance(found, EigenCurvature):
        assert isinstance(structure, LowRankPrecision)
        part = np.zeros(found.eigenvalues.size, int)
        # As regularized, which a structure built of it has kept.
        return _gram_parts(structure.factor, structure.scale**2, part, groups, None)
    if by_channel and num_parts > 1:
        again = [curvature_again(posterior, _channel(posterior.problem, k)) for k in range(num_parts)]
        parts = [_matrices(found) for found in again]
        changed = posterior.diagnostics.regularized is not None
        regularize = _REGULARIZATIONS[posterior.method.regularization] if changed else None
    else:  # what changes the eigenvalues is a matter of their signs, and does so at all scales alike
        parts, regularize = [_as_used(posterior)], None
    stacked = tuple(jnp.stack([p[i] for p in parts]) for i in range(len(parts[0])))
    if isinstance(structure, DiagonalPrecision):
        return _ByDiagonal(stacked[0], regularize)
    return _ByBlocks(stacked, regularize)


# A condition number beyond which the log-determinant of a matrix is no longer smooth in what it is made of.
_FAR_APART = 1e12


def _root(found: FactoredCurvature) -> Float[Array, "P P"]:
    """R with Rᵀ R the curvature."""
    size = found.factor.shape[1]
    rows = jnp.sqrt(found.weights)[:, None] * found.factor
    # Of fewer observations than parameters too.
    return jnp.linalg.qr(jnp.concatenate([rows, jnp.zeros((size, size))]), mode="r")


_REGULARIZATIONS: dict[str, Callable[[Array], Array]] = {"clip": jax.nn.relu, "abs": jnp.abs}


def _gram_parts(factor, weights, part, groups: Int[np.ndarray, " P"], rank: int | None) -> _ByGram:
    num_groups = int(groups.max()) + 1
    num, size = factor.shape
    first = np.unique(groups, return_index=True)[1]
    if num_groups == size and size > 1:
        return _ByGram(None, first, factor, weights, part, rank)
    needed = 8 * num_groups * num**2
    if needed > free_bytes() // 4:
        raise LaplodeError(
            f'`precision`="leaf" would keep {num_groups} matrices of {num} × {num}, {needed / 2**30:.1f} GiB, more '
            'than fits. Take "one".'
        )
    # Groups are runs of columns, or all of them.
    grams = [gram(factor[:, groups == g].T if num_groups > 1 else factor.T) for g in range(num_groups)]
    return _ByGram(jnp.stack(grams), first, None, weights, part, rank if rank is None or rank < num else None)


def _matrices(found: AbstractCurvature) -> list[Array]:
    if isinstance(found, DenseCurvature):
        return [found.matrix]
    if isinstance(found, BlockCurvature):
        return [block.matrix for block in found.blocks]
    assert isinstance(found, DiagonalCurvature)
    return [found.diagonal]


def _as_used(posterior: Posterior) -> list[Array]:
    """The curvature after regularization, in the form of `_matrices`."""
    if posterior.diagnostics.regularized is None:
        return _matrices(posterior.curvature)
    structure = posterior.structure
    prior = posterior.problem.prior.local(posterior.parameters).diagonal
    if isinstance(structure, DiagonalPrecision):
        return [structure.precision - prior]
    if isinstance(structure, BlockDiagonalPrecision):
        leaves = [(start, stop) for _, _, start, stop in posterior.parameters.leaves]
        blocks = zip(structure.blocks, leaves, strict=True)
        return [b.cholesky @ b.cholesky.T - jnp.diag(prior[slice(*leaf)]) for b, leaf in blocks]
    return [structure.precision_product(jnp.eye(posterior.size)) - jnp.diag(prior)]


def _channel(problem: Problem, k: int) -> Problem:
    """The problem with one channel observed."""
    ys = np.full_like(problem.data.ys, np.nan)
    ys[..., k] = problem.data.ys[..., k]
    return eqx.tree_at(lambda p: p.data.ys, problem, ys)


# ---- The evidence as a function


class Evidence(eqx.Module):
    """log p(Y) of the Laplace approximation as a function of `Hyperparameters`, θ* and its curvature held fixed.

    Made by `evidence_function`. Differentiable, jitted by its callers; a call takes no solve.
    """

    view: Parameters
    problem: Problem
    predictions: Float[Array, "N T F"]
    log_det: _LogDet
    grouping: Grouping | None = eqx.field(static=True)
    by_channel: bool = eqx.field(static=True)

    def __call__(self, hyperparameters: Hyperparameters) -> Float[Array, ""]:
        """log p(Y | θ*) + log p(θ*) + P/2 log 2π − ½ log det Λ, in nats."""
        problem, view = self.problem_at(hyperparameters), self.view
        prior = problem.prior.local(view)
        log_det = self.log_det(prior.diagonal, self._shrink(hyperparameters.log_scale))
        constant = 0.5 * view.size * math.log(2 * math.pi)
        return problem.log_likelihood(self.predictions) + prior.log_density + constant - 0.5 * log_det

    def _shrink(self, log_scale: Array | None) -> Float[Array, " B"]:
        """What is left of the information of each part."""
        if log_scale is None:
            return jnp.ones(1)
        return jnp.exp(-2 * log_scale)

    def problem_at(self, hyperparameters: Hyperparameters) -> Problem:
        """The problem with these hyperparameters."""
        problem = self.problem
        if hyperparameters.log_precision is not None:
            assert self.grouping is not None
            prior = problem.prior.at(self.view, self.grouping, hyperparameters.log_precision)
            problem = eqx.tree_at(lambda p: p.prior, problem, prior)
        if hyperparameters.log_scale is None:
            return problem
        likelihood: Any = problem.likelihood
        factor = jnp.exp(hyperparameters.log_scale)
        scale = jnp.asarray(likelihood.scale) * (factor if self.by_channel else factor[0])
        return eqx.tree_at(lambda p: p.likelihood.scale, problem, scale)


_NOISES: dict[str, bool | None] = {"channel": True, "one": False, "fixed": None}


def evidence_function(
    posterior: Posterior, *, precision: str = "one", noise: str | None = None
) -> tuple[Evidence, Hyperparameters]:
    """The log evidence as a differentiable function of hyperparameters, and where it stands now.

    **Arguments:** as for `maximize_evidence`.

    **Returns:** `(function, start)`: `function(hyperparameters)` is in nats, and `function(start)` is
    `posterior.log_evidence`, where the prior's precision has the form asked for.

    **Raises:** `LaplodeError` as `maximize_evidence` does.
    """
    grouping, by_channel = _forms(posterior, precision, noise)
    view, problem = posterior.parameters, posterior.problem
    log_precision = None if grouping is None else problem.prior.hyperparameters(view, grouping)
    log_det = _log_det(posterior, _groups(grouping, posterior), by_channel is True)
    log_scale = None
    if by_channel is not None:
        log_scale = jnp.zeros(problem.data.ys.shape[2] if by_channel else 1)
    predictions = evaluate(posterior.flow, view.vector)
    function = Evidence(view, problem, predictions, log_det, grouping, by_channel is True)
    return function, Hyperparameters(log_precision, log_scale)


def _groups(grouping: Grouping | None, posterior: Posterior) -> Int[np.ndarray, " P"]:
    """The parameters that share a precision at any hyperparameters; those with a prior of their own stand alone."""
    if grouping is None:
        return np.arange(posterior.size)
    groups = posterior.problem.prior.groups(posterior.parameters, grouping)
    alone = groups < 0
    groups[alone] = groups.max(initial=-1) + 1 + np.arange(np.sum(alone))
    return groups


def _forms(posterior: Any, precision: str, noise: str | None) -> tuple[Grouping | None, bool | None]:
    """How parameters are grouped, and whether noise scales are by channel; None for what is fixed."""
    if not isinstance(posterior, Posterior):
        raise LaplodeError(f"`posterior` must come from laplode.laplace, got {type(posterior).__name__}.")
    posterior.problem.prior.check_tunable()
    grouping = choose("precision", precision, GROUPINGS)
    if grouping is not None and not posterior.problem.prior.hyperparameters(posterior.parameters, grouping).size:
        grouping = None  # every parameter has a prior of its own
    by_channel = _noise_form(posterior, noise)
    if grouping is None and by_channel is None:
        raise LaplodeError("`precision` and `noise` are both fixed: nothing is left to optimize.")
    return grouping, by_channel


def _noise_form(posterior: Posterior, noise: str | None) -> bool | None:
    likelihood, method = posterior.problem.likelihood, posterior.method
    scaled = falls = known = False
    if isinstance(likelihood, AbstractScaleLikelihood):
        scaled, falls = likelihood.scale is not None, likelihood.scalable
        known = falls and (method.curvature == "ggn" or (method.curvature == "hessian" and likelihood.quadratic))
    if noise is None:
        together = isinstance(posterior.curvature, EigenCurvature) or method.regularization == "jitter"
        return (None if not known else not together) if scaled else None
    by_channel = choose("noise", noise, _NOISES)
    if by_channel is None:
        return None
    name = type(likelihood).__name__
    if not scaled:
        raise LaplodeError(f'`noise`="{noise}", but the likelihood, {name}, has no scale. Take noise="fixed".')
    if not falls:
        raise LaplodeError(
            f'`noise`="{noise}": how observations beyond a limit of {name} weigh changes with the scale. Take '
            'noise="fixed", and the scale from fit (learned=True).'
        )
    if not known:
        raise LaplodeError(
            f'`noise`="{noise}": how curvature="{method.curvature}" changes with the scale of {name} is not known '
            'without computing it again. Take a posterior with curvature="ggn", or noise="fixed".'
        )
    if by_channel and method.regularization == "jitter" and posterior.diagnostics.regularized is not None:
        raise LaplodeError(
            '`noise`="channel": how much regularization="jitter" adds changes with the scales. Take noise="one", or '
            'a posterior with regularization="clip".'
        )
    if by_channel and isinstance(posterior.curvature, EigenCurvature):
        raise LaplodeError(
            '`noise`="channel": the leading eigenpairs of the exact Hessian are of all channels together. Take '
            'noise="one", curvature="ggn", or structure="full".'
        )
    return by_channel


# ---- Comparison


def compare_evidence(posteriors: Mapping[str, Posterior]) -> pd.DataFrame:
    """A table of models by log evidence, the best first, in the shape of `az.compare`.

    **Arguments:**

    - `posteriors`: name → posterior, all of the same data, of any architectures and structures of the ODE.

    **Returns:** a `pandas.DataFrame`, a row each: "rank"; "log_evidence" (nats); "p", the effective number of
    parameters; "diff", how far the log evidence is below the best; "log_weight" and
    "weight", the posterior probability of the model among these, all equally probable before, which `mix` takes, 0 for
    an optimum (or its mirror image, hidden units exchanged) that is in the table above it; "warning", where the
    evidence is not that of an optimum: a Newton decrement above 0.1 nats, or regularized curvature.

    **Raises:** `LaplodeError` when the data differ.

    MacKay (1992), "Bayesian interpolation".
    """
    if not isinstance(posteriors, Mapping) or not posteriors:
        raise LaplodeError("`posteriors` must be a mapping such as {'name': posterior, ...}, and not empty.")
    first = None
    for name, posterior in posteriors.items():
        if not isinstance(posterior, Posterior):
            raise LaplodeError(
                f"`posteriors`[{name!r}] must come from laplode.laplace, got {type(posterior).__name__}."
            )
        ys = np.asarray(posterior.problem.ys)
        if first is not None and (ys.shape != first.shape or not np.array_equal(ys, first, equal_nan=True)):
            raise LaplodeError(
                f"`posteriors`[{name!r}] has other data than the first: evidences compare on the same observations, in "
                "the same units, only."
            )
        first = ys
    values = np.array([float(p.log_evidence) for p in posteriors.values()])
    order = np.argsort(-values)
    found = [list(posteriors.values())[i] for i in order]
    values = values[order]
    twins = {j for i, j in itertools.combinations(range(len(found)), 2) if _same_optimum(found[i], found[j])}
    apart = np.where(np.isin(np.arange(len(found)), list(twins)), -np.inf, values)
    log_weights = apart - np.logaddexp.reduce(apart)
    return pd.DataFrame(
        {
            "rank": np.arange(len(found)),
            "log_evidence": values,
            "p": [p.diagnostics.effective_dof for p in found],
            "diff": values[0] - values,
            "log_weight": log_weights,
            "weight": np.exp(log_weights),
            "warning": [p.diagnostics.newton_decrement > 0.1 or p.diagnostics.regularized is not None for p in found],
        },
        index=pd.Index([list(posteriors)[i] for i in order]),
    )


# Two posteriors are of the same optimum when they agree to this, in nats and in the noise of an observation.
_SAME = 1e-2


def _same_optimum(one: Posterior, other: Posterior) -> bool:
    """Whether two posteriors are of the same optimum of one model, up to its symmetries."""
    apart = lambda a, b: abs(float(a) - float(b)) > _SAME
    if [leaf[:2] for leaf in one.parameters.leaves] != [leaf[:2] for leaf in other.parameters.leaves]:
        return False
    if apart(one.log_evidence, other.log_evidence) or apart(one.log_joint, other.log_joint):
        return False
    f, g = (evaluate(p.flow, p.mean) for p in (one, other))
    return not np.any(np.sqrt(one.problem.information(f)) * np.abs(f - g) > _SAME)

"""Hyperparameters by the evidence: prior precisions and noise scales, without a solve for each of their values."""

import abc
import functools as ft
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from jaxtyping import Array, Float, Int, PyTree
from tqdm.auto import tqdm

from ._curvature import (
    AbstractCurvature,
    BlockCurvature,
    DenseCurvature,
    DiagonalCurvature,
    EigenCurvature,
    FactoredCurvature,
    free_bytes,
    gram,
)
from ._errors import LaplodeError, LaplodeWarning, choose
from ._laplace import curvature_again, laplace, reassembled
from ._posterior import Posterior
from ._prior import gaussian_part, is_gaussian, log_prior, prior_deficit, prior_vectors
from ._problem import (
    AbstractPrior,
    AbstractScaleLikelihood,
    GaussianPrior,
    NamedPriors,
    PosteriorPrior,
    Problem,
    check_count,
    check_flag,
    real_array,
)
from ._refine import refine
from ._solve import evaluate
from ._structure import BlockDiagonal, Diagonal, Full, LowRank
from ._vector import Parameters


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


@ft.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_eigenvalues(function: Callable[[Array], Array], matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """A symmetric matrix with its eigenvalues changed; differentiable also where eigenvalues coincide."""
    return _with_eigenvalues_forward(function, matrix)[0]


def _with_eigenvalues_forward(function, matrix):
    eigenvalues, vectors = jnp.linalg.eigh(matrix)
    return (vectors * function(eigenvalues)) @ vectors.T, (eigenvalues, vectors)


def _with_eigenvalues_backward(function, kept, cotangent):
    # Daleckii and Krein (1965): in the eigenvectors, the derivative is a product with divided differences.
    eigenvalues, vectors = kept
    changed = function(eigenvalues)
    gap = eigenvalues[:, None] - eigenvalues
    apart = jnp.abs(gap) > 1e-9 * jnp.max(jnp.abs(eigenvalues))
    slope = jax.vmap(jax.grad(function))(eigenvalues)
    divided = jnp.where(apart, (changed[:, None] - changed) / jnp.where(apart, gap, 1), slope[:, None])
    inner = vectors.T @ (cotangent + cotangent.T) @ vectors / 2
    return (vectors @ (divided * inner) @ vectors.T,)


_with_eigenvalues.defvjp(_with_eigenvalues_forward, _with_eigenvalues_backward)


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
    concave = not np.any(prior_deficit(posterior.problem.prior, posterior.parameters))
    num_parts = posterior.problem.data.ys.shape[2] if by_channel else 1
    if isinstance(found, FactoredCurvature):
        channel = np.nonzero(posterior.problem.informed)[2]
        part = channel if by_channel else np.zeros_like(channel)
        rank = posterior.method.rank
        few = found.factor.shape[0] < posterior.size
        if (isinstance(structure, LowRank) and (few or rank is not None)) or (
            isinstance(structure, Full) and few and concave
        ):
            return _gram_parts(found.factor, found.weights, part, groups, rank)
        rows = [np.flatnonzero(part == k) for k in range(num_parts)]
        each = [FactoredCurvature(found.factor[r], found.weights[r]) for r in rows]
        if isinstance(structure, Diagonal):
            return _ByDiagonal(jnp.stack([e.diagonal() for e in each]), None)
        if isinstance(structure, BlockDiagonal):
            leaves = [(start, stop) for _, _, start, stop in posterior.parameters.leaves]
            return _ByBlocks(tuple(jnp.stack([e.block(*leaf) for e in each]) for leaf in leaves), None)
        if concave and posterior.diagnostics.condition_number > _FAR_APART:
            return _ByRoot(jnp.stack([_root(e) for e in each]))
        return _ByBlocks((jnp.stack([e.matrix() for e in each]),), None)
    if isinstance(found, EigenCurvature):
        assert isinstance(structure, LowRank)
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
    if isinstance(structure, Diagonal):
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
    prior = _prior_curvature(posterior.problem, posterior.parameters)
    if isinstance(structure, Diagonal):
        return [structure.precision - prior]
    if isinstance(structure, BlockDiagonal):
        leaves = [(start, stop) for _, _, start, stop in posterior.parameters.leaves]
        blocks = zip(structure.blocks, leaves, strict=True)
        return [b.cholesky @ b.cholesky.T - jnp.diag(prior[slice(*leaf)]) for b, leaf in blocks]
    return [structure.precision_product(jnp.eye(posterior.size)) - jnp.diag(prior)]


def _prior_curvature(problem: Problem, view: Parameters) -> Float[Array, " P"]:
    """−∂² log p(θ), of either sign."""
    return prior_vectors(problem.prior, view)[1] - prior_deficit(problem.prior, view)


def _channel(problem: Problem, k: int) -> Problem:
    """The problem with one channel observed."""
    ys = np.full_like(problem.data.ys, np.nan)
    ys[..., k] = problem.data.ys[..., k]
    return eqx.tree_at(lambda p: p.data.ys, problem, ys)


# ---- The evidence as a function


class Evidence(eqx.Module):
    """log p(Y) of the Laplace approximation as a function of `Hyperparameters`, θ* and its curvature held fixed.

    Made by `evidence`. Differentiable, jitted by its callers; a call takes no solve.
    """

    view: Parameters
    problem: Problem
    predictions: Float[Array, "N T F"]
    log_det: _LogDet
    groups: Int[np.ndarray, " P"]  # of named priors, which stay as they are, one for each parameter after the others
    by_channel: bool = eqx.field(static=True)

    def __call__(self, hyperparameters: Hyperparameters) -> Float[Array, ""]:
        """log p(Y | θ*) + log p(θ*) + P/2 log 2π − ½ log det Λ, in nats."""
        problem, view = self.problem_at(hyperparameters), self.view
        mean, now = prior_vectors(self.problem.prior, view)
        log_density = log_prior(self.problem.prior, view, view.vector)
        precision = _prior_curvature(self.problem, view)
        if hyperparameters.log_precision is not None:
            groups = jnp.minimum(self.groups, len(hyperparameters.log_precision) - 1)
            ours = is_gaussian(self.problem.prior, view)
            precision = jnp.where(ours, jnp.exp(hyperparameters.log_precision)[groups], precision)
            ratio = jnp.where(ours, precision / now, 1)
            change = jnp.log(ratio) - (ratio - 1) * now * (view.vector - mean) ** 2
            log_density += 0.5 * jnp.sum(change)
        log_det = self.log_det(precision, self._shrink(hyperparameters.log_scale))
        constant = 0.5 * view.size * math.log(2 * math.pi)
        return problem.log_likelihood(self.predictions) + log_density + constant - 0.5 * log_det

    def _shrink(self, log_scale: Array | None) -> Float[Array, " B"]:
        """What is left of the information of each part."""
        if log_scale is None:
            return jnp.ones(1)
        return jnp.exp(-2 * log_scale)

    def problem_at(self, hyperparameters: Hyperparameters) -> Problem:
        """The problem with these hyperparameters in its likelihood."""
        if hyperparameters.log_scale is None:
            return self.problem
        likelihood: Any = self.problem.likelihood
        factor = jnp.exp(hyperparameters.log_scale)
        scale = jnp.asarray(likelihood.scale) * (factor if self.by_channel else factor[0])
        return eqx.tree_at(lambda p: p.likelihood.scale, self.problem, scale)


_Grouping = Callable[[Parameters], np.ndarray]

# How parameters are grouped under one prior precision.
_GROUPS: dict[str, _Grouping | None] = {
    "one": lambda view: np.zeros(view.size, int),
    "leaf": lambda view: np.repeat(np.arange(len(view.leaves)), [stop - start for _, _, start, stop in view.leaves]),
    "parameter": lambda view: np.arange(view.size),
    "fixed": None,
}
_NOISES: dict[str, bool | None] = {"channel": True, "one": False, "fixed": None}


def evidence(
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
    groups = np.arange(view.size) if grouping is None else _groups(grouping, posterior)
    log_precision = None
    if grouping is not None:
        ours = is_gaussian(problem.prior, view)
        _, now = prior_vectors(problem.prior, view)
        log_precision = jnp.asarray(
            np.bincount(groups[ours], np.log(np.asarray(now)[ours])) / np.bincount(groups[ours])
        )
    log_det = _log_det(posterior, groups, by_channel is True)
    log_scale = None
    if by_channel is not None:
        log_scale = jnp.zeros(problem.data.ys.shape[2] if by_channel else 1)
    predictions = evaluate(posterior.flow, view.vector)
    function = Evidence(view, problem, predictions, log_det, groups, by_channel is True)
    return function, Hyperparameters(log_precision, log_scale)


def _groups(grouping: _Grouping, posterior: Posterior) -> Int[np.ndarray, " P"]:
    """The groups of parameters with the Gaussian prior; after them, each for itself, those with another prior."""
    groups, ours = grouping(posterior.parameters), is_gaussian(posterior.problem.prior, posterior.parameters)
    found = np.unique(groups[ours], return_inverse=True)[1]
    groups = np.empty_like(groups)
    groups[ours] = found
    groups[~ours] = found.max(initial=-1) + 1 + np.arange(np.sum(~ours))
    return groups


def _forms(
    posterior: Any, precision: str, noise: str | None
) -> tuple[Callable[[Parameters], np.ndarray] | None, bool | None]:
    """How parameters are grouped, and whether noise scales are by channel; None for what is fixed."""
    if not isinstance(posterior, Posterior):
        raise LaplodeError(f"`posterior` must come from laplode.laplace, got {type(posterior).__name__}.")
    if isinstance(posterior.problem.prior, PosteriorPrior):
        raise LaplodeError(
            "`posterior` has a prior that is the posterior of other data: its precision is theirs, and the noise was "
            "held at one scale for them. Maximize the evidence of those data before `as_prior`, or that of all data "
            "together."
        )
    grouping = choose("precision", precision, _GROUPS)
    if not np.any(is_gaussian(posterior.problem.prior, posterior.parameters)):
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


# ---- Its maximum

# A gradient below this, in nats per e-fold, is at a maximum.
_FLAT = 1e-5

# Rounds of refinement that gain less than this, in nats, have settled.
_SETTLED = 1e-3

# Within this of a bound, in e-folds, an optimum has run to it.
_AT_BOUND = 0.01


class _Bounds(NamedTuple):
    """log hyperparameters between bounds, as functions of coordinates that have none."""

    low: Hyperparameters
    high: Hyperparameters

    @classmethod
    def of(cls, start: Hyperparameters, precision_bounds, scale_bounds, moved: Array | float) -> "_Bounds":
        fill = lambda x, value: None if x is None else jnp.full(x.shape, math.log(value))
        shift = lambda x: None if x is None else x - moved
        low, high = (
            Hyperparameters(fill(start.log_precision, p), shift(fill(start.log_scale, s)))
            for p, s in zip(precision_bounds, scale_bounds, strict=True)
        )
        return cls(low, high)

    def inside(self, free: PyTree) -> Hyperparameters:
        # About one e-fold for a step of one, in the middle.
        between = lambda u, a, b: a + (b - a) * jax.nn.sigmoid(4 * u / (b - a))
        return jax.tree.map(between, free, self.low, self.high)

    def free(self, inside: Hyperparameters) -> PyTree:
        def invert(x, a, b):
            part = jnp.clip((x - a) / (b - a), 1e-3, 1 - 1e-3)
            return (b - a) / 4 * (jnp.log(part) - jnp.log1p(-part))

        return jax.tree.map(invert, inside, self.low, self.high)


def maximize_evidence(
    posterior: Posterior,
    *,
    precision: str = "one",
    noise: str | None = None,
    online: bool = False,
    precision_bounds: tuple[float, float] = (1e-6, 1e6),
    scale_bounds: tuple[float, float] = (1e-3, 1e3),
    steps: int = 200,
    rounds: int = 20,
    progress: bool = True,
) -> Posterior:
    """Prior precisions and noise scales at which the data are most probable under the Laplace approximation.

    log p(Y) ≈ log p(Y | θ*) + log p(θ*) + P/2 log 2π − ½ log det Λ is maximized over log hyperparameters by L-BFGS. θ*
    and its curvature being in hand, no value takes a solve.

    **Arguments:**

    - `posterior`: from `laplace`.
    - `precision`: how many prior precisions there are: "one"; one for each "leaf" of the model (weight matrix, bias,
        scalar); one for each "parameter"; or "fixed" as they are.
    - `noise`: the noise scales: one for each "channel"; "one" factor on all; or "fixed". By default "channel" where the
        likelihood has a scale and the curvature at other scales is known: with "ggn" always, with the exact "hessian"
        for Gaussian and LogNormal ("one", if "low_rank" or with "jitter").
    - `online`: whether to alternate with `refine`, which moves θ* to the optimum under the new hyperparameters, until
        the evidence settles.
    - `precision_bounds`: of the prior precisions.
    - `scale_bounds`: of the noise scales, as multiples of those at the start.
    - `steps`: of L-BFGS, at most.
    - `rounds`: of refinement and maximization, at most, when `online`.
    - `progress`: whether to show a progress bar with the evidence.

    **Returns:** a `Posterior` with the hyperparameters found in its `.problem`. Unless `online`, its mean is that of
    `posterior`.

    **Raises:** `LaplodeError` when an option does not fit the posterior. Warns (`LaplodeWarning`) when a hyperparameter
    ran to a bound, when the evidence has not settled, and when θ* is no longer the optimum.

    MacKay (1992), "Bayesian interpolation"; Immer, Bauer, Fortuin, Rätsch and Khan (2021), "Scalable marginal
    likelihood estimation for model selection in deep learning".
    """
    for name, bounds in (("precision_bounds", precision_bounds), ("scale_bounds", scale_bounds)):
        low, high = real_array(name, bounds) if np.shape(bounds) == (2,) else (0, 0)
        if not 0 < low < high < math.inf:
            raise LaplodeError(f"`{name}` must be two positive numbers in order, got {bounds!r}.")
    for name, value in (("steps", steps), ("rounds", rounds)):
        check_count(name, value)
    check_flag("online", online)
    _forms(posterior, precision, noise)
    moved: Array | float = 0.0  # of the log scales since the start
    settled = not online
    left = rounds if online else 1
    with tqdm(total=left, desc="Evidence", unit="round", disable=not progress) as bar:
        while True:
            if online:
                posterior = _refined(posterior)
            function, start = evidence(posterior, precision=precision, noise=noise)
            bounds = _Bounds.of(start, precision_bounds, scale_bounds, moved)
            found = _maximum(function, start, bounds, steps)
            posterior = _with(posterior, function, found, precision)
            moved = moved if found.log_scale is None else moved + found.log_scale
            bar.update(1)
            bar.set_postfix(log_evidence=f"{float(posterior.log_evidence):.6g} nats")
            gained = float(function(found) - function(start))
            settled = settled or gained < _SETTLED
            left -= 1
            if settled or not left:
                break
    _warn(posterior, function, found, bounds, settled)
    return posterior


def _refined(posterior: Posterior) -> Posterior:
    """The posterior around the optimum of its own problem."""
    method, where = posterior.method, posterior.parameters.where
    exact = method.curvature == "hessian" and isinstance(posterior.structure, Full)
    options = {field: getattr(method, field) for field in method.__dataclass_fields__}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LaplodeWarning)  # what remains of it at the end is said there
        fit = refine(
            posterior.parameters.model,
            posterior.problem,
            curvature="hessian" if exact else "ggn",
            where=where,
            progress=False,
        )
        return laplace(fit.model, posterior.problem, where=where, progress=False, **options)


def _maximum(function: Evidence, start: Hyperparameters, bounds: _Bounds, steps: int) -> Hyperparameters:
    """The best hyperparameters that L-BFGS finds; the start, if none is better."""
    found = bounds.inside(_lbfgs(function, bounds, bounds.free(start), steps))
    value = lambda h: float(_value(function, h))
    return found if value(found) >= value(start) else start


@eqx.filter_jit
def _value(function: Evidence, hyperparameters: Hyperparameters) -> Float[Array, ""]:
    return function(hyperparameters)


@eqx.filter_jit
def _lbfgs(function: Evidence, bounds: _Bounds, start: PyTree, steps: int) -> PyTree:
    optimizer = optax.lbfgs()

    def loss(free):
        value = -function(bounds.inside(free))
        return jnp.where(jnp.isnan(value), jnp.inf, value)  # where Λ is not positive definite

    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        free, state, _ = carry
        value, gradient = value_and_grad(free, state=state)
        updates, state = optimizer.update(gradient, state, free, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(free, updates), state, optax.tree.norm(gradient)

    def going(carry):
        count = optax.tree.get(carry[1], "count")
        return (count < steps) & (carry[2] > _FLAT)

    return jax.lax.while_loop(going, step, (start, optimizer.init(start), jnp.asarray(jnp.inf)))[0]


def _with(posterior: Posterior, function: Evidence, found: Hyperparameters, precision: str) -> Posterior:
    """The posterior with other hyperparameters."""
    problem = function.problem_at(found)
    if found.log_precision is not None:
        problem = eqx.tree_at(lambda p: p.prior, problem, _prior(posterior, jnp.exp(found.log_precision), precision))
    curvature = posterior.curvature
    if found.log_scale is not None:
        shrink = jnp.exp(-2 * found.log_scale)
        if isinstance(curvature, FactoredCurvature):
            channel = np.nonzero(posterior.problem.informed)[2]
            each = shrink[channel] if function.by_channel else shrink[0]
            curvature = FactoredCurvature(curvature.factor, curvature.weights * each)
        elif function.by_channel and shrink.size > 1:
            curvature = curvature_again(posterior, problem)
        else:
            curvature = _scaled(curvature, shrink[0])
    return reassembled(posterior, problem, curvature)


def _scaled(curvature: AbstractCurvature, by: Float[Array, ""]) -> AbstractCurvature:
    if isinstance(curvature, DenseCurvature):
        return DenseCurvature(curvature.matrix * by, curvature.symmetry_defect)
    if isinstance(curvature, BlockCurvature):
        return BlockCurvature(tuple(DenseCurvature(b.matrix * by, b.symmetry_defect) for b in curvature.blocks))
    if isinstance(curvature, EigenCurvature):
        return EigenCurvature(curvature.vectors, curvature.eigenvalues * by)
    assert isinstance(curvature, DiagonalCurvature)
    return DiagonalCurvature(curvature.diagonal * by)


def _prior(posterior: Posterior, values: Float[Array, " A"], precision: str) -> AbstractPrior:
    view, prior = posterior.parameters, posterior.problem.prior
    ours = is_gaussian(prior, view)
    form: PyTree = values
    if precision == "one":
        form = values[0]
    elif precision == "leaf":  # what has a prior of its own takes no notice of this one
        rest = iter(values)
        each = [next(rest) if ours[start] else jnp.ones(()) for _, _, start, _ in view.leaves]
        form = jax.tree.unflatten(jax.tree.structure(view.selected), each)
    elif not np.all(ours):
        form = jnp.ones(view.size).at[np.flatnonzero(ours)].set(values)
    part = gaussian_part(prior)
    assert part is not None
    found = GaussianPrior(form, part.mean)
    return eqx.tree_at(lambda p: p.rest, prior, found) if isinstance(prior, NamedPriors) else found


def _warn(posterior: Posterior, function: Evidence, found: Hyperparameters, bounds: _Bounds, settled: bool) -> None:
    said = []
    if found.log_precision is not None:
        view, num = posterior.parameters, found.log_precision.size
        ours = np.flatnonzero(is_gaussian(posterior.problem.prior, view))
        if num == 1:
            names = ["the prior precision"]
        elif num == ours.size:
            names = [f"the prior precision of {view.name(int(i))}" for i in ours]
        else:
            names = [f"the prior precision of {name}" for name, _, start, _ in view.leaves if start in ours]
        meaning = ("the prior is as good as flat there", "the data want these parameters at the prior's mean")
        said += _at_bounds(names, found.log_precision, bounds.low.log_precision, bounds.high.log_precision, meaning)
    if found.log_scale is not None:
        names = [f"the noise scale of channel {k}" for k in range(found.log_scale.size)]
        names = names if function.by_channel else ["the noise scale"]
        meaning = ("the model runs through the observations", "the model explains nothing")
        said += _at_bounds(names, found.log_scale, bounds.low.log_scale, bounds.high.log_scale, meaning)
    if not settled:
        said.append("The evidence has not settled: allow more `rounds`.")
    elif posterior.diagnostics.newton_decrement > 0.1:
        said.append(
            "With these hyperparameters the optimum lies elsewhere: the Newton decrement is now "
            f"{posterior.diagnostics.newton_decrement:.3g} nats. Take online=True, or refine and call laplace again."
        )
    for message in said:
        warnings.warn(message, LaplodeWarning, stacklevel=3)


def _at_bounds(names: list[str], found: Any, low: Any, high: Any, meaning: tuple[str, str]) -> list[str]:
    said = []
    for which, at, means in (
        ("lower", found - low < _AT_BOUND, meaning[0]),
        ("upper", high - found < _AT_BOUND, meaning[1]),
    ):
        index = np.flatnonzero(at)
        if index.size:
            few = ", ".join(names[i] for i in index[:3]) + (f", … ({index.size} in all)" if index.size > 3 else "")
            said.append(
                f"The evidence ran to the {which} bound of {few}: {means}. Look whether the model and the data allow "
                "that, or fix the value."
            )
    return said


# ---- Comparison


def compare_evidence(posteriors: Mapping[str, Posterior]) -> pd.DataFrame:
    """A table of models by log evidence, the best first, in the shape of `az.compare`.

    **Arguments:**

    - `posteriors`: name → posterior, all of the same data, of any architectures and structures of the ODE.

    **Returns:** a `pandas.DataFrame`, a row each: "rank"; "log_evidence" (nats); "p", the effective number of
    parameters; "diff", how far the log evidence is below the best; "weight", the posterior probability of the
    model among these, all
    equally probable before; "warning", where the evidence is not that of an optimum: a Newton decrement above 0.1
    nats, or regularized curvature.

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
        ys = posterior.problem.data.ys
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
    return pd.DataFrame(
        {
            "rank": np.arange(len(found)),
            "log_evidence": values,
            "p": [p.diagnostics.effective_dof for p in found],
            "diff": values[0] - values,
            "weight": np.exp(values - np.logaddexp.reduce(values)),
            "warning": [p.diagnostics.newton_decrement > 0.1 or p.diagnostics.regularized is not None for p in found],
        },
        index=pd.Index([list(posteriors)[i] for i in order]),
    )

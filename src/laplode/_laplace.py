"""Curvature and prior in, posterior out."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.sparse.linalg import LinearOperator, eigsh

from ._curvature import DenseCurvature, FactoredCurvature, fisher, free_bytes, ggn, hessian, value_and_gradient
from ._errors import LaplodeError, LaplodeWarning
from ._model import check_model
from ._posterior import AbstractStructure, Diagnostics, Full, Posterior, Regularized
from ._problem import Problem
from ._solve import AbstractFlow, flow
from ._vector import Parameters, Where, parameters, prior_vectors

# ---- Strings become functions here, at the door, and nowhere else

_CURVATURES = {
    "hessian": hessian,
    "ggn": lambda flow, problem, batch_size, progress: ggn(flow, problem),
    "fisher": lambda flow, problem, batch_size, progress: fisher(flow, problem),
}

_REGULARIZATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "clip": lambda eigenvalues: np.maximum(eigenvalues, 0),
    "abs": np.abs,
    "jitter": lambda eigenvalues: eigenvalues - min(eigenvalues.min(), 0),
    "none": lambda eigenvalues: eigenvalues,
}


def choose(name: str, option: str, options: dict[str, Any]) -> Any:
    """The value of a string option, or an error that names the valid ones."""
    if not isinstance(option, str) or option not in options:
        valid = ", ".join(f'"{known}"' for known in options)
        raise LaplodeError(f"`{name}` must be one of {valid}; got {option!r}.")
    return options[option]


def check_x64() -> None:
    """Raise `LaplodeError` unless JAX computes in 64 bits."""
    if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise LaplodeError(
            "laplode computes curvature in float64, and 64-bit JAX is off: a float32 Hessian is asymmetric and its small "
            'eigenvalues are noise. Call jax.config.update("jax_enable_x64", True) at the top of your program. A model '
            "trained in float32 may stay as it is; it is cast."
        )


def check_problem(problem: Any) -> None:
    """Raise `LaplodeError` unless `problem` is a `Problem`."""
    if not isinstance(problem, Problem):
        raise LaplodeError(f"`problem` must be laplode.Problem(data, likelihood, prior), got {type(problem).__name__}.")


def laplace(
    model: Any,
    problem: Problem,
    *,
    curvature: str = "hessian",
    structure: str = "full",
    where: Where = None,
    regularization: str = "clip",
    batch_size: int | None = None,
    progress: bool = True,
) -> Posterior:
    """The Laplace approximation of p(θ | Y) around a fitted model: Normal(θ*, Λ⁻¹), Λ = curvature + prior precision.

    **Arguments:**

    - `model`: the fitted model, a `NeuralODE` or any `eqx.Module` called as `(ts, y0, args) -> (T, K)`. Its parameters
        are cast to float64.
    - `problem`: what it was fitted to.
    - `curvature`: of −log p(Y | θ): "hessian" (exact), "ggn" (generalized Gauss-Newton, never indefinite) or "fisher"
        (empirical).
    - `structure`: of Λ: "full".
    - `where`: the parameters to infer, all by default: a function that picks nodes of the model, as in
        `where=lambda m: m.vector_field.layers[-1]`, or a pytree of True and False. The others stay fixed.
    - `regularization`: what becomes of negative eigenvalues of the exact Hessian, which it has away from a minimum:
        "clip" (set to 0, leaving the prior in charge), "abs", "jitter" (the whole spectrum is raised) or "none" (an
        error, if Λ is not positive definite).
    - `batch_size`: tangents under way at once in the exact Hessian; chosen from the free memory by default.
    - `progress`: whether to show a progress bar.

    **Returns:** a `Posterior`, with `.diagnostics`.

    **Raises:** `LaplodeError`, before any long computation, when 64-bit JAX is off, an option is unknown, model and data
    disagree, the solve fails at θ*, or the matrix does not fit in memory. Warns (`LaplodeWarning`) when eigenvalues were
    changed, parameters have no influence, or θ* is not a minimum.

    MacKay (1992), "A practical Bayesian framework for backpropagation networks".
    """
    check_x64()
    compute_curvature = choose("curvature", curvature, _CURVATURES)
    build = choose("structure", structure, _STRUCTURES)
    regularize = choose("regularization", regularization, _REGULARIZATIONS)
    check_problem(problem)
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise LaplodeError(f"`batch_size` must be a positive integer or None, got {batch_size!r}.")
    view = parameters(model, where)
    check_model(model, problem.data)
    prior_mean, prior_precision = prior_vectors(problem.prior, view)
    _check_memory(view.size)

    around = flow(view, problem.data.ts, problem.data.y0, problem.data.args)
    theta = view.vector
    nll, nll_gradient = value_and_gradient(around, problem, theta)
    _check_finite(nll, nll_gradient, around, problem)
    offset = theta - prior_mean
    gradient = nll_gradient + prior_precision * offset

    found = compute_curvature(around, problem, batch_size=batch_size, progress=progress)
    inert = _inert(found, nll_gradient, view)
    built: _Built = build(found, prior_precision, regularize, regularization)
    structured = built.structure

    diagnostics = Diagnostics(
        num_parameters=view.size,
        num_observations=int(np.sum(problem.data.observed)),
        symmetry_defect=found.symmetry_defect if isinstance(found, DenseCurvature) else 0.0,
        eigenvalue_min=built.eigenvalue_min,
        eigenvalue_max=built.eigenvalue_max,
        condition_number=built.condition_number,
        num_negative=built.num_negative,
        regularized=built.regularized,
        gradient_norm=float(jnp.linalg.norm(gradient)),
        newton_decrement=float(0.5 * gradient @ structured.covariance_product(gradient)),
        effective_dof=float(view.size - jnp.sum(prior_precision * structured.variance())),
        inert=inert,
    )
    _warn(diagnostics)
    log_prior = 0.5 * jnp.sum(jnp.log(prior_precision / (2 * math.pi)) - prior_precision * offset**2)
    return Posterior(view, problem, around, found, structured, log_prior - nll, diagnostics)


def _check_memory(size: int) -> None:
    matrix = 8 * size**2
    if 4 * matrix > free_bytes():  # the curvature, its eigenvectors, the precision and its factor
        raise LaplodeError(
            f'`structure`="full" needs P × P matrices with P = {size}: {matrix / 2**30:.1f} GiB each and four of them, '
            f"and {free_bytes() / 2**30:.1f} GiB of memory are free. Infer a part of the parameters with `where` (the last "
            "layer, say)."
        )


def _check_finite(nll: Array, gradient: Array, around: AbstractFlow, problem: Problem) -> None:
    if np.isfinite(nll) and np.all(np.isfinite(gradient)):
        return
    predictions = around(around.parameters.vector)
    log_prob = problem.likelihood.log_prob(predictions, jnp.asarray(problem.data.ys))
    bad = np.argwhere(~np.isfinite(log_prob))
    if bad.size:
        i, t, k = (int(j) for j in bad[0])
        raise LaplodeError(
            f"`model` gives trajectory {i}, channel {k} a log-likelihood of {float(log_prob[i, t, k])} at time "
            f"{float(problem.data.ts[i, t]):g}, where it predicts {float(predictions[i, t, k]):g} and "
            f"{problem.data.ys[i, t, k]:g} was observed. LogNormal and Poisson likelihoods want positive predictions."
        )
    raise LaplodeError("The gradient of the log-likelihood at `model` is not finite, though its value is.")


def _inert(found: DenseCurvature | FactoredCurvature, gradient: Array, view: Parameters) -> tuple[str, ...]:
    influence = np.asarray(found.influence())
    # Far below rounding: what is left by an exact zero, not a weak dependence.
    threshold = np.finfo(float).eps ** 2 * influence.max()
    without = np.flatnonzero((influence <= threshold) & (np.asarray(gradient) == 0))
    if without.size == view.size:
        raise LaplodeError(
            "No parameter of `model` has any influence on its predictions: the gradient and the curvature are exactly "
            "zero. Somewhere the parameters that are differentiated are not those that are used, as with "
            "eqx.combine(template, params), which keeps the template's leaves: write eqx.combine(params, template). "
            "jax.lax.stop_gradient and rounding to integers do the same."
        )
    return view.names(without)


def _warn(diagnostics: Diagnostics) -> None:
    problems = []
    if diagnostics.regularized is not None:
        problems.append(
            f"The exact Hessian has {diagnostics.num_negative} negative eigenvalues (regularized by "
            f'{diagnostics.regularized}): the model is not at a minimum. Fit further, or take curvature="ggn".'
        )
    if diagnostics.newton_decrement > 0.1:
        problems.append(
            f"The Newton decrement is {diagnostics.newton_decrement:.3g} nats, so about that much remains to be gained: "
            "the Gaussian sits beside the mode. Fit further, with a smaller learning rate."
        )
    if diagnostics.symmetry_defect > 1e-8:
        problems.append(
            f"The Hessian was asymmetric by {diagnostics.symmetry_defect:.1e} (relative) before symmetrization, where "
            "1e-15 is usual: something in the model computes in less than float64, or is not smooth."
        )
    if diagnostics.inert:
        problems.append(f"Parameters without any influence on the predictions: {', '.join(diagnostics.inert)}.")
    for problem in problems:
        warnings.warn(problem, LaplodeWarning, stacklevel=3)


# ---- Structures from curvatures


class _Built(eqx.Module):
    structure: AbstractStructure
    eigenvalue_min: float
    eigenvalue_max: float
    condition_number: float
    num_negative: int
    regularized: Regularized | None


def _full(found, prior_precision: Float[Array, " P"], regularize, kind: str) -> _Built:
    if isinstance(found, FactoredCurvature):
        precision = found.matrix() + jnp.diag(prior_precision)
        cholesky = jnp.linalg.cholesky(precision)
        low, high = _extreme_eigenvalues(precision, cholesky)
        return _Built(Full(cholesky), low, high, high / low, 0, None)
    matrix = np.asarray(found.matrix)
    eigenvalues, vectors = np.linalg.eigh(matrix)
    changed, num_negative, regularized = _regularize(eigenvalues, regularize, kind)
    uniform = bool(jnp.all(prior_precision == prior_precision[0]))

    def extremes(matrix: np.ndarray, eigenvalues: np.ndarray) -> tuple[float, float]:
        if uniform:
            spectrum = eigenvalues + float(prior_precision[0])
        else:
            spectrum = np.linalg.eigvalsh(matrix + np.diag(prior_precision))
        return float(spectrum.min()), float(spectrum.max())

    low, high = extremes(matrix, eigenvalues)
    low_used, high_used = low, high
    if regularized is not None:
        matrix = (vectors * changed) @ vectors.T
        low_used, high_used = extremes(matrix, changed)
    elif low <= 0:  # only "none" leaves it so
        raise LaplodeError(
            f"The precision is not positive definite: its smallest eigenvalue is {low:.3g}, and {num_negative} eigenvalues "
            'of the Hessian are negative. The model is not at a minimum: fit further, or take regularization="clip" or '
            'curvature="ggn".'
        )
    cholesky = jnp.linalg.cholesky(jnp.asarray(matrix) + jnp.diag(prior_precision))
    if not np.all(np.isfinite(cholesky)):
        raise LaplodeError(
            f"The precision can't be factored: its eigenvalues run from {low_used:.3g} to {high_used:.3g}, too far apart "
            "for float64. A larger prior precision bounds the small ones."
        )
    return _Built(Full(cholesky), low, high, high_used / low_used, num_negative, regularized)


def _regularize(eigenvalues: np.ndarray, regularize, kind: str) -> tuple[np.ndarray, int, Regularized | None]:
    """Eigenvalues after regularization, how many were negative beyond rounding, and what was changed."""
    rounding = eigenvalues.size * np.finfo(float).eps * np.abs(eigenvalues).max()
    num_negative = int(np.sum(eigenvalues < -rounding))
    changed = regularize(eigenvalues) if num_negative else eigenvalues
    change = np.abs(changed - eigenvalues)
    if not np.any(change):
        return changed, num_negative, None
    count = int(np.sum(change > rounding))
    return changed, num_negative, Regularized(kind, count, float(change.max()), float(change.sum()))


def _extreme_eigenvalues(precision: Array, cholesky: Array) -> tuple[float, float]:
    size = precision.shape[0]
    if size <= 200:
        spectrum = np.linalg.eigvalsh(np.asarray(precision))
        return float(spectrum[0]), float(spectrum[-1])
    structured = Full(cholesky)
    start = np.random.default_rng(0).normal(size=size)

    def largest(product) -> float:
        operator = LinearOperator((size, size), matvec=lambda v: np.asarray(product(v.ravel())), dtype=float)  # pyright: ignore
        return float(eigsh(operator, k=1, v0=start, tol=1e-8, return_eigenvectors=False)[0])

    return 1 / largest(jax.jit(structured.covariance_product)), largest(jax.jit(structured.precision_product))


_STRUCTURES = {"full": _full}

"""Curvature and prior in, posterior out."""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray
from tqdm.auto import tqdm

from .._algebra.forms import AbstractCurvature, BlockCurvature, DenseCurvature, FactoredCurvature, lessened, with_rows
from .._algebra.regularization import _REGULARIZATIONS, Regularize
from .._algebra.structure import AbstractStructure, LowRankPrecision
from .._curvature.hessian import Work
from .._curvature.solver_error import solver_problems
from .._devices import check_mesh, num_devices
from .._errors import LaplodeError, LaplodeWarning, choose
from .._files import Checkpoint, Path, check_path
from .._model.parameters import Parameters, Where
from .._problem.prior import LocalPrior
from .._problem.problem import Problem
from .._solve.frozen import unfrozen
from .._solve.maps import AbstractFlow, evaluate, flow
from .._solve.objective import value_and_gradient
from .estimate import _LOW_RANK, _STRUCTURES, _curvature, _estimate, _plan, _sizes
from .posterior import Diagnostics, Method, Posterior


def laplace(
    model: Any,
    problem: Problem,
    *,
    curvature: str = "hessian",
    structure: str = "full",
    where: Where = None,
    regularization: str = "clip",
    rank: int | None = None,
    num_probes: int | None = None,
    key: PRNGKeyArray | None = None,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> Posterior:
    """The Laplace approximation of p(θ | Y) around a fitted model: Normal(θ*, Λ⁻¹), Λ = curvature + prior precision.

    **Arguments:**

    - `model`: the fitted model, a `NeuralODE` or any `eqx.Module` called as `(ts, y0, args) -> (T, K)`. Its parameters
        are cast to float64.
    - `problem`: what it was fitted to.
    - `curvature`: of −log p(Y | θ): "hessian" (exact), "ggn" (generalized Gauss-Newton, never indefinite) or "fisher"
        (empirical).
    - `structure`: of Λ: "full" (P × P); "low_rank" (nothing P × P: exact for "ggn" and "fisher", the leading eigenpairs
        for "hessian"); "block_diagonal" (a block for each leaf of the model); "diagonal".
    - `where`: the parameters to infer, all by default: a function that picks nodes of the model, as in
        `where=lambda m: m.vector_field.layers[-1]`, or a pytree of True and False. The others stay fixed.
    - `regularization`: what becomes of negative eigenvalues of the exact Hessian, which it has away from a minimum:
        "clip" (set to 0, leaving the prior in charge), "abs", "jitter" (the whole spectrum is raised) or "none" (an
        error, if Λ is not positive definite). Where the prior is the posterior of other data, what these say counts as
        curvature too, as it would if all data had come at once.
    - `rank`: of "low_rank"; by default min(M, P), or min(100, P) for "hessian".
    - `num_probes`, `key`: for "diagonal" with "hessian", estimate the diagonal from this many random probes, instead of
        taking it exactly at the cost of P Hessian-vector products.
    - `batch_size`: tangents under way at once in the exact Hessian; chosen from the free memory by default.
    - `mesh`: devices that share the work: of the exact Hessian its tangents, otherwise the trajectories. After
        `jax.distributed.initialize` those of several machines, each of which makes the same call.
    - `checkpoint`: a file to keep the rows of the exact Hessian in. Where it exists, the same call goes on from it, to
        the same bits as without a break; when it is of a finished one, no row is computed again. It is replaced as a
        whole, which takes a twentieth of the time at most. Ctrl-C saves what was computed and raises
        `KeyboardInterrupt`.
    - `progress`: whether to print what is about to be done (see `estimate`) and show a progress bar.

    **Returns:** a `Posterior`, with `.diagnostics`.

    **Raises:** `LaplodeError`, before any long computation, when 64-bit JAX is off, an option is unknown, model and
    data disagree, the solve fails at θ*, the matrix does not fit in memory, or `checkpoint` is damaged or of other
    arguments. Warns (`LaplodeWarning`) when eigenvalues were changed, parameters have no influence, or θ* is not a
    minimum.

    MacKay (1992), "A practical Bayesian framework for backpropagation networks".
    """
    method = Method(curvature, structure, regularization, rank, num_probes, batch_size, key)
    plan = _plan(model, problem, method, where)
    problem = plan.problem
    choose("regularization", regularization, _REGULARIZATIONS)
    devices = check_mesh(mesh)
    _check_rows(method, devices, checkpoint)
    if regularization == "jitter" and plan.structure is _LOW_RANK and curvature == "hessian":
        raise LaplodeError(
            '`regularization`="jitter" raises the whole spectrum, and structure="low_rank" has a part of it: '
            'take "clip".'
        )
    around = flow(plan.view, problem.data.ts, problem.data.y0, problem.data.args)
    nll, nll_gradient = value_and_gradient(around, problem)
    _check_finite(nll, nll_gradient, around, problem)
    inferred = unfrozen(around, problem, nll_gradient)
    if inferred is not around:
        around = inferred
        nll, nll_gradient = value_and_gradient(around, problem)
    if progress:
        tqdm.write(str(_estimate(plan, around, problem)))
    saved = None if checkpoint is None else _checkpoint(checkpoint, around, problem, nll, method, num_devices(devices))
    found = plan.curvature(around, problem, method, Work(progress, devices, saved))
    posterior = _assembled(around, problem, method, found, nll, nll_gradient)
    _warn(posterior.diagnostics)
    for text in solver_problems(around, problem, found, posterior.structure, problem.prior.local(plan.view)):
        warnings.warn(text, LaplodeWarning, stacklevel=2)
    return posterior


def reassembled(posterior: Posterior, problem: Problem, curvature: AbstractCurvature) -> Posterior:
    """The same posterior of another likelihood or prior, with the curvature that goes with it."""
    return _assembled(
        posterior.flow, problem, posterior.method, curvature, *value_and_gradient(posterior.flow, problem)
    )


def curvature_again(posterior: Posterior, problem: Problem) -> AbstractCurvature:
    """The curvature of another problem at the posterior's mean, of the same kind as the posterior's own."""
    method = posterior.method
    structure = choose("structure", method.structure, {s.name: s for s in _STRUCTURES})
    return _curvature(method.curvature, structure)(posterior.flow, problem, method, Work(progress=False))


def _assembled(
    around: AbstractFlow,
    problem: Problem,
    method: Method,
    found: AbstractCurvature,
    nll: Float[Array, ""],
    nll_gradient: Float[Array, " P"],
) -> Posterior:
    view = around.parameters
    prior = problem.prior.local(view)
    rows = prior.rows
    regularize = Regularize(method.regularization, _REGULARIZATIONS[method.regularization])
    structure = choose("structure", method.structure, {s.name: s for s in _STRUCTURES})
    inert = _inert(found, nll_gradient, view)
    beside = found
    if np.any(prior.deficit):
        beside = lessened(found, structure.name, prior.deficit, [leaf[2:] for leaf in view.leaves])
    if rows.shape[0]:
        if isinstance(beside, FactoredCurvature) and method.rank is not None:  # that of these data alone
            structured = LowRankPrecision(beside.factor, beside.weights, prior.precision, method.rank)
            leading = structured.split(prior.precision)[1]
            beside = FactoredCurvature(leading, jnp.ones(len(leading)))
        beside = with_rows(beside, rows)
    built = structure.build(beside, prior.precision, regularize, _sizes(view, problem, method.rank))
    gradient_norm, decrement, dof = _summary(built.structure, prior, nll_gradient)
    diagnostics = Diagnostics(
        num_parameters=view.size,
        num_observations=problem.num_observations,
        symmetry_defect=_symmetry_defect(found),
        eigenvalue_min=built.eigenvalue_min,
        eigenvalue_max=built.eigenvalue_max,
        condition_number=built.condition_number,
        num_negative=built.num_negative,
        regularized=built.regularized,
        gradient_norm=float(gradient_norm),
        newton_decrement=float(decrement),
        effective_dof=float(dof),
        inert=inert,
    )
    log_joint = prior.log_density - nll
    posterior = Posterior(view, problem, around, found, built.structure, log_joint, diagnostics, method)  # pyright: ignore[reportCallIssue]
    return posterior


@eqx.filter_jit
def _summary(structure: AbstractStructure, prior: LocalPrior, nll_gradient: Float[Array, " P"]):
    """‖gradient‖, the Newton decrement and the effective degrees of freedom."""
    gradient = nll_gradient + prior.gradient
    # A prior that bends upward has no precision of which the data could take over a part.
    dof = structure.effective_dof(jnp.maximum(prior.diagonal, 0))
    dof -= jnp.sum(prior.rows * structure.covariance_product(prior.rows))
    return jnp.linalg.norm(gradient), 0.5 * gradient @ structure.covariance_product(gradient), dof


def _check_rows(method: Method, devices: Mesh | None, checkpoint: Path | None) -> None:
    """Raise `LaplodeError` where the curvature is not made row by row, and something was asked that needs rows."""
    by_rows = method.curvature == "hessian" and method.structure != "low_rank" and method.num_probes is None
    exact = 'curvature="hessian" and structure="full", "block_diagonal" or "diagonal", whose rows come one by one'
    if devices is not None and method.curvature == "hessian" and not by_rows:
        raise LaplodeError(
            f'`mesh` goes with {exact}, and with "ggn" and "fisher"; of this Hessian each product waits for the one '
            "before."
        )
    if checkpoint is None:
        return
    check_path("checkpoint", checkpoint)
    if not by_rows:
        raise LaplodeError(f"`checkpoint` goes with {exact}; what you ask for is done in one go.")
    if devices is not None and jax.process_count() > 1:
        raise LaplodeError(
            "`checkpoint` is a file of one process, and `mesh` spreads the rows over several: leave it out."
        )


def _checkpoint(
    path: Path, around: AbstractFlow, problem: Problem, nll: Array, method: Method, devices: int
) -> Checkpoint:
    # Code is told by its names, and by the value that it gives.
    arguments = {
        "`model` or `where` (or the machine, or a version of JAX or Diffrax)": around,
        "code of the model or the likelihood, or `problem`": (problem, nll),
        "`structure`, `batch_size` or `mesh`": (method.structure, method.batch_size, devices),
    }
    return Checkpoint(path, "laplace", arguments)


# ---- Checks on what was found


def _check_finite(nll: Array, gradient: Array, around: AbstractFlow, problem: Problem) -> None:
    if np.isfinite(nll) and np.all(np.isfinite(gradient)):
        return
    predictions = evaluate(around, around.parameters.vector)
    # Traced, a distribution does not refuse what is looked for here.
    log_prob = eqx.filter_jit(problem.likelihood.log_prob)(predictions, problem.ys)
    bad = np.argwhere(~np.isfinite(log_prob))
    if bad.size:
        i, t, k = (int(j) for j in bad[0])
        raise LaplodeError(
            f"`model` gives trajectory {i}, channel {k} a log-likelihood of {float(log_prob[i, t, k])} at time "
            f"{float(problem.data.ts[i, t]):g}, where it predicts {float(predictions[i, t, k]):g} and "
            f"{problem.data.ys[i, t, k]:g} was observed. LogNormal and Poisson likelihoods want positive predictions."
        )
    raise LaplodeError("The gradient of the log-likelihood at `model` is not finite, though its value is.")


def _inert(found: AbstractCurvature, gradient: Array, view: Parameters) -> tuple[str, ...]:
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
        verdict = (
            "The prior makes up for them, so that the model is at a minimum all the same, where "
            'regularization="none" leaves the exact Laplace approximation.'
            if diagnostics.eigenvalue_min > 0
            else 'The model is not at a minimum: call laplode.refine(model, problem) first, or take curvature="ggn".'
        )
        problems.append(
            f"The likelihood's exact Hessian has {diagnostics.num_negative} negative eigenvalues, regularized by "
            f"{diagnostics.regularized}. {verdict}"
        )
    if diagnostics.newton_decrement > 0.1:
        problems.append(
            f"The Newton decrement is {diagnostics.newton_decrement:.3g} nats, so about that much remains to be "
            "gained: the Gaussian sits beside the mode. Call laplode.refine(model, problem) first, and take its model."
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


def _symmetry_defect(found: AbstractCurvature) -> float:
    if isinstance(found, DenseCurvature):
        return found.symmetry_defect
    if isinstance(found, BlockCurvature):
        return max(block.symmetry_defect for block in found.blocks)
    return 0.0

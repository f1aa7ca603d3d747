"""Curvature and prior in, posterior out."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from .._algebra.build import built
from .._algebra.forms import AbstractForm
from .._algebra.precision import AbstractPrecision
from .._algebra.regularization import REGULARIZATIONS, AbstractRegularization
from .._algebra.structure import AbstractCurvature, AbstractStructure
from .._curvature.hessian import Work
from .._curvature.solver_error import solver_problems
from .._curvature.strategies import At
from .._devices import check_mesh, num_devices
from .._errors import LaplodeError, strategy, warn
from .._files import Checkpoint, Path, check_path
from .._model.parameters import Parameters, Where
from .._problem.prior import LocalPrior
from .._problem.problem import Problem
from .._progress import tqdm
from .._solve.finite import check_finite
from .._solve.flows import AbstractFlow
from .._solve.frozen import check_influence, unfrozen
from .._solve.maps import flow, linearize
from .._solve.objective import is_small, value_and_gradient
from .edge import at_edge
from .estimate import estimated, planned
from .posterior import Diagnostics, Posterior


def laplace(
    model: Any,
    problem: Problem,
    *,
    curvature: str | AbstractCurvature = "hessian",
    structure: str | AbstractStructure = "full",
    regularization: str | AbstractRegularization = "clip",
    where: Where = None,
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
        (empirical), or `Hessian`, `GaussNewton`, `EmpiricalFisher` with options of their own.
    - `structure`: of Λ: "full" (P × P); "low_rank" (nothing P × P: exact for "ggn" and "fisher", the leading eigenpairs
        for "hessian"); "block_diagonal" (a block for each leaf of the model); "diagonal". Or `Full`, `LowRank`,
        `BlockDiagonal`, `Diagonal`.
    - `regularization`: what becomes of a Λ that is not positive definite, as that of the exact Hessian may be away from
        a minimum: "clip" (negative eigenvalues of the likelihood's curvature become 0, which leaves the prior in
        charge), "abs", "jitter" (the whole spectrum is raised) or "none" (an error). Or `Clip`, `Abs`, `Jitter`,
        `Refuse`. While Λ is positive definite nothing is changed. Eigenvalues are those in the metric of the prior.
        Where the prior is the posterior of other data, what these say counts as curvature too, as it would if all data
        had come at once.
    - `where`: the parameters to infer, all by default: a function that picks nodes of the model, as in
        `where=lambda m: m.vector_field.layers[-1]`, or a pytree of True and False. The others stay fixed.
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
    plan = planned(model, problem, curvature, structure, where)
    problem = plan.problem
    regularize = strategy("regularization", regularization, AbstractRegularization, REGULARIZATIONS)
    plan.structure.check(plan.curvature, regularize)
    devices = check_mesh(mesh)
    _check_checkpoint(checkpoint, devices)
    around = flow(plan.view, problem.data.ts, problem.data.y0, problem.data.args, seen=problem.seen)
    known, value = _first_order(around, problem, plan.curvature, devices)
    check_finite(np.append(*value), around, problem)
    inferred = unfrozen(around, problem, value[1])
    if inferred is not around:
        around = inferred
        known, value = _first_order(around, problem, plan.curvature, devices)
    if progress:
        tqdm.write(str(estimated(plan, around, problem)))
    strategies = (plan.curvature, plan.structure, regularize)
    saved = None
    if checkpoint is not None:
        saved = _checkpoint(checkpoint, around, problem, value[0], strategies[:2], num_devices(devices))
    form = plan.structure.form(plan.curvature, At(around, problem, Work(progress, devices, saved), known))
    posterior = _assembled(around, problem, form, strategies, *value)
    _warn(posterior)
    prior = problem.prior.local(around.parameters)
    for text in solver_problems(around, problem, form, posterior.built, prior, known):
        warn(text)
    return posterior


def _first_order(around: AbstractFlow, problem: Problem, curvature: AbstractCurvature, devices: Mesh | None):
    """Predictions and Jacobian, if the curvature is made of it or it costs little; −log p(Y | θ) and its gradient."""
    wanted = not curvature.signed or is_small(around, problem)
    known = linearize(around, mesh=devices) if wanted else None
    return known, value_and_gradient(around, problem, known)


def reassembled(posterior: Posterior, problem: Problem, form: AbstractForm) -> Posterior:
    """The same posterior of another likelihood or prior, with the curvature that goes with it."""
    strategies = (posterior.curvature, posterior.structure, posterior.regularization)
    return _assembled(posterior.flow, problem, form, strategies, *value_and_gradient(posterior.flow, problem))


def _assembled(
    around: AbstractFlow,
    problem: Problem,
    form: AbstractForm,
    strategies: tuple[AbstractCurvature, AbstractStructure, AbstractRegularization],
    nll: Float[Array, ""],
    nll_gradient: Float[Array, " P"],
) -> Posterior:
    view = around.parameters
    prior = problem.prior.local(view)
    influence = np.asarray(form.influence())
    check_finite(influence, around, problem)
    inert = _inert(influence, nll_gradient, view)
    curvature, structure, regularization = strategies
    found = built(structure, form, prior, regularization)
    precision = found.built.precision
    gradient_norm, decrement, dof = _summary(precision, prior, nll_gradient)
    against = np.minimum(found.built.after, 0)  # such directions the data do not determine, nor less than that
    dof -= np.sum(against / (1 + against))
    diagnostics = Diagnostics(
        num_parameters=view.size,
        num_observations=problem.num_observations,
        symmetry_defect=form.symmetry_defect,
        **found.spectrum._asdict(),
        gradient_norm=float(gradient_norm),
        newton_decrement=float(decrement),
        effective_dof=float(dof),
        inert=inert,
    )
    log_joint = prior.normalized - nll
    return Posterior(
        view, problem, around, form, precision, log_joint, diagnostics, curvature, structure, regularization
    )  # pyright: ignore[reportCallIssue]


@eqx.filter_jit
def _summary(precision: AbstractPrecision, prior: LocalPrior, nll_gradient: Float[Array, " P"]):
    """‖gradient‖, the Newton decrement and the effective degrees of freedom."""
    gradient = nll_gradient + prior.gradient
    # A prior that bends upward has no precision of which the data could take over a part.
    dof = precision.effective_dof(jnp.maximum(prior.diagonal, 0))
    dof -= jnp.sum(prior.rows * precision.covariance_product(prior.rows))
    return jnp.linalg.norm(gradient), 0.5 * precision.inverse_quadratic(gradient), dof


def _check_checkpoint(checkpoint: Any, devices: Mesh | None) -> None:
    if checkpoint is None:
        return
    check_path("checkpoint", checkpoint)
    if devices is not None and jax.process_count() > 1:
        raise LaplodeError(
            "`checkpoint` is a file of one process, and `mesh` spreads the rows over several: leave it out."
        )


def _checkpoint(
    path: Path, around: AbstractFlow, problem: Problem, nll: Array, strategies: tuple[Any, Any], devices: int
) -> Checkpoint:
    # Code is told by its names, and by the value that it gives.
    arguments = {
        "`model` or `where` (or the machine, or a version of JAX or Diffrax)": around,
        "code of the model or the likelihood, or `problem`": (problem, nll),
        "`structure`, `curvature` or `mesh`": (*strategies, devices),
    }
    return Checkpoint(path, "laplace", arguments)


# ---- Checks on what was found


def _inert(influence: Float[np.ndarray, " P"], gradient: Array, view: Parameters) -> tuple[str, ...]:
    # Far below rounding: what is left by an exact zero, not a weak dependence.
    threshold = np.finfo(float).eps ** 2 * influence.max()
    without = np.flatnonzero((influence <= threshold) & (np.asarray(gradient) == 0))
    if without.size == view.size:
        check_influence(0)
    return view.names(without)


# The part of a variance that may be rounding without a word.
_MOST_ROUNDING = 1e-3


def _warn(posterior: Posterior) -> None:
    diagnostics, view, problems = posterior.diagnostics, posterior.parameters, []
    if diagnostics.regularized is not None:
        problems.append(
            f"The precision is not positive definite: the likelihood's exact Hessian has {diagnostics.num_negative} "
            f"negative eigenvalues, regularized by {diagnostics.regularized}. The model is not at a minimum: take "
            'that of laplode.refine(model, problem), or curvature="ggn".'
            if diagnostics.eigenvalue_min <= 0
            else f"The likelihood's exact Hessian has {diagnostics.num_negative} negative eigenvalues, regularized by "
            f"{diagnostics.regularized}, though the prior makes up for them: the model is at a minimum all the same. "
            "laplode.profile(posterior, name) does without a curvature."
        )
    rounding = float(posterior.built.rounding)
    if rounding > _MOST_ROUNDING:
        problems.append(
            f"The data are so strong beside the prior that rounding may be a part of {rounding:.1g} of the smallest "
            f'variances of structure="{posterior.structure.name}". Take structure="full".'
        )
    rounding = posterior.size * np.finfo(float).eps * diagnostics.condition_number
    if posterior.curvature.signed and posterior.structure.whole and rounding > _MOST_ROUNDING:
        problems.append(
            f"The eigenvalues of the precision lie far apart (condition number {diagnostics.condition_number:.1g}): "
            f"rounding in the exact Hessian may be a part of {min(rounding, 1):.1g} of the largest variances. Take "
            'curvature="ggn", whose root is known, a larger prior precision, or other coordinates: where a layer is '
            "normalized, a prior pulls its scale to 0 forever."
        )
    if diagnostics.newton_decrement > 0.1:
        problems.append(
            f"The Newton decrement is {diagnostics.newton_decrement:.3g} nats, so about that much remains to be "
            "gained: the Gaussian sits beside the mode. Take the model of fit = laplode.refine(model, problem); "
            "fit.reason says why, where it has not converged."
        )
    if diagnostics.symmetry_defect > 1e-8:
        problems.append(
            f"The Hessian was asymmetric by {diagnostics.symmetry_defect:.1e} (relative) before symmetrization, where "
            "1e-15 is usual: something in the model computes in less than float64, or is not smooth."
        )
    if any(transform is not None for transform in view.transforms):
        variance = posterior.built.variance()
        names = at_edge(view, variance, posterior.problem.prior.local(view).precision)
        if names:
            problems.append(
                f"Data and prior would have {', '.join(names)} at the edge of the support, or beyond: the "
                "transformation to unconstrained coordinates alone holds the optimum inside, so the Gaussian in these "
                "says little, and its interval never reaches the edge. Draws that are weighed show what is possible, "
                "laplode.predict(..., method=laplode.Sampled(df=5), resample=True), and so does laplode.profile; or "
                "leave the term out of the model."
            )
    if diagnostics.inert:
        problems.append(f"Parameters without any influence on the predictions: {', '.join(diagnostics.inert)}.")
    for problem in problems:
        warn(problem, level=3)

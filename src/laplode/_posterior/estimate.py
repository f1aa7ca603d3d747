"""What `laplace` is about to do, and what it would take."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .._algebra.build import Built, Sizes, build_block_diagonal, build_diagonal, build_full, build_low_rank
from .._algebra.forms import AbstractCurvature
from .._algebra.regularization import Regularize
from .._checks import check_count, check_key, check_x64
from .._curvature.gauss_newton import fisher, ggn
from .._curvature.hessian import (
    Work,
    hessian,
    hessian_blocks,
    hessian_diagonal,
    hessian_diagonal_stochastic,
    hessian_leading,
)
from .._devices import free_bytes
from .._errors import LaplodeError, choose
from .._model.given import with_given
from .._model.own import check_model
from .._model.parameters import Parameters, Where, parameters
from .._problem.problem import Problem, check_problem, check_scale
from .._solve.maps import AbstractFlow, flow
from .._solve.objective import value_and_gradient
from .posterior import Method

_CURVATURES = {"hessian": None, "ggn": ggn, "fisher": fisher}


# ---- Before anything long is done


@dataclasses.dataclass(frozen=True)
class _Structure:
    """A structure of Λ: its name, the form in which it wants the exact Hessian, the bytes it takes, how it is built."""

    name: str
    hessian: Callable[[AbstractFlow, Problem, Method, Work], AbstractCurvature]
    num_bytes: Callable[[Sizes, bool], int]
    build: Callable[[AbstractCurvature, Array, Regularize, Sizes], Built]


@dataclasses.dataclass(frozen=True)
class _Plan:
    view: Parameters
    problem: Problem
    curvature: Callable[[AbstractFlow, Problem, Method, Work], AbstractCurvature]
    curvature_name: str
    structure: _Structure
    sizes: Sizes
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What `laplace` is about to do.

    - `num_parameters` (P), `num_observations` (M), `num_states` (D, 0 if the model is not a `NeuralODE`),
        `num_trajectories` (N), `num_steps` (of the longest solve; 0 if the model is not a `NeuralODE`).
    - `route`: how derivatives are taken: "sensitivity", "jvp" or "vjp" for a Jacobian, "forward over reverse" for
        the exact Hessian.
    - `num_bytes`: the memory that the result and the work on it take, `free_bytes` what there is.
    - `seconds`: a rough time, without compilation.
    """

    num_parameters: int
    num_observations: int
    num_states: int
    num_trajectories: int
    num_steps: int
    curvature: str
    structure: str
    route: str
    num_bytes: int
    free_bytes: int
    seconds: float

    def __str__(self) -> str:
        states = f" of D = {self.num_states} states" if self.num_states else ""
        steps = f", at most {self.num_steps} steps" if self.num_steps else ""
        return (
            f"{self.curvature} by {self.route}, {self.structure}: P = {self.num_parameters}, M = "
            f"{self.num_observations}, {self.num_trajectories} trajectories{states}{steps}; "
            f"about {_in_units(self.num_bytes)} of {_in_units(self.free_bytes)} free, roughly {self.seconds:.1g} "
            "s and compilation"
        )


def estimate(
    model: Any,
    problem: Problem,
    *,
    curvature: str = "hessian",
    structure: str = "full",
    where: Where = None,
    rank: int | None = None,
    num_probes: int | None = None,
    key: PRNGKeyArray | None = None,
) -> Estimate:
    """What `laplace` would do with the same arguments, how much memory it would take, and roughly how long.

    **Arguments:** as for `laplace`.

    **Returns:** an `Estimate`.

    **Raises:** `LaplodeError` as `laplace` does, also when the result would not fit in memory.
    """
    method = Method(curvature, structure, "none", rank, num_probes, None, key)
    plan = _plan(model, problem, method, where)
    problem = plan.problem
    around = flow(plan.view, problem.data.ts, problem.data.y0, problem.data.args)
    return _estimate(plan, around, problem)


def _plan(model: Any, problem: Any, method: Method, where: Where) -> _Plan:
    check_x64()
    curvature, structure = method.curvature, method.structure
    factored = choose("curvature", curvature, _CURVATURES)
    chosen: _Structure = choose("structure", structure, {s.name: s for s in _STRUCTURES})
    check_problem(problem)
    check_scale(problem)
    for name in ("rank", "num_probes", "batch_size"):
        value = getattr(method, name)
        if value is not None:
            check_count(name, value)
    if method.rank is not None and chosen is not _LOW_RANK:
        raise LaplodeError(f'`rank` goes with structure="low_rank", not with structure="{structure}".')
    if method.num_probes is not None and (chosen is not _DIAGONAL or factored is not None):
        raise LaplodeError('`num_probes` goes with curvature="hessian" and structure="diagonal".')
    if method.num_probes is not None and method.key is None:
        raise LaplodeError("`key` is needed for random probes: key=jax.random.key(0).")
    if method.key is not None:
        check_key("key", method.key)
    model = check_model(model, problem)
    view = parameters(model, where, problem.prior)
    problem = with_given(view, problem)
    prior = problem.prior.local(view)
    deficit = np.flatnonzero(prior.deficit)
    if deficit.size and chosen is _LOW_RANK:
        raise LaplodeError(
            f'`structure`="low_rank" builds on a prior that is log-concave, and that of {view.name(int(deficit[0]))} '
            'bends upward at the fitted value, in its unconstrained coordinate. Take structure="full".'
        )
    sizes = _sizes(view, problem, method.rank)
    needed, free = chosen.num_bytes(sizes, factored is not None), free_bytes()
    if needed > free:
        fits = lambda s, is_factored: s.num_bytes(sizes, is_factored) <= free
        fitting = [s.name for s in _STRUCTURES if s is not chosen and fits(s, factored is not None)]
        remedy = " or ".join(f'structure="{name}"' for name in fitting)
        if factored is None and fits(_LOW_RANK, True):
            remedy = f'curvature="ggn" with structure="low_rank"{", or " if remedy else ""}{remedy}'
        matrix = f" (a P × P matrix alone has {_in_units(8 * view.size**2)})" if chosen is _FULL else ""
        raise LaplodeError(
            f'`structure`="{structure}" with curvature="{curvature}" needs about {_in_units(needed)} for P = '
            f"{view.size} parameters and M = {int(np.sum(problem.informed))} observations{matrix}, and "
            f"{_in_units(free)} are free. Take "
            f"{remedy + ', or ' if remedy else ''}a part of the parameters with `where` (the last layer, say)."
        )
    return _Plan(view, problem, _curvature(curvature, chosen), curvature, chosen, sizes, needed)


def _sizes(view: Parameters, problem: Problem, rank: int | None) -> Sizes:
    leaves = tuple(stop - start for _, _, start, stop in view.leaves)
    # Rows of the prior are kept like observations, and none is left out for a rank.
    num_rows = problem.prior.local(view).rows.shape[0]
    return Sizes(view.size, int(np.sum(problem.informed)) + num_rows, leaves, rank if rank is None else rank + num_rows)


def _curvature(name: str, structure: _Structure) -> Callable[[AbstractFlow, Problem, Method, Work], AbstractCurvature]:
    factored = _CURVATURES[name]
    if factored is None:
        return structure.hessian
    return lambda flow, problem, method, work: factored(flow, problem, work.mesh)


def _estimate(plan: _Plan, around: AbstractFlow, problem: Problem) -> Estimate:
    theta = plan.view.vector
    size, num = theta.size, around.num_trajectories
    jax.block_until_ready(value_and_gradient(around, problem))
    start = time.perf_counter()
    jax.block_until_ready(value_and_gradient(around, problem))
    gradient_seconds = time.perf_counter() - start
    if plan.curvature_name == "hessian":
        route = "forward over reverse"
        seconds = gradient_seconds * size  # many at once, each a few times a gradient
    else:
        route = around.jacobian_route()
        # Sensitivities stream through memory; automatic differentiation repeats the solve.
        rows = num * (around.num_steps * around.num_states + math.prod(problem.data.ys.shape[1:]))
        seconds = {
            "sensitivity": 8 * rows * size / 5e8,
            "jvp": gradient_seconds * size,
            "vjp": gradient_seconds * problem.data.ys.size,
        }[route]
    if plan.structure is _FULL:
        seconds += size**3 / 2e9
    return Estimate(
        num_parameters=size,
        num_observations=problem.num_observations,
        num_states=around.num_states,
        num_trajectories=num,
        num_steps=around.num_steps,
        curvature=plan.curvature_name,
        structure=plan.structure.name,
        route=route,
        num_bytes=plan.num_bytes,
        free_bytes=free_bytes(),
        seconds=seconds,
    )


def _in_units(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"


# ---- What each structure is made of


def _leading(around: AbstractFlow, problem: Problem, method: Method, work: Work) -> AbstractCurvature:
    return hessian_leading(around, problem, rank=min(method.rank or _DEFAULT_RANK, around.parameters.size))


def _diagonal(around: AbstractFlow, problem: Problem, method: Method, work: Work) -> AbstractCurvature:
    if method.num_probes is None:
        return hessian_diagonal(around, problem, batch_size=method.batch_size, work=work)
    assert method.key is not None
    return hessian_diagonal_stochastic(around, problem, num_probes=method.num_probes, key=method.key)


# Leading eigenpairs of the exact Hessian that structure="low_rank" keeps by default.
_DEFAULT_RANK = 100


_FULL = _Structure(
    name="full",
    hessian=lambda flow, problem, method, work: hessian(flow, problem, batch_size=method.batch_size, work=work),
    # The curvature, its eigenvectors, the precision and its factor.
    num_bytes=lambda sizes, factored: _factor_bytes(sizes, factored) + 4 * 8 * sizes.parameters**2,
    build=build_full,
)


_LOW_RANK = _Structure(
    name="low_rank",
    hessian=_leading,
    num_bytes=lambda sizes, factored: _low_rank_bytes(sizes, factored),
    build=build_low_rank,
)


_BLOCK_DIAGONAL = _Structure(
    name="block_diagonal",
    hessian=lambda flow, problem, method, work: hessian_blocks(flow, problem, batch_size=method.batch_size, work=work),
    num_bytes=lambda sizes, factored: _factor_bytes(sizes, factored) + 4 * 8 * sum(size**2 for size in sizes.leaves),
    build=build_block_diagonal,
)


_DIAGONAL = _Structure(
    name="diagonal",
    hessian=_diagonal,
    num_bytes=lambda sizes, factored: _factor_bytes(sizes, factored) + 8 * 8 * sizes.parameters,
    build=build_diagonal,
)


_STRUCTURES = (_FULL, _LOW_RANK, _BLOCK_DIAGONAL, _DIAGONAL)


def _factor_bytes(sizes: Sizes, factored: bool) -> int:
    return 8 * sizes.parameters * sizes.observations if factored else 0


def _low_rank_bytes(sizes: Sizes, factored: bool) -> int:
    if not factored:
        return 3 * 8 * sizes.parameters * min(sizes.parameters, 2 * (sizes.rank or _DEFAULT_RANK) + 10)
    if sizes.observations <= sizes.parameters:
        return _factor_bytes(sizes, True) + 4 * 8 * sizes.observations**2
    return 2 * _factor_bytes(sizes, True) + 4 * 8 * sizes.parameters**2

"""What `laplace` is about to do, and what it would take."""

import math
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from .._algebra.structure import STRUCTURES, AbstractCurvature, AbstractStructure, Sizes
from .._checks import check_x64
from .._curvature.strategies import CURVATURES
from .._devices import free_bytes
from .._errors import LaplodeError, strategy
from .._model.given import taken
from .._model.parameters import Parameters, Where
from .._problem.problem import Problem
from .._show import Shown, rows
from .._solve.flows import AbstractFlow
from .._solve.maps import flow
from .._solve.objective import value_and_gradient


class Plan(NamedTuple):
    """The arguments of `laplace` as objects, checked."""

    view: Parameters
    problem: Problem
    curvature: AbstractCurvature
    structure: AbstractStructure
    num_bytes: int


class Estimate(Shown):
    """What `laplace` is about to do.

    - `num_parameters` (P), `num_observations` (M), `num_states` (D, 0 if the model is not a `NeuralODE`),
        `num_trajectories` (N), `num_steps` (of the longest solve; 0 if the model is not a `NeuralODE`).
    - `route`: how derivatives are taken: "sensitivity", "jvp" or "vjp" for a Jacobian, "forward over reverse" for
        the exact Hessian.
    - `num_bytes`: the memory that the result and the work on it take, `free_bytes` what there is.
    - `seconds`: a rough time, without compilation; None where nothing was timed.
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
    seconds: float | None

    def _shown(self):
        states = f" of D = {self.num_states} states" if self.num_states else ""
        steps = f", at most {self.num_steps} steps" if self.num_steps else ""
        named = {
            "curvature": f"{self.curvature} by {self.route}, {self.structure}",
            "sizes": f"P = {self.num_parameters}, M = {self.num_observations}, {self.num_trajectories} trajectories"
            f"{states}{steps}",
            "memory": f"about {_in_units(self.num_bytes)} of {_in_units(self.free_bytes)} free",
        }
        if self.seconds is not None:
            named["time"] = f"roughly {self.seconds:.1g} s, and compilation"
        return rows(named, "Estimate")


def estimate(
    model: Any,
    problem: Problem,
    *,
    curvature: str | AbstractCurvature = "hessian",
    structure: str | AbstractStructure = "full",
    where: Where = None,
) -> Estimate:
    """What `laplace` would do with the same arguments, how much memory it would take, and roughly how long.

    **Arguments:** as for `laplace`.

    **Returns:** an `Estimate`.

    **Raises:** `LaplodeError` as `laplace` does, also when the result would not fit in memory.
    """
    plan = planned(model, problem, curvature, structure, where)
    problem = plan.problem
    around = flow(plan.view, problem.data.ts, problem.data.y0, problem.data.args, seen=problem.seen)
    jax.block_until_ready(value_and_gradient(around, problem))
    start = time.perf_counter()
    jax.block_until_ready(value_and_gradient(around, problem))
    return estimated(plan, around, problem, time.perf_counter() - start)


def planned(model: Any, problem: Any, curvature: Any, structure: Any, where: Any) -> Plan:
    """What is asked for as objects; raises `LaplodeError` where it can't be done."""
    check_x64()
    curvature = strategy("curvature", curvature, AbstractCurvature, CURVATURES)
    structure = strategy("structure", structure, AbstractStructure, STRUCTURES)
    view, problem = taken(model, problem, where)
    local = problem.prior.local(view)
    structure.check_prior(local, view.names)
    leaves = tuple(stop - start for _, _, start, stop in view.leaves)
    num_rows = local.rows.shape[0]
    sizes = Sizes(view.size, int(np.sum(problem.informed)) + num_rows, num_rows, leaves)
    needed = structure.num_bytes(sizes, curvature.signed)
    if needed > free_bytes():
        raise _too_large(curvature, structure, sizes, needed, free_bytes())
    return Plan(view, problem, curvature, structure, needed)


def _too_large(
    curvature: AbstractCurvature, structure: AbstractStructure, sizes: Sizes, needed: int, free: int
) -> LaplodeError:
    """The refusal, which names all that would fit."""
    ways = [
        (name, make.name)
        for make in STRUCTURES.values()
        for name in dict.fromkeys((curvature.name, "ggn"))
        if make().num_bytes(sizes, CURVATURES[name].signed) <= free
    ]
    remedy = [
        f'structure="{structure}"' if name == curvature.name else f'curvature="{name}" with structure="{structure}"'
        for name, structure in ways
    ]
    whole = f" (a P × P matrix alone has {_in_units(8 * sizes.parameters**2)})" if structure.whole else ""
    return LaplodeError(
        f'`structure`="{structure.name}" with curvature="{curvature.name}" needs about {_in_units(needed)} for P = '
        f"{sizes.parameters} parameters and M = {sizes.rows - sizes.prior_rows} observations{whole}, and "
        f"{_in_units(free)} are free. Take {', or '.join([*remedy, ''])}a part of the parameters with `where` (the "
        "last layer, say)."
    )


def estimated(plan: Plan, around: AbstractFlow, problem: Problem, gradient_seconds: float | None = None) -> Estimate:
    """The estimate; without a time, if it is not known what a gradient takes."""
    size, num = plan.view.size, around.num_trajectories
    route = "forward over reverse" if plan.curvature.signed else around.jacobian_route()
    seconds = None
    if gradient_seconds is not None:
        # Sensitivities stream through memory; automatic differentiation repeats the solve.
        rows = num * (around.num_steps * around.num_states + math.prod(problem.data.ys.shape[1:]))
        seconds = {
            "forward over reverse": gradient_seconds * size,  # many at once, each a few times a gradient
            "sensitivity": 8 * rows * size / 5e8,
            "jvp": gradient_seconds * size,
            "vjp": gradient_seconds * problem.data.ys.size,
        }[route] + (size**3 / 2e9 if plan.structure.whole else 0)
    return Estimate(
        num_parameters=size,
        num_observations=problem.num_observations,
        num_states=around.num_states,
        num_trajectories=num,
        num_steps=around.num_steps,
        curvature=plan.curvature.name,
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

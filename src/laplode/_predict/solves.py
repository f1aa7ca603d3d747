"""Solves at many parameter vectors, in batches."""

import contextlib
import functools as ft
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from .._devices import compiled, num_devices, over_rows
from .._errors import LaplodeError
from .._model.neural_ode import starts
from .._model.own import predict_trajectories
from .._model.parameters import Parameters
from .._posterior.posterior import Posterior
from .._problem.problem import Problem
from .._progress import tqdm
from .._solve import objective

# Samples solved together: enough to fill the processor, few enough that a slow one holds up few others.
_BATCH = 64


def _solve(view: Parameters, ts, y0, args, theta: Float[Array, " P"]) -> Float[Array, "N T K"]:
    model = view.unravel(theta)
    return predict_trajectories(model, ts, starts(model, y0, len(ts)), args)


def solve_at(
    posterior: Posterior,
    ts,
    y0,
    args,
    thetas: Float[Array, "B P"],
    mesh: Mesh | None = None,
    *,
    states: Float[Array, "B N D"] | None = None,
) -> Float[Array, "B N T K"]:
    """Predictions by a solve of its own for each parameter vector; not finite where it failed.

    Solves begin at `y0`, or each at its own of the `states`.
    """
    # Not of the whole posterior, whose diagnostics are numbers of its own: each would be compiled anew.
    return over_rows(mesh, _solve_at, (posterior.parameters, ts, y0, args), (thetas, states))[0]


@compiled
def _solve_at(shared: tuple[Parameters, Any, Any, Any], rows: tuple[Array, Array | None], _):
    view, ts, y0, args = shared
    one = lambda theta, state: _solve(view, ts, y0 if state is None else state, args, theta)
    return jax.vmap(one)(*rows), ()


@contextlib.contextmanager
def advice():
    """What to do about a model that raises at a draw."""
    try:
        yield
    except eqx.EquinoxRuntimeError as error:
        said = re.search(r"EquinoxRuntimeError: (.*)", str(error))
        raise LaplodeError(
            "`model` raised while solving at a draw from the posterior, which wanders further than a fit does. Let it "
            "return what it has instead, diffrax.diffeqsolve(..., throw=False), so that failed draws can be "
            'counted; or predict with method="linearized" and weigh=False, which solves at the posterior mean only. It '
            "said: "
            f"{said.group(1) if said else error}"
        ) from error


def in_batches(function: Callable[[Any], Array], rows: PyTree, label: str | None, mesh: Mesh | None = None) -> Array:
    """The function of all rows, some at a time: as many on each device of the `mesh` that it spreads them over."""
    num = len(jax.tree.leaves(rows)[0])
    batch = min(_BATCH * num_devices(mesh), num)
    results = []
    with advice(), tqdm(total=num, desc=label, unit="draw", disable=label is None) as bar:
        for start in range(0, num, batch):
            first = min(start, num - batch)  # one compiled shape for all
            some = jax.tree.map(lambda x, first=first: x[first : first + batch], rows)
            results.append(function(some)[start - first :])
            bar.update(first + batch - start)
    return jnp.concatenate(results)


def log_joint(
    posterior: Posterior, thetas: Float[Array, "S P"], *, progress: bool = False, mesh: Mesh | None = None
) -> Float[Array, " S"]:
    """log p(Y, θ) = log p(Y | θ) + log p(θ) of each parameter vector, in nats; −∞ where its solve failed."""
    data = posterior.problem.data

    def at(thetas):
        predictions = solve_at(posterior, data.ts, data.y0, data.args, thetas, mesh)
        total = jax.vmap(ft.partial(objective.log_joint, posterior.problem, posterior.parameters))(thetas, predictions)
        return jnp.where(jnp.isfinite(total), total, -jnp.inf)

    return in_batches(at, thetas, "Weighing draws" if progress else None, mesh)


def log_joint_at(problem: Problem, view: Parameters, theta: Float[Array, " P"]) -> Float[Array, ""]:
    """The same of one parameter vector, for transformations, reverse mode too; not finite where its solve failed."""
    data = problem.data
    return objective.log_joint(problem, view, theta, _solve(view, data.ts, data.y0, data.args, theta))

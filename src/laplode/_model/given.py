"""Which values of the first row the initial states fix, so that they are no observations."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._checks import in_float
from .._problem.problem import Problem, check_problem, check_scale
from .neural_ode import NeuralODE, starts
from .own import check_model, predict_trajectories
from .parameters import Parameters, parameters

# Values this many roundings apart are the same: a solver may interpolate its first value.
_ROUNDINGS = 8
# How far parameters are moved to see whether a prediction moves with them.
_MOVE = 2.0**-20


def taken(model: Any, problem: Any, where: Any, *, scale_found: bool = True) -> tuple[Parameters, Problem]:
    """A model and a problem as each stage takes them: the selected parameters, and the problem by `with_given`.

    **Raises:** `LaplodeError` when they do not fit, or a noise scale that should be found is still to be learned.
    """
    check_problem(problem)
    if scale_found:
        check_scale(problem)
    view = parameters(check_model(model, problem), where, problem.prior)
    return view, with_given(view, problem)


def with_given(view: Parameters, problem: Problem) -> Problem:
    """The problem, with those values of the first row marked that the model meets exactly, whatever its parameters are.

    They are found by prediction: the value at the first time is the one in the data, and stays so when all parameters
    move. The first row of a `NeuralODE` takes no solve.
    """
    ys = problem.data.ys[:, 0]
    theta = view.vector
    moved = theta + _MOVE * jnp.where(theta == 0, 1.0, theta)
    given = ~np.isnan(ys) & _meets(view.model, problem, ys)
    if np.any(given):
        given &= _meets(view.unravel(moved), problem, ys)
    return eqx.tree_at(lambda p: p.given, problem, given)


def _meets(model: Any, problem: Problem, ys: Float[np.ndarray, "N K"]) -> Bool[np.ndarray, "N K"]:
    data = problem.data
    inputs = in_float((data.ts, starts(model, data.y0, len(data.ts)), data.args))
    try:
        predicted = np.asarray(_first_row(model, *inputs))[:, : ys.shape[1]]
    except Exception:  # A model that fails here is met by the stage that needs its values, which says so.
        return np.zeros(ys.shape, bool)
    return np.abs(predicted - ys) <= _ROUNDINGS * np.finfo(predicted.dtype).eps * np.abs(ys)


def _first_row(model: Any, ts, y0, args) -> Float[Array, "N F"]:
    if isinstance(model, NeuralODE):
        return _observed_at_start(model, y0, args, len(ts))
    return predict_trajectories(model, ts, y0, args)[:, 0]


@eqx.filter_jit
def _observed_at_start(model: NeuralODE, y0, args, num: int) -> Float[Array, "N F"]:
    one = lambda y0, args: model.observe_states(model.initial_state(y0, args)[None], args)[0]
    return jax.vmap(one, axis_size=num)(y0, args)

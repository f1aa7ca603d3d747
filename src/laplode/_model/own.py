"""How any model is called, and the check that it fits the data."""

import functools as ft
import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import in_float
from .._errors import LaplodeError
from .._problem.problem import Problem
from .neural_ode import NeuralODE, starts


def predict_trajectory(model: Callable, ts, y0, args, dtype: Any = float) -> Float[Array, "T F"]:
    """Call any model on one trajectory; failed solves of a `NeuralODE` come back as infinities.

    A foreign model is called as `(ts, y0, args)`, or `(ts, y0)` when it takes no third positional argument,
    with times and states of `dtype`.
    """
    if isinstance(model, NeuralODE):
        return model(ts, y0, args, throw=False)
    ts = jnp.asarray(ts, dtype=dtype)
    y0 = None if y0 is None else jnp.asarray(y0, dtype=dtype)
    try:
        inspect.signature(model).bind(ts, y0, args)
    except TypeError:
        if args is not None:
            raise LaplodeError(
                "`args` is given with the data, but the model can't be called as (ts, y0, args)."
            ) from None
        return model(ts, y0)
    return model(ts, y0, args)


@eqx.filter_jit
def predict_trajectories(model: Callable, ts, y0, args) -> Float[Array, "N T F"]:
    """The same of several, each along the first axis.

    Compiled for itself, so that a solve is traced once, and not in all that is made of it.
    """
    return jax.vmap(ft.partial(predict_trajectory, model))(ts, y0, args)


def predicted_shape(model: Any, ts, y0, args) -> tuple[int, ...]:
    """The shape of a model's predictions of one trajectory, without a solve; raises what the model raises."""
    inputs = in_float((ts, starts(model, y0, len(ts)), args))
    function = _at_start if isinstance(model, NeuralODE) else predict_trajectories
    return eqx.filter_eval_shape(function, in_float(model), *inputs).shape[1:]


def _at_start(model: NeuralODE, ts, y0, args) -> Float[Array, "N T F"]:
    """What a model would predict if its states stayed as they are, after a look at the vector field."""

    def one(ts, y0, args):
        state = model.initial_state(y0)
        slope = model.vector_field(ts[0], state, args)
        if jnp.shape(slope) != state.shape:
            raise ValueError(f"the vector field returns shape {jnp.shape(slope)} for a state of shape {state.shape}")
        return model.observe_states(jnp.broadcast_to(state, (ts.size, *state.shape)), args)

    return jax.vmap(one)(ts, y0, args)


def check_model(model: Any, problem: Problem) -> None:
    """Raise `LaplodeError` unless `model` is an `eqx.Module` whose predictions fit the shapes of the data."""
    data = problem.data
    if not isinstance(model, eqx.Module) or not callable(model):
        raise LaplodeError(
            f"`model` must be a callable eqx.Module, (ts, y0, args) -> (T, K); got {type(model).__name__}. Wrap a "
            "vector field as laplode.NeuralODE(vector_field)."
        )
    numbers = starts(model, data.y0, len(data.ts))
    if numbers is not data.y0 and len(model.y0) != len(data.ts):  # pyright: ignore[reportAttributeAccessIssue]
        raise LaplodeError(
            f"`y0` of the model holds {len(model.y0)} initial states, but the data has N = "  # pyright: ignore[reportAttributeAccessIssue]
            f"{len(data.ts)} trajectories: give one for each, or one of shape (D,) for all."
        )
    try:
        # A foreign model may have its own initial state; if it hasn't, its first use of None shows here.
        shape = predicted_shape(model, data.ts, data.y0, data.args)
    except LaplodeError:
        raise
    except Exception as error:
        y0_shape = None if data.y0 is None else data.y0.shape[1:]
        raise LaplodeError(
            f"`model` can't be evaluated on a trajectory with ts of shape {data.ts.shape[1:]}, y0 of shape {y0_shape} "
            f"and the args given: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    if shape == problem.prediction_shape:
        return
    channels = data.ys.shape[2]
    if shape == (data.ys.shape[1], 2 * channels):
        remedy = "It seems to predict noise scales too, and the likelihood has one: leave that out, as in Gaussian()."
    elif problem.prediction_shape[1] == 2 * channels:
        remedy = (
            "A likelihood without a scale wants locations and the logarithms of scales, 2K numbers at each time: let "
            "the model predict them, NeuralODE(..., scale=first_guess), or give the likelihood a scale."
        )
    else:
        remedy = "If the states are not what is observed, give NeuralODE an `observe`."
    raise LaplodeError(
        f"`model` and `ys` disagree: for one trajectory the model predicts shape {shape}, but the observations have "
        f"shape (T, K) = {data.ys.shape[1:]} and the likelihood takes predictions of shape {problem.prediction_shape}. "
        + remedy
    )

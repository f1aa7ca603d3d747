"""The contract of someone's own model: how it is called, and the check that it fits the data."""

import functools as ft
import inspect
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import in_float
from .._errors import LaplodeError
from .._problem.data import Trajectories
from .._problem.problem import Problem
from .neural_ode import NeuralODE, starts

_Jitted = type(eqx.filter_jit(lambda: None))

# Words in the name of a parameter that takes the times, and names of one that takes the initial state.
TIMES = {"t", "ts", "time", "times", "timepoints", "tspan", "saveat"}
_STATES = {"y0", "x0", "u0", "z0", "ys0", "init", "initial_state"}
# Names of a third parameter that does not take args.
_NO_ARGS = {"key", "inference", "training", "train", "deterministic", "throw", "unroll", "dt0", "max_steps"}


def unwrapped(model: Any) -> Any:
    """The model that `eqx.filter_jit` was applied to, so that its parameters have their own names."""
    while isinstance(model, _Jitted):  # pyright: ignore[reportArgumentType]
        model = model.__wrapped__  # pyright: ignore[reportAttributeAccessIssue]
    return model


def _positional(model: Callable) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in inspect.signature(model).parameters.values() if p.kind in kinds]


def _takes_args(model: Callable, args: Any) -> bool:
    """Whether a model is called with args: where the data have them, or it does not go without.

    A third parameter with a default keeps it where the data have no args.
    """
    return args is not None or sum(p.default is p.empty for p in _positional(model)) > 2


def predict_trajectory(model: Callable, ts, y0, args, dtype: Any = float) -> Any:
    """Call any model on one trajectory: predictions (T, F), infinite where a `NeuralODE` can't be solved.

    Another model is called as `(ts, y0)`, or as `(ts, y0, args)` where the data have args, with times and states of
    `dtype`.
    """
    if isinstance(model, NeuralODE):
        return model(ts, y0, args, throw=False)
    ts = jnp.asarray(ts, dtype=dtype)
    y0 = None if y0 is None else jnp.asarray(y0, dtype=dtype)
    return model(ts, y0, args) if _takes_args(model, args) else model(ts, y0)


@eqx.filter_jit
def predict_trajectories(model: Callable, ts, y0, args) -> Any:
    """The same of several, (N, T, F), each along the first axis.

    Compiled for itself, so that a solve is traced once, and not in all that is made of it.
    """
    return jax.vmap(ft.partial(predict_trajectory, model))(ts, y0, args)


def predicted_shape(model: Any, ts, y0, args) -> tuple[int, ...]:
    """The shape of a model's predictions of one trajectory, without a solve; raises what the model raises."""
    inputs = in_float((ts, starts(model, y0, len(ts)), args))
    function = _at_start if isinstance(model, NeuralODE) else predict_trajectories
    found = eqx.filter_eval_shape(function, in_float(model), *inputs)
    _check_output(found)
    return found.shape[1:]


def _at_start(model: NeuralODE, ts, y0, args) -> Float[Array, "N T F"]:
    """What a model would predict if its states stayed as they are, after a look at the vector field."""

    def one(ts, y0, args):
        state = model.initial_state(y0, args)
        slope = model.vector_field(ts[0], state, args)
        if jnp.shape(slope) != state.shape:
            raise ValueError(f"the vector field returns shape {jnp.shape(slope)} for a state of shape {state.shape}")
        return model.observe_states(jnp.broadcast_to(state, (ts.size, *state.shape)), args)

    return jax.vmap(one)(ts, y0, args)


def _check_output(found: Any) -> None:
    """Raise `LaplodeError` unless a model returns one array."""
    if isinstance(found, jax.ShapeDtypeStruct | Array):
        if jnp.issubdtype(found.dtype, jnp.floating):
            return
        cure = (
            "take their real part, or real and imaginary parts as channels"
            if found.dtype.kind == "c"
            else ("rounding has no derivative; return floating point numbers")
        )
        raise LaplodeError(f"`model` returns numbers of type {found.dtype}, not real ones: {cure}.")
    if isinstance(found, diffrax.Solution):
        what, cure = "a diffrax.Solution", "return its values, solution.ys"
    elif isinstance(found, tuple | list):
        kind = type(found).__name__
        what, cure = f"a {kind} of {len(found)}", "return the predictions alone, as in `ys, *_ = ...; return ys`"
    elif isinstance(found, dict):
        names = ", ".join(map(repr, found))
        what, cure = f"a dict of {names}", f"return one array, jnp.stack([found[name] for name in [{names}]], axis=-1)"
    else:
        what, cure = f"a {type(found).__name__}", "return one array"
    raise LaplodeError(f"`model` returns {what}, not predictions of shape (T, K): {cure}.")


def _check_signature(model: Callable, args: Any) -> None:
    """Raise `LaplodeError` where the names of the parameters say that they take something else."""
    parameters = _positional(model)
    names = [p.name for p in parameters]
    lower = [name.lower() for name in names[:3]]
    of_times = [bool(TIMES & set(name.split("_"))) for name in lower]
    if len(names) > 1 and not of_times[0] and (of_times[1] or lower[0] in _STATES):
        raise LaplodeError(
            f"`model` has the parameters ({', '.join(names)}), and is called as model(ts, y0): the times come first. "
            "Exchange the two."
        )
    if len(names) > 2 and lower[2] in _STATES and lower[1] not in _STATES:
        raise LaplodeError(
            f"`model` has the parameters ({', '.join(names)}), and is called as model(ts, y0, args): the state comes "
            f"before the args. Exchange `{names[1]}` and `{names[2]}`."
        )
    if args is None:
        return
    try:
        inspect.signature(model).bind(None, None, args)
    except TypeError:
        raise LaplodeError("`args` is given with the data, but the model can't be called as (ts, y0, args).") from None
    if len(names) > 2 and (names[2] in _NO_ARGS or isinstance(parameters[2].default, bool)):
        raise LaplodeError(
            f"`args` is given with the data, and the model's third parameter is `{names[2]}`, which is something else: "
            f"write (self, ts, y0, args, {names[2]}=...)."
        )


def check_model(model: Any, problem: Problem) -> Any:
    """The model without a wrapper.

    **Raises:** `LaplodeError` unless it is an `eqx.Module` whose predictions fit the shapes of the data.
    """
    data, model = problem.data, unwrapped(model)
    if not isinstance(model, eqx.Module) or not callable(model):
        raise LaplodeError(
            f"`model` must be a callable eqx.Module, (ts, y0) or (ts, y0, args) -> (T, K); got {type(model).__name__}. "
            "Wrap a vector field as laplode.NeuralODE(vector_field)."
        )
    if isinstance(model, NeuralODE):
        _check_initial_states(model, data)
    else:
        _check_signature(model, data.args)
    try:
        # A model may have its own initial state; if it hasn't, its first use of None shows here.
        shape = predicted_shape(model, data.ts, data.y0, data.args)
    except LaplodeError:
        raise
    except Exception as error:
        raise _failed(model, problem, error) from error
    if shape != problem.prediction_shape:
        raise LaplodeError(
            f"`model` and `ys` disagree: for one trajectory the model predicts shape {shape}, but the observations "
            f"have shape (T, K) = {data.ys.shape[1:]} and the likelihood takes predictions of shape "
            f"{problem.prediction_shape}. {_remedy(model, problem, shape)}"
        )
    return model


def _check_initial_states(model: NeuralODE, data: Trajectories) -> None:
    if model.y0 is None:
        return
    if data.y0 is not None:
        raise LaplodeError(
            "`y0` is given twice: with the data, and by the model, which has its own. Leave out one of them: "
            "Trajectories(ts, ys), or NeuralODE(vector_field). A state that is known in part comes as args, and "
            "NeuralODE(..., y0=lambda model, args: ...) makes it whole."
        )
    if callable(model.y0):
        _check_computed(model, data)
    elif model.has_state_for_each and len(model.y0) != len(data.ts):
        raise LaplodeError(
            f"`y0` of the model holds {len(model.y0)} initial states, but the data has N = {len(data.ts)} "
            "trajectories: give one for each, or one of shape (D,) for all."
        )


def _check_computed(model: NeuralODE, data: Trajectories) -> None:
    first = jax.tree.map(lambda x: x[0], in_float(data.args))
    try:
        shape = eqx.filter_eval_shape(in_float(model).initial_state, None, first).shape
    except Exception as error:
        raise LaplodeError(
            f"`y0` of the model can't be evaluated as y0(model, args), where model is the NeuralODE and args are "
            f"{'None' if data.args is None else 'those of a trajectory'}: {type(error).__name__}: {error}"
        ) from error
    if len(shape) != 1:
        raise LaplodeError(f"`y0` of the model returns shape {shape}, not one state, (D,).")


def _call(model: Callable, data: Trajectories) -> str:
    if isinstance(model, NeuralODE) or _takes_args(model, data.args):
        return "model(ts, y0, args)"
    return "model(ts, y0)"


def _takes_a_batch(model: Callable, problem: Problem) -> bool:
    """Whether the model fits the data when it is called with all trajectories at once."""
    ts, y0, args = in_float((problem.data.ts, problem.data.y0, problem.data.args))
    if isinstance(model, NeuralODE) or y0 is None:
        return False
    for times in (ts[0], ts):
        try:
            found = eqx.filter_eval_shape(predict_trajectory, in_float(model), times, y0, args)
        except Exception:
            continue
        if getattr(found, "shape", None) == (len(ts), *problem.prediction_shape):
            return True
    return False


_ONE = "A model is called with one trajectory, ts (T,) and y0 (D,), and this one takes a batch of them: "


def _failed(model: Callable, problem: Problem, error: Exception) -> LaplodeError:
    data = problem.data
    if _takes_a_batch(model, problem):
        return LaplodeError(f"`model` can't be evaluated. {_ONE}leave the `jax.vmap` out, laplode maps for itself.")
    try:  # what has no batch of it, such as a Solution, is seen without one
        first = jax.tree.map(lambda x: x[0], in_float((data.ts, data.y0, data.args)))
        _check_output(eqx.filter_eval_shape(predict_trajectory, in_float(model), *first))
    except LaplodeError as found:
        return found
    except Exception:
        pass
    y0_shape = None if data.y0 is None else data.y0.shape[1:]
    text = str(error).splitlines()[0] if str(error) else ""
    return LaplodeError(
        f"`model` can't be evaluated when it is called as {_call(model, data)}, with ts of shape {data.ts.shape[1:]}, "
        f"y0 of shape {y0_shape} and {'no args' if data.args is None else 'the args given'}: "
        f"{type(error).__name__}: {text}"
    )


def _remedy(model: Callable, problem: Problem, shape: tuple[int, ...]) -> str:
    data, channels = problem.data, problem.data.ys.shape[2]
    scales = problem.prediction_shape[1] - channels
    if shape == (data.ys.shape[1], 2 * channels):
        if scales:
            return f"The likelihood has scales of its own for all channels but {scales}: predict the others' alone."
        return "It seems to predict noise scales too, and the likelihood has one: leave that out, as in Gaussian()."
    if scales:
        return (
            f"A likelihood without a scale wants locations and the logarithms of scales, {scales} of these at each "
            "time: let the model predict them, NeuralODE(..., scale=first_guess), or give the likelihood a scale."
        )
    if isinstance(model, NeuralODE):
        return "If the states are not what is observed, give NeuralODE an `observe`."
    if data.y0 is not None and shape == data.y0.shape[1:]:
        return "It looks like a vector field: write laplode.NeuralODE(model)."
    if _takes_a_batch(model, problem):
        return f"{_ONE}leave out the axis of trajectories."
    return "Return what is observed at each time, an array of shape (T, K)."

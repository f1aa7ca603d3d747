"""The Neural ODE, and the contract that a foreign model meets."""

import inspect
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ._errors import LaplodeError


class NeuralODE(eqx.Module):
    """dy/dt = vector_field(t, y, args), solved by Diffrax, seen through `observe`.

    An ordinary `eqx.Module`, usable in any Optax loop. The vector field may be neural, mechanistic, or a mix.

    **Arguments:**

    - `vector_field`: module or function `(t, y, args) -> dy`, with y of shape (D,).
    - `y0`: None when the initial state is given with the data; otherwise its first guess, shape (D,), and it becomes a
        parameter like any other.
    - `observe`: module or function `(y, args) -> (K,)`; None observes all states.
    - `solver`, `stepsize_controller`, `dt0`, `max_steps`: as in `diffrax.diffeqsolve`. None of them is a parameter.

    **Raises:** `LaplodeError` when `vector_field`, `observe` or `y0` is not what is described here.
    """

    vector_field: Callable
    y0: Float[Array, " D"] | None
    observe: Callable | None
    solver: diffrax.AbstractSolver
    stepsize_controller: diffrax.AbstractStepSizeController
    dt0: float | None
    max_steps: int = eqx.field(static=True)

    def __init__(
        self,
        vector_field: Callable,
        y0: Any = None,
        observe: Callable | None = None,
        solver: diffrax.AbstractSolver | None = None,
        stepsize_controller: diffrax.AbstractStepSizeController | None = None,
        dt0: float | None = None,
        max_steps: int = 4096,
    ):
        if not callable(vector_field):
            raise LaplodeError(f"`vector_field` must be callable as (t, y, args), got {type(vector_field).__name__}.")
        if observe is not None and not callable(observe):
            raise LaplodeError(f"`observe` must be callable as (y, args), got {type(observe).__name__}.")
        if y0 is not None:
            y0 = jnp.asarray(y0, dtype=float)
            if y0.ndim != 1 or not np.all(np.isfinite(y0)):
                raise LaplodeError(
                    f"`y0` of a NeuralODE must be finite and of shape (D,), got {y0}. Known initial states, one for "
                    "each trajectory, go into Trajectories(ts, ys, y0=...)."
                )
        self.vector_field = vector_field
        self.y0 = y0
        self.observe = observe
        self.solver = diffrax.Tsit5() if solver is None else solver
        self.stepsize_controller = (
            diffrax.PIDController(rtol=1e-6, atol=1e-8) if stepsize_controller is None else stepsize_controller
        )
        self.dt0 = dt0
        self.max_steps = max_steps

    def initial_state(self, y0: Float[Array, " D"] | None) -> Float[Array, " D"]:
        """`y0` when given, otherwise the model's own."""
        y0 = self.y0 if y0 is None else y0
        if y0 is None:
            raise LaplodeError(
                "`y0` is missing: give known initial states with the data, Trajectories(ts, ys, y0=...), or let the "
                "model learn one, NeuralODE(vector_field, y0=first_guess)."
            )
        return jnp.asarray(y0, dtype=float)

    def observe_states(self, states: Float[Array, "T D"], args: PyTree) -> Float[Array, "T K"]:
        """What is seen of the states."""
        if self.observe is None:
            return states
        return jax.vmap(lambda y: self.observe(y, args))(states)  # pyright: ignore[reportOptionalCall]

    def solve(self, ts, y0, args, *, saveat: diffrax.SaveAt, adjoint: diffrax.AbstractAdjoint, throw: bool):
        """One trajectory by `diffrax.diffeqsolve` from ts[0] to ts[-1]."""
        return diffrax.diffeqsolve(
            diffrax.ODETerm(self.vector_field),
            self.solver,
            t0=ts[0],
            t1=ts[-1],
            dt0=self.dt0,
            y0=self.initial_state(y0),
            args=args,
            saveat=saveat,
            stepsize_controller=self.stepsize_controller,
            adjoint=adjoint,
            max_steps=self.max_steps,
            throw=throw,
        )

    def __call__(
        self, ts: Float[Array, " T"], y0: Float[Array, " D"] | None = None, args: PyTree = None, *, throw: bool = True
    ) -> Float[Array, "T K"]:
        """Predictions at `ts`, from the state `y0` at ts[0].

        With `throw=False` a failed solve leaves infinities instead of raising.
        """
        ts = jnp.asarray(ts, dtype=float)
        adjoint = diffrax.RecursiveCheckpointAdjoint()
        solution = self.solve(ts, y0, args, saveat=diffrax.SaveAt(ts=ts), adjoint=adjoint, throw=throw)
        return self.observe_states(solution.ys, args)  # pyright: ignore[reportArgumentType]


def predict_trajectory(model: Callable, ts, y0, args) -> Float[Array, "T K"]:
    """Call any model on one trajectory; failed solves of a `NeuralODE` come back as infinities.

    A foreign model is called as `(ts, y0, args)`, or `(ts, y0)` when it takes no third positional argument.
    """
    if isinstance(model, NeuralODE):
        return model(ts, y0, args, throw=False)
    ts = jnp.asarray(ts, dtype=float)
    y0 = None if y0 is None else jnp.asarray(y0, dtype=float)
    try:
        inspect.signature(model).bind(ts, y0, args)
    except TypeError:
        if args is not None:
            raise LaplodeError(
                "`args` is given with the data, but the model can't be called as (ts, y0, args)."
            ) from None
        return model(ts, y0)
    return model(ts, y0, args)


def is_real_array(leaf: Any) -> bool:
    """Whether a leaf is an array of real floating point numbers."""
    return eqx.is_inexact_array(leaf) and not np.iscomplexobj(leaf)


def in_float(tree: PyTree) -> PyTree:
    """Every real inexact array in JAX's default float type: one float32 leaf would bring its rounding to all."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype=float) if is_real_array(leaf) else leaf, tree)


def predicted_shape(model: Any, ts, y0, args) -> tuple[int, ...]:
    """The shape of a model's predictions of the first trajectory, without a solve; raises what the model raises."""
    first = jax.tree.map(lambda x: x[0], (ts, y0, args))
    return eqx.filter_eval_shape(predict_trajectory, in_float(model), *first).shape


def check_model(model: Any, data) -> None:
    """Raise `LaplodeError` unless `model` is an `eqx.Module` whose predictions fit the data's shapes."""
    if not isinstance(model, eqx.Module) or not callable(model):
        raise LaplodeError(
            f"`model` must be a callable eqx.Module, (ts, y0, args) -> (T, K); got {type(model).__name__}. Wrap a "
            "vector field as laplode.NeuralODE(vector_field)."
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
    if shape != data.ys.shape[1:]:
        raise LaplodeError(
            f"`model` and `ys` disagree: for one trajectory the model predicts shape {shape}, but the "
            f"observations have shape (T, K) = {data.ys.shape[1:]}. If the states are not what is observed, give "
            "NeuralODE an `observe`."
        )

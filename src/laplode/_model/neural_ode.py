"""The ready-made model: a vector field, solved by Diffrax and observed."""

import inspect
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .._checks import check_count, check_positive, real_array
from .._errors import LaplodeError, warn
from .._show import Shown, num_values, rows


class NeuralODE(Shown):
    """dy/dt = vector_field(t, y, args), solved by Diffrax, seen through `observe`.

    An ordinary `eqx.Module`, usable in any Optax loop. The vector field may be neural, mechanistic, or a mix.

    **Arguments:**

    - `vector_field`: module or function `(t, y, args) -> dy`, with y of shape (D,).
    - `y0`: None when the initial state is given with the data. Otherwise its first guess, shape (D,) for all
        trajectories or (N, D) for one each, and it becomes a parameter like any other; or a module or function
        `(model, args) -> (D,)` that computes it from this model's parameters (an equilibrium, say), from a trajectory's
        args, or by a network of its own.
    - `observe`: module or function `(y, args) -> (K,)`; None observes all states.
    - `scale`: None when the noise scale belongs to the likelihood; otherwise its first guess in the likelihood's units,
        positive, shape (K,), or one for each channel of a `PerChannel` whose likelihood has none, and it becomes a
        parameter, with a prior of its own:
        `NamedPriors({"scale": dist.HalfNormal(1.0)}, rest=...)`. The model then predicts (T, 2K), the logarithms of the
        scales last, as `Gaussian()`, `LogNormal()` and `StudentT(df)` without a scale take it. Under
        `NegativeBinomial()` it is the concentration.
    - `solver`, `stepsize_controller`, `dt0`, `max_steps`: as in `diffrax.diffeqsolve`. None of them is a parameter.

    **Raises:** `LaplodeError` when `vector_field`, `observe`, or another argument is not what is described here.
    """

    vector_field: Callable
    y0: Float[Array, "*N D"] | Callable | None
    observe: Callable | None
    scale: Float[Array, " K"] | None
    solver: diffrax.AbstractSolver
    stepsize_controller: diffrax.AbstractStepSizeController
    dt0: float | None
    max_steps: int = eqx.field(static=True)

    def __init__(
        self,
        vector_field: Callable,
        *,
        y0: Any = None,
        observe: Callable | None = None,
        solver: diffrax.AbstractSolver | None = None,
        stepsize_controller: diffrax.AbstractStepSizeController | None = None,
        dt0: float | None = None,
        max_steps: int = 4096,
        scale: Any = None,
    ):
        _check_no_term(vector_field)
        if not callable(vector_field):
            raise LaplodeError(f"`vector_field` must be callable as (t, y, args), got {type(vector_field).__name__}.")
        for name, value in (("vector_field", vector_field), ("observe", observe), ("y0", y0)):
            _warn_of_hidden(name, value)
        _check_order(vector_field)
        if observe is not None and not callable(observe):
            raise LaplodeError(f"`observe` must be callable as (y, args), got {type(observe).__name__}.")
        if y0 is not None and not callable(y0):
            y0 = jnp.asarray(real_array("y0", y0), dtype=float)
            if y0.ndim not in (1, 2) or not np.all(np.isfinite(y0)):
                raise LaplodeError(
                    "`y0` of a NeuralODE must be finite and of shape (D,), or (N, D) for one state a trajectory, or a "
                    f"function (model, args) -> (D,); got {y0}. Known initial states go into "
                    "Trajectories(ts, ys, y0=...)."
                )
        if scale is not None:
            scale = jnp.asarray(real_array("scale", scale), dtype=float)
            if scale.ndim != 1 or not np.all(np.isfinite(scale)) or np.any(scale <= 0):
                raise LaplodeError(
                    f"`scale` of a NeuralODE must be positive and of shape (K,), one for each channel; got {scale}."
                )
        kinds = (
            ("solver", solver, diffrax.AbstractSolver),
            ("stepsize_controller", stepsize_controller, diffrax.AbstractStepSizeController),
        )
        for name, value, kind in kinds:
            if value is not None and not isinstance(value, kind):
                raise LaplodeError(f"`{name}` must be one of Diffrax, or None; got {value!r}.")
        if dt0 is not None and check_positive("dt0", dt0).ndim:
            raise LaplodeError(f"`dt0` must be a number, got {dt0!r}.")
        self.vector_field = vector_field
        self.y0 = y0
        self.observe = observe
        self.scale = scale
        self.solver = diffrax.Tsit5() if solver is None else solver
        self.stepsize_controller = (
            diffrax.PIDController(rtol=1e-6, atol=1e-8) if stepsize_controller is None else stepsize_controller
        )
        self.dt0 = dt0
        self.max_steps = check_count("max_steps", max_steps)

    def _shown(self):
        control = self.stepsize_controller
        tolerances = [f"{name}={getattr(control, name):g}" for name in ("rtol", "atol") if hasattr(control, name)]
        of = lambda part: f"{getattr(part, '__name__', type(part).__name__)}, {num_values(part)} parameters"
        if callable(self.y0):
            start = f"by {of(self.y0)}"
        else:
            start = "given with the data" if self.y0 is None else f"learned, shape {self.y0.shape}"
        named = {
            "vector field": of(self.vector_field),
            "initial state": start,
            "observes": "all states" if self.observe is None else of(self.observe),
            "noise scale": "the likelihood's" if self.scale is None else f"learned, shape {self.scale.shape}",
            "solver": f"{type(self.solver).__name__}, {type(control).__name__}({', '.join(tolerances)}), "
            f"at most {self.max_steps} steps",
        }
        return rows(named, type(self).__name__)

    @property
    def has_state_for_each(self) -> bool:
        """Whether it has learned an initial state for each trajectory of the data."""
        return eqx.is_array(self.y0) and self.y0.ndim == 2  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]

    def initial_state(self, y0: Float[Array, " D"] | Int[Array, ""] | None, args: PyTree = None) -> Float[Array, " D"]:
        """`y0` when given, otherwise the model's own; of several of its own the one with the number `y0`."""
        if y0 is None and callable(self.y0):
            return jnp.asarray(self.y0(self, args), dtype=float)
        if y0 is not None and self.has_state_for_each and jnp.ndim(y0) == 0:
            return self.y0[y0]  # pyright: ignore[reportOptionalSubscript, reportIndexIssue]
        y0 = self.y0 if y0 is None else y0  # pyright: ignore[reportAssignmentType]
        if y0 is None:
            raise LaplodeError(
                "`y0` is missing: give known initial states with the data, Trajectories(ts, ys, y0=...), or let the "
                "model learn one, NeuralODE(vector_field, y0=first_guess)."
            )
        if jnp.ndim(y0) == 2:
            raise LaplodeError(
                "`y0` is missing: the model has learned an initial state for each of several trajectories; give the "
                "number of one, such as 0, or a state."
            )
        return jnp.asarray(y0, dtype=float)

    @property
    def sees_states(self) -> bool:
        """Whether the predictions are the states themselves."""
        return self.observe is None and self.scale is None

    def observe_states(self, states: Float[Array, "T D"], args: PyTree) -> Float[Array, "T F"]:
        """What is seen of the states, and the logarithms of the noise scales where they are the model's."""
        seen = states
        if self.observe is not None:
            seen = jax.vmap(lambda y: self.observe(y, args))(states)  # pyright: ignore[reportOptionalCall]
        if self.scale is None:
            return seen
        if self.scale.size > seen.shape[1]:
            raise LaplodeError(
                f"`scale` of the model has shape {self.scale.shape}, but {seen.shape[1]} channels are observed: give "
                "one for each."
            )
        return jnp.concatenate([seen, jnp.broadcast_to(jnp.log(self.scale), (len(seen), self.scale.size))], axis=1)

    def solve(self, ts, y0, args, *, saveat: diffrax.SaveAt, adjoint: diffrax.AbstractAdjoint, throw: bool):
        """One trajectory by `diffrax.diffeqsolve` from ts[0] to ts[-1]."""
        return diffrax.diffeqsolve(
            diffrax.ODETerm(self.vector_field),
            self.solver,
            t0=ts[0],
            t1=ts[-1],
            dt0=self.dt0,
            y0=self.initial_state(y0, args),
            args=args,
            saveat=saveat,
            stepsize_controller=self.stepsize_controller,
            adjoint=adjoint,
            max_steps=self.max_steps,
            throw=throw,
        )

    def __call__(
        self, ts: Float[Array, " T"], y0: Float[Array, " D"] | None = None, args: PyTree = None, *, throw: bool = True
    ) -> Float[Array, "T F"]:
        """Predictions at `ts`, from the state `y0` at ts[0].

        With `throw=False` a failed solve leaves infinities instead of raising.
        """
        return self._predicted(ts, y0, args, diffrax.RecursiveCheckpointAdjoint(), throw)

    def _predicted(self, ts, y0, args, adjoint: diffrax.AbstractAdjoint, throw: bool) -> Float[Array, "T F"]:
        """Predictions at `ts` by a solve with derivatives of a kind that `adjoint` says."""
        ts = jnp.asarray(ts, dtype=float)
        solution = self.solve(ts, y0, args, saveat=diffrax.SaveAt(ts=ts), adjoint=adjoint, throw=throw)
        return self.observe_states(solution.ys, args)  # pyright: ignore[reportArgumentType]


class _Smooth(eqx.Module):
    """A `NeuralODE` inside of another model, solved such that derivatives of any kind and order exist."""

    ode: NeuralODE

    def __call__(self, ts, y0=None, args=None, *, throw: bool = True):
        return self.ode._predicted(ts, y0, args, diffrax.DirectAdjoint(), throw)

    def __getattr__(self, name: str):
        return getattr(self.ode, name)


def smooth(model: Any) -> Any:
    """The model with each `NeuralODE` inside of it solved such that second and forward derivatives exist.

    Its values stay the same. Alone, reverse derivatives take less time and memory without.
    """
    inside = lambda node: isinstance(node, NeuralODE) and type(node).__call__ is NeuralODE.__call__
    return jax.tree.map(lambda node: _Smooth(node) if inside(node) else node, model, is_leaf=inside)


def _check_order(vector_field: Callable) -> None:
    """Raise `LaplodeError` where the names of the parameters say that the state comes before the time."""
    try:
        names = list(inspect.signature(vector_field).parameters)
    except (TypeError, ValueError):
        return
    if len(names) > 1 and names[0] != "t" and names[1] in ("t", "time"):
        raise LaplodeError(
            f"`vector_field` has the parameters ({', '.join(names)}), and is called as vector_field(t, y, args): the "
            "time comes first. Exchange the two."
        )


def _warn_of_hidden(name: str, function: Any) -> None:
    """Warn where a plain function uses a module, whose arrays are then constants."""
    try:
        used = inspect.getclosurevars(inspect.unwrap(function))
    except TypeError:  # no function of Python's
        return
    for variable, value in {**used.globals, **used.nonlocals}.items():
        learns = isinstance(value, eqx.Module) and not isinstance(value, diffrax.AbstractPath)
        if learns and any(map(eqx.is_inexact_array, jax.tree.leaves(value))):
            warn(
                f"`{name}` is a function that uses `{variable}`, a {type(value).__name__}: the arrays of that are no "
                f"parameters, and stay as they are. Let a module hold it, class Part(eqx.Module): {variable}: "
                f"eqx.Module, with a __call__ that uses self.{variable}.",
                level=3,
            )


def _check_no_term(vector_field: Any) -> None:
    """Raise `LaplodeError` where a piece of Diffrax stands for the vector field."""
    name = type(vector_field).__name__
    if isinstance(vector_field, diffrax.ODETerm):
        raise LaplodeError(
            "`vector_field` must be callable as (t, y, args), got the diffrax.ODETerm of one: give what is in it, "
            "NeuralODE(term.vector_field)."
        )
    if isinstance(vector_field, diffrax.AbstractBrownianPath):
        raise LaplodeError(
            f"`vector_field` is a {name}: stochastic differential equations are not supported, since a posterior over "
            "the parameters does not say where the noise takes a trajectory. Give the drift alone, and let the "
            "likelihood have the noise."
        )
    if isinstance(vector_field, diffrax.AbstractTerm | diffrax.AbstractPath):
        raise LaplodeError(
            f"`vector_field` is a {name}: stochastic and controlled differential equations are not supported, only "
            "dy/dt = vector_field(t, y, args). Of a stochastic one give the drift alone; a control with a derivative, "
            "such as a diffrax.CubicInterpolation made from `args`, can be written out: "
            "lambda t, y, args: field(t, y) @ control.derivative(t)."
        )


def starts(model: Any, y0: Any, num: int) -> Any:
    """Initial states of `num` trajectories as models take them: known ones or, where the model has its own for each,
    their numbers.
    """
    if y0 is None and isinstance(model, NeuralODE) and model.has_state_for_each:
        return jnp.arange(num)
    return y0

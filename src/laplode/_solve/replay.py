"""The steps that an adaptive solve accepts, and their replay: values."""

import dataclasses
import functools as ft
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._devices import compiled
from .._errors import LaplodeError
from .._model.neural_ode import NeuralODE


class Steps(eqx.Module):
    """What the solves of N trajectories have left: the accepted steps, where they are read off, and what goes in.

    A step begins where the one before it ended, except at a jump that was declared to the step size controller: there
    one step ends just before the jump and the next begins just after it, so that no stage lies on the wrong side.
    Short rows are padded by steps of length zero, which change nothing.
    """

    starts: Float[Array, "*N steps"]
    ends: Float[Array, "*N steps"]
    ts: Float[Array, "*N T"]
    y0: Array | None
    args: PyTree

    def __getitem__(self, i) -> "Steps":
        """The steps of one trajectory."""
        return jax.tree.map(lambda x: x[i], self)

    def with_times_repeated(self, spare: int) -> "Steps":
        """The same steps, read off at the last time so many times more."""
        return dataclasses.replace(self, ts=jnp.asarray(np.pad(self.ts, ((0, 0), (0, spare)), mode="edge")))

    @property
    def num_steps(self) -> int:
        """The number of steps of the longest trajectory, padding included."""
        return self.starts.shape[-1]

    @property
    def lengths(self) -> Float[Array, "*N steps"]:
        """h of each step."""
        return self.ends - self.starts


class Accepted(NamedTuple):
    """What the adaptive solve of each trajectory did: its steps, padded to `max_steps` by steps of length zero."""

    starts: Float[Array, "N max_steps"]
    ends: Float[Array, "N max_steps"]
    number: Int[Array, " N"]
    result: diffrax.RESULTS
    last: Float[Array, "N D"]
    arrived: Bool[Array, " N"]

    @property
    def reached(self) -> Float[Array, " N"]:
        """The time at which each solve ended."""
        return self.ends[:, -1]

    def steps(self, num: int, ts: Float[Array, "N T"], y0: Array | None, args: PyTree) -> Steps:
        """The first `num` steps of each, to be read off at `ts`."""
        return Steps(self.starts[:, :num], self.ends[:, :num], ts, y0, args)


# Up to this many entries of a Jacobian of one state, what padding adds to its cost is not felt, and compilation is.
_CHEAP = 2**20


def padded_size(num: int, cost: int = 1) -> int:
    """`num` or a little more: a few sizes only, so that what was compiled for one serves others.

    If `num` times its `cost`, the numbers that are computed for each, is little, that is the next power of two, and 16
    at least; otherwise at most an eighth more.
    """
    granule = max(4, 2 ** (num.bit_length() - 4))
    return max(16, 2 ** (num - 1).bit_length()) if num * cost <= _CHEAP else num + (-num) % granule


def accepted_steps(model: NeuralODE, t0: Float[Array, " N"], t1: Float[Array, " N"], y0, args) -> Accepted:
    """The steps that the step size controller accepts from t0 to t1, and the state in which each solve ended.

    The program does not depend on the times in between, nor does it call back to the host.

    **Raises:** `LaplodeError` when solver, controller and field can't go together.
    """
    try:
        return _accepted_steps(model, t0, t1, y0, args)
    except (ValueError, TypeError, NotImplementedError) as error:
        how = f"{type(model.solver).__name__}, {type(model.stepsize_controller).__name__} and dt0={model.dt0}"
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        raise LaplodeError(f"`model` can't be solved by {how}: {type(error).__name__}: {said}") from error


@compiled
def _accepted_steps(model: NeuralODE, t0: Float[Array, " N"], t1: Float[Array, " N"], y0, args) -> Accepted:
    saveat = diffrax.SaveAt(
        subs=[
            diffrax.SubSaveAt(t0=True, steps=True, fn=lambda t, y, args: None),
            diffrax.SubSaveAt(t1=True),
        ]
    )

    def one(t0, t1, y0, args):
        ts = jnp.stack([t0, t1])
        solution = model.solve(ts, y0, args, saveat=saveat, adjoint=diffrax.ForwardMode(), throw=False)
        times, _ = solution.ts  # pyright: ignore[reportGeneralTypeIssues]
        _, states = solution.ys  # pyright: ignore[reportGeneralTypeIssues]
        number = solution.stats["num_accepted_steps"]
        # Diffrax leaves unused entries infinite; here they repeat the time at which the solve ended.
        reached = jnp.max(jnp.where(jnp.isfinite(times), times, -jnp.inf))
        starts = jnp.minimum(times, reached)
        ends = _ends(starts[1:], _declared_jumps(model.stepsize_controller))
        ends = jnp.where(jnp.arange(ends.size) < number, ends, reached)
        arrived = (reached >= t1) & jnp.all(jnp.isfinite(states))
        return Accepted(starts[:-1], ends, number, solution.result, states[-1], arrived)

    return jax.vmap(one)(t0, t1, y0, args)


def _declared_jumps(controller: Any) -> Float[Array, " jumps"]:
    """The times that a step size controller, or one wrapped in it, takes for jumps of the vector field."""
    jumps = []
    while controller is not None:
        if getattr(controller, "jump_ts", None) is not None:
            jumps.append(jnp.asarray(controller.jump_ts, dtype=float))
        controller = getattr(controller, "controller", None)
    return jnp.concatenate([*jumps, jnp.zeros(0)])


def _ends(following: Float[Array, " steps"], jumps: Float[Array, " jumps"]) -> Float[Array, " steps"]:
    """Where steps end, of which Diffrax records where the next one begins.

    A step ends on the last float before a jump, and the next one begins on the first float after it, or on the jump
    itself where that is the end of the solve.
    """
    if not jumps.size:
        return following
    at = following[:, None]
    before = jnp.where((at == jumps) | (at == eqxi.nextafter(jumps)), eqxi.prevbefore(jumps), jnp.inf)
    return jnp.minimum(following, jnp.min(before, axis=1))


# ---- Replaying them


@dataclasses.dataclass(frozen=True)
class _Tableau:
    """An explicit Runge-Kutta method: stages z_i = y + Σ_j a_ij k_j, k_i = h f(t + c_i h, z_i)."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray

    @property
    def num_stages(self) -> int:
        return len(self.b)

    def times(self, starts: Float[Array, "*steps"], ends: Float[Array, "*steps"]) -> Float[Array, "*steps stages"]:
        """Where the stages of steps are; the last of them exactly at the end, as in Diffrax, not a rounding beside."""
        starts, ends = starts[..., None], ends[..., None]
        return jnp.where(self.c == 1, ends, starts + self.c * (ends - starts))


def _explicit_tableau(solver: diffrax.AbstractSolver) -> _Tableau | None:
    tableau = getattr(solver, "tableau", None)
    if not isinstance(solver, diffrax.AbstractERK) or not isinstance(tableau, diffrax.ButcherTableau):
        return None
    num = tableau.num_stages
    a = np.zeros((num, num))
    for i, row in enumerate(tableau.a_lower):
        a[i + 1, : i + 1] = row
    return _Tableau(a, np.asarray(tableau.b_sol), np.concatenate([[tableau.c1 or 0.0], tableau.c]))


def _locate(steps: Steps) -> Int[Array, " T"]:
    """The step in which each time falls; a time at a boundary belongs to the step before it, as in Diffrax."""
    return jnp.clip(jnp.searchsorted(steps.ends, steps.ts, side="left"), 0, steps.num_steps - 1)


def _replay_explicit(tableau: _Tableau, model: NeuralODE, steps: Steps, y0: Float[Array, " D"], push=None):
    """States at the start of each step (steps, D), stages and increments (steps, stages, D), from the state `y0`.

    `push`, of the shape of the increments, is added to them.
    """

    a = jnp.asarray(tableau.a)

    def step(y, interval):
        t0, t1, push = interval
        h, times = t1 - t0, tableau.times(t0, t1)

        # A loop, not one stage written out after the other: second derivatives of it compile in a third of the time.
        def stage(increments, i):
            z = y + a[i] @ increments
            increment = h * model.vector_field(times[i], z, steps.args)
            increment = increment if push is None else increment + push[i]
            return increments.at[i].set(increment), z

        nothing = jnp.zeros((tableau.num_stages, *y.shape))
        increments, stages = jax.lax.scan(stage, nothing, jnp.arange(tableau.num_stages))
        return y + tableau.b @ increments, (y, stages, increments)

    return jax.lax.scan(step, y0, (steps.starts, steps.ends, push))[1]


def _output_weights(model: NeuralODE, tableau: _Tableau, t0, t1, t) -> Float[Array, " stages"]:
    """Weights w with y(t) = y(t0) + Σ_i w_i k_i: the solver's interpolation is linear in its increments."""

    def interpolate(y0, y1, k):
        return model.solver.interpolation_cls(t0=t0, t1=t1, y0=y0, y1=y1, k=k).evaluate(t)

    zero = jnp.zeros(())
    # Its coefficients, read off by differentiating a scalar state; y1 = y0 + Σ_i b_i k_i is folded in.
    _, dy1, dk = jax.grad(interpolate, (0, 1, 2))(zero, zero, jnp.zeros(tableau.num_stages))
    return dk + dy1 * tableau.b


def _states_explicit(tableau: _Tableau, model: NeuralODE, steps: Steps, y0: Float[Array, " D"]):
    states, _, increments = _replay_explicit(tableau, model, steps, y0)
    step, weights = _observed(tableau, model, steps)
    return states[step] + jnp.einsum("ts,tsd->td", weights, increments[step])


# What stands in an implicit solver's root finder for "as the step size controller has it", until a solve begins.
_AS_CONTROLLER = diffrax.with_stepsize_controller_tols(diffrax.VeryChord)().rtol


def _with_tolerances(model: NeuralODE) -> diffrax.AbstractSolver:
    """The solver as `diffrax.diffeqsolve` would use it."""
    solver = model.solver
    root_finder = getattr(solver, "root_finder", None)
    for name in ("rtol", "atol", "norm"):
        if root_finder is not None and getattr(root_finder, name, None) is _AS_CONTROLLER:
            value = getattr(model.stepsize_controller, name)
            solver = eqx.tree_at(lambda s, name=name: getattr(s.root_finder, name), solver, value)
    return solver


def _states_general(model: NeuralODE, steps: Steps, y0: Float[Array, " D"]):
    """Any Diffrax solver, one step after another through its own `step`."""
    terms, args = diffrax.ODETerm(model.vector_field), steps.args
    solver = _with_tolerances(model)
    if getattr(solver, "scan_kind", "none") is None:  # a loop over stages that has all modes of differentiation
        solver = eqx.tree_at(lambda s: s.scan_kind, solver, "bounded", is_leaf=lambda node: node is None)
    state = solver.init(terms, steps.starts[0], steps.ends[0], y0, args)
    jumps = _declared_jumps(model.stepsize_controller).size > 0

    def step(carry, interval):
        y, state = carry
        t0, t1, made_jump = interval
        y1, _, dense, state1, _ = solver.step(terms, t0, t1, y, args, state, made_jump=made_jump if jumps else False)
        # An implicit solver may not make sense of a step of length zero; it is skipped whole.
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(t1 > t0, a, b), new, old)
        return keep((y1, state1), (y, state)), dense

    made_jump = jnp.concatenate([jnp.zeros(1, bool), steps.starts[1:] != steps.ends[:-1]])
    _, dense = jax.lax.scan(step, (y0, state), (steps.starts, steps.ends, made_jump))

    def interpolate(step, t):
        info = jax.tree.map(lambda x: x[step], dense)
        return solver.interpolation_cls(t0=steps.starts[step], t1=steps.ends[step], **info).evaluate(t)

    return jax.vmap(interpolate)(_locate(steps), steps.ts)


def num_states(model: NeuralODE, steps: Steps) -> int:
    """D."""
    first = steps[0]
    return eqx.filter_eval_shape(model.initial_state, first.y0, first.args).size


@eqx.filter_jit  # traced once for all that is made of it
def _replay(model: NeuralODE, steps: Steps) -> Float[Array, "N T K"]:
    tableau = _explicit_tableau(model.solver)

    def one(each: Steps):
        y0 = model.initial_state(each.y0, each.args)
        states = _states_general(model, each, y0) if tableau is None else _states_explicit(tableau, model, each, y0)
        return model.observe_states(states, each.args)

    return jax.vmap(one)(steps)


def _observed(tableau: _Tableau, model: NeuralODE, steps: Steps):
    """The step in which each observation falls, and the weights at which it is read off."""
    step = _locate(steps)
    read = jax.vmap(ft.partial(_output_weights, model, tableau))
    return step, read(steps.starts[step], steps.ends[step], steps.ts)

"""All that knows how an ODE is integrated, and how its solution depends on the parameters.

The adaptive solve is done once, by Diffrax. Its accepted steps are then frozen, and every derivative is taken of the
replay of those steps: a step size controller is not differentiated by Diffrax either, so the replay has the same values
and the same derivatives to rounding, but it rejects nothing, knows its length beforehand, and has forward, reverse and
mixed modes.
"""

import abc
import dataclasses
import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._errors import LaplodeError
from ._mesh import over_rows
from ._model import NeuralODE, accepted_steps, predict_trajectories, starts
from ._vector import Parameters

# Bytes of right-hand sides computed at once in a sensitivity solve: small enough for a processor's cache.
_BLOCK_BYTES = 2**21


class AbstractMap(eqx.Module):
    """θ ↦ an array, with its derivatives."""

    parameters: eqx.AbstractVar[Parameters]

    @abc.abstractmethod
    def __call__(self, theta: Float[Array, " P"]) -> Float[Array, "..."]:
        """The values, differentiable in `theta`."""

    @abc.abstractmethod
    def linearized(self, theta: Float[Array, " P"], route: str) -> tuple[Float[Array, "..."], Float[Array, "M P"]]:
        """The values, and ∂ values / ∂θ by one of the routes of `jacobian_route`, a row for each value in order."""


class OfModel(AbstractMap):
    """θ ↦ function(model), differentiated automatically."""

    parameters: Parameters
    function: Callable[[Any], Array]

    def __call__(self, theta):
        return jnp.asarray(self.function(self.parameters.unravel(theta)))

    def linearized(self, theta, route):
        return _AUTODIFF[route](self, theta)


class AbstractFlow(AbstractMap):
    """θ ↦ predictions (N, T, K) of N trajectories: the solution map, with its derivatives."""

    parameters: eqx.AbstractVar[Parameters]
    ts: eqx.AbstractVar[Float[Array, "N T"]]
    y0: eqx.AbstractVar[Float[Array, "N D"] | None]
    args: eqx.AbstractVar[PyTree]

    def solved(self, theta: Float[Array, " P"]) -> Float[Array, "N T K"]:
        """The predictions by a solve that chooses its own steps; not finite where it fails."""
        return predict_trajectories(self.parameters.unravel(theta), self.ts, self.y0, self.args)

    @abc.abstractmethod
    def renewed(self, theta: Float[Array, " P"]) -> "AbstractFlow":
        """The same map around another point, in any transformation."""

    @property
    def num_trajectories(self) -> int:
        """N."""
        return self.ts.shape[0]

    @property
    def rows(self) -> dict[str, PyTree]:
        """All but the parameters: what there is of for each trajectory, along the first axis."""
        names = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if name != "parameters"}

    def part(self, chosen: slice) -> "AbstractFlow":
        """The flow of some of the trajectories."""
        return dataclasses.replace(self, **jax.tree.map(lambda x: x[chosen], self.rows))


class ForeignFlow(AbstractFlow):
    """Any model, differentiated automatically."""

    parameters: Parameters
    ts: Float[Array, "N T"]
    y0: Float[Array, "N D"] | None
    args: PyTree

    def __call__(self, theta):
        return self.solved(theta)

    def linearized(self, theta, route):
        return _AUTODIFF[route](self, theta)

    def renewed(self, theta):
        return self


class ReplayedFlow(AbstractFlow):
    """A `NeuralODE` on the frozen grid of steps that its adaptive solve accepted.

    `boundaries[i]` holds the start of trajectory i's first step and the end of every step; short rows are padded by
    steps of length zero, which change nothing.
    """

    parameters: Parameters
    ts: Float[Array, "N T"]
    y0: Float[Array, "N D"] | None
    args: PyTree
    boundaries: Float[Array, "N steps+1"]

    def __call__(self, theta):
        return _replay(self.parameters.unravel(theta), self.boundaries, self.ts, self.y0, self.args)

    def linearized(self, theta, route):
        if route == "sensitivity":
            return _sensitivity(self, theta)
        return _AUTODIFF[route](self, theta)

    def renewed(self, theta):
        """Where the solve fails the grid stays as it is; of more steps than there is room for, some are joined."""
        model, room = self.parameters.unravel(theta), self.boundaries.shape[1] - 1
        boundaries, accepted, _, y_last = accepted_steps(model, self.ts, self.y0, self.args)
        good = (boundaries[:, -1] >= self.ts[:, -1]) & jnp.all(jnp.isfinite(y_last), axis=-1)
        kept = jnp.round(jnp.arange(room + 1) * jnp.maximum(accepted / room, 1.0)[:, None]).astype(int)
        return dataclasses.replace(
            self, boundaries=jnp.where(good[:, None], jnp.take_along_axis(boundaries, kept, axis=1), self.boundaries)
        )

    @property
    def has_sensitivity(self) -> bool:
        """Whether `_sensitivity` applies and pays: it pulls once for each state, where others push for each θ."""
        explicit = _explicit_tableau(self.parameters.model.solver) is not None
        return explicit and self.num_states <= self.parameters.size

    @property
    def num_states(self) -> int:
        """D."""
        y0 = None if self.y0 is None else self.y0[0]
        return jax.eval_shape(self.parameters.model.initial_state, y0).size


# ---- From an adaptive solve to a frozen grid


def flow(
    view: Parameters,
    ts: Array | np.ndarray,
    y0: Array | np.ndarray | None,
    args: PyTree,
    *,
    like: AbstractFlow | None = None,
    spare: float = 0.0,
) -> AbstractFlow:
    """The solution map of a model around its present parameters.

    Where its steps are no more than those of `like`, it has the same shapes, and what was compiled for that serves it.
    Else it has room for `spare` times as many steps more, for others to be like it.

    **Raises:** `LaplodeError` when the solve fails there, naming the trajectory and the time.
    """
    as_float = lambda x: jnp.asarray(x, dtype=float) if eqx.is_inexact_array(x) else x
    model = view.model
    inputs: tuple[Array, Array | None, PyTree] = jax.tree.map(as_float, (ts, starts(model, y0, len(ts)), args))
    ts, y0, args = inputs
    if not isinstance(model, NeuralODE):
        return ForeignFlow(view, ts, y0, args)
    boundaries, accepted, result, y_last = accepted_steps(model, ts, y0, args)
    reached = np.asarray(boundaries[:, -1])
    end = np.asarray(ts[:, -1])
    failed = (reached < end) | ~np.all(np.isfinite(np.asarray(y_last)), axis=-1)
    if np.any(failed):
        i = int(np.flatnonzero(failed)[0])
        reason = diffrax.RESULTS[jax.tree.map(lambda x: x[i], result)] or "the state is no longer finite"
        raise LaplodeError(
            f"The solve at the fitted parameters failed in trajectory {i} at time {reached[i]:g} of {float(end[i]):g} "
            f"({int(np.sum(failed))} of {ts.shape[0]} trajectories failed; {int(accepted[i])} accepted steps, "
            f"max_steps = {model.max_steps}): {reason.strip()} A stiff field wants an implicit solver, "
            "NeuralODE(..., solver=diffrax.Kvaerno5()); a long one a larger max_steps."
        )
    # A little padding lets a compiled function serve again where the number of steps has changed a little.
    num_steps = int(np.max(np.asarray(accepted)))
    least = like.boundaries.shape[1] - 1 if isinstance(like, ReplayedFlow) else 0
    if num_steps > least:
        least = num_steps + int(spare * num_steps)
    padded = min(least + (-least) % 4, model.max_steps)
    return ReplayedFlow(view, ts, y0, args, boundaries[:, : padded + 1])


def tightened(flow: ReplayedFlow, factor: float) -> ReplayedFlow:
    """The flow on the steps that its solver takes with tolerances that are `factor` times smaller.

    **Raises:** `LaplodeError` when its steps are not chosen by a tolerance, or there are too many of them.
    """
    rest = flow.parameters.rest
    has_tolerance = lambda node: hasattr(node, "rtol") and hasattr(node, "atol")
    nodes, structure = jax.tree.flatten(rest.stepsize_controller, is_leaf=has_tolerance)
    if not any(map(has_tolerance, nodes)):
        raise LaplodeError(
            f"`posterior` is of a model whose steps have no tolerance ({type(rest.stepsize_controller).__name__}): "
            "compare with a smaller `dt0` by hand, or take diffrax.PIDController(rtol, atol)."
        )
    smaller = lambda node: eqx.tree_at(lambda c: (c.rtol, c.atol), node, (node.rtol / factor, node.atol / factor))
    controller = jax.tree.unflatten(structure, [smaller(node) if has_tolerance(node) else node for node in nodes])
    view = eqx.tree_at(lambda p: p.rest.stepsize_controller, flow.parameters, controller)
    inputs = (view.model, flow.ts, flow.y0, flow.args)
    boundaries, accepted, _, y_last = accepted_steps(*inputs)
    if not np.all(np.isfinite(np.asarray(y_last))) or np.any(
        np.asarray(boundaries[:, -1]) < np.asarray(flow.ts[:, -1])
    ):
        raise LaplodeError(
            f"`posterior` can't be compared with tolerances {factor:g} times smaller: with max_steps = "
            f"{view.model.max_steps} the solve does not arrive. Allow more steps."
        )
    return dataclasses.replace(flow, parameters=view, boundaries=boundaries[:, : int(np.max(np.asarray(accepted))) + 1])


# ---- Replaying it


@dataclasses.dataclass(frozen=True)
class _Tableau:
    """An explicit Runge-Kutta method: stages z_i = y + Σ_j a_ij k_j, k_i = h f(t + c_i h, z_i)."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray

    @property
    def num_stages(self) -> int:
        return len(self.b)


def _explicit_tableau(solver: diffrax.AbstractSolver) -> _Tableau | None:
    tableau = getattr(solver, "tableau", None)
    if not isinstance(solver, diffrax.AbstractERK) or not isinstance(tableau, diffrax.ButcherTableau):
        return None
    num = tableau.num_stages
    a = np.zeros((num, num))
    for i, row in enumerate(tableau.a_lower):
        a[i + 1, : i + 1] = row
    return _Tableau(a, np.asarray(tableau.b_sol), np.concatenate([[tableau.c1 or 0.0], tableau.c]))


def _locate(boundaries: Float[Array, " steps+1"], ts: Float[Array, " T"]) -> Int[Array, " T"]:
    """The step in which each time falls; a time at a boundary belongs to the step before it, as in Diffrax."""
    return jnp.clip(jnp.searchsorted(boundaries[1:], ts, side="left"), 0, boundaries.size - 2)


def _replay_explicit(tableau: _Tableau, model: NeuralODE, boundaries, y0, args, push=None):
    """States at the start of each step (steps, D), stages and increments (steps, stages, D).

    `push`, of the shape of the increments, is added to them.
    """

    a, c = jnp.asarray(tableau.a), jnp.asarray(tableau.c)

    def step(y, interval):
        t0, t1, push = interval
        h = t1 - t0

        # A loop, not one stage written out after the other: second derivatives of it compile in a third of the time.
        def stage(increments, i):
            z = y + a[i] @ increments
            increment = h * model.vector_field(t0 + c[i] * h, z, args)
            increment = increment if push is None else increment + push[i]
            return increments.at[i].set(increment), z

        nothing = jnp.zeros((tableau.num_stages, *y.shape))
        increments, stages = jax.lax.scan(stage, nothing, jnp.arange(tableau.num_stages))
        return y + tableau.b @ increments, (y, stages, increments)

    return jax.lax.scan(step, y0, (boundaries[:-1], boundaries[1:], push))[1]


def _output_weights(model: NeuralODE, tableau: _Tableau, t0, t1, t) -> Float[Array, " stages"]:
    """Weights w with y(t) = y(t0) + Σ_i w_i k_i: the solver's interpolation is linear in its increments."""

    def interpolate(y0, y1, k):
        return model.solver.interpolation_cls(t0=t0, t1=t1, y0=y0, y1=y1, k=k).evaluate(t)

    zero = jnp.zeros(())
    # Its coefficients, read off by differentiating a scalar state; y1 = y0 + Σ_i b_i k_i is folded in.
    _, dy1, dk = jax.grad(interpolate, (0, 1, 2))(zero, zero, jnp.zeros(tableau.num_stages))
    return dk + dy1 * tableau.b


def _states_explicit(tableau, model, boundaries, ts, y0, args):
    starts, _, increments = _replay_explicit(tableau, model, boundaries, y0, args)
    step, weights = _observed(tableau, model, boundaries, ts)
    return starts[step] + jnp.einsum("ts,tsd->td", weights, increments[step])


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


def _states_general(model: NeuralODE, boundaries, ts, y0, args):
    """Any Diffrax solver, one step after another through its own `step`."""
    terms = diffrax.ODETerm(model.vector_field)
    solver = _with_tolerances(model)
    if getattr(solver, "scan_kind", "none") is None:  # a loop over stages that has all modes of differentiation
        solver = eqx.tree_at(lambda s: s.scan_kind, solver, "bounded", is_leaf=lambda node: node is None)
    state = solver.init(terms, boundaries[0], boundaries[1], y0, args)

    def step(carry, interval):
        y, state = carry
        t0, t1 = interval
        y1, _, dense, state1, _ = solver.step(terms, t0, t1, y, args, state, made_jump=False)
        # An implicit solver may not make sense of a step of length zero; it is skipped whole.
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(t1 > t0, a, b), new, old)
        return keep((y1, state1), (y, state)), dense

    _, dense = jax.lax.scan(step, (y0, state), (boundaries[:-1], boundaries[1:]))

    def interpolate(step, t):
        info = jax.tree.map(lambda x: x[step], dense)
        return solver.interpolation_cls(t0=boundaries[step], t1=boundaries[step + 1], **info).evaluate(t)

    return jax.vmap(interpolate)(_locate(boundaries, ts), ts)


@eqx.filter_jit  # traced once for all that is made of it
def _replay(model: NeuralODE, boundaries, ts, y0, args) -> Float[Array, "N T K"]:
    tableau = _explicit_tableau(model.solver)

    def one(boundaries, ts, y0, args):
        y0 = model.initial_state(y0)
        if tableau is None:
            states = _states_general(model, boundaries, ts, y0, args)
        else:
            states = _states_explicit(tableau, model, boundaries, ts, y0, args)
        return model.observe_states(states, args)

    return jax.vmap(one)(boundaries, ts, y0, args)


# ---- Its sensitivities


class _Solved(eqx.Module):
    """One trajectory replayed, with all that the tangents of its steps need.

    The tangent of a step is linear in the sensitivity S = ∂y/∂θ (D×P) at its start and in the local Jacobians
    G_i = ∂f/∂θ (D×P) at its stages: whatever is read off at weights w is

        y + Σ_i w_i k_i   with tangent   A_w S + Σ_i C_wi G_i,

    where A_w and C_wi are small D×D matrices of the tableau and ∂f/∂y. So each reading costs D vector-Jacobian
    products, summed over the stages inside the product, and S is touched once a step, not once a stage.
    """

    starts: Float[Array, "steps D"]
    stages: Float[Array, "steps stages D"]
    increments: Float[Array, "steps stages D"]
    h: Float[Array, " steps"]
    times: Float[Array, "steps stages"]
    through_y: Float[Array, "steps stages D D"]
    through_f: Float[Array, "steps stages stages D D"]

    def __init__(self, model: NeuralODE, tableau: _Tableau, boundaries, y0, args):
        y0 = model.initial_state(y0)
        self.starts, self.stages, self.increments = _replay_explicit(tableau, model, boundaries, y0, args)
        self.h = jnp.diff(boundaries)
        self.times = boundaries[:-1, None] + tableau.c * self.h[:, None]
        field_y = jax.jacrev(lambda y, t: model.vector_field(t, y, args))
        local = self.h[:, None, None, None] * jax.vmap(jax.vmap(field_y))(self.stages, self.times)
        self.through_y, through_f = _stage_tangents(tableau, local)
        self.through_f = through_f * self.h[:, None, None, None, None]

    @property
    def dim(self) -> int:
        """D."""
        return self.starts.shape[-1]

    def state(self, step, weights) -> Float[Array, " D"]:
        """What is read off at some weights."""
        return self.starts[step] + weights @ self.increments[step]

    def tangent(self, parameters: Parameters, args, step, weights) -> tuple[Float[Array, "D D"], PyTree]:
        """A_w (D, D) and Σ_i C_wi G_i, its D rows as the parameters are."""

        def field(selected):
            f = parameters.build(selected).vector_field
            return jax.vmap(lambda t, y: f(t, y, args))(self.times[step], self.stages[step])

        cotangents = jnp.einsum("s,sjde->dje", weights, self.through_f[step])
        (source,) = jax.vmap(jax.vjp(field, parameters.selected)[1])(cotangents)
        transition = jnp.eye(self.dim) + jnp.einsum("s,sde->de", weights, self.through_y[step])
        return transition, source


class _Readings(eqx.Module):
    """What to read off a solve, in the order of time: step, weights, the row to fill, whether to advance after it.

    To the readings asked for come the ends of all steps, at which the sensitivity advances; these fill the row that the
    next reading will overwrite. Split into blocks.
    """

    steps: Int[Array, "blocks block"]
    weights: Float[Array, "blocks block stages"]
    rows: Int[Array, "blocks block"]
    advance: Bool[Array, "blocks block"]

    def __init__(self, tableau: _Tableau, num_steps: int, steps, weights, row_bytes: int):
        num = steps.size
        all_steps = jnp.concatenate([steps, jnp.arange(num_steps)])
        weights = jnp.concatenate([weights, jnp.broadcast_to(tableau.b, (num_steps, tableau.num_stages))])
        advance = jnp.arange(num + num_steps) >= num
        order = jnp.lexsort((advance, all_steps))
        place = jnp.arange(order.size)
        asked = order < num
        last = jnp.max(jnp.where(asked, place, 0))
        next_asked = jax.lax.cummin(jnp.where(asked, place, last), reverse=True)
        block = max(1, min(_BLOCK_BYTES // row_bytes, order.size))
        # Whatever comes after the last reading repeats it.
        padded = jnp.minimum(jnp.arange(order.size + (-order.size) % block), last)
        cut = lambda x: x.reshape(-1, block, *x.shape[1:])
        self.steps, self.weights, self.advance = (cut(x[order][padded]) for x in (all_steps, weights, advance))
        self.rows = cut(order[next_asked][padded])


def _fill(parameters, model, solved: _Solved, readings: _Readings, y0, args, observe: bool, offset, buffer):
    """Write the tangents of all readings, of the states or of what is seen of them, into rows offset … of `buffer`."""
    pull = jax.vjp(lambda s: parameters.build(s).initial_state(y0), parameters.selected)[1]
    (initial,) = jax.vmap(pull)(jnp.eye(solved.dim))
    push = lambda matrix, tangents: jnp.tensordot(matrix, tangents, 1)

    def read(step, weights):
        seen = _observe_tangents(parameters, solved.state(step, weights), args) if observe else None
        return solved.tangent(parameters, args, step, weights), seen

    def one(carry, reading):
        buffer, sensitivity = carry
        row, advance, ((transition, source), seen) = reading
        tangent = jax.tree.map(lambda s, b: push(transition, s) + b, sensitivity, source)
        value = tangent if seen is None else jax.tree.map(lambda s, b: push(seen[1], s) + b, tangent, seen[0])
        # Leaf by leaf: to join them into rows first would be to write everything twice.
        for leaf, (_, _, start, _) in zip(jax.tree.leaves(value), parameters.leaves, strict=True):
            rows = leaf.reshape(1, leaf.shape[0], -1)
            buffer = jax.lax.dynamic_update_slice(buffer, rows, (offset + row, 0, start))
        keep = lambda new, old: jnp.where(advance, new, old)
        return (buffer, jax.tree.map(keep, tangent, sensitivity)), None

    def block(carry, r: _Readings):
        return jax.lax.scan(one, carry, (r.rows, r.advance, jax.vmap(read)(r.steps, r.weights)))

    return jax.lax.scan(block, (buffer, initial), readings)[0][0]


def _observe_tangents(parameters: Parameters, y, args):
    """Of the observation function at a state: ∂/∂θ, K rows as the parameters are, and ∂/∂y (K, D)."""
    observe = lambda selected, y: parameters.build(selected).observe_states(y[None], args)[0]
    seen, pull = jax.vjp(observe, parameters.selected, y)
    return jax.vmap(pull)(jnp.eye(seen.size))


def _observed(tableau: _Tableau, model: NeuralODE, boundaries, ts):
    """The step in which each observation falls, and the weights at which it is read off."""
    step = _locate(boundaries, ts)
    weights = jax.vmap(ft.partial(_output_weights, model, tableau))(boundaries[step], boundaries[step + 1], ts)
    return step, weights


def _sensitivity(
    flow: ReplayedFlow, theta: Float[Array, " P"]
) -> tuple[Float[Array, "N T K"], Float[Array, "N*T*K P"]]:
    """Predictions, and ∂ predictions / ∂θ of explicit Runge-Kutta steps by local vector-Jacobian products (`_Solved`).

    Filled row by row: beside the result only S and a block of products are held.
    """
    parameters = eqx.tree_at(lambda p: p.selected, flow.parameters, flow.parameters.with_vector(theta))
    model = parameters.model
    tableau = _explicit_tableau(model.solver)
    assert tableau is not None
    num_times = flow.ts.shape[1]

    def trajectory(i, filled):
        predictions, buffer = filled
        boundaries, ts, y0, args = jax.tree.map(lambda x: x[i], (flow.boundaries, flow.ts, flow.y0, flow.args))
        solved = _Solved(model, tableau, boundaries, y0, args)
        step, weights = _observed(tableau, model, boundaries, ts)
        readings = _Readings(tableau, boundaries.size - 1, step, weights, 8 * solved.dim * theta.size)
        seen = model.observe_states(jax.vmap(solved.state)(step, weights), args)
        observe = not model.sees_states
        buffer = _fill(parameters, model, solved, readings, y0, args, observe, i * num_times, buffer)
        return predictions.at[i].set(seen), buffer

    shape = jax.eval_shape(flow, theta).shape
    empty = jnp.zeros(shape), jnp.zeros((shape[0] * num_times, shape[2], theta.size))
    predictions, buffer = jax.lax.fori_loop(0, shape[0], trajectory, empty)
    return predictions, buffer.reshape(-1, theta.size)


class LocalLagrangian(eqx.Module):
    """θ ↦ Σ ⟨λ, f(t, z; θ)⟩ + Σ ⟨c, observe(y; θ)⟩ + Σ ⟨μ, y0(θ)⟩ at the frozen states of a solve.

    z are the stages and λ their adjoints times the step size, y the states observed and c the cotangents of the
    predictions, μ the adjoints of the initial states. Its Hessian is the part of ⟨c, ∇² predictions⟩ in which θ enters
    directly on both sides; no solve is left in it.
    """

    parameters: Parameters
    times: Float[Array, " points"]
    stages: Float[Array, "points D"]
    adjoints: Float[Array, "points D"]
    stage_args: PyTree
    states: Float[Array, "N*T D"]
    cotangents: Float[Array, "N*T K"]
    state_args: PyTree
    initial_adjoints: Float[Array, "N D"]
    y0: Array | None

    def __init__(self, flow: "ReplayedFlow", times, stages, adjoints, states, initial_adjoints, cotangents):
        self.parameters = flow.parameters
        self.initial_adjoints, self.y0 = initial_adjoints, flow.y0
        # Steps of length zero and stages that nothing is made of have no adjoint: they are left out.
        times, stages, adjoints = (np.asarray(x) for x in (times, stages, adjoints))
        used = np.nonzero(np.any(adjoints != 0, axis=-1))
        spare = (-len(used[0])) % 64  # a little padding lets a compiled function serve again
        padded = tuple(np.concatenate([index, np.zeros(spare, int)]) for index in used)
        self.times, self.stages = jnp.asarray(times[padded]), jnp.asarray(stages[padded])
        self.adjoints = jnp.asarray(np.concatenate([adjoints[used], np.zeros((spare, adjoints.shape[-1]))]))
        self.stage_args = jax.tree.map(lambda x: x[padded[0]], flow.args)
        self.states = states.reshape(-1, states.shape[-1])
        self.cotangents = cotangents.reshape(-1, cotangents.shape[-1])
        self.state_args = jax.tree.map(lambda x: jnp.repeat(x, states.shape[1], axis=0), flow.args)

    def __call__(self, theta: Float[Array, " P"]) -> Float[Array, ""]:
        model = self.parameters.unravel(theta)
        at_stage = jax.vmap(ft.partial(_at_stage, model))
        total = jnp.sum(at_stage(self.times, self.stages, self.adjoints, self.stage_args))
        total += jnp.sum(
            self.initial_adjoints * jax.vmap(model.initial_state, axis_size=len(self.initial_adjoints))(self.y0)
        )
        if model.sees_states:
            return total
        at_observation = jax.vmap(ft.partial(_at_observation, model))
        return total + jnp.sum(at_observation(self.states, self.cotangents, self.state_args))


def _at_stage(model: NeuralODE, t, z, adjoint, args) -> Float[Array, ""]:
    return adjoint @ model.vector_field(t, z, args)


def _at_observation(model: NeuralODE, y, cotangent, args) -> Float[Array, ""]:
    return cotangent @ model.observe_states(y[None], args)[0]


def local_hessian(
    flow: ReplayedFlow, cotangents, weights, mesh: Mesh | None = None
) -> tuple[LocalLagrangian, Float[Array, "P P"]]:
    """Jᵀ W J + ⟨cotangents, ∇² predictions⟩ in two parts: the Hessian of the first, plus the second.

    With cotangents (N, T, F) and W (N, T, F, F) the first and second derivatives of a loss in the predictions, that is
    the loss's Hessian. A Runge-Kutta step is linear but for its vector field, so second derivatives arise only there:
    with the local (D+P)×(D+P) Hessian M of h⟨λ, f(z; θ)⟩ at each stage and Z = ∂z/∂θ,

        Zᵀ M_zz Z + Zᵀ M_zθ + M_θz Z + M_θθ,

    of which the last is the Hessian of the Lagrangian and the others are one matrix product. Compared with pushing P
    tangents through the solve and back, nothing is sequential any more.
    """
    points, rest = over_rows(mesh, _cross_terms, flow.parameters, flow.rows, (cotangents, weights))
    return LocalLagrangian(flow, *points, cotangents), rest  # pyright: ignore[reportCallIssue]


@eqx.filter_jit
def _cross_terms(view: Parameters, rows: dict[str, PyTree], derivatives: tuple[Array, Array]):
    """What the Lagrangian is made of, times, stages, adjoints, observed states, initial adjoints; and all but M_θθ."""
    flow = ReplayedFlow(view, **rows)
    cotangents, weights = derivatives
    theta, model = view.vector, view.model
    tableau = _explicit_tableau(model.solver)
    assert tableau is not None
    num_stages = tableau.num_stages
    num_steps = flow.boundaries.shape[1] - 1

    def adjoint(i):
        boundaries, ts, y0, args = jax.tree.map(lambda x: x[i], (flow.boundaries, flow.ts, flow.y0, flow.args))
        step, weights = _observed(tableau, model, boundaries, ts)

        def seen(push, y_start):  # what is predicted when every increment is pushed a little
            starts, stages, increments = _replay_explicit(tableau, model, boundaries, y_start, args, push)
            states = starts[step] + jnp.einsum("ts,tsd->td", weights, increments[step])
            return jnp.sum(cotangents[i] * model.observe_states(states, args)), (stages, states)

        start = model.initial_state(y0)
        nowhere = jnp.zeros((num_steps, num_stages, start.size))
        (adjoints, initial), (stages, states) = jax.grad(seen, (0, 1), has_aux=True)(nowhere, start)
        h = jnp.diff(boundaries)
        times = boundaries[:-1, None] + tableau.c * h[:, None]
        return times, stages, h[:, None, None] * adjoints, states, initial

    points = jax.vmap(adjoint)(jnp.arange(flow.num_trajectories))

    def trajectory(i, total):
        boundaries, ts, y0, args = jax.tree.map(lambda x: x[i], (flow.boundaries, flow.ts, flow.y0, flow.args))
        solved = _Solved(model, tableau, boundaries, y0, args)
        step, read_weights = _observed(tableau, model, boundaries, ts)
        # The stages of all steps, read off at the rows of the tableau, then the observations.
        steps = jnp.concatenate([jnp.repeat(jnp.arange(num_steps), num_stages), step])
        read_weights = jnp.concatenate([jnp.tile(tableau.a, (num_steps, 1)), read_weights])
        readings = _Readings(tableau, num_steps, steps, read_weights, 8 * solved.dim * theta.size)
        buffer = jnp.zeros((steps.size, solved.dim, theta.size))
        tangents = _fill(view, model, solved, readings, y0, args, False, 0, buffer)
        flat = lambda x: x.reshape(-1, x.shape[-1])
        of_stages, of_states = tangents[: num_steps * num_stages], tangents[num_steps * num_stages :]

        def mixed(function, point):
            """M_zz (D, D) and M_zθ (D, P) of a scalar function of (θ, z)."""
            gradient = jax.grad(function, (0, 1))
            column = lambda e: jax.jvp(lambda z: gradient(theta, z), (point,), (e,))[1]
            by_theta, by_point = jax.vmap(column)(jnp.eye(point.size))
            return by_point, by_theta

        def half(curvature, tangent):  # the other half comes by symmetry
            by_point, by_theta = curvature
            return 0.5 * by_point @ tangent + by_theta

        at_stage = lambda t, z, a: mixed(lambda theta, z: _at_stage(view.unravel(theta), t, z, a, args), z)
        x = tuple(x[i].reshape(-1, *x.shape[3:]) for x in points[:3])
        left, right = [flat(of_stages)], [flat(jax.vmap(half)(jax.vmap(at_stage)(*x), of_stages))]
        states = points[3][i]
        if model.sees_states:
            jacobian = of_states
        else:
            at_observation = lambda y, c: mixed(lambda theta, y: _at_observation(view.unravel(theta), y, c, args), y)
            curvature = jax.vmap(at_observation)(states, cotangents[i])
            left.append(flat(of_states))
            right.append(flat(jax.vmap(half)(curvature, of_states)))
            observe = lambda theta, y: view.unravel(theta).observe_states(y[None], args)[0]
            by_theta, by_state = jax.vmap(jax.jacrev(observe, (0, 1)), (None, 0))(theta, states)
            jacobian = by_state @ of_states + by_theta
        left.append(flat(jacobian))
        right.append(0.5 * flat(weights[i] @ jacobian))
        return total + jnp.concatenate(left).T @ jnp.concatenate(right)

    half = jax.lax.fori_loop(0, flow.num_trajectories, trajectory, jnp.zeros((theta.size, theta.size)))
    return points, half + half.T


def local_hessian_bytes(flow: AbstractFlow) -> int | None:
    """The memory that `local_hessian` takes beside its result; None where it does not apply."""
    if not isinstance(flow, ReplayedFlow):
        return None
    tableau = _explicit_tableau(flow.parameters.model.solver)
    if tableau is None:
        return None
    rows = (flow.boundaries.shape[1] - 1) * tableau.num_stages + 2 * flow.ts.shape[1]
    return 4 * 8 * rows * flow.num_states * flow.parameters.size


def _stage_tangents(tableau: _Tableau, local: Float[Array, "steps stages D D"]):
    """Of the increments k_i of each step: ∂k_i/∂y (steps, stages, D, D), ∂k_i/∂(h f_j) (steps, stages, stages, D, D).

    `local` is h ∂f/∂y at the stages. From k_i = h f(z_i), z_i = y + Σ_j a_ij k_j, differentiated stage after stage.
    """
    num_steps, num, dim, _ = local.shape
    a = jnp.asarray(tableau.a)
    # Of k_i, a row for y and one for each h f_j.
    identity = jnp.broadcast_to(jnp.eye(dim), (num_steps, dim, dim))

    def stage(tangents, i):
        of_z = jnp.einsum("m,smjde->sjde", a[i], tangents).at[:, 0].add(identity)
        of_k = jnp.einsum("sde,sjef->sjdf", local[:, i], of_z).at[:, i + 1].add(identity)
        return tangents.at[:, i].set(of_k), None

    tangents = jax.lax.scan(stage, jnp.zeros((num_steps, num, num + 1, dim, dim)), jnp.arange(num))[0]
    return tangents[:, :, 0], tangents[:, :, 1:]


# ---- Or by automatic differentiation

_CHUNK = 32


def _jacobian_by_jvp(flow: AbstractMap, theta):
    push = lambda v: jax.jvp(flow, (theta,), (v,))[1]
    columns = jax.lax.map(lambda i: push(jnp.zeros_like(theta).at[i].set(1)), jnp.arange(theta.size), batch_size=_CHUNK)
    return flow(theta), columns.reshape(theta.size, -1).T


def _jacobian_by_vjp(flow: AbstractMap, theta):
    predictions, pull = jax.vjp(flow, theta)
    row = lambda i: pull(jnp.zeros(predictions.size).at[i].set(1).reshape(predictions.shape))[0]
    return predictions, jax.lax.map(row, jnp.arange(predictions.size), batch_size=_CHUNK)


_AUTODIFF: dict[str, Callable[[AbstractMap, Array], tuple[Array, Array]]] = {
    "jvp": _jacobian_by_jvp,
    "vjp": _jacobian_by_vjp,
}


def _push(flow: AbstractMap):
    theta = flow.parameters.vector
    return jax.jvp(flow, (theta,), (theta,))


def _pull(flow: AbstractMap):
    predictions, pull = jax.vjp(flow, flow.parameters.vector)
    return pull(predictions)


def _push_twice(flow: AbstractMap):
    theta = flow.parameters.vector
    once = lambda at: jax.jvp(flow, (at,), (theta,))[1]
    return jax.jvp(once, (theta,), (theta,))


def _push_gradient(flow: AbstractMap):
    theta = flow.parameters.vector
    # What is replayed has all derivatives that its vector field has.
    function = _field_at_start(flow) if isinstance(flow, ReplayedFlow) else flow
    # A square, so that what is pulled back has a tangent of its own, as it has with a likelihood.
    return jax.jvp(jax.grad(lambda theta: jnp.sum(function(theta) ** 2)), (theta,), (theta,))


def _has(derivative: Callable[[AbstractMap], Any], flow: AbstractMap) -> bool:
    """Whether `derivative(flow)` can be had. That takes a trace of the model, and is remembered as `jit` would."""
    leaves, treedef = jax.tree.flatten(flow)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) if eqx.is_array(x) else x for x in leaves)
    try:
        return _lowers(derivative, treedef, shapes)
    except TypeError:  # a leaf without a hash
        return _lowers.__wrapped__(derivative, treedef, leaves)


@ft.lru_cache(maxsize=128)
def _lowers(derivative: Callable[[AbstractMap], Any], treedef: Any, leaves: Sequence[Any]) -> bool:
    """Models refuse in many ways, so any exception counts.

    It is lowered, not only traced: that `custom_vjp` has no forward mode shows no earlier.
    """
    arrays, others = eqx.partition(leaves, lambda leaf: isinstance(leaf, jax.Array | jax.ShapeDtypeStruct))
    try:
        jax.jit(lambda arrays: derivative(jax.tree.unflatten(treedef, eqx.combine(arrays, others)))).lower(arrays)
    except Exception:
        return False
    return True


def has_reverse(flow: AbstractMap) -> bool:
    """Whether `flow` can be differentiated in reverse, as foreign models solved with `ForwardMode` can't."""
    return isinstance(flow, ReplayedFlow) or _has(_pull, flow)


def has_second_pushforward(flow: AbstractMap) -> bool:
    """Whether `flow` can be differentiated forward twice."""
    return isinstance(flow, ReplayedFlow) or _has(_push_twice, flow)


def jacobian_route(flow: AbstractMap) -> str:
    """How `flow.jacobian` is cheapest: "sensitivity", "jvp" (P tangents) or "vjp" (one pull a prediction)."""
    if isinstance(flow, ReplayedFlow) and flow.has_sensitivity:
        return "sensitivity"
    theta = flow.parameters.vector
    predictions = jax.eval_shape(flow, theta)
    by_jvp = _has(_push, flow)
    # A pull costs about as much as two pushes, and holds the whole solve in memory.
    if by_jvp and theta.size <= 2 * predictions.size:
        return "jvp"
    if has_reverse(flow):
        return "vjp"
    if by_jvp:
        return "jvp"
    raise LaplodeError(
        "`model` can be differentiated neither forward nor in reverse. Inside it, solve with "
        "diffrax.diffeqsolve(..., adjoint=diffrax.DirectAdjoint()), or build it as laplode.NeuralODE(vector_field)."
    )


@eqx.filter_jit
def evaluate(flow: AbstractMap, theta: Float[Array, " P"]) -> Float[Array, "..."]:
    """The predictions at `theta`, compiled."""
    return flow(theta)


@eqx.filter_jit
def _linearized(flow: AbstractMap, theta, route: str):
    return flow.linearized(theta, route)


@eqx.filter_jit
def _linearized_rows(shared: tuple[type[AbstractFlow], Parameters, str], rows: dict[str, PyTree], _):
    """Predictions (N, T, F) and their Jacobian (N, T·F, P) of some trajectories; no sums."""
    kind, view, route = shared
    predictions, jacobian = kind(view, **rows).linearized(view.vector, route)
    return (predictions, jacobian.reshape(len(predictions), -1, view.size)), ()


def linearize(
    flow: AbstractMap, route: str | None = None, *, mesh: Mesh | None = None
) -> tuple[Float[Array, "..."], Float[Array, "M P"]]:
    """Values at the present parameters, such as predictions, and their Jacobian with a row for each of them in order.

    To find the `route` takes traces of the model; who comes often hands it over. Trajectories are spread over a `mesh`.

    The Jacobian may be as large as memory allows: outside of `jit`, even a reshape would copy it.
    """
    route = route or jacobian_route(flow)
    if mesh is None or not isinstance(flow, AbstractFlow):
        return _linearized(flow, flow.parameters.vector, route)
    shared = (type(flow), flow.parameters, route)
    (predictions, jacobian), _ = over_rows(mesh, _linearized_rows, shared, flow.rows)
    return predictions, jacobian.reshape(-1, flow.parameters.size)


def _field_at_start(flow: ReplayedFlow) -> Callable[[Array], Array]:
    """θ ↦ the vector field, and what is observed, at the start of the first trajectory."""
    ts, y0, args = jax.tree.map(lambda x: x[0], (flow.ts, flow.y0, flow.args))

    def function(theta):
        model = flow.parameters.unravel(theta)
        start = model.initial_state(y0)
        slope = model.vector_field(ts[0], start, args)
        return jnp.concatenate([slope.ravel(), model.observe_states(start[None], args).ravel()])

    return function


def check_second_order(flow: AbstractFlow) -> None:
    """Raise `LaplodeError` where the model has no forward-over-reverse derivative, showing the line to change."""
    if not _has(_push_gradient, flow):
        raise LaplodeError(
            "`model` has no second derivatives, as with Diffrax's default adjoint. Change the line\n"
            "    diffrax.diffeqsolve(...)\nto\n    diffrax.diffeqsolve(..., adjoint=diffrax.DirectAdjoint())\n"
            "(its values stay the same), or build the model as laplode.NeuralODE(vector_field), or take "
            'curvature="ggn", which needs first derivatives only.'
        )

"""All that knows how an ODE is integrated, and how its solution depends on the parameters.

The adaptive solve is done once, by Diffrax. Its accepted steps are then frozen, and every derivative is taken of the
replay of those steps: a step size controller is not differentiated by Diffrax either, so the replay has the same values
and the same derivatives to rounding, but it rejects nothing, knows its length beforehand, and has forward, reverse and
mixed modes.
"""

import abc
import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ._errors import LaplodeError
from ._model import NeuralODE, predict_trajectory
from ._vector import Parameters

# Bytes of right-hand sides computed at once in a sensitivity solve: small enough for a processor's cache.
_BLOCK_BYTES = 2**21


class AbstractFlow(eqx.Module):
    """θ ↦ predictions (N, T, K) of N trajectories: the solution map, with its derivatives."""

    parameters: eqx.AbstractVar[Parameters]
    ts: eqx.AbstractVar[Float[Array, "N T"]]
    y0: eqx.AbstractVar[Float[Array, "N D"] | None]
    args: eqx.AbstractVar[PyTree]

    @abc.abstractmethod
    def __call__(self, theta: Float[Array, " P"]) -> Float[Array, "N T K"]:
        """The predictions, differentiable in `theta`."""

    @abc.abstractmethod
    def jacobian(self, theta: Float[Array, " P"], route: str) -> Float[Array, "N*T*K P"]:
        """∂ predictions / ∂θ by one of the routes of `jacobian_route`, a row for each prediction in order."""

    @property
    def num_trajectories(self) -> int:
        """N."""
        return self.ts.shape[0]


class ForeignFlow(AbstractFlow):
    """Any model, differentiated automatically."""

    parameters: Parameters
    ts: Float[Array, "N T"]
    y0: Float[Array, "N D"] | None
    args: PyTree

    def __call__(self, theta):
        model = self.parameters.unravel(theta)
        return jax.vmap(ft.partial(predict_trajectory, model))(self.ts, self.y0, self.args)

    def jacobian(self, theta, route):
        return _AUTODIFF[route](self, theta)


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
        model = self.parameters.unravel(theta)
        return jax.vmap(ft.partial(_replay, model))(self.boundaries, self.ts, self.y0, self.args)

    def jacobian(self, theta, route):
        if route == "sensitivity":
            return _sensitivity(self, theta)
        return _AUTODIFF[route](self, theta)

    @property
    def num_states(self) -> int:
        """D."""
        model = self.parameters.unravel(self.parameters.vector)
        return jax.eval_shape(model.initial_state, _first(self.y0)).size


# ---- From an adaptive solve to a frozen grid


@eqx.filter_jit
def _record(model: NeuralODE, ts, y0, args):
    def one(ts, y0, args):
        saveat = diffrax.SaveAt(t0=True, steps=True)
        solution = model.solve(ts, y0, args, saveat=saveat, adjoint=diffrax.ForwardMode(), throw=False)
        # Unused entries are infinite in Diffrax; here they repeat the final time: steps of length zero.
        times: Array = solution.ts  # pyright: ignore[reportAssignmentType]
        states: Array = solution.ys  # pyright: ignore[reportAssignmentType]
        accepted = solution.stats["num_accepted_steps"]
        last = jnp.max(jnp.where(jnp.isfinite(times), times, -jnp.inf))
        return jnp.minimum(times, last), accepted, solution.result, states[accepted]

    return jax.vmap(one)(ts, y0, args)


def flow(view: Parameters, ts: Array | np.ndarray, y0: Array | np.ndarray | None, args: PyTree) -> AbstractFlow:
    """The solution map of a model around its present parameters.

    **Raises:** `LaplodeError` when the solve fails there, naming the trajectory and the time.
    """
    as_float = lambda x: jnp.asarray(x, dtype=float) if eqx.is_inexact_array(x) else x
    inputs: tuple[Array, Array | None, PyTree] = jax.tree.map(as_float, (ts, y0, args))
    ts, y0, args = inputs
    model = view.unravel(view.vector)
    if not isinstance(model, NeuralODE):
        return ForeignFlow(view, ts, y0, args)
    boundaries, accepted, result, y_last = _record(model, ts, y0, args)
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
    padded = min(num_steps + (-num_steps) % 8, model.max_steps)
    return ReplayedFlow(view, ts, y0, args, boundaries[:, : padded + 1])


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


def _combine(coefficients: np.ndarray, terms: list[Array], like: Array) -> Array:
    """Σ_j coefficients[j] terms[j], leaving out the zeros."""
    total = jnp.zeros_like(like)
    for coefficient, term in zip(coefficients, terms, strict=False):
        if coefficient != 0:
            total = total + coefficient * term
    return total


def _locate(boundaries: Float[Array, " steps+1"], ts: Float[Array, " T"]) -> Int[Array, " T"]:
    """The step in which each time falls; a time at a boundary belongs to the step before it, as in Diffrax."""
    return jnp.clip(jnp.searchsorted(boundaries[1:], ts, side="left"), 0, boundaries.size - 2)


def _replay_explicit(tableau: _Tableau, model: NeuralODE, boundaries, y0, args):
    """States at the start of each step (steps, D), stages and increments (steps, stages, D)."""

    def step(y, interval):
        t0, t1 = interval
        h = t1 - t0
        stages, increments = [], []
        for i in range(tableau.num_stages):
            z = y + _combine(tableau.a[i], increments, y)
            stages.append(z)
            increments.append(h * model.vector_field(t0 + tableau.c[i] * h, z, args))
        return y + _combine(tableau.b, increments, y), (y, jnp.stack(stages), jnp.stack(increments))

    return jax.lax.scan(step, y0, (boundaries[:-1], boundaries[1:]))[1]


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
    step = _locate(boundaries, ts)
    weights = jax.vmap(ft.partial(_output_weights, model, tableau))(boundaries[step], boundaries[step + 1], ts)
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


def _replay(model: NeuralODE, boundaries, ts, y0, args) -> Float[Array, "T K"]:
    y0 = model.initial_state(y0)
    tableau = _explicit_tableau(model.solver)
    if tableau is None:
        states = _states_general(model, boundaries, ts, y0, args)
    else:
        states = _states_explicit(tableau, model, boundaries, ts, y0, args)
    return model.observe_states(states, args)


# ---- Its sensitivities


def _sensitivity(flow: ReplayedFlow, theta: Float[Array, " P"]) -> Float[Array, "N*T*K P"]:
    """∂ predictions / ∂θ of explicit Runge-Kutta steps, by local vector-Jacobian products.

    The tangent of a step is linear in the sensitivity S = ∂y/∂θ (D×P) and in the local Jacobians G_i = ∂f/∂θ (D×P) at
    its stages: whatever is read off at weights w is

        y + Σ_i w_i k_i   with tangent   A_w S + Σ_i C_wi G_i,

    with A_w and C_wi small D×D matrices of the tableau and ∂f/∂y. So each step and each observation costs D
    vector-Jacobian products, summed over the stages inside the product, and S is touched once a step, not once a stage.
    The matrix is filled row by row: beside it only S and a block of such products are held.
    """
    parameters = eqx.tree_at(lambda p: p.selected, flow.parameters, flow.parameters.with_vector(theta))
    model = parameters.model
    tableau = _explicit_tableau(model.solver)
    assert tableau is not None
    num_times = flow.ts.shape[1]

    def trajectory(i, jacobian):
        boundaries, ts, y0, args = jax.tree.map(lambda x: x[i], (flow.boundaries, flow.ts, flow.y0, flow.args))
        initial = lambda selected: eqx.combine(selected, parameters.rest).initial_state(y0)
        y_start, pull_initial = jax.vjp(initial, parameters.selected)
        dim = y_start.size
        (sensitivity,) = jax.vmap(pull_initial)(jnp.eye(dim))

        num_steps = boundaries.size - 1
        starts, stages, increments = _replay_explicit(tableau, model, boundaries, y_start, args)
        h = jnp.diff(boundaries)
        stage_times = boundaries[:-1, None] + tableau.c * h[:, None]
        field_y = jax.jacrev(lambda y, t: model.vector_field(t, y, args))
        local = h[:, None, None, None] * jax.vmap(jax.vmap(field_y))(stages, stage_times)
        through_y, through_theta = _stage_tangents(tableau, local)
        through_theta = through_theta * h[:, None, None, None, None]

        def read_off(step, weights):
            """A_w (D, D), Σ_i C_wi G_i (D, P) and, of the observation function, ∂/∂y (K, D) and ∂/∂θ (K, P)."""

            def field(selected):
                f = eqx.combine(selected, parameters.rest).vector_field
                return jax.vmap(lambda t, y: f(t, y, args))(stage_times[step], stages[step])

            cotangents = jnp.einsum("s,sjde->dje", weights, through_theta[step])
            (source,) = jax.vmap(jax.vjp(field, parameters.selected)[1])(cotangents)
            transition = jnp.eye(dim) + jnp.einsum("s,sde->de", weights, through_y[step])
            if model.observe is None:
                return transition, source, None
            observe = lambda selected, y: eqx.combine(selected, parameters.rest).observe_states(y[None], args)[0]
            seen, pull = jax.vjp(observe, parameters.selected, starts[step] + weights @ increments[step])
            return transition, source, jax.vmap(pull)(jnp.eye(seen.size))

        def one_read(carry, read):
            jacobian, sensitivity = carry
            row, advance, (transition, source, seen) = read
            push = lambda matrix, tangents: jnp.tensordot(matrix, tangents, 1)
            tangent = jax.tree.map(lambda s, b: push(transition, s) + b, sensitivity, source)
            value = tangent if seen is None else jax.tree.map(lambda s, b: push(seen[1], s) + b, tangent, seen[0])
            # Leaf by leaf: to join them into rows first would be to write everything twice.
            for leaf, (_, _, start, _) in zip(jax.tree.leaves(value), parameters.leaves, strict=True):
                rows = leaf.reshape(1, 1, leaf.shape[0], -1)
                jacobian = jax.lax.dynamic_update_slice(jacobian, rows, (i, row, 0, start))
            keep = lambda new, old: jnp.where(advance, new, old)
            return (jacobian, jax.tree.map(keep, tangent, sensitivity)), None

        def block_of_reads(carry, reads):
            steps, weights, rows, advance = reads
            return jax.lax.scan(one_read, carry, (rows, advance, jax.vmap(read_off)(steps, weights)))

        block = max(1, min(_BLOCK_BYTES // (8 * dim * theta.size), num_times + num_steps))
        reads = _reads(tableau, model, boundaries, ts, block)
        return jax.lax.scan(block_of_reads, (jacobian, sensitivity), reads)[0][0]

    empty = jnp.zeros((*jax.eval_shape(flow, theta).shape, theta.size))
    return jax.lax.fori_loop(0, flow.num_trajectories, trajectory, empty).reshape(-1, theta.size)


def _reads(tableau: _Tableau, model: NeuralODE, boundaries, ts, block: int):
    """All that is read off a solve, in the order of time: step, weights, row of the result, whether to advance.

    It comes in blocks. These are the observations, each filling its row, and the ends of the steps, at which the
    sensitivity advances; the latter write into the row that the next observation will overwrite.
    """
    num_steps, num_times = boundaries.size - 1, ts.size
    step = _locate(boundaries, ts)
    weights = jax.vmap(ft.partial(_output_weights, model, tableau))(boundaries[step], boundaries[step + 1], ts)
    ends = jnp.arange(num_steps)
    steps = jnp.concatenate([step, ends])
    weights = jnp.concatenate([weights, jnp.broadcast_to(tableau.b, (num_steps, tableau.num_stages))])
    rows = jnp.concatenate([jnp.arange(num_times), jnp.searchsorted(step, ends, side="right")])
    advance = jnp.arange(num_times + num_steps) >= num_times
    order = jnp.lexsort((advance, steps))
    # Whatever comes after the last observation repeats it.
    order = order[jnp.minimum(jnp.arange(order.size + (-order.size) % block), jnp.argmax(order == num_times - 1))]
    return jax.tree.map(lambda x: x[order].reshape(-1, block, *x.shape[1:]), (steps, weights, rows, advance))


def _stage_tangents(tableau: _Tableau, local: Float[Array, "steps stages D D"]):
    """Of the increments k_i of each step: ∂k_i/∂y (steps, stages, D, D), ∂k_i/∂(h f_j) (steps, stages, stages, D, D).

    `local` is h ∂f/∂y at the stages. From k_i = h f(z_i), z_i = y + Σ_j a_ij k_j, differentiated stage after stage.
    """
    num_steps, num, dim, _ = local.shape
    identity = jnp.broadcast_to(jnp.eye(dim), (num_steps, dim, dim))
    zero = jnp.zeros_like(identity)
    through_y: list[Array] = []
    through_f: list[list[Array]] = []
    for i in range(num):
        through_y.append(local[:, i] @ (identity + _combine(tableau.a[i], through_y, zero)))
        earlier = [
            local[:, i] @ _combine(tableau.a[i, j:i], [through_f[m][j] for m in range(j, i)], zero) for j in range(i)
        ]
        through_f.append([*earlier, identity, *[zero] * (num - i - 1)])
    return jnp.stack(through_y, 1), jnp.stack([jnp.stack(row, 1) for row in through_f], 1)


# ---- Or by automatic differentiation

_CHUNK = 32


def _jacobian_by_jvp(flow: AbstractFlow, theta):
    push = lambda v: jax.jvp(flow, (theta,), (v,))[1]
    columns = jax.lax.map(lambda i: push(jnp.zeros_like(theta).at[i].set(1)), jnp.arange(theta.size), batch_size=_CHUNK)
    return columns.reshape(theta.size, -1).T


def _jacobian_by_vjp(flow: AbstractFlow, theta):
    predictions, pull = jax.vjp(flow, theta)
    row = lambda i: pull(jnp.zeros(predictions.size).at[i].set(1).reshape(predictions.shape))[0]
    return jax.lax.map(row, jnp.arange(predictions.size), batch_size=_CHUNK)


_AUTODIFF: dict[str, Callable[[AbstractFlow, Array], Array]] = {"jvp": _jacobian_by_jvp, "vjp": _jacobian_by_vjp}


def _has(trace: Callable[[], Any]) -> bool:
    """Whether a transformation can be traced; models refuse in many ways, so any exception counts."""
    try:
        jax.eval_shape(trace)
    except Exception:
        return False
    return True


def jacobian_route(flow: AbstractFlow) -> str:
    """How `flow.jacobian` is cheapest: "sensitivity", "jvp" (P tangents) or "vjp" (one pull a prediction)."""
    theta = flow.parameters.vector
    predictions = jax.eval_shape(flow, theta)
    if isinstance(flow, ReplayedFlow):
        model = flow.parameters.unravel(theta)
        if _explicit_tableau(model.solver) is not None and flow.num_states <= theta.size:
            return "sensitivity"
    by_jvp = _has(lambda: jax.jvp(flow, (theta,), (theta,)))
    # A pull costs about as much as two pushes, and holds the whole solve in memory.
    if by_jvp and theta.size <= 2 * predictions.size:
        return "jvp"
    if _has(lambda: jax.vjp(flow, theta)[1](jnp.zeros(predictions.shape))):
        return "vjp"
    if by_jvp:
        return "jvp"
    raise LaplodeError(
        "`model` can be differentiated neither forward nor in reverse. Inside it, solve with "
        "diffrax.diffeqsolve(..., adjoint=diffrax.DirectAdjoint()), or build it as laplode.NeuralODE(vector_field)."
    )


def _first(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[0], tree)


@eqx.filter_jit
def _evaluate(flow: AbstractFlow, theta):
    return flow(theta)


@eqx.filter_jit
def _evaluate_jacobian(flow: AbstractFlow, theta, route: str):
    return flow.jacobian(theta, route)


def linearize(flow: AbstractFlow) -> tuple[Float[Array, "N T K"], Float[Array, "N*T*K P"]]:
    """Predictions at the present parameters, and their Jacobian with a row for each of them in order.

    The Jacobian may be as large as memory allows: outside of `jit`, even a reshape would copy it.
    """
    theta = flow.parameters.vector
    return _evaluate(flow, theta), _evaluate_jacobian(flow, theta, jacobian_route(flow))


def check_second_order(flow: AbstractFlow) -> None:
    """Raise `LaplodeError` where the model has no forward-over-reverse derivative, showing the line to change."""
    theta = flow.parameters.vector
    gradient = jax.grad(lambda theta: jnp.sum(flow(theta)))
    if not _has(lambda: jax.jvp(gradient, (theta,), (theta,))):
        raise LaplodeError(
            "`model` has no second derivatives, as with Diffrax's default adjoint. Change the line\n"
            "    diffrax.diffeqsolve(...)\nto\n    diffrax.diffeqsolve(..., adjoint=diffrax.DirectAdjoint())\n"
            "(its values stay the same), or build the model as laplode.NeuralODE(vector_field), or take "
            'curvature="ggn", which needs first derivatives only.'
        )

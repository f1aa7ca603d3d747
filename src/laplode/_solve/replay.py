"""The replay of a solver's accepted steps: values."""

import dataclasses
import functools as ft

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .._model.neural_ode import NeuralODE

# ---- Replaying it


class Steps(eqx.Module):
    """What the solves of N trajectories have left: the accepted steps, where they are read off, and what goes in.

    `boundaries[i]` holds the start of trajectory i's first step and the end of every step; short rows are padded by
    steps of length zero, which change nothing.
    """

    boundaries: Float[Array, "N steps+1"]
    ts: Float[Array, "N T"]
    y0: Float[Array, "N D"] | None
    args: PyTree

    def __getitem__(self, i) -> "Steps":
        """The steps of one trajectory."""
        return jax.tree.map(lambda x: x[i], self)


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
def _replay(model: NeuralODE, steps: Steps) -> Float[Array, "N T K"]:
    tableau = _explicit_tableau(model.solver)

    def one(each: Steps):
        boundaries, ts, args = each.boundaries, each.ts, each.args
        y0 = model.initial_state(each.y0)
        if tableau is None:
            states = _states_general(model, boundaries, ts, y0, args)
        else:
            states = _states_explicit(tableau, model, boundaries, ts, y0, args)
        return model.observe_states(states, args)

    return jax.vmap(one)(steps)


def _observed(tableau: _Tableau, model: NeuralODE, boundaries, ts):
    """The step in which each observation falls, and the weights at which it is read off."""
    step = _locate(boundaries, ts)
    weights = jax.vmap(ft.partial(_output_weights, model, tableau))(boundaries[step], boundaries[step + 1], ts)
    return step, weights

"""The second derivatives of replayed steps."""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from .._devices import compiled, over_rows
from .._model.neural_ode import NeuralODE
from .._model.parameters import Parameters
from .replay import Steps, _explicit_tableau, _observed, _replay_explicit, _Tableau, num_states, padded_size
from .sensitivity import _fill, _Readings, _Solved


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
    states: Float[Array, "NT D"]
    cotangents: Float[Array, "NT K"]
    state_args: PyTree
    initial_adjoints: Float[Array, "N D"]
    y0: Array | None
    args: PyTree

    def __init__(
        self, parameters: Parameters, steps: Steps, times, stages, adjoints, states, initial_adjoints, cotangents
    ):
        self.parameters = parameters
        self.initial_adjoints, self.y0, self.args = initial_adjoints, steps.y0, steps.args
        # Steps of length zero and stages that nothing is made of have no adjoint: they are left out.
        times, stages, adjoints = (np.asarray(x) for x in (times, stages, adjoints))
        used = np.nonzero(np.any(adjoints != 0, axis=-1))
        spare = padded_size(len(used[0]), parameters.size) - len(used[0])  # what was compiled serves again
        padded = tuple(np.concatenate([index, np.zeros(spare, int)]) for index in used)
        self.times, self.stages = jnp.asarray(times[padded]), jnp.asarray(stages[padded])
        self.adjoints = jnp.asarray(np.concatenate([adjoints[used], np.zeros((spare, adjoints.shape[-1]))]))
        self.stage_args = jax.tree.map(lambda x: x[padded[0]], steps.args)
        self.states = states.reshape(-1, states.shape[-1])
        self.cotangents = cotangents.reshape(-1, cotangents.shape[-1])
        self.state_args = jax.tree.map(lambda x: jnp.repeat(x, states.shape[1], axis=0), steps.args)

    def __call__(self, theta: Float[Array, " P"]) -> Float[Array, ""]:
        model = self.parameters.unravel(theta)
        at_stage = jax.vmap(ft.partial(_at_stage, model))
        total = jnp.sum(at_stage(self.times, self.stages, self.adjoints, self.stage_args))
        starts = jax.vmap(model.initial_state, axis_size=len(self.initial_adjoints))(self.y0, self.args)
        total += jnp.sum(self.initial_adjoints * starts)
        if model.sees_states:
            return total
        at_observation = jax.vmap(ft.partial(_at_observation, model))
        return total + jnp.sum(at_observation(self.states, self.cotangents, self.state_args))


def _at_stage(model: NeuralODE, t, z, adjoint, args) -> Float[Array, ""]:
    return adjoint @ model.vector_field(t, z, args)


def _at_observation(model: NeuralODE, y, cotangent, args) -> Float[Array, ""]:
    return cotangent @ model.observe_states(y[None], args)[0]


def local_hessian(
    parameters: Parameters, steps: Steps, cotangents, weights, mesh: Mesh | None = None
) -> tuple[LocalLagrangian, Float[Array, "P P"]]:
    """Jᵀ W J + ⟨cotangents, ∇² predictions⟩ in two parts: the Hessian of the first, plus the second.

    With cotangents (N, T, F) and W (N, T, F, F) the first and second derivatives of a loss in the predictions, that is
    the loss's Hessian. A Runge-Kutta step is linear but for its vector field, so second derivatives arise only there:
    with the local (D+P)×(D+P) Hessian M of h⟨λ, f(z; θ)⟩ at each stage and Z = ∂z/∂θ,

        Zᵀ M_zz Z + Zᵀ M_zθ + M_θz Z + M_θθ,

    of which the last is the Hessian of the Lagrangian and the others are one matrix product. Compared with pushing P
    tangents through the solve and back, nothing is sequential any more.
    """
    points, rest = over_rows(mesh, _cross_terms, parameters, steps, (cotangents, weights))
    return LocalLagrangian(parameters, steps, *points, cotangents), rest  # pyright: ignore[reportCallIssue]


@compiled
def _cross_terms(view: Parameters, steps: Steps, derivatives: tuple[Array, Array]):
    """What the Lagrangian is made of, times, stages, adjoints, observed states, initial adjoints; and all but M_θθ."""
    tableau = _explicit_tableau(view.model.solver)
    assert tableau is not None
    points = jax.vmap(ft.partial(_adjoints, view.model, tableau))(steps, derivatives[0])

    def trajectory(i, total):
        at, cotangents, weights = jax.tree.map(lambda x: x[i], (points, *derivatives))
        left, right = _factors(view, steps[i].args, at, cotangents, weights, _tangents(view, tableau, steps[i]))
        return total + left.T @ right

    half = jax.lax.fori_loop(0, len(steps.ts), trajectory, jnp.zeros((view.size, view.size)))
    return points, half + half.T


def _adjoints(model: NeuralODE, tableau: _Tableau, steps: Steps, cotangents: Float[Array, "T F"]):
    """Of one trajectory the times and values of the stages, their adjoints, observed states, and initial adjoints."""
    step, weights = _observed(tableau, model, steps)

    def seen(push, y_start):  # what is predicted when every increment is pushed a little
        starts, stages, increments = _replay_explicit(tableau, model, steps, y_start, push)
        states = starts[step] + jnp.einsum("ts,tsd->td", weights, increments[step])
        return jnp.sum(cotangents * model.observe_states(states, steps.args)), (stages, states)

    start = model.initial_state(steps.y0, steps.args)
    nowhere = jnp.zeros((steps.num_steps, tableau.num_stages, start.size))
    (adjoints, initial), (stages, states) = jax.grad(seen, (0, 1), has_aux=True)(nowhere, start)
    times = tableau.times(steps.starts, steps.ends)
    return times, stages, steps.lengths[:, None, None] * adjoints, states, initial


def _tangents(view: Parameters, tableau: _Tableau, steps: Steps):
    """Of one trajectory ∂z/∂θ of all stages, (steps·stages, D, P), and of the observed states, (T, D, P)."""
    solved = _Solved(view.model, tableau, steps)
    step, weights = _observed(tableau, view.model, steps)
    num_stages = steps.num_steps * tableau.num_stages
    # The stages of all steps, read off at the rows of the tableau, then the observations.
    places = jnp.concatenate([jnp.repeat(jnp.arange(steps.num_steps), tableau.num_stages), step])
    weights = jnp.concatenate([jnp.tile(tableau.a, (steps.num_steps, 1)), weights])
    readings = _Readings(tableau, steps.num_steps, places, weights, 8 * solved.dim * view.size)
    buffer = jnp.zeros((places.size, solved.dim, view.size))
    tangents = _fill(view, view.model, solved, readings, steps.y0, steps.args, False, 0, buffer)
    return tangents[:num_stages], tangents[num_stages:]


def _factors(
    view: Parameters,
    args: Any,
    points: tuple[Array, ...],
    cotangents: Float[Array, "T F"],
    weights: Float[Array, "T F F"],
    tangents: tuple[Float[Array, "S D P"], Float[Array, "T D P"]],
) -> tuple[Float[Array, "R P"], Float[Array, "R P"]]:
    """X and Y with Xᵀ Y + Yᵀ X all but M_θθ of one trajectory."""
    theta, model = view.vector, view.model
    times, stages, adjoints = (x.reshape(-1, *x.shape[2:]) for x in points[:3])
    states, (of_stages, of_states) = points[3], tangents

    def half(function, point, tangent):
        """½ M_zz Z + M_zθ of a scalar function of (θ, z)."""
        gradient = jax.grad(function, (0, 1))
        column = lambda e: jax.jvp(lambda z: gradient(theta, z), (point,), (e,))[1]
        by_theta, by_point = jax.vmap(column)(jnp.eye(point.size))
        return 0.5 * by_point @ tangent + by_theta

    def at_stage(t, z, adjoint, tangent):
        return half(lambda theta, z: _at_stage(view.unravel(theta), t, z, adjoint, args), z, tangent)

    def at_observation(y, cotangent, tangent):
        return half(lambda theta, y: _at_observation(view.unravel(theta), y, cotangent, args), y, tangent)

    left, right = [of_stages], [jax.vmap(at_stage)(times, stages, adjoints, of_stages)]
    jacobian = of_states
    if not model.sees_states:
        left.append(of_states)
        right.append(jax.vmap(at_observation)(states, cotangents, of_states))
        observe = lambda theta, y: view.unravel(theta).observe_states(y[None], args)[0]
        by_theta, by_state = jax.vmap(jax.jacrev(observe, (0, 1)), (None, 0))(theta, states)
        jacobian = by_state @ of_states + by_theta
    left.append(jacobian)
    right.append(0.5 * weights @ jacobian)
    flat = lambda parts: jnp.concatenate([x.reshape(-1, theta.size) for x in parts])
    return flat(left), flat(right)


def local_hessian_bytes(parameters: Parameters, steps: Steps) -> int | None:
    """The memory that `local_hessian` takes beside its result; None where it does not apply."""
    tableau = _explicit_tableau(parameters.model.solver)
    if tableau is None:
        return None
    rows = steps.num_steps * tableau.num_stages + 2 * steps.ts.shape[1]
    return 4 * 8 * rows * num_states(parameters.model, steps) * parameters.size

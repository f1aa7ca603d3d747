"""The second derivatives of replayed steps."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from .._devices import compiled, over_rows
from .._model.neural_ode import NeuralODE
from .._model.parameters import Parameters
from .replay import Steps, _explicit_tableau, _observed, _replay_explicit, padded_size
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
    states: Float[Array, "N*T D"]
    cotangents: Float[Array, "N*T K"]
    state_args: PyTree
    initial_adjoints: Float[Array, "N D"]
    y0: Array | None

    def __init__(
        self, parameters: Parameters, steps: Steps, times, stages, adjoints, states, initial_adjoints, cotangents
    ):
        self.parameters = parameters
        self.initial_adjoints, self.y0 = initial_adjoints, steps.y0
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
    cotangents, weights = derivatives
    theta, model = view.vector, view.model
    tableau = _explicit_tableau(model.solver)
    assert tableau is not None
    num_stages = tableau.num_stages
    num_steps = steps.num_steps

    def adjoint(i):
        each = steps[i]
        step, weights = _observed(tableau, model, each)

        def seen(push, y_start):  # what is predicted when every increment is pushed a little
            starts, stages, increments = _replay_explicit(tableau, model, each, y_start, push)
            states = starts[step] + jnp.einsum("ts,tsd->td", weights, increments[step])
            return jnp.sum(cotangents[i] * model.observe_states(states, each.args)), (stages, states)

        start = model.initial_state(each.y0)
        nowhere = jnp.zeros((num_steps, num_stages, start.size))
        (adjoints, initial), (stages, states) = jax.grad(seen, (0, 1), has_aux=True)(nowhere, start)
        times = tableau.times(each.starts, each.ends)
        return times, stages, each.lengths[:, None, None] * adjoints, states, initial

    points = jax.vmap(adjoint)(jnp.arange(len(steps.ts)))

    def trajectory(i, total):
        each = steps[i]
        args = each.args
        solved = _Solved(model, tableau, each)
        step, read_weights = _observed(tableau, model, each)
        # The stages of all steps, read off at the rows of the tableau, then the observations.
        places = jnp.concatenate([jnp.repeat(jnp.arange(num_steps), num_stages), step])
        read_weights = jnp.concatenate([jnp.tile(tableau.a, (num_steps, 1)), read_weights])
        readings = _Readings(tableau, num_steps, places, read_weights, 8 * solved.dim * theta.size)
        buffer = jnp.zeros((places.size, solved.dim, theta.size))
        tangents = _fill(view, model, solved, readings, each.y0, args, False, 0, buffer)
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

    half = jax.lax.fori_loop(0, len(steps.ts), trajectory, jnp.zeros((theta.size, theta.size)))
    return points, half + half.T


def local_hessian_bytes(parameters: Parameters, steps: Steps) -> int | None:
    """The memory that `local_hessian` takes beside its result; None where it does not apply."""
    tableau = _explicit_tableau(parameters.model.solver)
    if tableau is None:
        return None
    rows = steps.num_steps * tableau.num_stages + 2 * steps.ts.shape[1]
    y0 = None if steps.y0 is None else steps.y0[0]
    num_states = jax.eval_shape(parameters.model.initial_state, y0).size
    return 4 * 8 * rows * num_states * parameters.size

"""The first derivatives of replayed steps."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._model.neural_ode import NeuralODE
from .._model.parameters import Parameters
from .replay import Steps, _explicit_tableau, _observed, _replay, _replay_explicit, _Tableau

# Bytes of right-hand sides computed at once in a sensitivity solve: small enough for a processor's cache.
_BLOCK_BYTES = 2**21


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

    def __init__(self, model: NeuralODE, tableau: _Tableau, steps: Steps):
        y0 = model.initial_state(steps.y0, steps.args)
        self.starts, self.stages, self.increments = _replay_explicit(tableau, model, steps, y0)
        self.h = steps.lengths
        self.times = tableau.times(steps.starts, steps.ends)
        field_y = jax.jacrev(lambda y, t: model.vector_field(t, y, steps.args))
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
    pull = jax.vjp(lambda s: parameters.build(s).initial_state(y0, args), parameters.selected)[1]
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


def sensitivity(parameters: Parameters, steps: Steps) -> tuple[Float[Array, "N T K"], Float[Array, "NTF P"]]:
    """Predictions, and ∂ predictions / ∂θ of explicit Runge-Kutta steps by local vector-Jacobian products (`_Solved`).

    Filled row by row: beside the result only S and a block of products are held.
    """
    model, size = parameters.model, parameters.size
    tableau = _explicit_tableau(model.solver)
    assert tableau is not None
    num_times = steps.ts.shape[1]

    def trajectory(i, filled):
        predictions, buffer = filled
        each = steps[i]
        solved = _Solved(model, tableau, each)
        step, weights = _observed(tableau, model, each)
        readings = _Readings(tableau, each.num_steps, step, weights, 8 * solved.dim * size)
        seen = model.observe_states(jax.vmap(solved.state)(step, weights), each.args)
        observe = not model.sees_states
        buffer = _fill(parameters, model, solved, readings, each.y0, each.args, observe, i * num_times, buffer)
        return predictions.at[i].set(seen), buffer

    shape = eqx.filter_eval_shape(_replay, model, steps).shape
    empty = jnp.zeros(shape), jnp.zeros((shape[0] * num_times, shape[2], size))
    predictions, buffer = jax.lax.fori_loop(0, shape[0], trajectory, empty)
    return predictions, buffer.reshape(-1, size)


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

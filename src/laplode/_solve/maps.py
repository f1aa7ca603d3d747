"""All that knows how an ODE is integrated, and how its solution depends on the parameters.

The adaptive solve is done once, by Diffrax. Its accepted steps are then frozen, and every derivative is taken of the
replay of those steps: a step size controller is not differentiated by Diffrax either, so the replay has the same values
and the same derivatives to rounding, but it rejects nothing, knows its length beforehand, and has forward, reverse and
mixed modes.
"""

import dataclasses
import functools as ft

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._devices import compiled, over_rows
from .._errors import LaplodeError
from .._model.neural_ode import NeuralODE, starts
from .._model.parameters import Parameters
from .autodiff import twice_along
from .flows import AbstractFlow, AbstractMap, ForeignFlow, ReplayedFlow, Seen
from .replay import Accepted, accepted_steps, padded_size

# ---- From an adaptive solve to a frozen grid


def flow(
    view: Parameters,
    ts: Array | np.ndarray,
    y0: Array | np.ndarray | None,
    args: PyTree,
    *,
    like: AbstractFlow | None = None,
    spare: float = 0.0,
    seen: Bool[np.ndarray, "N T"] | None = None,
) -> AbstractFlow:
    """The solution map of a model around its present parameters.

    If its steps are no more than those of `like`, it has the same shapes, and what was compiled for that serves it.
    Otherwise it has room for `spare` times as many steps more, for others to be like it. Where `seen` is False, nothing
    was observed at a time, and what the map gives there is the prediction at another time of the trajectory: it may be
    that none is possible at this one.

    **Raises:** `LaplodeError` when the solve fails there, naming the trajectory and the time.
    """
    as_float = lambda x: jnp.asarray(x, dtype=float) if eqx.is_inexact_array(x) else x
    model = view.model
    inputs: tuple[Array, Array | None, PyTree] = jax.tree.map(as_float, (ts, starts(model, y0, len(ts)), args))
    ts, y0, args = inputs
    if not isinstance(model, NeuralODE):
        return ForeignFlow(view, ts, y0, args, None if seen is None else _asked(np.any(seen, axis=0)))
    found = accepted_steps(model, ts[:, 0], ts[:, -1], y0, args)
    _check_arrived(found, ts[:, -1], model.max_steps)
    num_steps = int(np.max(np.asarray(found.number)))
    room = 0 if like is None else like.num_steps
    if num_steps > room:
        room = num_steps + int(spare * num_steps)
    room = min(padded_size(room, len(ts) * view.size), model.max_steps)
    read = ts if seen is None else jnp.take_along_axis(ts, _sources(seen), axis=1)
    return ReplayedFlow(view, found.steps(room, read, y0, args))  # pyright: ignore[reportCallIssue]


def _sources(seen: Bool[np.ndarray, "N T"]) -> Int[np.ndarray, "N T"]:
    """For each time the last one so far at which something was seen, or else the first; itself, where nothing was."""
    every = np.arange(seen.shape[1])
    last = np.maximum.accumulate(np.where(seen, every, -1), axis=1)
    source = np.where(last < 0, np.argmax(seen, axis=1)[:, None], last)
    return np.where(np.any(seen, axis=1, keepdims=True), source, every)


def _asked(seen: Bool[np.ndarray, " T"]) -> Seen | None:
    """What to ask of a model where these times were seen by anybody; None for all. It starts at the first of all."""
    if np.all(seen[1:]) or not np.any(seen):
        return None
    asked = np.flatnonzero(seen | (np.arange(len(seen)) == 0))
    source = np.searchsorted(asked, _sources(seen[None])[0])
    return Seen(tuple(map(int, asked)), tuple(map(int, source)))


def replayed(
    view: Parameters, ts: Float[Array, "N T"], y0: Array | None, args: PyTree, num_steps: int
) -> tuple[ReplayedFlow, Accepted]:
    """The solution map of a `NeuralODE` on the steps of its adaptive solve, for use in any transformation.

    The steps themselves are not differentiated, and there is no callback to the host. Where a solve fails or takes more
    than `num_steps` steps, the map's values mean nothing.

    **Arguments:**

    - `view`: the parameters, of a `NeuralODE`.
    - `ts`, `y0`, `args`: as float arrays; `y0` as `starts` returns it. A last time may be repeated.
    - `num_steps`: room for steps, in each trajectory.

    **Returns:** the map, and what the solves did.
    """
    frozen = jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, (view.model, y0, args))
    model, *inputs = frozen
    found = accepted_steps(model, ts[:, 0], ts[:, -1], *inputs)
    return ReplayedFlow(view, found.steps(num_steps, ts, y0, args)), found  # pyright: ignore[reportCallIssue]


def _check_arrived(found: Accepted, end: Float[Array, " N"], max_steps: int) -> None:
    failed = np.flatnonzero(~np.asarray(found.arrived))
    if not failed.size:
        return
    i = int(failed[0])
    reason = diffrax.RESULTS[jax.tree.map(lambda x: x[i], found.result)] or "the state is no longer finite"
    raise LaplodeError(
        f"The solve at the fitted parameters failed in trajectory {i} at time {float(found.reached[i]):g} of "
        f"{float(end[i]):g} ({failed.size} of {len(end)} trajectories failed; {int(found.number[i])} accepted steps, "
        f"max_steps = {max_steps}): {reason.strip()} A stiff field wants an implicit solver, "
        "NeuralODE(..., solver=diffrax.Kvaerno5()); a long one a larger max_steps."
    )


def evaluate(flow: AbstractMap, theta: Float[Array, " P"]) -> Array:
    """The predictions at `theta`, compiled."""
    padded = _padded(flow)
    found = _evaluate(padded, theta)
    return found if padded is flow else _first(found, flow.ts.shape[1])  # pyright: ignore[reportAttributeAccessIssue]


@compiled
def _evaluate(flow: AbstractMap, theta: Float[Array, " P"]):
    return flow(theta)


def _padded(flow: AbstractMap) -> AbstractMap:
    """The map at a few times more, so that one program serves other numbers of times; itself, if that has a cost."""
    if not isinstance(flow, ReplayedFlow):
        return flow
    num = flow.ts.shape[1]
    spare = padded_size(num, flow.num_trajectories * flow.parameters.size) - num
    return dataclasses.replace(flow, steps=flow.steps.with_times_repeated(spare)) if spare else flow


@ft.partial(jax.jit, static_argnums=2)
def _first_rows(predictions: Float[Array, "N all F"], jacobian: Float[Array, "N*all*F P"], num: int):
    rows = jacobian.reshape(*predictions.shape, -1)[:, :num]
    return predictions[:, :num], rows.reshape(-1, rows.shape[-1])


@ft.partial(jax.jit, static_argnums=1)
def _first(values: Float[Array, "N all ..."], num: int) -> Float[Array, "N T ..."]:
    return values[:, :num]


# Second derivatives on frozen steps are differences over this part of a step, as in Transtrum and Sethna (2012).
DIFFERENCE = 0.1


def second_difference(ahead: Array, here: Array, along: Array) -> Array:
    """The second derivative of values along a step, by their first and what they are after `DIFFERENCE` of the step."""
    return 2 / DIFFERENCE * ((ahead - here) / DIFFERENCE - along)


def second_along(
    flow: AbstractFlow, step: Float[Array, " P"], linear: tuple[Float[Array, "N T F"], Float[Array, "NTF P"]]
) -> Float[Array, "N T F"]:
    """The second derivative of the predictions along a step, at the present parameters, of which `linear` is known.

    On frozen steps predictions are smooth, and a difference of them takes no other program. Where a solve chooses its
    steps anew, it would be noise.
    """
    if not flow.is_frozen:
        return _second_along(flow, step)
    here, jacobian = linear
    ahead = evaluate(flow, flow.parameters.vector + DIFFERENCE * step)
    return second_difference(ahead, here, (jacobian @ step).reshape(here.shape))


@compiled
def _second_along(flow: AbstractFlow, step: Float[Array, " P"]):
    return twice_along(flow, flow.parameters.vector, step)


@compiled
def _linearized(flow: AbstractMap, theta, route: str):
    return flow.linearized(theta, route)


@compiled
def _linearized_rows(shared: tuple[AbstractFlow, str], rows: dict[str, PyTree], _):
    """Predictions (N, T, F) and their Jacobian (N, T·F, P) of some trajectories; no sums."""
    of_none, route = shared
    view = of_none.parameters
    predictions, jacobian = dataclasses.replace(of_none, **rows).linearized(view.vector, route)
    return (predictions, jacobian.reshape(len(predictions), -1, view.size)), ()


def linearize(
    flow: AbstractMap, route: str | None = None, *, mesh: Mesh | None = None
) -> tuple[Float[Array, "..."], Float[Array, "M P"]]:
    """Values at the present parameters, such as predictions, and their Jacobian with a row for each of them in order.

    To find the `route` takes traces of the model; who comes often hands it over. Trajectories are spread over a `mesh`.

    The Jacobian may be as large as memory allows: outside of `jit`, even a reshape would copy it.
    """
    route = route or flow.jacobian_route()
    if mesh is None or not isinstance(flow, AbstractFlow):
        padded = _padded(flow)
        found = _linearized(padded, flow.parameters.vector, route)
        return found if padded is flow else _first_rows(*found, flow.ts.shape[1])  # pyright: ignore
    rows = lambda f: tuple(f.rows.values())
    of_none = eqx.tree_at(rows, flow, (None,) * len(flow.rows), is_leaf=lambda x: x is None)
    shared = of_none, route
    (predictions, jacobian), _ = over_rows(mesh, _linearized_rows, shared, flow.rows)
    return predictions, jacobian.reshape(-1, flow.parameters.size)

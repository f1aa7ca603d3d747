"""All that knows how an ODE is integrated, and how its solution depends on the parameters.

The adaptive solve is done once, by Diffrax. Its accepted steps are then frozen, and every derivative is taken of the
replay of those steps: a step size controller is not differentiated by Diffrax either, so the replay has the same values
and the same derivatives to rounding, but it rejects nothing, knows its length beforehand, and has forward, reverse and
mixed modes.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from .._devices import over_rows
from .._errors import LaplodeError
from .._model.neural_ode import NeuralODE, accepted_steps, starts
from .._model.own import predict_trajectories
from .._model.parameters import Parameters
from .autodiff import _AUTODIFF, _has, _pull, _push, _push_twice
from .replay import Steps, _explicit_tableau, _replay
from .sensitivity import sensitivity


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
        return _replay(self.parameters.unravel(theta), self.steps)

    def linearized(self, theta, route):
        if route == "sensitivity":
            view = eqx.tree_at(lambda p: p.selected, self.parameters, self.parameters.with_vector(theta))
            return sensitivity(view, self.steps)
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
    def steps(self) -> Steps:
        """All but the parameters."""
        return Steps(self.boundaries, self.ts, self.y0, self.args)  # pyright: ignore[reportCallIssue]

    @property
    def has_sensitivity(self) -> bool:
        """Whether `sensitivity` applies and pays: it pulls once for each state, where others push for each θ."""
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


def _push_gradient(flow: AbstractMap):
    theta = flow.parameters.vector
    # What is replayed has all derivatives that its vector field has.
    function = _field_at_start(flow) if isinstance(flow, ReplayedFlow) else flow
    # A square, so that what is pulled back has a tangent of its own, as it has with a likelihood.
    return jax.jvp(jax.grad(lambda theta: jnp.sum(function(theta) ** 2)), (theta,), (theta,))


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

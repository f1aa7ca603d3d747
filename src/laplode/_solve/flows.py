"""Maps from θ to an array: any function of the model, and the solution map of an ODE, each with its derivatives."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from .._errors import LaplodeError
from .._model.neural_ode import smooth
from .._model.own import predict_trajectories
from .._model.parameters import Parameters
from .autodiff import _AUTODIFF, _has, _pull, _push, _push_twice
from .replay import Accepted, Steps, _explicit_tableau, _replay, accepted_steps, num_states
from .second_order import local_hessian, local_hessian_bytes
from .sensitivity import sensitivity


class AbstractMap(eqx.Module):
    """θ ↦ an array, with its derivatives."""

    parameters: eqx.AbstractVar[Parameters]

    @abc.abstractmethod
    def __call__(self, theta: Float[Array, " P"]) -> Float[Array, "..."]:
        """The values, differentiable in `theta`."""

    def linearized(self, theta: Float[Array, " P"], route: str) -> tuple[Float[Array, "..."], Float[Array, "M P"]]:
        """The values, and ∂ values / ∂θ by one of the routes of `jacobian_route`, a row for each value in order."""
        return _AUTODIFF[route](self, theta)

    def has_reverse(self) -> bool:
        """Whether this can be differentiated in reverse, as foreign models solved with `ForwardMode` can't."""
        return _has(_pull, self)

    def has_pushforward(self) -> bool:
        """Whether this can be differentiated forward."""
        return _has(_push, self)

    def has_second_pushforward(self) -> bool:
        """Whether this can be differentiated forward twice."""
        return _has(_push_twice, self)

    def jacobian_route(self) -> str:
        """How the Jacobian is cheapest: "sensitivity", "jvp" (P tangents) or "vjp" (one pull a value)."""
        theta = self.parameters.vector
        num_values = jax.eval_shape(self, theta).size
        by_jvp = self.has_pushforward()
        # A pull costs about as much as two pushes, and holds the whole solve in memory.
        if by_jvp and theta.size <= 2 * num_values:
            return "jvp"
        if self.has_reverse():
            return "vjp"
        if by_jvp:
            return "jvp"
        raise LaplodeError(
            "`model` can be differentiated neither forward nor in reverse. Inside it, solve with "
            "diffrax.diffeqsolve(..., adjoint=diffrax.DirectAdjoint()), or build it as laplode.NeuralODE(vector_field)."
        )


class OfModel(AbstractMap):
    """θ ↦ function(model), differentiated automatically."""

    parameters: Parameters
    function: Callable[[Any], Array]

    def __call__(self, theta):
        return jnp.asarray(self.function(self.parameters.unravel(theta)))


class AbstractFlow(AbstractMap):
    """θ ↦ predictions (N, T, K) of N trajectories: the solution map, with its derivatives."""

    parameters: eqx.AbstractVar[Parameters]
    ts: eqx.AbstractVar[Float[Array, "N T"]]
    y0: eqx.AbstractVar[Array | None]
    args: eqx.AbstractVar[PyTree]
    is_frozen: eqx.AbstractClassVar[bool]  # whether neighboring θ are solved in the same steps

    def at(self, theta: Float[Array, " P"]) -> "AbstractFlow":
        """The same map with its present parameters at `theta`, on the same steps where these are frozen."""
        return eqx.tree_at(lambda f: f.parameters, self, self.parameters.at(theta))

    def solved(self, theta: Float[Array, " P"]) -> Float[Array, "N T K"]:
        """The predictions by a solve that chooses its own steps; not finite where it fails."""
        return predict_trajectories(self.parameters.unravel(theta), self.ts, self.y0, self.args)

    @abc.abstractmethod
    def starting(self, y0: Float[Array, "N D"]) -> "AbstractFlow":
        """The same map from other initial states."""

    @property
    def grid(self) -> tuple[Array, ...]:
        """What a solve has chosen and `on` takes: the steps of each trajectory, where they are frozen."""
        return ()

    def on(self, grid: tuple[Array, ...]) -> "AbstractFlow":
        """The same map on other steps."""
        return self

    def renewed(self, theta: Float[Array, " P"]) -> "tuple[AbstractFlow, Float[Array, 'N T K']]":
        """The same map on the steps that a solve at θ chooses, and the predictions of that, in any transformation.

        Predictions are not finite where the solve fails.
        """
        return self, self.solved(theta)

    def trimmed(self, spare: float) -> "AbstractFlow":
        """The same map with room for `spare` times more steps than it takes, and for no others."""
        return self

    @abc.abstractmethod
    def tightened(self, factor: float, spare: float = 0.0) -> "AbstractFlow":
        """The same map by a solver whose tolerances are `factor` times smaller, with room for `spare` times more steps.

        **Raises:** `LaplodeError` when its steps are not chosen by a tolerance, or there are too many of them.
        """

    @property
    def num_trajectories(self) -> int:
        """N."""
        return self.ts.shape[0]

    @property
    def num_steps(self) -> int:
        """Steps that each trajectory takes, with padding; 0 where they are not known."""
        return 0

    @property
    def num_states(self) -> int:
        """D; 0 where it is not known."""
        return 0

    @property
    def rows(self) -> dict[str, PyTree]:
        """What there is of for each trajectory, along the first axis."""
        names = (field.name for field in dataclasses.fields(self) if not field.metadata.get("static"))
        return {name: getattr(self, name) for name in names if name != "parameters"}

    def part(self, chosen: slice) -> "AbstractFlow":
        """The flow of some of the trajectories."""
        return dataclasses.replace(self, **jax.tree.map(lambda x: x[chosen], self.rows))

    def representative(self) -> Callable[[Array], Array]:
        """A function of θ that has all the derivatives that this map has."""
        return self

    def check_second_order(self) -> None:
        """Raise `LaplodeError` where there is no forward-over-reverse derivative, showing the line to change."""
        if not _has(_push_gradient, self):
            self.jacobian_route()  # raises where there are no first ones either
            raise LaplodeError(
                "`model` has no second derivatives, as with Diffrax's default adjoint. Change the line\n"
                "    diffrax.diffeqsolve(...)\nto\n    diffrax.diffeqsolve(..., adjoint=diffrax.DirectAdjoint())\n"
                "(its values stay the same), or build the model as laplode.NeuralODE(vector_field), or take "
                'curvature="ggn", which needs first derivatives only.'
            )

    def local_hessian_bytes(self) -> int | None:
        """The memory that `local_hessian` takes beside its result; None where it does not apply."""
        return None

    def local_hessian(
        self, cotangents: Float[Array, "N T F"], weights: Float[Array, "N T F F"], mesh: Mesh | None = None
    ) -> tuple[Callable[[Array], Array], Float[Array, "P P"]]:
        """The Hessian of a loss by its derivatives in the predictions, without a solve in it (`second_order`)."""
        raise NotImplementedError


class Seen(NamedTuple):
    """The times that a model is asked for, and which of these predictions stands at each of all times."""

    asked: tuple[int, ...]
    source: tuple[int, ...]


class ForeignFlow(AbstractFlow):
    """Any model, differentiated automatically.

    Where nobody observed anything, a prediction may be of no use, and so would be derivatives of it, even times 0.
    `seen` says which times a model is not asked for; the prediction at another time stands there, and counts nothing.
    `first_order` says that reverse derivatives are enough, as they are for training.
    """

    parameters: Parameters
    ts: Float[Array, "N T"]
    y0: Array | None
    args: PyTree
    seen: "Seen | None" = eqx.field(static=True, default=None)
    first_order: bool = eqx.field(static=True, default=False)
    is_frozen: ClassVar[bool] = False

    def __call__(self, theta):
        model = self.parameters.unravel(theta)
        return self._predicted(model if self.first_order else smooth(model))

    def solved(self, theta):
        return self._predicted(self.parameters.unravel(theta))

    def _predicted(self, model: Any) -> Float[Array, "N T F"]:
        if self.seen is None:
            return predict_trajectories(model, self.ts, self.y0, self.args)
        ts = self.ts[:, np.array(self.seen.asked)]
        return predict_trajectories(model, ts, self.y0, self.args)[:, np.array(self.seen.source)]

    def starting(self, y0):
        return dataclasses.replace(self, y0=y0)

    def tightened(self, factor, spare=0.0):
        raise LaplodeError(
            f"`posterior` is of a {type(self.parameters.model).__name__}, whose solver laplode does not know: "
            "only a NeuralODE has a tolerance here. Compare with a posterior of your model at a smaller one."
        )


class ReplayedFlow(AbstractFlow):
    """A `NeuralODE` on the frozen steps that its adaptive solve accepted."""

    parameters: Parameters
    steps: Steps
    is_frozen: ClassVar[bool] = True

    @property
    def ts(self):
        return self.steps.ts

    @property
    def y0(self):
        return self.steps.y0

    @property
    def args(self):
        return self.steps.args

    @property
    def num_steps(self):
        return self.steps.num_steps

    @property
    def _span(self) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
        """Where the solves begin and end. The times at which they are read off may lie inside."""
        return self.steps.starts[:, 0], self.steps.ends[:, -1]

    @property
    def num_states(self):
        return num_states(self.parameters.model, self.steps)

    def __call__(self, theta):
        return _replay(self.parameters.unravel(theta), self.steps)

    def solved(self, theta):
        ts = jnp.concatenate([self._span[0][:, None], self.ts], axis=1)  # they may begin later than the solve
        return predict_trajectories(self.parameters.unravel(theta), ts, self.y0, self.args)[:, 1:]

    def linearized(self, theta, route):
        if route == "sensitivity":
            return sensitivity(self.parameters.at(theta), self.steps)
        return super().linearized(theta, route)

    def starting(self, y0):
        return eqx.tree_at(lambda f: f.steps.y0, self, y0)

    def renewed(self, theta):
        """If the solve takes more steps than fit, merge neighbors, up to two of them; more are a failure."""
        model, room = self.parameters.unravel(theta), self.num_steps
        found = accepted_steps(model, *self._span, self.y0, self.args)
        kept = jnp.round(jnp.arange(room + 1) * jnp.maximum(found.number / room, 1.0)[:, None]).astype(int)
        pick = lambda new, index, old: jnp.where(found.arrived[:, None], jnp.take_along_axis(new, index, axis=1), old)
        around = self.on(
            (pick(found.starts, kept[:, :-1], self.steps.starts), pick(found.ends, kept[:, 1:] - 1, self.steps.ends))
        )
        good = found.arrived & (found.number <= 2 * room)
        return around, jnp.where(good[:, None, None], around(theta), jnp.nan)

    def neighbor(self, theta: Float[Array, " P"]) -> "tuple[ReplayedFlow, Accepted] | None":
        """The flow around another point on steps of its own, in the same shapes, and the solve that took them.

        None where the solve fails or takes more steps than there is room for.
        """
        view = self.parameters.at(theta)
        found = accepted_steps(view.model, *self._span, self.y0, self.args)
        if not np.all(found.arrived & (found.number <= self.num_steps)):
            return None
        return ReplayedFlow(view, found.steps(self.num_steps, self.ts, self.y0, self.args)), found  # pyright: ignore[reportCallIssue]

    @property
    def grid(self):
        return self.steps.starts, self.steps.ends

    def on(self, grid):
        return eqx.tree_at(lambda f: f.grid, self, grid)

    def trimmed(self, spare):
        taken = int(np.max(np.sum(np.asarray(self.steps.lengths) > 0, axis=1)))
        return self.on(tuple(steps[:, : math.ceil((1 + spare) * taken)] for steps in self.grid))

    def tightened(self, factor, spare=0.0):
        rest = self.parameters.rest
        has_tolerance = lambda node: hasattr(node, "rtol") and hasattr(node, "atol")
        # A controller around another has the tolerances of that one, and can't be given others.
        is_inner = lambda node: has_tolerance(node) and not hasattr(node, "controller")
        nodes, structure = jax.tree.flatten(rest.stepsize_controller, is_leaf=is_inner)
        if not any(map(is_inner, nodes)):
            raise LaplodeError(
                f"`posterior` is of a model whose steps have no tolerance ({type(rest.stepsize_controller).__name__}): "
                "compare with a smaller `dt0` by hand, or take diffrax.PIDController(rtol, atol)."
            )
        smaller = lambda node: eqx.tree_at(lambda c: (c.rtol, c.atol), node, (node.rtol / factor, node.atol / factor))
        controller = jax.tree.unflatten(structure, [smaller(node) if is_inner(node) else node for node in nodes])
        view = eqx.tree_at(lambda p: p.rest.stepsize_controller, self.parameters, controller)
        found = accepted_steps(view.model, *self._span, self.y0, self.args)
        if not np.all(found.arrived):
            raise LaplodeError(
                f"`posterior` can't be compared with tolerances {factor:g} times smaller: with max_steps = "
                f"{view.model.max_steps} the solve does not arrive. Allow more steps."
            )
        room = min(int((1 + spare) * np.max(np.asarray(found.number))), view.model.max_steps)
        return ReplayedFlow(view, found.steps(room, self.ts, self.y0, self.args))  # pyright: ignore[reportCallIssue]

    # What is replayed has all derivatives that its vector field has.

    def has_reverse(self):
        return True

    def has_second_pushforward(self):
        return True

    def jacobian_route(self):
        """Sensitivities pull once for each state, where others push for each θ."""
        explicit = _explicit_tableau(self.parameters.model.solver) is not None
        return "sensitivity" if explicit and self.num_states <= self.parameters.size else super().jacobian_route()

    def representative(self):
        """θ ↦ the vector field, and what is observed, at the start of the first trajectory."""
        first = self.steps[0]

        def function(theta):
            model = self.parameters.unravel(theta)
            start = model.initial_state(first.y0, first.args)
            slope = model.vector_field(first.ts[0], start, first.args)
            return jnp.concatenate([slope.ravel(), model.observe_states(start[None], first.args).ravel()])

        return function

    def local_hessian_bytes(self):
        return local_hessian_bytes(self.parameters, self.steps)

    def local_hessian(self, cotangents, weights, mesh=None):
        return local_hessian(self.parameters, self.steps, cotangents, weights, mesh)


def _push_gradient(flow: AbstractFlow):
    theta, function = flow.parameters.vector, flow.representative()
    # A square, so that what is pulled back has a tangent of its own, as it has with a likelihood.
    return jax.jvp(jax.grad(lambda theta: jnp.sum(function(theta) ** 2)), (theta,), (theta,))

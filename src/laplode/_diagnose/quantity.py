"""What is profiled: an entry of θ, or a number that a function makes of the model."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._devices import compiled
from .._errors import LaplodeError
from .._model.parameters import Parameters
from .._posterior.posterior import Posterior
from .._predict.function import of_posterior, trajectory_at, value_at_mean
from .._problem.prior import is_at
from .._solve.autodiff import twice_along
from .._solve.flows import AbstractFlow, OfModel
from .._solve.maps import DIFFERENCE, flow


class Place(NamedTuple):
    """Of which trajectory, channel and time a prediction is."""

    trajectory: int
    channel: int
    time: float


class Local(NamedTuple):
    """A quantity at θ: its value, its gradient, and its second derivative along a step."""

    value: Float[Array, ""]
    slope: Float[Array, " P"]
    bend: Callable[[Array], Array]


class AbstractQuantity(eqx.Module):
    """g(θ), a number that is held at a value. `value` and `local` may be traced, and batched over its arrays."""

    @abc.abstractmethod
    def value(self, view: Parameters, theta: Float[Array, " P"]) -> Float[Array, ""]:
        """Its value at θ, in the coordinates of θ."""

    @abc.abstractmethod
    def local(self, view: Parameters, theta: Float[Array, " P"]) -> Local:
        """The same with its derivatives."""

    @abc.abstractmethod
    def smooth(self, view: Parameters, theta: Float[Array, " P"]) -> Callable[[Array], Array]:
        """The quantity near θ, with second derivatives."""

    def shown(self, view: Parameters, value: float) -> float:
        """A value in the user's units; of an infinite one the end of the support."""
        return float(value)

    def hidden(self, view: Parameters, value: float) -> float:
        """A value given in the user's units, as `value` has it."""
        return float(value)

    @abc.abstractmethod
    def of_model(self, view: Parameters) -> Callable[[Any], Array]:
        """The quantity as a function of the model, in the user's units."""

    def curvature(self, view: Parameters, theta: Float[Array, " P"]) -> Float[Array, "P P"]:
        """Its Hessian."""
        return _hessian(self, view, theta)


@compiled
def _hessian(quantity: AbstractQuantity, view: Parameters, theta: Float[Array, " P"]) -> Float[Array, "P P"]:
    return jax.jacfwd(jax.grad(quantity.smooth(view, theta)))(theta)


class Entry(AbstractQuantity):
    """An entry of θ, shown as the model knows it."""

    index: Int[Array, ""]

    def value(self, view, theta):
        return theta[self.index]

    def local(self, view, theta):
        return Local(theta[self.index], jnp.zeros_like(theta).at[self.index].set(1.0), lambda step: jnp.zeros(()))

    def smooth(self, view, theta):
        return lambda theta: theta[self.index]

    def shown(self, view, value):
        theta = view.with_vector(view.vector.at[self.index].set(value))
        return float(_flat(view.constrained(theta))[self.index])

    def hidden(self, view, value):
        known = _flat(view.constrained(view.selected)).at[self.index].set(value)
        leaves = zip(view.transforms, jax.tree.leaves(view.with_vector(known)), strict=True)
        return float(_flat([leaf if t is None else t.inv(leaf) for t, leaf in leaves])[self.index])

    def of_model(self, view):
        return lambda model: _flat(eqx.filter(model, view.where))[self.index]


class Function(AbstractQuantity):
    """One of the values of a function of the model, differentiated by the `route` of its map."""

    function: Callable[[Any], Array]
    index: Int[Array, ""]
    route: str = eqx.field(static=True)
    bends: bool = eqx.field(static=True)

    def __call__(self, model: Any) -> Array:
        return jnp.ravel(self.function(model))[self.index]

    def value(self, view, theta):
        return OfModel(view, self)(theta)

    def local(self, view, theta):
        around = OfModel(view, self)
        value, jacobian = around.linearized(theta, self.route)

        def bend(step):
            if not self.bends:
                return jnp.zeros(())
            return twice_along(around, theta, step)

        return Local(value, jacobian[0], bend)

    def smooth(self, view, theta):
        return OfModel(view, self)

    def of_model(self, view):
        return self


class Forecast(AbstractQuantity):
    """A prediction of one trajectory at a time, on the steps of a solve of its own: `around` is that, without θ."""

    around: AbstractFlow
    channel: Int[Array, ""]
    function: Callable[[Any], Array]
    route: str = eqx.field(static=True)
    bends: bool = eqx.field(static=True)

    def _renewed(self, view: Parameters, theta: Array) -> tuple[AbstractFlow, Array]:
        around, values = dataclasses.replace(self.around, parameters=view).renewed(theta)
        return around, values[0, -1, self.channel]

    def value(self, view, theta):
        return self._renewed(view, theta)[1]

    def local(self, view, theta):
        around, value = self._renewed(view, theta)
        values, jacobian = around.linearized(theta, self.route)
        at = lambda theta: around(theta)[0, -1, self.channel]

        def bend(step):
            if around.is_frozen:
                return (at(theta + DIFFERENCE * step) + at(theta - DIFFERENCE * step) - 2 * at(theta)) / DIFFERENCE**2
            if not self.bends:
                return jnp.zeros(())
            return twice_along(at, theta, step)

        return Local(value, jacobian.reshape(*values.shape, -1)[0, -1, self.channel], bend)

    def smooth(self, view, theta):
        around = self._renewed(view, theta)[0]
        return lambda theta: around(theta)[0, -1, self.channel]

    def of_model(self, view):
        return self.function


def _flat(tree: Any) -> Array:
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


class Named(NamedTuple):
    """A quantity, its name, and its place where it is a prediction."""

    name: str
    of: AbstractQuantity
    place: Place | None = None


def quantities(of: Any, posterior: Posterior) -> list[Named]:
    """All that `of` names or computes, one number each.

    **Raises:** `LaplodeError` when a name is unknown, or a function does not return a few numbers.
    """
    given = list(of) if isinstance(of, Sequence) and not isinstance(of, str) else [of]
    found: list[Named] = []
    for item in given:
        if isinstance(item, trajectory_at):
            found.extend(_forecasts(item, posterior))
        else:
            found.extend(_functions(item, posterior) if callable(item) else _entries(item, posterior.parameters))
    if not found:
        raise LaplodeError("`of` names nothing: give a parameter's name, a function of the model, or a list of these.")
    return found


def _entries(item: Any, view: Parameters) -> list[Named]:
    names = [view.name(i) for i in range(view.size)]
    found = [i for i, name in enumerate(names) if isinstance(item, str) and (name == item or is_at(name, item))]
    if not found:
        known = ", ".join(name for name, *_ in view.leaves)
        raise LaplodeError(f"`of` = {item!r} is no parameter of the model. Its parameters are: {known}.")
    return [Named(names[i], Entry(jnp.asarray(i))) for i in found]


# Room for more steps of a forecast's solve than it takes at θ*, as a part of those.
_SPARE = 0.5


def _forecasts(item: trajectory_at, posterior: Posterior) -> list[Named]:
    """The last time first, for its solve has the most steps, and then all have room for as many."""
    view, data = posterior.parameters, posterior.problem.data
    item.of_data(data)
    found, like = [], None
    for time in np.ravel(item.t)[::-1]:
        ts = data.ts[:, :2].copy()  # all trajectories, since their initial states may be parameters
        ts[item.trajectory, 1] = time
        like = flow(view, ts, data.y0, data.args, like=like, spare=_SPARE)
        around = like.part(slice(item.trajectory, item.trajectory + 1))
        function = trajectory_at(time, item.channel, item.trajectory).of_data(data)
        quantity = Forecast(
            around=dataclasses.replace(around, parameters=None),
            channel=jnp.asarray(item.channel),
            function=function,
            route=around.jacobian_route(),
            bends=around.has_second_pushforward(),
        )
        place = Place(item.trajectory, item.channel, float(time))
        found.append(
            Named(f"trajectory {place.trajectory}, channel {place.channel} at {place.time:g}", quantity, place)
        )
    return found[::-1]


def _functions(item: Any, posterior: Posterior) -> list[Named]:
    name = getattr(item, "__name__", type(item).__name__)
    of = of_posterior("of", item, posterior)
    size = value_at_mean(of, "of").size
    if size == 0:
        raise LaplodeError(f"`of` must be functions of the model to one or several numbers; {name} gives none.")
    label = lambda i: name if size == 1 else f"{name}[{i}]"
    make = lambda i, route, bends: Function(of.function, jnp.asarray(i), route, bends)
    first = OfModel(posterior.parameters, make(0, "", False))
    route, bends = first.jacobian_route(), first.has_second_pushforward()
    return [Named(label(i), make(i, route, bends)) for i in range(size)]

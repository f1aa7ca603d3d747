"""Any Optax optimizer, as a pytree that holds its hyperparameters."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Float, PyTree

from .._errors import LaplodeError
from .._files import text_of


class AbstractUpdate(eqx.Module):
    """A step of an optimizer. `identity` is a text that tells it from others."""

    identity: eqx.AbstractVar[str]

    @abc.abstractmethod
    def __call__(
        self, gradient: PyTree, state: PyTree, parameters: PyTree, value: Float[Array, ""], loss: Callable
    ) -> tuple[PyTree, PyTree]:
        """The updates of the parameters, and the next state. `loss` is a function of parameters, `value` its value."""


class SearchingUpdate(AbstractUpdate):
    """An optimizer that evaluates the loss itself, as a line search does."""

    update: Callable = eqx.field(static=True)
    identity: str = eqx.field(static=True)

    def __call__(self, gradient, state, parameters, value, loss):
        return self.update(gradient, state, parameters, value=value, grad=gradient, value_fn=loss)


class TracedUpdate(AbstractUpdate):
    """An optimizer as a program whose numbers, such as the learning rate, are `hyperparameters`.

    Two optimizers of one kind differ in these alone, and so share what was compiled for one of them.
    """

    hyperparameters: list[Array]
    constants: list[Any]
    program: "_Program" = eqx.field(static=True)

    @property
    def identity(self):
        return self.program.text

    def __call__(self, gradient, state, parameters, value, loss):
        return self.program((gradient, state, parameters, value), self.hyperparameters, self.constants)


class _Program:
    """A jaxpr, equal to all that read the same. `structure` is that of the tree that it returns."""

    def __init__(self, jaxpr: Any, structure: Any):
        self.jaxpr, self.structure, self.text = jaxpr, structure, text_of(jaxpr)

    def __eq__(self, other):
        return isinstance(other, _Program) and (self.text, self.structure) == (other.text, other.structure)

    def __hash__(self):
        return hash(self.text)

    def __call__(self, arguments: PyTree, numbers: list[Array], constants: list[Any]) -> PyTree:
        function = jaxpr_as_fun(ClosedJaxpr(self.jaxpr, constants))
        return jax.tree.unflatten(self.structure, function(*jax.tree.leaves(arguments), *numbers))


class _Searches(Exception):
    """The optimizer evaluates the loss."""


def optimizer_of(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer in the one form that takes whatever an optimizer may want to know.

    **Raises:** `LaplodeError` when it is no Optax optimizer.
    """
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)  # pyright: ignore
    if not isinstance(optimizer, optax.GradientTransformation):
        raise LaplodeError(f"`optimizer` must be an Optax optimizer such as optax.adam(1e-2), got {optimizer!r}.")
    return optax.with_extra_args_support(optimizer)


def update_of(optimizer: optax.GradientTransformationExtraArgs, state: PyTree, parameters: PyTree) -> AbstractUpdate:
    """The step of an optimizer for states and parameters of these shapes."""

    arguments = (parameters, state, parameters, jnp.zeros(()))

    def traced(loss: Callable, numbers: list[Array]):
        def update(arguments, _):
            gradient, state, parameters, value = arguments
            return optimizer.update(gradient, state, parameters, value=value, grad=gradient, value_fn=loss)

        return jax.make_jaxpr(update, return_shape=True)(arguments, numbers)

    def search(*_):
        raise _Searches

    is_number = lambda v: hasattr(v, "val") and jnp.issubdtype(v.aval.dtype, jnp.floating)
    try:
        jaxpr = traced(search, [])[0].jaxpr
    except _Searches:
        text = text_of(traced(lambda at: sum(jnp.sum(x**2) for x in jax.tree.leaves(at)), [])[0])
        return SearchingUpdate(update=optimizer.update, identity=text)
    numbers = [jnp.asarray(v.val, v.aval.dtype) for eqn in jaxpr.eqns for v in eqn.invars if is_number(v)]
    # Once more with these numbers as inputs, which then take the place of what was written.
    closed, shapes = traced(search, numbers)
    inputs = iter(closed.jaxpr.invars[len(jax.tree.leaves(arguments)) :])
    read = lambda eqn: eqn.replace(invars=[next(inputs) if is_number(v) else v for v in eqn.invars])
    jaxpr = closed.jaxpr.replace(eqns=[read(eqn) for eqn in closed.jaxpr.eqns])
    program = _Program(jaxpr, jax.tree.structure(shapes))
    return TracedUpdate(hyperparameters=numbers, constants=list(closed.consts), program=program)  # pyright: ignore

"""Derivatives of any function of θ by automatic differentiation."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# ---- Or by automatic differentiation

_CHUNK = 32


def _jacobian_by_jvp(flow: Any, theta):
    push = lambda v: jax.jvp(flow, (theta,), (v,))[1]
    columns = jax.lax.map(lambda i: push(jnp.zeros_like(theta).at[i].set(1)), jnp.arange(theta.size), batch_size=_CHUNK)
    return flow(theta), columns.reshape(theta.size, -1).T


def _jacobian_by_vjp(flow: Any, theta):
    predictions, pull = jax.vjp(flow, theta)
    row = lambda i: pull(jnp.zeros(predictions.size).at[i].set(1).reshape(predictions.shape))[0]
    return predictions, jax.lax.map(row, jnp.arange(predictions.size), batch_size=_CHUNK)


_AUTODIFF: dict[str, Callable[[Any, Array], tuple[Array, Array]]] = {
    "jvp": _jacobian_by_jvp,
    "vjp": _jacobian_by_vjp,
}


def _push(flow: Any):
    theta = flow.parameters.vector
    return jax.jvp(flow, (theta,), (theta,))


def _pull(flow: Any):
    predictions, pull = jax.vjp(flow, flow.parameters.vector)
    return pull(predictions)


def twice_along(function: Callable[[Array], Array], theta: Float[Array, " P"], direction: Float[Array, " P"]) -> Array:
    """The second derivative of a function of θ along a direction."""
    once = lambda at: jax.jvp(function, (at,), (direction,))[1]
    return jax.jvp(once, (theta,), (direction,))[1]


def _push_twice(flow: Any):
    return twice_along(flow, flow.parameters.vector, flow.parameters.vector)


def _has(derivative: Callable[[Any], Any], flow: Any) -> bool:
    """Whether `derivative(flow)` can be had."""
    return _found_by_tracing(_lowers, derivative, flow)


def pullback_bytes(function: Callable[[Array], Array], theta: Float[Array, " P"]) -> int:
    """What reverse differentiation keeps of a function on its way back."""
    return _found_by_tracing(_bytes, _pullback, (function, theta))


def _pullback(at: tuple[Callable[[Array], Array], Array]):
    return jax.vjp(*at)[1]


def _found_by_tracing(find: Any, of: Callable[[Any], Any], at: Any) -> Any:
    """find(of, at). That takes a trace of the model, and is remembered as `jit` would, by structure and shapes."""
    leaves, treedef = jax.tree.flatten(at)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) if eqx.is_array(x) else x for x in leaves)
    try:
        return find(of, treedef, shapes)
    except TypeError:  # a leaf without a hash
        return find.__wrapped__(of, treedef, leaves)


def _of_arrays(of: Callable[[Any], Any], treedef: Any, leaves: Sequence[Any]):
    """A function of arrays alone that a program can be made of, and these arrays."""
    arrays, others = eqx.partition(leaves, lambda leaf: isinstance(leaf, jax.Array | jax.ShapeDtypeStruct))
    return lambda arrays: of(jax.tree.unflatten(treedef, eqx.combine(arrays, others))), arrays


@ft.lru_cache(maxsize=128)
def _lowers(derivative: Callable[[Any], Any], treedef: Any, leaves: Sequence[Any]) -> bool:
    """Models refuse in many ways, so any exception counts.

    It is lowered, not only traced: that `custom_vjp` has no forward mode shows no earlier.
    """
    function, arrays = _of_arrays(derivative, treedef, leaves)
    try:
        jax.jit(function).lower(arrays)
    except Exception:
        return False
    return True


@ft.lru_cache(maxsize=128)
def _bytes(of: Callable[[Any], Any], treedef: Any, leaves: Sequence[Any]) -> int:
    function, arrays = _of_arrays(of, treedef, leaves)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(function, arrays)))

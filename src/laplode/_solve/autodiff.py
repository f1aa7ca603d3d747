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


def _push_twice(flow: Any):
    theta = flow.parameters.vector
    once = lambda at: jax.jvp(flow, (at,), (theta,))[1]
    return jax.jvp(once, (theta,), (theta,))


def _has(derivative: Callable[[Any], Any], flow: Any) -> bool:
    """Whether `derivative(flow)` can be had. That takes a trace of the model, and is remembered as `jit` would."""
    leaves, treedef = jax.tree.flatten(flow)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) if eqx.is_array(x) else x for x in leaves)
    try:
        return _lowers(derivative, treedef, shapes)
    except TypeError:  # a leaf without a hash
        return _lowers.__wrapped__(derivative, treedef, leaves)


@ft.lru_cache(maxsize=128)
def _lowers(derivative: Callable[[Any], Any], treedef: Any, leaves: Sequence[Any]) -> bool:
    """Models refuse in many ways, so any exception counts.

    It is lowered, not only traced: that `custom_vjp` has no forward mode shows no earlier.
    """
    arrays, others = eqx.partition(leaves, lambda leaf: isinstance(leaf, jax.Array | jax.ShapeDtypeStruct))
    try:
        jax.jit(lambda arrays: derivative(jax.tree.unflatten(treedef, eqx.combine(arrays, others)))).lower(arrays)
    except Exception:
        return False
    return True


def pullback_bytes(function: Callable[[Array], Array], theta: Float[Array, " P"]) -> int:
    """What reverse differentiation keeps of a function on its way back."""
    pull = jax.eval_shape(lambda: jax.vjp(function, theta)[1])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))

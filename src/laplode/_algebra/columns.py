"""Products with wide matrices by blocks of columns, so that what is made on the way stays small; tall ones by BLAS."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

# Columns of a wide matrix taken at a time, so that what is made of them stays small beside it.
_COLUMNS = 2**15


def over_columns(add: Callable[[Array, Callable[[Array], Array]], Array], total: Array, size: int) -> Array:
    """Accumulate over blocks of columns: `add(total, take)`, where `take` cuts a block from a (..., P) array."""
    block = min(_COLUMNS, size)
    whole = size // block

    def cut(start, width):
        return lambda x: jax.lax.dynamic_slice_in_dim(x, start, width, axis=-1)

    total = jax.lax.fori_loop(0, whole, lambda i, total: add(total, cut(i * block, block)), total)
    rest = size - whole * block
    return add(total, cut(whole * block, rest)) if rest else total


@eqx.filter_jit
def cross_gram(left: Float[Array, "A P"], right: Float[Array, "B P"], columns: Float[Array, " P"]):
    """left · diag(columns) · rightᵀ."""
    add = lambda total, take: total + (take(left) * take(columns)) @ take(right).T
    return over_columns(add, jnp.zeros((left.shape[0], right.shape[0])), left.shape[1])


@eqx.filter_jit
def minus_product(rows: Float[Array, "A P"], left: Float[Array, "A B"], right: Float[Array, "B P"], columns: Array):
    """(rows − left · right · diag(columns)) · diag(columns), in the place of `rows` where it can be had."""
    size = rows.shape[1]
    block = min(_COLUMNS, size)

    # The last block overlaps its neighbor, and leaves alone what that has done.
    def put(i, result):
        start = jnp.minimum(i * block, size - block)
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, start, block, axis=-1)
        fresh = start + jnp.arange(block) >= i * block
        old, scale = take(result), take(columns)
        new = jnp.where(fresh, (old - (left @ take(right)) * scale) * scale, old)
        return jax.lax.dynamic_update_slice(result, new, (0, start))

    return jax.lax.fori_loop(0, -(-size // block), put, rows)


@eqx.filter_jit
def scaled_gram(matrix: Float[Array, "A P"], columns: Float[Array, " P"], minus: tuple[Array, Array] | None = None):
    """(X) diag(columns) (X)ᵀ of X = matrix, or of X = matrix − minus[0] @ minus[1]."""

    def add(total, take):
        rows = take(matrix)
        if minus is not None:
            rows = rows - minus[0] @ take(minus[1])
        rows = rows * jnp.sqrt(take(columns))
        return total + rows @ rows.T

    return over_columns(add, jnp.zeros((matrix.shape[0],) * 2), matrix.shape[1])


def gram(rows: Float[Array, "M P"]) -> Float[Array, "P P"]:
    """Xᵀ X."""
    if isinstance(rows, Tracer) or {device.platform for device in rows.devices()} != {"cpu"}:
        return rows.T @ rows
    # NumPy's BLAS uses that the result is symmetric, for half of the work; XLA does not.
    host = np.asarray(rows)
    return jnp.asarray(host.T @ host)

"""Checks of arguments, with errors that name the argument and say what to do."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from ._errors import LaplodeError


def real_array(name: str, value: Any, unit: str = "numbers") -> np.ndarray:
    """Return `value` as a float64 array, with NaN for what is masked, or say that it is none of real numbers."""
    try:
        if np.ma.isMaskedArray(value):
            value = np.ma.filled(value.astype(np.float64), np.nan)
        array = np.asarray(value)
        dates = array.dtype.kind in "mM" or (array.dtype == object and array.size and hasattr(array.flat[0], "year"))
        if not dates and (array.dtype == object or np.iscomplexobj(array)):
            raise TypeError
        if not dates:
            return array.astype(np.float64)
    except (TypeError, ValueError):
        raise LaplodeError(f"`{name}` must be an array of real {unit}, got {type(value).__name__}.") from None
    raise LaplodeError(
        f"`{name}` holds dates, and must hold numbers: count in a unit of your choice, such as days by "
        f'({name} - {name}[0]) / np.timedelta64(1, "D").'
    )


def check_key(name: str, key: Any) -> PRNGKeyArray:
    """Return `key`, or say that it is no JAX random key."""
    array = isinstance(key, jax.Array | np.ndarray)
    typed = array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    raw = array and key.dtype == np.uint32 and key.shape in ((2,), (4,))
    if not typed and not raw:
        got = f"an array of {key.dtype} and shape {key.shape}" if array else repr(key)
        raise LaplodeError(f"`{name}` must be one JAX random key, such as jax.random.key(0); got {got}.")
    return key  # pyright: ignore[reportReturnType]


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Return `value` as an integer of at least `least`, or say that it is none."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise LaplodeError(f"`{name}` must be {wanted}, got {value!r}.")
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    """Return `value` as True or False, or say that it is neither."""
    if not isinstance(value, bool | np.bool_):
        raise LaplodeError(f"`{name}` must be True or False, got {value!r}.")
    return bool(value)


def check_fraction(name: str, value: Any) -> float:
    """Return `value` as a float between 0 and 1, or say that it is none."""
    if not isinstance(value, float | np.floating) or not 0 < value < 1:
        raise LaplodeError(f"`{name}` must lie between 0 and 1, got {value!r}.")
    return float(value)


def is_number(value: Any) -> bool:
    """Whether `value` is one finite number."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(np.isfinite(value))


def check_number(name: str, value: Any) -> None:
    """Raise `LaplodeError` unless `value` is a positive, finite number."""
    if not is_number(value) or value <= 0:
        raise LaplodeError(f"`{name}` must be a positive number, got {value!r}.")


def check_from(name: str, value: Any, kind: type, source: str) -> None:
    """Raise `LaplodeError` unless `value` is a `kind`, which the function `source` of laplode returns."""
    if not isinstance(value, kind):
        raise LaplodeError(f"`{name}` must come from laplode.{source}, got {type(value).__name__}.")


def check_positive(name: str, value: Any) -> np.ndarray:
    """Return `value` as an array of positive numbers, or say that it is none."""
    array = real_array(name, value)
    if not np.all(np.isfinite(array)) or np.any(array <= 0):
        raise LaplodeError(f"`{name}` must be positive and finite, got {value}.")
    return array


def check_x64() -> None:
    """Raise `LaplodeError` unless JAX computes in 64 bits."""
    if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise LaplodeError(
            "laplode computes curvature in float64, and 64-bit JAX is off: a float32 Hessian is asymmetric and its "
            'small eigenvalues are noise. Call jax.config.update("jax_enable_x64", True) at the top of your program. A '
            "model trained in float32 may stay as it is; it is cast."
        )


def is_real_array(leaf: Any) -> bool:
    """Whether a leaf is an array of real floating point numbers."""
    return eqx.is_inexact_array(leaf) and not np.iscomplexobj(leaf)


def in_float(tree: PyTree) -> PyTree:
    """Every real inexact array in JAX's default float type: one float32 leaf would bring its rounding to all."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype=float) if is_real_array(leaf) else leaf, tree)

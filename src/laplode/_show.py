"""How objects print."""

import dataclasses
import html
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


class Shown(eqx.Module):
    """An object that prints as a few lines for a reader, in a notebook too."""

    def _shown(self) -> str:
        """The lines; one, with the fields that are set, unless there is more to say."""
        return in_a_line(self)

    def __repr__(self) -> str:
        try:
            return self._shown()
        except Exception:  # its values are traced, or taken out: then its fields are all that there is to show
            return super().__repr__()

    def _repr_html_(self) -> str:
        return preformatted(repr(self))


def preformatted(text: str) -> str:
    """A text as HTML that keeps its lines."""
    return f"<pre>{html.escape(text)}</pre>"


def rows(named: Mapping[str, str], title: str | None = None) -> str:
    """Lines of names and values, beneath a title."""
    width = max(map(len, named))
    lines = [f"{name:<{width}}  {value}" for name, value in named.items()]
    return "\n".join(lines if title is None else [title, *(f"  {line}" for line in lines)])


def num_values(tree: Any) -> int:
    """How many real numbers the arrays of a pytree hold."""
    inexact = lambda leaf: jnp.issubdtype(getattr(leaf, "dtype", bool), jnp.inexact)
    return sum(leaf.size for leaf in jax.tree.leaves(tree) if inexact(leaf))


def in_a_line(value: Any) -> str:
    """A value as its class and the fields that are set; arrays of more than three numbers by their shape."""
    if eqx.is_array(value):
        few = ", ".join(f"{x:.4g}" for x in np.ravel(value)) if value.size <= 3 else f"shape {value.shape}"
        return few if value.ndim == 0 else f"[{few}]"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {in_a_line(each)}" for key, each in value.items())
    if isinstance(value, tuple):
        return f"({', '.join(map(in_a_line, value))})"
    if isinstance(value, eqx.Module):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        shown = [f"{name}={in_a_line(each)}" for name, each in fields.items() if each is not None and each is not False]
        return f"{type(value).__name__}({', '.join(shown)})"
    return (
        str(value) if isinstance(value, bool | int | float | str) else getattr(value, "__name__", type(value).__name__)
    )

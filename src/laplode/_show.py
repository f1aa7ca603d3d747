"""How objects print."""

import abc
import html
from collections.abc import Mapping

import equinox as eqx
import jax
from jax.core import Tracer


class Shown(eqx.Module):
    """An object that prints as a few lines for a reader, in a notebook too."""

    @abc.abstractmethod
    def _shown(self) -> str:
        """The lines."""

    def __repr__(self) -> str:
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(self))
        return super().__repr__() if traced else self._shown()

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

"""A model's parameters as a vector: which they are, their names, and the way back."""

from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from .._checks import in_float, is_real_array
from .._errors import LaplodeError, warn
from .._late import dist
from .._problem.prior import AbstractPrior, is_at
from .neural_ode import NeuralODE

Where = Callable[[Any], Any] | PyTree[bool] | str | list[str] | tuple[str, ...] | None


# How a solve is done is not what is inferred, whatever arrays its settings hold; nor are running statistics.
_SETTINGS = (
    eqx.nn.State,
    eqx.nn.StateIndex,
    diffrax.AbstractSolver,
    diffrax.AbstractStepSizeController,
    diffrax.AbstractAdjoint,
    diffrax.SaveAt,
)


def all_parameters(model: PyTree) -> PyTree[bool]:
    """Which leaves of a model are parameters."""
    is_settings = lambda node: isinstance(node, _SETTINGS)
    return jax.tree.map(
        lambda node: jax.tree.map(lambda _: False, node) if is_settings(node) else eqx.is_inexact_array(node),
        model,
        is_leaf=is_settings,
    )


def _selected(model: PyTree, where: Any) -> PyTree[bool]:
    spec = all_parameters(model)
    if where is None:
        return spec
    paths = [where] if isinstance(where, str) else where
    try:
        if isinstance(paths, list | tuple) and paths and all(isinstance(path, str) for path in paths):
            return _at_paths(spec, paths)
        if callable(where) and not isinstance(where, eqx.Module):
            nothing = jax.tree.map(lambda _: False, spec)
            chosen = eqx.tree_at(where, nothing, replace_fn=lambda node: jax.tree.map(lambda _: True, node))
            return jax.tree.map(lambda a, b: a and b, spec, chosen)
        if not all(isinstance(leaf, bool | np.bool_) for leaf in jax.tree.leaves(where)):
            raise TypeError(f"it holds {jax.tree.leaves(where)[0]!r}")
        return jax.tree.map(lambda w, sub: jax.tree.map(lambda s: bool(w) and s, sub), where, spec)
    except Exception as error:  # whatever a function of the user's raises
        names = ", ".join(name for name, leaf in _named_leaves(spec) if leaf)
        raise LaplodeError(
            "`where` must be a function that picks nodes of the model, as in where=lambda m: m.vector_field.layers[-1] "
            'or where=lambda m: (m.a, m.b); names of parameters, as in where=["vector_field.rate"]; or a pytree prefix '
            f"of the model holding True and False. It failed with {type(error).__name__}: {error}. The parameters are: "
            f"{names}."
        ) from error


def _at_paths(spec: PyTree[bool], paths: Sequence[str]) -> PyTree[bool]:
    names = [name for name, leaf in _named_leaves(spec) if leaf]
    for path in paths:
        if not any(is_at(name, path) for name in names):
            raise KeyError(path)
    leaves, structure = jax.tree.flatten(spec)
    chosen = [any(is_at(name, path) for path in paths) for name, _ in _named_leaves(spec)]
    return jax.tree.unflatten(structure, [a and b for a, b in zip(leaves, chosen, strict=True)])


class Parameters(eqx.Module):
    """The selected parameters of a model, as a vector θ of shape (P,) and back.

    `selected` holds them in unconstrained coordinates: themselves or, where `transforms` has one for a leaf, what it
    maps to them. Everything else of the model, fixed arrays, integer leaves and functions, waits in `rest`.
    """

    selected: PyTree
    rest: PyTree
    transforms: tuple["dist.transforms.Transform | None", ...]

    def constrained(self, selected: PyTree) -> PyTree:
        """Parameters of the form of `selected` as the model knows them."""
        leaves, structure = jax.tree.flatten(selected)
        pairs = zip(self.transforms, leaves, strict=True)
        return jax.tree.unflatten(structure, [x if t is None else jnp.asarray(t(x)) for t, x in pairs])

    def build(self, selected: PyTree) -> Any:
        """The model with parameters of the form of `selected`."""
        # The parameters come first: `eqx.combine` keeps the first leaf that is not None, so that with the template
        # first θ would have no influence on the model and every derivative would be zero.
        return eqx.combine(self.constrained(selected), self.rest)

    @property
    def vector(self) -> Float[Array, " P"]:
        """θ."""
        return ravel_pytree(self.selected)[0]

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.selected))

    @property
    def leaves(self) -> tuple[tuple[str, tuple[int, ...], int, int], ...]:
        """Of each selected leaf: name, shape, and where it starts and stops in θ."""
        leaves, start = [], 0
        for name, leaf in _named_leaves(self.selected):
            leaves.append((name, leaf.shape, start, start + int(leaf.size)))
            start += int(leaf.size)
        return tuple(leaves)

    @property
    def where(self) -> PyTree[bool]:
        """The selection itself, as `parameters` takes it."""
        return jax.tree.map(lambda leaf: leaf is not None, self.selected, is_leaf=lambda leaf: leaf is None)

    def unravel(self, theta: Float[Array, " P"]) -> Any:
        """The model with its selected parameters set to `theta`."""
        return self.build(self.with_vector(theta))

    def with_vector(self, theta: Float[Array, " P"]) -> PyTree:
        """`theta` in the form of `selected`."""
        return ravel_pytree(self.selected)[1](theta)

    def at(self, theta: Float[Array, " P"]) -> "Parameters":
        """The same parameters with the values `theta`."""
        return Parameters(self.with_vector(theta), self.rest, self.transforms)

    def without(self, names: Sequence[str]) -> "Parameters":
        """The same model with the leaves of these names among what stays fixed."""
        chosen = [name not in names for name, _ in _named_leaves(self.selected)]
        kept = jax.tree.unflatten(jax.tree.structure(self.selected), chosen)
        is_missing = lambda leaf: leaf is None
        where = jax.tree.map(lambda leaf: leaf is True, kept, is_leaf=is_missing)
        selected = jax.tree.map(lambda leaf, k: leaf if k else None, self.selected, where, is_leaf=is_missing)
        transforms = tuple(t for t, keep in zip(self.transforms, chosen, strict=True) if keep)
        return Parameters(selected, eqx.partition(self.model, where)[1], transforms)

    @property
    def model(self) -> Any:
        """The model as it is."""
        return self.build(self.selected)

    @property
    def names_in_model(self) -> list[str]:
        """Names of all leaves that could be selected."""
        model = self.model
        return [name for name, _ in _named_leaves(eqx.filter(model, all_parameters(model)))]

    def spread(self, name: str, prefix: PyTree) -> Float[Array, " P"]:
        """One value for each entry of θ, of a scalar, an array of shape (P,), or a pytree prefix of the model.

        `name` says in errors what the values are. An array may be for all parameters of a model of which this is a
        selection.

        **Raises:** `LaplodeError` when it is none of these.
        """
        if eqx.is_array_like(prefix) and jnp.ndim(prefix) <= 1:  # pyright: ignore[reportArgumentType]
            values = jnp.asarray(prefix, dtype=float)
            if values.ndim == 0 or values.shape == (self.size,):
                return jnp.broadcast_to(values, (self.size,))
            everything = eqx.combine(
                jax.tree.map(lambda x: np.ones(x.shape, bool), self.selected),
                jax.tree.map(lambda x: np.zeros(x.shape, bool), eqx.filter(self.rest, is_real_array)),
            )
            everything = eqx.filter(everything, all_parameters(self.model))
            chosen = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(everything)])
            if values.shape == chosen.shape:
                return values[chosen]
            raise LaplodeError(
                f"{name} has shape {values.shape}, but the model has P = {self.size} parameters: give a scalar, an "
                "array of shape (P,), or a pytree prefix of the model."
            )
        spread = lambda p, sub: jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(p, dtype=float), x.shape), sub)
        try:
            spread_out = jax.tree.map(spread, prefix, self.selected, is_leaf=lambda node: node is None)
            return ravel_pytree(spread_out)[0]
        except (ValueError, TypeError) as error:
            raise LaplodeError(
                f"{name} is neither a scalar, nor an array of shape ({self.size},), nor a pytree prefix of the model: "
                f"{error}"
            ) from error

    def name(self, index: int) -> str:
        """The name of one entry of θ, such as `vector_field.layers[0].weight[2, 1]`."""
        for name, shape, start, stop in self.leaves:
            if start <= index < stop:
                place = np.unravel_index(index - start, shape)
                return name + (f"[{', '.join(str(int(i)) for i in place)}]" if shape else "")
        raise IndexError(index)

    def names(self, indices: np.ndarray) -> tuple[str, ...]:
        """The names of entries of θ; a leaf named whole stands for all of its entries."""
        chosen = np.zeros(self.size, bool)
        chosen[indices] = True
        names: list[str] = []
        for name, _, start, stop in self.leaves:
            if np.all(chosen[start:stop]):
                names.append(name)
            else:
                names.extend(self.name(start + int(i)) for i in np.flatnonzero(chosen[start:stop]))
        return tuple(names)


def parameters(model: Any, where: Any = None, prior: AbstractPrior | None = None) -> Parameters:
    """View the inexact arrays of `model` that `where` selects as a vector, in float64 when JAX has it.

    **Arguments:**

    - `model`: an `eqx.Module`. Solvers and step size controllers in it hold no parameters.
    - `where`: None for all; a function that picks nodes, as in `eqx.tree_at`; names of leaves, or of nodes that hold
        them, as `NamedPriors` takes; or a pytree prefix of True and False.
    - `prior`: whose named distributions say which parameters are constrained; a posterior's, those that it had.

    Warns (`LaplodeWarning`) when two leaves are one array, since they are two parameters from here on.

    **Raises:** `LaplodeError` when nothing is selected, a parameter is complex or not finite, or the prior does not fit
    the model.
    """
    spec = _selected(model, where)
    selected, rest = eqx.partition(in_float(model), spec)
    named = _named_leaves(selected)
    if not any(leaf.size for _, leaf in named):
        if where is None:
            raise LaplodeError(
                f"`model` ({type(model).__name__}) has no parameters: no leaf is an array of floating point numbers. "
                "Python floats and integer arrays are constants; make parameters arrays, as in jnp.array(1.5)."
            )
        raise LaplodeError(
            "`where` selects no parameter: none of the chosen leaves is an array of floating point numbers."
        )
    _warn_of_one_array(eqx.filter(model, spec))
    for name, leaf in named:
        if jnp.iscomplexobj(leaf):
            raise LaplodeError(f"`model` has a complex parameter, {name}: split it into its real and imaginary parts.")
        if not np.all(np.isfinite(leaf)):
            raise LaplodeError(f"`model` has a parameter that is not finite: {name}. The fit has diverged.")
    learns_scale = isinstance(model, NeuralODE) and any(name == "scale" for name, _ in named)
    if learns_scale and prior is not None and prior.distribution_of("scale") is None:
        raise LaplodeError(
            "`scale` of the model, the noise scale, needs a prior of its own, since it has to stay positive: "
            'laplode.NamedPriors({"scale": dist.HalfNormal(1.0)}, rest=...), or leave it out of the parameters by '
            "`where`."
        )
    transforms = tuple(None if prior is None else prior.transform_of(name, leaf) for name, leaf in named)
    pairs = zip(transforms, jax.tree.leaves(selected), strict=True)
    free = [leaf if t is None else jnp.asarray(t.inv(leaf)) for t, leaf in pairs]
    view = Parameters(jax.tree.unflatten(jax.tree.structure(selected), free), rest, transforms)
    if prior is not None:
        prior.check(view)
    return view


def _named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path).lstrip("."), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _warn_of_one_array(selected: PyTree) -> None:
    places: dict[int, list[str]] = {}
    for name, leaf in _named_leaves(selected):
        places.setdefault(id(leaf), []).append(name)
    for names in places.values():
        if len(names) > 1:
            warn(
                f"One array stands in several places of `model`, {', '.join(names)}: these are different parameters, "
                "which need not stay equal. To tie them, hold the array once, or use eqx.nn.Shared; to have them apart "
                "without this warning, copy it.",
                level=4,
            )

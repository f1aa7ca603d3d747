"""Results on disk: the numbers of a file, and the code from what the user has in hand."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array

from .._checks import check_x64, in_float
from .._errors import LaplodeError
from .._files import (
    Arrays,
    Path,
    class_of,
    encode,
    fields_of,
    one_level,
    origin,
    read,
    text_of,
    trusting_nothing,
    write,
)
from .._fit.result import Fit
from .._posterior.posterior import Posterior
from .._predict.function import FunctionPredictions
from .._predict.predictions import NotSaved, Predictions
from .._problem.problem import Problem

_MISSING = dataclasses.MISSING


def save(path: Path, value: Any) -> None:
    """Write a posterior, a fit, predictions or any other result of laplode to one file.

    The file holds all numbers, the data, likelihood and prior and how the result was made, bit for bit; of the model it
    holds the arrays, and the names of classes and functions. It is written beside `path` and then put in its place, so
    that whatever happens there is the old file or the new one, whole.

    **Arguments:**

    - `path`: of the file.
    - `value`: from `laplace`, `maximize_evidence`, `fit`, `refine`, `predict`, `predict_function` and the like.

    **Returns:** None.

    **Raises:** `LaplodeError` when `value` is something else, or the file can't be written, as on a full disk.
    """
    name = type(value).__name__
    if origin(type(value)) != "laplode" or not isinstance(value, eqx.Module):
        raise LaplodeError(
            f"`value` must be a result of laplode, such as a Posterior, a Fit or Predictions; got {name}."
        )
    if isinstance(value, Predictions | FunctionPredictions) and value._closed_form is not None:
        value = dataclasses.replace(value, _closed_form=NotSaved())  # it holds the model
    arrays: Arrays = {}
    node = encode(value, name, arrays)
    write(path, {"holds": name, "value": node}, [array for _, array in arrays.values()])


def load(path: Path, like: Any = None) -> Any:
    """Read what `save` wrote.

    ```python
    posterior = laplode.load("posterior.laplode", like=NeuralODE(Field(key)))
    ```

    Classes and functions are not in the file and not looked for: they are those of `like`. Nothing in the file is
    executed.

    **Arguments:**

    - `path`: of the file.
    - `like`: a model of the same structure, at any parameters. `(model, problem)` where the likelihood, the prior or a
        container of `args` is code of yours; of `problem` that alone matters, and its shapes. A posterior or a fit
        stands for its model and problem. None for predictions.

    **Returns:** the value, with the same bits.

    **Raises:** `LaplodeError` when the file is not one of `save`, is of another format, cut short or damaged, or when
        `like` is missing or differs: with the first place where it does.
    """
    check_x64()
    likes = _likes(like)

    def check(header: dict[str, Any]) -> None:
        if "value" not in header:
            raise LaplodeError(f"`path`: {path} holds {header['holds']}, which laplode.load does not read.")
        if header["value"][:3] != ["object", "laplode", header["holds"]]:
            raise ValueError(f"no {header['holds']} in it")

    header, arrays = read(path, check)
    with trusting_nothing(path):
        return _Decoder(likes, arrays).decode(header["value"], header["holds"])


def _likes(like: Any) -> dict[str, Any]:
    """What code stands in a field of that name: of a result, of its flow, or of its parameters."""
    if isinstance(like, Posterior):
        model, problem = like.parameters.model, like.problem
    elif isinstance(like, Fit):
        model, problem = like.model, like.problem
    elif type(like) is tuple and len(like) == 2 and isinstance(like[1], Problem):
        model, problem = like
    else:
        model, problem = like, None
    if origin(type(model)) == "laplode" and not callable(model):
        raise LaplodeError(
            f"`like` must be a model, (model, problem), a posterior or a fit; got {type(model).__name__}."
        )
    likes: dict[str, Any] = (
        {} if model is None else dict.fromkeys(("model", "selected", "rest", "restarts"), in_float(model))
    )
    return likes if problem is None else {**likes, "problem": problem, "args": problem.data.args}


class _Decoder:
    """From JSON and arrays to the value. `likes` is the code that stands in fields of some names."""

    def __init__(self, likes: dict[str, Any], arrays: list[Any]):
        self._likes = likes
        self._arrays = arrays

    def decode(self, node: Any, path: str, like: Any = _MISSING) -> Any:
        """`like` is what stands at the same place of the user's model or problem, where the place is in one of them."""
        match node:
            case None:
                return None
            case float():
                return node if like is _MISSING or isinstance(like, float) else self._refuse(path, repr(node), like)
            case bool() | int() | str():
                same = like is _MISSING or (type(like) is type(node) and like == node)
                return node if same else self._refuse(path, repr(node), like)
            case ["scalar", place]:
                return np.asarray(self._arrays[place])[()]
            case ["key", impl, place]:
                return jax.random.wrap_key_data(self._arrays[place], impl=impl)
            case ["array", place]:
                return self._array(self._arrays[place], path, like)
            case [("tuple" | "list") as name, items]:
                found = self._sequence(items, path, like)
                return tuple(found) if name == "tuple" else found
            case ["dict", pairs]:
                if like is not _MISSING and (type(like) is not dict or list(like) != [key for key, _ in pairs]):
                    self._refuse(path, f"a dict of {', '.join(map(repr, dict(pairs)))}", like)
                child = lambda key: _MISSING if like is _MISSING else like[key]
                return {key: self.decode(each, f"{path}[{key!r}]", child(key)) for key, each in pairs}
            case ["object", where, name, nodes]:
                return self._object(where, name, nodes, path, like)
            case ["pytree", name, nodes]:
                children, structure = one_level(like)
                if type(like).__qualname__ != name or len(children) != len(nodes):
                    self._refuse(path, f"{name} of {len(nodes)}", like)
                pairs = zip(nodes, children, strict=True)
                return jax.tree.unflatten(structure, [self.decode(n, f"{path}{key}", each) for n, (key, each) in pairs])
            case ["code", text]:
                return like if like is not _MISSING and text_of(like) == text else self._refuse(path, text, like)
        raise ValueError(f"{path} is {str(node)[:80]}")

    def _refuse(self, path: str, stored: str, like: Any) -> None:
        if like is _MISSING:
            raise LaplodeError(
                f"`like` is missing: {path} is {stored}, which is code, and a file holds none. Pass like=model, or "
                "like=(model, problem) where it belongs to the likelihood, the prior or `args`."
            )
        found = f"an array {like.dtype}{list(like.shape)}" if eqx.is_array(like) else text_of(like)
        if isinstance(like, eqx.Module) or type(like) in (tuple, list, dict):
            found = type(like).__qualname__
        raise LaplodeError(f"`like` differs from what was saved: {path} is {found}, and was {stored}.")

    def _array(self, array: Array | np.ndarray, path: str, like: Any) -> Array | np.ndarray:
        form = lambda x: (x.shape, x.dtype)
        if like is not _MISSING and not (isinstance(like, Array | np.ndarray) and form(like) == form(array)):
            self._refuse(path, f"an array {array.dtype}{list(array.shape)}", like)
        return array

    def _sequence(self, nodes: list[Any], path: str, like: Any) -> list[Any]:
        if like is _MISSING:
            like = [_MISSING] * len(nodes)
        elif not isinstance(like, tuple | list) or len(like) != len(nodes):
            self._refuse(path, f"{len(nodes)} values", like)
        pairs = enumerate(zip(nodes, like, strict=True))
        return [self.decode(node, f"{path}[{i}]", each) for i, (node, each) in pairs]

    def _object(self, where: str, name: str, nodes: dict[str, Any], path: str, like: Any) -> Any:
        kind = class_of(where, name) if where else type(like)
        if kind.__qualname__ != name or (like is not _MISSING and type(like) is not kind):
            self._refuse(path, name, like)
        known = {field.name: None for field in dataclasses.fields(kind)} if where == "laplode" else nodes
        there = known if like is _MISSING else fields_of(like)
        if odd := sorted(set(there) ^ set(nodes)):
            self._refuse(f"{path}.{odd[0]}", "there" if odd[0] in nodes else "no field", there.get(odd[0]))
        by: Any = object if issubclass(kind, eqx.Module) else kind  # NumPyro has constraints that are one object each
        made = by.__new__(kind)
        for field, node in nodes.items():
            # An object of Equinox is made of its leaves like this: `__init__` would change them.
            object.__setattr__(made, field, self.decode(node, *self._place(path, like, field, node)))
        return made

    def _place(self, path: str, like: Any, field: str, node: Any) -> tuple[str, Any]:
        """The path and the code of a field."""
        if like is not _MISSING:
            return f"{path}.{field}", getattr(like, field)
        code = self._likes.get(field, _MISSING)
        if field == "restarts" and code is not _MISSING:
            code = (code,) * len(node[1])
        return {"selected": "model", "rest": "model", "model": "model"}.get(field, f"{path}.{field}"), code

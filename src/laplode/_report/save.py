"""Results on disk: the data of a file, and the code from what the user has in hand."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import Transform

from .._algebra.forms import BlockCurvature, DenseCurvature, DiagonalCurvature, EigenCurvature, FactoredCurvature
from .._algebra.regularization import Regularized
from .._algebra.structure import BlockDiagonalPrecision, DiagonalPrecision, FullPrecision, LowRankPrecision
from .._checks import in_float
from .._errors import LaplodeError
from .._files import Path, read, text_of, write
from .._fit.fit import Fit
from .._model.parameters import Parameters
from .._posterior.posterior import AbstractPosterior, Diagnostics, Method, Posterior
from .._predict.function import FunctionPredictions
from .._predict.mix import MixturePosterior
from .._predict.predictions import Predictions
from .._problem.counts import NegativeBinomial, Poisson
from .._problem.data import Trajectories
from .._problem.likelihood import FromDistribution
from .._problem.prior import GaussianPrior, NamedPriors, PosteriorPrior
from .._problem.problem import Problem
from .._problem.scale import Gaussian, LogNormal, StudentT
from .._solve.maps import ForeignFlow, ReplayedFlow
from .._solve.replay import Steps

_RESULTS = (Posterior, MixturePosterior, Fit, Predictions, FunctionPredictions)


# What a file may name, and `load` makes again without being shown one.
_PARTS = (
    *_RESULTS,
    *(Diagnostics, Method, Regularized, ForeignFlow, ReplayedFlow, Steps, Problem, Trajectories),
    *(Gaussian, LogNormal, StudentT, Poisson, NegativeBinomial, FromDistribution),
    *(GaussianPrior, NamedPriors, PosteriorPrior),
    *(DenseCurvature, BlockCurvature, DiagonalCurvature, EigenCurvature, FactoredCurvature),
    *(FullPrecision, BlockDiagonalPrecision, DiagonalPrecision, LowRankPrecision),
)


_NAMED = {part.__name__: part for part in _PARTS}


_OF_NUMPYRO = (dist.Distribution, Transform, Constraint)


def save(path: Path, value: Posterior | MixturePosterior | Fit | Predictions | FunctionPredictions) -> None:
    """Write a posterior, a fit or predictions to one file.

    The file holds all numbers, the data, likelihood and prior and how the result was made, bit for bit; of the model it
    holds the arrays, and the names of classes and functions. It is written beside `path` and then put in its place, so
    that whatever happens there is the old file or the new one, whole.

    **Arguments:**

    - `path`: of the file.
    - `value`: from `laplace`, `mixture`, `maximize_evidence`, `fit`, `refine`, `predict`, `predict_function` or
        `predict_field`.

    **Returns:** None.

    **Raises:** `LaplodeError` when `value` is something else, or the file can't be written, as on a full disk.
    """
    if not isinstance(value, _RESULTS):
        kinds = ", ".join(kind.__name__ for kind in _RESULTS)
        raise LaplodeError(f"`value` must be one of {kinds}; got {type(value).__name__}.")
    arrays = _Arrays()
    node = _encode(value, type(value).__name__, arrays)
    write(path, {"holds": type(value).__name__, "value": node}, arrays.found)


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

    **Returns:** the `Posterior`, `MixturePosterior`, `Fit`, `Predictions` or `FunctionPredictions`, with the same bits.

    **Raises:** `LaplodeError`, before any array is read, when the file is not one of `save`, is newer, cut short or
    damaged, or when `like` is missing or differs: with the first place where it does.
    """
    code = _code(like)

    def check(header: dict[str, Any], forms: list[jax.ShapeDtypeStruct]) -> None:
        if header["holds"] not in {kind.__name__ for kind in _RESULTS}:
            raise LaplodeError(f"`path`: {path} holds {header['holds']}, which laplode.load does not read.")
        if header["value"][:2] != ["part", header["holds"]]:
            raise ValueError(f"no {header['holds']} in it")
        _Decoder(code, forms).decode(header["value"], header["holds"])

    header, arrays = read(path, check)
    return _Decoder(code, arrays).decode(header["value"], header["holds"])


@dataclasses.dataclass(frozen=True)
class _Code:
    """Where classes and functions come from: a model and a problem, or nothing."""

    model: Any
    problem: Any


def _code(like: Any) -> _Code:
    if isinstance(like, AbstractPosterior):
        return _Code(like.parameters.model, like.problem)
    if isinstance(like, Fit):
        return _Code(like.model, like.problem)
    model, problem = like if type(like) is tuple and len(like) == 2 and isinstance(like[1], Problem) else (like, None)
    if isinstance(model, Problem | Predictions | FunctionPredictions):
        raise LaplodeError(
            f"`like` must be a model, (model, problem), a posterior or a fit; got {type(model).__name__}."
        )
    return _Code(in_float(model), problem)


# ---- Values as JSON, their arrays aside


class _Arrays:
    """The arrays of a value, each once."""

    def __init__(self):
        self.found: list[Array | np.ndarray] = []
        self._places: dict[int, int] = {}

    def place(self, array: Array | np.ndarray) -> int:
        if id(array) not in self._places:
            self._places[id(array)] = len(self.found)
            self.found.append(array)
        return self._places[id(array)]


def _encode(value: Any, path: str, arrays: _Arrays) -> Any:
    """Plain values as they are; all else as a list of what it is and what is in it."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return ["float", value.hex()]
    if isinstance(value, np.generic):
        return ["scalar", arrays.place(np.asarray(value))]
    if isinstance(value, Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        impl = jax.random.key_impl(value)
        if not isinstance(impl, str):
            raise LaplodeError(f"{path} is a random key of a kind of its own, {impl}, which `save` does not know.")
        return ["key", impl, arrays.place(jax.random.key_data(value))]
    if isinstance(value, Array | np.ndarray):
        if value.dtype.hasobject or value.dtype.names:
            raise LaplodeError(f"{path} is an array of {value.dtype}, which `save` does not write: make it numbers.")
        return ["array", arrays.place(value)]
    if type(value) in (tuple, list):
        items = [_encode(item, f"{path}[{i}]", arrays) for i, item in enumerate(value)]
        return [type(value).__name__, items]
    if type(value) is dict and all(type(key) in (str, int) for key in value):
        return ["dict", [[key, _encode(item, f"{path}[{key!r}]", arrays)] for key, item in value.items()]]
    if isinstance(value, Parameters):
        return _encode_parameters(value, path, arrays)
    if type(value) in _PARTS:
        names = [field.name for field in dataclasses.fields(value)]  # pyright: ignore[reportArgumentType]
        fields = {name: getattr(value, name) for name in names}
        return ["part", type(value).__name__, {k: _encode(v, f"{path}.{k}", arrays) for k, v in fields.items()}]
    if isinstance(value, _OF_NUMPYRO) and _class_of_numpyro(type(value).__module__, type(value).__qualname__):
        data, settings = value.tree_flatten()
        module, name = type(value).__module__, type(value).__qualname__
        return ["numpyro", module, name, _encode(data, path, arrays), _encode(settings, path, arrays)]
    if isinstance(value, eqx.Module):
        fields = {}
        for field in dataclasses.fields(value):
            if not hasattr(value, field.name):
                continue
            item, where = getattr(value, field.name), f"{path}.{field.name}"
            is_code = field.metadata.get("static", False)
            fields[field.name] = ["code", text_of(item)] if is_code else _encode(item, where, arrays)
        return ["module", type(value).__qualname__, fields]
    children, structure = _one_level(value)
    if jax.tree_util.treedef_is_leaf(structure):
        return ["code", text_of(value)]
    items = [_encode(child, f"{path}{jax.tree_util.keystr(key)}", arrays) for key, child in children]
    return ["pytree", type(value).__qualname__, items]


def _encode_parameters(view: Parameters, path: str, arrays: _Arrays) -> Any:
    """The model once, in unconstrained coordinates, and which of its leaves are selected."""
    model = eqx.combine(view.selected, view.rest)
    where = jax.tree.leaves(view.where)
    return ["parameters", _encode(model, "model", arrays), where, _encode(view.transforms, path, arrays)]


def _one_level(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
    return jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda node: node is not value)


def _class_of_numpyro(module: str, name: str) -> type | None:
    """A distribution, transformation or constraint of NumPyro by its name, among those that it has already made."""
    if not module.startswith("numpyro.distributions."):
        return None
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) and issubclass(found, _OF_NUMPYRO) else None


class _Decoder:
    """From JSON and arrays, or the forms of arrays, to the value."""

    def __init__(self, code: _Code, arrays: list[Any]):
        self._code = code
        self._arrays = arrays
        self._kinds: dict[str, Callable[..., Any]] = {
            "float": self._float,
            "scalar": self._scalar,
            "key": self._key,
            "array": self._array,
            "tuple": lambda path, like, items: tuple(self._items(items, path, like)),
            "list": lambda path, like, items: self._items(items, path, like),
            "dict": self._dict,
            "parameters": self._parameters,
            "part": self._part,
            "numpyro": self._numpyro,
            "module": self._module,
            "pytree": self._pytree,
            "code": self._code_of_like,
        }

    def decode(self, node: Any, path: str, like: Any = dataclasses.MISSING) -> Any:
        """`like` is what stands at the same place of the user's model or problem, where the place is in one of them."""
        if not isinstance(node, list):
            if like is not dataclasses.MISSING and (type(like) is not type(node) or like != node):
                raise self._differs(path, repr(node), like)
            return node
        return self._kinds[node[0]](path, like, *node[1:])

    def _differs(self, path: str, stored: str, like: Any) -> LaplodeError:
        if like is dataclasses.MISSING:
            return LaplodeError(
                f"`like` is missing: {path} is {stored}, which is code, and a file holds none. Pass like=model, or "
                "like=(model, problem) where it belongs to the likelihood, the prior or `args`."
            )
        found = f"an array {like.dtype}{list(like.shape)}" if eqx.is_array(like) else text_of(like)
        if isinstance(like, eqx.Module) or type(like) in (tuple, list, dict):
            found = type(like).__qualname__
        return LaplodeError(f"`like` differs from what was saved: {path} is {found}, and was {stored}.")

    def _float(self, path, like, text):
        if like is not dataclasses.MISSING and not isinstance(like, float):
            raise self._differs(path, text, like)
        return float.fromhex(text)

    def _scalar(self, path, like, place):
        array = self._arrays[place]
        return np.asarray(array)[()] if isinstance(array, np.ndarray) else array

    def _key(self, path, like, impl, place):
        data = self._arrays[place]
        return jax.random.wrap_key_data(data, impl=impl) if isinstance(data, Array) else data

    def _array(self, path, like, place):
        array = self._arrays[place]
        if like is dataclasses.MISSING:
            return array
        floats = lambda dtype: jnp.issubdtype(dtype, np.floating)
        same = eqx.is_array(like) and like.shape == array.shape
        # The precision is that of the file.
        if not same or not (like.dtype == array.dtype or (floats(like.dtype) and floats(array.dtype))):
            raise self._differs(path, f"an array {array.dtype}{list(array.shape)}", like)
        return array

    def _items(self, nodes, path, like):
        likes = [dataclasses.MISSING] * len(nodes)
        if like is not dataclasses.MISSING:
            if not isinstance(like, tuple | list) or len(like) != len(nodes):
                raise self._differs(path, f"a sequence of {len(nodes)}", like)
            likes = like
        return [
            self.decode(node, f"{path}[{i}]", each) for i, (node, each) in enumerate(zip(nodes, likes, strict=True))
        ]

    def _dict(self, path, like, entries):
        known = like is not dataclasses.MISSING
        if known and (not isinstance(like, dict) or set(like) != {key for key, _ in entries}):
            raise self._differs(path, f"a dict of {[key for key, _ in entries]}", like)
        child = lambda key: like[key] if known else dataclasses.MISSING
        return {key: self.decode(node, f"{path}[{key!r}]", child(key)) for key, node in entries}

    def _parameters(self, path, like, node, where, transforms):
        model = self.decode(node, "model", self._model)
        leaves, structure = jax.tree.flatten(model, is_leaf=lambda leaf: leaf is None)
        if len(leaves) != len(where) or not all(type(each) is bool for each in where):
            raise ValueError(f"a selection of {len(where)} among {len(leaves)} leaves")
        selected, rest = eqx.partition(model, jax.tree.unflatten(structure, where))
        return Parameters(selected, rest, self.decode(transforms, path))

    @property
    def _model(self) -> Any:
        return dataclasses.MISSING if self._code.model is None else self._code.model

    def _part(self, path, like, name, nodes):
        kind = _NAMED[name]
        if {field.name for field in dataclasses.fields(kind)} != set(nodes):
            raise ValueError(f"a {name} of {sorted(nodes)}")
        if kind is Problem and like is dataclasses.MISSING and self._code.problem is not None:
            like = self._code.problem
        values = {}
        for field, node in nodes.items():
            child = dataclasses.MISSING
            if kind is Fit and field == "model":
                child = self._model
            elif kind is Fit and field == "restarts" and node[1]:
                child = (self._model,) * len(node[1]) if self._code.model is not None else child
            elif kind in (ForeignFlow, Steps) and field == "args" and self._code.problem is not None:
                child = self._code.problem.data.args
            elif like is not dataclasses.MISSING:
                if type(like) is not kind:
                    raise self._differs(path, name, like)
                child = getattr(like, field)
            values[field] = self.decode(node, f"{path}.{field}", child)
        return _made(kind, values)

    def _numpyro(self, path, like, module, name, data, settings):
        kind = _class_of_numpyro(module, name)
        if kind is None:
            raise LaplodeError(
                f"{path} is {module}.{name}, which the installed NumPyro does not have. Install the version of NumPyro "
                "that the file was written with."
            )
        return kind.tree_unflatten(self.decode(settings, path), self.decode(data, path))  # pyright: ignore[reportAttributeAccessIssue]

    def _module(self, path, like, name, nodes):
        if not isinstance(like, eqx.Module) or type(like).__qualname__ != name:
            raise self._differs(path, name, like)
        fields = {field.name for field in dataclasses.fields(like) if hasattr(like, field.name)}
        if odd := sorted(fields ^ set(nodes)):
            stored = "there" if odd[0] in nodes else "no field"
            raise self._differs(f"{path}.{odd[0]}", stored, getattr(like, odd[0], None))
        children = {field: self.decode(node, f"{path}.{field}", getattr(like, field)) for field, node in nodes.items()}
        return _made(type(like), children)

    def _pytree(self, path, like, name, nodes):
        if like is dataclasses.MISSING or type(like).__qualname__ != name:
            raise self._differs(path, name, like)
        children, structure = _one_level(like)
        if len(children) != len(nodes):
            raise self._differs(path, f"{name} of {len(nodes)}", like)
        pairs = zip(nodes, children, strict=True)
        return jax.tree.unflatten(
            structure,
            [self.decode(node, f"{path}{jax.tree_util.keystr(key)}", each) for node, (key, each) in pairs],
        )

    def _code_of_like(self, path, like, text):
        if like is dataclasses.MISSING or text_of(like) != text:
            raise self._differs(path, text, like)
        return like


def _made(kind: type, values: dict[str, Any]) -> Any:
    """An object of these fields, as Equinox makes it from its leaves: without `__init__`, which would change them."""
    made = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made

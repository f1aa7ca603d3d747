"""A file of arrays under a header of JSON, checked before anything is made of it. Nothing in it is ever executed."""

import contextlib
import dataclasses
import glob
import hashlib
import importlib.metadata
import json
import math
import os
import re
import secrets
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._errors import LaplodeError, warn
from ._late import dist

Path = str | os.PathLike[str]


# ---- The file: a line with a checksum, a line of JSON, arrays


_FORMAT = 2


_FIRST_LINE = re.compile(rb"laplode file (\d{4}) ([0-9a-f]{64})\n")


def _first_line(digest: str) -> bytes:
    return f"laplode file {_FORMAT:04d} {digest}\n".encode()


def check_path(name: str, path: Any) -> str:
    """Return `path` as a string, with links followed, or say what is wrong with it."""
    if not isinstance(path, str | os.PathLike):
        raise LaplodeError(f"`{name}` must be a path, got {type(path).__name__}.")
    target = os.path.realpath(path)
    if os.path.isdir(target):
        raise LaplodeError(f"`{name}` must be a file, and {os.fspath(path)} is a folder.")
    if not os.path.isdir(os.path.dirname(target)):
        raise LaplodeError(f"`{name}` lies in a folder that does not exist: {os.path.dirname(target)}. Make it first.")
    return target


def write(path: Any, header: dict[str, Any], arrays: Sequence[Array | np.ndarray]) -> None:
    """Write `arrays` under a JSON `header`. The file at `path` is replaced when all is on the disk, or not at all."""
    target = check_path("path", path)
    forms = [["jax" if isinstance(x, Array) else "numpy", x.dtype.name, list(x.shape)] for x in arrays]
    text = json.dumps({"laplode": importlib.metadata.version("laplode"), **header, "arrays": forms})
    temporary = f"{target}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "x+b") as file:
            file.write(_first_line("0" * 64) + text.encode() + b"\n")
            eqx.tree_serialise_leaves(file, list(arrays))  # pyright: ignore[reportArgumentType]
            file.seek(0)
            file.readline()
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            file.write(_first_line(digest))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise LaplodeError(
            f"`path`: {os.fspath(path)} can't be written: {error}. What stood there before is as it was. Make room, or "
            "take another folder."
        ) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def read(path: Any, check: Callable[[dict[str, Any]], None]) -> tuple[dict[str, Any], list[Array | np.ndarray]]:
    """The header and the arrays of a file. `check` sees the header before the arrays are read.

    **Raises:** `LaplodeError` when it is no such file, of another format, incomplete or damaged, or `check` raises.
    """
    target, name = check_path("path", path), os.fspath(path)
    try:
        with open(target, "rb") as file, trusting_nothing(name):
            _check_intact(name, file)
            header = json.loads(file.readline())
            check(header)
            like = [_empty(*form) for form in header["arrays"]]
            if sum(each.size * each.dtype.itemsize for each in like) > os.fstat(file.fileno()).st_size - file.tell():
                raise ValueError("its arrays are longer than the file")
            return header, eqx.tree_deserialise_leaves(file, like)
    except OSError as error:
        raise LaplodeError(f"`path`: {name} can't be read: {error}.") from error


@contextlib.contextmanager
def trusting_nothing(path: Path) -> Iterator[None]:
    """Whatever a file made by hand can bring about is a `LaplodeError`."""
    try:
        yield
    except (LaplodeError, OSError):
        raise
    except Exception as error:
        raise LaplodeError(
            f"`path`: {os.fspath(path)} has the form of a file of laplode, but not its content "
            f"({type(error).__name__}: {error})."
        ) from error


def _check_intact(name: str, file: Any) -> None:
    """Leaves `file` at its second line."""
    first = file.read(len(_first_line("0" * 64)))
    if not first.startswith(b"laplode file "):
        raise LaplodeError(f"`path`: {name} is no file of laplode.save, nor a checkpoint of laplode.")
    found, damaged = _FIRST_LINE.fullmatch(first), "The copy was cut short or damaged: take another one."
    if first[13:17].isdigit() and int(first[13:17]) != _FORMAT:
        raise LaplodeError(
            f"`path`: {name} has format {int(first[13:17])}, and this laplode reads format {_FORMAT}. Install the "
            "version of laplode that wrote it, or save it again."
        )
    if found is None:
        raise LaplodeError(f"`path`: {name} is damaged in its first line. {damaged}")
    if hashlib.file_digest(file, "sha256").hexdigest() != found.group(2).decode():  # pyright: ignore[reportArgumentType]
        raise LaplodeError(f"`path`: {name} does not have the checksum that it was written with. {damaged}")
    file.seek(len(first))


def _empty(kind: str, dtype: str, shape: list[int]) -> Any:
    """An array of that form without memory of its own."""
    found = np.dtype(dtype)
    if kind not in ("jax", "numpy") or found.hasobject or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"an array of {kind}, {dtype}, {shape}")
    form = jax.ShapeDtypeStruct(tuple(shape), found)
    return form if kind == "jax" else np.broadcast_to(np.zeros((), form.dtype), form.shape)


# ---- Values as JSON, their arrays aside


def _with_fields() -> tuple[type, ...]:
    """Classes whose objects are known by their fields."""
    return eqx.Module, dist.Distribution, dist.transforms.Transform, dist.constraints.Constraint


# By the identity of an array, its place among the arrays of a file, and the array.
Arrays = dict[int, tuple[int, Array | np.ndarray]]


def encode(value: Any, path: str, arrays: Arrays) -> Any:
    """`value` as JSON: plain values as they are, all else as a list of what it is and what is in it.

    Its arrays are added to `arrays`, each once. Fields go by their names, and code by the text of `text_of`.
    """
    place = lambda array: arrays.setdefault(id(array), (len(arrays), array))[0]
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return ["key", str(jax.random.key_impl(value)), place(jax.random.key_data(value))]
    if isinstance(value, Array | np.ndarray | np.generic):
        if value.dtype.hasobject or value.dtype.names:
            raise LaplodeError(f"{path} is an array of {value.dtype}, which `save` does not write: make it numbers.")
        return ["scalar", place(np.asarray(value))] if isinstance(value, np.generic) else ["array", place(value)]
    if type(value) in (tuple, list):
        return [type(value).__name__, [encode(item, f"{path}[{i}]", arrays) for i, item in enumerate(value)]]
    if type(value) is dict and all(type(key) in (str, int) for key in value):
        return ["dict", [[key, encode(item, f"{path}[{key!r}]", arrays)] for key, item in value.items()]]
    kind = type(value)
    if isinstance(value, _with_fields()):
        nodes = {name: encode(item, f"{path}.{name}", arrays) for name, item in fields_of(value).items()}
        return ["object", origin(kind), kind.__qualname__, nodes]
    children, structure = one_level(value)
    if jax.tree_util.treedef_is_leaf(structure):
        return ["code", text_of(value)]
    return ["pytree", kind.__qualname__, [encode(item, f"{path}{key}", arrays) for key, item in children]]


def origin(kind: type) -> str:
    """Where `load` finds a class by its name: "laplode", or a module of NumPyro; "" if it is the user's to show."""
    if kind.__module__.startswith("laplode."):
        return "laplode"
    return kind.__module__ if kind.__module__.startswith("numpyro.distributions.") else ""


def class_of(where: str, name: str) -> type:
    """The class of that origin and name.

    **Raises:** `LaplodeError` when laplode and NumPyro have none.
    """
    kinds = [kind for base in _with_fields() for kind in _descendants(base)]
    found = [kind for kind in kinds if where and origin(kind) == where and kind.__qualname__ == name]
    if not found:
        raise LaplodeError(
            f"The file holds {where}.{name}, which the installed laplode and NumPyro don't have. Install the versions "
            "that it was written with."
        )
    return found[0]


def _descendants(kind: type) -> list[type]:
    return [found for each in kind.__subclasses__() for found in (each, *_descendants(each))]


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of an object of Equinox or NumPyro by name. NumPyro's own order is that of a set of strings."""
    if isinstance(value, eqx.Module):
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        return {name: getattr(value, name) for name in names}
    return {name: item for name, item in sorted(vars(value).items()) if not isinstance(item, weakref.ref)}


def one_level(value: Any) -> tuple[list[tuple[str, Any]], Any]:
    """The children of a pytree with their keys, and its structure."""
    children, structure = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda node: node is not value)
    return [(jax.tree_util.keystr(key), child) for key, child in children], structure


def text_of(value: Any) -> str:
    """A value that is code, or a setting beside code, as text that is the same in another process."""
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def fingerprint(value: Any) -> str:
    """A digest of what `save` would write of a value, the same in another process."""
    arrays: Arrays = {}
    digest = hashlib.sha256(json.dumps(encode(value, "value", arrays)).encode())
    for _, array in arrays.values():
        digest.update(f"{array.dtype} {array.shape}".encode() + np.asarray(array).tobytes())
    return digest.hexdigest()


# ---- Work that goes on after it was cut short


# A checkpoint takes at most one part of the time in so many.
_RARELY = 20


class Checkpoint:
    """A file with what a call of the function `of` has computed so far.

    `arguments` are all that the computation depends on, each under the names of the user's arguments that it comes
    from. What a process killed while writing left beside the file is removed.
    """

    def __init__(self, path: Any, of: str, arguments: dict[str, Any]):
        target = check_path("checkpoint", path)
        for part in glob.glob(glob.escape(target) + ".*.tmp"):
            if re.fullmatch(r"\.[0-9a-f]{8}\.tmp", part[len(target) :]):
                os.remove(part)
        self._path, self._holds, self._of = target, f"a checkpoint of {of}", of
        self._arguments = {names: fingerprint(value) for names, value in arguments.items()}
        self._due = -math.inf

    def write(self, state: dict[str, Any], arrays: Sequence[Array | np.ndarray], *, always: bool = True) -> None:
        """Replace the file as a whole; warn where it can't be written.

        Unless `always`, only if the last one is long ago beside the time that it took.
        """
        start = time.monotonic()
        if start < self._due and not always:
            return
        try:
            write(self._path, {"holds": self._holds, "state": state, "arguments": self._arguments}, arrays)
        except LaplodeError as error:  # a full disk is no reason to lose the work itself
            warn(f"`{self._of}` goes on without a new checkpoint. {error}", level=4)
        end = time.monotonic()
        self._due = end + _RARELY * (end - start)

    def read(self) -> tuple[dict[str, Any], list[Array | np.ndarray]] | None:
        """The state and the arrays that `write` wrote; None where there is no file.

        **Raises:** `LaplodeError` when the file is damaged, or of another function or other arguments.
        """
        if not os.path.exists(self._path):
            return None
        header, arrays = read(self._path, self._check)
        return header["state"], arrays

    def _check(self, header: dict[str, Any]) -> None:
        if header["holds"] != self._holds:
            raise LaplodeError(f"`checkpoint`: {self._path} holds {header['holds']}. Take another path.")
        found = header["arguments"]
        if other := [names for names, digest in self._arguments.items() if found.get(names) != digest]:
            raise LaplodeError(
                f"`checkpoint`: {self._path} is of a call of `{self._of}` with other arguments: {', '.join(other)}. "
                "Call it as before to go on with it; to begin anew, remove the file or take another path."
            )

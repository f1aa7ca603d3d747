"""A file of arrays under a header that is checked before anything is made of it. Nothing in it is ever executed."""

import glob
import hashlib
import importlib.metadata
import json
import os
import re
import secrets
import warnings
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._errors import LaplodeError, LaplodeWarning

Path = str | os.PathLike[str]


_FORMAT = 1


_MAGIC = b"laplode file "


# Format, bytes of the header, bytes of the file, and SHA-256 of header and body.
_PRELUDE = re.compile(_MAGIC + rb"(\d{4}) (\d{12}) (\d{16}) ([0-9a-f]{64})\n")


_PRELUDE_BYTES = len(_MAGIC) + 5 + 13 + 17 + 65


def _prelude(header_bytes: int, total_bytes: int, digest: str) -> bytes:
    return _MAGIC + f"{_FORMAT:04d} {header_bytes:012d} {total_bytes:016d} {digest}\n".encode()


class _Hashed:
    """A file that takes the digest of what is written to it."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)


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


def write(path: Path, header: dict[str, Any], arrays: Sequence[Array | np.ndarray]) -> None:
    """Write `arrays` under a JSON `header`. The file at `path` is replaced when all is on the disk, or not at all."""
    target = check_path("path", path)
    description = {
        "laplode": _version(),
        **header,
        "arrays": [["jax" if isinstance(x, Array) else "numpy", x.dtype.name, list(x.shape)] for x in arrays],
    }
    text = json.dumps(description).encode()
    temporary = f"{target}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(_prelude(0, 0, "0" * 64))
            hashed = _Hashed(file)
            hashed.write(text)
            eqx.tree_serialise_leaves(hashed, list(arrays))  # pyright: ignore[reportArgumentType]
            total = file.tell()
            file.seek(0)
            file.write(_prelude(len(text), total, hashed.digest.hexdigest()))
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


def read(
    path: Path, check: Callable[[dict[str, Any], list[jax.ShapeDtypeStruct]], None]
) -> tuple[dict[str, Any], list[Array | np.ndarray]]:
    """The header and arrays of a file. `check` sees the header and the forms of the arrays before these are read.

    **Raises:** `LaplodeError` when it is no such file, of a newer format, incomplete or damaged, or `check` raises.
    """
    target = check_path("path", path)
    name = os.fspath(path)
    try:
        with open(target, "rb") as file:
            header_bytes = _intact(name, file)
            header = json.loads(file.read(header_bytes))
            forms = [_form(*entry) for entry in header["arrays"]]
            left = os.fstat(file.fileno()).st_size - file.tell()
            if sum(form.size * form.dtype.itemsize for _, form in forms) > left:
                raise ValueError("its arrays are longer than the file")
            _check_x64(name, [form for kind, form in forms if kind == "jax"])
            check(header, [form for _, form in forms])
            like = [form if kind == "jax" else _empty(form) for kind, form in forms]
            return header, eqx.tree_deserialise_leaves(file, like)
    except LaplodeError:
        raise
    except OSError as error:
        raise LaplodeError(f"`path`: {name} can't be read: {error}.") from error
    except Exception as error:  # whatever a file made by hand can bring about
        raise LaplodeError(
            f"`path`: {name} has the form of a file of laplode, but not its content ({type(error).__name__}: {error})."
        ) from error


def _version() -> str:
    try:
        return importlib.metadata.version("laplode")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _intact(name: str, file: BinaryIO) -> int:
    """The number of bytes of the header, at which the file stands afterwards."""
    prelude = file.read(_PRELUDE_BYTES)
    if not prelude.startswith(_MAGIC):
        raise LaplodeError(f"`path`: {name} is no file of laplode.save, nor a checkpoint of laplode.")
    found = _PRELUDE.fullmatch(prelude)
    damaged = "The copy was cut short or damaged: take another one."
    if found is None:
        raise LaplodeError(f"`path`: {name} is damaged in its first line. {damaged}")
    version, header_bytes, total = (int(number) for number in found.groups()[:3])
    if version != _FORMAT:
        raise LaplodeError(
            f"`path`: {name} has format {version}, and laplode {_version()} reads format {_FORMAT}. Install a newer "
            "laplode, or save it again."
        )
    size = os.fstat(file.fileno()).st_size
    if size != total:
        raise LaplodeError(f"`path`: {name} has {size} bytes and should have {total}. {damaged}")
    digest = hashlib.sha256()
    while piece := file.read(2**20):
        digest.update(piece)
    if digest.hexdigest() != found.group(4).decode() or header_bytes > total:
        raise LaplodeError(f"`path`: {name} does not have the checksum it was written with. {damaged}")
    file.seek(_PRELUDE_BYTES)
    return header_bytes


def _form(kind: str, dtype: str, shape: list[int]) -> tuple[str, jax.ShapeDtypeStruct]:
    found = np.dtype(dtype)
    if kind not in ("jax", "numpy") or found.hasobject or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"an array of {kind}, {dtype}, {shape}")
    return kind, jax.ShapeDtypeStruct(tuple(shape), found)


def _empty(form: jax.ShapeDtypeStruct) -> np.ndarray:
    """A NumPy array of that form without memory of its own."""
    return np.broadcast_to(np.zeros((), form.dtype), form.shape)


def _check_x64(name: str, forms: list[jax.ShapeDtypeStruct]) -> None:
    for form in forms:
        if jax.dtypes.canonicalize_dtype(form.dtype) != form.dtype:
            raise LaplodeError(
                f"`path`: {name} holds {form.dtype} arrays of JAX, which 64-bit JAX alone can hold: call "
                'jax.config.update("jax_enable_x64", True) first.'
            )


def text_of(value: Any) -> str:
    """A value that is code, or a setting beside code, as text that is the same in another process."""
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def fingerprint(tree: Any) -> str:
    """A digest of the structure and the leaves of a pytree, the same in another process."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode())
        if eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if eqx.is_array(leaf) or isinstance(leaf, np.generic | bool | int | float | complex):
            array = np.asarray(leaf)
            digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
        else:
            digest.update(text_of(leaf).encode())
    return digest.hexdigest()


class Checkpoint:
    """The file of a call of the function `of` with these arguments.

    `arguments` are digests of all that the computation depends on; `names` says to which of the user's arguments each
    of them belongs. What a process killed while writing left beside the file is removed.
    """

    def __init__(self, path: Path, of: str, arguments: dict[str, str], names: dict[str, str]):
        target = check_path("checkpoint", path)
        for part in glob.glob(glob.escape(target) + ".*.tmp"):
            if re.fullmatch(r"\.[0-9a-f]{8}\.tmp", part[len(target) :]):
                os.remove(part)
        self._path = path
        self._of = of
        self._arguments = arguments
        self._names = names
        self.exists = os.path.exists(target)

    def write(self, state: dict[str, Any], arrays: Sequence[Array | np.ndarray]) -> None:
        """Replace the file as a whole; warn where it can't be written."""
        header = {"holds": f"a checkpoint of {self._of}", **state, "arguments": self._arguments}
        try:
            write(self._path, header, arrays)
        except LaplodeError as error:  # a full disk is no reason to lose the work itself
            warnings.warn(f"`{self._of}` goes on without a new checkpoint. {error}", LaplodeWarning, stacklevel=4)

    def read(
        self, expected: Callable[[dict[str, Any]], Sequence[tuple[tuple[int, ...], Any]]]
    ) -> tuple[dict[str, Any], list[Array | np.ndarray]]:
        """The state and the arrays that `write` wrote; `expected` are the shapes and dtypes that go with a state.

        **Raises:** `LaplodeError` when the file is damaged, or of another function or other arguments.
        """

        def check(header: dict[str, Any], forms: list[jax.ShapeDtypeStruct]) -> None:
            if header["holds"] != f"a checkpoint of {self._of}":
                raise LaplodeError(f"`checkpoint`: {self._path} holds {header['holds']}. Take another path.")
            found = header["arguments"]
            if other := [self._names[name] for name, digest in self._arguments.items() if found[name] != digest]:
                raise LaplodeError(
                    f"`checkpoint`: {self._path} is of a call of `{self._of}` with other arguments: "
                    f"{', '.join(other)}. Call it as before to go on with it; to begin anew, remove the file or take "
                    "another path."
                )
            if list(expected(header)) != [(form.shape, form.dtype) for form in forms]:
                raise LaplodeError(f"`checkpoint`: {self._path} holds arrays of other shapes. Remove it.")

        return read(self._path, check)

"""A file that a long computation goes on from after a break, to the same bits."""

import glob
import os
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from ._errors import LaplodeError, LaplodeWarning
from ._file import Path, check_path, read, write


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

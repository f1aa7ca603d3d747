"""What laplode raises and warns with."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any


class LaplodeError(ValueError):
    """Something laplode was given, or met on the way, that it can't answer honestly.

    The message names the argument, says what was wrong, and what to do about it.
    """


class FitError(LaplodeError):
    """A fit that can't go on. `.fit` holds the best that was found before, or None."""

    def __init__(self, message: str, fit: Any):
        super().__init__(message)
        self.fit = fit


class LaplodeWarning(UserWarning):
    """The answer stands, but something about it deserves the reader's attention."""


def warn(message: str, level: int = 2) -> None:
    """Warn on behalf of a caller: with level 2 of whoever called the function that warns."""
    warnings.warn(message, LaplodeWarning, stacklevel=level + 1)


def choose(name: str, option: Any, options: dict[str, Any]) -> Any:
    """The value of a string option, or an error that names the valid ones."""
    if not isinstance(option, str) or option not in options:
        valid = ", ".join(f'"{known}"' for known in options)
        raise LaplodeError(f"`{name}` must be one of {valid}; got {option!r}.")
    return options[option]


def strategy(name: str, given: Any, kind: type, options: Mapping[str, Callable[[], Any]]) -> Any:
    """A strategy that was given as an object of its `kind`, or as the string that stands for it with its defaults."""
    if isinstance(given, kind):
        return given
    if not isinstance(given, str) or given not in options:
        valid = ", ".join(f'"{known}"' for known in options)
        objects = ", ".join(f"{make.__name__}()" for make in options.values())
        raise LaplodeError(f"`{name}` must be one of {valid}, or of the objects {objects}; got {given!r}.")
    return options[given]()

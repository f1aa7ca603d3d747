"""What laplode raises and warns with."""

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

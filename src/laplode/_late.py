"""Libraries that take long to import and that not every session needs: each is imported when it is first used.

Annotations with their names are written as strings, so that a definition alone does not use them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpyro.distributions as dist
    import pandas as pd
else:

    class _Late:
        """A module, imported at the first access to one of its attributes."""

        def __init__(self, name: str):
            self._name = name

        def __getattr__(self, attribute: str):
            return getattr(import_module(self._name), attribute)

    dist, pd = _Late("numpyro.distributions"), _Late("pandas")

__all__ = ["dist", "pd"]

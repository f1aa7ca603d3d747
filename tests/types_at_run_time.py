"""Types and shapes checked in every call, by beartype and jaxtyping.

What users call answers wrong input itself, as other tests look at: there the arguments are left to it.
"""

import re
from pathlib import Path

from beartype import BeartypeConf, beartype

FACE = Path(__file__).parents[1] / "src" / "laplode" / "__init__.py"
PUBLIC = set(re.findall(r"\w+ as (\w+)", FACE.read_text()))
# Made by laplode itself, not by users.
RESULTS = {
    "CurvatureProducts",
    "Diagnostics",
    "Estimate",
    "Evidence",
    "Fit",
    "FunctionPredictions",
    "Hyperparameters",
    "MatchedLoss",
    "Posterior",
    "Predictions",
    "Profile",
}


def checked(function):
    """What the import hook makes of each function of laplode."""
    owner, _, method = function.__qualname__.partition(".")
    made_by_users = method.startswith("__") and owner not in RESULTS
    if owner in PUBLIC and (not method.startswith("_") or made_by_users):
        return function
    return beartype(function, conf=BeartypeConf(is_pep484_tower=True))

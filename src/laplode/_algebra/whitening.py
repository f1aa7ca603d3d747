"""Coordinates in which a prior is a standard normal."""

from typing import Any

import numpy as np
from jaxtyping import Float

from .._devices import free_bytes
from .._errors import LaplodeError


def whitening(local: Any) -> Float[np.ndarray, "P P"]:
    """T with T Tᵀ the covariance of a local prior: the one nearest to a diagonal matrix.

    **Raises:** `LaplodeError` when such a matrix does not fit in memory.
    """
    precision, rows = np.asarray(local.precision), np.asarray(local.rows)
    needed = 5 * 8 * precision.size**2
    if needed > free_bytes():
        raise LaplodeError(
            "`posterior` has a prior in which parameters depend on one another: its directions would take "
            f"{needed / 2**30:.1f} GiB. Infer fewer parameters, by `where`."
        )
    inverse = np.diag(precision) + rows.T @ rows
    scale = np.sqrt(np.diagonal(inverse))
    values, vectors = np.linalg.eigh(inverse / scale / scale[:, None])
    return (vectors / np.sqrt(values)) @ vectors.T / scale[:, None]

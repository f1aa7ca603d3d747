"""A table of parameters by name."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._late import pd
from .._model.parameters import Parameters


def summary_table(view: Parameters, mean: Float[Array, " P"], std: Float[Array, " P"], prob: float) -> "pd.DataFrame":
    """Mean, standard deviation and central interval of each parameter as the model knows it, by its name.

    The marginals are Normal(mean, std²) in unconstrained coordinates. Quantiles go through the transformation of a
    parameter as they are, and moments by Gauss-Hermite quadrature, exact where there is no transformation.
    """
    from scipy.special import ndtri

    nodes, weights = np.polynomial.hermite_e.hermegauss(61)
    weights = weights / np.sum(weights)
    tail = float(ndtri((1 + prob) / 2))
    points = np.concatenate([nodes, [-tail, tail]])
    known = lambda point: _flat(view.constrained(view.with_vector(mean + point * std)))
    values = np.asarray(jax.lax.map(known, jnp.asarray(points)))
    moments, (low, high) = values[:-2], np.sort(values[-2:], axis=0)
    # About the central value, so that a narrow marginal far from zero keeps its digits.
    center = moments[30]
    first = weights @ (moments - center)
    with np.errstate(over="ignore"):
        second = weights @ (moments - center) ** 2
    edges = [f"eti_{100 * p:g}%" for p in ((1 - prob) / 2, (1 + prob) / 2)]
    columns = ["mean", "sd", *edges]
    with np.errstate(invalid="ignore"):  # moments of a wide lognormal may be infinite
        spread = np.where(np.isfinite(first), np.sqrt(np.maximum(second - first**2, 0)), np.inf)
    rows = np.stack([center + first, spread, low, high], axis=1)
    return pd.DataFrame(rows, index=pd.Index([view.name(i) for i in range(view.size)]), columns=pd.Index(columns))


def _flat(selected) -> Float[Array, " P"]:
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(selected)])

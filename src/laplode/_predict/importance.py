"""Importance weights, and how far to trust them."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

# Fewer draws than these have no tail to which a Pareto distribution could be fitted.
_FEWEST_TO_SMOOTH = 25


def importance_weights(log_p: Float[Array, " S"], log_q: Float[Array, " S"]) -> tuple[Float[Array, " S"], float]:
    """Pareto smoothed log weights of draws from q under p, normalized to sum to 1, and their Pareto k̂.

    A draw whose solve failed has weight 0: it is known to be no trajectory of the model. Of fewer than 25 draws the
    weights are not smoothed, and k̂ is infinite.
    """
    ratios = np.asarray(log_p - log_q, dtype=float)
    finite = np.isfinite(ratios)
    weights = np.full(ratios.shape, -np.inf)
    if np.sum(finite) < _FEWEST_TO_SMOOTH:
        weights[finite] = ratios[finite] - np.logaddexp.reduce(ratios[finite], initial=-np.inf)
        return jnp.asarray(weights), float("inf")
    # Weights equal to rounding have no tail to fit: they are as good as they can be.
    if np.ptp(ratios[finite]) < 1e-6:
        weights[finite] = -np.log(np.sum(finite))
        return jnp.asarray(weights), float("-inf")
    with np.errstate(all="ignore"):
        from arviz_stats.base.array import array_stats  # takes a second

        smoothed, khat = array_stats.psislw(-ratios[finite])  # it takes the log-likelihoods of leave-one-out
    # Where all weight is on a few draws, what is left of the others is zero to rounding, and no tail can be fitted.
    if not np.all(np.isfinite(smoothed)) or np.isnan(khat):
        smoothed, khat = ratios[finite], float("inf")
    # Of a tail of index k the largest of S weights is about S^k times the mean. Where it is far less, what was fitted
    # is no tail, but the edge of a crowd of nearly equal weights.
    num = int(np.sum(finite))
    largest = (np.max(ratios[finite]) - np.logaddexp.reduce(ratios[finite]) + np.log(num)) / np.log(num)
    if khat > largest and largest < khat_threshold(num) / 2:
        smoothed, khat = ratios[finite], largest
    weights[finite] = smoothed - np.logaddexp.reduce(smoothed)
    return jnp.asarray(weights), float(khat)


def khat_threshold(num_samples: int) -> float:
    """The k̂ above which S importance weights cannot be trusted: min(1 − 1/log10(S), 0.7)."""
    return min(1 - 1 / np.log10(max(num_samples, 2)), 0.7)


def resampled(log_weights: Float[Array, " S"], key: PRNGKeyArray) -> Array:
    """Indices of as many draws, by systematic resampling: each as often as its weight says, give or take one.

    Copies stand beside each other, so that an effective sample size sees them.
    """
    num = len(log_weights)
    total = jnp.cumsum(jnp.exp(log_weights))
    marks = (jnp.arange(num) + jax.random.uniform(key)) / num * total[-1]
    return jnp.searchsorted(total, marks, side="right")

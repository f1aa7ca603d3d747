"""The step to the minimum of a quadratic within a radius, and how much it may be bent."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# A step is bent by at most this part of its length (Transtrum and Sethna, 2012).
MOST_BENT = 0.75


def bent(step: Float[Array, " P"], acceleration: Float[Array, " P"], metric: Float[Array, " P"] | float):
    """A step bent by its geodesic acceleration, and the length of that beside its own, in units of 1/metric."""
    length = jnp.linalg.norm(metric * step) + jnp.finfo(float).tiny
    return step + 0.5 * acceleration, jnp.linalg.norm(metric * acceleration) / length


def within(
    eigenvalues: Float[np.ndarray, " P"], gradient: Float[np.ndarray, " P"], radius: float
) -> tuple[Float[np.ndarray, " P"], float]:
    """The step no longer than `radius` to the minimum of gᵀx + ½ xᵀ diag(λ) x, and the decrease that it promises.

    The eigenvalues λ rise, and the first may be negative. Moré and Sorensen (1983), "Computing a trust region step".
    """
    lowest = eigenvalues[0]
    along = lambda shift: -gradient / (eigenvalues + shift)
    length = lambda shift: float(np.linalg.norm(along(shift)))
    least = max(0.0, -lowest) + 1e-12 * max(abs(lowest), abs(eigenvalues[-1]))
    if lowest > 0 and length(0.0) <= radius:
        step = along(0.0)
    elif length(least) <= radius:  # the gradient has no part along the negative curvature: go there all the same
        step = along(least)
        step[0] += math.copysign(math.sqrt(max(radius**2 - length(least) ** 2, 0)), -gradient[0])
    else:
        low, high = least, least + float(np.linalg.norm(gradient)) / radius
        for _ in range(100):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if length(middle) > radius else (low, middle)
        step = along(high)
    return step, -float(gradient @ step + 0.5 * np.sum(eigenvalues * step**2))

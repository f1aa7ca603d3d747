"""Parameters whose optimum lies at the edge of their support, where a transformation alone keeps them inside."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._late import dist
from .._model.parameters import Parameters

# The data must have more than this part in the precision of a parameter: of others it is the prior that decides.
_FROM_DATA = 0.5


def at_edge(view: Parameters, variance: Float[Array, " P"], prior_precision: Float[Array, " P"]) -> tuple[str, ...]:
    """The names of parameters that data and prior would have at the edge of their support or beyond.

    In unconstrained coordinates u the density has the volume element dθ/du as a factor, which falls to 0 at an edge, so
    that there is always an optimum inside. At that optimum the gradient of −log p(Y | θ) − log p(θ) in the user's own
    coordinate θ(u) is that of log dθ/du, and a Newton step by it shows where the optimum lies without the factor.

    **Arguments:**

    - `view`: the parameters at the optimum.
    - `variance`: of the posterior, in unconstrained coordinates.
    - `prior_precision`: there.
    """
    informed = np.asarray(variance * prior_precision) < 1 - _FROM_DATA
    found = np.zeros(view.size, bool)
    for (_, shape, start, stop), transform in zip(view.leaves, view.transforms, strict=True):
        if transform is not None:
            mean, own = (x[start:stop].reshape(shape) for x in (view.vector, variance))
            found[start:stop] = np.ravel(_leaves_support(transform, mean, own)) & informed[start:stop]
    return view.names(np.flatnonzero(found))


@eqx.filter_jit
def _leaves_support(
    transform: "dist.transforms.Transform", mean: Float[Array, "*shape"], variance: Float[Array, "*shape"]
) -> Bool[Array, "*shape"]:
    """Whether a Newton step in the coordinate θ(u), without the volume element, would leave the support."""
    along = lambda function: lambda u: jax.jvp(function, (u,), (jnp.ones_like(u),))[1]
    slope = along(transform)
    volume = lambda u: jnp.log(jnp.abs(slope(u)))
    gradient = along(volume)(mean)
    # Of −log p in u without the factor; in θ the second derivative has a term of the first.
    curvature = 1 / variance + along(along(volume))(mean)
    curvature = curvature - gradient * along(slope)(mean) / slope(mean)
    step = -gradient * slope(mean) / curvature
    inside = jnp.isfinite(transform.inv(transform(mean) + step))
    return (curvature <= 0) | ~inside

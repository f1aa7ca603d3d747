"""Parameters that derivatives do not see, although their values matter."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from .._errors import LaplodeError, warn
from .._problem.problem import Problem
from .flows import AbstractFlow
from .objective import value_and_gradient

# How far a leaf is moved to see whether its values matter, as a part of its largest entry.
_MOVE = 0.01


def check_influence(slopes: ArrayLike) -> None:
    """Raise `LaplodeError` where derivatives by all parameters are exactly 0."""
    if not np.any(slopes):
        raise LaplodeError(
            "No parameter of `model` has any influence on its predictions: the derivatives are exactly zero. Somewhere "
            "the parameters that are differentiated are not those that are used, as with eqx.combine(template, "
            "params), which keeps the template's leaves: write eqx.combine(params, template). jax.lax.stop_gradient "
            "and rounding to integers do the same."
        )


def unfrozen(around: AbstractFlow, problem: Problem, gradient: Float[Array, " P"] | None = None) -> AbstractFlow:
    """The flow without the leaves that are frozen, which stay as they are.

    A leaf is frozen where the derivative by each of its entries is exactly 0 and another value gives other predictions,
    as `jax.lax.stop_gradient` has it. A prior would still pull at such a leaf, and data would never hold it.

    **Arguments:**

    - `around`: the flow of all parameters.
    - `problem`: the data.
    - `gradient`: of −log p(Y | θ), or anything else that is 0 where the derivative of all predictions is, if known.

    **Returns:** the flow of the parameters that are left; the same, if none is frozen or all are. Warns
    (`LaplodeWarning`) with the names of frozen leaves.
    """
    view = around.parameters
    if gradient is None:
        gradient = value_and_gradient(around, problem)[1]
    slope = np.asarray(gradient)
    still = [leaf for leaf in view.leaves if not np.any(slope[leaf[2] : leaf[3]])]
    # The gradient is 0 at a perfect fit as well, so a frozen leaf is one for which it is 0 at another value too.
    frozen = tuple(name for name, _, start, stop in still if _is_frozen(around, problem, slice(start, stop)))
    if not frozen or len(frozen) == len(view.leaves):
        return around
    warn(
        f"Parameters frozen by stop_gradient: {', '.join(frozen)}. Their values matter and their derivatives are "
        "exactly 0, so they are kept as they are, without uncertainty. (A jump whose place depends on a parameter has "
        "no derivative either.)",
        level=3,
    )
    return eqx.tree_at(lambda f: f.parameters, around, view.without(frozen))


def _is_frozen(around: AbstractFlow, problem: Problem, place: slice) -> bool:
    theta = around.parameters.vector
    size = jnp.max(jnp.abs(theta[place]))
    pattern = 1 + jnp.arange(place.stop - place.start) % 3  # no symmetry of a layer survives unequal moves
    moved = theta.at[place].add(_MOVE * jnp.where(size > 0, size, 1) * pattern)
    value, _ = value_and_gradient(around, problem)
    other, slope = value_and_gradient(around.at(moved), problem)
    return not np.any(np.asarray(slope)[place]) and bool(np.isfinite(other)) and float(other) != float(value)

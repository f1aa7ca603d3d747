"""What is known of the parameters before the data."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, PyTree

from .._checks import check_positive, real_array
from .._errors import LaplodeError


class AbstractPrior(eqx.Module):
    """p(θ)."""


class GaussianPrior(AbstractPrior):
    """θ ~ Normal(mean, 1 / precision), independent over parameters.

    **Arguments:**

    - `precision`: a positive scalar; a pytree prefix of the model (one value per layer, say); or one value per
        parameter, as an array of shape (P,). An L2 penalty (λ/2)‖θ‖² on the summed negative log-likelihood is a
        precision of λ.
    - `mean`: in the same three forms; zero by default.

    **Raises:** `LaplodeError` when a precision is not positive and finite.
    """

    precision: PyTree
    mean: PyTree

    def __init__(self, precision: PyTree, mean: PyTree = 0.0):
        def finite(name, leaf):
            array = real_array(name, leaf)
            if not np.all(np.isfinite(array)):
                raise LaplodeError(f"`{name}` must be finite, got {leaf}.")
            return array

        def each(check, name, tree):
            if not jax.tree.leaves(tree):
                raise LaplodeError(f"`{name}` of the prior is missing: it must be a number, an array, or a pytree.")
            # Arrays, not Python floats: with these, each new value would be compiled anew.
            return jax.tree_util.tree_map_with_path(lambda p, x: check(name + jax.tree_util.keystr(p), x), tree)

        self.precision = each(check_positive, "precision", precision)
        self.mean = each(finite, "mean", mean)


class NamedPriors(AbstractPrior):
    """Distributions of parameters by name, and a Gaussian for the rest.

    Where a distribution lives on a part of the numbers (a rate is positive, a fraction lies between 0 and 1), its
    parameter enters θ in NumPyro's unconstrained coordinate, such as its logarithm: there the posterior is taken to be
    Gaussian, with the Jacobian of the transformation in its density.

    ```python
    laplode.NamedPriors({"vector_field.rate": dist.LogNormal(-0.5, 0.5), "scale": dist.HalfNormal(1.0)}, rest=1.0)
    ```

    **Arguments:**

    - `named`: path of a leaf of the model, or of a part of it, such as `vector_field.rate` or
        `vector_field.rates[0]`, → NumPyro distribution of its numbers one by one, of a batch shape that fits the
        leaf's. `posterior.parameters.leaves` lists the paths.
    - `rest`: a `GaussianPrior`, or its precision, for all other parameters.

    **Raises:** `LaplodeError` when a distribution is not one of single real numbers.
    """

    named: dict[str, dist.Distribution]
    rest: GaussianPrior | None

    def __init__(self, named: Mapping[str, dist.Distribution], rest: Any = None):
        if not isinstance(named, Mapping) or not named:
            raise LaplodeError(
                '`named` must map paths of leaves to NumPyro distributions, as in {"vector_field.rate": '
                f"dist.LogNormal(0, 1)}}; got {named!r}."
            )
        for name, each in named.items():
            if not isinstance(name, str) or not isinstance(each, dist.Distribution):
                raise LaplodeError(
                    f"`named`[{name!r}] must be the NumPyro distribution of the leaf of that path, got "
                    f"{type(each).__name__}."
                )
            if each.event_shape or each.is_discrete:
                raise LaplodeError(
                    f"`named`[{name!r}] must be a distribution of real numbers one by one, but it is "
                    + ("discrete." if each.is_discrete else f"of arrays of shape {each.event_shape}.")
                )
        if rest is not None and not isinstance(rest, GaussianPrior):
            rest = GaussianPrior(rest)
        # Arrays, not Python floats: with these, each new value would be compiled anew.
        as_array = lambda x: jnp.asarray(x, dtype=float) if isinstance(x, float | int) else x
        self.named = {name: jax.tree.map(as_array, each) for name, each in named.items()}
        self.rest = rest


class PosteriorPrior(AbstractPrior):
    """θ ~ Normal(mean, Λ⁻¹) with Λ = diag(precision) + rowsᵀ rows: what was learned from data before.

    Made by `posterior.as_prior()`. `log_det` is log det Λ, `leaves` are names and shapes of the model's arrays in the
    order of θ, and `coordinates` are the priors that those data had, which say where θ is unconstrained.
    """

    mean: Float[Array, " P"]
    precision: Float[Array, " P"]
    rows: Float[Array, "R P"]
    log_det: Float[Array, ""]
    leaves: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True)
    coordinates: NamedPriors | None

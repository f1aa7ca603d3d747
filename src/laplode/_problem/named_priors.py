"""Distributions of parameters by their names."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._errors import LaplodeError
from .._late import dist
from .prior import AbstractPrior, GaussianPrior, LocalPrior, is_at, log_normal


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

    named: "dict[str, dist.Distribution]"
    rest: GaussianPrior | None

    def __init__(self, named: "Mapping[str, dist.Distribution]", rest: Any = None):
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
            if isinstance(each, dist.Delta):
                raise LaplodeError(
                    f"`named`[{name!r}] is a Delta, which has no width: hold the parameter with `where`, or write it "
                    "as a number in the model."
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

    @property
    def coordinates(self):
        """Itself: each named distribution says on which numbers its parameter lives."""
        return self

    def distribution_of(self, name):
        return next((each for path, each in self.named.items() if is_at(name, path)), None)

    def transform_of(self, name, values):
        prior = self.distribution_of(name)
        if prior is None:
            return None
        try:
            fits = jnp.broadcast_shapes(prior.batch_shape, values.shape) == values.shape
        except ValueError:
            fits = False
        if not fits:
            raise LaplodeError(
                f"The prior of {name} has batch shape {prior.batch_shape}, which does not fit the parameter's shape "
                f"{values.shape}."
            )
        transform = dist.biject_to(prior.support)
        free = transform.inv(values)  # pyright: ignore[reportAttributeAccessIssue]
        if not np.all(np.isfinite(free)) or not np.all(np.isfinite(prior.log_prob(values))):
            raise LaplodeError(
                f"`model` has {name} = {np.asarray(values)}, at which its prior, {type(prior).__name__}, has no "
                "density: start from values inside of its support."
            )
        return None if isinstance(transform, dist.transforms.IdentityTransform) else transform

    def check(self, view):
        names = view.names_in_model
        for path in self.named:
            if not any(is_at(name, path) for name in names):
                raise LaplodeError(
                    f"`named`[{path!r}] of the prior is no parameter of the model. Its parameters are: "
                    f"{', '.join(names)}."
                )
        for name in names:
            paths = [path for path in self.named if is_at(name, path)]
            if len(paths) > 1:
                raise LaplodeError(f"`named` of the prior has {name} twice, as {' and as '.join(paths)}.")
        unnamed = np.flatnonzero(~self._is_named(view))
        if self.rest is not None:
            self.rest.check(view)
        elif unnamed.size:
            raise LaplodeError(
                f"`rest` of the prior is missing, and it says nothing of {', '.join(view.names(unnamed)[:5])}: give "
                "NamedPriors(named, rest=precision) for all that is not named."
            )

    def _each(
        self, view: Any
    ) -> Iterator["tuple[dist.Distribution, dist.transforms.Transform | None, tuple[int, ...], slice]"]:
        """Of each leaf with a distribution of its own: that, its transform, its shape, its place in θ."""
        for (name, shape, start, stop), transform in zip(view.leaves, view.transforms, strict=True):
            if (found := self.distribution_of(name)) is not None:
                yield found, transform, shape, slice(start, stop)

    def _is_named(self, view: Any) -> Bool[np.ndarray, " P"]:
        named = np.zeros(view.size, bool)
        for *_, place in self._each(view):
            named[place] = True
        return named

    def _spread(self, view: Any) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
        """Mean and precision of the rest; 0 and 1 where all have distributions of their own."""
        return (jnp.zeros(view.size), jnp.ones(view.size)) if self.rest is None else self.rest.spread(view)

    @eqx.filter_jit
    def local(self, view, linear=None):
        (mean, precision), theta = self._spread(view), view.vector
        gradient, deficit = precision * (theta - mean), jnp.zeros_like(theta)
        for each, transform, shape, place in self._each(view):
            free = theta[place]
            slope, bend = _derivatives(each, transform, free.reshape(shape))
            # Where the density bends upward, or is flat, the metric is on the scale on which it changes.
            scale = slope**2 + jnp.abs(bend)
            scale = jnp.where(scale > 0, scale, jnp.where(free == 0, 1, 1 / jnp.where(free == 0, 1, free) ** 2))
            metric = jnp.where(bend < 0, -bend, scale)
            gradient = gradient.at[place].set(-slope)
            precision = precision.at[place].set(metric)
            deficit = deficit.at[place].set(metric + bend)
        return LocalPrior(self.log_density(view, theta), gradient, precision, deficit, jnp.zeros((0, theta.size)))

    @eqx.filter_jit
    def log_density(self, view, theta):
        terms = jnp.where(self._is_named(view), 0, log_normal(theta, *self._spread(view)))
        total = jnp.sum(terms, axis=-1)
        for each, transform, shape, place in self._each(view):
            values = _density(each, transform)(theta[..., place].reshape(*theta.shape[:-1], *shape))
            total += jnp.sum(values.reshape(*theta.shape[:-1], -1), axis=-1)
        return total

    @eqx.filter_jit
    def sample(self, view, key, n):
        mean, precision = self._spread(view)
        draws = mean + jax.random.normal(key, (n, view.size)) / jnp.sqrt(precision)
        for i, (each, transform, shape, place) in enumerate(self._each(view)):
            spread_out = each.expand(jnp.broadcast_shapes(each.batch_shape, shape))
            values = jnp.asarray(spread_out.sample(jax.random.fold_in(key, i), (n,)))
            free = values if transform is None else jnp.asarray(transform.inv(values))
            draws = draws.at[:, place].set(free.reshape(n, -1))
        return draws

    def tunable(self, view):
        return ~self._is_named(view)

    def at(self, view, grouping, log_values):
        if self.rest is None:
            return self
        rest = self.rest.with_precisions(view, grouping, log_values, self.groups(view, grouping))
        return eqx.tree_at(lambda prior: prior.rest, self, rest)


def _density(prior: "dist.Distribution", transform: "dist.transforms.Transform | None") -> Callable[[Array], Array]:
    """log p of each number in its unconstrained coordinate."""

    def log_prob(free):
        if transform is None:
            return jnp.asarray(prior.log_prob(free))
        return jnp.asarray(prior.log_prob(transform(free)) + transform.log_abs_det_jacobian(free, transform(free)))

    return log_prob


def _derivatives(
    prior: "dist.Distribution", transform: "dist.transforms.Transform | None", free: Array
) -> tuple[Array, Array]:
    """The first and second derivative of log p of each number."""
    slope = lambda x: jax.grad(lambda x: jnp.sum(_density(prior, transform)(x)))(x)
    first, second = jax.jvp(slope, (free,), (jnp.ones_like(free),))
    return first.ravel(), second.ravel()

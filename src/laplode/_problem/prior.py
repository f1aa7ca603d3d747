"""What is known of the parameters before the data."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from .._checks import check_positive, real_array
from .._errors import LaplodeError
from .._late import dist
from .._show import Shown


class LocalPrior(eqx.Module):
    """A prior as it looks from one θ: all that curvature, refinement, evidence and predictions ask of it.

    −∇² log p(θ) = diag(precision − deficit) + rowsᵀ rows, where `precision` is positive, so that it may serve as a
    metric, and `deficit` is 0 except where the density bends upward. `log_density` is log p(θ) in nats, and `gradient`
    that of −log p(θ). Rows come from priors in which parameters depend on one another. `log_normalizer` is the
    logarithm of what the density integrates to, where it is not 1; it is that of the Gaussian seen from here.
    """

    log_density: Float[Array, ""]
    gradient: Float[Array, " P"]
    precision: Float[Array, " P"]
    deficit: Float[Array, " P"]
    rows: Float[Array, "R P"]
    log_normalizer: Float[Array, ""] | float = 0.0

    @property
    def diagonal(self) -> Float[Array, " P"]:
        """−∂² log p(θ) of each parameter without the rows, of either sign."""
        return self.precision - self.deficit

    @property
    def normalized(self) -> Float[Array, ""]:
        """log p(θ) of the density that integrates to 1."""
        return self.log_density - self.log_normalizer

    def covariance_product(self, v: Float[Array, "... P"]) -> Float[Array, "... P"]:
        """Covariance times v for the Gaussian of this precision and these rows."""
        return v / self.precision - self._explained(v @ (self.rows / self.precision).T)

    def _explained(self, seen: Float[Array, "... R"]) -> Float[Array, "... P"]:
        """What the rows, with a standard deviation of 1, tell of θ where what they see of it is `seen`."""
        gain = self.rows / self.precision
        system = jnp.eye(self.rows.shape[0]) + self.rows @ gain.T
        return jsl.solve(system, seen.T, assume_a="pos").T @ gain

    def with_residual(self, residual: Float[Array, " R"], rows: Float[Array, "R P"]) -> "LocalPrior":
        """The prior times exp(−½ ‖r‖²), of which the value r and the Jacobian are given at the same θ."""
        # The integral of the product, with r linear, is a Gaussian density of what r is at the mean of the prior.
        root = jnp.linalg.cholesky(jnp.eye(len(rows)) + rows @ self.covariance_product(rows).T)
        at_mean = jsl.solve_triangular(root, residual - rows @ self.covariance_product(self.gradient), lower=True)
        return LocalPrior(
            self.log_density - 0.5 * residual @ residual,
            self.gradient + residual @ rows,
            self.precision,
            self.deficit,
            jnp.concatenate([self.rows, rows]),
            self.log_normalizer - 0.5 * at_mean @ at_mean - jnp.sum(jnp.log(jnp.diagonal(root))),
        )

    def sample(self, theta: Float[Array, " P"], key: PRNGKeyArray, n: int) -> Float[Array, "n P"]:
        """Draws of the Gaussian that this is seen from `theta`."""
        # Draws of Normal(0, diag(precision)⁻¹) become draws of the prior by Matheron's rule.
        draws = jax.random.normal(key, (n, theta.size)) / jnp.sqrt(self.precision)
        noise = jax.random.normal(jax.random.fold_in(key, 0), (n, self.rows.shape[0]))
        mean = theta - self.covariance_product(self.gradient)
        return mean + draws - self._explained(draws @ self.rows.T + noise)


class Grouping(NamedTuple):
    """How parameters share hyperparameters.

    `groups(view)` is the number of the group of each entry of θ; `form(view, values)` puts one value for each group
    into a form that `GaussianPrior` takes.
    """

    groups: Callable[[Any], Int[np.ndarray, " P"]]
    form: Callable[[Any, Float[Array, " G"]], PyTree]


GROUPINGS: dict[str, Grouping | None] = {
    "one": Grouping(lambda view: np.zeros(view.size, int), lambda view, values: values[0]),
    "leaf": Grouping(
        lambda view: np.repeat(np.arange(len(view.leaves)), [stop - start for _, _, start, stop in view.leaves]),
        lambda view, values: jax.tree.unflatten(jax.tree.structure(view.selected), list(values)),
    ),
    "parameter": Grouping(lambda view: np.arange(view.size), lambda view, values: values),
    "fixed": None,
}


class AbstractPrior(Shown):
    """p(θ), with what the rest of laplode asks of it. A `view` is a model's `Parameters`."""

    # The named distributions that say in which coordinates θ is unconstrained, if there are any.
    coordinates: eqx.AbstractVar["AbstractPrior | None"]

    def distribution_of(self, name: str) -> "dist.Distribution | None":
        """The distribution that the leaf `name` has for itself."""
        return None if self.coordinates is None else self.coordinates.distribution_of(name)

    def transform_of(self, name: str, values: Array) -> "dist.transforms.Transform | None":
        """From the real numbers to where the leaf `name` lives; None if that is all of them.

        **Raises:** `LaplodeError` when the leaf's distribution does not fit its values.
        """
        return None if self.coordinates is None else self.coordinates.transform_of(name, values)

    @abc.abstractmethod
    def check(self, view: Any) -> None:
        """Raise `LaplodeError` unless this is a prior for the parameters of `view`."""

    def with_data(self, data: Any) -> "AbstractPrior":
        """The prior, with what it takes from the data that it stands beside."""
        return self

    def residual(self, view: Any, theta: Float[Array, " P"]) -> Float[Array, " R"]:
        """What ties parameters together: −log p(θ) has ½ ‖·‖² of it, and the rows of `local` are its Jacobian."""
        return jnp.zeros(0)

    def bends(self, view: Any) -> bool:
        """Whether `residual` can be differentiated forward twice."""
        return True

    def linear(self, view: Any) -> PyTree:
        """What `local` asks of the model, which is the same at all hyperparameters."""
        return None

    @abc.abstractmethod
    def local(self, view: Any, linear: PyTree = None) -> LocalPrior:
        """The prior as it looks from the parameters of `view` as they are; with `linear`, where that is at hand."""

    @abc.abstractmethod
    def log_density(self, view: Any, theta: Float[Array, "... P"]) -> Float[Array, "..."]:
        """log p(θ) in nats, of each vector along the last axis."""

    @abc.abstractmethod
    def sample(self, view: Any, key: PRNGKeyArray, n: int) -> Float[Array, "n P"]:
        """Draws of θ."""

    # ---- Hyperparameters

    @property
    def at_bounds(self) -> tuple[str, str]:
        """What it means where one has run to its lower and to its upper bound."""
        return "the prior is as good as flat there", "the data want these parameters at the prior's mean"

    def check_tunable(self) -> None:
        """Raise `LaplodeError` when the evidence is no function of hyperparameters under this prior."""

    def starts(self) -> "list[AbstractPrior]":
        """Priors with the hyperparameters from which a search for better ones starts."""
        return [self]

    def tunable(self, view: Any) -> Bool[np.ndarray, " P"]:
        """Which entries of θ have a precision that is a hyperparameter."""
        return np.zeros(view.size, bool)

    def groups(self, view: Any, grouping: Grouping) -> Int[np.ndarray, " P"]:
        """The number of the hyperparameter of each entry of θ; −1 for entries that have none."""
        ours, groups = self.tunable(view), np.full(view.size, -1)
        groups[ours] = np.unique(grouping.groups(view)[ours], return_inverse=True)[1]
        return groups

    def hyperparameters(self, view: Any, grouping: Grouping) -> Float[Array, " A"]:
        """Logarithms of the present precisions, the mean of each group."""
        groups = self.groups(view, grouping)
        ours = groups >= 0
        now = np.log(np.asarray(self.local(view).precision)[ours])
        return jnp.asarray(np.bincount(groups[ours], now) / np.bincount(groups[ours]))

    def hyperparameter_names(self, view: Any, grouping: Grouping) -> list[str]:
        """What each hyperparameter is called in messages."""
        groups = self.groups(view, grouping)
        if groups.max(initial=-1) == 0:
            return ["the prior precision"]
        each = [view.names(np.flatnonzero(groups == g)) for g in range(groups.max() + 1)]
        return [f"the prior precision of {', '.join(names)}" for names in each]

    def at(self, view: Any, grouping: Grouping, log_values: Float[Array, " A"]) -> "AbstractPrior":
        """The prior with other hyperparameters, in the order of `hyperparameters`."""
        return self


def prior_of(name: str, value: Any) -> AbstractPrior:
    """A prior, or the Gaussian one of a precision; `name` says in errors what it is for."""
    if isinstance(value, AbstractPrior):
        return value
    try:
        return GaussianPrior(value)
    except LaplodeError as error:
        raise LaplodeError(f"`{name}` is no precision: {error}") from error


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

    @property
    def coordinates(self):
        """None: θ is unconstrained as it is."""
        return None

    def spread(self, view: Any) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
        """Mean and precision of each entry of θ.

        **Raises:** `LaplodeError` when a pytree of means or precisions is not a prefix of the model.
        """
        each = lambda name: view.spread(f"`{name}` of the prior", getattr(self, name))
        return each("mean"), each("precision")

    def check(self, view):
        self.spread(view)

    @eqx.filter_jit
    def local(self, view, linear=None):
        (mean, precision), theta = self.spread(view), view.vector
        density = jnp.sum(log_normal(theta, mean, precision))
        return LocalPrior(density, precision * (theta - mean), precision, 0 * theta, jnp.zeros((0, theta.size)))

    @eqx.filter_jit
    def log_density(self, view, theta):
        return jnp.sum(log_normal(theta, *self.spread(view)), axis=-1)

    @eqx.filter_jit
    def sample(self, view, key, n):
        mean, precision = self.spread(view)
        return mean + jax.random.normal(key, (n, view.size)) / jnp.sqrt(precision)

    def tunable(self, view):
        return np.ones(view.size, bool)

    def at(self, view, grouping, log_values):
        return self.with_precisions(view, grouping, log_values, self.groups(view, grouping))

    def with_precisions(self, view: Any, grouping: Grouping, log_values: Array, groups: np.ndarray) -> "GaussianPrior":
        """The same with other precisions; entries of group −1, which have another prior, get 1."""
        every, ours = grouping.groups(view), groups >= 0
        values = jnp.ones(every.max() + 1).at[every[ours]].set(jnp.exp(log_values)[groups[ours]])
        return eqx.tree_at(lambda prior: prior.precision, self, grouping.form(view, values))


def log_normal(theta: Float[Array, "... P"], mean: Float[Array, " P"], precision: Float[Array, " P"]):
    """log Normal of each entry."""
    return 0.5 * (jnp.log(precision / (2 * jnp.pi)) - precision * (theta - mean) ** 2)


def is_at(name: str, path: str) -> bool:
    """Whether the leaf `name` is, or is part of, what stands at `path`."""
    return name == path or name.startswith((f"{path}.", f"{path}["))


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
    coordinates: AbstractPrior | None

    def check(self, view):
        leaves = tuple(leaf[:2] for leaf in view.leaves)
        before, now = dict(self.leaves), dict(leaves)
        if gone := [name for name in before if name not in now]:
            what = f"it has {', '.join(gone[:5])}, which is not among the parameters"
        elif new := [name for name in now if name not in before]:
            what = f"it does not have {', '.join(new[:5])}"
        elif other := [name for name in now if now[name] != before[name]]:
            what = f"it has {other[0]} of shape {before[other[0]]}, and the model has it of shape {now[other[0]]}"
        elif leaves != self.leaves:
            what = "it has them in another order"
        else:
            return
        raise LaplodeError(
            f"`prior` is a posterior of other parameters: {what}. A posterior is a prior for the same parameters: "
            "infer those by `where` in laplode.laplace, both times. What belongs to each trajectory, as a learned "
            "initial state does, is not shared with others."
        )

    @eqx.filter_jit
    def local(self, view, linear=None):
        theta = view.vector
        offset = theta - self.mean
        gradient = self.precision * offset + (self.rows @ offset) @ self.rows
        return LocalPrior(self.log_density(view, theta), gradient, self.precision, jnp.zeros_like(theta), self.rows)

    @eqx.filter_jit
    def log_density(self, view, theta):
        offset = theta - self.mean
        quadratic = jnp.sum(self.precision * offset**2, axis=-1) + jnp.sum((offset @ self.rows.T) ** 2, axis=-1)
        return 0.5 * (self.log_det - view.size * jnp.log(2 * jnp.pi) - quadratic)

    def residual(self, view, theta):
        return self.rows @ (theta - self.mean)

    @eqx.filter_jit
    def sample(self, view, key, n):
        return self.local(view).sample(view.vector, key, n)

    def check_tunable(self):
        raise LaplodeError(
            "`posterior` has a prior that is the posterior of other data: its precision is theirs, and the noise was "
            "held at one scale for them. Maximize the evidence of those data before `as_prior`, or that of all data "
            "together."
        )

"""What an expert knows of a model beside its parameters: functions of it that are near a value."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Float

from .._checks import real_array
from .._errors import LaplodeError
from .prior import AbstractPrior, prior_of


class AbstractConstraint(AbstractPrior):
    """p(θ) ∝ p0(θ) exp(−½ ‖r(model)‖²): a prior p0 of the parameters, and beside it a residual r of the model.

    r is affine in a function of the model that no hyperparameter enters. It is in the curvature by its first
    derivatives, which is all of it where it is linear in θ. The integral of the density, which evidences are in need
    of, is that of the linear residual too.
    """

    weights: eqx.AbstractVar[AbstractPrior]

    @abc.abstractmethod
    def values_of(self, model: Any) -> Float[Array, "..."]:
        """What of a model this is about."""

    @abc.abstractmethod
    def whitened(self, values: Float[Array, "..."]) -> Float[Array, " R"]:
        """r where the function has these values, in units of its own standard deviation and independent."""

    def residual_at(self, view: Any, theta: Float[Array, " P"]) -> Float[Array, " R"]:
        """r as a function of θ."""
        return self.whitened(self.values_of(view.unravel(theta)))

    @eqx.filter_jit
    def linear(self, view):
        """The values and their Jacobian, and the same of the prior of the parameters."""
        at = lambda theta: self.values_of(view.unravel(theta))
        return at(view.vector), jax.jacrev(at)(view.vector), self.weights.linear(view)

    @property
    def coordinates(self):
        """Those of the prior of the parameters."""
        return self.weights.coordinates

    def with_data(self, data):
        return eqx.tree_at(lambda p: p.weights, self, self.weights.with_data(data))

    def residual(self, view, theta):
        return jnp.concatenate([self.weights.residual(view, theta), self.residual_at(view, theta)])

    def bends(self, view):
        twice = lambda theta: jax.jacfwd(jax.jacfwd(lambda theta: self.residual(view, theta)))(theta)
        try:
            jax.eval_shape(twice, view.vector)
        except Exception:  # such as a solve within that knows reverse derivatives only
            return False
        return True

    @eqx.filter_jit
    def local(self, view, linear=None):
        values, jacobian, below = self.linear(view) if linear is None else linear
        along = lambda column: jax.jvp(self.whitened, (values,), (column,))[1]
        rows = jax.vmap(along, in_axes=-1, out_axes=1)(jacobian)
        return self.weights.local(view, below).with_residual(self.whitened(values), rows)

    @eqx.filter_jit
    def log_density(self, view, theta):
        squares = jnp.vectorize(lambda theta: jnp.sum(self.residual_at(view, theta) ** 2), signature="(p)->()")
        return self.weights.log_density(view, theta) - 0.5 * squares(theta)

    @eqx.filter_jit
    def sample(self, view, key, n):
        return self.local(view).sample(view.vector, key, n)

    # ---- Hyperparameters are those of the prior of the parameters

    @property
    def at_bounds(self):
        """As for the prior of the parameters."""
        return self.weights.at_bounds

    def check_tunable(self):
        self.weights.check_tunable()

    def starts(self):
        return [eqx.tree_at(lambda p: p.weights, self, each) for each in self.weights.starts()]

    def groups(self, view, grouping):
        return self.weights.groups(view, grouping)

    def hyperparameters(self, view, grouping):
        return self.weights.hyperparameters(view, grouping)

    def hyperparameter_names(self, view, grouping):
        return self.weights.hyperparameter_names(view, grouping)

    def at(self, view, grouping, log_values):
        return eqx.tree_at(lambda p: p.weights, self, self.weights.at(view, grouping, log_values))


class SoftConstraint(AbstractConstraint):
    """A prior in which a function of the model is near a value: function(model) ~ Normal(value, covariance).

    A conserved quantity, an equilibrium, a symmetry, a rate at a state, whatever an expert knows:

    ```python
    at_rest = laplode.SoftConstraint(laplode.field_at([[1.0, 2.0]]), 0.0, 0.01**2, weights=1.0)
    problem = laplode.Problem(data, likelihood, at_rest)
    ```

    The function is computed anew at each θ. Its second derivatives are left out of the curvature, so that this is exact
    where the function is linear in θ and says otherwise as much as a Gauss-Newton matrix; `nuts` and importance weights
    take the density as it is. The density is normalized for the evidence as if the function were linear around θ*, and
    draws of the prior, as in a DataTree, are those of that Gaussian.

    **Arguments:**

    - `function`: called as `function(model)`; returns an array of any shape by JAX operations, differentiable in
        reverse. `field_at` and `trajectory_at` make the usual ones.
    - `value`: what it is near, in the shape of what the function returns, or a number.
    - `covariance`: the variance of each value, as a number or in the shape of `value`; or the covariance matrix (R, R)
        of the R values, raveled.
    - `weights`: the prior of the parameters beside it, any that `Problem` takes, another `SoftConstraint` too.

    **Raises:** `LaplodeError` when an argument is of the wrong kind or shape, or a covariance is not positive definite.
    """

    function: Callable[[Any], Any]
    value: Float[Array, "..."]
    root: Float[Array, "..."]
    weights: AbstractPrior
    joint: bool = eqx.field(static=True)

    def __init__(self, function: Callable[[Any], Any], value: Any, covariance: Any, *, weights: Any):
        if not callable(function) and not hasattr(function, "of_data"):
            raise LaplodeError(f"`function` must be callable as function(model), got {type(function).__name__}.")
        value, covariance = real_array("value", value), real_array("covariance", covariance)
        if not np.all(np.isfinite(value)):
            raise LaplodeError(f"`value` must be finite, got {value}.")
        self.joint = covariance.ndim == 2 and covariance.shape == (value.size, value.size)
        if not self.joint and covariance.shape not in ((), value.shape):
            raise LaplodeError(
                f"`covariance` has shape {covariance.shape}: give a variance, one for each value in the shape of "
                f"`value`, {value.shape}, or a matrix {(value.size, value.size)}."
            )
        spread = np.linalg.eigvalsh(covariance) if self.joint and np.all(np.isfinite(covariance)) else covariance
        symmetric = not self.joint or np.allclose(covariance, covariance.T)
        if not (symmetric and np.all(np.isfinite(spread)) and np.all(spread > 0)):
            raise LaplodeError(
                "`covariance` must be positive, and as a matrix symmetric and positive definite: what is known exactly "
                "belongs into the model."
            )
        root = np.linalg.cholesky(covariance) if self.joint else np.sqrt(covariance)
        self.function, self.weights = function, prior_of("weights", weights)
        self.value, self.root = jnp.asarray(value), jnp.asarray(root)

    def with_data(self, data):
        of_data = getattr(self.function, "of_data", None)  # a function that is about one of the trajectories
        with_weights = super().with_data(data)
        return with_weights if of_data is None else eqx.tree_at(lambda p: p.function, with_weights, of_data(data))

    def check(self, view):
        self.weights.check(view)
        found = value_of("function", self.function, view)
        if self.value.shape not in ((), found.shape) or (self.joint and self.value.shape != found.shape):
            raise LaplodeError(
                f"`function` of the constraint returns an array of shape {found.shape}, and its `value` has shape "
                f"{self.value.shape}: give a number, or a value for each."
            )

    def values_of(self, model):
        return jnp.asarray(self.function(model))

    def whitened(self, values):
        off = values - self.value
        return jsl.solve_triangular(self.root, off.ravel(), lower=True) if self.joint else (off / self.root).ravel()


def value_of(name: str, function: Callable[[Any], Any], view: Any) -> np.ndarray:
    """What a function of the model gives for the parameters of `view`.

    **Raises:** `LaplodeError` about the argument `name` when it fails, or is not finite.
    """
    try:
        found = np.asarray(eqx.filter_jit(lambda view: jnp.asarray(function(view.model), dtype=float))(view))
    except LaplodeError:
        raise
    except Exception as error:
        raise LaplodeError(f"`{name}` of the prior fails at the model: {type(error).__name__}: {error}") from error
    if not np.all(np.isfinite(found)):
        raise LaplodeError(f"`{name}` of the prior is not finite at the model: {found.ravel()[:5]}.")
    return found

"""What a posterior says about any function of the model, such as its vector field."""

import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .._errors import LaplodeError, LaplodeWarning
from .._model.neural_ode import NeuralODE
from .._posterior.posterior import AbstractPosterior, Posterior
from .._problem.data import check_args, check_initial_state
from .._solve.maps import OfModel, linearize
from .draws import Sampling, draw, mixed_mean, mixed_root, over_components
from .geodesic import TOLERANCE
from .solves import in_batches


class FunctionPredictions(eqx.Module):
    """What a posterior says about a function of the model, an array of any shape (…).

    - `mean`, `std`: mean and standard deviation, (…): in closed form if linearized, otherwise of the draws that are
        `ok`.
    - `draws`: (S, …); NaN where not `ok`.
    - `thetas`: the parameter vectors of the draws, (S, P).
    - `ok`: False for draws at which the function is not finite, or that did not arrive, (S,).
    - `log_weights`, `khat`: as in `Predictions`.
    """

    mean: Float[Array, "..."]
    std: Float[Array, "..."]
    draws: Float[Array, "S ..."]
    thetas: Float[Array, "S P"]
    ok: Bool[Array, " S"]
    log_weights: Float[Array, " S"] | None
    khat: float | None
    method: str = eqx.field(static=True)
    _root: Float[Array, "M R"]

    def covariance(self) -> Float[Array, "M M"]:
        """The joint covariance of all values, raveled, (M, M): J Λ⁻¹ Jᵀ if linearized, otherwise that of the draws."""
        return self._root @ self._root.T


def predict_function(
    posterior: AbstractPosterior,
    function: Callable[[Any], Any],
    *,
    method: str = "linearized",
    num_samples: int = 1000,
    key: PRNGKeyArray,
    proposal: str = "gaussian",
    df: float = 5.0,
    tolerance: float = TOLERANCE,
    weigh: bool | None = None,
    resample: bool = False,
    progress: bool = True,
) -> FunctionPredictions:
    """Any function of the model under the posterior: a rate, an equilibrium, a period, a conserved quantity.

    **Arguments:**

    - `posterior`: from `laplace` or `mixture`.
    - `function`: called as `function(model)`, where `model` has the structure of the fitted one; returns an array of
        floating point numbers of any shape, always the same, by JAX operations.
    - `method`: where the draws come from, as in `predict`: "linearized": function(θ*) + J (θ − θ*) with J its Jacobian;
        "geodesic", "sampled": the function at draws of θ.
    - `num_samples`, `key`, `proposal`, `df`, `tolerance`, `weigh`, `resample`, `progress`: as in `predict`.

    **Returns:** `FunctionPredictions`.

    **Raises:** `LaplodeError` when an argument does not fit, or the function fails or is not finite at θ*. Warns
    (`LaplodeWarning`) when it is not finite at draws, geodesic draws failed or k̂ is high.

    The linearized covariance J Λ⁻¹ Jᵀ is known as the delta method.
    """
    sampling = Sampling.of(posterior, method, num_samples, proposal, df, tolerance, weigh, resample, progress, key)
    if not callable(function):
        raise LaplodeError(f"`function` must be callable as function(model), got {type(function).__name__}.")
    return _predict(function, posterior, sampling, key)


def predict_field(
    posterior: AbstractPosterior,
    states: Any,
    ts: Any = 0.0,
    args: PyTree = None,
    *,
    method: str = "linearized",
    num_samples: int = 1000,
    key: PRNGKeyArray,
    proposal: str = "gaussian",
    df: float = 5.0,
    tolerance: float = TOLERANCE,
    weigh: bool | None = None,
    resample: bool = False,
    progress: bool = True,
) -> FunctionPredictions:
    """The vector field of a `NeuralODE` under the posterior, at states and times of your choice.

    **Arguments:**

    - `posterior`: from `laplace` or `mixture`, of a `NeuralODE`.
    - `states`: (G, D), such as the points of a grid in the phase plane.
    - `ts`: times, one for all states or one each, (G,).
    - `args`: as in `Trajectories`, with leading axis G.
    - `method`, `num_samples`, `key`, `proposal`, `df`, `tolerance`, `weigh`, `resample`, `progress`: as in `predict`.

    **Returns:** `FunctionPredictions` of dy/dt, shape (G, D), in units of the state per unit of time.

    **Raises:** `LaplodeError` and warns as `predict_function` does; and raises it when the model is no `NeuralODE`.
    """
    sampling = Sampling.of(posterior, method, num_samples, proposal, df, tolerance, weigh, resample, progress, key)
    model = posterior.parameters.model
    if not isinstance(model, NeuralODE):
        raise LaplodeError(
            f"`posterior` is of a {type(model).__name__}, whose vector field laplode does not know: only a NeuralODE "
            "has one. For a function of your model there is laplode.predict_function."
        )
    states = check_initial_state("states", states, np.shape(states)[0] if np.ndim(states) > 1 else 1)
    ts = np.asarray(ts, dtype=float)
    if ts.shape not in ((), (len(states),)) or not np.all(np.isfinite(ts)):
        raise LaplodeError(
            f"`ts` must be one finite time, or one for each of the G = {len(states)} states; got shape {ts.shape}."
        )
    args = check_args("args", args, len(states))
    data = posterior.problem.data
    if args is None and data.args is not None:
        raise LaplodeError("`args` is missing: the data came with args, so the vector field needs them.")
    ts = np.broadcast_to(ts, len(states)).copy()
    return _predict(_Field(ts, states, args), posterior, sampling, key)


class _Field(eqx.Module):
    """model ↦ its vector field at states."""

    ts: Float[np.ndarray, " G"]
    states: Float[np.ndarray, "G D"]
    args: PyTree

    def __call__(self, model: NeuralODE) -> Float[Array, "G D"]:
        return jax.vmap(model.vector_field)(self.ts, self.states, self.args)


def _predict(
    function: Callable[[Any], Any], posterior: AbstractPosterior, sampling: Sampling, key: PRNGKeyArray
) -> FunctionPredictions:
    maps = [OfModel(component.parameters, function) for component in posterior.components]
    at_means = [value_at_mean(each, "function") for each in maps]
    drawn = draw(posterior, sampling, key)
    if sampling.method.linear:
        jacobians = [linearize(each)[1] for each in maps]
        change = lambda i, thetas: (thetas - posterior.components[i].mean) @ jacobians[i].T
        at_draws = lambda i, thetas: at_means[i] + change(i, thetas).reshape(-1, *at_means[i].shape)
    else:
        jacobians = []
        label = "Evaluating at draws" if sampling.progress else None
        at_draws = lambda i, thetas: in_batches(lambda some: _at(maps[i], some), thetas, label)
    draws = over_components(at_draws, drawn.component, drawn.thetas)
    ok = drawn.ok & jnp.all(jnp.isfinite(draws.reshape(len(draws), -1)), axis=1)
    num_ok, failed = int(jnp.sum(ok)), int(jnp.sum(drawn.ok & ~ok))
    draws = jnp.where(ok.reshape(-1, *[1] * (draws.ndim - 1)), draws, jnp.nan)
    if sampling.method.linear:
        mean = mixed_mean(posterior.weights, at_means)
        roots = [_root(c, jacobian) for c, jacobian in zip(posterior.components, jacobians, strict=True)]
        root = mixed_root(posterior.weights, at_means, roots)
    else:
        if num_ok < 2:
            raise LaplodeError(f"`function` is finite at {num_ok} of {len(ok)} draws: too few for a covariance.")
        mean = jnp.mean(draws[ok], axis=0)
        root = (draws[ok] - mean).reshape(num_ok, -1).T / np.sqrt(num_ok - 1)
    if failed:
        warnings.warn(
            f"`function` is not finite at {failed} of {len(ok)} draws (`.ok` says which; they are NaN).",
            LaplodeWarning,
            stacklevel=3,
        )
    std = jnp.sqrt(jnp.sum(root**2, axis=1)).reshape(mean.shape)
    return FunctionPredictions(
        mean=mean,
        std=std,
        draws=draws,
        thetas=drawn.thetas,
        ok=ok,
        log_weights=drawn.log_weights,
        khat=drawn.khat,
        method=sampling.name,
        _root=root,
    )


def value_at_mean(function: OfModel, name: str) -> Float[Array, "..."]:
    """The function of the fitted model, or a `LaplodeError` about the argument `name`."""
    try:
        value = jnp.asarray(_at(function, function.parameters.vector[None])[0])
    except LaplodeError:
        raise
    except Exception as error:
        raise LaplodeError(f"`{name}` fails at the fitted model: {type(error).__name__}: {error}") from error
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise LaplodeError(f"`{name}` must return floating point numbers, got {value.dtype}.")
    if not jnp.all(jnp.isfinite(value)):
        raise LaplodeError(f"`{name}` is not finite at the fitted model.")
    return value


def _root(posterior: Posterior, jacobian: Float[Array, "M P"]) -> Float[Array, "M M"]:
    """A root of J Λ⁻¹ Jᵀ."""
    covariance = posterior.structure.predictive_covariance(jacobian)
    eigenvalues, vectors = jnp.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * jnp.sqrt(jnp.maximum(eigenvalues, 0))


@eqx.filter_jit
def _at(function: OfModel, thetas: Float[Array, "B P"]) -> Float[Array, "B ..."]:
    return jax.vmap(function)(thetas)

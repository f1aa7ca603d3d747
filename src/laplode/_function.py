"""What a posterior says about any function of the model, such as its vector field."""

import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from ._draws import Sampling, draw, in_batches
from ._errors import LaplodeError, LaplodeWarning
from ._geodesic import TOLERANCE
from ._model import NeuralODE
from ._posterior import Posterior
from ._problem import check_args, check_initial_state
from ._solve import OfModel, linearize


class FunctionPredictions(eqx.Module):
    """What a posterior says about a function of the model, an array of any shape (…).

    - `mean`, `std`: mean and standard deviation, (…): in closed form if linearized, otherwise of the draws that are
        `ok`.
    - `draws`: (S, …); NaN where not `ok`.
    - `thetas`: the parameter vectors of the draws, (S, P).
    - `ok`: False for draws at which the function is not finite, or whose geodesic did not arrive, (S,).
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
    posterior: Posterior,
    function: Callable[[Any], Any],
    *,
    method: str = "linearized",
    num_samples: int = 1000,
    key: PRNGKeyArray,
    proposal: str = "gaussian",
    df: float = 5.0,
    tolerance: float = TOLERANCE,
    khat: bool | None = None,
    resample: bool = False,
    progress: bool = True,
) -> FunctionPredictions:
    """Any function of the model under the posterior: a rate, an equilibrium, a period, a conserved quantity.

    **Arguments:**

    - `posterior`: from `laplace`.
    - `function`: called as `function(model)`, where `model` has the structure of the fitted one; returns an array of
        floating point numbers of any shape, always the same, by JAX operations.
    - `method`: where the draws come from, as in `predict`: "linearized": function(θ*) + J (θ − θ*) with J its Jacobian;
        "geodesic", "sampled": the function at draws of θ.
    - `num_samples`, `key`, `proposal`, `df`, `tolerance`, `khat`, `resample`, `progress`: as in `predict`.

    **Returns:** `FunctionPredictions`.

    **Raises:** `LaplodeError` when an argument does not fit, or the function fails or is not finite at θ*. Warns
    (`LaplodeWarning`) when it is not finite at draws, geodesics failed or k̂ is high.

    The linearized covariance J Λ⁻¹ Jᵀ is known as the delta method.
    """
    sampling = Sampling.of(posterior, method, num_samples, proposal, df, tolerance, khat, resample, progress)
    if not callable(function):
        raise LaplodeError(f"`function` must be callable as function(model), got {type(function).__name__}.")
    return _predict(OfModel(posterior.parameters, function), posterior, sampling, key)


def predict_field(
    posterior: Posterior,
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
    khat: bool | None = None,
    resample: bool = False,
    progress: bool = True,
) -> FunctionPredictions:
    """The vector field of a `NeuralODE` under the posterior, at states and times of your choice.

    **Arguments:**

    - `posterior`: from `laplace`, of a `NeuralODE`.
    - `states`: (G, D), such as the points of a grid in the phase plane.
    - `ts`: times, one for all states or one each, (G,).
    - `args`: as in `Trajectories`, with leading axis G.
    - `method`, `num_samples`, `key`, `proposal`, `df`, `tolerance`, `khat`, `resample`, `progress`: as in `predict`.

    **Returns:** `FunctionPredictions` of dy/dt, shape (G, D), in units of the state per unit of time.

    **Raises:** `LaplodeError` and warns as `predict_function` does; and raises it when the model is no `NeuralODE`.
    """
    sampling = Sampling.of(posterior, method, num_samples, proposal, df, tolerance, khat, resample, progress)
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
    return _predict(OfModel(posterior.parameters, _Field(ts, states, args)), posterior, sampling, key)


class _Field(eqx.Module):
    """model ↦ its vector field at states."""

    ts: Float[np.ndarray, " G"]
    states: Float[np.ndarray, "G D"]
    args: PyTree

    def __call__(self, model: NeuralODE) -> Float[Array, "G D"]:
        return jax.vmap(model.vector_field)(self.ts, self.states, self.args)


def _predict(function: OfModel, posterior: Posterior, sampling: Sampling, key: PRNGKeyArray) -> FunctionPredictions:
    try:
        at_mean = jnp.asarray(_at(function, posterior.mean[None])[0])
    except LaplodeError:
        raise
    except Exception as error:
        raise LaplodeError(f"`function` fails at the fitted model: {type(error).__name__}: {error}") from error
    if not jnp.issubdtype(at_mean.dtype, jnp.floating):
        raise LaplodeError(f"`function` must return floating point numbers, got {at_mean.dtype}.")
    if not jnp.all(jnp.isfinite(at_mean)):
        raise LaplodeError("`function` is not finite at the fitted model.")
    drawn = draw(posterior, sampling, key)
    if sampling.method.linear:
        jacobian = linearize(function)[1]
        change = (drawn.thetas - posterior.mean) @ jacobian.T
        draws = at_mean + change.reshape(-1, *at_mean.shape)
        covariance = posterior.structure.predictive_covariance(jacobian)
        eigenvalues, vectors = jnp.linalg.eigh((covariance + covariance.T) / 2)
        root, mean = vectors * jnp.sqrt(jnp.maximum(eigenvalues, 0)), at_mean
    else:
        evaluate = lambda thetas: _at(function, thetas)
        draws = in_batches(evaluate, drawn.thetas, "Evaluating at draws" if sampling.progress else None)
    ok = drawn.ok & jnp.all(jnp.isfinite(draws.reshape(len(draws), -1)), axis=1)
    num_ok, failed = int(jnp.sum(ok)), int(jnp.sum(drawn.ok & ~ok))
    draws = jnp.where(ok.reshape(-1, *[1] * at_mean.ndim), draws, jnp.nan)
    if not sampling.method.linear:
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
    std = jnp.sqrt(jnp.sum(root**2, axis=1)).reshape(at_mean.shape)
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


@eqx.filter_jit
def _at(function: OfModel, thetas: Float[Array, "B P"]) -> Float[Array, "B ..."]:
    return jax.vmap(function)(thetas)

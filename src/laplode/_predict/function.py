"""What a posterior says about any function of the model, such as its vector field."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .._checks import check_count, real_array
from .._errors import LaplodeError, strategy, warn
from .._model.neural_ode import NeuralODE, starts
from .._model.own import predict_trajectories
from .._posterior.posterior import Posterior
from .._problem.data import Trajectories, check_args
from .._show import Shown, in_a_line, rows
from .._solve.finite import check_slope
from .._solve.flows import OfModel
from .._solve.maps import evaluate
from .linearized import LinearFunction
from .method import AbstractMethod, check_draws, draw
from .predict import METHODS
from .predictions import AbstractClosedForm, about_draws


class FunctionPredictions(Shown):
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
    _closed_form: AbstractClosedForm | None

    def _shown(self):
        named = {"mean": in_a_line(self.mean), "standard deviation": in_a_line(self.std)}
        return rows(named | about_draws(self), "FunctionPredictions")

    def covariance(self) -> Float[Array, "M M"]:
        """The joint covariance of all values, raveled, (M, M): J Λ⁻¹ Jᵀ if linearized, otherwise that of the draws."""
        if self._closed_form is not None:
            return self._closed_form.covariance()
        draws = self.draws[self.ok].reshape(int(jnp.sum(self.ok)), -1)
        return jnp.atleast_2d(jnp.cov(draws, rowvar=False))


def predict_function(
    posterior: Posterior,
    function: Callable[[Any], Any],
    *,
    method: str | AbstractMethod = "linearized",
    num_samples: int = 1000,
    key: PRNGKeyArray,
    weigh: bool | None = None,
    resample: bool = False,
    progress: bool = True,
) -> FunctionPredictions:
    """Any function of the model under the posterior: a rate, an equilibrium, a period, a conserved quantity.

    **Arguments:**

    - `posterior`: from `laplace`.
    - `function`: called as `function(model)`, where `model` has the structure of the fitted one; returns an array of
        floating point numbers of any shape, always the same, by JAX operations. `field_at` and `trajectory_at` make
        the usual ones.
    - `method`: where the draws come from, as in `predict`: `Linearized()`: function(θ*) + J (θ − θ*) with J its
        Jacobian; `Geodesic()`, `Sampled()`: the function at draws of θ.
    - `num_samples`, `key`, `weigh`, `resample`, `progress`: as in `predict`.

    **Returns:** `FunctionPredictions`.

    **Raises:** `LaplodeError` when an argument does not fit, or the function fails or is not finite at θ*. Warns
    (`LaplodeWarning`) when it is not finite at draws, geodesic draws failed or k̂ is high.

    The linearized covariance J Λ⁻¹ Jᵀ is known as the delta method.
    """
    how: AbstractMethod = strategy("method", method, AbstractMethod, METHODS)
    num_samples, weigh = check_draws(posterior, how, num_samples, key, weigh, resample)
    of = of_posterior("function", function, posterior)
    mean = value_at_mean(of, "function")
    drawn = draw(posterior, how, key, num_samples, weigh=weigh, resample=resample, progress=progress)
    draws, closed_form = how.values(posterior, of, drawn.thetas, progress=progress)
    ok = drawn.ok & jnp.all(jnp.isfinite(draws.reshape(num_samples, -1)), axis=1)
    draws = jnp.where(ok.reshape(-1, *[1] * (draws.ndim - 1)), draws, jnp.nan)
    if isinstance(closed_form, LinearFunction):
        std = closed_form.std
        check_slope("function", std)
    else:
        num_ok = int(jnp.sum(ok))
        if num_ok < 2:
            raise LaplodeError(f"`function` is finite at {num_ok} of {num_samples} draws: too few for a covariance.")
        mean, std = jnp.mean(draws[ok], axis=0), jnp.std(draws[ok], axis=0, ddof=1)
    if failed := int(jnp.sum(drawn.ok & ~ok)):
        warn(f"`function` is not finite at {failed} of {num_samples} draws (`.ok` says which; they are NaN).")
    return FunctionPredictions(
        mean=mean,
        std=std,
        draws=draws,
        thetas=drawn.thetas,
        ok=ok,
        log_weights=drawn.log_weights,
        khat=drawn.khat,
        method=how.name,
        _closed_form=closed_form,
    )


def value_at_mean(function: OfModel, name: str) -> Float[Array, "..."]:
    """The function of the fitted model, or a `LaplodeError` about the argument `name`."""
    try:
        value = jnp.asarray(evaluate(function, function.parameters.vector))
    except LaplodeError:
        raise
    except Exception as error:
        raise LaplodeError(f"`{name}` fails at the fitted model: {type(error).__name__}: {error}") from error
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise LaplodeError(f"`{name}` must return floating point numbers, got {value.dtype}.")
    if not jnp.all(jnp.isfinite(value)):
        raise LaplodeError(f"`{name}` is not finite at the fitted model.")
    return value


# ---- Functions of the model that are often wanted


class field_at(eqx.Module):
    """The vector field of a `NeuralODE` at states and times of your choice, as a function of the model.

    ```python
    predict_function(posterior, field_at(states), key=key)
    ```

    **Arguments:**

    - `states`: (G, D), such as the points of a grid in the phase plane.
    - `ts`: times, one for all states or one each, (G,).
    - `args`: as in `Trajectories`, with leading axis G.

    **Returns:** what a `NeuralODE` is called with for dy/dt, (G, D), in units of the state per unit of time.

    **Raises:** `LaplodeError` when shapes do not fit, or, called, when the model is no `NeuralODE`.
    """

    states: Float[np.ndarray, "G D"]
    ts: Float[np.ndarray, " G"]
    args: PyTree

    def __init__(self, states: Any, ts: Any = 0.0, args: PyTree = None):
        self.states = real_array("states", states)
        if self.states.ndim != 2 or not np.all(np.isfinite(self.states)):
            raise LaplodeError(f"`states` must be finite and of shape (G, D), got shape {self.states.shape}.")
        num = len(self.states)
        ts = real_array("ts", ts, "times")
        if ts.shape not in ((), (num,)) or not np.all(np.isfinite(ts)):
            raise LaplodeError(
                f"`ts` must be one finite time, or one for each of the G = {num} states; got shape {ts.shape}."
            )
        self.ts, self.args = np.broadcast_to(ts, num).copy(), check_args("args", args, num)

    def __call__(self, model: Any) -> Float[Array, "G D"]:
        if not isinstance(model, NeuralODE):
            raise LaplodeError(
                f"`field_at`: the model is a {type(model).__name__}, whose vector field laplode does not know: only a "
                "NeuralODE has one. Give a function of your own model instead."
            )
        return jax.vmap(model.vector_field)(self.ts, self.states, self.args)


class trajectory_at(eqx.Module):
    """What the model predicts of one of the data's trajectories, as a function of the model: a forecast, say.

    ```python
    predict_function(posterior, trajectory_at(25.0, channel=1), key=key)
    ```

    **Arguments:**

    - `t`: a time, or several, (T,), increasing; not before the trajectory's first.
    - `channel`: its number.
    - `trajectory`: its number.

    **Returns:** a function for `predict_function` and others of a posterior: a number, or (T,), noise-free.

    **Raises:** `LaplodeError` when an argument is of the wrong kind, or, with the data at hand, does not fit.
    """

    t: Float[np.ndarray, "..."]
    channel: int = eqx.field(static=True)
    trajectory: int = eqx.field(static=True)

    def __init__(self, t: Any, channel: int, trajectory: int = 0):
        self.t = real_array("t", t, "times")
        steps = np.diff(np.atleast_1d(self.t))
        if self.t.ndim > 1 or self.t.size == 0 or not np.all(np.isfinite(self.t)) or np.any(steps <= 0):
            raise LaplodeError(f"`t` must be a finite time, or increasing times of shape (T,); got {t!r}.")
        self.channel = check_count("channel", channel, 0)
        self.trajectory = check_count("trajectory", trajectory, 0)

    def of_data(self, data: Trajectories) -> "_TrajectoryOf":
        """The same, with the initial state and the args of its trajectory."""
        num, _, channels = data.ys.shape
        for name, value, limit in (("channel", self.channel, channels), ("trajectory", self.trajectory, num)):
            if value >= limit:
                raise LaplodeError(f"`{name}` = {value}, but the data have {limit}, numbered from 0.")
        some = slice(self.trajectory, self.trajectory + 1)
        start, times = data.ts[some, :1], np.atleast_1d(self.t)[None]
        if times[0, 0] < start[0, 0]:
            raise LaplodeError(f"`t` = {times[0, 0]:g} is before the trajectory's first time, {start[0, 0]:g}.")
        ts = times if times[0, 0] == start[0, 0] and times.size > 1 else np.concatenate([start, times], axis=1)
        if ts[0, 0] == ts[0, 1]:
            raise LaplodeError(f"`t` = {times[0, 0]:g} is the time of the initial state: give a later one.")
        y0 = None if data.y0 is None else data.y0[some]
        args = jax.tree.map(lambda x: x[some], data.args)
        return _TrajectoryOf(ts, y0, args, len(data.ts), self)


class _TrajectoryOf(eqx.Module):
    ts: Float[np.ndarray, "1 T"]
    y0: Float[np.ndarray, "1 D"] | None
    args: PyTree
    num: int = eqx.field(static=True)
    wanted: trajectory_at

    def __call__(self, model: Any) -> Float[Array, "..."]:
        one = self.wanted.trajectory
        y0 = starts(model, self.y0, self.num)
        y0 = y0 if y0 is self.y0 else y0[one : one + 1]
        inputs = jax.tree.map(jnp.asarray, (self.ts, y0, self.args))
        values = predict_trajectories(model, *inputs)[0, :, self.wanted.channel]
        return values[-self.wanted.t.size :].reshape(self.wanted.t.shape)


def of_posterior(name: str, function: Any, posterior: Posterior) -> OfModel:
    """A function of the model as one of θ; one that is about the posterior's data is handed them.

    **Raises:** `LaplodeError` about the argument `name` when it is none.
    """
    if isinstance(function, trajectory_at):
        return OfModel(posterior.parameters, function.of_data(posterior.problem.data))
    if not callable(function):
        raise LaplodeError(f"`{name}` must be callable as {name}(model), got {type(function).__name__}.")
    return OfModel(posterior.parameters, function)  # pyright: ignore[reportArgumentType]

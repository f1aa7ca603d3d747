"""Data, likelihood and prior together."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._errors import LaplodeError
from .._late import dist
from .._show import Shown, in_a_line, rows
from .data import Trajectories
from .likelihood import AbstractLikelihood, FromDistribution
from .prior import AbstractPrior, prior_of
from .scale import AbstractScaleLikelihood


class Problem(Shown):
    """Data, likelihood and prior: everything about the inference but the model.

    **Arguments:**

    - `data`: the observed `Trajectories`.
    - `likelihood`: `Gaussian`, `LogNormal`, `StudentT`, `Poisson`, `NegativeBinomial`, or any function from predictions
        (..., K) to a NumPyro distribution of the same batch shape.
    - `prior`: a `GaussianPrior`, its precision as a positive number, `NamedPriors`, `posterior.as_prior()`, what was
        learned from data before; or one of these within a `SoftConstraint` or
        a `FieldPrior`.
    - `given`: which values of the first row the initial states fix, so that they are no observations, (N, K). None at
        first; `fit`, `refine` and `laplace` find them, and the problem that they return holds them.

    **Raises:** `LaplodeError` when an argument is of the wrong kind, a noise scale does not fit the channels, or an
    observation lies outside the likelihood's support.
    """

    data: Trajectories
    likelihood: AbstractLikelihood
    prior: AbstractPrior
    given: Bool[np.ndarray, "N K"]

    def __init__(self, data: Trajectories, likelihood: Any, prior: Any, *, given: Any = None):
        if not isinstance(data, Trajectories):
            raise LaplodeError(f"`data` must be laplode.Trajectories(ts, ys, ...), got {type(data).__name__}.")
        if isinstance(likelihood, type):
            raise LaplodeError(f"`likelihood` must be an instance, as in {likelihood.__name__}(...), got the class.")
        if not isinstance(likelihood, AbstractLikelihood):
            if not callable(likelihood):
                raise LaplodeError(
                    "`likelihood` must be Gaussian(scale), LogNormal(scale), StudentT(df, scale), Poisson(), "
                    "NegativeBinomial(concentration), or a "
                    f"function `prediction -> numpyro distribution`; got {type(likelihood).__name__}."
                )
            likelihood = FromDistribution(likelihood)  # pyright: ignore[reportArgumentType]
        if isinstance(prior, AbstractLikelihood | Trajectories | dist.Distribution):
            raise LaplodeError(
                "`prior` must be laplode.GaussianPrior(precision), a precision, or laplode.NamedPriors; got "
                f"{type(prior).__name__}."
            )
        channels = data.ys.shape[-1]
        for name in ("scale", "lower", "upper", "concentration"):
            value = getattr(likelihood, name, None)
            allowed = ((), (channels,), data.ys.shape) if name == "scale" else ((), (channels,))
            if isinstance(value, np.ndarray | Array) and value.shape not in allowed:
                raise LaplodeError(
                    f"`{name}` has shape {value.shape} but ys has K = {channels} channels: give one {name}, or an "
                    f"array of shape {' or '.join(str(shape) for shape in allowed[1:])}."
                )
        if isinstance(likelihood, AbstractScaleLikelihood) and likelihood.learned:  # one for each channel from here on
            scale = np.broadcast_to(np.asarray(likelihood.scale), (channels,)).copy()
            likelihood = eqx.tree_at(lambda l: l.scale, likelihood, scale)
        if isinstance(likelihood, AbstractScaleLikelihood) and likelihood.by_value:
            unknown = np.isnan(np.asarray(likelihood.scale)) & data.observed
            if np.any(unknown):
                i, t, k = map(int, np.argwhere(unknown)[0])
                raise LaplodeError(
                    f"`scale` is NaN at [{i}, {t}, {k}], where ys is {data.ys[i, t, k]:g}: give every observed value a "
                    "scale, or make it NaN in ys if it is not to count."
                )
        likelihood.check(data.ys)
        _check_distribution(likelihood, data.ys.shape)
        self.data = data
        self.likelihood = likelihood
        self.prior = prior_of("prior", prior).with_data(data)
        self.given = np.zeros((len(data.ys), channels), bool) if given is None else np.asarray(given, bool)

    def _shown(self):
        num, length, channels = self.data.ys.shape
        observed, given = int(self.data.observed.sum()), int(self.given.sum())
        named = {
            "data": f"{num} trajectories, {length} times, {channels} channels: {observed} values"
            + (f", {given} of them the initial states'" if given else ""),
            "likelihood": in_a_line(self.likelihood),
            "prior": in_a_line(self.prior),
            "next": "fit(model, problem, optimizer, ...) or, of a fitted model, refine(model, problem)",
        }
        return rows(named, "Problem")
        if self.given.shape != (len(data.ys), channels):
            raise LaplodeError(f"`given` must have shape (N, K) = {(len(data.ys), channels)}, got {self.given.shape}.")

    @property
    def prediction_shape(self) -> tuple[int, int]:
        """(T, F): the shape of a model's predictions of one trajectory."""
        _, num_times, channels = self.data.ys.shape
        return num_times, self.likelihood.num_predictions(channels)

    @property
    def observed(self) -> Bool[np.ndarray, "N T K"]:
        """True where a value counts as an observation: it is there, and no given initial state fixes its prediction.

        A first row that the initial states were taken from is met exactly by any parameters, so that it says nothing
        about them or about the noise. `fit`, `refine` and `laplace` mark such values in `given`, since the model
        decides what is seen of a state.
        """
        counts = self.data.observed
        counts[:, 0] &= ~self.given
        return counts

    @property
    def ys(self) -> Float[Array, "N T K"]:
        """The observations, NaN where a value does not count as one."""
        ys = jnp.asarray(self.data.ys, dtype=float)
        return ys.at[:, 0].set(jnp.where(self.given, jnp.nan, ys[:, 0]))

    @property
    def num_observations(self) -> int:
        """M, the number of values that count as observations."""
        return int(np.sum(self.observed))

    @property
    def informed(self) -> Bool[np.ndarray, "N T F"]:
        """True for the predictions of which something was observed."""
        observed = self.observed
        return np.tile(observed, (1, 1, self.prediction_shape[1] // observed.shape[2]))

    @property
    def seen(self) -> Bool[np.ndarray, "N T"]:
        """True for the times at which something was observed."""
        return np.any(self.observed, axis=2)

    def information(self, predictions: Float[Array, "N T F"]) -> Float[Array, "N T F"]:
        """Fisher information of the data in each prediction: 0 where nothing was observed."""
        return _information(self.likelihood, predictions, self.ys)

    def log_likelihood(self, predictions: Float[Array, "N T F"]) -> Float[Array, ""]:
        """log p(Y | predictions) in nats, summed over all observations."""
        return jnp.sum(self.likelihood.log_prob(predictions, self.ys))


@eqx.filter_jit
def _information(likelihood: AbstractLikelihood, predictions: Float[Array, "N T F"], ys: Float[Array, "N T K"]):
    observed = jnp.tile(~jnp.isnan(ys), (1, 1, predictions.shape[2] // ys.shape[2]))
    return jnp.where(observed, likelihood.fisher(predictions, ys), 0)


def _check_distribution(likelihood: AbstractLikelihood, shape: tuple[int, ...]) -> None:
    def batch_shape(prediction):
        found = likelihood.distribution(prediction)
        if not isinstance(found, dist.Distribution):
            raise LaplodeError(
                f"`likelihood` must return a NumPyro distribution, got {type(found).__name__}: write, for example, "
                "lambda prediction: numpyro.distributions.Laplace(prediction, 0.1)."
            )
        if found.event_shape or found.batch_shape != shape:
            raise LaplodeError(
                f"`likelihood` must treat observations one by one: for predictions of shape {shape} its batch shape "
                f"is {found.batch_shape} and its event shape {found.event_shape}. Drop event dimensions (no "
                "`.to_event`)."
            )
        return prediction

    predictions = (*shape[:2], likelihood.num_predictions(shape[2]))
    try:
        jax.eval_shape(batch_shape, jax.ShapeDtypeStruct(predictions, jnp.result_type(float)))
    except LaplodeError:
        raise
    except Exception as error:
        raise LaplodeError(
            f"`likelihood` can't be evaluated on predictions of shape {shape}: {type(error).__name__}: {error}"
        ) from error


def check_problem(problem: Any) -> None:
    """Raise `LaplodeError` unless `problem` is a `Problem`."""
    if not isinstance(problem, Problem):
        raise LaplodeError(f"`problem` must be laplode.Problem(data, likelihood, prior), got {type(problem).__name__}.")


def check_scale(problem: Problem) -> None:
    """Raise `LaplodeError` where the noise scale is the guess from which `fit` is still to learn it."""
    if isinstance(problem.likelihood, AbstractScaleLikelihood) and problem.likelihood.learned:
        raise LaplodeError(
            "`problem` has a noise scale that is still to be learned (learned=True): its value is a first guess. Take "
            "the problem that `fit` returns, which holds the scale found: fit = laplode.fit(model, problem, ...), then "
            "fit.problem. For the value as it is, leave `learned=True` out."
        )

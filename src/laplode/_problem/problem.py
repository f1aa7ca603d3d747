"""Data, likelihood and prior together."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._errors import LaplodeError
from .._late import dist
from .._show import Shown, in_a_line, rows
from .data import Trajectories
from .likelihood import AbstractLikelihood, likelihood_of
from .prior import AbstractPrior, prior_of


class Problem(Shown):
    """Data, likelihood and prior: everything about the inference but the model.

    **Arguments:**

    - `data`: the observed `Trajectories`.
    - `likelihood`: `Gaussian`, `LogNormal`, `StudentT`, `Poisson`, `NegativeBinomial`, `PerChannel` of these, or any
        function from predictions (..., K) to a NumPyro distribution of the same batch shape.
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
        likelihood = likelihood_of("likelihood", likelihood).with_data(data)
        likelihood.check(data.ys)
        if isinstance(prior, AbstractLikelihood | Trajectories | dist.Distribution):
            raise LaplodeError(
                "`prior` must be laplode.GaussianPrior(precision), a precision, or laplode.NamedPriors; got "
                f"{type(prior).__name__}."
            )
        channels = data.ys.shape[-1]
        self.data = data
        self.likelihood = likelihood
        self.prior = prior_of("prior", prior).with_data(data)
        self.given = np.zeros((len(data.ys), channels), bool) if given is None else np.asarray(given, bool)
        if self.given.shape != (len(data.ys), channels):
            raise LaplodeError(f"`given` must have shape (N, K) = {(len(data.ys), channels)}, got {self.given.shape}.")

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

    @property
    def prediction_shape(self) -> tuple[int, int]:
        """(T, F): the shape of a model's predictions of one trajectory."""
        return self.data.ys.shape[1], len(self.channel)

    @property
    def channel(self) -> Int[np.ndarray, " F"]:
        """The channel of each of the predictions at a time: K locations, then the noise scales that are predicted."""
        return np.array(self.likelihood.channel_of(self.data.ys.shape[2]))

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
        return self.observed[..., self.channel]

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
    observed = ~jnp.isnan(ys)[..., np.array(likelihood.channel_of(ys.shape[-1]))]
    return jnp.where(observed, likelihood.fisher(predictions, ys), 0)


def check_problem(problem: Any) -> None:
    """Raise `LaplodeError` unless `problem` is a `Problem`."""
    if not isinstance(problem, Problem):
        raise LaplodeError(f"`problem` must be laplode.Problem(data, likelihood, prior), got {type(problem).__name__}.")


def check_scale(problem: Problem) -> None:
    """Raise `LaplodeError` where the noise scale is the guess from which `fit` is still to learn it."""
    if any(noise is not None and noise.learned for noise in problem.likelihood.noise(problem.data.ys.shape[2])):
        raise LaplodeError(
            "`problem` has a noise scale that is still to be learned (learned=True): its value is a first guess. Take "
            "the problem that `fit` returns, which holds the scale found: fit = laplode.fit(model, problem, ...), then "
            "fit.problem. For the value as it is, leave `learned=True` out."
        )

"""What predictions are."""

import abc
from typing import Any, NoReturn

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._checks import check_fraction
from .._devices import compiled_draws
from .._errors import LaplodeError
from .._problem.likelihood import AbstractLikelihood
from .._show import Shown, rows
from .importance import khat_threshold


class AbstractClosedForm(eqx.Module):
    """What linearized predictions know of their distribution beside draws."""

    @abc.abstractmethod
    def covariance(self) -> Float[Array, "... M M"]:
        """The covariance of the noise-free predictions, computed now."""


class NotSaved(AbstractClosedForm):
    """The closed form of predictions that were read from a file, which doesn't hold it."""

    def covariance(self) -> NoReturn:
        """**Raises:** `LaplodeError`, always."""
        raise LaplodeError(
            "`covariance()` comes from the posterior, which is not in a file of predictions: predict again, or save "
            "the covariance as an array of its own."
        )


def about_draws(predictions: Any) -> dict[str, str]:
    """What is printed of the draws of any predictions."""
    num = len(predictions.ok)
    named = {"draws": f"{num} by method={predictions.method!r}, {num - int(np.sum(predictions.ok))} failed"}
    if predictions.khat is not None:
        named["Pareto k̂"] = f"{predictions.khat:.2f}, good below {khat_threshold(num):.2f}"
    return named


class Predictions(Shown):
    """Trajectories drawn from a posterior.

    - `ts`: times, (N, T).
    - `mean`: the prediction at the posterior mean θ*, (N, T, K); NaN, as are the draws, where there is none, as
        after an event that ends the solve.
    - `f`: draws of the noise-free prediction, (S, N, T, K); NaN where not `ok`.
    - `y`: the same with observation noise, (S, N, T, K).
    - `scale`: where the model predicts the noise scale (or concentration), draws of it, (S, N, T, K), NaN in channels
        whose likelihood has its own; else None.
    - `thetas`: the parameter vectors of the draws, (S, P); of a geodesic draw that did not arrive, the last it reached.
    - `ok`: False for draws that did not arrive or whose solve failed, or that the likelihood can't have (negative under
        LogNormal), (S,).
    - `log_p`, `log_q`: of each draw, the log joint density log p(Y, θ) and the log density it was drawn from, (S,);
        None unless importance weights were asked for. Of resampled draws, `log_q` is that times their weight.
    - `log_weights`, `khat`: Pareto smoothed log importance weights (S,), normalized, and their Pareto k̂ (Vehtari et
        al., 2024): above min(1 − 1/log10(S), 0.7) the draws do not represent the posterior; None unless asked for.
        After resampling the weights are equal, and k̂ is that of the draws before it.
    - `log_likelihood`: of each draw, log p(y | f) of each observation (S, N, T, K), in nats, NaN where it is missing;
        None unless the times and initial states are those of the data.
    - `method`: "linearized", "geodesic", "sampled", or "nuts".
    - `observed_grid`: whether the times and initial states are those of the data.
    - `key`: the random key that was given.
    - `y0`: the initial states of the draws, (S, N, D), where they are uncertain; else None.
    """

    ts: Float[np.ndarray, "N T"]
    mean: Float[Array, "N T K"]
    f: Float[Array, "S N T K"]
    y: Float[Array, "S N T K"]
    scale: Float[Array, "S N T K"] | None
    thetas: Float[Array, "S P"]
    ok: Bool[Array, " S"]
    log_p: Float[Array, " S"] | None
    log_q: Float[Array, " S"] | None
    log_weights: Float[Array, " S"] | None
    khat: float | None
    log_likelihood: Float[Array, "S N T K"] | None
    method: str = eqx.field(static=True)
    observed_grid: bool = eqx.field(static=True)
    _closed_form: AbstractClosedForm | None
    key: PRNGKeyArray | None = None
    y0: Float[Array, "S N D"] | None = None

    def _shown(self):
        trajectories, times, channels = self.mean.shape
        named = {
            "predicted": f"{trajectories} trajectories at {times} times, {channels} channels",
            **about_draws(self),
            "next": "predictions.interval(0.9), plot_trajectories(posterior, predictions), to_datatree(...)",
        }
        return rows(named, "Predictions")

    def interval(self, prob: float = 0.9, *, noise: bool = True) -> tuple[Float[np.ndarray, "N T K"], ...]:
        """The central interval of the draws at each time, each value for itself.

        **Arguments:**

        - `prob`: the probability inside; half of the rest lies below, half above.
        - `noise`: whether it is of observations, `y`, or of the noise-free prediction, `f`.

        **Returns:** its ends `(lower, upper)`, (N, T, K) each, by the quantiles of the draws that are `ok`, equally
        weighted: predict with `resample=True` where they are to be weighted.

        **Raises:** `LaplodeError` when `prob` is not between 0 and 1, or no draw is `ok`.
        """
        check_fraction("prob", prob)
        draws = np.asarray(self.y if noise else self.f)[np.asarray(self.ok)]
        if not len(draws):
            raise LaplodeError("`interval()`: none of the draws has a finite trajectory.")
        lower, upper = np.quantile(draws, [(1 - prob) / 2, (1 + prob) / 2], axis=0)
        return lower, upper

    def covariance(self) -> Float[Array, "N TK TK"]:
        """The joint covariance J Λ⁻¹ Jᵀ over times and channels of each trajectory, (N, T·K, T·K), times outermost.

        In the units of the prediction and to first order in θ − θ*, exact for a linear model. Observation noise is not
        included. Of mixed predictions it is that within each of them and that between them. Of an uncertain initial
        state there is (∂f/∂y0) Cov[y0] (∂f/∂y0)ᵀ more. It is computed at each call, from a Jacobian of its own.

        **Raises:** `LaplodeError` unless the predictions were linearized.
        """
        if self._closed_form is None:
            raise LaplodeError(
                f'`covariance()` is the closed form of method="linearized"; these are draws of method="{self.method}", '
                "whose covariance is that of `.f` over its first axis."
            )
        return self._closed_form.covariance()


def parts(
    likelihood: AbstractLikelihood, predictions: Float[Array, "S N T F"], y: Float[Array, "S N T K"]
) -> dict[str, Any]:
    """`f`, `y` and `scale`, of what the likelihood takes and of what it makes of that."""
    channels, scale = y.shape[-1], None
    predicted = np.array(likelihood.channel_of(channels)[channels:])
    if predicted.size:
        scale = jnp.full_like(y, jnp.nan).at[..., predicted].set(jnp.exp(predictions[..., channels:]))
    return {"f": predictions[..., :channels], "y": y, "scale": scale}


@compiled_draws
def with_noise(
    likelihood: AbstractLikelihood,
    there: Bool[Array, "N T F"],
    predictions: Float[Array, "S N T F"],
    ok: Bool[Array, " S"],
    key: PRNGKeyArray,
):
    """Which draws are trajectories that the likelihood allows, the draws, and the draws with noise.

    Where nothing is `there`, as after an event, all of them are NaN, and draws may be what they like.
    """
    # Where the prediction lies outside of what a likelihood allows, a LogNormal's is negative, its stable form is NaN.
    allowed = jnp.isfinite(predictions) & ~jnp.isnan(likelihood.stabilize(predictions))
    ok = ok & jnp.all(allowed | ~there, axis=(1, 2, 3))
    keep = lambda x: jnp.where(ok[:, None, None, None] & there[..., : x.shape[-1]], x, jnp.nan)
    return ok, keep(predictions), keep(likelihood.sample(key, predictions))


@eqx.filter_jit
def pointwise(likelihood: AbstractLikelihood, predictions: Float[Array, "S N T F"], ys: Float[Array, "N T K"]):
    """log p(y | f) of each draw and observation, (S, N, T, K), in nats; NaN where the observation is missing."""
    return likelihood.log_prob(predictions, ys)

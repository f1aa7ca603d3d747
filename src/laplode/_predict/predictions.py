"""What predictions are."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .._checks import real_array
from .._errors import LaplodeError
from .._problem.likelihood import AbstractLikelihood


class Predictions(eqx.Module):
    """Trajectories drawn from a posterior.

    - `ts`: times, (N, T).
    - `mean`: the prediction at the posterior mean θ*, (N, T, K); of a mixture the weighted mean of its components'.
    - `f`: draws of the noise-free prediction, (S, N, T, K); NaN where not `ok`.
    - `y`: the same with observation noise, (S, N, T, K).
    - `scale`: where the model predicts the noise scale (or concentration), draws of it, (S, N, T, K); else None.
    - `thetas`: the parameter vectors of the draws, (S, P); of a geodesic draw that did not arrive, the last it reached.
    - `component`: which component of a mixture each draw is from, (S,); zeros without one.
    - `ok`: False for draws that did not arrive or whose solve failed, or that the likelihood can't have (negative under
        LogNormal), (S,).
    - `log_p`, `log_q`: of each draw, the log joint density log p(Y, θ) and the log density it was drawn from, (S,);
        None unless importance weights were asked for. Of resampled draws, `log_q` is that times their weight.
    - `log_weights`, `khat`: Pareto smoothed log importance weights (S,), normalized, and their Pareto k̂ (Vehtari et
        al., 2024): above min(1 − 1/log10(S), 0.7) the draws do not represent the posterior; None unless asked for.
        After resampling the weights are equal, and k̂ is that of the draws before it.
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
    component: Int[np.ndarray, " S"]
    ok: Bool[Array, " S"]
    log_p: Float[Array, " S"] | None
    log_q: Float[Array, " S"] | None
    log_weights: Float[Array, " S"] | None
    khat: float | None
    method: str = eqx.field(static=True)
    observed_grid: bool = eqx.field(static=True)
    _root: Float[Array, "N TK R"] | None
    key: PRNGKeyArray | None = None
    y0: Float[Array, "S N D"] | None = None

    @property
    def predictions(self) -> Float[Array, "S N T F"]:
        """`f`, with the logarithms of `scale` after it where there are any: what the likelihood takes."""
        if self.scale is None:
            return self.f
        return jnp.concatenate([self.f, jnp.log(self.scale)], axis=-1)

    def interval(
        self, prob: float = 0.9, *, noise: bool = False
    ) -> tuple[Float[np.ndarray, "N T K"], Float[np.ndarray, "N T K"]]:
        """The ends of the central interval at each time and channel, from the draws that are `ok`.

        **Arguments:**

        - `prob`: how much of the draws it holds, between 0 and 1.
        - `noise`: whether it is of new observations (`y`) instead of the noise-free prediction (`f`).

        **Raises:** `LaplodeError` when `prob` does not lie between 0 and 1.
        """
        if np.ndim(prob) or not 0 < float(real_array("prob", prob)) < 1:
            raise LaplodeError(f"`prob` must lie between 0 and 1, got {prob!r}.")
        draws = np.asarray(self.y if noise else self.f)[np.asarray(self.ok)]
        low, high = np.quantile(draws, [(1 - prob) / 2, (1 + prob) / 2], axis=0)
        return low, high

    def covariance(self) -> Float[Array, "N TK TK"]:
        """The joint covariance J Λ⁻¹ Jᵀ over times and channels of each trajectory, (N, T·K, T·K), times outermost.

        In the units of the prediction and to first order in θ − θ*, exact for a linear model. Observation noise is not
        included. Of a mixture that within its components and that between them. Of an uncertain initial state there
        is (∂f/∂y0) Cov[y0] (∂f/∂y0)ᵀ more.

        **Raises:** `LaplodeError` unless the predictions were linearized.
        """
        if self._root is None:
            raise LaplodeError(
                f'`covariance()` is the closed form of method="linearized"; these are draws of method="{self.method}", '
                "whose covariance is that of `.f` over its first axis."
            )
        return jnp.einsum("nar,nbr->nab", self._root, self._root)


def _parts(predictions: Float[Array, "S N T F"], predictive: Float[Array, "S N T K"]) -> dict[str, Any]:
    channels = predictive.shape[-1]
    log_scale = predictions[..., channels:]
    scale = jnp.exp(log_scale) if log_scale.shape[-1] else None
    return {"f": predictions[..., :channels], "y": predictive, "scale": scale}


@eqx.filter_jit
def with_noise(
    likelihood: AbstractLikelihood, predictions: Float[Array, "S N T F"], ok: Bool[Array, " S"], key: PRNGKeyArray
):
    """Which draws are trajectories that the likelihood allows, the draws, and the draws with noise."""
    # Where the prediction lies outside of what a likelihood allows, a LogNormal's is negative, its stable form is NaN.
    allowed = jnp.isfinite(predictions) & ~jnp.isnan(likelihood.stabilize(predictions))
    ok = ok & jnp.all(allowed, axis=(1, 2, 3))
    keep = lambda x: jnp.where(ok[:, None, None, None], x, jnp.nan)
    return ok, keep(predictions), keep(likelihood.sample(key, predictions))

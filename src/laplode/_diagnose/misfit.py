"""Whether the model can be right, and a covariance that needs less of it to be."""

import itertools
import warnings

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._checks import check_count, check_from
from .._errors import LaplodeError, LaplodeWarning
from .._late import pd
from .._posterior.posterior import Posterior
from .._solve.maps import evaluate, linearize


def sandwich(posterior: Posterior, *, blocks: int = 1) -> Float[Array, "P P"]:
    """The covariance Λ⁻¹ (Σ s sᵀ + Λ0) Λ⁻¹ of the parameters, for a model that may be wrong.

    The scores s are gradients of log p(Y | θ) at θ*, each of a whole unit, such as a trajectory. Within a unit,
    observations may depend on one another in ways that the likelihood does not have, as residuals do of a model that
    leaves something out; units must be independent. Λ0 is the precision of the prior. Where the model is right, this is
    Λ⁻¹ in expectation.

    ```python
    ratio = jnp.sqrt(jnp.diagonal(laplode.sandwich(posterior, blocks=3))) / posterior.marginal_std()
    ```

    **Arguments:**

    - `posterior`: from `laplace`.
    - `blocks`: into how many units, of as many times in a row, each trajectory is cut. A block must be much longer than
        residuals are correlated.

    **Returns:** the covariance, (P, P), in unconstrained coordinates.

    **Raises:** `LaplodeError` when an argument does not fit. Warns (`LaplodeWarning`) with fewer units than directions
    that the data determine: the scores of N units have rank N at most, so that some variances are far too small. Ten
    times as many are a fair number.

    White (1982), "Maximum likelihood estimation of misspecified models".
    """
    check_from("posterior", posterior, Posterior, "laplace")
    problem = posterior.problem
    times = problem.data.ts.shape[1]
    if check_count("blocks", blocks) > times:
        raise LaplodeError(f"`blocks` = {blocks}, but a trajectory has {times} times.")
    predictions, jacobian = linearize(posterior.flow)
    weighted = problem.likelihood.score(predictions, problem.ys)[..., None] * jacobian.reshape(*predictions.shape, -1)
    edges = np.linspace(0, times, blocks + 1).astype(int)
    units = [jnp.sum(weighted[:, a:b], axis=(1, 2)) for a, b in itertools.pairwise(edges)]
    scores = jnp.concatenate(units)
    dof = posterior.diagnostics.effective_dof
    if len(scores) < dof:
        warnings.warn(
            f"`blocks`: the data are {len(scores)} units, and determine {dof:.1f} directions of the parameters: some "
            "variances of the sandwich are far too small. Take more blocks, or Λ⁻¹, posterior.covariance().",
            LaplodeWarning,
            stacklevel=2,
        )
    prior = problem.prior.local(posterior.parameters)
    rows = jnp.concatenate([scores, prior.rows])
    inner = posterior.built.covariance_product(rows)
    covariance = posterior.covariance()
    return inner.T @ inner + (covariance * jnp.maximum(prior.diagonal, 0)) @ covariance


def residual_table(posterior: Posterior) -> "pd.DataFrame":
    """Standardized residuals of each trajectory and channel: when to suspect the model.

    A residual is z = s / √R, s the derivative of log p(y | f) in the prediction f and R its Fisher information: (y − f)
    / σ for Gaussian noise. Of a model that is right, at its optimum, they have mean 0, standard deviation 1 or a little
    less, and follow one another without a pattern.

    **Arguments:**

    - `posterior`: from `laplace`.

    **Returns:** a `pandas.DataFrame`, a row for each trajectory and channel: "trajectory", "channel", "count";
    "mean", "sd" and "largest" (in size) of z; "autocorrelation" r of successive ones, and its "z_score" √(n − 1) r,
    beyond about ±3 of which the residuals are no noise: the model leaves something out, or the noise is correlated.

    **Raises:** `LaplodeError` when `posterior` is none.

    Box and Pierce (1970), "Distribution of residual autocorrelations in autoregressive-integrated moving average time
    series models".
    """
    check_from("posterior", posterior, Posterior, "laplace")
    problem = posterior.problem
    predictions = evaluate(posterior.flow, posterior.mean)
    channels = problem.data.ys.shape[2]
    information = np.asarray(problem.information(predictions))[..., :channels]
    score = np.asarray(problem.likelihood.score(predictions, problem.ys))[..., :channels]
    rows = []
    for trajectory, channel in np.ndindex(len(score), channels):
        one = (trajectory, slice(None), channel)
        seen = information[one] > 0
        z = score[one][seen] / np.sqrt(information[one][seen])
        square = float(np.sum(z**2))
        r = float(np.sum(z[1:] * z[:-1])) / square if len(z) > 1 and square > 0 else np.nan
        deviation = float(np.std(z, ddof=1)) if len(z) > 1 else np.nan
        largest = float(np.max(np.abs(z), initial=0.0))
        mean = float(np.mean(z)) if len(z) else np.nan
        rows.append((trajectory, channel, len(z), mean, deviation, largest, r, np.sqrt(max(len(z) - 1, 0)) * r))
    columns = ["trajectory", "channel", "count", "mean", "sd", "largest", "autocorrelation", "z_score"]
    return pd.DataFrame(rows, columns=columns)  # pyright: ignore[reportArgumentType]

"""How to predict: what a method has to answer, and draws of the parameters by it, weighed against the posterior."""

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._checks import check_count, check_flag, check_from, check_key, check_number, check_x64
from .._errors import LaplodeError, warn
from .._posterior.posterior import Posterior
from .._solve.flows import OfModel
from .grid import Grid
from .importance import importance_weights, khat_threshold, resampled
from .predictions import AbstractClosedForm
from .solves import advice, log_joint


class Proposal(NamedTuple):
    """Draws of θ (S, P), which of them arrived, and, when it is called, the log density that they were drawn from."""

    thetas: Float[Array, "S P"]
    ok: Bool[Array, " S"]
    log_density: Callable[[], Float[Array, " S"]]


class AbstractMethod(eqx.Module):
    """Where draws of θ come from, and what the model predicts at them.

    `weighs` says whether draws are weighed against the true posterior where the user does not say.
    """

    name: ClassVar[str]
    weighs: ClassVar[bool] = True

    @abc.abstractmethod
    def propose(
        self, posterior: Posterior, key: PRNGKeyArray, num: int, *, mesh: Mesh | None, progress: bool
    ) -> Proposal:
        """`num` draws of θ."""

    @abc.abstractmethod
    def trajectories(
        self,
        posterior: Posterior,
        grid: Grid,
        thetas: Float[Array, "S P"],
        states: Float[Array, "S ..."],
        *,
        mesh: Mesh | None,
        progress: bool,
    ) -> tuple[Float[Array, "N T F"], Float[Array, "S N T F"], AbstractClosedForm | None]:
        """Predictions at θ*, at draws of θ and of initial states, and their closed form where there is one."""

    @abc.abstractmethod
    def values(
        self, posterior: Posterior, function: OfModel, thetas: Float[Array, "S P"], *, progress: bool
    ) -> tuple[Float[Array, "S ..."], AbstractClosedForm | None]:
        """A function of the model at draws of θ, and its closed form where there is one."""

    def failure(self, failed: int, num: int) -> str:
        """What to say of draws without a finite trajectory."""
        return f"{failed} of {num} draws have no finite trajectory (`.ok` says which; they are NaN)."


class Draws(NamedTuple):
    """Parameter vectors (S, P), which of them may be used, and what is known of their weights (see `Predictions`)."""

    thetas: Float[Array, "S P"]
    ok: Bool[Array, " S"]
    log_p: Float[Array, " S"] | None
    log_q: Float[Array, " S"] | None
    log_weights: Float[Array, " S"] | None
    khat: float | None


def check_draws(
    posterior: Any, method: AbstractMethod, num_samples: Any, key: Any, weigh: Any, resample: Any
) -> tuple[int, bool]:
    """The number of draws, and whether to weigh them.

    **Raises:** `LaplodeError` when an argument does not fit.
    """
    check_x64()
    check_key("key", key)
    check_from("posterior", posterior, Posterior, "laplace")
    check_flag("resample", resample)
    if weigh is not None:
        check_flag("weigh", weigh)
    if resample and weigh is False:
        raise LaplodeError("`resample` draws by the importance weights, which `weigh`=False leaves out.")
    return check_count("num_samples", num_samples), bool(resample or (method.weighs if weigh is None else weigh))


def draw(
    posterior: Posterior,
    method: AbstractMethod,
    key: PRNGKeyArray,
    num: int,
    *,
    weigh: bool,
    resample: bool,
    mesh: Mesh | None = None,
    progress: bool,
) -> Draws:
    """Draws of θ as `predict` describes them. Warns, for the caller of its caller."""
    key_theta, _, key_resample = jax.random.split(key, 3)
    with advice():
        thetas, ok, log_density = method.propose(posterior, key_theta, num, mesh=mesh, progress=progress)
    if not weigh:
        return Draws(thetas, ok, None, None, None, None)
    log_p = jnp.where(ok, log_joint(posterior, thetas, progress=progress, mesh=mesh), -jnp.inf)
    log_q = log_density()
    log_weights, khat = importance_weights(log_p, log_q)
    _warn_of_weights(khat, resample, posterior, thetas, log_weights)
    if not resample:
        return Draws(thetas, ok, log_p, log_q, log_weights, khat)
    if not jnp.any(jnp.isfinite(log_weights)):
        raise LaplodeError("`resample`: none of the draws has a weight, as the solve failed at every one of them.")
    chosen = resampled(log_weights, key_resample)
    # What they stand for now is q times the weight that each of them had.
    log_q = (log_q + log_weights)[chosen] + math.log(num)
    return Draws(thetas[chosen], ok[chosen], log_p[chosen], log_q, jnp.full(num, -math.log(num)), khat)


def _warn_of_weights(khat: float, resample: bool, posterior: Posterior, thetas: Array, log_weights: Array) -> None:
    threshold = khat_threshold(len(thetas))
    if not khat > threshold:
        return
    remedy = (
        "resampling can't mend that, and a few of them stand for all the others now"
        if resample
        else "their importance weights can't mend it"
    )
    names = ", ".join(_most_moved(posterior, thetas, log_weights))
    warn(
        f"Pareto k̂ = {khat:.2f} is above {threshold:.2f}: as draws of θ, these do not represent the true posterior, "
        f"and {remedy}. The weights would move {names} most: laplode.profile(posterior, name), or of a forecast "
        "laplode.profile(posterior, laplode.trajectory_at(t, channel)), tells what the data allow without a Gaussian.",
        level=4,
    )


# So many parameters are named where weights are bad.
_MOST_NAMED = 3


def _most_moved(posterior: Posterior, thetas: Float[Array, "S P"], log_weights: Float[Array, " S"]) -> list[str]:
    """Parameters whose mean or standard deviation by the weights differs most from that of the Gaussian."""
    used = np.isfinite(np.asarray(log_weights))
    offsets = (np.asarray(thetas)[used] - np.asarray(posterior.mean)) / np.asarray(posterior.marginal_std())
    weights = np.exp(np.asarray(log_weights)[used])
    moved = np.abs(weights @ offsets) + np.abs(np.sqrt(weights @ offsets**2) - 1)
    return [posterior.parameters.name(int(i)) for i in np.argsort(-moved, kind="stable")[:_MOST_NAMED]]


# ---- Draws from the posterior itself, or from the multivariate t distribution of the same center and shape


def check_df(df: Any) -> None:
    """**Raises:** `LaplodeError` unless `df` is None or a positive number."""
    if df is not None:
        check_number("df", df)


def straight(posterior: Posterior, df: float | None, key: PRNGKeyArray, num: int) -> Float[Array, "S P"]:
    """Draws from Normal(θ*, Λ⁻¹), or from the t distribution with `df` degrees of freedom and scale matrix Λ⁻¹."""
    key_theta, key_scale = jax.random.split(jax.random.split(key, 1)[0])
    thetas = posterior.sample(key_theta, num)
    if df is None:
        return thetas
    chi2 = 2 * jax.random.gamma(key_scale, df / 2, (num, 1))
    return posterior.mean + (thetas - posterior.mean) * jnp.sqrt(df / chi2)


def straight_log_density(posterior: Posterior, df: float | None, thetas: Float[Array, "S P"]) -> Float[Array, " S"]:
    """The log density of those, in nats."""
    if df is None:
        return posterior.log_prob(thetas)
    offset, size = thetas - posterior.mean, posterior.size
    quadratic = jnp.sum(offset * posterior.built.precision_product(offset), axis=-1)
    constant = gammaln((df + size) / 2) - gammaln(df / 2) - 0.5 * size * math.log(df * math.pi)
    return constant + 0.5 * posterior.built.log_det - 0.5 * (df + size) * jnp.log1p(quadratic / df)

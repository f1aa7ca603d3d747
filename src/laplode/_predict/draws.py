"""Draws of the parameters from a posterior, and how well they represent it."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln, logsumexp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .._checks import check_count, check_flag, check_key, check_x64
from .._devices import check_mesh
from .._errors import LaplodeError, LaplodeWarning, choose
from .._posterior.posterior import AbstractPosterior, Posterior
from .geodesic import Ends, follow
from .importance import importance_weights, khat_threshold
from .solves import advice, log_joint
from .surface import Surface, log_volume


class _Method(NamedTuple):
    """Whether the model is linearized, and whether θ moves along geodesics."""

    linear: bool
    geodesic: bool


_METHODS = {
    "linearized": _Method(linear=True, geodesic=False),
    "geodesic": _Method(linear=False, geodesic=True),
    "sampled": _Method(linear=False, geodesic=False),
}


class Sampling(NamedTuple):
    """How to draw θ; made by `of`, which checks what the user gave."""

    name: str
    method: _Method
    num_samples: int
    df: float | None
    tolerance: float
    weigh: bool
    resample: bool
    progress: bool
    mesh: Mesh | None = None

    @classmethod
    def of(
        cls,
        posterior: Any,
        method: str,
        num_samples: Any,
        proposal: str,
        df: Any,
        tolerance: Any,
        weigh: bool | None,
        resample: bool,
        progress: bool,
        key: Any,
        mesh: Mesh | None = None,
    ) -> "Sampling":
        """**Raises:** `LaplodeError` when an argument does not fit."""
        check_x64()
        check_key("key", key)
        chosen = choose("method", method, _METHODS)
        heavy = choose("proposal", proposal, {"gaussian": False, "student_t": True})
        if not isinstance(posterior, AbstractPosterior):
            raise LaplodeError(
                f"`posterior` must come from laplode.laplace or laplode.mixture, got {type(posterior).__name__}."
            )
        check_count("num_samples", num_samples)
        check_flag("resample", resample)
        if weigh is not None:
            check_flag("weigh", weigh)
        for name, value in (("df", df), ("tolerance", tolerance)):
            if not isinstance(value, int | float | np.number) or not 0 < value < math.inf:
                raise LaplodeError(f"`{name}` must be a positive number, got {value!r}.")
        if heavy and chosen.linear:
            raise LaplodeError(
                '`proposal`="student_t" is for draws that are weighed against the true posterior: it goes with '
                'method="sampled" or "geodesic". Linearized predictions are Gaussian.'
            )
        if resample and weigh is False:
            raise LaplodeError("`resample` draws by the importance weights, which `weigh`=False leaves out.")
        weigh = not chosen.linear or resample if weigh is None else bool(weigh)
        df, tolerance = float(df) if heavy else None, float(tolerance)
        return cls(method, chosen, int(num_samples), df, tolerance, weigh, bool(resample), progress, check_mesh(mesh))


class Draws(NamedTuple):
    """Parameter vectors (S, P), which of them may be used, and what is known of their weights (see `Predictions`).

    `component` says which component of the posterior each of them is from.
    """

    thetas: Float[Array, "S P"]
    component: Int[np.ndarray, " S"]
    ok: Bool[Array, " S"]
    log_p: Float[Array, " S"] | None
    log_q: Float[Array, " S"] | None
    log_weights: Float[Array, " S"] | None
    khat: float | None


def over_components(function: Callable[..., Any], component: Int[np.ndarray, " S"], *rows: Array) -> Any:
    """function(i, its rows) for each component i that has draws, the results in the order of the draws."""
    present = np.unique(component)
    if len(present) == 1:
        return function(int(present[0]), *rows)
    parts = [function(int(i), *(row[component == i] for row in rows)) for i in present]
    back = np.argsort(np.argsort(component, kind="stable"), kind="stable")
    return jax.tree.map(lambda *some: jnp.concatenate(some)[back], *parts)


def mixed_mean(weights: Float[Array, " C"], means: Sequence[Array]) -> Array:
    """The mean of several distributions."""
    return means[0] if len(means) == 1 else jnp.tensordot(weights, jnp.stack(means), axes=1)


def mixed_root(weights: Float[Array, " C"], means: Sequence[Array], roots: Sequence[Array]) -> Array:
    """A root (…, R) of the covariance of several Gaussians: within each of them, and between them."""
    if len(roots) == 1:
        return roots[0]
    mean, parts = mixed_mean(weights, means), []
    for share, each, root in zip(jnp.sqrt(weights), means, roots, strict=True):
        between = (each - mean).reshape(*root.shape[:-1], 1)
        parts.append(share * jnp.concatenate([root, between], axis=-1))
    return jnp.concatenate(parts, axis=-1)


def draw(posterior: AbstractPosterior, sampling: Sampling, key: PRNGKeyArray) -> Draws:
    """Draws of θ as `predict` describes them. Warns, for the caller of its caller."""
    key_theta, key_choice, key_resample = jax.random.split(key, 3)
    components = posterior.components
    component = posterior.choose(key_choice, sampling.num_samples)
    keys = jax.random.split(key_theta, len(components))
    straight = over_components(
        lambda i, share: _straight(components[i], sampling, keys[i], len(share)), component, jnp.asarray(component)
    )
    thetas, ok, surfaces = straight, jnp.ones(sampling.num_samples, bool), {}
    if sampling.method.geodesic:
        surfaces = {int(i): Surface.of(components[i]) for i in np.unique(component)}

        def along(i, share):
            mean = components[i].mean
            ends = follow(
                surfaces[i], mean, share - mean, sampling.tolerance, progress=sampling.progress, mesh=sampling.mesh
            )
            return jax.tree.map(jnp.asarray, ends)

        with advice():
            ends = over_components(along, component, straight)
        thetas, ok = ends.thetas, ends.ok
        _warn_of_failures(ends)
    if not sampling.weigh:
        return Draws(thetas, component, ok, None, None, None, None)

    joint = lambda i, share: log_joint(components[i], share, progress=sampling.progress, mesh=sampling.mesh)
    log_p = jnp.where(ok, over_components(joint, component, thetas), -jnp.inf)
    if sampling.method.geodesic:

        def density(i, straight, thetas):
            volume = log_volume(surfaces[i], components[i].mean, straight - components[i].mean, thetas)
            return posterior.log_weights[i] + _log_density(components[i], sampling.df, straight) + volume

        log_q = over_components(density, component, straight, thetas)
    else:
        each = jnp.stack([_log_density(c, sampling.df, straight) for c in components], axis=-1)
        log_q = logsumexp(each + posterior.log_weights, axis=-1)
    log_weights, khat = importance_weights(log_p, log_q)
    _warn_of_weights(khat, sampling)
    if not sampling.resample:
        return Draws(thetas, component, ok, log_p, log_q, log_weights, khat)
    if not jnp.any(jnp.isfinite(log_weights)):
        raise LaplodeError("`resample`: none of the draws has a weight, as the solve failed at every one of them.")
    chosen = _resampled(log_weights, key_resample)
    # What they stand for now is q times the weight that each of them had.
    log_q = (log_q + log_weights)[chosen] + math.log(len(chosen))
    equal = jnp.full(len(chosen), -math.log(len(chosen)))
    return Draws(thetas[chosen], component[np.asarray(chosen)], ok[chosen], log_p[chosen], log_q, equal, khat)


def _straight(posterior: Posterior, sampling: Sampling, key: PRNGKeyArray, num: int) -> Float[Array, "S P"]:
    key_theta, key_scale = jax.random.split(key)
    thetas = posterior.sample(key_theta, num)
    if sampling.df is None:
        return thetas
    chi2 = 2 * jax.random.gamma(key_scale, sampling.df / 2, (num, 1))
    return posterior.mean + (thetas - posterior.mean) * jnp.sqrt(sampling.df / chi2)


def _log_density(posterior: Posterior, df: float | None, thetas: Float[Array, "S P"]) -> Float[Array, " S"]:
    """The log density of the Gaussian, or of the t distribution, in nats."""
    return posterior.log_prob(thetas) if df is None else _log_student_t(posterior, df, thetas)


def _log_student_t(posterior: Posterior, df: float, thetas: Float[Array, "S P"]) -> Float[Array, " S"]:
    """The log density of the multivariate t distribution of location θ* and scale matrix Λ⁻¹, in nats."""
    offset, size = thetas - posterior.mean, posterior.size
    quadratic = jnp.sum(offset * posterior.structure.precision_product(offset), axis=-1)
    constant = gammaln((df + size) / 2) - gammaln(df / 2) - 0.5 * size * math.log(df * math.pi)
    return constant + 0.5 * posterior.structure.log_det - 0.5 * (df + size) * jnp.log1p(quadratic / df)


def _resampled(log_weights: Float[Array, " S"], key: PRNGKeyArray) -> Array:
    """Indices of as many draws, by systematic resampling: each as often as its weight says, give or take one.

    Copies stand beside each other, so that an effective sample size sees them.
    """
    num = len(log_weights)
    total = jnp.cumsum(jnp.exp(log_weights))
    marks = (jnp.arange(num) + jax.random.uniform(key)) / num * total[-1]
    return jnp.searchsorted(total, marks, side="right")


def _warn_of_failures(ends: Ends) -> None:
    if np.all(ends.ok):
        return
    warnings.warn(
        f"{np.sum(~ends.ok)} of {len(ends.ok)} geodesic draws did not arrive (`.ok` says which): they were given up "
        f"after {np.max(ends.attempts)} attempted steps, as at the edge of what the model or the likelihood allows.",
        LaplodeWarning,
        stacklevel=4,
    )


def _warn_of_weights(khat: float, sampling: Sampling) -> None:
    threshold = khat_threshold(sampling.num_samples)
    if not khat > threshold:
        return
    remedy = (
        "resampling can't mend that, and a few of them stand for all the others now"
        if sampling.resample
        else "their importance weights can't mend it"
    )
    warnings.warn(
        f"Pareto k̂ = {khat:.2f} is above {threshold:.2f}: as draws of θ, these do not represent the true posterior, "
        f"and {remedy}.",
        LaplodeWarning,
        stacklevel=4,
    )

"""Draws of the parameters from a posterior, and how well they represent it."""

import contextlib
import functools as ft
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from arviz_stats.base import array_stats  # pyright: ignore[reportPrivateImportUsage]
from jax.scipy.special import gammaln, logsumexp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from tqdm.auto import tqdm

from ._curvature import check_x64
from ._errors import LaplodeError, LaplodeWarning, choose
from ._geodesic import Ends, Surface, follow, log_volume
from ._mesh import check_mesh, num_devices, over_rows
from ._model import predict_trajectories, starts
from ._posterior import AbstractPosterior, Posterior
from ._prior import log_prior
from ._problem import check_count, check_flag, check_key
from ._vector import Parameters

# Samples solved together: enough to fill the processor, few enough that a slow one holds up few others.
_BATCH = 64


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
        khat: bool | None,
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
        if khat is not None:
            check_flag("khat", khat)
        for name, value in (("df", df), ("tolerance", tolerance)):
            if not isinstance(value, int | float | np.number) or not 0 < value < math.inf:
                raise LaplodeError(f"`{name}` must be a positive number, got {value!r}.")
        if heavy and chosen.linear:
            raise LaplodeError(
                '`proposal`="student_t" is for draws that are weighed against the true posterior: it goes with '
                'method="sampled" or "geodesic". Linearized predictions are Gaussian.'
            )
        if resample and khat is False:
            raise LaplodeError("`resample` draws by the importance weights, which `khat`=False leaves out.")
        weigh = not chosen.linear or resample if khat is None else bool(khat)
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


def _solve(view: Parameters, ts, y0, args, theta: Float[Array, " P"]) -> Float[Array, "N T K"]:
    model = view.unravel(theta)
    return predict_trajectories(model, ts, starts(model, y0, len(ts)), args)


def solve_at(
    posterior: Posterior, ts, y0, args, thetas: Float[Array, "B P"], mesh: Mesh | None = None
) -> Float[Array, "B N T K"]:
    """Predictions by a solve of its own for each parameter vector; not finite where it failed."""
    # Not of the whole posterior, whose diagnostics are numbers of its own: each would be compiled anew.
    return over_rows(mesh, _solve_at, (posterior.parameters, ts, y0, args), thetas)[0]


@eqx.filter_jit
def _solve_at(shared: tuple[Parameters, Any, Any, Any], thetas: Float[Array, "B P"], _):
    return jax.vmap(ft.partial(_solve, *shared))(thetas), ()


def solve_from(
    posterior: Posterior, ts, args, rows: Float[Array, "B P+ND"], mesh: Mesh | None = None
) -> Float[Array, "B N T K"]:
    """The same where each parameter vector is followed by initial states of its own."""
    states = rows[:, posterior.size :].reshape(len(rows), len(ts), -1)
    return over_rows(mesh, _solve_from, (posterior.parameters, ts, args), (states, rows[:, : posterior.size]))[0]


@eqx.filter_jit
def _solve_from(shared: tuple[Parameters, Any, Any], rows: tuple[Float[Array, "B N D"], Float[Array, "B P"]], _):
    view, ts, args = shared
    return jax.vmap(lambda y0, theta: _solve(view, ts, y0, args, theta))(*rows), ()


@contextlib.contextmanager
def advice():
    """What to do about a model that raises at a draw."""
    try:
        yield
    except eqx.EquinoxRuntimeError as error:
        said = re.search(r"EquinoxRuntimeError: (.*)", str(error))
        raise LaplodeError(
            "`model` raised while solving at a draw from the posterior, which wanders further than a fit does. Let it "
            "return what it has instead, diffrax.diffeqsolve(..., throw=False), so that failed draws can be "
            "counted; or "
            'use method="linearized", which solves at the posterior mean only. It said: '
            f"{said.group(1) if said else error}"
        ) from error


def in_batches(
    function: Callable[[Array], Array], rows: Float[Array, "S P"], label: str | None, mesh: Mesh | None = None
) -> Array:
    """The function of all rows, some at a time: as many on each device of the `mesh` that it spreads them over."""
    num = rows.shape[0]
    batch = min(_BATCH * num_devices(mesh), num)
    results = []
    with advice(), tqdm(total=num, desc=label, unit="draw", disable=label is None) as bar:
        for start in range(0, num, batch):
            first = min(start, num - batch)  # one compiled shape for all
            results.append(function(rows[first : first + batch])[start - first :])
            bar.update(first + batch - start)
    return jnp.concatenate(results)


def log_joint(
    posterior: Posterior, thetas: Float[Array, "S P"], *, progress: bool = False, mesh: Mesh | None = None
) -> Float[Array, " S"]:
    """log p(Y, θ) = log p(Y | θ) + log p(θ) of each parameter vector, in nats; −∞ where its solve failed."""
    data = posterior.problem.data

    def at(thetas):
        predictions = solve_at(posterior, data.ts, data.y0, data.args, thetas, mesh)
        total = jax.vmap(ft.partial(_log_density_of, posterior))(thetas, predictions)
        return jnp.where(jnp.isfinite(total), total, -jnp.inf)

    return in_batches(at, thetas, "Weighing draws" if progress else None, mesh)


def log_joint_at(posterior: Posterior, theta: Float[Array, " P"]) -> Float[Array, ""]:
    """The same of one parameter vector, for transformations, reverse mode too; not finite where its solve failed."""
    data = posterior.problem.data
    return _log_density_of(posterior, theta, _solve(posterior.parameters, data.ts, data.y0, data.args, theta))


def _log_density_of(posterior: Posterior, theta: Float[Array, " P"], predictions: Float[Array, "N T F"]):
    """log p(Y | predictions) + log p(θ)."""
    problem = posterior.problem
    return problem.log_likelihood(predictions) + log_prior(problem.prior, posterior.parameters, theta)


# Fewer draws than these have no tail to which a Pareto distribution could be fitted.
_FEWEST_TO_SMOOTH = 25


def importance_weights(log_p: Float[Array, " S"], log_q: Float[Array, " S"]) -> tuple[Float[Array, " S"], float]:
    """Pareto smoothed log weights of draws from q under p, normalized to sum to 1, and their Pareto k̂.

    A draw whose solve failed has weight 0: it is known to be no trajectory of the model. Of fewer than 25 draws the
    weights are not smoothed, and k̂ is infinite.
    """
    ratios = np.asarray(log_p - log_q, dtype=float)
    finite = np.isfinite(ratios)
    weights = np.full(ratios.shape, -np.inf)
    if np.sum(finite) < _FEWEST_TO_SMOOTH:
        weights[finite] = ratios[finite] - np.logaddexp.reduce(ratios[finite], initial=-np.inf)
        return jnp.asarray(weights), float("inf")
    # Weights equal to rounding have no tail to fit: they are as good as they can be.
    if np.ptp(ratios[finite]) < 1e-6:
        weights[finite] = -np.log(np.sum(finite))
        return jnp.asarray(weights), float("-inf")
    with np.errstate(all="ignore"):
        smoothed, khat = array_stats.psislw(-ratios[finite])  # it takes the log-likelihoods of leave-one-out
    # Where all weight is on a few draws, what is left of the others is zero to rounding, and no tail can be fitted.
    if not np.all(np.isfinite(smoothed)) or np.isnan(khat):
        smoothed, khat = ratios[finite], float("inf")
    # Of a tail of index k the largest of S weights is about S^k times the mean. Where it is far less, what was fitted
    # is no tail, but the edge of a crowd of nearly equal weights.
    num = np.sum(finite)
    largest = (np.max(ratios[finite]) - np.logaddexp.reduce(ratios[finite]) + np.log(num)) / np.log(num)
    if khat > largest and largest < khat_threshold(num) / 2:
        smoothed, khat = ratios[finite], largest
    weights[finite] = smoothed - np.logaddexp.reduce(smoothed)
    return jnp.asarray(weights), float(khat)


def khat_threshold(num_samples: int) -> float:
    """The k̂ above which S importance weights cannot be trusted: min(1 − 1/log10(S), 0.7)."""
    return min(1 - 1 / np.log10(max(num_samples, 2)), 0.7)

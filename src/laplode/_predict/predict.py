"""Trajectories from a posterior: linearized, or by solving again at draws of its parameters."""

import dataclasses
import functools as ft
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._algebra.structure import AbstractStructure, over_columns
from .._devices import num_devices
from .._errors import LaplodeWarning
from .._posterior.posterior import AbstractPosterior, Posterior
from .._problem.likelihood import AbstractLikelihood
from .._solve.maps import flow, linearize
from .draws import Sampling, draw, mixed_mean, mixed_root, over_components
from .geodesic import TOLERANCE
from .grid import Grid
from .predictions import Predictions, _parts, with_noise
from .solves import in_batches, solve_at, solve_from
from .start import UncertainStart, sensitivity

# Bytes of Jacobian held at once: that of a few trajectories, where parameters are many.
_JACOBIAN_BYTES = 2**28


def predict(
    posterior: AbstractPosterior,
    ts: Any,
    y0: Any = None,
    args: PyTree = None,
    *,
    method: str = "linearized",
    num_samples: int = 1000,
    key: PRNGKeyArray,
    proposal: str = "gaussian",
    df: float = 5.0,
    tolerance: float = TOLERANCE,
    weigh: bool | None = None,
    resample: bool = False,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> Predictions:
    """Trajectories at `ts` under the posterior.

    **Arguments:**

    - `posterior`: from `laplace` or `mixture`.
    - `ts`: times, shape (T,) or (N, T), strictly increasing. Without a new `y0` they may start later than the data, but
        not earlier.
    - `y0`: initial states at ts[:, 0], shape (N, D), or a NumPyro distribution of them where they are uncertain:
        independent numbers of batch shape (N, D), or vectors of batch shape (N,) and event shape (D,), independent of
        θ and of one another. None continues the observed trajectories, from their own initial
        states at their own first times, with their own `args`.
    - `args`: as in `Trajectories`, for new initial states.
    - `method`: "linearized": y = f(θ*) + J (θ − θ*), in the coordinate in which the likelihood's information is
        constant (log for LogNormal, so that draws stay positive); the recommended one. "geodesic": the ODE is solved at
        draws of θ that keep to the data: each follows, to second order, the geodesic that leaves θ* with a velocity
        drawn from the posterior; for a neural field it takes about a hundred Jacobians a draw. "sampled": the ODE is
        solved at each draw of θ, which is right only where the posterior is tight.
    - `num_samples`: S.
    - `key`: a JAX random key.
    - `proposal`: what θ, or the geodesic's velocity, is drawn from: "gaussian", or "student_t", the multivariate t
        distribution with `df` degrees of freedom and scale matrix Λ⁻¹, whose tails cover more.
    - `df`: degrees of freedom of "student_t".
    - `tolerance`: of geodesic draws, in posterior standard deviations: the search for one ends where its next step
        would be shorter, or the last has gained less than this squared, in nats.
    - `weigh`: whether to weigh the draws against the true posterior, which takes a solve of the data's trajectories for
        each. By default for all but "linearized".
    - `resample`: whether to return draws resampled by their smoothed weights, equally weighted, some of them repeated.
        Sensible where `khat` is low.
    - `mesh`: devices that share the solves, as in `laplace`: of the trajectories where these are linearized, of the
        draws where they are solved again or weighed.
    - `progress`: whether to show a progress bar.

    **Returns:** `Predictions`.

    **Raises:** `LaplodeError` when an argument does not fit. Warns (`LaplodeWarning`) when solves or geodesic
    draws failed or k̂ is high.

    The metric G = Λ0 + Jᵀ R J is that of the surface X(θ) = (Λ0^½ θ, R^½ g(θ)), where g is the prediction of the data
    in the coordinate in which its Fisher information R is constant, J = ∂g/∂θ, and Λ0 the prior's precision. For a
    user's own distribution, which names no such coordinate, R is that at θ*. With v from the posterior, a geodesic draw
    is the point of the surface nearest to X(θ*) + X'(θ*) v: a projective retraction, which has the geodesic's velocity
    and acceleration at θ*. It is found by Levenberg-Marquardt steps while the target moves along this line. The density
    is
    log q(θ) = log q(v) + log |det (X'ᵀ X' + Σ r_i X_i'')| − log |det X'(θ)ᵀ X'(θ*)|, r = X(θ) − X(θ*) − X'(θ*) v,
    from which the sum is left out where there are more than 32 parameters. In a mixture it is that of the component
    that the line started from.

    Immer, Korzepa and Bauer (2021), "Improving predictions of Bayesian neural nets via local linearization"; Yu et al.
    (2024), "Riemannian Laplace approximation with the Fisher metric"; Absil and Malick (2012), "Projection-like
    retractions on matrix manifolds"; Vehtari et al. (2024), "Pareto smoothed
    importance sampling".
    """
    sampling = Sampling.of(
        posterior, method, num_samples, proposal, df, tolerance, weigh, resample, progress, key, mesh
    )
    start = UncertainStart.of(y0) if isinstance(y0, dist.Distribution) else None
    grid = dataclasses.replace(Grid.of(posterior, ts, y0 if start is None else start.mean, args), start=start)
    key_theta, key_noise, key_start = jax.random.split(key, 3)
    draws = draw(posterior, sampling, key_theta)
    states = grid.draw_states(key_start, num_samples)
    trajectories = _linearized if sampling.method.linear else _solves
    keys = jax.random.split(key_noise, len(posterior.components))
    means, roots = {}, {}

    def part(i, thetas, ok, states):
        component = posterior.components[i]
        mean, predictions, roots[i] = trajectories(component, grid, thetas, states, sampling)
        means[i] = mean[..., : component.problem.data.ys.shape[2]]
        return with_noise(component.problem.likelihood, predictions, ok, keys[i])

    ok, predictions, predictive = over_components(part, draws.component, draws.thetas, draws.ok, states)
    for i in set(range(len(posterior.components))) - set(means):  # too light for a draw
        part(i, draws.thetas[:1], draws.ok[:1], states[:1])
    means, roots = ([of[i] for i in sorted(of)] for of in (means, roots))
    root = mixed_root(posterior.weights, means, roots) if sampling.method.linear else None
    result = Predictions(
        ts=grid.ts,
        mean=mixed_mean(posterior.weights, means),
        **_parts(predictions, predictive),
        thetas=draws.thetas,
        component=draws.component,
        ok=ok,
        log_p=draws.log_p,
        log_q=draws.log_q,
        log_weights=draws.log_weights,
        khat=draws.khat,
        method=method,
        observed_grid=grid.observed,
        _root=root,
        key=key,
        y0=None if start is None else states,
    )
    _warn(int(jnp.sum(draws.ok & ~ok)), len(ok))
    return result


def predict_at(
    posterior: Posterior,
    grid: "Grid",
    thetas: Float[Array, "S P"],
    *,
    method: str,
    key: PRNGKeyArray,
    progress: bool = True,
) -> Predictions:
    """Solves at parameter vectors that are given, with noise."""
    mean, predictions, _ = _solved(posterior, grid, thetas, jnp.zeros((len(thetas), 0)), progress)
    ok = jnp.ones(len(thetas), bool)
    ok, predictions, predictive = with_noise(posterior.problem.likelihood, predictions, ok, key)
    return Predictions(
        ts=grid.ts,
        mean=mean[..., : predictive.shape[-1]],
        **_parts(predictions, predictive),
        thetas=thetas,
        component=np.zeros(len(thetas), int),
        ok=ok,
        log_p=None,
        log_q=None,
        log_weights=None,
        khat=None,
        method=method,
        observed_grid=grid.observed,
        _root=None,
        key=key,
    )


def _linearized(posterior: Posterior, grid: Grid, thetas: Float[Array, "S P"], states: Array, sampling: Sampling):
    around = flow(posterior.parameters, grid.solve_ts, grid.y0, grid.args)
    num, channels = around.num_trajectories, posterior.problem.data.ys.shape[2]
    row_bytes = 8 * posterior.size * grid.ts.shape[1] * posterior.problem.prediction_shape[1]
    together = min(max(_JACOBIAN_BYTES // row_bytes, num_devices(sampling.mesh)), num)
    parts = []
    for start in range(0, num, together):
        first = min(start, num - together)  # one compiled shape for all
        some = slice(first, first + together)
        mean, jacobian = linearize(around.part(some), mesh=sampling.mesh)
        root = _covariance_root(posterior.structure, jacobian, mean.shape, channels, grid.skip)
        shift = jnp.zeros(())
        if grid.start is not None:
            by_state = sensitivity(around.part(some))
            shift = jnp.einsum("ntfd,snd->sntf", by_state, states[:, some] - grid.start.mean[some])
            spread = by_state[:, :, :channels] @ grid.start.root[some, None]
            root = jnp.concatenate([root, spread.reshape(*root.shape[:2], -1)], axis=-1)
        epistemic = _linear_draws(posterior.problem.likelihood, mean, jacobian, posterior.mean, thetas, shift)
        new = start - first
        parts.append((mean[new:, grid.skip :], epistemic[:, new:, grid.skip :], root[new:]))
        del jacobian
    means, draws, roots = zip(*parts, strict=True)
    return jnp.concatenate(means), jnp.concatenate(draws, axis=1), jnp.concatenate(roots)


@eqx.filter_jit
def _linear_draws(
    likelihood: AbstractLikelihood, mean, jacobian: Float[Array, "N*T*F P"], center: Float[Array, " P"], thetas, shift
) -> Float[Array, "S N T F"]:
    # stabilize is elementwise, so its derivative is a scale.
    stabilized, scale = jax.jvp(likelihood.stabilize, (mean,), (jnp.ones_like(mean),))
    add = lambda total, take: total + (take(thetas) - take(center)) @ take(jacobian).T
    change = over_columns(add, jnp.zeros((len(thetas), len(jacobian))), center.size)
    moved = change.reshape(-1, *mean.shape) + shift
    # What no parameter moves stays: where it is 0, its stabilized value and the derivative may be infinite.
    return jnp.where(moved == 0, mean, likelihood.unstabilize(stabilized + scale * moved))


@eqx.filter_jit
def _covariance_root(
    structure: AbstractStructure, jacobian, shape: tuple[int, ...], channels: int, skip: int
) -> Float[Array, "N TK TK"]:
    """A root of J Λ⁻¹ Jᵀ for each trajectory, of the locations."""
    num, num_times, _ = shape
    rows = jacobian.reshape(*shape, -1)[:, skip:, :channels].reshape(num, (num_times - skip) * channels, -1)

    def root(i):
        covariance = structure.predictive_covariance(rows[i])
        eigenvalues, vectors = jnp.linalg.eigh((covariance + covariance.T) / 2)
        return vectors * jnp.sqrt(jnp.maximum(eigenvalues, 0))

    return jax.lax.map(root, jnp.arange(num))


def _solves(posterior: Posterior, grid: Grid, thetas: Float[Array, "S P"], states: Array, sampling: Sampling):
    return _solved(posterior, grid, thetas, states, sampling.progress, sampling.mesh)


def _solved(
    posterior: Posterior,
    grid: Grid,
    thetas: Float[Array, "S P"],
    states: Array,
    progress: bool,
    mesh: Mesh | None = None,
):
    rows = jnp.concatenate([posterior.mean[None], thetas])  # one program for the mean and the draws
    solve = ft.partial(solve_at, posterior, grid.solve_ts, grid.y0, grid.args, mesh=mesh)
    if grid.start is not None:
        states = jnp.concatenate([grid.start.mean[None], states]).reshape(len(rows), -1)
        rows = jnp.concatenate([rows, states], axis=1)
        solve = ft.partial(solve_from, posterior, grid.solve_ts, grid.args, mesh=mesh)
    solved = in_batches(solve, rows, "Solving at draws" if progress else None, mesh)[:, :, grid.skip :]
    return solved[0], solved[1:], None


def _warn(failed: int, num: int) -> None:
    if failed:
        warnings.warn(
            f"{failed} of {num} draws have no finite trajectory (`.ok` says which; they are NaN): they reach "
            'parameters at which the ODE blows up. method="linearized" does not solve at draws.',
            LaplodeWarning,
            stacklevel=3,
        )

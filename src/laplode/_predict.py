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
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from ._draws import Sampling, draw, in_batches, mixed_mean, mixed_root, over_components, solve_at, solve_from
from ._errors import LaplodeError, LaplodeWarning
from ._geodesic import TOLERANCE
from ._mesh import num_devices
from ._model import predicted_shape
from ._posterior import AbstractPosterior, Posterior
from ._problem import AbstractLikelihood, check_args, check_initial_state, check_solvable, check_times
from ._solve import flow, linearize
from ._start import UncertainStart, sensitivity
from ._structure import AbstractStructure, over_columns

# Bytes of Jacobian held at once: that of a few trajectories, where parameters are many.
_JACOBIAN_BYTES = 2**28


class Predictions(eqx.Module):
    """Trajectories drawn from a posterior.

    - `ts`: times, (N, T).
    - `mean`: the prediction at the posterior mean θ*, (N, T, K); of a mixture the weighted mean of its components'.
    - `epistemic`: draws of the noise-free prediction, (S, N, T, K); NaN where not `ok`.
    - `predictive`: the same with observation noise, (S, N, T, K).
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
    epistemic: Float[Array, "S N T K"]
    predictive: Float[Array, "S N T K"]
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
        """`epistemic`, with the logarithms of `scale` after it where there are any: what the likelihood takes."""
        if self.scale is None:
            return self.epistemic
        return jnp.concatenate([self.epistemic, jnp.log(self.scale)], axis=-1)

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
                "whose covariance is that of `.epistemic` over its first axis."
            )
        return jnp.einsum("nar,nbr->nab", self._root, self._root)


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
    khat: bool | None = None,
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
    - `khat`: whether to weigh the draws against the true posterior, which takes a solve of the data's trajectories for
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
    sampling = Sampling.of(posterior, method, num_samples, proposal, df, tolerance, khat, resample, progress, key, mesh)
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


def _parts(predictions: Float[Array, "S N T F"], predictive: Float[Array, "S N T K"]) -> dict[str, Any]:
    channels = predictive.shape[-1]
    log_scale = predictions[..., channels:]
    scale = jnp.exp(log_scale) if log_scale.shape[-1] else None
    return {"epistemic": predictions[..., :channels], "predictive": predictive, "scale": scale}


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


class Grid(eqx.Module):
    """Where to predict. `skip` leading times only carry the solve from the initial state to the first time wanted.

    Where there is a `start`, `y0` is its mean.
    """

    ts: Float[np.ndarray, "N T"]
    solve_ts: Float[np.ndarray, "N skip+T"]
    y0: Float[np.ndarray, "N D"] | None
    args: PyTree
    skip: int = eqx.field(static=True)
    observed: bool = eqx.field(static=True)
    start: UncertainStart | None = None

    def draw_states(self, key: PRNGKeyArray, num: int) -> Float[Array, "S ..."]:
        """Initial states, (S, N, D); (S, 0) where they are known."""
        return jnp.zeros((num, 0)) if self.start is None else self.start.sample(key, num)

    @classmethod
    def of(cls, posterior: AbstractPosterior, ts: Any, y0: Any, args: PyTree) -> "Grid":
        data = posterior.problem.data
        ts = check_times("ts", ts)
        if y0 is not None:
            check_solvable("ts", ts)
            num = ts.shape[0] if ts.ndim == 2 else (np.shape(y0)[0] if np.ndim(y0) > 1 else 1)
            y0 = check_initial_state("y0", y0, num)
            if data.y0 is not None and y0.shape[1] != data.y0.shape[1]:
                raise LaplodeError(f"`y0` has D = {y0.shape[1]} states, but the data's y0 has {data.y0.shape[1]}.")
            if args is None and data.args is not None:
                raise LaplodeError("`args` is missing: the data came with args, so new initial states need theirs.")
            ts, args = np.broadcast_to(ts, (num, ts.shape[-1])).copy(), check_args("args", args, num)
            try:
                predicted_shape(posterior.parameters.model, ts, y0, args)
            except Exception as error:
                raise LaplodeError(
                    f"`y0` with D = {y0.shape[1]} states, or the `args` that go with it, do not fit the model: "
                    f"{type(error).__name__}: {error}"
                ) from error
            return cls(ts, ts, y0, args, 0, False)
        if args is not None:
            raise LaplodeError(
                "`args` is for new initial states: give `y0` with it, or leave both to continue the data."
            )
        num = data.ts.shape[0]
        if ts.ndim == 2 and ts.shape[0] != num:
            raise LaplodeError(
                f"`ts` has {ts.shape[0]} rows, but the data has N = {num} trajectories. For other trajectories give "
                "their initial states as `y0`."
            )
        ts = np.broadcast_to(ts, (num, ts.shape[-1])).copy()
        start = data.ts[:, :1]
        if np.any(ts[:, :1] < start):
            i = int(np.argmax(ts[:, 0] < start[:, 0]))
            raise LaplodeError(
                f"`ts` of trajectory {i} starts at {ts[i, 0]:g}, before its initial state at {start[i, 0]:g}. "
                "Start later, or give the state at ts[:, 0] as `y0`."
            )
        observed = ts.shape == data.ts.shape and bool(np.all(ts == data.ts))
        if np.all(ts[:, :1] == start):
            check_solvable("ts", ts)
            return cls(ts, ts, data.y0, data.args, 0, observed)
        if np.any(ts[:, :1] == start):
            raise LaplodeError(
                "`ts` starts at the initial time of some trajectories and later in others: start all of them at their "
                "initial times, or all later."
            )
        return cls(ts, np.concatenate([start, ts], axis=1), data.y0, data.args, 1, False)


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

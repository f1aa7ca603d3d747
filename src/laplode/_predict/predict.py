"""Trajectories from a posterior."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .._devices import check_mesh
from .._errors import strategy, warn
from .._late import dist
from .._posterior.posterior import Posterior
from .._problem.likelihood import AbstractLikelihood
from .check_grid import check_fits, check_forcing, check_reached, check_steps
from .geodesic import Geodesic
from .grid import Grid
from .linearized import Linearized
from .method import AbstractMethod, Draws, check_draws, draw
from .predictions import AbstractClosedForm, Predictions, parts, pointwise, with_noise
from .sampled import Sampled
from .start import UncertainStart

# What a string stands for.
METHODS = {"linearized": Linearized, "geodesic": Geodesic, "sampled": Sampled}


def predict(
    posterior: Posterior,
    ts: Any,
    y0: Any = None,
    args: PyTree = None,
    *,
    scale: Any = None,
    method: str | AbstractMethod = "linearized",
    num_samples: int = 1000,
    key: PRNGKeyArray,
    weigh: bool | None = None,
    resample: bool = False,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> Predictions:
    """Trajectories at `ts` under the posterior.

    **Arguments:**

    - `posterior`: from `laplace`.
    - `ts`: times, shape (T,) or (N, T), strictly increasing. Without a new `y0` they may start later than the data, but
        not earlier.
    - `y0`: initial states at ts[:, 0], shape (N, D), or a NumPyro distribution of them where they are uncertain:
        independent numbers of batch shape (N, D), or vectors of batch shape (N,) and event shape (D,), independent of
        θ and of one another. None continues the observed trajectories, from their own initial
        states at their own first times, with their own `args`.
    - `args`: as in `Trajectories`, for new initial states.
    - `scale`: the noise scale of the values predicted, a scalar, (K,) or (N, T, K), in the units of that of the
        likelihood. For a likelihood that knows it for each observed value only.
    - `method`: where the draws come from. `Linearized()`, "linearized" for short: the model to first order around θ*;
        the recommended one. `Geodesic()`, "geodesic": the ODE is solved at draws of θ that keep to the data.
        `Sampled()`, "sampled": the ODE is solved at each draw of θ.
    - `num_samples`: S.
    - `key`: a JAX random key.
    - `weigh`: whether to weigh the draws against the true posterior, which takes a solve of the data's trajectories for
        each. By default for all but linearized ones.
    - `resample`: whether to return draws resampled by their smoothed weights, equally weighted, some of them repeated.
        Sensible where `khat` is low.
    - `mesh`: devices that share the solves, as in `laplace`: of the trajectories where these are linearized, of the
        draws where they are solved again or weighed.
    - `progress`: whether to show a progress bar.

    **Returns:** `Predictions`.

    **Raises:** `LaplodeError` when an argument does not fit, or so many draws are more than memory holds. Warns
    (`LaplodeWarning`) when solves or geodesic draws failed, k̂ is high, the model ends before the last time, an
    interpolated forcing is asked for beyond its times, or a model's steps depend on the times asked for.

    Immer, Korzepa and Bauer (2021), "Improving predictions of Bayesian neural nets via local linearization"; Vehtari et
    al. (2024), "Pareto smoothed importance sampling".
    """
    how: AbstractMethod = strategy("method", method, AbstractMethod, METHODS)
    num_samples, weigh = check_draws(posterior, how, num_samples, key, weigh, resample)
    mesh = check_mesh(mesh)
    start = UncertainStart.of(y0) if isinstance(y0, dist.Distribution) else None
    grid = dataclasses.replace(Grid.of(posterior, ts, y0 if start is None else start.mean, args), start=start)
    likelihood = grid.likelihood(posterior, scale)
    check_fits(posterior, grid, num_samples)
    check_forcing(posterior, grid)
    key_theta, key_noise, key_start = jax.random.split(key, 3)
    draws = draw(posterior, how, key_theta, num_samples, weigh=weigh, resample=resample, mesh=mesh, progress=progress)
    states = grid.draw_states(key_start, num_samples)
    mean, predictions, closed_form = how.trajectories(
        posterior, grid, draws.thetas, states, mesh=mesh, progress=progress
    )
    found = _predictions(
        *(posterior, likelihood, grid, draws, mean, predictions, closed_form),
        key_noise=jax.random.split(key_noise, 1)[0],
        method=how.name,
        key=key,
        y0=None if start is None else states,
    )
    check_reached(grid, found)
    check_steps(posterior, grid, found)
    failed = int(jnp.sum(draws.ok & ~found.ok))
    if failed:
        warn(how.failure(failed, num_samples))
    return found


def predict_at(
    posterior: Posterior,
    grid: Grid,
    thetas: Float[Array, "S P"],
    *,
    likelihood: AbstractLikelihood,
    method: str,
    key: PRNGKeyArray,
    progress: bool = True,
) -> Predictions:
    """Solves at parameter vectors that are given, with noise."""
    mean, predictions, _ = Sampled().trajectories(
        posterior, grid, thetas, grid.draw_states(key, len(thetas)), mesh=None, progress=progress
    )
    draws = Draws(thetas, jnp.ones(len(thetas), bool), None, None, None, None)
    there = jnp.ones(mean.shape, bool)  # every draw is to be finite everywhere
    return _predictions(
        *(posterior, likelihood, grid, draws, mean, predictions, None),
        key_noise=key,
        method=method,
        key=key,
        there=there,
    )


def _predictions(
    posterior: Posterior,
    likelihood: AbstractLikelihood,
    grid: Grid,
    draws: Draws,
    mean: Float[Array, "N T F"],
    predictions: Float[Array, "S N T F"],
    closed_form: AbstractClosedForm | None,
    *,
    key_noise: PRNGKeyArray,
    method: str,
    key: PRNGKeyArray,
    y0: Float[Array, "S N D"] | None = None,
    there: Bool[Array, "N T F"] | None = None,
) -> Predictions:
    problem = posterior.problem
    there = jnp.isfinite(mean) if there is None else there
    ok, predictions, y = with_noise(likelihood, there, predictions, draws.ok, key_noise)
    return Predictions(
        ts=grid.ts,
        mean=jnp.where(there, mean, jnp.nan)[..., : y.shape[-1]],
        **parts(likelihood, predictions, y),
        **draws._replace(ok=ok)._asdict(),  # pyright: ignore[reportArgumentType]
        log_likelihood=pointwise(problem.likelihood, predictions, problem.ys) if grid.observed else None,
        method=method,
        observed_grid=grid.observed,
        _closed_form=closed_form,
        key=key,
        y0=y0,
    )

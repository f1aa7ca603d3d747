"""Draws along geodesics of the posterior's metric, which keep to the data where straight lines leave them.

The metric Λ0 + Jᵀ R J is that of a surface: the parameters in units of the prior, Λ0^½ (θ − θ*), beside the predictions
in units of the noise, R^½ g(θ), where g is the prediction in the coordinate in which its information R is constant. A
draw leaves θ* along a straight line in the surface's tangent plane, and is the point of the surface nearest to the
line's end. That agrees with the geodesic to second order (a projective retraction), but what is left of errors on the
way doesn't count: one is found by optimization, with no step that has to be as short as the surface is curved.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import os
import re
import threading
import warnings
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from .._devices import compiled, everywhere, num_devices, over_rows
from .._errors import LaplodeWarning
from .._fit.trust_region import MOST_BENT, bent
from .._progress import tqdm
from .method import Proposal, check_df, check_number, straight, straight_log_density
from .sampled import AbstractSolved
from .surface import Surface, _damped_solve, _num_predictions, _Origin, _solved, log_volume


class Geodesic(AbstractSolved):
    """The ODE solved at draws of θ that keep to the data.

    Each follows, to second order, the geodesic that leaves θ* with a velocity drawn from the posterior. For a neural
    field a draw takes about a hundred Jacobians.

    **Arguments:**

    - `tolerance`: in posterior standard deviations: the search for a draw ends where its next step would be shorter, or
        the last has gained less than this squared, in nats.
    - `df`: None for velocities from the posterior; or the degrees of freedom of the multivariate t distribution with
        scale matrix Λ⁻¹ to draw them from instead, whose tails cover more: for draws that are weighed.

    **Raises:** `LaplodeError` when a number is not positive.

    The metric G = Λ0 + Jᵀ R J is that of the surface X(θ) = (Λ0^½ θ, R^½ g(θ)), where g is the prediction of the data
    in the coordinate in which its Fisher information R is constant, J = ∂g/∂θ, and Λ0 the prior's precision. For a
    user's own distribution, which names no such coordinate, R is that at θ*. With v from the posterior, a geodesic draw
    is the point of the surface nearest to X(θ*) + X'(θ*) v: a projective retraction, which has the geodesic's velocity
    and acceleration at θ*. It is found by Levenberg-Marquardt steps while the target moves along this line. The density
    is
    log q(θ) = log q(v) + log |det (X'ᵀ X' + Σ r_i X_i'')| − log |det X'(θ)ᵀ X'(θ*)|, r = X(θ) − X(θ*) − X'(θ*) v,
    from which the sum is left out where there are more than 32 parameters.

    Yu et al. (2024), "Riemannian Laplace approximation with the Fisher metric"; Absil and Malick (2012),
    "Projection-like retractions on matrix manifolds".
    """

    tolerance: float = 0.3
    df: float | None = None

    name: ClassVar[str] = "geodesic"

    def __check_init__(self):
        check_number("tolerance", self.tolerance)
        check_df(self.df)

    def propose(self, posterior, key, num, *, mesh, progress):
        ends = straight(posterior, self.df, key, num)
        surface, mean = Surface.of(posterior), posterior.mean
        found = follow(surface, mean, ends - mean, self.tolerance, progress=progress, mesh=mesh)
        thetas = jnp.asarray(found.thetas)
        _warn_of_failures(found)

        def log_density():
            return straight_log_density(posterior, self.df, ends) + log_volume(surface, mean, ends - mean, thetas)

        return Proposal(thetas, jnp.asarray(found.ok), log_density)


# Draws that a worker looks for together at most, and the bytes of Jacobians that all of them may take.
_LANES = 16


_LANE_BYTES = 2**28


# Where few are left, so many times fewer are computed, down to so few.
_NARROWER, _FEWEST_LANES = 4, 4


_MOST_WORKERS = 8


# Attempted steps between two looks at which draws have arrived; Jacobians are of one grid of steps in between.
_ATTEMPTS = 8


# A draw is given up after so many attempted steps.
_MOST_ATTEMPTS = 500


# By how much the target moves along its line before each step, at first, as a part of the line.
_FIRST = 0.02


# How the target's speed changes: after a step that was kept and hardly bent, and after one that was not kept.
_FASTER, _SLOWER = 2.0, 0.7


# Below this part of its length a step is hardly bent.
_HARDLY_BENT = 0.1


# Damping after a rejected step, at least.
_LEAST_DAMPING = 1e-2


class Ends(NamedTuple):
    """The draws (S, P), how many attempted steps each took, and which arrived.

    Of those that didn't the last point that was reached.
    """

    thetas: Float[np.ndarray, "S P"]
    attempts: Int[np.ndarray, " S"]
    ok: Bool[np.ndarray, " S"]


class _Lane(eqx.Module):
    """A draw under way: a point of the surface, its place in the space around it, and the line that it follows.

    The target is at the part `reached` of the line, and moves on by `stage` next.
    """

    theta: Float[Array, " P"]
    seen: Float[Array, " M+R"]
    line_theta: Float[Array, " P"]
    line_seen: Float[Array, " M+R"]
    reached: Float[Array, ""]
    stage: Float[Array, ""]
    damping: Float[Array, ""]
    attempts: Int[Array, ""]
    arrived: Bool[Array, ""]


@compiled
def _start(shared: tuple[Surface, _Origin], velocities: Float[Array, "S P"], _):
    surface, origin = shared
    tangent = surface.tangent(origin.theta)

    def one(velocity):
        line = velocity * surface.root_prior
        zero = jnp.zeros(())
        first = jnp.asarray(_FIRST)
        count, arrived = jnp.zeros((), int), jnp.zeros((), bool)
        return _Lane(origin.theta, origin.seen, line, tangent @ line, zero, first, zero, count, arrived)

    return jax.vmap(one)(velocities), ()


def _attempt(surface: Surface, origin: _Origin, lane: _Lane) -> _Lane:
    """A damped Gauss-Newton step, bent by its geodesic acceleration, to the nearest point of a target on the line.

    It is kept if it comes nearer by a solve of its own: on a frozen grid steps find where its solution is wrong.
    """
    reached = jnp.minimum(lane.reached + lane.stage, 1.0)
    # From the target to a point, in both coordinates.
    off = lambda theta, seen: (
        (theta - origin.theta) * surface.root_prior - reached * lane.line_theta,
        seen - origin.seen - reached * lane.line_seen,
    )
    distance = lambda at: 0.5 * (at[0] @ at[0] + at[1] @ at[1])
    here = off(lane.theta, lane.seen)
    tangent = surface.tangent(lane.theta)
    solve = _damped_solve(tangent, 1 + lane.damping)
    gradient = here[0] + here[1] @ tangent
    step = -solve(gradient)
    ratio, moved = jnp.zeros(()), step
    if surface.bends:
        moved, ratio = bent(step, -solve(surface.bend(lane.theta, step / surface.root_prior) @ tangent), 1.0)
    theta = lane.theta + moved / surface.root_prior
    seen = surface.solved(theta)
    gained = distance(here) - distance(off(theta, seen))
    # Outside of what a model or a likelihood allows nothing is finite, and the comparison fails.
    kept = (gained >= 0) & (ratio < MOST_BENT)
    # At least the squared length, along the surface, of the step without damping.
    left = -(1 + lane.damping) * (gradient @ step)
    near = jnp.minimum(left, jnp.where(kept, gained, jnp.inf)) < origin.tolerance**2
    faster = near | (kept & (ratio < _HARDLY_BENT))
    select = lambda choice, new, old: jax.tree.map(lambda a, b: jnp.where(choice, a, b), new, old)
    theta, seen, reached = select(kept, (theta, seen, reached), (lane.theta, lane.seen, lane.reached))
    new = dataclasses.replace(
        lane,
        theta=theta,
        seen=seen,
        reached=reached,
        stage=lane.stage * jnp.where(faster, _FASTER, jnp.where(kept, 1.0, _SLOWER)),
        damping=jnp.where(kept, lane.damping / 4, jnp.maximum(4 * lane.damping, _LEAST_DAMPING)),
        attempts=lane.attempts + 1,
        arrived=(reached >= 1) & near,
    )
    return select(lane.arrived, lane, new)


@compiled
def _advance(shared: tuple[Surface, _Origin], lanes: _Lane, _):
    surface, origin = shared

    def one(lane):
        local = surface.renewed(lane.theta)
        return jax.lax.scan(lambda lane, _: (_attempt(local, origin, lane), None), lane, length=_ATTEMPTS)[0]

    return jax.vmap(one)(lanes), ()


def follow(
    surface: Surface,
    mean: Float[Array, " P"],
    velocities: Float[Array, "S P"],
    tolerance: float,
    *,
    progress: bool,
    mesh: Mesh | None = None,
) -> Ends:
    """The draws whose lines leave `mean` at `velocities` for unit time.

    Many at once, and no slow one holds up the rest: whenever some have ended, others take their places; when none are
    left to start, those under way move together. Spread over the devices of the `mesh`, or over the cores.
    """
    num, size = velocities.shape
    # An array, so that another tolerance is not compiled anew.
    origin = _Origin(mean, _solved(surface, mean), jnp.asarray(tolerance, dtype=float))
    shared = everywhere(mesh, (surface, origin))
    workers = _num_workers(surface, num, mesh)
    together = min(_LANES, max(1, _LANE_BYTES // surface.lane_bytes(_num_predictions(surface)) // workers))
    together *= num_devices(mesh)
    most = 2 ** min(int(math.log2(together)), math.ceil(math.log2(math.ceil(num / workers))))
    thetas, attempts, ok = np.empty((num, size)), np.zeros(num, int), np.zeros(num, bool)
    waiting = collections.deque(range(num))
    compiled, compiling, stopped = set(), threading.Lock(), threading.Event()

    def call(function, rows, width):
        # Each program is compiled once, for a width, not by each worker.
        with contextlib.nullcontext() if (function, width) in compiled else compiling:
            found = over_rows(mesh, function, shared, rows)[0]
            compiled.add((function, width))
        return jax.tree.map(np.array, found)

    take = lambda tree, rows: jax.tree.map(lambda x: x[rows], tree)

    def search(bar):
        width = most
        # Shapes stay the same, so that few are compiled.
        pad = lambda rows: np.concatenate([rows, np.zeros(width - len(rows), int)])
        draws, lanes = np.zeros(0, int), None  # whose search is in each lane
        while not stopped.is_set():
            new = []
            while waiting and len(draws) + len(new) < width:
                with contextlib.suppress(IndexError):  # another worker was faster
                    new.append(waiting.popleft())
            if new:
                fresh = take(call(_start, velocities[pad(np.array(new))], width), slice(len(new)))
                lanes = fresh if lanes is None else jax.tree.map(lambda a, b: np.concatenate([a, b]), lanes, fresh)
                draws = np.concatenate([draws, new])
            if not len(draws):
                return
            while width > _FEWEST_LANES and len(draws) <= width // _NARROWER:
                width //= _NARROWER
            lanes = take(call(_advance, take(lanes, pad(np.arange(len(draws)))), width), slice(len(draws)))
            ended = lanes.arrived | (lanes.attempts >= _MOST_ATTEMPTS)
            done = draws[ended]
            thetas[done], attempts[done], ok[done] = lanes.theta[ended], lanes.attempts[ended], lanes.arrived[ended]
            bar.update(len(done))
            draws, lanes = draws[~ended], take(lanes, ~ended)

    with tqdm(total=num, desc="Geodesics", unit="draw", disable=not progress) as bar:
        if workers == 1:
            search(bar)
        else:
            with concurrent.futures.ThreadPoolExecutor(workers) as pool:
                searches = [pool.submit(search, bar) for _ in range(workers)]
                try:
                    for each in searches:
                        each.result()
                except BaseException:  # such as Ctrl-C: the others need not go on
                    stopped.set()
                    raise
    return Ends(thetas, attempts, ok)


# Operations of which XLA's processor backend makes tasks that wait for one another, see `_cholesky`.
_FACTORS = re.compile(r"= (lu|cholesky|triangular_solve|qr|geqrf|householder_product|svd|eigh?|schur)[ \[]")


def _num_workers(surface: Surface, num: int, mesh: Mesh | None) -> int:
    """Small operations one after another keep one core of a processor busy: others are given searches of their own."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = min(cores, _MOST_WORKERS, num // _FEWEST_LANES)
    # Implicit solvers factor matrices, and a model of one's own may have one.
    if mesh is not None or jax.default_backend() != "cpu" or surface.route != "sensitivity" or most < 2:
        return 1
    solve = jax.make_jaxpr(surface.flow.solved)(surface.flow.parameters.vector)
    return 1 if _FACTORS.search(str(solve)) else most


def _warn_of_failures(ends: Ends) -> None:
    if np.all(ends.ok):
        return
    warnings.warn(
        f"{np.sum(~ends.ok)} of {len(ends.ok)} geodesic draws did not arrive (`.ok` says which): they were given up "
        f"after {np.max(ends.attempts)} attempted steps, as at the edge of what the model or the likelihood allows.",
        LaplodeWarning,
        stacklevel=5,
    )

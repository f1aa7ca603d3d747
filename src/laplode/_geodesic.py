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
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from tqdm.auto import tqdm

from ._curvature import free_bytes
from ._errors import LaplodeError
from ._mesh import everywhere, num_devices, over_rows
from ._posterior import Posterior
from ._prior import prior_rows, prior_vectors
from ._problem import AbstractLikelihood
from ._solve import AbstractFlow, evaluate, flow, has_second_pushforward, jacobian_route

# How near to the nearest point is near enough, in posterior standard deviations.
TOLERANCE = 0.3

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

# A step is bent by at most this part of its length (Transtrum and Sethna, 2012); below the other it is hardly bent.
_MOST_BENT = 0.75
_HARDLY_BENT = 0.1

# Room for more steps of the solve than it takes at θ*, as a part of those.
_SPARE = 0.25

# Up to so many parameters the density of draws is exact, at the price of this number squared of tangents.
_FEW = 32

# Damping after a rejected step, at least.
_LEAST_DAMPING = 1e-2


class Surface(eqx.Module):
    """θ ↦ (Λ0^½ (θ − θ*), R^½ g(θ)), of which M are observed predictions; `root_information` is R^½.

    R is constant for every likelihood that names the coordinate g; for others it is taken at θ*. Derivatives are of
    the frozen grid of `flow`. What the prior's precision has beside its diagonal, Xᵀ X, is as that of more observations
    X θ: `prior_rows` is X.
    """

    flow: AbstractFlow
    likelihood: AbstractLikelihood
    observed: Int[Array, " M"]
    root_information: Float[Array, " M"]
    root_prior: Float[Array, " P"]
    prior_rows: Float[Array, "R P"]
    route: str = eqx.field(static=True)
    bends: bool = eqx.field(static=True)  # whether the model has the second derivatives that steps are bent by

    @classmethod
    def of(cls, posterior: Posterior) -> "Surface":
        """The surface around a posterior's mean.

        **Raises:** `LaplodeError` when memory holds no Jacobian.
        """
        problem, data = posterior.problem, posterior.problem.data
        around = flow(posterior.parameters, data.ts, data.y0, data.args, spare=_SPARE)
        predictions = evaluate(around, posterior.mean)
        observed = jnp.asarray(np.flatnonzero(problem.informed))
        surface = cls(
            flow=around,
            likelihood=problem.likelihood,
            observed=observed,
            root_information=_root_information(
                problem.likelihood, predictions, problem.information(predictions), observed
            ),
            root_prior=jnp.sqrt(prior_vectors(problem.prior, posterior.parameters)[1]),
            prior_rows=prior_rows(problem.prior, posterior.parameters),
            route=jacobian_route(around),
            bends=has_second_pushforward(around),
        )
        needed, free = surface.lane_bytes(predictions.size), free_bytes()
        if needed > free:
            raise LaplodeError(
                f'`method`="geodesic" holds the Jacobian of the data in every parameter, '
                f"about {needed / 2**30:.3g} GiB for {predictions.size} predictions and P = {posterior.size}; "
                f"{free / 2**30:.3g} GiB are free. Take "
                'method="linearized", or a part of the parameters with `where` in laplode.laplace.'
            )
        return surface

    def lane_bytes(self, num_predictions: int) -> int:
        """What one geodesic takes, with so many predictions, observed or not."""
        size, num = self.root_prior.size, self.observed.size + self.prior_rows.shape[0]
        return 8 * ((num_predictions + 2 * num) * size + 3 * min(num, size) ** 2)

    def seen(self, theta: Float[Array, " P"], predictions: Float[Array, "N T K"]) -> Float[Array, " M+R"]:
        """R^½ g where something was observed, and X θ after it."""
        # Where nothing was observed g may be infinite, as the logarithm of 0 is: these are left out, not weighted by 0.
        stable = self.likelihood.stabilize(predictions).ravel()[self.observed]
        return jnp.concatenate([self.root_information * stable, self.prior_rows @ theta])

    def solved(self, theta: Float[Array, " P"]) -> Float[Array, " M+R"]:
        """The same by a solve of its own."""
        return self.seen(theta, self.flow.solved(theta))

    def renewed(self, theta: Float[Array, " P"]) -> "Surface":
        """The same surface, with derivatives on the grid of steps that the solve at θ takes."""
        return eqx.tree_at(lambda s: s.flow, self, self.flow.renewed(theta))

    def tangent(self, theta: Float[Array, " P"]) -> Float[Array, "M+R P"]:
        """A = R^½ ∂g/∂θ Λ0^-½, and X Λ0^-½ below it."""
        predictions, jacobian = self.flow.linearized(theta, self.route)
        _, scale = jax.jvp(self.likelihood.stabilize, (predictions,), (jnp.ones_like(predictions),))
        seen = (self.root_information * scale.ravel()[self.observed])[:, None] * jacobian[self.observed]
        return jnp.concatenate([seen, self.prior_rows]) / self.root_prior

    def bend(self, theta: Float[Array, " P"], direction: Float[Array, " P"]) -> Float[Array, " M+R"]:
        """The second derivative of what is seen along a direction of θ."""
        at = lambda theta: self.seen(theta, self.flow(theta))
        push = lambda theta: jax.jvp(at, (theta,), (direction,))[1]
        return jax.jvp(push, (theta,), (direction,))[1]

    def log_volume(self, origin: "_Origin", start: Float[Array, "M+R P"], line: Float[Array, " P"], theta):
        """log |det dv/dθ| of a draw θ and the `line` v (P,) that it is the end of; `start` is the tangent A at θ*."""
        surface = self.renewed(theta)
        tangent = surface.tangent(theta)
        num, size = tangent.shape
        small = num < size and not self.is_exact  # the smaller side
        product = lambda other: jnp.eye(num if small else size) + (other @ tangent.T if small else tangent.T @ other)
        metric = product(tangent)
        if self.is_exact:
            white = line * self.root_prior
            off_theta = (theta - origin.theta) * self.root_prior - white
            off_seen = surface.solved(theta) - origin.seen - start @ white
            # Where the search has ended a little early, the part of it along the surface isn't zero yet.
            normal = off_seen - tangent @ jnp.linalg.solve(metric, off_theta + off_seen @ tangent)
            along = lambda theta: normal @ surface.seen(theta, surface.flow(theta))
            metric += jax.jacfwd(jax.jacfwd(along))(theta) / jnp.outer(self.root_prior, self.root_prior)
        return jnp.linalg.slogdet(metric)[1] - jnp.linalg.slogdet(product(start))[1]

    @property
    def is_exact(self) -> bool:
        """Whether the density of draws takes second derivatives in all pairs of parameters into account."""
        return self.bends and self.root_prior.size <= _FEW


@eqx.filter_jit
def log_volume(
    surface: Surface, mean: Float[Array, " P"], lines: Float[Array, "S P"], thetas: Float[Array, "S P"]
) -> Float[Array, " S"]:
    """log |det dv/dθ| of draws, v where a line ends: how much wider they lie in v than in θ.

    The nearest point has X'(θ)ᵀ r = 0, r = X(θ) − X(θ*) − X'(θ*) v. Differentiated, that is

        (X'(θ)ᵀ X'(θ) + Σ_i r_i X_i''(θ)) dθ = X'(θ)ᵀ X'(θ*) dv,

    of which the sum over second derivatives is left out where there are more than a few parameters.
    """
    start = surface.tangent(mean)
    origin = _Origin(mean, surface.solved(mean), jnp.zeros(()))
    return jax.lax.map(lambda each: surface.log_volume(origin, start, *each), (lines, thetas))


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


class _Origin(eqx.Module):
    """Where all lines begin, and what ends the search."""

    theta: Float[Array, " P"]
    seen: Float[Array, " M+R"]
    tolerance: Float[Array, ""]


@eqx.filter_jit
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
    ratio, bent = jnp.zeros(()), step
    if surface.bends:
        bend = surface.bend(lane.theta, step / surface.root_prior)
        acceleration = -solve(bend @ tangent)
        ratio = jnp.linalg.norm(acceleration) / (jnp.linalg.norm(step) + jnp.finfo(float).tiny)
        bent = step + 0.5 * acceleration
    theta = lane.theta + bent / surface.root_prior
    seen = surface.solved(theta)
    gained = distance(here) - distance(off(theta, seen))
    # Outside of what a model or a likelihood allows nothing is finite, and the comparison fails.
    kept = (gained >= 0) & (ratio < _MOST_BENT)
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


# One matrix after another: XLA's processor backend factors those of many lanes in tasks that wait for one another in
# its thread pool, and where several programs do so at once, all threads wait forever.
@jax.custom_batching.sequential_vmap
def _cholesky(matrix):
    return jnp.linalg.cholesky(matrix)


@jax.custom_batching.sequential_vmap
def _cholesky_solve(factor, right):
    return jsl.cho_solve((factor, True), right)


def _damped_solve(tangent: Float[Array, "M+R P"], ridge: Float[Array, ""]):
    """v ↦ (ridge + Aᵀ A)⁻¹ v, on the smaller side."""
    num, size = tangent.shape
    gram = tangent @ tangent.T if num < size else tangent.T @ tangent
    factor = _cholesky(ridge * jnp.eye(len(gram)) + gram)
    inner = lambda v: _cholesky_solve(factor, v)
    if num < size:
        return lambda v: (v - inner(tangent @ v) @ tangent) / ridge
    return inner


@eqx.filter_jit
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


@eqx.filter_jit
def _root_information(likelihood: AbstractLikelihood, predictions: Array, information: Array, observed: Array):
    """In the coordinate in which the likelihood is stable."""
    _, scale = jax.jvp(likelihood.stabilize, (predictions,), (jnp.ones_like(predictions),))
    return jnp.sqrt((information / scale**2).ravel()[observed])


@eqx.filter_jit
def _solved(surface: Surface, theta: Float[Array, " P"]) -> Float[Array, " M+R"]:
    return surface.solved(theta)


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


def _num_predictions(surface: Surface) -> int:
    return math.prod(jax.eval_shape(surface.flow, surface.flow.parameters.vector).shape)

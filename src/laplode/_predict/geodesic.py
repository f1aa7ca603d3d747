"""Draws along geodesics of the posterior's metric, which keep to the data where straight lines leave them.

The metric Λ0 + Jᵀ R J is that of a surface: the parameters in units of the prior, Λ0^½ (θ − θ*), beside the predictions
in units of the noise, R^½ g(θ), where g is the prediction in the coordinate in which its information R is constant. A
draw leaves θ* along a straight line in the surface's tangent plane, and is the point of the surface nearest to the
line's end. That agrees with the geodesic to second order (a projective retraction), but what is left of errors on the
way doesn't count: one is found by optimization, with no step that has to be as short as the surface is curved.
"""

import math
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from .._checks import check_number
from .._devices import compiled, everywhere, num_devices, over_rows
from .._errors import warn
from .._fit.trust_region import MOST_BENT, bent
from .._progress import tqdm
from .method import Proposal, check_df, straight, straight_log_density
from .sampled import AbstractSolved
from .surface import Origin, Surface, damped_solve, log_volume


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
        surface, origin = Surface.of(posterior, self.tolerance)
        lines = ends - posterior.mean
        found = follow(surface, origin, lines, progress=progress, mesh=mesh)
        thetas = jnp.asarray(found.thetas)
        _warn_of_failures(found)

        def log_density():
            return straight_log_density(posterior, self.df, ends) + log_volume(surface, origin, lines, thetas)

        return Proposal(thetas, jnp.asarray(found.ok), log_density)


# Bytes of Jacobians that draws looked for together take, and the most of such draws.
_TOGETHER_BYTES, _MOST_TOGETHER = 2**24, 256


# A draw is given up after so many Jacobians.
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
    """The draws (S, P), how many Jacobians each took, and which arrived.

    Of those that didn't the last point that was reached.
    """

    thetas: Float[np.ndarray, "S P"]
    attempts: Int[np.ndarray, " S"]
    ok: Bool[np.ndarray, " S"]


class _Lane(eqx.Module):
    """A draw under way: a point of the surface, its place in the space around it, and the line that it follows.

    `grid` is what the solve at the point chose. The target is at the part `reached` of the line, and moves on by
    `stage` next.
    """

    theta: Float[Array, " P"]
    seen: Float[Array, " MR"]
    grid: tuple[Array, ...]
    line_theta: Float[Array, " P"]
    line_seen: Float[Array, " MR"]
    reached: Float[Array, ""]
    stage: Float[Array, ""]
    damping: Float[Array, ""]
    attempts: Int[Array, ""]
    arrived: Bool[Array, ""]


def _attempt(surface: Surface, origin: Origin, lane: _Lane) -> _Lane:
    """A damped Gauss-Newton step, bent by its geodesic acceleration, to the nearest point of a target on the line.

    It is kept if it comes nearer by a solve of its own: on a frozen grid steps find where its solution is wrong.
    """
    local = surface.on(lane.grid)
    tangent = local.tangent(lane.theta)
    # Lines begin in the tangent plane at θ*, where each draw takes its first Jacobian.
    line_seen = jnp.where(lane.attempts == 0, tangent @ lane.line_theta, lane.line_seen)
    reached = jnp.minimum(lane.reached + lane.stage, 1.0)
    # From the target to a point, in both coordinates.
    off = lambda theta, seen: (
        (theta - origin.theta) * surface.root_prior - reached * lane.line_theta,
        seen - origin.seen - reached * line_seen,
    )
    distance = lambda at: 0.5 * (at[0] @ at[0] + at[1] @ at[1])
    here = off(lane.theta, lane.seen)
    solve = damped_solve(tangent, 1 + lane.damping)
    gradient = here[0] + here[1] @ tangent
    step = -solve(gradient)
    bend = local.bend(lane.theta, lane.seen, step, tangent @ step)
    moved, ratio = bent(step, -solve(bend @ tangent), 1.0)
    theta = lane.theta + moved / surface.root_prior
    there, seen = surface.renewed(theta)
    gained = distance(here) - distance(off(theta, seen))
    # Outside of what a model or a likelihood allows nothing is finite, and the comparison fails.
    kept = (gained >= 0) & (ratio < MOST_BENT)
    # At least the squared length, along the surface, of the step without damping.
    left = -(1 + lane.damping) * (gradient @ step)
    near = jnp.minimum(left, jnp.where(kept, gained, jnp.inf)) < origin.tolerance**2
    faster = near | (kept & (ratio < _HARDLY_BENT))
    theta, seen, grid, reached = jax.tree.map(
        lambda new, old: jnp.where(kept, new, old),
        (theta, seen, there.flow.grid, reached),
        (lane.theta, lane.seen, lane.grid, lane.reached),
    )
    return _Lane(
        *(theta, seen, grid, lane.line_theta, line_seen, reached),
        stage=lane.stage * jnp.where(faster, _FASTER, jnp.where(kept, 1.0, _SLOWER)),
        damping=jnp.where(kept, lane.damping / 4, jnp.maximum(4 * lane.damping, _LEAST_DAMPING)),
        attempts=lane.attempts + 1,
        arrived=(reached >= 1) & near,
    )


@compiled
def _advance(shared: tuple[Surface, Origin], lanes: _Lane, _):
    surface, origin = shared
    return jax.vmap(lambda lane: _attempt(surface, origin, lane))(lanes), ()


def follow(
    surface: Surface,
    origin: Origin,
    velocities: Float[Array, "S P"],
    *,
    progress: bool,
    mesh: Mesh | None = None,
) -> Ends:
    """The draws whose lines leave `origin` at `velocities` for unit time.

    Many are looked for at once, each device of the `mesh` with some of them. Whenever one has ended, another takes its
    place, so that no slow one holds up the rest.
    """
    num, size = velocities.shape
    together = max(1, min(_TOGETHER_BYTES // surface.lane_bytes(), _MOST_TOGETHER)) * num_devices(mesh)
    width = 2 ** min(int(math.log2(together)), math.ceil(math.log2(num)))
    lines = np.asarray(velocities * surface.root_prior)
    start = _Lane(
        origin.theta,
        origin.seen,
        surface.flow.grid,
        line_theta=jnp.zeros(size),
        line_seen=jnp.zeros_like(origin.seen),
        reached=jnp.zeros(()),
        stage=jnp.asarray(_FIRST),
        damping=jnp.zeros(()),
        attempts=jnp.zeros((), int),
        arrived=jnp.zeros((), bool),
    )
    fresh = jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], width, axis=0), start)
    lanes = jax.tree.map(np.copy, fresh)
    shared = everywhere(mesh, (surface, origin))
    thetas, attempts, ok = np.empty((num, size)), np.zeros(num, int), np.zeros(num, bool)
    draws = np.full(width, num)  # the draw that each lane follows; `num` where it follows none
    begun = ended = 0
    with tqdm(total=num, desc="Geodesics", unit="draw", disable=not progress) as bar:
        while ended < num:
            free = np.flatnonzero(draws == num)[: num - begun]
            draws[free] = np.arange(begun, begun + len(free))
            for old, new in zip(jax.tree.leaves(lanes), jax.tree.leaves(fresh), strict=True):
                old[free] = new[free]
            lanes.line_theta[free] = lines[draws[free]]
            lanes = jax.tree.map(np.array, over_rows(mesh, _advance, shared, lanes)[0])
            done = np.flatnonzero((draws < num) & (lanes.arrived | (lanes.attempts >= _MOST_ATTEMPTS)))
            found = draws[done]
            thetas[found], attempts[found], ok[found] = lanes.theta[done], lanes.attempts[done], lanes.arrived[done]
            draws[done] = num
            begun, ended = begun + len(free), ended + len(done)
            bar.update(len(done))
    return Ends(thetas, attempts, ok)


def _warn_of_failures(ends: Ends) -> None:
    if np.all(ends.ok):
        return
    warn(
        f"{np.sum(~ends.ok)} of {len(ends.ok)} geodesic draws did not arrive (`.ok` says which): they were given up "
        f"after {np.max(ends.attempts)} attempted steps, as at the edge of what the model or the likelihood allows.",
        level=5,
    )

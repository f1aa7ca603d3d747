"""Geodesics of the posterior's metric: draws that keep to the data where straight lines leave them.

The metric Λ0 + Jᵀ R J is that of a surface: the parameters in units of the prior, Λ0^½ (θ − θ*), beside the predictions
in units of the noise, R^½ g(θ), where g is the prediction in the coordinate in which its information R is constant. A
geodesic moves along this surface and accelerates only normal to it, so that predictions follow lines that are as
straight as the model allows. All is computed, and errors are measured, on the surface.
"""

import math
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree
from tqdm.auto import tqdm

from ._curvature import free_bytes
from ._errors import LaplodeError
from ._mesh import everywhere, num_devices, over_rows
from ._posterior import Posterior
from ._prior import prior_rows, prior_vectors
from ._problem import AbstractLikelihood
from ._solve import AbstractFlow, evaluate, has_second_pushforward, jacobian_route

# Error allowed in a step, in posterior standard deviations.
TOLERANCE = 0.1

# Geodesics followed together at most, and the bytes of Jacobians that they may take.
_LANES = 64
_LANE_BYTES = 2**28

# Attempted steps between two looks at which geodesics have ended.
_ATTEMPTS = 8

# A geodesic is given up after so many attempted steps, or when a step is shorter than this part of its length.
_MOST_ATTEMPTS = 1000
_SHORTEST = 1e-6

# Length of the first step, which costs little to be wrong.
_FIRST = 0.05


class Surface(eqx.Module):
    """θ ↦ (Λ0^½ (θ − θ*), R^½ g(θ)), of which M are observed predictions; `root_information` is R^½.

    R is constant for every likelihood that names the coordinate g; for others it is taken at θ*. The solve is on
    the frozen grid of θ*. What the prior's precision has beside its diagonal, Xᵀ X, is as that of more observations
    X θ: `prior_rows` is X.
    """

    flow: AbstractFlow
    likelihood: AbstractLikelihood
    observed: Int[Array, " M"]
    root_information: Float[Array, " M"]
    root_prior: Float[Array, " P"]
    prior_rows: Float[Array, "R P"]
    route: str = eqx.field(static=True)

    @classmethod
    def of(cls, posterior: Posterior) -> "Surface":
        """The surface around a posterior's mean.

        **Raises:** `LaplodeError` when the model can't be differentiated forward twice, or memory holds no Jacobian.
        """
        around, problem = posterior.flow, posterior.problem
        if not has_second_pushforward(around):
            raise LaplodeError(
                '`method`="geodesic" differentiates the model forward twice, which it does not allow, as with '
                "Diffrax's default adjoint. Change the line\n    diffrax.diffeqsolve(...)\nto\n"
                "    diffrax.diffeqsolve(..., adjoint=diffrax.DirectAdjoint())\n(its values stay the same), or build "
                'the model as laplode.NeuralODE(vector_field), or take method="linearized".'
            )
        predictions = evaluate(around, posterior.mean)
        _, scale = jax.jvp(problem.likelihood.stabilize, (predictions,), (jnp.ones_like(predictions),))
        information = problem.information(predictions) / scale**2
        observed = jnp.flatnonzero(problem.informed)
        surface = cls(
            flow=around,
            likelihood=problem.likelihood,
            observed=observed,
            root_information=jnp.sqrt(information.ravel()[observed]),
            root_prior=jnp.sqrt(prior_vectors(problem.prior, posterior.parameters)[1]),
            prior_rows=prior_rows(problem.prior, posterior.parameters),
            route=jacobian_route(around),
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

    def predict(self, theta: Float[Array, " P"]) -> tuple[Float[Array, " M+R"], Float[Array, "N T K"]]:
        """R^½ g(θ) where something was observed, X θ after it, and all predictions as they are."""
        predictions = self.flow(theta)
        # Where nothing was observed g may be infinite, as the logarithm of 0 is: these are left out, not weighted by 0.
        seen = self.root_information * self.likelihood.stabilize(predictions).ravel()[self.observed]
        return jnp.concatenate([seen, self.prior_rows @ theta]), predictions

    def tangent(self, theta: Float[Array, " P"], predictions: Float[Array, "N T K"]) -> Float[Array, "M+R P"]:
        """A = R^½ ∂g/∂θ Λ0^-½, and X Λ0^-½ below it."""
        _, scale = jax.jvp(self.likelihood.stabilize, (predictions,), (jnp.ones_like(predictions),))
        jacobian = self.flow.linearized(theta, self.route)[1][self.observed]
        seen = (self.root_information * scale.ravel()[self.observed])[:, None] * jacobian
        return jnp.concatenate([seen, self.prior_rows]) / self.root_prior

    def acceleration(self, theta: Float[Array, " P"], velocity: Float[Array, " P"]):
        """Of a geodesic through θ, in both coordinates of the surface (P,) and (M,); `velocity` is dθ."""
        push = lambda at: jax.jvp(self.predict, (at,), (velocity,))
        ((_, predictions), _), (_, (bend, _)) = jax.jvp(push, (theta,), (velocity,))
        tangent = self.tangent(theta, predictions)
        num, size = tangent.shape
        if num < size:
            lean = -tangent.T @ _solve(tangent @ tangent.T, bend)
        else:
            lean = -_solve(tangent.T @ tangent, tangent.T @ bend)
        return lean, bend + tangent @ lean

    def log_det(self, theta: Float[Array, " P"]) -> Float[Array, ""]:
        """log det(Λ0 + Jᵀ R J) − log det Λ0 at θ."""
        tangent = self.tangent(theta, self.flow(theta))
        num, size = tangent.shape
        gram = tangent @ tangent.T if num < size else tangent.T @ tangent
        return 2 * jnp.sum(jnp.log(jnp.diagonal(jnp.linalg.cholesky(jnp.eye(len(gram)) + gram))))


def _solve(gram: Float[Array, "A A"], right: Float[Array, " A"]) -> Float[Array, " A"]:
    return jsl.solve(jnp.eye(len(gram)) + gram, right, assume_a="pos")


@eqx.filter_jit
def log_volume(surface: Surface, mean: Float[Array, " P"], thetas: Float[Array, "S P"]) -> Float[Array, " S"]:
    """½ (log det G(θ) − log det G(θ*)), G the metric: how much narrower the surface is in θ than at the mean."""
    at = jax.lax.map(surface.log_det, jnp.concatenate([mean[None], thetas]))
    return 0.5 * (at[1:] - at[0])


class Geodesics(NamedTuple):
    """Where geodesics ended, (S, P), how many attempted steps each took, and which were given up, in two ways.

    Of those given up the last point that was reached.
    """

    thetas: Float[np.ndarray, "S P"]
    attempts: Int[np.ndarray, " S"]
    too_long: Bool[np.ndarray, " S"]
    too_steep: Bool[np.ndarray, " S"]

    @property
    def ok(self) -> Bool[np.ndarray, " S"]:
        """Which have arrived."""
        return ~(self.too_long | self.too_steep)


class _Lane(eqx.Module):
    """A geodesic under way: Diffrax's view of the step to try next. `y` holds position and velocity on the surface."""

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    y: PyTree[Array]
    solver_state: PyTree
    controller_state: PyTree
    attempts: Int[Array, ""]
    too_steep: Bool[Array, ""]


_SOLVER = diffrax.Tsit5(scan_kind="lax")
_ORDER = 5.0  # of its error


def _size(y: PyTree[Array]) -> Float[Array, ""]:
    """Lengths on the surface are in posterior standard deviations."""
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y)))


def _controller(tolerance) -> diffrax.PIDController:
    return diffrax.PIDController(rtol=0.0, atol=tolerance, norm=_size)


def _field(t, y, args):
    surface, mean = args
    (position, _), velocity = y
    acceleration = surface.acceleration(mean + position / surface.root_prior, velocity[0] / surface.root_prior)
    return velocity, acceleration


_TERM = diffrax.ODETerm(_field)


@eqx.filter_jit
def _start(shared: tuple[Surface, Float[Array, " P"], Array], velocities: Float[Array, "S P"], _):
    surface, mean, tolerance = shared
    tangent = surface.tangent(mean, surface.flow(mean))

    def one(velocity):
        along = velocity * surface.root_prior
        y = ((jnp.zeros_like(along), jnp.zeros(len(tangent))), (along, tangent @ along))
        args, t0, t1 = (surface, mean), jnp.zeros(()), jnp.asarray(_FIRST)
        t1, controlled = _controller(tolerance).init(_TERM, t0, jnp.ones(()), y, t1, args, _SOLVER.func, _ORDER)
        state = _SOLVER.init(_TERM, t0, jnp.asarray(t1), y, args)
        t1, state, controlled = jax.tree.map(jnp.asarray, (t1, state, controlled))
        return _Lane(t0, t1, y, state, controlled, jnp.zeros((), int), jnp.zeros((), bool))

    return jax.vmap(one)(velocities), ()


def _attempt(surface: Surface, mean: Float[Array, " P"], tolerance, lane: _Lane) -> _Lane:
    """One step of Diffrax's, accepted or not, as in `diffrax.diffeqsolve`."""
    args = (surface, mean)
    y, error, _, solver_state, _ = _SOLVER.step(_TERM, lane.t0, lane.t1, lane.y, args, lane.solver_state, False)
    # Outside of what a likelihood allows nothing is finite, and the step is tried again, shorter.
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((y, error))]))
    error = jax.tree.map(lambda x: jnp.where(finite, x, jnp.inf), error)
    keep, t0, t1, _, controller_state, _ = _controller(tolerance).adapt_step_size(
        lane.t0, lane.t1, lane.y, y, args, error, _ORDER, lane.controller_state
    )
    select = lambda choice, new, old: jax.tree.map(lambda a, b: jnp.where(choice, a, b), new, old)
    t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
    too_steep = (t1 - t0 < _SHORTEST) & (t0 < 1)
    y, solver_state = select(keep, (y, solver_state), (lane.y, lane.solver_state))
    new = _Lane(t0, jnp.minimum(t1, 1.0), y, solver_state, controller_state, lane.attempts + 1, too_steep)
    return select((lane.t0 >= 1) | lane.too_steep, lane, new)


@eqx.filter_jit
def _advance(shared: tuple[Surface, Float[Array, " P"], Array], lanes: _Lane, _):
    attempt = jax.vmap(lambda lane: _attempt(*shared, lane))
    return jax.lax.scan(lambda lanes, _: (attempt(lanes), None), lanes, length=_ATTEMPTS)[0], ()


def follow(
    surface: Surface,
    mean: Float[Array, " P"],
    velocities: Float[Array, "S P"],
    tolerance: float,
    *,
    progress: bool,
    mesh: Mesh | None = None,
) -> Geodesics:
    """Follow the geodesics that leave `mean` at `velocities` for unit time.

    Many at once, and no slow one holds up the rest: whenever some have ended, others take their places; when none are
    left to start, those under way move together, spread over the devices of the `mesh`.
    """
    num, size = velocities.shape
    # An array, so that another tolerance is not compiled anew.
    shared = everywhere(mesh, (surface, mean, jnp.asarray(tolerance, dtype=float)))
    together = min(_LANES, max(1, _LANE_BYTES // surface.lane_bytes(_num_predictions(surface)))) * num_devices(mesh)
    width = 2 ** min(int(math.log2(together)), math.ceil(math.log2(num)))
    thetas, attempts = np.empty((num, size)), np.zeros(num, int)
    too_long, too_steep = np.zeros(num, bool), np.zeros(num, bool)
    host = lambda tree: jax.tree.map(np.array, tree)
    take = lambda tree, rows: jax.tree.map(lambda x: x[rows], tree)
    # Shapes stay the same, so that each program is compiled once.
    pad = lambda rows: np.concatenate([rows, np.zeros(width - len(rows), int)])

    def start(draws: np.ndarray) -> _Lane:
        fresh = host(over_rows(mesh, _start, shared, velocities[pad(draws)])[0])
        return take(fresh, slice(len(draws)))

    waiting = min(width, num)
    draws = np.arange(waiting)  # whose geodesic is in each lane
    lanes = start(draws)
    with tqdm(total=num, desc="Geodesics", unit="draw", disable=not progress) as bar:
        while len(draws):
            # A few widths only, as each is compiled.
            while len(draws) <= width // 8:
                width //= 8
            moved, _ = over_rows(mesh, _advance, shared, take(lanes, pad(np.arange(len(draws)))))
            lanes = take(host(moved), slice(len(draws)))
            long = (lanes.attempts >= _MOST_ATTEMPTS) & (lanes.t0 < 1)
            ended = (lanes.t0 >= 1) | lanes.too_steep | long
            done = draws[ended]
            thetas[done] = np.asarray(mean) + lanes.y[0][0][ended] / np.asarray(surface.root_prior)
            attempts[done], too_steep[done] = lanes.attempts[ended], lanes.too_steep[ended]
            too_long[done] = long[ended] & ~lanes.too_steep[ended]
            bar.update(len(done))
            draws, lanes = draws[~ended], take(lanes, ~ended)
            new = np.arange(waiting, min(waiting + len(done), num))
            if len(new):
                waiting += len(new)
                draws = np.concatenate([draws, new])
                lanes = jax.tree.map(lambda a, b: np.concatenate([a, b]), lanes, start(new))
    return Geodesics(thetas, attempts, too_long, too_steep)


def _num_predictions(surface: Surface) -> int:
    return math.prod(jax.eval_shape(surface.flow, surface.flow.parameters.vector).shape)

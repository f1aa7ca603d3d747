"""Whether the solver is exact enough for a posterior, and whether derivatives are those of its solutions.

Automatic differentiation is right about the steps that a solver took. It may be wrong about the solution: it does not
see where a discontinuity moves, and the sensitivities of an explicit solver at its limit of stability have an error far
larger than that of the states. Both show when solutions at two neighboring θ are compared.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._devices import compiled
from .._errors import LaplodeError
from .._problem.prior import LocalPrior
from .._problem.problem import Problem
from .._solve.flows import ReplayedFlow
from .._solve.maps import evaluate
from .._solve.replay import Accepted

_Offset = Callable[[], np.ndarray]  # a posterior standard deviation of each parameter, to either side

# Lengths of a step, to both sides, as parts of the direction: a short one feels the solver's tolerance, a long one the
# curvature of the model. Derivatives are wrong if the changes of the predictions contradict them at all of these.
_LENGTHS = (0.02, 0.1, 0.005, 0.5)

# Instead of the longer ones, for a model so curved that at the first the second derivative is more than this part of
# the change. The shortest say nothing of a discontinuity, which they may not reach.
_SHORTER, _CURVED, _FALLS = (0.001, 0.005, 1e-4, 1e-5), 0.25, 0.2


# So far may a change of the predictions be from what derivatives say, in standard deviations of the noise for a step of
# one posterior standard deviation; of a single parameter it may be this part of what they say.
_WRONG, _WRONG_PART = 0.3, 0.1


# Tolerances so many times smaller tell errors of the solver from a discontinuity.
_TIGHTER = 100.0


# Of a model of one's own, whose solver chooses other steps at each θ, differences of both sides are taken over these.
# They are to be believed where two of them differ by less than this part of what they contradict.
_BOTH_WAYS, _AGREE = (0.02, 0.1, 0.005, 0.5, 1e-3), 0.3


# So many standard deviations of the noise from a state that is given, a first observation is of another time.
_FAR = 6.0


# So many times larger than the noise, values are more exact than solvers usually are.
_DIGITS = 1e6


# Errors that the tolerance allows in a step are too large from this part of the noise on.
_COARSE = 0.3


# More leaves of the model than this are not looked at one by one.
_MOST_LEAVES = 64


def solver_problems(
    flow: Any, problem: Problem, form: Any, built: Any, prior: LocalPrior, linear: tuple[Array, Array] | None = None
) -> list[str]:
    """What is wrong with the solver or with derivatives at θ*, each in a sentence or two with what to do about it.

    It takes one solve at a neighboring θ, or a few where the model is curved. θ* moves along a combination of all
    directions that the data determine, each by the same part of its posterior standard deviation, so that one wrong
    direction shows among many right ones. A parameter without influence moves too: nothing should follow.

    **Arguments:**

    - `flow`, `problem`: as for the curvature.
    - `form`: that curvature, with `influence`.
    - `built`: the posterior precision, with `root_product`, `covariance_product` and `variance`.
    - `prior`: at θ*.
    - `linear`: the predictions at θ* and their Jacobian, if they are known.
    """
    if linear is None and not flow.is_frozen and not flow.has_pushforward():
        return []
    signs = np.random.default_rng(0).choice([-1.0, 1.0], flow.parameters.size)  # any will do
    influence = np.asarray(form.influence())
    inert = influence <= np.finfo(float).eps ** 2 * np.max(influence)
    direction = _determined(built, prior, signs, inert)
    values = evaluate(flow, flow.parameters.vector) if linear is None else linear[0]
    probe = _Probe(flow, np.asarray(values), np.sqrt(np.asarray(problem.information(values))), linear)
    slope, offset = probe.slope(direction), lambda: signs * np.sqrt(np.asarray(built.variance()))
    if flow.is_frozen:
        found = _of_solver(probe, problem, direction, slope, offset)
    else:
        found = _of_own_model(probe, direction, slope, offset)
    return _starts_elsewhere(probe, slope, problem) + found


def _of_solver(probe: "_Probe", problem: Problem, direction: Array, slope: np.ndarray, offset: _Offset) -> list[str]:
    """What is wrong with the solver of a `NeuralODE`, or with its derivatives."""
    flow = probe.flow
    error, neighbor = probe.error(direction, slope)
    if neighbor is None:
        return []
    problems = _differs_from_replay(probe, *neighbor) + _coarse(probe, neighbor[1])
    if problems or not error > _WRONG:
        return problems
    cause = _cause(probe, problem, direction, slope, error)
    if cause == "neighbors":  # the derivatives at θ* are right
        return []
    named = _wrong_leaves(probe, offset())
    if named and cause == "model":
        return [
            f"The derivatives in {', '.join(named)} are not those of the solution: solved again at neighboring values, "
            "the predictions change otherwise. So it is where a discontinuity of the vector field lies at a time or "
            "state that depends on a parameter, which automatic differentiation does not see move. Standard "
            "deviations, of other parameters too, are wrong. Solve such a model in pieces between its "
            "discontinuities, or make the switch smooth."
        ]
    where = ", ".join(named) or "directions that the data determine weakly or not at all"
    return [
        f"In {where}, the derivatives of the predictions are errors of the solver "
        f"({type(flow.parameters.model.solver).__name__}, {_tolerances(flow)}): solved again at neighboring "
        f"parameters, the predictions differ by {error:.2g} standard deviations of the posterior from what they say. "
        "Standard deviations there are too small. A stiff field wants an implicit solver, NeuralODE(..., "
        "solver=diffrax.Kvaerno5()); otherwise take tolerances 100 times smaller. laplode.check_tolerance measures it."
    ]


@eqx.filter_jit
def _determined(built: Any, prior: LocalPrior, signs: Float[Array, " P"], inert: Bool[Array, " P"]):
    """Λ^-½ z (P,) without the part of it that the prior alone determines, except where parameters are inert."""
    drawn = built.root_product(signs)
    from_prior = prior.precision * drawn + (prior.rows @ drawn) @ prior.rows
    return jnp.where(inert, drawn, drawn - built.covariance_product(from_prior))


@compiled
def _slope(flow: Any, direction: Float[Array, " P"]) -> Float[Array, "N T F"]:
    """The derivative of the predictions along a direction."""
    return jax.jvp(flow, (flow.parameters.vector,), (direction,))[1]


@eqx.filter_jit
def _at_end(model: Any, last: Float[Array, "N D"], args: Any) -> tuple[Array, Array]:
    """What is seen of the last states (N, F), and its derivative in them (N, F, D)."""
    see = lambda state, args: model.observe_states(state[None], args)[0]
    return jax.vmap(see)(last, args), jax.vmap(jax.jacfwd(see))(last, args)


class _Probe(eqx.Module):
    """Compares the predictions at θ* with those nearby. `root` is the root of their Fisher information."""

    flow: Any
    values: Float[np.ndarray, "N T F"]
    root: Float[np.ndarray, "N T F"]
    linear: tuple[Array, Array] | None = None

    def weighed(self, change: np.ndarray) -> np.ndarray:
        """In standard deviations of the noise, and 0 where nothing was observed."""
        return np.where(self.root > 0, self.root * np.where(self.root > 0, change, 0), 0)

    def slope(self, direction: Array) -> np.ndarray:
        """The derivative of the predictions along a direction."""
        if self.linear is None:
            return np.asarray(_slope(self.flow, jnp.asarray(direction)))
        return np.asarray(self.linear[1] @ direction).reshape(self.values.shape)

    def error(self, direction: Array, slope: np.ndarray, part: float = 0.0) -> tuple[float, Any]:
        """How far changes of the predictions are from what derivatives say, at the length where that is least.

        The mean of the changes to both sides is right to third order in the length. `part` of what derivatives say is
        allowed for. With the error comes the first neighbor that could be solved, or None.
        """
        said = self.weighed(slope)
        allowed = part * float(np.linalg.norm(said))
        least, first, before, lengths = np.inf, None, 0.0, list(_LENGTHS)
        while lengths:
            length, changes = lengths.pop(0), []
            for step in (length, -length):
                neighbor = self.flow.neighbor(self.flow.parameters.vector + step * direction)
                if neighbor is None:
                    continue
                values = np.asarray(evaluate(neighbor[0], neighbor[0].parameters.vector))
                first = first or (*neighbor, values)
                changes.append(self.weighed((values - self.values) / step))
                least = min(least, float(np.linalg.norm(changes[-1] - said)) - allowed)
                if least <= _WRONG:
                    return least, first
            if len(changes) < 2:
                continue
            mean, bend = np.mean(changes, axis=0), np.subtract(*changes) / 2
            off = float(np.linalg.norm(mean - said))
            least = min(least, off - allowed)
            # An error that falls nearly as fast as the length is what is left of a series, and has the limit 0.
            if least <= _WRONG or (length in _SHORTER and off < _FALLS * before):
                return min(least, _WRONG), first
            if length == _LENGTHS[0] and np.linalg.norm(bend) > _CURVED * np.linalg.norm(mean):
                lengths = list(_SHORTER)
            before = off
        return least, first


def _starts_elsewhere(probe: "_Probe", slope: np.ndarray, problem: Problem) -> list[str]:
    """Whether the first observations are far from initial states that are given."""
    if probe.flow.y0 is None:
        return []
    score = np.asarray(problem.likelihood.score(jnp.asarray(probe.values), problem.ys))
    there = problem.informed & (probe.root > 0)
    z = np.abs(np.divide(score, probe.root, out=np.zeros_like(score), where=there))[..., : problem.ys.shape[2]]
    first = np.where(slope[:, 0, : z.shape[2]] == 0, z[:, 0], 0)
    i, k = map(int, np.unravel_index(np.argmax(first), first.shape))
    if not first[i, k] > max(_FAR, 2 * np.max(z[:, 1:], initial=0)):
        return []
    return [
        f"At the first time, {float(probe.flow.ts[i, 0]):g}, channel {k} of trajectory {i} was observed "
        f"{first[i, k]:.2g} standard deviations of the noise from the state `y0`, twice as far as at any other time. "
        "If `y0` is the state at an earlier time, let the times begin there, with a first row of NaN in `ys`."
    ]


def _of_own_model(probe: _Probe, direction: Array, slope: np.ndarray, offset: _Offset) -> list[str]:
    """What is wrong with the derivatives of a model of one's own, with where it starts, or with the noise."""
    others = _ignores_states(probe) + _tiny_noise(probe)
    error, agree = _contradicted(probe, direction, slope)
    if not (agree and error > _WRONG):
        return others
    wrong, std = [], offset()
    for name, _, start, stop in probe.flow.parameters.leaves[:_MOST_LEAVES]:
        alone = jnp.zeros(std.size).at[start:stop].set(std[start:stop])
        off, alike = _contradicted(probe, alone, probe.slope(alone))
        if off > _WRONG and alike:
            wrong.append(name)
    return [
        *others,
        f"The derivatives of `model`{' in ' + ', '.join(wrong) if wrong else ''} are not those of its predictions: at "
        f"neighboring parameters these change otherwise, by {error:.2g} standard deviations of the posterior. So it is "
        "after an event of diffrax.diffeqsolve that has no root_finder, or in whose last step the field jumps; where "
        "another discontinuity moves; behind jax.lax.stop_gradient; and where a derivative of one's own (custom_jvp, "
        "custom_vjp) is wrong. Standard deviations, of other parameters too, are wrong. An event wants "
        "diffrax.Event(condition, optimistix.Newton(1e-8, 1e-8)) and a field that goes on smoothly beyond it.",
    ]


def _tiny_noise(probe: _Probe) -> list[str]:
    """Whether values are known to more digits than the unknown solver is likely to have."""
    digits = probe.weighed(np.abs(probe.values))
    i, t, k = map(int, np.unravel_index(np.argmax(digits), digits.shape))
    if not digits[i, t, k] > _DIGITS:
        return []
    return [
        f"The noise of channel {k} has a standard deviation of {1 / probe.root[i, t, k]:.2g} in trajectory {i} at time "
        f"{float(probe.flow.ts[i, t]):g}, where the value is {probe.values[i, t, k]:.2g}: few solvers are as exact. A "
        "fitted noise scale runs to 0 where the model meets the data exactly: then give it, or a prior that keeps it "
        "away from 0."
    ]


def _ignores_states(probe: _Probe) -> list[str]:
    """Whether predictions are the same from initial states a little away."""
    flow = probe.flow
    if flow.y0 is None:
        return []
    y0 = jnp.asarray(flow.y0, dtype=float)
    try:
        values = flow.starting(y0 + 1e-3 * jnp.where(y0 == 0, 1.0, y0)).solved(flow.parameters.vector)
        before = flow.solved(flow.parameters.vector)
    except eqx.EquinoxRuntimeError:  # a solve that throws
        return []
    if np.any(np.asarray(values) != np.asarray(before)):
        return []
    return [
        "The initial states of the data have no influence on the predictions of `model`: where it has states of its "
        "own, leave out those of the data, Trajectories(ts, ys)."
    ]


def _contradicted(probe: _Probe, direction: Array, slope: np.ndarray) -> tuple[float, bool]:
    """How far differences are from what derivatives say, at the length where that is least, and whether they agree.

    0 where the model can't be solved nearby.
    """
    theta, said = probe.flow.parameters.vector, probe.weighed(slope)
    found: list[np.ndarray] = []
    for length in _BOTH_WAYS:
        try:
            ahead, behind = (np.asarray(probe.flow.solved(theta + sign * length * direction)) for sign in (1, -1))
        except eqx.EquinoxRuntimeError:  # a solve that throws
            continue
        off = probe.weighed((ahead - behind) / (2 * length)) - said
        if not np.all(np.isfinite(off)):
            continue
        found.append(off)
        if np.linalg.norm(off) <= _WRONG:
            return 0.0, True
    if not found:
        return 0.0, True
    sizes = [float(np.linalg.norm(off)) for off in found]
    apart = [np.linalg.norm(a - b) for i, a in enumerate(found) for b in found[:i]]
    return min(sizes), bool(min(apart, default=np.inf) <= _AGREE * min(sizes))


def _wrong_leaves(probe: _Probe, offset: np.ndarray) -> list[str]:
    """The leaves of the model in which derivatives contradict differences, each moved alone by an `offset`."""
    leaves = probe.flow.parameters.leaves
    wrong = []
    for name, _, start, stop in leaves if len(leaves) <= _MOST_LEAVES else ():
        alone = jnp.zeros(offset.size).at[start:stop].set(offset[start:stop])
        error, neighbor = probe.error(alone, probe.slope(alone), _WRONG_PART)
        if neighbor is not None and error > _WRONG:
            wrong.append(name)
    return wrong


def _cause(probe: _Probe, problem: Problem, direction: Array, slope: np.ndarray, error: float) -> str:
    """What derivatives and neighboring solutions disagree by: "solver", "neighbors" or "model".

    With a smaller tolerance, derivatives change by about as much as they were off; or it is the neighbors that change,
    so that they agree now; or neither does.
    """
    try:
        tight = probe.flow.tightened(_TIGHTER, spare=0.5)
    except LaplodeError:  # there is none, or it takes too many steps
        return "model"
    values = evaluate(tight, tight.parameters.vector)
    there = _Probe(tight, np.asarray(values), np.sqrt(np.asarray(problem.information(values))))
    other = there.slope(direction)
    if float(np.linalg.norm(probe.weighed(other - slope))) > 0.5 * error:
        return "solver"
    return "neighbors" if there.error(direction, other)[0] <= _WRONG else "model"


def _differs_from_replay(probe: _Probe, there: ReplayedFlow, found: Accepted, values: np.ndarray) -> list[str]:
    """Whether replayed steps end where the solve that took them did."""
    solved, _ = _at_end(there.parameters.model, found.last, there.args)
    off = np.abs(np.asarray(solved) - values[:, -1])
    scale = np.max(np.abs(values), axis=(1, 2))[:, None]
    reached = np.asarray(
        there.ts[:, -1] == there.steps.ends[:, -1]
    )  # what nobody observed at the end is read off before
    off = np.where(reached[:, None], off, 0)
    bad = np.flatnonzero(np.any((off > 1e-6 * scale) & (off * np.max(probe.root, axis=1) > 1e-2), axis=1))
    if not bad.size:
        return []
    i = int(bad[0])
    return [
        "The steps of the solver, repeated, end elsewhere than the solve that took them: in trajectory "
        f"{i} at time {float(there.ts[i, -1]):g} by {float(np.max(off[i])):.2g}. Where a trajectory is chaotic, "
        "rounding does that; a field that is not the same function of (t, y, args) at every call, or a step size "
        "controller that moves steps in a way of its own, does too. Derivatives and predictions are of the repeated "
        "steps."
    ]


def _coarse(probe: _Probe, found: Accepted) -> list[str]:
    """Whether the tolerances allow errors, in a step, that are as large as the noise."""
    flow = probe.flow
    controller = flow.parameters.rest.stepsize_controller
    if not hasattr(controller, "rtol") or not hasattr(controller, "atol"):
        return []
    _, derivative = _at_end(flow.parameters.model, found.last, flow.args)
    root = np.max(probe.root, axis=1)  # (N, F)
    allowed = {
        "atol": np.broadcast_to(np.asarray(controller.atol, dtype=float), found.last.shape),
        "rtol": np.asarray(controller.rtol) * np.abs(np.asarray(found.last)),
    }
    problems = []
    for name, error in allowed.items():
        seen = root * np.einsum("nfd,nd->nf", np.abs(np.asarray(derivative)), error)
        worst = np.nanmax(seen, initial=0.0)
        if worst > _COARSE:
            i, k = np.unravel_index(np.nanargmax(seen), seen.shape)
            now = float(np.max(np.asarray(getattr(controller, name))))
            take = 10.0 ** np.floor(np.log10(1e-3 * now / worst))
            problems.append(
                f"`{name}` = {now:g} of the solver allows errors of {float(seen[i, k] / root[i, k]):.2g} in channel "
                f"{k} of trajectory {i}, where the noise has a standard deviation of {float(1 / root[i, k]):.2g} and "
                f"values reach {float(np.max(np.abs(probe.values[i, :, k]))):.2g}: trajectories and standard "
                f"deviations may be wrong. Take {name}={take:g}, as in NeuralODE(..., stepsize_controller="
                "diffrax.PIDController(rtol=..., atol=...)), or other units. A fitted noise scale runs to 0 where the "
                "model meets the data exactly: then give it, or a prior that keeps it away from 0."
            )
    return problems


def _tolerances(flow: ReplayedFlow) -> str:
    controller = flow.parameters.rest.stepsize_controller
    named = [f"{name}={getattr(controller, name)}" for name in ("rtol", "atol") if hasattr(controller, name)]
    return ", ".join(named) or type(controller).__name__

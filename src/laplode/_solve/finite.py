"""What is not finite at the parameters of a model, and where: in its predictions, the likelihood, or derivatives."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from .._errors import LaplodeError
from .._model.parameters import Parameters
from .._problem.problem import Problem
from .autodiff import twice_along
from .flows import AbstractFlow
from .maps import evaluate, linearize
from .replay import Steps, _replay

_CURE = (
    "A norm, a square root, a power or a logarithm at 0 has such derivatives, and so has one in the branch of a "
    "jnp.where or jnp.maximum that is not taken. Write jnp.where twice, as in jnp.where(x > 0, "
    "jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0), or start a little away from there."
)

_FIRST_ONLY = {"first": "", "second": ' Or take curvature="ggn", which needs first derivatives only.'}

# Predictions below this part of the largest are errors of the solver where they have the wrong sign.
_SMALL = 1e-3

# So many times larger than all that was observed, a prediction has run away.
_LARGE = 1e6


def check_finite(values: Any, around: AbstractFlow, problem: Problem | None = None) -> None:
    """Raise `LaplodeError` unless all `values` are finite, in which the map's derivatives are.

    Only where they are not, it looks for the place: trajectory, time, and part of the vector field or the prediction.

    **Arguments:**

    - `values`: any array that a derivative that is not finite leaves its mark on.
    - `around`: the map that was differentiated.
    - `problem`: what it predicts; None away from the data.
    """
    if np.all(np.isfinite(values)):
        return
    informed = None if problem is None else problem.informed
    found = None if problem is None else _in_likelihood(around, problem)
    found = found or (_in_field(around) if around.is_frozen else None) or _in_predictions(around, informed)
    raise LaplodeError(
        found or "Derivatives of `model` are not finite, though its predictions and their own derivatives are."
    )


def check_slope(name: str, values: Any) -> None:
    """Raise `LaplodeError` about the argument `name`, a function of the model, unless its derivatives are finite."""
    if not np.all(np.isfinite(values)):
        raise LaplodeError(f"`{name}` has first derivatives that are not finite at the fitted model. {_CURE}")


def check_predicted(predictions: Any, ts: Float[ArrayLike, "N T"]) -> None:
    """Raise `LaplodeError` unless predictions (N, T, F) at times (N, T) are finite."""
    bad = np.argwhere(~np.isfinite(predictions))
    if bad.size:
        i, t, k = map(int, bad[0])
        raise LaplodeError(
            f"`model` predicts {float(predictions[i, t, k])} in channel {k} of trajectory {i} at time "
            f"{float(np.asarray(ts)[i, t]):g}. Let it be finite at all of its times, or ask for others."
        )


def _in_likelihood(around: AbstractFlow, problem: Problem) -> str | None:
    """What is wrong with the log-likelihood of an observation, or with its derivatives in the prediction."""
    found, ys = evaluate(around, around.parameters.vector), problem.ys
    likelihood = problem.likelihood
    observed = problem.observed
    value = np.where(observed, likelihood.log_prob(found, ys), 0)
    score, information = np.asarray(likelihood.score(found, ys)), np.asarray(problem.information(found))
    kinds = {
        "a log-likelihood": (value, np.isfinite(value)),
        "a Fisher information": (information, np.isfinite(information) & (information >= 0)),
        "a derivative of the log-likelihood": (score, np.isfinite(score) | ~problem.informed),
    }
    predictions = np.asarray(found)
    for what, (values, good) in kinds.items():
        bad = np.argwhere(~good)
        if not bad.size:
            continue
        i, t, k = map(int, bad[0])
        predicted = float(predictions[i, t, k])
        channel = problem.channel[k]
        cure = "LogNormal, Poisson and NegativeBinomial likelihoods want positive predictions."
        if abs(predicted) > _LARGE * np.nanmax(np.abs(problem.data.ys)):
            cure = "Its predictions run away: start nearer to the data, with parameters that laplode.fit has found."
        elif predicted <= 0 and abs(predicted) < _SMALL * np.nanmax(np.abs(predictions[..., k])):
            cure += (
                " One that should be 0 or little more comes out like that by the solver's error: keep it positive, "
                "NeuralODE(..., observe=lambda y, args: jnp.maximum(y, 1e-6)) in units of yours, or solve for its "
                "logarithm."
            )
        return (
            f"`model` gives trajectory {i}, channel {channel} {what} of {float(values[i, t, k])} at time "
            f"{float(problem.data.ts[i, t]):g}, where it predicts {predicted:g} and "
            f"{problem.data.ys[i, t, channel]:g} was observed. {cure}"
        )
    return None


@eqx.filter_jit
def _field(view: Parameters, steps: Steps, order: int) -> tuple[Float[Array, "steps D"], Bool[Array, "steps L D"]]:
    """States at the beginnings of the steps of one trajectory, and whether derivatives of the field are finite there:
    for each of its components, by the state and by each of the L - 1 leaves of the model.
    """
    not_seen = lambda m: (m.observe, m.scale)
    model = eqx.tree_at(not_seen, view.model, (None, None), is_leaf=lambda x: x is None)
    states = _replay(model, eqx.tree_at(lambda s: s.ts, steps, steps.starts))[0]
    args = steps[0].args

    def at(point):
        t, y = point
        leaves, structure = jax.tree.flatten((y, view.selected))

        def along(j):  # one leaf alone: a derivative of 0 by another would be 0 times what is not finite
            def function(leaf):
                y, selected = jax.tree.unflatten(structure, [*leaves[:j], leaf, *leaves[j + 1 :]])
                return view.build(selected).vector_field(t, y, args)

            push = lambda leaf: jax.jvp(function, (leaf,), (jnp.ones_like(leaf),))[1]
            return jnp.isfinite(push(leaves[j]) if order == 1 else jax.jvp(push, (leaves[j],), (leaves[j] * 0 + 1,))[1])

        return jnp.stack([along(j) for j in range(len(leaves))])

    return states, jax.lax.map(at, (steps.starts[0], states))


def _in_field(around: Any) -> str | None:
    """Where a derivative of the vector field is not finite, at the beginnings of the steps of a solve."""
    names = ["the state", *(f"`{leaf[0]}`" for leaf in around.parameters.leaves)]
    for i in range(around.num_trajectories):
        steps = around.part(slice(i, i + 1)).steps
        for order, kind in ((1, "first"), (2, "second")):
            try:
                states, finite = map(np.asarray, _field(around.parameters, steps, order))
            except Exception:  # a field may have no forward derivatives
                return None
            if np.all(finite):
                continue
            place = int(np.argmin(np.all(finite, axis=(1, 2))))
            parts = np.flatnonzero(~np.all(finite[place], axis=0))
            by = [name for name, row in zip(names, finite[place], strict=True) if not np.all(row)]
            state = np.array2string(states[place], precision=3, threshold=8)
            return (
                f"The {kind} derivatives of `model` are not finite: in trajectory {i} at time "
                f"{float(steps.starts[0, place]):g}, where the state is {state}, those of {_listed(parts)} of the "
                f"vector field by {', '.join(by[:5])}. {_CURE}{_FIRST_ONLY[kind]}"
            )
    return None


def _listed(parts: np.ndarray) -> str:
    shown = ", ".join(map(str, parts[:5])) + (", …" if len(parts) > 5 else "")
    return f"component{'s' if len(parts) > 1 else ''} {shown}"


def _in_predictions(around: AbstractFlow, informed: Bool[np.ndarray, "N T F"] | None) -> str | None:
    """Where a prediction has a derivative by a parameter that is not finite."""
    ways: list[tuple[str, Callable[[AbstractFlow], Array]]] = [("first", lambda flow: linearize(flow)[1])]
    if around.has_second_pushforward():
        ways.append(("second", _second))
    num = around.num_trajectories
    for kind, derivative in ways:
        for i in range(num):
            part = around.part(slice(i, i + 1))
            shape = jax.eval_shape(part, part.parameters.vector).shape[1:]
            found = np.isfinite(derivative(part)).reshape(*shape, -1)
            if informed is not None:
                found |= ~informed[i][..., None]
            if np.all(found):
                continue
            t, k = map(int, np.argwhere(~np.all(found, axis=2))[0])
            by = part.parameters.names(np.flatnonzero(~found[t, k]))[:5]
            named = "" if np.all(~found[t, k]) else f" by {', '.join(by)}"
            return (
                f"The {kind} derivatives of `model` are not finite: in trajectory {i} at time "
                f"{float(around.ts[i, t]):g} those of channel {k}{named}, though its prediction is. "
                f"{_CURE}{_FIRST_ONLY[kind]}"
            )
    return None


@eqx.filter_jit
def _second(flow: AbstractFlow) -> Array:
    """The second derivative of all predictions along one direction."""
    theta = flow.parameters.vector
    return twice_along(flow, theta, jnp.ones_like(theta))

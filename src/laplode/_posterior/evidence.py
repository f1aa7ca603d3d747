"""The evidence as a function of hyperparameters, without a solve for each of their values."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .._algebra.build import Determinant, GramDeterminant, determinant
from .._algebra.forms import AbstractForm
from .._checks import check_from
from .._curvature.strategies import At
from .._errors import LaplodeError, choose
from .._late import pd
from .._model.parameters import Parameters
from .._problem.prior import GROUPINGS, Grouping
from .._problem.problem import Problem
from .._solve.maps import evaluate
from .._solve.objective import value_and_gradient
from .posterior import Posterior


class Hyperparameters(eqx.Module):
    """What the evidence is a function of; None for what is held fixed.

    - `log_precision`: log precisions of the Gaussian prior, one for each group of parameters that it is of, (A,); of a
        `FieldPrior` log amplitudes and, after them, log lengths in half-ranges of the contexts.
    - `log_scale`: log noise scales as multiples of the present ones, one for all (1,), or one for each of the channels
        whose likelihood has a scale.
    """

    log_precision: Float[Array, " A"] | None
    log_scale: Float[Array, " B"] | None


def form_by_channel(posterior: Posterior) -> AbstractForm:
    """The posterior's curvature, in a form that knows its channels."""
    channels = posterior.problem.data.ys.shape[2]
    if not posterior.curvature.signed or channels == 1:
        return posterior.form
    each = [
        posterior.structure.form(posterior.curvature, At(posterior.flow, _channel(posterior.problem, k)))
        for k in range(channels)
    ]
    join = lambda *parts: jnp.concatenate(parts) if eqx.is_array(parts[0]) else max(parts)
    return jax.tree.map(join, *each)


def _channel(problem: Problem, k: int) -> Problem:
    """The problem with one channel observed."""
    ys = np.full_like(problem.data.ys, np.nan)
    ys[..., k] = problem.data.ys[..., k]
    return eqx.tree_at(lambda p: p.data.ys, problem, ys)


# ---- The evidence as a function


class Evidence(eqx.Module):
    """log p(Y) of the Laplace approximation as a function of `Hyperparameters`, θ* and its curvature held fixed.

    Made by `evidence_function`. Differentiable, jitted by its callers; a call takes no solve. With a `FieldPrior` or a
    `SoftConstraint` it is the evidence of the model linearized around θ*, whose optimum moves with them.

    Every negative eigenvalue of the likelihood's curvature is regularized here, also where the prior outweighs it: at a
    fixed θ*, the evidence grows without bound where Λ ceases to be positive definite, and no optimum lies there.
    """

    view: Parameters
    problem: Problem
    predictions: Float[Array, "N T F"]
    linear: PyTree  # what the prior asks of the model
    slope: Float[Array, "*K P"] | None  # of −log p(Y | θ), by channel where scales are; None if θ* is held
    log_det: Determinant | GramDeterminant
    form: AbstractForm
    grouping: Grouping | None = eqx.field(static=True)
    scale_of: tuple[int, ...] = eqx.field(static=True)  # of each channel, the place in `log_scale`; -1 if it is fixed

    def __call__(self, hyperparameters: Hyperparameters) -> Float[Array, ""]:
        """log p(Y | θ*) + log p(θ*) + P/2 log 2π − ½ log det Λ (+ ½ gᵀΛ⁻¹g with the gradient g), in nats."""
        problem, shrink = self.problem_at(hyperparameters), self.shrink(hyperparameters)
        prior = problem.prior.local(self.view, self.linear)
        gradient = None if self.slope is None else prior.gradient + jnp.tensordot(shrink, self.slope, shrink.ndim)
        log_det = self.log_det(prior, shrink, gradient)
        constant = 0.5 * self.view.size * math.log(2 * math.pi)
        return problem.log_likelihood(self.predictions) + prior.normalized + constant - 0.5 * log_det

    def problem_at(self, hyperparameters: Hyperparameters) -> Problem:
        """The problem with these hyperparameters."""
        problem = self.problem
        if hyperparameters.log_precision is not None:
            assert self.grouping is not None
            prior = problem.prior.at(self.view, self.grouping, hyperparameters.log_precision)
            problem = eqx.tree_at(lambda p: p.prior, problem, prior)
        likelihood = problem.likelihood.scaled(jnp.exp(self._log_factor(hyperparameters)))
        return eqx.tree_at(lambda p: p.likelihood, problem, likelihood)

    def shrink(self, hyperparameters: Hyperparameters) -> Float[Array, "*K"]:
        """What is left of the information of each channel, or of all."""
        return jnp.exp(-2 * self._log_factor(hyperparameters))

    def _log_factor(self, hyperparameters: Hyperparameters) -> Float[Array, "*K"]:
        """Of the noise scale of each channel, or of all of several together."""
        if hyperparameters.log_scale is None:
            return jnp.zeros(())
        factors = jnp.append(hyperparameters.log_scale, 0.0)
        together = len(self.scale_of) > 1 and len(set(self.scale_of)) == 1
        return factors[0] if together else factors[np.array(self.scale_of)]


_NOISES: dict[str, bool | None] = {"channel": True, "one": False, "fixed": None}


def evidence_function(
    posterior: Posterior, *, precision: str = "one", noise: str | None = None
) -> tuple[Evidence, Hyperparameters]:
    """The log evidence as a differentiable function of hyperparameters, and where it stands now.

    **Arguments:** as for `maximize_evidence`.

    **Returns:** `(function, start)`: `function(hyperparameters)` is in nats, and `function(start)` is
    `posterior.log_evidence`, where the prior's precision has the form asked for and no eigenvalue of the likelihood's
    curvature is negative.

    **Raises:** `LaplodeError` as `maximize_evidence` does.
    """
    grouping, scale_of = _forms(posterior, precision, noise)
    view, problem = posterior.parameters, posterior.problem
    log_precision = None if grouping is None else problem.prior.hyperparameters(view, grouping)
    apart, linear = len(set(scale_of)) > 1, problem.prior.linear(view)
    form = form_by_channel(posterior) if apart else posterior.form
    log_det = determinant(
        posterior.structure,
        form,
        problem.prior.local(view, linear),
        dataclasses.replace(posterior.regularization, always=True),
        _groups(grouping, posterior),
        posterior.diagnostics.condition_number,
    )
    log_scale = jnp.zeros(max(scale_of) + 1) if max(scale_of) >= 0 else None
    predictions = evaluate(posterior.flow, view.vector)
    slope = None if linear is None else _slope(posterior, apart)
    function = Evidence(view, problem, predictions, linear, slope, log_det, form, grouping, scale_of)
    return function, Hyperparameters(log_precision, log_scale)


def _slope(posterior: Posterior, apart: bool) -> Float[Array, "*K P"]:
    """The gradient of −log p(Y | θ), of each channel if these are `apart`."""
    problem, of = posterior.problem, lambda problem: value_and_gradient(posterior.flow, problem)[1]
    channels = range(problem.data.ys.shape[2])
    return jnp.stack([of(_channel(problem, k)) for k in channels]) if apart else of(problem)


def _groups(grouping: Grouping | None, posterior: Posterior) -> Int[np.ndarray, " P"]:
    """The parameters that share a precision at any hyperparameters; those with a prior of their own stand alone."""
    if grouping is None:
        return np.arange(posterior.size)
    groups = posterior.problem.prior.groups(posterior.parameters, grouping)
    alone = groups < 0
    groups[alone] = groups.max(initial=-1) + 1 + np.arange(np.sum(alone))
    return groups


def _forms(posterior: Any, precision: Any, noise: Any) -> tuple[Grouping | None, tuple[int, ...]]:
    """How parameters are grouped, None where they are fixed, and `Evidence.scale_of`."""
    check_from("posterior", posterior, Posterior, "laplace")
    posterior.problem.prior.check_tunable()
    grouping = choose("precision", precision, GROUPINGS)
    if grouping is not None and not posterior.problem.prior.hyperparameters(posterior.parameters, grouping).size:
        grouping = None  # every parameter has a prior of its own
    scale_of = _noise_form(posterior, noise)
    if grouping is None and max(scale_of) < 0:
        raise LaplodeError("`precision` and `noise` are both fixed: nothing is left to optimize.")
    return grouping, scale_of


def _noise_form(posterior: Posterior, noise: Any) -> tuple[int, ...]:
    """Of each channel the place of its noise scale among those that are learned; -1 if it is fixed."""
    given, curvature = posterior.problem.likelihood.noise(posterior.problem.data.ys.shape[2]), posterior.curvature
    knows_channels = posterior.form.knows_channels
    learned = [each is not None and each.scalable and curvature.falls_with_scale(each.quadratic) for each in given]
    by_channel = knows_channels if noise is None else choose("noise", noise, _NOISES)
    if by_channel is None:
        return (-1,) * len(given)
    if noise is not None:
        _check_known(posterior, noise, learned)
    places = itertools.count() if by_channel else itertools.repeat(0)
    scale_of = tuple(next(places) if free else -1 for free in learned)
    if len(set(scale_of)) > 1 and not knows_channels:
        if noise is None:
            return (-1,) * len(given)
        one = 'noise="one", ' if by_channel and all(learned) else ""
        raise LaplodeError(
            f'`noise`="{noise}": the leading eigenpairs of the exact Hessian are of all channels together. Take {one}'
            'curvature="ggn", or structure="full".'
        )
    return scale_of


def _check_known(posterior: Posterior, noise: str, known: list[bool]) -> None:
    """Raise `LaplodeError` where a channel has a scale that can't be learned, or none has one."""
    given = posterior.problem.likelihood.noise(len(known))
    if not any(given):
        name = type(posterior.problem.likelihood).__name__
        raise LaplodeError(f'`noise`="{noise}", but the likelihood, {name}, has no scale. Take noise="fixed".')
    for each, is_known in zip(given, known, strict=True):
        if each is None or is_known:
            continue
        if not each.scalable:
            raise LaplodeError(
                f'`noise`="{noise}": how observations beyond a limit of {each.family} weigh changes with the scale. '
                'Take noise="fixed", and the scale from fit (learned=True).'
            )
        raise LaplodeError(
            f'`noise`="{noise}": how curvature="{posterior.curvature.name}" changes with the scale of {each.family} is '
            'not known without computing it again. Take a posterior with curvature="ggn", or noise="fixed".'
        )


# ---- Comparison


def compare_evidence(posteriors: Mapping[str, Posterior]) -> "pd.DataFrame":
    """A table of models by log evidence, the best first, in the shape of `az.compare`.

    **Arguments:**

    - `posteriors`: name → posterior, all of the same data, of any architectures and structures of the ODE.

    **Returns:** a `pandas.DataFrame`, a row each: "rank"; "log_evidence" (nats); "p", the effective number of
    parameters; "diff", how far the log evidence is below the best; "log_weight" and
    "weight", the posterior probability of the model among these, all equally probable before, which `mix` takes, 0 for
    an optimum (or its mirror image, hidden units exchanged) that is in the table above it; "warning", where the
    evidence is not that of an optimum: a Newton decrement above 0.1 nats, or regularized curvature.

    **Raises:** `LaplodeError` when the data differ.

    MacKay (1992), "Bayesian interpolation".
    """
    if not isinstance(posteriors, Mapping) or not posteriors:
        raise LaplodeError("`posteriors` must be a mapping such as {'name': posterior, ...}, and not empty.")
    first = None
    for name, posterior in posteriors.items():
        if not isinstance(posterior, Posterior):
            raise LaplodeError(
                f"`posteriors`[{name!r}] must come from laplode.laplace, got {type(posterior).__name__}."
            )
        ys = np.asarray(posterior.problem.ys)
        if first is not None and (ys.shape != first.shape or not np.array_equal(ys, first, equal_nan=True)):
            raise LaplodeError(
                f"`posteriors`[{name!r}] has other data than the first: evidences compare on the same observations, in "
                "the same units, only."
            )
        first = ys
    values = np.array([float(p.log_evidence) for p in posteriors.values()])
    order = np.argsort(-values)
    found = [list(posteriors.values())[i] for i in order]
    values = values[order]
    twins = {j for i, j in itertools.combinations(range(len(found)), 2) if _same_optimum(found[i], found[j])}
    apart = np.where(np.isin(np.arange(len(found)), list(twins)), -np.inf, values)
    log_weights = apart - np.logaddexp.reduce(apart)
    return pd.DataFrame(
        {
            "rank": np.arange(len(found)),
            "log_evidence": values,
            "p": [p.diagnostics.effective_dof for p in found],
            "diff": values[0] - values,
            "log_weight": log_weights,
            "weight": np.exp(log_weights),
            "warning": [p.diagnostics.newton_decrement > 0.1 or p.diagnostics.regularized is not None for p in found],
        },
        index=pd.Index([list(posteriors)[i] for i in order]),
    )


# Two posteriors are of the same optimum when they agree to this, in nats and in the noise of an observation.
_SAME = 1e-2


def _same_optimum(one: Posterior, other: Posterior) -> bool:
    """Whether two posteriors are of the same optimum of one model, up to its symmetries."""
    apart = lambda a, b: abs(float(a) - float(b)) > _SAME
    if [leaf[:2] for leaf in one.parameters.leaves] != [leaf[:2] for leaf in other.parameters.leaves]:
        return False
    if apart(one.log_evidence, other.log_evidence) or apart(one.log_joint, other.log_joint):
        return False
    f, g = (evaluate(p.flow, p.mean) for p in (one, other))
    return not np.any(np.sqrt(one.problem.information(f)) * np.abs(f - g) > _SAME)

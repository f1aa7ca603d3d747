"""The same question gets the same answer, however it is put.

A table of rewordings × questions × stages. A question is a model at a point, a problem, and times to predict at; it
also knows how its answers read in the words of the first question of its kind. A rewording makes a question of a
question. All stages then have to give both the same answer. `-m whole` runs all combinations; by default a part of
them that meets every rewording and every stage, in about a minute.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from jax.flatten_util import ravel_pytree

import laplode as lp

KEY = jax.random.key(0)
TIGHT = diffrax.PIDController(rtol=1e-9, atol=1e-11)

few = settings(
    deadline=None,
    max_examples=3,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
powers = st.integers(-12, 12).filter(lambda power: power != 0)


# ---- Questions


class Units(NamedTuple):
    """How many of the new units are one of the old."""

    time: float = 1.0
    state: float = 1.0
    parameter: float = 1.0


ONE = Units()


@dataclasses.dataclass(frozen=True)
class Question:
    """What laplode is asked, and how the answers read in the words of the first question of its kind.

    θ of the first is (θ[entries] − shift) / factor, predictions are `predictions(f)`, and evidence is `nats` more.
    """

    model: Any
    problem: lp.Problem
    ts: np.ndarray
    where: Any = None
    factor: Any = 1.0
    shift: Any = 0.0
    entries: Any = ...
    predictions: Callable[[Any], Any] = lambda f: f
    nats: float = 0.0
    unit: float = 1.0  # of the states
    copies: int = 1  # of every value

    def but(self, **changes) -> "Question":
        """The question with some of it put in other words."""
        return dataclasses.replace(self, **changes)

    def data(self, **changes) -> lp.Problem:
        """The problem with some of its data replaced."""
        data = self.problem.data
        given = {"ts": data.ts, "ys": data.ys, "y0": data.y0, "args": data.args} | changes
        return lp.Problem(lp.Trajectories(**given), self.problem.likelihood, self.problem.prior)


T0, N, K = np.linspace(0.0, 3.0, 6), 2, 2
Y0 = np.array([[1.5, 0.2], [0.4, 2.0]])


class Relaxation(eqx.Module):
    """From a known state to a level, and all of it read with an offset. `power` is the unit of the offset: 10^power."""

    rate: Any
    level: Any
    offset: Any
    power: Any = eqx.field(default_factory=lambda: jnp.array(0))

    def __call__(self, ts, y0):
        fade = jnp.exp(-self.rate * (ts - ts[0])[:, None])
        return self.level + (y0 - self.level) * fade + self.offset / 10.0**self.power


def relaxation(units: Units, **leaves) -> Relaxation:
    """At a point that is no minimum: the likelihood's curvature has negative eigenvalues there."""
    offset = jnp.array(0.3 * units.state * units.parameter)
    power = jnp.array(round(np.log10(units.parameter)))
    rate, level = jnp.array([2.5, 0.4]) / units.time, jnp.array([-0.5, 1.8]) * units.state
    return Relaxation(**({"rate": rate, "level": level, "offset": offset, "power": power} | leaves))


@lru_cache
def relaxing() -> np.ndarray:
    rng = np.random.default_rng(0)
    made_by = Relaxation(jnp.array([0.7, 1.3]), jnp.array([0.3, 1.0]), jnp.array(0.1))
    return np.stack([made_by(T0, y) for y in Y0]) + 0.05 * rng.normal(size=(N, len(T0), K))


def _relaxation_factors(units: Units) -> np.ndarray:
    """Of rate (2), level (2), offset."""
    return np.array([1 / units.time] * 2 + [units.state] * 2 + [units.state * units.parameter])


def _relaxation_question(units: Units, likelihood, prior) -> Question:
    data = lp.Trajectories(T0 * units.time, relaxing() * units.state, Y0 * units.state)
    return Question(
        relaxation(units),
        lp.Problem(data, likelihood, prior),
        np.linspace(0, 4, 5) * units.time,
        factor=_relaxation_factors(units),
        predictions=lambda f: f / units.state,
        nats=relaxing().size * np.log(units.state),
        unit=units.state,
    )


PRECISION = np.array([1.0, 1.0, 0.25, 0.25, 4.0])


def gaussian(units: Units) -> Question:
    """A model in closed form, Gaussian noise, and a Gaussian prior."""
    prior = lp.GaussianPrior(PRECISION / _relaxation_factors(units) ** 2)
    return _relaxation_question(units, lp.Gaussian(0.05 * units.state), prior)


def normals(units: Units) -> Question:
    """The same with its prior written as named distributions."""
    sd = 1 / np.sqrt(PRECISION) * _relaxation_factors(units)
    named = {"rate": dist.Normal(0.0, sd[:2]), "level": dist.Normal(0.0, sd[2:4]), "offset": dist.Normal(0.0, sd[4])}
    return _relaxation_question(units, lp.Gaussian(0.05 * units.state), lp.NamedPriors(named))


def named(units: Units) -> Question:
    """Priors of parameters that have to be positive, and of heavy tails; noise by robust likelihood."""
    prior = lp.NamedPriors(
        {
            "rate": dist.LogNormal(np.log(1.0 / units.time), 0.5),
            "level": dist.StudentT(3.0, 0.0, 2.0 * units.state),
            "offset": dist.Uniform(-1.0 * units.state * units.parameter, 1.0 * units.state * units.parameter),
        }
    )
    question = _relaxation_question(units, lp.StudentT(4.0, 0.05 * units.state), prior)
    factor = np.array([1.0, 1.0, units.state, units.state, 1.0])
    return question.but(factor=factor, shift=np.array([-np.log(units.time)] * 2 + [0.0] * 3))


class Counts(eqx.Module):
    amount: Any
    rate: Any

    def __call__(self, ts, y0):
        return self.amount * y0 * jnp.exp(-self.rate * (ts - ts[0])[:, None])


def counts(units: Units) -> Question:
    """Counts have no unit."""
    rng = np.random.default_rng(1)
    ys = rng.poisson(20 * Y0[:, None] * np.exp(-0.5 * T0)[:, None])
    factor = np.array([1.0, 1 / units.time])
    return Question(
        Counts(jnp.array(15.0), jnp.array(0.9) / units.time),
        lp.Problem(lp.Trajectories(T0 * units.time, ys, Y0), lp.Poisson(), lp.GaussianPrior(0.01 / factor**2)),
        np.linspace(0, 4, 5) * units.time,
        factor=factor,
    )


class Noisy(eqx.Module):
    """A model that predicts the logarithm of the noise scale too."""

    mean: Relaxation
    log_scale: Any

    def __call__(self, ts, y0):
        mean = self.mean(ts, y0)
        return jnp.concatenate([mean, jnp.broadcast_to(self.log_scale, mean.shape)], axis=1)


def predicted_noise(units: Units) -> Question:
    first = gaussian(units)
    factor, shift = np.append(first.factor, 1.0), np.append(np.zeros(5), np.log(units.state))
    prior = lp.GaussianPrior(np.append(PRECISION, 0.3) / factor**2, shift)
    model = Noisy(first.model, jnp.log(0.2) + np.log(units.state))
    return first.but(
        model=model, problem=lp.Problem(first.problem.data, lp.Gaussian(), prior), factor=factor, shift=shift
    )


class Chain(eqx.Module):
    """A substance that turns into another, which decays. Linear, so that states may have any unit."""

    rate: Any

    def __call__(self, t, y, args):
        first = self.rate[0] * y[0]
        return jnp.stack([-first, first - self.rate[1] * y[1]])


@lru_cache
def chained() -> np.ndarray:
    rng = np.random.default_rng(2)
    a, b, t = 0.8, 0.3, T0[:, None]
    turned = a / (b - a) * (np.exp(-a * t) - np.exp(-b * t))
    ys = [np.hstack([y[0] * np.exp(-a * t), y[0] * turned + y[1] * np.exp(-b * t)]) for y in Y0]
    ys = np.stack(ys) + 0.02 * rng.normal(size=(N, len(T0), K))
    ys[:, 0] = np.nan  # given
    return ys


def chain(units: Units, rate=(0.7, 0.4), **options) -> Question:
    """A mechanistic model that Diffrax solves, its absolute tolerance in the unit of the states."""
    options = {"stepsize_controller": diffrax.PIDController(rtol=1e-9, atol=1e-11 * units.state)} | options
    data = lp.Trajectories(T0 * units.time, chained() * units.state, Y0 * units.state)
    return Question(
        lp.NeuralODE(Chain(jnp.asarray(rate) / units.time), **options),
        lp.Problem(data, lp.Gaussian(0.02 * units.state), lp.GaussianPrior(np.full(2, 0.1) * units.time**2)),
        np.linspace(0, 4, 5) * units.time,
        factor=np.full(2, 1 / units.time),
        predictions=lambda f: f / units.state,
        nats=np.sum(~np.isnan(chained())) * np.log(units.state),
        unit=units.state,
    )


def stiff(units: Units) -> Question:
    """The second rate is a thousand times as fast as the first, and an implicit solver takes it."""
    return chain(units, rate=(0.7, 400.0), solver=diffrax.Kvaerno3(), max_steps=16**4)


class Net(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t, y, args):
        return self.mlp(y) if args is None else self.mlp(y) + args


def neural(units: Units = ONE) -> Question:
    """A small neural field. Its leaves are numbers that float32 holds."""
    mlp = eqx.nn.MLP(2, 2, 2, 1, jnp.tanh, key=jax.random.key(3))
    mlp = jax.tree.map(lambda x: x.astype(jnp.float32).astype(float) if eqx.is_inexact_array(x) else x, mlp)
    data = lp.Trajectories(T0, chained(), Y0)
    problem = lp.Problem(data, lp.Gaussian(0.3), 1.0)
    return Question(lp.NeuralODE(Net(mlp), stepsize_controller=TIGHT), problem, np.linspace(0, 4, 5))


def forced(units: Units = ONE) -> Question:
    """The same with a forcing that is another in each trajectory."""
    first = neural()
    return first.but(problem=first.data(args=np.array([[0.1, -0.2], [0.3, 0.0]])))


QUESTIONS = {q.__name__: q for q in (gaussian, normals, named, counts, predicted_noise, chain, stiff, neural, forced)}
CLOSED = ("gaussian", "normals", "named", "counts", "predicted_noise")


# ---- Stages: an answer is a number or an array by name, in the words of the first question


def quietly(call, *args, **options):
    """What a call returns. The points are no minima, of which laplode warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)
        return call(*args, **options)


def posterior_of(question: Question, curvature="ggn", structure="full", regularization="clip", **options):
    options = {"curvature": curvature, "structure": structure, "regularization": regularization} | options
    return quietly(lp.laplace, question.model, question.problem, where=question.where, progress=False, **options)


def _in_first_words(question: Question, theta):
    return (np.asarray(theta)[question.entries] - question.shift) / question.factor


def laplace_stage(**options):
    def stage(question):
        posterior = posterior_of(question, **options)
        found = posterior.diagnostics
        return {
            "estimate": _in_first_words(question, posterior.mean),
            "standard deviation": np.asarray(posterior.marginal_std())[question.entries] / question.factor,
            "evidence": posterior.log_evidence + question.nats,
            "Newton decrement": found.newton_decrement,
            "effective degrees of freedom": found.effective_dof,
            "verdicts": (found.num_negative, found.regularized is None, found.newton_decrement > 0.1, found.inert),
        }

    return stage


def refine_stage(curvature):
    def stage(question):
        options = {"curvature": curvature, "decrement": 1e-9, "where": question.where, "progress": False}
        fit = quietly(lp.refine, question.model, question.problem, **options)
        return laplace_stage(curvature=curvature)(question.but(model=fit.model)) | {"Newton decrement": 0.0}

    return stage


def evidence_stage(question):
    """Precisions by leaf, whose entries have one unit, and noise by channel."""
    posterior = posterior_of(question)
    found = quietly(lp.maximize_evidence, posterior, precision="leaf", progress=False)
    scale = getattr(found.problem.likelihood, "scale", None)
    return {
        "standard deviation": np.asarray(found.marginal_std())[question.entries] / question.factor,
        "evidence": found.log_evidence + question.nats,
        "noise": 0.0 if scale is None else question.predictions(np.broadcast_to(scale, (1, 1, K))),
    }


def predict_stage(question):
    found = lp.predict(posterior_of(question), question.ts, key=KEY, num_samples=3, progress=False)
    variance = jnp.diagonal(found.covariance(), axis1=1, axis2=2).reshape(found.mean.shape)
    return {
        "predicted mean": question.predictions(np.asarray(found.mean)),
        "predicted standard deviation": np.abs(question.predictions(np.sqrt(variance))),
    }


def tree_stage(question):
    """What ArviZ gets: parameters as the model knows them, and the log density of each observation."""
    posterior = posterior_of(question)
    predictions = lp.predict(posterior, question.problem.data.ts, key=KEY, num_samples=3, progress=False)
    tree = lp.to_datatree(posterior, predictions, progress=False)
    drawn = eqx.filter_vmap(posterior.unravel)(predictions.thetas)
    for name, leaf in zip(
        tree["posterior"].data_vars, jax.tree.leaves(eqx.filter(drawn, eqx.is_inexact_array)), strict=True
    ):
        np.testing.assert_allclose(tree["posterior"][name][0], leaf)
    return {"observations": int(np.sum(~np.isnan(tree["log_likelihood"]["y"]))) / question.copies}


def save_stage(question):
    posterior = posterior_of(question)
    with tempfile.TemporaryDirectory() as folder:
        lp.save(f"{folder}/posterior", posterior)
        back = lp.load(f"{folder}/posterior", like=question.model)
    return {
        "standard deviation": np.asarray(back.marginal_std())[question.entries] / question.factor,
        "evidence": back.log_evidence + question.nats,
    }


STAGES: dict[str, Callable[[Question], dict[str, Any]]] = {
    "ggn": laplace_stage(),
    "hessian": laplace_stage(curvature="hessian"),
    "fisher": laplace_stage(curvature="fisher"),
    "abs": laplace_stage(curvature="hessian", regularization="abs"),
    "jitter": laplace_stage(curvature="hessian", regularization="jitter"),
    "low_rank": laplace_stage(structure="low_rank"),
    "hessian low_rank": laplace_stage(curvature="hessian", structure="low_rank"),
    "block_diagonal": laplace_stage(curvature="hessian", structure="block_diagonal"),
    "diagonal": laplace_stage(curvature="hessian", structure="diagonal"),
    "refine ggn": refine_stage("ggn"),
    "refine hessian": refine_stage("hessian"),
    "evidence": evidence_stage,
    "predict": predict_stage,
    "tree": tree_stage,
    "save": save_stage,
}


@lru_cache
def first_answer(question: str, stage: str):
    return STAGES[stage](QUESTIONS[question](ONE))


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-6) -> None:
    """To a part of each number; of estimates and predictions, of the largest; of nats and degrees of freedom, of 1."""
    for name, value in expected.items():
        if name in ("verdicts", "observations"):
            assert found[name] == value, name
            continue
        value, scale = np.asarray(value), np.max(np.abs(np.asarray(value, float)), initial=0.0)
        absolute = {"estimate": scale, "predicted mean": scale, "evidence": 1 + scale, "Newton decrement": 1.0}
        absolute["effective degrees of freedom"] = 1.0
        absolute = absolute.get(name, 0.0) * tolerance
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=absolute, err_msg=name)


# ---- The table


def rows(quick: list[tuple[str, str]], questions=tuple(QUESTIONS), stages=tuple(STAGES)):
    """Parameters (question, stage): those of `quick` always, all others with `-m whole`."""
    pairs = quick + [(q, s) for q in questions for s in stages if (q, s) not in quick]
    marks = lambda pair: [] if pair in quick else [pytest.mark.whole]
    found = [pytest.param(*pair, marks=marks(pair), id="-".join(pair)) for pair in pairs]
    return pytest.mark.parametrize(("question", "stage"), found)


def ask(question: str, stage: str, rewording: Callable[[Question], Question], tolerance: float = 1e-6) -> None:
    reworded = rewording(QUESTIONS[question](ONE))
    assert_same(STAGES[stage](reworded), first_answer(question, stage), tolerance)


# Where a solver takes steps of its own choice, their number may depend on rounding.
def _tolerance(question: str) -> float:
    return 1e-6 if question in CLOSED else 1e-4


@rows([("gaussian", "ggn"), ("normals", "low_rank"), ("named", "hessian"), ("counts", "predict"),
       ("predicted_noise", "diagonal"), ("chain", "ggn"), ("gaussian", "evidence")],
      questions=(*CLOSED, "chain", "stiff"))  # fmt: skip
@few
@given(power=powers)
def test_the_unit_of_time(question, stage, power):
    reworded = QUESTIONS[question](Units(time=10.0**power))
    assert_same(STAGES[stage](reworded), first_answer(question, stage), _tolerance(question))


@rows([("gaussian", "hessian"), ("gaussian", "jitter"), ("gaussian", "hessian low_rank"), ("normals", "refine ggn"),
       ("named", "ggn"), ("predicted_noise", "ggn"), ("gaussian", "predict"), ("chain", "predict")],
      questions=("gaussian", "normals", "named", "predicted_noise", "chain", "stiff"))  # fmt: skip
@few
@given(power=powers)
def test_the_unit_of_states(question, stage, power):
    reworded = QUESTIONS[question](Units(state=10.0**power))
    assert_same(STAGES[stage](reworded), first_answer(question, stage), _tolerance(question))


@rows([("gaussian", "abs"), ("gaussian", "block_diagonal"), ("normals", "ggn"), ("named", "save"),
       ("gaussian", "refine hessian")],
      questions=("gaussian", "normals", "named", "predicted_noise"))  # fmt: skip
@few
@given(power=powers)
def test_the_unit_of_a_parameter(question, stage, power):
    reworded = QUESTIONS[question](Units(parameter=10.0**power))
    assert_same(STAGES[stage](reworded), first_answer(question, stage), _tolerance(question))


@rows([("counts", "hessian"), ("neural", "ggn")])
def test_the_order_of_trajectories(question, stage):
    def reworded(first):
        data = first.problem.data
        args = None if data.args is None else data.args[::-1]
        problem = first.data(ts=data.ts[::-1], ys=data.ys[::-1], y0=data.y0[::-1], args=args)
        return first.but(problem=problem, predictions=lambda f: f[::-1])

    ask(question, stage, reworded)


class InOrder(eqx.Module):
    """A model with its channels in another order."""

    model: Any

    def __call__(self, ts, y0):
        return self.model(ts, y0)[:, ::-1]


@rows([("gaussian", "hessian"), ("chain", "ggn")], questions=("gaussian", "normals", "named", "counts", "chain"))
def test_the_order_of_channels(question, stage):
    """Where Diffrax solves, the states stay in their order, and what is observed of them comes in another."""

    def reworded(first):
        problem = first.data(ys=first.problem.data.ys[..., ::-1])
        predictions = lambda f: f[..., ::-1]
        if isinstance(first.model, lp.NeuralODE):
            model = lp.NeuralODE(
                first.model.vector_field,
                observe=lambda y, args: y[::-1],
                stepsize_controller=first.model.stepsize_controller,
            )
            return first.but(model=model, problem=problem, predictions=predictions)
        prior = problem.prior
        if isinstance(prior, lp.NamedPriors):
            prior = lp.NamedPriors({f"model.{name}": each for name, each in prior.named.items()})
        problem = lp.Problem(problem.data, problem.likelihood, prior)
        return first.but(model=InOrder(first.model), problem=problem, predictions=predictions)

    ask(question, stage, reworded, _tolerance(question))


class Seasonal(eqx.Module):
    """dy/dt = strength cos(t) y: after each half turn the state is what it was, whatever the strength."""

    strength: Any

    def __call__(self, ts, y0):
        return y0 * jnp.exp(self.strength * (jnp.sin(ts) - jnp.sin(ts[0]))[:, None])


SEASONAL_STAGES = ("ggn", "hessian", "low_rank", "refine ggn", "evidence")


@pytest.mark.parametrize("stage", [s if s in ("hessian", "evidence") else pytest.param(s, marks=pytest.mark.whole)
                                   for s in SEASONAL_STAGES])  # fmt: skip
def test_a_trajectory_split_where_its_state_is_known(stage):
    ts = np.linspace(0, 2 * np.pi, 9)
    model, y0 = Seasonal(jnp.array([0.4, -0.3])), np.array([[1.0, 2.0]])
    ys = np.asarray(model(ts, y0[0])) + 0.1 * np.random.default_rng(4).normal(size=(9, 2))
    ys[0] = np.nan
    again = ys[4:].copy()
    again[0] = np.nan
    one = lp.Trajectories(ts, ys, y0)
    two = lp.Trajectories(np.stack([ts[:5], ts[4:]]), np.stack([ys[:5], again]), np.concatenate([y0, y0]))
    first, second = (
        Question(Seasonal(jnp.array([0.2, -0.1])), lp.Problem(data, lp.Gaussian(0.1), 1.0), ts) for data in (one, two)
    )
    assert_same(STAGES[stage](second), STAGES[stage](first))


@rows([("gaussian", "hessian"), ("chain", "ggn")], questions=("gaussian", "normals", "chain", "stiff", "neural", "forced"),  # noqa: E501
      stages=tuple(s for s in STAGES if s not in ("evidence", "fisher")))  # fmt: skip
def test_every_value_given_twice(question, stage):
    """Two values of one noise say as much as one whose standard deviation is smaller by √2."""
    first = QUESTIONS[question](ONE)
    data = first.problem.data
    twice = lambda x: None if x is None else np.concatenate([x, x])
    given = dict(ts=twice(data.ts), ys=twice(data.ys), y0=twice(data.y0), args=twice(data.args))
    scale = float(first.problem.likelihood.scale)
    num = np.sum(~np.isnan(data.ys))
    told_twice = first.but(
        problem=first.data(**given),
        predictions=lambda f: f[:N],
        nats=num * 0.5 * np.log(4 * np.pi * scale**2),
        copies=2,
    )
    once = first.but(problem=lp.Problem(data, lp.Gaussian(scale / np.sqrt(2)), first.problem.prior))
    assert_same(STAGES[stage](told_twice), STAGES[stage](once), _tolerance(question))


@rows([("gaussian", "hessian"), ("named", "refine ggn"), ("chain", "ggn"), ("neural", "evidence")])
def test_times_at_which_nothing_was_observed(question, stage):
    ask(question, stage, lambda first: first.but(problem=_with_unobserved(first)), _tolerance(question))


def _with_unobserved(question: Question, unit: float = 1.0) -> lp.Problem:
    """One unobserved time among the others, one after them."""
    ts, ys = question.problem.data.ts, question.problem.data.ys
    nothing = np.full((N, 1, K), np.nan)
    ts = np.concatenate([ts[:, :2], (ts[:, 1:2] + ts[:, 2:3]) / 2, ts[:, 2:], ts[:, -1:] + 1.0], axis=1)
    return question.data(ts=ts, ys=np.concatenate([ys[:, :2], nothing, ys[:, 2:], nothing], axis=1))


class Broken(eqx.Module):
    """A model whose predictions are of no use after a time: 0, infinite or not a number."""

    model: Any
    how: str = eqx.field(static=True)

    def __call__(self, ts, y0):
        f = self.model(ts, y0)
        beyond = (ts > T0[-1] + 0.5)[:, None]
        if self.how == "scale of 0":
            mean, log_scale = jnp.split(f, 2, axis=1)
            return jnp.concatenate([mean, log_scale + jnp.log(jnp.where(beyond, 0.0, 1.0))], axis=1)
        factor = {"0": jnp.where(beyond, 0.0, 1.0), "inf": 1 / jnp.where(beyond, 0.0, 1.0),
                  "nan": jnp.sqrt(jnp.where(beyond, -1.0, 1.0)), "negative": jnp.where(beyond, -1.0, 1.0)}[self.how]  # fmt: skip  # noqa: E501
        return f * factor


@pytest.mark.parametrize("how", ["0", "inf", "nan", "negative", "scale of 0"])
@rows([("counts", "ggn"), ("counts", "hessian"), ("predicted_noise", "ggn"), ("predicted_noise", "hessian"),
       ("counts", "refine ggn")], questions=("gaussian", "counts", "predicted_noise"),
      stages=("ggn", "hessian", "fisher", "low_rank", "hessian low_rank", "block_diagonal", "diagonal", "refine ggn",
              "refine hessian", "evidence"))  # fmt: skip
def test_predictions_of_what_nobody_observed(question, stage, how):
    if how == "scale of 0" and question != "predicted_noise":
        pytest.skip("the scale is not predicted")

    def reworded(first):
        problem = _with_unobserved(first)
        return first.but(model=Broken(first.model, how), problem=problem)

    ask(question, stage, reworded)


class Held(eqx.Module):
    """A model of which one leaf is used as it is, and not differentiated."""

    model: Any

    def __call__(self, ts, y0):
        return eqx.tree_at(lambda m: m.offset, self.model, jax.lax.stop_gradient(self.model.offset))(ts, y0)


HELD_STAGES = tuple(s for s in STAGES if s not in ("save",))


@pytest.mark.parametrize("stage", [s if s in ("hessian", "refine ggn", "low_rank") else pytest.param(s, marks=pytest.mark.whole)  # noqa: E501
                                   for s in HELD_STAGES])  # fmt: skip
@pytest.mark.parametrize("how", ["constant", "stop_gradient"])
def test_a_parameter_that_is_held(how, stage):
    """Left out by `where`, written as a number, or cut off from its gradient."""
    first = gaussian(ONE)
    model, problem = first.model, first.problem
    prior = lambda num: lp.Problem(problem.data, problem.likelihood, lp.GaussianPrior(PRECISION[:num]))
    by_where = first.but(problem=prior(4), where=lambda m: (m.rate, m.level), factor=1.0)
    reworded = by_where.but(model=eqx.tree_at(lambda m: m.offset, model, float(model.offset)), where=None)
    if how == "stop_gradient":
        reworded = by_where.but(model=Held(model), problem=prior(5), where=None, entries=slice(4))
    expected, found = STAGES[stage](by_where), STAGES[stage](reworded)
    found = {name: value for name, value in found.items() if name != "verdicts"}
    assert_same(found, {name: expected[name] for name in found})


class Infusion(eqx.Module):
    """One compartment, infused at a rate until a time that the data give."""

    decay: Any
    strength: Any

    def __call__(self, t, y, args):
        return jnp.where(t < 1.0, self.strength, 0.0) - self.decay * y


class InPieces(eqx.Module):
    """The same, solved by hand on both sides of the jump."""

    decay: Any
    strength: Any

    def __call__(self, ts, y0):
        level = self.strength / self.decay
        during, after = jnp.minimum(ts, 1.0), jnp.maximum(ts - 1.0, 0.0)
        rising = level + (y0[0] - level) * jnp.exp(-self.decay * during)
        return (rising * jnp.exp(-self.decay * after))[:, None]


@pytest.mark.parametrize("solver", [diffrax.Tsit5(), diffrax.Dopri5()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("stage", ["ggn", "predict", *(pytest.param(s, marks=pytest.mark.whole)
                                                       for s in ("hessian", "refine ggn"))])  # fmt: skip
def test_a_jump_declared_to_the_controller(stage, solver):
    ts = np.linspace(0, 4, 9)
    by_hand = InPieces(jnp.array(0.5), jnp.array(2.0))
    ys = np.asarray(by_hand(ts, jnp.zeros(1))) + 0.05 * np.random.default_rng(0).normal(size=(9, 1))
    ys[0] = np.nan
    problem = lp.Problem(lp.Trajectories(ts, ys, [0.0]), lp.Gaussian(0.05), 1e-2)
    controller = diffrax.ClipStepSizeController(diffrax.PIDController(1e-7, 1e-9), jump_ts=jnp.array([1.0]))
    declared = lp.NeuralODE(Infusion(by_hand.decay, by_hand.strength), solver=solver, stepsize_controller=controller)
    first, second = (Question(model, problem, np.linspace(0, 5, 6)) for model in (by_hand, declared))
    assert_same(STAGES[stage](second), STAGES[stage](first), 1e-4)


@pytest.mark.parametrize("stage", ["ggn", *(pytest.param(s, marks=pytest.mark.whole) for s in ("hessian", "predict"))])
def test_an_initial_state_given_or_known_by_a_tight_prior(stage):
    first = chain(ONE)
    mean = np.concatenate([np.zeros(2), Y0.ravel()])
    precision = np.concatenate([np.full(2, 0.1), np.full(4, 1e14)])
    model = lp.NeuralODE(first.model.vector_field, y0=Y0, stepsize_controller=TIGHT)
    problem = first.data(y0=None)
    problem = lp.Problem(problem.data, problem.likelihood, lp.GaussianPrior(precision, mean))
    learned = first.but(model=model, problem=problem, entries=slice(2))
    found, expected = STAGES[stage](learned), first_answer("chain", stage)
    assert_same(found, expected, 1e-4)


@pytest.mark.parametrize("form", ["channel", "value"])
@rows([("gaussian", "hessian"), ("chain", "ggn")], questions=("gaussian", "normals", "chain", "neural"))
def test_a_known_noise_in_several_forms(question, stage, form):
    def reworded(first):
        problem = first.problem
        shape = (K,) if form == "channel" else problem.data.ys.shape
        likelihood = lp.Gaussian(np.full(shape, float(problem.likelihood.scale)))
        return first.but(problem=lp.Problem(problem.data, likelihood, problem.prior))

    ask(question, stage, reworded)


@rows([("chain", "ggn"), ("chain", "predict")], questions=("chain", "neural", "forced"))
def test_another_solver(question, stage):
    ask(question, stage, lambda first: first.but(
        model=eqx.tree_at(lambda m: m.solver, first.model, diffrax.Dopri8())), 1e-4)  # fmt: skip


@rows([("counts", "hessian"), ("neural", "ggn")], questions=("counts", "neural", "forced"))
def test_leaves_in_float32(question, stage):
    def reworded(first):
        cast = lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x
        if isinstance(first.model, lp.NeuralODE):
            cast_field = jax.tree.map(cast, first.model.vector_field)
            return first.but(model=eqx.tree_at(lambda m: m.vector_field, first.model, cast_field))
        return first.but(model=jax.tree.map(cast, first.model))

    # 0.9 is no number of float32.
    ask(question, stage, reworded, 1e-9 if question != "counts" else 1e-4)


# ---- One answer by several routes


@few
@given(power=st.integers(-18, 2))
@pytest.mark.parametrize("question", ["gaussian", pytest.param("chain", marks=pytest.mark.whole)])
def test_low_rank_of_full_rank(question, power):
    """However weak the prior is beside the data."""
    first = QUESTIONS[question](ONE)
    problem = first.problem
    asked = first.but(problem=lp.Problem(problem.data, problem.likelihood, 10.0**power))
    full, low_rank = (laplace_stage(structure=structure)(asked) for structure in ("full", "low_rank"))
    assert_same(low_rank, full, 1e-5)


@pytest.mark.parametrize("structure", ["block_diagonal", "low_rank"])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_structures_that_lose_nothing(structure, curvature):
    """With one leaf its block is all of Λ; of as many eigenpairs as parameters none is left out."""

    class Flat(eqx.Module):
        theta: Any

        def __call__(self, ts, y0):
            return Relaxation(self.theta[:2], self.theta[2:4], self.theta[4])(ts, y0)

    first = gaussian(ONE)
    theta = ravel_pytree(eqx.filter(first.model, eqx.is_inexact_array))[0]
    asked = first.but(model=Flat(theta))
    expected = laplace_stage(curvature=curvature, regularization="abs")(asked)
    assert_same(laplace_stage(curvature=curvature, structure=structure, regularization="abs")(asked), expected)


# ---- Another process

PRIORS = {
    "Normal": dist.Normal(0.5, 2.0),
    "Gamma": dist.Gamma(2.0, 3.0),
    "LogNormal": dist.LogNormal(-0.5, 0.5),
    "Uniform": dist.Uniform(0.1, 2.0),
    "StudentT": dist.StudentT(3.0, 0.5, 2.0),
    "Beta": dist.Beta(2.0, 3.0),
    "TruncatedNormal": dist.TruncatedNormal(0.5, 2.0, low=0.0, high=3.0),
    "Weibull": dist.Weibull(2.0, 3.0),
    "Gumbel": dist.Gumbel(0.5, 2.0),
    "InverseGamma": dist.InverseGamma(2.0, 3.0),
}


class Rates(eqx.Module):
    rates: dict[str, Any]

    def __call__(self, ts, y0):
        return y0 * jnp.exp(-jnp.stack([self.rates[name] for name in sorted(self.rates)]) * (ts - ts[0])[:, None])


def rates_posterior(checkpoint=None):
    """With a parameter for each of the priors. The other process makes it too."""
    model = Rates({name: jnp.array(0.6) for name in PRIORS})
    ts, y0 = np.linspace(0, 2, 4), np.ones((1, len(PRIORS)))
    prior = lp.NamedPriors({f"rates['{name}']": each for name, each in PRIORS.items()})
    problem = lp.Problem(lp.Trajectories(ts, np.asarray(model(ts, y0[0])) + 0.01, y0), lp.Gaussian(0.05), prior)
    return quietly(lp.laplace, model, problem, progress=False, checkpoint=checkpoint)


_ELSEWHERE = textwrap.dedent(
    """
    import json, sys, jax, numpy as np
    jax.config.update("jax_enable_x64", True)
    import laplode as lp
    from test_rewordings import PRIORS, rates_posterior
    folder, theta = sys.argv[1], np.linspace(-1, 1, len(PRIORS))
    again = rates_posterior(folder + "/rows")
    back = lp.load(folder + "/posterior", like=again.parameters.model)
    density = [float(each.log_prob(0.7)) for _, each in sorted(back.problem.prior.named.items())]
    print(json.dumps([float(back.log_evidence), float(back.log_prob(theta)), float(again.log_evidence), *density]))
    """
)


def test_another_process_with_other_hashes(tmp_path):
    """What is saved means the same there, and the exact Hessian goes on from its checkpoint."""
    posterior = rates_posterior(tmp_path / "rows")
    lp.save(tmp_path / "posterior", posterior)
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ELSEWHERE, str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    theta = np.linspace(-1, 1, len(PRIORS))
    density = [float(each.log_prob(0.7)) for _, each in sorted(posterior.problem.prior.named.items())]
    expected = [posterior.log_evidence, posterior.log_prob(theta), posterior.log_evidence, *density]
    np.testing.assert_allclose(json.loads(run.stdout), np.asarray(expected, float), rtol=1e-9)

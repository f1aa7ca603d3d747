"""Models as strangers write them: one curve in forty ways, each through every stage, against its closed form.

Whatever is written, each stage is right to an independent computation (`jax.hessian` of the closed form) or says in one
`LaplodeError` what is wrong. `-m whole` runs all of them.
"""

import functools as ft
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
from hypothesis import Phase, given, settings, strategies as st
from jax.experimental.ode import odeint

import laplode as lp

KEY = jax.random.key(0)
TS, LATER = np.linspace(0, 2, 6), np.linspace(0, 3, 6)
Y0, NEW_Y0 = np.array([[2.0, 0.1], [0.3, 1.5]]), np.array([[1.0, 0.0], [0.5, 2.5]])
OFFSETS = np.array([0.0, 0.2])
RATE, LEVEL, SCALE, PRECISION = 0.9, 0.5, 0.1, 0.7


def relaxing(rate, level, ts, y0, offset=0.0):
    """Toward a level: the curve that all models here write."""
    level = level + offset
    return level + (y0 - level) * jnp.exp(-rate * (ts - ts[0]))[:, None]


def observed(args=None):
    offsets = 0 * OFFSETS if args is None else OFFSETS
    clean = jax.vmap(ft.partial(relaxing, RATE, LEVEL), (None, 0, 0))(TS, Y0, offsets)
    noise = SCALE * np.random.default_rng(0).normal(size=clean.shape)
    return lp.Trajectories(TS, np.asarray(clean + noise), Y0, args)


# ---- Signatures


class Plain(eqx.Module):
    rate: Any
    level: Any

    def __call__(self, ts, y0):
        return relaxing(self.rate, self.level, ts, y0)

    def predict(self, ts, y0):
        return self(ts, y0)


class Defaulted(Plain):
    def __call__(self, ts, y0, args=None):
        return super().__call__(ts, y0)


class Three(Plain):
    def __call__(self, ts, y0, args):
        assert args is None
        return super().__call__(ts, y0)


class Inference(Plain):
    def __call__(self, ts, y0, inference=True):
        return relaxing(self.rate if inference else 2 * self.rate, self.level, ts, y0)


class Keyword(Plain):
    def __call__(self, ts, y0, *, key=None, **options):
        return super().__call__(ts, y0)


class Compiled(Plain):
    @eqx.filter_jit
    def __call__(self, ts, y0):
        return super().__call__(ts, y0)


class WithArgs(Plain):
    def __call__(self, ts, y0, args):
        return relaxing(self.rate, self.level, ts, y0, args["offset"] + 0 * args["group"])


# ---- What parameters are kept in


class Contained(eqx.Module):
    parts: dict[str, Any]

    def __call__(self, ts, y0):
        return relaxing(self.parts["a/rate"], self.parts["b"][0][0], ts, y0)


class Mixed(eqx.Module):
    rate: Any
    level: Any
    none: None
    number: jax.Array
    flag: jax.Array
    key: jax.Array
    constant: float
    activation: Callable
    name: str = eqx.field(static=True)

    def __call__(self, ts, y0):
        return relaxing(self.activation(self.rate) * self.number, self.level * self.constant, ts, y0)


class WeightNormed(eqx.Module):
    gain: Any
    direction: Any

    def __call__(self, ts, y0):
        return relaxing(*(self.gain * self.direction / jnp.linalg.norm(self.direction)), ts, y0)


class Tied(eqx.Module):
    shared: eqx.nn.Shared

    def __init__(self, value):
        pair = (Plain(jnp.array(value), jnp.array(LEVEL)), Plain(jnp.array(value), jnp.array(LEVEL)))
        self.shared = eqx.nn.Shared(pair, where=lambda p: p[1].rate, get=lambda p: p[0].rate)

    def __call__(self, ts, y0):
        one, two = self.shared()
        return relaxing((one.rate + two.rate) / 2, (one.level + two.level) / 2, ts, y0)


class Twice(eqx.Module):
    one: Any
    two: Any
    level: Any

    def __call__(self, ts, y0):
        return relaxing((self.one + self.two) / 2, self.level, ts, y0)


class Counting(eqx.Module):
    """With a running statistic, which is no parameter."""

    rate: Any
    level: Any
    index: eqx.nn.StateIndex
    state: eqx.nn.State

    def __call__(self, ts, y0):
        return relaxing(self.rate * self.state.get(self.index), self.level, ts, y0)


def counting():
    class Inner(eqx.Module):
        index: eqx.nn.StateIndex

        def __init__(self):
            self.index = eqx.nn.StateIndex(jnp.array(1.0))

    inner, state = eqx.nn.make_with_state(Inner)()
    return Counting(jnp.array(RATE), jnp.array(LEVEL), inner.index, state)


class Normalized(eqx.Module):
    """With batch normalization, in inference mode."""

    rate: Any
    level: Any
    norm: eqx.nn.BatchNorm
    state: eqx.nn.State

    def __call__(self, ts, y0):
        curve = relaxing(self.rate, self.level, ts, y0)
        return jax.vmap(lambda y: self.norm(y, self.state, inference=True)[0])(curve)


def normalized():
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        2, axis_name="batch", eps=0.0, channelwise_affine=False, mode="ema", dtype=jnp.float64
    )
    state = state.set(norm.ema_state_index, (jnp.zeros(2), jnp.ones(2)))
    state = state.set(norm.ema_first_time_index, jnp.array(False))
    return Normalized(jnp.array(RATE), jnp.array(LEVEL), norm, state)


class ComplexInside(Plain):
    def __call__(self, ts, y0):
        turning = jnp.exp(-(self.rate + 2j) * ts) * jnp.exp(2j * ts)
        return self.level + (y0 - self.level) * turning.real[:, None]


class Rooted(Plain):
    """Its rate is found by a root finder."""

    def __call__(self, ts, y0):
        solver = optimistix.Newton(rtol=1e-12, atol=1e-12)
        rate = optimistix.root_find(lambda x, a: x**3 - a, solver, jnp.array(1.0), self.rate).value
        return relaxing(rate, self.level, ts, y0)


@jax.custom_vjp
def twice(x):
    return 2 * x


twice.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


class CustomReverse(Plain):
    def __call__(self, ts, y0):
        return relaxing(twice(self.rate) / 2, self.level, ts, y0)


# ---- Solvers inside


class Solved(Plain):
    options: Callable[[Any], dict[str, Any]] = eqx.field(static=True, default=lambda ts: {})
    read: Callable[[Any, Any], Any] = eqx.field(static=True, default=lambda solution, ts: solution.ys)

    def __call__(self, ts, y0):
        arguments = dict(saveat=diffrax.SaveAt(ts=ts), adjoint=diffrax.DirectAdjoint(), throw=False)
        arguments |= dict(stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-10), max_steps=256)
        term = diffrax.ODETerm(lambda t, y, args: args[0] * (args[1] - y))
        ends = dict(t0=ts[0], t1=ts[-1], dt0=None, y0=y0, args=(self.rate, self.level))
        return self.read(diffrax.diffeqsolve(term, diffrax.Tsit5(), **(ends | arguments | self.options(ts))), ts)


class ByOdeint(Plain):
    def __call__(self, ts, y0):
        field = lambda y, t, rate, level: rate * (level - y)
        return odeint(field, y0, ts, jnp.asarray(self.rate), jnp.asarray(self.level), rtol=1e-9, atol=1e-10)


class ByScan(Plain):
    """Runge-Kutta steps by hand."""

    def __call__(self, ts, y0, unroll=1):
        field = lambda y: self.rate * (self.level - y)

        def small(y, h):
            k1 = field(y)
            k2 = field(y + h / 2 * k1)
            k3 = field(y + h / 2 * k2)
            return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + field(y + h * k3)), None

        step = lambda y, h: (jax.lax.scan(small, y, jnp.full(24, h / 24))[0],) * 2
        return jnp.concatenate([y0[None], jax.lax.scan(step, y0, jnp.diff(ts), unroll=unroll)[1]])


class ByWhile(Plain):
    """The exponential by its series, in a loop that knows no reverse mode."""

    def __call__(self, ts, y0):
        def body(carry):
            n, term, total = carry
            return n + 1, -term * self.rate * (ts - ts[0]) / (n + 1), total + term

        start = (jnp.array(0.0), jnp.ones_like(ts), jnp.zeros_like(ts))
        total = jax.lax.while_loop(lambda carry: carry[0] < 60, body, start)[2]
        return self.level + (y0 - self.level) * total[:, None]


class Field(eqx.Module):
    rate: Any
    level: Any

    def __call__(self, t, y, args):
        return self.rate * (self.level + (0 if args is None else args["offset"]) - y)


class Sub(lp.NeuralODE):
    """Adds nothing to what it inherits."""


class See(eqx.Module):
    gain: Any

    def __call__(self, y, args):
        return self.gain * y


TIGHT = diffrax.PIDController(rtol=1e-9, atol=1e-10)


def field():
    return Field(jnp.array(RATE), jnp.array(LEVEL))


def plain(kind=Plain, **options):
    return kind(jnp.array(RATE), jnp.array(LEVEL), **options)


class Case(NamedTuple):
    make: Callable[[], Any]
    known: Callable[[Any], Any] = lambda theta: theta  # rate and level of θ
    args: Any = None
    no_hessian: str | None = None
    warns: str | None = None
    rtol: float = 1e-7
    at_minimum: bool = True


ARGS = {"offset": OFFSETS, "group": np.array([1, 2])}
BY_DEFAULT = ("plain", "inference=True", "filter_jit", "containers", "leaves of all kinds", "float32", "args")
CASES = {
    "plain": Case(plain),
    "args=None": Case(lambda: plain(Defaulted)),
    "args without data's": Case(lambda: plain(Three)),
    "inference=True": Case(lambda: plain(Inference)),
    "keywords": Case(lambda: plain(Keyword)),
    "filter_jit": Case(lambda: eqx.filter_jit(plain())),
    "compiled method": Case(lambda: plain(Compiled)),
    "bound method": Case(lambda: plain().predict),
    "eqx.Partial": Case(lambda: eqx.Partial(plain(Inference), inference=True)),
    "args": Case(lambda: plain(WithArgs), args=ARGS),
    "containers": Case(lambda: Contained({"a/rate": jnp.array(RATE), "b": [(jnp.array(LEVEL),)]})),
    "leaves of all kinds": Case(
        lambda: plain(
            Mixed,
            none=None,
            number=jnp.array(1),
            flag=jnp.array(True),
            key=KEY,
            constant=1.0,
            activation=jnp.abs,
            name="m",
        )
    ),
    "NumPy arrays": Case(lambda: Plain(np.array(RATE), np.array(LEVEL))),
    "float32": Case(lambda: Plain(jnp.array(RATE, jnp.float32), jnp.array(LEVEL, jnp.float32))),
    "weight norm": Case(
        lambda: WeightNormed(jnp.array(1.0), jnp.array([RATE, LEVEL])),
        lambda t: t[0] * t[1:] / jnp.linalg.norm(t[1:]),
        at_minimum=False,  # with a prior there is none
    ),
    "eqx.nn.Shared": Case(lambda: Tied(RATE), lambda t: (t[0], (t[1] + t[2]) / 2)),
    "one array twice": Case(
        lambda: Twice(*2 * (jnp.array(RATE),), jnp.array(LEVEL)),
        lambda t: ((t[0] + t[1]) / 2, t[2]),
        warns="One array stands in several places",
    ),
    "eqx.nn.State": Case(counting),
    "batch norm": Case(normalized),
    "complex inside": Case(lambda: plain(ComplexInside)),
    "root finder": Case(lambda: plain(Rooted), lambda t: (jnp.cbrt(t[0]), t[1])),
    "custom_vjp": Case(lambda: plain(CustomReverse)),
    "DirectAdjoint": Case(lambda: plain(Solved)),
    "RecursiveCheckpointAdjoint": Case(
        lambda: plain(Solved, options=lambda ts: dict(adjoint=diffrax.RecursiveCheckpointAdjoint())),
        no_hessian="DirectAdjoint",
    ),
    "BacksolveAdjoint": Case(
        lambda: plain(Solved, options=lambda ts: dict(adjoint=diffrax.BacksolveAdjoint())), no_hessian="DirectAdjoint"
    ),
    "ForwardMode": Case(
        lambda: plain(Solved, options=lambda ts: dict(adjoint=diffrax.ForwardMode())), no_hessian="DirectAdjoint"
    ),
    "dense": Case(
        lambda: plain(
            Solved,
            options=lambda ts: dict(saveat=diffrax.SaveAt(dense=True)),
            read=lambda solution, ts: jax.vmap(solution.evaluate)(ts),
        ),
        rtol=1e-5,
    ),
    "an event that never comes": Case(
        lambda: plain(Solved, options=lambda ts: dict(event=diffrax.Event(lambda t, y, args, **_: y[0] > 1e3)))
    ),
    "odeint": Case(lambda: plain(ByOdeint), no_hessian="second derivatives", rtol=1e-5),
    "scan": Case(lambda: plain(ByScan)),
    "while": Case(lambda: plain(ByWhile), no_hessian="second derivatives"),
    "NeuralODE": Case(lambda: lp.NeuralODE(field(), stepsize_controller=TIGHT)),
    "NeuralODE, args": Case(lambda: lp.NeuralODE(field(), stepsize_controller=TIGHT), args=ARGS),
    "NeuralODE, implicit": Case(
        lambda: lp.NeuralODE(field(), solver=diffrax.Kvaerno5(), stepsize_controller=TIGHT), rtol=1e-5
    ),
    "NeuralODE, fixed steps": Case(
        lambda: lp.NeuralODE(
            field(), solver=diffrax.Dopri8(), stepsize_controller=diffrax.ConstantStepSize(), dt0=0.1, max_steps=64
        ),
        rtol=1e-5,
    ),
    "NeuralODE, subclass": Case(lambda: Sub(field(), stepsize_controller=TIGHT)),
    "NeuralODE, observed": Case(
        lambda: lp.NeuralODE(field(), observe=lambda y, args: 1.0 * y, stepsize_controller=TIGHT)
    ),
}


@jax.jit
def _stacked(rate, level, ts, y0, offsets):
    return jax.vmap(ft.partial(relaxing, rate, level), (None, 0, 0))(ts, y0, offsets)


class Known:
    """The closed form of a case: predictions, loss and their derivatives, of θ."""

    def __init__(self, case: Case, data: lp.Trajectories):
        offsets = OFFSETS if case.args is not None else 0 * OFFSETS
        predictions = lambda theta, ts, y0: _stacked(*case.known(theta), ts, y0, offsets)

        def misfit(theta):
            return 0.5 * jnp.sum(((predictions(theta, TS, Y0) - data.ys) / SCALE)[:, 1:] ** 2)

        def everything(theta):
            J = jax.jacfwd(lambda t: predictions(t, TS, Y0)[:, 1:].ravel())(theta)
            later = lambda t: predictions(t, LATER, NEW_Y0)
            slope = jax.jacfwd(misfit)(theta) + PRECISION * theta
            return J.T @ J / SCALE**2, jax.hessian(misfit)(theta), slope, later(theta), jax.jacfwd(later)(theta)

        self.at = jax.jit(everything)


def quietly(function, *args, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return function(*args, **options), [str(each.message) for each in caught]


def close(found, expected, rtol):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * np.max(np.abs(expected)))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.whole) for name in CASES]
)
def test_each_stage_is_right_or_says_why_not(name):
    case = CASES[name]
    model, data = case.make(), observed(case.args)
    known = Known(case, data)
    options = dict(precision=PRECISION, scale=SCALE)
    (problem, match), _ = quietly(lp.problem_from_loss, model, data, **options)
    assert match.scale == SCALE

    route = "ggn" if case.no_hessian else "hessian"
    if case.at_minimum:
        fit, said = quietly(lp.refine, model, problem, curvature=route, progress=False)
        assert fit.reason in ("converged", "no progress") and (not case.warns or case.warns in " ".join(said))
        model = fit.model
    for curvature in ("ggn", "hessian"):
        if curvature == "hessian" and case.no_hessian:
            for stage in (lp.refine, lp.laplace):
                with warnings.catch_warnings(), pytest.raises(lp.LaplodeError, match=case.no_hessian):
                    warnings.simplefilter("ignore")
                    stage(model, problem, curvature="hessian", progress=False)
            continue
        posterior, _ = quietly(lp.laplace, model, problem, curvature=curvature, progress=False)
        gauss_newton, hessian, slope, mean, J = known.at(posterior.mean)
        prior = PRECISION * np.eye(posterior.size)
        expected = prior + np.asarray(gauss_newton if curvature == "ggn" else hessian)
        close(posterior.precision(), expected, case.rtol)
        if case.at_minimum:
            assert 0.5 * slope @ np.linalg.solve(expected, slope) < 1e-4

        arguments = dict(num_samples=4, key=KEY, progress=False)
        new, _ = quietly(lp.predict, posterior, LATER, NEW_Y0, case.args, **arguments)
        close(new.mean, mean, case.rtol)
        J = np.asarray(J).reshape(2, -1, posterior.size)
        close(new.covariance(), J @ np.linalg.inv(expected) @ np.swapaxes(J, 1, 2), 10 * case.rtol)
    here, _ = quietly(lp.predict, posterior, TS, **arguments)
    tree, _ = quietly(lp.to_datatree, posterior, here, new, progress=False)
    for group in ("posterior", "posterior_predictive", "predictions", "log_likelihood"):
        variables = tree[group].dataset.data_vars
        assert variables and all(np.all(np.isfinite(each)) for each in variables.values())
    drawn = np.concatenate([np.ravel(each[0, 0]) for each in tree["posterior"].dataset.data_vars.values()])
    close(np.sort(drawn), np.sort(here.thetas[0]), 1e-12)


# ---- What can't be understood


class Swapped(Plain):
    def __call__(self, y0, ts):
        return super().__call__(ts, y0)


class SwappedToo(Plain):
    def __call__(self, x0, grid):
        return super().__call__(grid, x0)


class Evaluated(Plain):
    def __call__(self, state, t_eval):
        return super().__call__(t_eval, state)


class ArgsFirst(Plain):
    def __call__(self, ts, args, y0=None):
        return super().__call__(ts, y0)


def returning(change):
    class Returning(Plain):
        def __call__(self, ts, y0):
            return change(self, super().__call__(ts, y0), ts, y0)

    return lambda: plain(Returning)


def branching(self, ys, ts, y0):
    return ys if self.rate > 0 else -ys


def numpys(self, ys, ts, y0):
    return jnp.asarray(np.exp(np.asarray(self.rate) * np.ones((6, 2))))


def called_back(self, ys, ts, y0):
    back = lambda ys: np.asarray(ys)
    return jax.pure_callback(back, jax.ShapeDtypeStruct(ys.shape, ys.dtype), ys, vmap_method="sequential")


REFUSED = {
    "exchanged": (lambda: plain(Swapped), r"\(y0, ts\).*times come first"),
    "exchanged, the state by name": (lambda: plain(SwappedToo), r"\(x0, grid\).*times come first"),
    "exchanged, the times by a word": (lambda: plain(Evaluated), r"\(state, t_eval\).*times come first"),
    "args before the state": (lambda: plain(ArgsFirst), r"\(ts, args, y0\).*state comes before the args"),
    "a tuple": (returning(lambda m, ys, ts, y0: (ys, 1)), "returns a tuple of 2"),
    "a dict": (returning(lambda m, ys, ts, y0: {"ys": ys}), "returns a dict of 'ys'"),
    "a Solution": (lambda: plain(Solved, read=lambda solution, ts: solution), "returns a diffrax.Solution"),
    "a batch": (returning(lambda m, ys, ts, y0: jax.vmap(lambda y: y + 0 * ts)(y0)), "model"),
    "one axis": (returning(lambda m, ys, ts, y0: ys[:, 0]), r"predicts shape \(6,\)"),
    "too many channels": (returning(lambda m, ys, ts, y0: jnp.tile(ys, 2)), r"predicts shape \(6, 4\)"),
    "complex predictions": (returning(lambda m, ys, ts, y0: ys + 0j), "complex"),
    "whole numbers": (returning(lambda m, ys, ts, y0: jnp.round(ys).astype(int)), "int"),
    "a complex parameter": (lambda: Plain(jnp.array(RATE + 0j), jnp.array(LEVEL)), "complex"),
    "a parameter that is NaN": (lambda: Plain(jnp.array(np.nan), jnp.array(LEVEL)), "not finite: rate"),
    "no parameters": (lambda: Plain(RATE, LEVEL), "no parameters"),
    "a function": (lambda: lambda ts, y0: relaxing(RATE, LEVEL, ts, y0), "callable eqx.Module"),
    "jax.jit": (lambda: jax.jit(lambda ts, y0: relaxing(RATE, LEVEL, ts, y0)), "callable eqx.Module"),
    "a model and its state": (lambda: (plain(), 3), "callable eqx.Module"),
    "a branch in Python": (returning(branching), "if|bool"),
    "NumPy inside": (returning(numpys), "NumPy|numpy|Tracer"),
    "a callback": (returning(called_back), "differentiated"),
    "no influence": (returning(lambda m, ys, ts, y0: jax.lax.stop_gradient(ys)), "influence|stop_gradient"),
    "NaN": (returning(lambda m, ys, ts, y0: ys * jnp.nan), "trajectory 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_understood_is_refused_in_one_error(name):
    make, match = REFUSED[name]
    problem = lp.Problem(observed(), lp.Gaussian(SCALE), PRECISION)
    stages = [
        lambda: lp.problem_from_loss(
            make(), problem.data, precision=PRECISION, loss=lambda model: jnp.sum(model(TS, Y0[0]))
        ),
        lambda: lp.refine(make(), problem, progress=False),
        *(ft.partial(lp.laplace, make(), problem, curvature=c, progress=False) for c in ("ggn", "hessian")),
    ]
    for stage in stages:
        with warnings.catch_warnings(), pytest.raises(lp.LaplodeError, match=match):
            warnings.simplefilter("ignore")
            stage()


# ---- No NaN without its flag


class Powers(eqx.Module):
    """Where a value, a first or a second derivative is finite depends on the powers and on where they are taken."""

    rate: Any

    def __call__(self, ts, y0, args):
        base = jnp.maximum(self.rate * ts - args["shift"], 0.0)
        return jnp.stack([base ** args["power"] + y0[0], jnp.log(self.rate) - args["shift"] * ts], axis=-1)


LIKELIHOODS = {
    "Gaussian": (lp.Gaussian(0.3), lambda ys: ys),
    "LogNormal": (lp.LogNormal(0.3), lambda ys: np.exp(ys)),
    "StudentT": (lp.StudentT(3.0, 0.3), lambda ys: ys),
    "Poisson": (lp.Poisson(), lambda ys: np.round(np.exp(ys))),
    "NegativeBinomial": (lp.NegativeBinomial(3.0), lambda ys: np.round(np.exp(ys))),
}


def without_flag(value) -> bool:
    """Whether there is a NaN that nothing explains: a draw that is `ok`, or any other public number."""
    if isinstance(value, lp.Predictions):
        kept = jax.tree.map(lambda x: x[value.ok], (value.f, value.y, value.log_likelihood))
        return any(np.any(np.isnan(x)) for x in jax.tree.leaves((kept, value.thetas, value.khat, value.log_weights)))
    if isinstance(value, lp.FunctionPredictions):
        return any(np.any(np.isnan(x)) for x in (value.mean, value.std, value.draws[value.ok], value.thetas))
    return any(np.any(np.isnan(x)) for x in map(np.asarray, jax.tree.leaves(value)) if x.dtype.kind == "f")


@settings(max_examples=12, phases=[Phase.generate], deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(list(LIKELIHOODS)),
    st.sampled_from([0.5, 1.0, 1.5, 2.0, 2.5]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([1e-300, 1e-9, 0.25, 1.0, 1e9]),
    st.sampled_from([("ggn", "low_rank"), ("hessian", "full"), ("hessian", "diagonal")]),
)
def test_no_result_holds_a_nan_without_its_flag(likelihood, power, shift, rate, how):
    likelihood, seen = LIKELIHOODS[likelihood]
    curvature, structure = how
    ts, args = np.array([0.0, 0.5, 1.0, 2.0]), {"power": np.array([power]), "shift": np.array([shift])}
    data = lp.Trajectories(ts, seen(np.random.default_rng(0).normal(size=(1, 4, 2))), [[0.5, 0.0]], args)
    model, problem = Powers(jnp.array(rate)), lp.Problem(data, likelihood, 1.0)
    arguments = dict(num_samples=8, key=KEY, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            posterior = lp.laplace(model, problem, curvature=curvature, structure=structure, progress=False)
        except lp.LaplodeError:
            return
        public = [
            posterior.marginal_std(),
            posterior.log_evidence,
            posterior.covariance(),
            posterior.summary().to_numpy(),
        ]
        public.extend(each for each in vars(posterior.diagnostics).values() if isinstance(each, float))
        stages = [
            lambda: lp.refine(model, problem, curvature=curvature, steps=20, newton_steps=5, progress=False).model,
            lambda: lp.predict(posterior, ts, **arguments),
            lambda: lp.predict(posterior, [0.0, 1.0, 2.0, 3.0], method="sampled", weigh=False, **arguments),
            lambda: lp.predict_function(posterior, lambda m: m.rate**power, **arguments),
            lambda: lp.information_gain(posterior, ts).each,
        ]
        for stage in stages:
            try:
                public.append(stage())
            except lp.LaplodeError:
                continue
    for each in public:
        assert not without_flag(each), each

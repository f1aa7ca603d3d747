"""The Neural ODE as an ordinary module, and the contract that a foreign model meets."""

import warnings

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import laplode as lp
from laplode._model.own import check_model, predict_trajectory

TS = np.array([0.0, 0.5, 1.0])
FIXED = dict(solver=diffrax.Heun(), stepsize_controller=diffrax.ConstantStepSize(), dt0=0.01, max_steps=128)


class Decay(eqx.Module):
    rate: jax.Array

    def __call__(self, t, y, args):
        return -self.rate * y if args is None else -self.rate * y + args["force"]


def decay(**options):
    return lp.NeuralODE(Decay(jnp.array(2.0)), **FIXED | options)


def data(y0=((1.0, 3.0),), args=None, channels=2):
    return lp.Trajectories(TS, np.ones((1, 3, channels)), None if y0 is None else np.array(y0), args)


def test_solves_from_the_state_given():
    predictions = eqx.filter_jit(decay())(TS, jnp.array([1.0, 3.0]))
    heun = (1 - 2 * 0.01 + 2 * 0.01**2) ** (TS / 0.01)
    np.testing.assert_allclose(predictions, heun[:, None] * [1.0, 3.0], rtol=1e-10)


def test_learned_initial_state_is_used_where_none_is_given():
    model = decay(y0=[1, 3])
    assert model.y0.dtype == jnp.float64
    np.testing.assert_array_equal(model.initial_state(None), [1.0, 3.0])
    np.testing.assert_array_equal(model.initial_state(np.array([5.0, 6.0])), [5.0, 6.0])
    with pytest.raises(
        lp.LaplodeError, match=r"`y0` is missing.*Trajectories\(ts, ys, y0=.*NeuralODE\(vector_field, y0="
    ):
        decay().initial_state(None)


def test_args_and_observation():
    model = decay(observe=lambda y, args: jnp.stack([y[0] + y[1], y[0] * args["force"], y[1]]))
    args = {"force": jnp.array(4.0)}
    seen = eqx.filter_jit(model)(TS, jnp.array([1.0, 3.0]), args)
    states = 2 + np.exp(-2 * TS)[:, None] * (np.array([1.0, 3.0]) - 2)
    expected = np.stack([states.sum(axis=1), 4 * states[:, 0], states[:, 1]], axis=1)
    np.testing.assert_allclose(seen, expected, rtol=1e-4)


def test_default_solver_is_adaptive_tsit5():
    model = lp.NeuralODE(Decay(jnp.array(2.0)))
    assert isinstance(model.solver, diffrax.Tsit5)
    assert (model.stepsize_controller.rtol, model.stepsize_controller.atol, model.max_steps) == (1e-6, 1e-8, 4096)


def test_a_field_of_state_and_time_is_refused():
    with pytest.raises(lp.LaplodeError, match=r"\(y, t, args\).*time comes first"):
        lp.NeuralODE(lambda y, t, args: -y)


@pytest.mark.parametrize(
    "options",
    [dict(stepsize_controller=diffrax.ConstantStepSize()), dict(FIXED, solver=diffrax.Kvaerno3())],
    ids=["no dt0", "no tolerance of the root finder"],
)
@pytest.mark.parametrize("stage", ["fit", "laplace"])
def test_settings_that_do_not_go_together(options, stage):
    model, problem = lp.NeuralODE(Decay(jnp.array(2.0)), **options), lp.Problem(data(), lp.Gaussian(0.1), 1.0)
    calls = {
        "fit": lambda: lp.fit(model, problem, optax.adam(0.1), steps=2, key=jax.random.key(0), progress=False),
        "laplace": lambda: lp.laplace(model, problem, progress=False),
    }
    with pytest.raises(lp.LaplodeError, match="can't be solved by"):
        calls[stage]()


def test_a_module_that_a_function_hides_is_named():
    mlp = eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0))
    path = diffrax.LinearInterpolation(TS, TS)
    with pytest.warns(lp.LaplodeWarning, match="`vector_field` is a function that uses `mlp`, a MLP"):
        lp.NeuralODE(lambda t, y, args: mlp(y))
    with pytest.warns(lp.LaplodeWarning, match="`observe` is a function that uses `mlp`"):
        lp.NeuralODE(Decay(jnp.array(2.0)), observe=eqx.filter_jit(lambda y, args: mlp(y)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lp.NeuralODE(mlp, observe=lambda y, args: y * path.evaluate(0.1))


def test_failed_solves_raise_or_leave_infinities():
    model = decay(max_steps=8)
    with pytest.raises(eqx.EquinoxRuntimeError, match="maximum number of solver steps"):
        jax.block_until_ready(eqx.filter_jit(model)(TS, jnp.array([1.0, 3.0])))
    left = eqx.filter_jit(model)(TS, jnp.array([1.0, 3.0]), throw=False)
    np.testing.assert_array_equal(left[0], [1.0, 3.0])
    assert np.all(np.isinf(left[1:]))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(vector_field=2.0), r"`vector_field` must be callable as \(t, y, args\), got float"),
        (dict(observe=jnp.ones(2)), "`observe` must be callable"),
        (dict(y0=[[[1.0, 2.0]]]), r"`y0` of a NeuralODE must be finite and of shape \(D,\)"),
        (dict(y0=[1.0, np.nan]), "`y0` of a NeuralODE must be finite"),
        (dict(scale=[0.1, -0.1]), "`scale` of a NeuralODE must be positive"),
        (dict(y0=1.0), "`y0` of a NeuralODE must be finite and of shape"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(lp.LaplodeError, match=match):
        lp.NeuralODE(**{"vector_field": Decay(jnp.array(1.0))} | options)


# ---- Foreign models


class Two(eqx.Module):
    rate: jax.Array

    def __call__(self, ts, y0):
        return y0 * jnp.exp(-self.rate * ts)[:, None]


class Three(Two):
    def __call__(self, ts, y0, args):
        return super().__call__(ts, y0) + (0 if args is None else args)


class Defaulted(Two):
    def __call__(self, ts, y0, args=None, scale=1.0):
        return scale * super().__call__(ts, y0) + (0 if args is None else args)


@pytest.mark.parametrize("kind", [Two, Three, Defaulted])
def test_foreign_models_are_called_as_they_can_be(kind):
    y0 = np.array([1.0, 3.0])
    expected = y0 * np.exp(-2 * TS)[:, None]
    model = kind(jnp.array(2.0))
    np.testing.assert_allclose(predict_trajectory(model, TS, y0, None), expected, rtol=1e-14)
    if kind is not Two:
        np.testing.assert_allclose(predict_trajectory(model, TS, y0, 1.0), expected + 1, rtol=1e-14)


class Rate(eqx.Module):
    rate: jax.Array


class Settings(Rate):
    """Its third parameter has a default, and is not for args."""

    def __call__(self, ts, y0, inference=True):
        return y0 * jnp.exp(-(self.rate if inference else 7.0) * ts)[:, None]


class Swapped(Rate):
    def __call__(self, y0, ts):
        return y0 * jnp.exp(-self.rate * ts)[:, None]


class Pair(Two):
    def __call__(self, ts, y0):
        return super().__call__(ts, y0), jnp.array(1)


class Named(Two):
    def __call__(self, ts, y0):
        return {"x": super().__call__(ts, y0)}


class Solved(Rate):
    def __call__(self, ts, y0):
        term = diffrax.ODETerm(lambda t, y, args: -self.rate * y)
        return diffrax.diffeqsolve(term, diffrax.Euler(), 0, 1, 0.5, y0, saveat=diffrax.SaveAt(ts=ts))


class Batched(Rate):
    def __call__(self, ts, y0):
        return jax.vmap(lambda y: (jnp.eye(2) @ y) * jnp.exp(-self.rate * ts)[:, None])(y0)


class Field(Rate):
    def __call__(self, t, y):
        return -self.rate * y


def test_a_default_holds_where_the_data_have_no_args():
    np.testing.assert_allclose(
        predict_trajectory(Settings(jnp.array(2.0)), TS, np.ones(1), None)[:, 0], np.exp(-2 * TS)
    )


def test_a_jitted_model_is_the_model_in_it():
    for model in (Two(jnp.array(2.0)), decay()):
        found = check_model(eqx.filter_jit(model), lp.Problem(data(), lp.Gaussian(1.0), 1.0))
        assert type(found) is type(model) and eqx.tree_equal(found, model)


def test_a_foreign_model_may_bring_its_own_initial_state():
    class Own(eqx.Module):
        start: jax.Array

        def __call__(self, ts, y0):
            assert y0 is None
            return self.start * jnp.exp(-ts)[:, None]

    check_model(Own(jnp.ones(2)), lp.Problem(data(y0=None), lp.Gaussian(1.0), 1.0))


@pytest.mark.parametrize(
    ("model", "observed", "match"),
    [
        pytest.param(lambda ts, y0: y0, data(), "`model` must be a callable eqx.Module.*got function", id="function"),
        pytest.param(eqx.nn.Identity, data(), "`model` must be a callable eqx.Module", id="class"),
        pytest.param(None, data(), "`model` must be a callable eqx.Module.*got NoneType", id="none"),
        pytest.param(decay(), data(y0=None), "`y0` is missing", id="y0"),
        pytest.param(decay(), data(channels=3), r"disagree.* \(3, 2\).*\(T, K\) = \(3, 3\).*`observe`", id="channels"),
        pytest.param(Two(jnp.ones(5)), data(),
                     r"`model` can't be evaluated.*ts of shape \(3,\), y0 of shape \(2,\)", id="inside"),
        pytest.param(Two(jnp.ones(())), data(args=np.ones(1)), "`args` is given with the data", id="args"),
        pytest.param(Settings(jnp.ones(())), data(args=np.ones(1)), "third parameter is `inference`", id="no args"),
        pytest.param(Swapped(jnp.ones(())), data(),
                     r"parameters \(y0, ts\), and is called as model\(ts, y0\)", id="swap"),
        pytest.param(Pair(jnp.ones(())), data(), r"returns a tuple of 2, not.*\(T, K\)", id="tuple"),
        pytest.param(Named(jnp.ones(())), data(), "returns a dict of 'x'", id="dict"),
        pytest.param(Solved(jnp.ones(())), data(), "returns a diffrax.Solution.*solution.ys", id="solution"),
        pytest.param(Batched(jnp.ones(())), data(), "takes a batch of them", id="batch"),
        pytest.param(Field(jnp.ones(())), data(), r"vector field: write laplode.NeuralODE\(model\)", id="field"),
        pytest.param(decay(y0=np.ones(2)), data(), "`y0` is given twice", id="two initial states"),
        pytest.param(Two(jnp.ones(())), data(y0=None), "`model` can't be evaluated.*y0 of shape None", id="foreign y0"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_the_data(model, observed, match):
    with pytest.raises(lp.LaplodeError, match=match):
        check_model(model, lp.Problem(observed, lp.Gaussian(1.0), 1.0))


@pytest.mark.filterwarnings("ignore:The Newton decrement")
def test_float32_models_are_checked_as_they_will_be_used():
    """Trained in float32 with a loop of its own, whose carry must keep its type, and now among float64 times."""

    class Trained(eqx.Module):
        rate: jax.Array
        start: jax.Array

        def __call__(self, ts, y0):
            step = lambda y, dt: (y - dt * self.rate * y, y)
            return jax.lax.scan(step, self.start, jnp.diff(ts, append=ts[-1:] + 1))[1]

    model = Trained(jnp.float32(0.5), jnp.ones(2, jnp.float32))
    posterior = lp.laplace(model, lp.Problem(data(y0=None), lp.Gaussian(1.0), 1.0), curvature="ggn", progress=False)
    assert posterior.mean.dtype == jnp.float64


@pytest.mark.parametrize(
    ("piece", "match"),
    [
        (diffrax.ODETerm(lambda t, y, args: -y), "term.vector_field"),
        (diffrax.ControlTerm(lambda t, y, args: y, lambda t0, t1: t1 - t0), "ControlTerm.*controlled"),
        (diffrax.MultiTerm(diffrax.ODETerm(lambda t, y, args: -y)), "MultiTerm.*stochastic"),
        (diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (2,), jax.random.key(0)), "drift"),
        (diffrax.LinearInterpolation(jnp.arange(2.0), jnp.zeros((2, 1))), "LinearInterpolation.*derivative"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_stochastic_and_controlled_equations_are_refused(piece, match):
    with pytest.raises(lp.LaplodeError, match=match):
        lp.NeuralODE(piece)

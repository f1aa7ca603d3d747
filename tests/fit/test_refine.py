"""Refinement: that it ends at a minimum, leaves saddles, and never returns a worse point."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplode as lp
from laplode._algebra.low_rank import low_rank
from laplode._fit.descent import Descent, LevenbergMarquardt, LinearizedLoss, Newton, Point, QuadraticLoss


def joint(model, problem):
    """−log p(Y | θ) − log p(θ) by an adaptive solve."""
    data, prior = problem.data, problem.prior
    predictions = np.stack([model(data.ts[i], data.y0[i]) for i in range(len(data.ts))])
    theta = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))])
    log_prior = -0.5 * jnp.sum(prior.precision * theta**2 - jnp.log(prior.precision / (2 * np.pi)))
    return float(-problem.log_likelihood(jnp.asarray(predictions)) - log_prior)


def refined(model, problem, **options):
    return lp.refine(model, problem, **{"progress": False} | options)


class Bump(eqx.Module):
    """Predicts x² t: for positive data, x = 0 is a saddle with no gradient."""

    x: jax.Array
    y: jax.Array

    def __call__(self, ts, y0):
        return (self.x**2 * ts + self.y)[:, None]


@pytest.fixture(scope="module")
def bump():
    ts = np.linspace(1, 2, 5)
    return lp.Problem(lp.Trajectories(ts, 2 * ts[None, :, None]), lp.Gaussian(0.5), 1.0)


@pytest.fixture(scope="module")
def curve():
    """The closed-form growth model away from its minimum."""

    def make(growth):
        return eqx.tree_at(lambda m: (m.rate, m.gain), growth.model, (jnp.array([0.6, 0.1]), jnp.array(0.8)))

    return make


@pytest.fixture(scope="module")
def neural_fit(neural):
    return refined(*neural)


def test_the_bar_promises_no_time(linear, capsys):
    lp.refine(linear.model, linear.problem)
    said = capsys.readouterr().err
    assert "step" in said and "?step/s, by" not in said and "<" not in said  # nothing is said to be left


def test_a_linear_model_takes_one_step(linear):
    away = eqx.tree_at(lambda m: m.vector_field.w, linear.model, jnp.ones((2, 3)))
    fit = refined(away, linear.problem)
    np.testing.assert_allclose(fit.model.vector_field.w.ravel(), linear.mean, atol=1e-6)
    assert fit.reason == "converged" and fit.num_negative == 0
    assert fit.newton_decrement < 1e-8
    assert fit.losses[-1] < fit.losses[0]


def test_a_neural_field_ends_at_a_minimum(neural, neural_fit, recwarn):
    assert neural_fit.reason == "converged"
    posterior = lp.laplace(neural_fit.model, neural.problem, regularization="none", progress=False)
    assert posterior.diagnostics.newton_decrement < 1e-4
    assert posterior.diagnostics.eigenvalue_min > 0
    assert not [str(w.message) for w in recwarn.list]
    np.testing.assert_allclose(neural_fit.newton_decrement, posterior.diagnostics.newton_decrement, rtol=0.1)


def test_the_loss_is_the_negative_log_joint(neural, neural_fit):
    np.testing.assert_allclose(neural_fit.loss, joint(neural_fit.model, neural.problem), rtol=1e-8)
    np.testing.assert_allclose(neural_fit.losses[0], joint(*neural), rtol=1e-8)


@pytest.mark.parametrize("likelihood", [lp.LogNormal(0.1), lp.StudentT(4.0, 0.2), lp.Gaussian(np.array([0.1, 0.3]))])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_any_likelihood_is_stationary(growth, curve, likelihood, curvature):
    problem = lp.Problem(growth.problem.data, likelihood, 1.0)
    fit = refined(curve(growth), problem, curvature=curvature, decrement=1e-10)
    assert fit.reason == "converged"
    step = 1e-4
    for leaf in (lambda m: m.rate, lambda m: m.gain):
        moved = lambda sign, leaf=leaf: joint(eqx.tree_at(leaf, fit.model, leaf(fit.model) + sign * step), problem)
        assert moved(1) > fit.loss and moved(-1) > fit.loss


class Power(eqx.Module):
    """θ⁵⁰ t: to be off by 0.5% moves a standard error by a quarter."""

    x: jax.Array

    def __call__(self, ts, y0):
        return (self.x**50 * ts)[:, None]


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("side", [-1, 1])
def test_the_default_decrement_leaves_standard_errors_right(curvature, side):
    ts = np.linspace(0.5, 1, 4)
    problem = lp.Problem(lp.Trajectories(ts, 1.1 * ts[:, None]), lp.Gaussian(0.5), 1.0)
    error = lambda x: lp.laplace(Power(x), problem, curvature=curvature, progress=False).marginal_std()[0]
    best = refined(Power(jnp.array(1.0)), problem, curvature=curvature, decrement=1e-14).model.x
    exact = error(best)
    slope = lambda x: 50 * x**49
    assert abs(slope(1.005 * best) / slope(best) - 1) > 0.25  # of which the standard error is the inverse
    # From as far off as a decrement of 1e-4 allows, where it may end at once, and from farther.
    for off in (0.99 * np.sqrt(2e-4) * exact, 0.02):
        fit = refined(Power(best + side * off), problem, curvature=curvature)
        assert fit.reason == "converged"
        np.testing.assert_allclose(error(fit.model.x), exact, rtol=1e-2)


def test_counts():
    ts = np.linspace(0, 3, 12)
    ys = np.random.default_rng(0).poisson(20 * np.exp(-0.5 * ts))[:, None]

    class Decay(eqx.Module):
        rate: jax.Array

        def __call__(self, t, y, args):
            return -self.rate * y

    problem = lp.Problem(lp.Trajectories(ts, ys, np.array([20.0])), lp.Poisson(), 0.1)
    fit = refined(lp.NeuralODE(Decay(jnp.array(0.05))), problem)
    grid = np.linspace(0.2, 1, 20001)
    mean = 20 * np.exp(-grid[:, None] * ts)
    loss = np.sum(mean - ys.ravel() * np.log(mean), axis=1) + 0.05 * grid**2
    np.testing.assert_allclose(fit.model.vector_field.rate, grid[np.argmin(loss)], atol=1e-3)


def test_it_leaves_a_saddle_without_a_gradient(bump):
    model = Bump(jnp.array(0.0), jnp.array(0.0))
    stationary = refined(model, bump, curvature="ggn", where=lambda m: m.y)  # x stays at its saddle
    fit = refined(stationary.model, bump)
    assert fit.reason == "converged" and fit.num_negative == 0
    assert abs(float(fit.model.x)) > 1
    assert fit.loss < stationary.loss - 1


def test_parameters_outside_of_where_stay(growth, curve):
    model = curve(growth)
    fit = refined(model, growth.problem, where=lambda m: m.rate)
    assert float(fit.model.gain) == float(model.gain)
    assert not np.allclose(fit.model.rate, model.rate)


@pytest.mark.parametrize("seed, steps, newton_steps", [(0, 0, 0), (0, 1, 0), (1, 2, 1)])
def test_never_worse(neural, seed, steps, newton_steps):
    rng = np.random.default_rng(seed)
    noisy = lambda x: x + rng.normal(size=x.shape) if eqx.is_inexact_array(x) else x
    model = eqx.tree_at(lambda m: m.vector_field, neural.model, jax.tree.map(noisy, neural.model.vector_field))
    with pytest.warns(lp.LaplodeWarning, match="budget"):
        fit = refined(model, neural.problem, steps=steps, newton_steps=newton_steps)
    assert fit.reason == "budget"
    assert joint(fit.model, neural.problem) <= joint(model, neural.problem) + 1e-9
    assert fit.steps == steps and fit.newton_steps == newton_steps


def test_a_minimum_stays_where_it_is(neural, neural_fit):
    again = refined(neural_fit.model, neural.problem, steps=0)
    assert again.reason == "converged" and again.newton_steps == 0
    np.testing.assert_array_equal(again.model.vector_field.mlp.layers[0].weight, _first_weight(neural_fit.model))


def _first_weight(model):
    return model.vector_field.mlp.layers[0].weight


@jax.custom_vjp
def _backward_once(x):
    return x


_backward_once.defvjp(lambda x: (x, None), lambda _, cotangent: (_backward_once(cotangent),))


class Own(eqx.Module):
    """A user's model, with the derivatives of Diffrax's default adjoint and steps chosen anew at every call.

    Those make ripples in its values that its derivatives know nothing of.
    """

    mlp: eqx.nn.MLP
    ripples: float

    def __init__(self, ripples):
        mlp = eqx.nn.MLP(1, 1, 8, 2, jnp.tanh, key=jax.random.key(0))
        self.mlp = jax.tree.map(lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, mlp)
        self.ripples = ripples

    def __call__(self, ts, y0):
        smooth = jax.vmap(self.mlp)(ts[:, None])
        return _backward_once(smooth) + self.ripples * jnp.sin(1e3 * jax.lax.stop_gradient(smooth))


@pytest.fixture(scope="module")
def wave():
    ts = np.linspace(-3, 3, 40)
    ys = np.sin(2 * ts) + 0.1 * np.random.default_rng(0).normal(size=40)
    return lp.Problem(lp.Trajectories(ts, ys[:, None]), lp.Gaussian(0.1), 1.0)


def test_a_model_without_second_derivatives(wave):
    with pytest.raises(lp.LaplodeError, match="DirectAdjoint"):
        refined(Own(0.0), wave)


@pytest.mark.filterwarnings("ignore::laplode.LaplodeWarning")
def test_ripples_of_a_loose_solve_do_not_stop_it(wave):
    smooth, rippled = (refined(Own(ripples), wave, curvature="ggn", steps=200) for ripples in (0.0, 1e-2))
    assert smooth.newton_decrement < 0.1
    assert rippled.newton_decrement < 1
    assert abs(rippled.loss - smooth.loss) < 1
    assert rippled.loss <= rippled.losses.min() + 1e-9


class Bounded(eqx.Module):
    """A model of one's own that throws where its rate is above a bound, as Diffrax does after too many steps."""

    rate: jax.Array

    def __call__(self, ts, y0):
        return eqx.error_if(y0 * jnp.exp(self.rate * ts[:, None]), self.rate > 1.0, "too many steps")


def test_a_point_where_the_model_throws_is_a_rejected_step():
    ts = np.linspace(0, 3, 10)
    data = lp.Trajectories(ts, np.exp(0.95 * ts)[:, None], y0=[1.0])
    fit = refined(Bounded(jnp.array(-2.0)), lp.Problem(data, lp.Gaussian(0.05), 1e-2), curvature="ggn")
    assert fit.reason == "converged"
    np.testing.assert_allclose(fit.model.rate, 0.95, atol=1e-3)


@pytest.mark.parametrize("decrement", [-1e-9, np.nan])
def test_a_decrement_that_is_none_is_not_converged(decrement):
    point, one = Point(None, 0.0, 0), jnp.ones((1, 1))
    descent = Descent(point, point, (0.0,), 1.0)
    linear = LinearizedLoss(one[None], one, one[0], low_rank(one, one[0], one[0]), one[0], jnp.asarray(decrement))
    assert not LevenbergMarquardt(None, 1e-4, 1, True).has_converged(descent, linear)
    quadratic = QuadraticLoss(linear, *np.ones((3, 1)), num_negative=0, decrement=decrement)
    assert not Newton(None, 1e-4, 1, None).has_converged(descent, quadratic)


def test_ctrl_c_returns_what_was_reached(growth, curve, monkeypatch):
    calls, step = [], LevenbergMarquardt.step

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(LevenbergMarquardt, "step", interrupted)
    with pytest.warns(lp.LaplodeWarning, match="interrupted"):
        fit = refined(curve(growth), growth.problem)
    assert fit.reason == "interrupted" and fit.steps == 2
    assert fit.loss == fit.losses[-1] < fit.losses[0]


def test_laplace_names_the_remedy(growth, curve):
    with pytest.warns(lp.LaplodeWarning, match=r"Newton decrement.*laplode.refine\(model, problem\)"):
        lp.laplace(curve(growth), growth.problem, curvature="ggn", progress=False)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"curvature": "fisher"}, "`curvature`"),
        ({"decrement": 0.0}, "`decrement`"),
        ({"decrement": "small"}, "`decrement`"),
        ({"steps": -1}, "`steps`"),
        ({"newton_steps": 2.5}, "`newton_steps`"),
        ({"where": lambda m: m.nothing}, "`where`"),
    ],
)
def test_bad_options(growth, options, match):
    with pytest.raises(lp.LaplodeError, match=match):
        refined(growth.model, growth.problem, **options)


def test_bad_problem(growth):
    with pytest.raises(lp.LaplodeError, match="`problem`"):
        lp.refine(growth.model, growth.problem.data)


class TwoRates(eqx.Module):
    """A sum of two exponentials whose rates the data hardly tell apart: standard errors change along the valley."""

    log_rates: jax.Array
    log_amounts: jax.Array

    def __call__(self, ts, y0):
        return (jnp.exp(-jnp.outer(ts, jnp.exp(self.log_rates))) @ jnp.exp(self.log_amounts))[:, None]


def test_standard_errors_of_a_weakly_curved_model_at_the_default_decrement():
    ts = np.linspace(0, 6, 25)
    truth = TwoRates(jnp.log(jnp.array([0.5, 0.8])), jnp.log(jnp.array([1.0, 0.7])))
    ys = np.asarray(truth(ts, None)) + 0.02 * np.random.default_rng(1).normal(size=(25, 1))
    problem = lp.Problem(lp.Trajectories(ts, ys, [0.0]), lp.Gaussian(0.02), 0.01)
    best = refined(truth, problem, decrement=1e-12).model
    # Sorted, since the two rates may change places.
    errors = lambda model: np.sort(lp.laplace(model, problem, progress=False).marginal_std())
    with pytest.warns(lp.LaplodeWarning):  # half a percent beside the optimum they are off by far
        off = errors(jax.tree.map(lambda x: 1.005 * x, best))
    assert np.max(np.abs(off / errors(best) - 1)) > 0.25
    moved = TwoRates(truth.log_rates + jnp.array([0.2, -0.3]), truth.log_amounts + jnp.array([-0.1, 0.3]))
    np.testing.assert_allclose(errors(refined(moved, problem).model), errors(best), rtol=0.01)

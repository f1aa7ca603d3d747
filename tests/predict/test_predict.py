"""Trajectories from a posterior: their covariance, their draws, and the draws that fail."""

import warnings

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplode as lp
from laplode._predict.importance import importance_weights, khat_threshold
from laplode._predict.solves import log_joint

KEY = jax.random.key(0)


def draw(posterior, ts, y0=None, args=None, **options):
    return lp.predict(posterior, ts, y0, args, **{"key": KEY, "progress": False, "num_samples": 16} | options)


def grid(linear):
    return linear.problem.data.ts[0]


# ---- A model that is linear in its parameters has a closed form


@pytest.mark.parametrize("future", [False, True])
def test_covariance_of_a_linear_model(linear, linear_posterior, future):
    ts = np.linspace(3.5, 5, 4) if future else grid(linear)
    predictions = draw(linear_posterior, ts)
    design = linear.design(ts)
    np.testing.assert_allclose(
        predictions.mean[0].ravel(), linear.problem.data.y0[0].tolist() * len(ts) + design @ linear.mean, rtol=1e-8
    )
    covariance = design @ np.linalg.inv(linear.precision) @ design.T
    np.testing.assert_allclose(predictions.covariance()[0], covariance, rtol=1e-8, atol=1e-8 * covariance.max())
    assert predictions.observed_grid is not future


def test_linearized_and_sampled_draws_of_a_linear_model_agree(linear, linear_posterior):
    ts = grid(linear)
    linearized = draw(linear_posterior, ts, num_samples=100, weigh=True)
    sampled = draw(linear_posterior, ts, method="sampled", num_samples=100)
    np.testing.assert_array_equal(linearized.thetas, sampled.thetas)
    np.testing.assert_allclose(linearized.f, sampled.f, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(linearized.y, sampled.y, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(linearized.mean, sampled.mean, rtol=1e-8, atol=1e-8)
    for predictions in (linearized, sampled):
        assert predictions.khat < 0
        np.testing.assert_allclose(np.exp(predictions.log_weights), 0.01, rtol=1e-6)
    # log p(Y, θ) − log q(θ) is log p(Y) wherever θ is.
    np.testing.assert_allclose(sampled.log_p - sampled.log_q, linear_posterior.log_evidence, rtol=1e-8)


def test_draws_have_the_covariance_and_the_noise(linear, linear_posterior):
    ts, num = grid(linear), 4000
    predictions = draw(linear_posterior, ts, num_samples=num)
    design = linear.design(ts)[2:]  # the first time has no spread
    covariance = design @ np.linalg.inv(linear.precision) @ design.T
    draws = np.asarray(predictions.f)[:, 0, 1:].reshape(num, -1)
    error = np.sqrt((covariance**2 + np.outer(np.diag(covariance), np.diag(covariance))) / num)
    assert np.all(np.abs(np.cov(draws.T) - covariance) < 5 * error)
    noise = np.asarray(predictions.y - predictions.f).reshape(num, -1)
    np.testing.assert_allclose(noise.std(axis=0), 0.1, rtol=5 / np.sqrt(2 * num))
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=5 * 0.1 / np.sqrt(num))


def test_covariance_against_the_jacobian(predator_prey, predator_prey_posterior):
    """J Σ Jᵀ with J from jax.jacfwd of the plain solve, at new times and a new initial state."""
    ts, y0 = np.linspace(0, 4, 5), np.array([[1.2, 0.8]])
    predictions = draw(predator_prey_posterior, ts, y0)

    @jax.jit
    def solve(theta):
        model = predator_prey_posterior.unravel(theta)
        solution = model.solve(
            jnp.asarray(ts), y0[0], None, saveat=diffrax.SaveAt(ts=ts), adjoint=diffrax.ForwardMode(), throw=True
        )
        return solution.ys.ravel()

    theta = predator_prey_posterior.mean
    jacobian = jax.jit(jax.jacfwd(solve))(theta)
    expected = jacobian @ predator_prey_posterior.covariance() @ jacobian.T
    np.testing.assert_allclose(predictions.mean[0].ravel(), solve(theta), rtol=1e-10)
    np.testing.assert_allclose(predictions.covariance()[0], expected, rtol=1e-7, atol=1e-9 * expected.max())
    # Linear in log y under a LogNormal likelihood, so that draws are positive.
    change = (predictions.thetas - theta) @ jacobian.T / solve(theta)
    expected = solve(theta) * np.exp(change)
    np.testing.assert_allclose(predictions.f.reshape(16, -1), expected, rtol=1e-7)


# ---- Shapes and grids


def test_shapes(growth_posterior):
    data = growth_posterior.problem.data
    here = draw(growth_posterior, data.ts)
    assert here.ts.shape == (2, 9) and here.mean.shape == (2, 9, 2) and here.thetas.shape == (16, 3)
    assert here.f.shape == here.y.shape == (16, 2, 9, 2)
    assert here.covariance().shape == (2, 18, 18) and here.ok.shape == (16,) and np.all(here.ok)
    assert here.observed_grid and here.khat is None and here.log_weights is None
    np.testing.assert_array_equal(draw(growth_posterior, data.ts[0]).f, here.f)


@pytest.mark.parametrize("method", ["linearized", "sampled"])
def test_future_times_continue_the_observed_trajectories(growth_posterior, method):
    """A forecast that starts after the data equals the tail of one that starts with it."""
    whole = draw(growth_posterior, [0.0, 5.5, 6.0, 7.0], method=method, weigh=False)
    tail = draw(growth_posterior, [5.5, 6.0, 7.0], method=method, weigh=False)
    assert tail.mean.shape == (2, 3, 2) and not tail.observed_grid
    np.testing.assert_allclose(tail.mean, whole.mean[:, 1:], rtol=1e-13)
    np.testing.assert_allclose(tail.f, whole.f[:, :, 1:], rtol=1e-12)
    if method == "linearized":
        np.testing.assert_allclose(tail.covariance(), whole.covariance()[:, 2:, 2:], rtol=1e-9, atol=1e-12)


def test_a_single_future_time(growth_posterior):
    one = draw(growth_posterior, [6.0])
    two = draw(growth_posterior, [6.0, 7.0])
    assert one.mean.shape == (2, 1, 2)
    np.testing.assert_allclose(one.mean, two.mean[:, :1], rtol=1e-8)


@pytest.mark.parametrize("method", ["linearized", "sampled"])
def test_new_initial_states(growth_posterior, method):
    ts, y0 = np.linspace(1, 3, 4), np.array([[1.0, 1.0], [0.5, 2.0], [2.0, 0.5]])
    many = draw(growth_posterior, ts, y0, method=method, weigh=False)
    assert many.mean.shape == (3, 4, 2) and many.f.shape == (16, 3, 4, 2)
    if method == "sampled":
        rate, gain = many.thetas[:, None, None, :2], many.thetas[:, 2, None, None, None]
        exact = gain * y0[:, None] * np.exp(rate * (ts - 1)[:, None])
        np.testing.assert_allclose(many.f, exact, rtol=1e-12)
    # Only the time since the start matters.
    shifted = draw(growth_posterior, np.stack([ts - i for i in range(3)]), y0, method=method, weigh=False)
    np.testing.assert_allclose(shifted.f, many.f, rtol=1e-7)
    one = draw(growth_posterior, ts, y0[1], method=method, weigh=False)
    np.testing.assert_allclose(one.f[:, 0], many.f[:, 1], rtol=1e-7)


def test_the_key_decides(linear, linear_posterior):
    ts = grid(linear)
    same, other = draw(linear_posterior, ts), draw(linear_posterior, ts, key=jax.random.key(1))
    np.testing.assert_array_equal(draw(linear_posterior, ts).y, same.y)
    assert not np.any(other.thetas == same.thetas)


def test_sampled_has_no_closed_form_covariance(linear, linear_posterior):
    predictions = draw(linear_posterior, grid(linear), method="sampled", weigh=False)
    with pytest.raises(lp.LaplodeError, match=r'`covariance\(\)`.*method="linearized".*method="sampled"'):
        predictions.covariance()


class Dosed(eqx.Module):
    gain: jax.Array

    def __call__(self, ts, y0, args):
        return y0 + self.gain * args["dose"] * (ts - ts[0])[:, None]


@pytest.fixture(scope="module")
def dosed_posterior():
    ts = np.linspace(0, 1, 4)
    args = {"dose": np.array([[1.0], [2.0]])}
    ys = ts[None, :, None] * args["dose"][:, None]
    data = lp.Trajectories(ts, ys, np.zeros((2, 1)), args)
    return lp.laplace(Dosed(jnp.array(1.0)), lp.Problem(data, lp.Gaussian(0.1), 1e-6), progress=False)


def test_args_go_with_their_trajectories(dosed_posterior):
    predictions = draw(dosed_posterior, [0.0, 2.0])
    np.testing.assert_allclose(predictions.mean[:, 1, 0], [2.0, 4.0], rtol=1e-12)
    np.testing.assert_allclose(predictions.f[:, :, 1, 0], predictions.thetas * np.array([2.0, 4.0]), rtol=1e-12)
    new = draw(dosed_posterior, [0.0, 2.0], np.ones((1, 1)), {"dose": np.array([[3.0]])})
    np.testing.assert_allclose(new.mean[0, :, 0], [1.0, 7.0], rtol=1e-12)


# ---- Draws that fail


class Square(eqx.Module):
    rate: jax.Array

    def __call__(self, t, y, args):
        return self.rate * y**2


@pytest.fixture(scope="module")
def blow_up():
    """y' = θ y², y(0) = 1 leaves for infinity at t = 1/θ; the posterior of θ is 0.5 ± 0.7."""
    ts = np.array([0.0, 0.25])
    data = lp.Trajectories(ts, np.array([[np.nan], [1 / 0.875]]), np.ones((1, 1)))
    model = lp.NeuralODE(Square(jnp.array(0.5)), max_steps=256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)
        return lp.laplace(model, lp.Problem(data, lp.Gaussian(10.0), 2.0), curvature="ggn", progress=False)


def test_failed_solves_are_counted_and_marked(blow_up):
    with pytest.warns(lp.LaplodeWarning, match="of 200 draws have no finite trajectory") as caught:
        predictions = draw(blow_up, [0.0, 1.0], method="sampled", num_samples=200, weigh=False)
    explodes = np.asarray(predictions.thetas[:, 0]) > 1
    assert 20 < explodes.sum() < 80
    np.testing.assert_array_equal(predictions.ok, ~explodes)
    assert any(str(w.message).startswith(f"{explodes.sum()} of 200") for w in caught)
    assert np.all(np.isnan(predictions.f[explodes])) and np.all(np.isnan(predictions.y[explodes]))
    fine = np.asarray(predictions.f)[~explodes, 0, 1, 0]
    np.testing.assert_allclose(1 / fine, 1 - np.asarray(predictions.thetas)[~explodes, 0], rtol=0, atol=5e-5)
    assert np.all(np.isfinite(predictions.y[~explodes]))


def test_linearized_draws_do_not_fail(blow_up):
    predictions = draw(blow_up, [0.0, 1.0], num_samples=200)
    assert np.all(predictions.ok) and np.all(np.isfinite(predictions.f))


class Pole(eqx.Module):
    """The closed form of the same trajectories."""

    rate: jax.Array

    def __call__(self, ts, y0):
        left = 1 - self.rate * y0 * (ts - ts[0])[:, None]
        return jnp.where(left > 0, y0 / jnp.where(left > 0, left, 1), jnp.inf)


class Line(eqx.Module):
    slope: jax.Array

    def __call__(self, ts, y0):
        return y0 + self.slope * (ts - ts[0])[:, None]


def one_step(model, likelihood, target, precision, channels=1):
    """The posterior of a model that is seen once, at t = 1, having started from 1."""
    ones = np.ones(channels)
    data = lp.Trajectories([0.0, 1.0], [np.nan * ones, target * ones], ones)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)
        return lp.laplace(model, lp.Problem(data, likelihood, precision), curvature="ggn", progress=False)


@pytest.mark.filterwarnings("ignore::laplode.LaplodeWarning")
def test_draws_that_fail_on_the_data_have_no_weight():
    posterior = one_step(Pole(jnp.array(0.5)), lp.Gaussian(3.0), 2.0, 2.0)
    predictions = draw(posterior, [0.0, 1.0], method="sampled", num_samples=100)
    assert 0 < predictions.ok.sum() < 100
    np.testing.assert_array_equal(predictions.log_weights == -np.inf, ~predictions.ok)
    np.testing.assert_allclose(np.sum(np.exp(predictions.log_weights)), 1, rtol=1e-12)
    assert np.isfinite(predictions.khat)


def test_a_solve_that_fails_at_the_mean_stops(blow_up):
    with pytest.raises(lp.LaplodeError, match="solve at the fitted parameters failed in trajectory 0 at time"):
        draw(blow_up, [0.0, 3.0])


def test_a_foreign_model_that_raises_gets_advice():
    class Strict(Line):
        def __call__(self, ts, y0):
            return eqx.error_if(super().__call__(ts, y0), self.slope > 1, "too steep")

    posterior = one_step(Strict(jnp.array(0.5)), lp.Gaussian(10.0), 1.5, 2.0)
    with pytest.raises(lp.LaplodeError, match=r"(?s)throw=False.*too steep"):
        draw(posterior, [0.0, 1.0], method="sampled", num_samples=50)


@pytest.mark.filterwarnings("ignore::laplode.LaplodeWarning")
@pytest.mark.parametrize("likelihood", [lp.LogNormal(2.0), lp.Poisson()], ids=["lognormal", "poisson"])
def test_draws_outside_a_likelihoods_support_are_not_ok(likelihood):
    """A line that turns negative is no median of a LogNormal, and no rate of a Poisson distribution."""
    posterior = one_step(Line(jnp.array(0.0)), likelihood, 1.0, 0.1)
    predictions = draw(posterior, [0.0, 1.0], method="sampled", num_samples=100, weigh=False)
    negative = np.asarray(predictions.thetas[:, 0]) < -1
    assert 0 < negative.sum() < 100
    np.testing.assert_array_equal(predictions.ok, ~negative)
    assert np.all(np.isfinite(predictions.y[~negative])) and np.all(np.isnan(predictions.y[negative]))


# ---- Importance weights


def test_log_joint_and_khat_of_a_nonlinear_model(growth, growth_posterior):
    posterior, data = growth_posterior, growth.problem.data
    thetas = posterior.sample(KEY, 3)

    @jax.jit
    def expected(theta):
        solve = lambda y0: posterior.unravel(theta)(data.ts[0], y0)
        log_likelihood = growth.problem.log_likelihood(jax.vmap(solve)(data.y0))
        return log_likelihood + jnp.sum(jax.scipy.stats.norm.logpdf(theta))

    np.testing.assert_allclose(log_joint(posterior, thetas), [expected(theta) for theta in thetas], rtol=1e-10)


def test_smoothed_weights_correct_the_mean():
    x = np.random.default_rng(0).normal(size=20_000)
    log_weights, khat = importance_weights(jnp.asarray(-0.5 * ((x - 0.3) / 0.9) ** 2), jnp.asarray(-0.5 * x**2))
    assert khat < khat_threshold(len(x))
    weights = np.exp(log_weights)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
    assert abs(weights @ x - 0.3) < 0.03
    np.testing.assert_allclose(weights @ (x - 0.3) ** 2, 0.81, rtol=0.05)


def test_khat_is_high_where_the_draws_are_too_narrow():
    x = np.random.default_rng(0).normal(size=2000)
    _, khat = importance_weights(jnp.asarray(-0.5 * (x / 4) ** 2), jnp.asarray(-0.5 * x**2))
    assert khat > 0.7


def test_khat_without_a_finite_draw():
    log_weights, khat = importance_weights(jnp.full(5, -jnp.inf), jnp.zeros(5))
    assert khat == np.inf and np.all(log_weights == -np.inf)


@pytest.mark.parametrize("scale", [1e3, 1e5, 1e9])
def test_khat_where_one_draw_has_all_the_weight(scale):
    """All the others round to zero, of which no tail can be fitted."""
    log_p = -scale * np.random.default_rng(0).chisquare(3, size=1000)
    log_weights, khat = importance_weights(jnp.asarray(log_p), jnp.zeros(1000))
    assert khat > 10 and np.all(np.isfinite(log_weights))
    np.testing.assert_allclose(np.sum(np.exp(log_weights)), 1, rtol=1e-12)


def test_khat_of_a_crowd_of_nearly_equal_weights():
    """Most weights lie close together and some a little above: no tail, whatever is fitted to that edge."""
    x = np.random.default_rng(0).normal(size=2000)
    _, khat = importance_weights(jnp.asarray(-0.05 * x**2 + 0.01 * x**4), jnp.zeros(2000))
    assert khat < 0.3
    # A tail stays one: of Pareto weights of index 0.9.
    _, khat = importance_weights(jnp.asarray(-0.9 * np.log(np.linspace(0.0005, 1, 2000))), jnp.zeros(2000))
    assert 0.7 < khat < 1.1


def test_a_point_far_from_the_optimum_is_flagged(growth, growth_posterior):
    away = eqx.tree_at(lambda m: m.rate, growth.model, jnp.array([0.6, -0.1]))
    with pytest.warns(lp.LaplodeWarning, match="nats"):
        posterior = lp.laplace(away, growth.problem, progress=False)
    assert posterior.diagnostics.newton_decrement > 100 * growth_posterior.diagnostics.newton_decrement
    with pytest.warns(lp.LaplodeWarning, match="Pareto k̂"):
        assert draw(posterior, [0.0, 1.0], weigh=True, num_samples=200).khat > 0.7


def test_a_noise_scale_that_is_wrong_is_flagged(growth, growth_posterior):
    """Draws represent the posterior of a wrong model well. That it is wrong shows in what each datum does to it."""
    narrow = eqx.tree_at(lambda p: p.likelihood, growth.problem, lp.LogNormal(0.01))
    refined = lp.refine(growth.model, narrow, curvature="ggn", progress=False)
    posteriors = {"right": growth_posterior, "narrow": lp.laplace(refined.model, narrow, progress=False)}
    assert lp.compare_evidence(posteriors).index[0] == "right"
    khats = {}
    for name, posterior in posteriors.items():
        f = draw(posterior, growth.problem.data.ts, num_samples=1000).f
        log_likelihood = posterior.problem.likelihood.log_prob(f, growth.problem.data.ys).reshape(1000, -1)
        khats[name] = [importance_weights(-values, jnp.zeros(1000))[1] for values in log_likelihood.T]
    assert np.max(khats["right"]) < 0.7 < np.max(khats["narrow"])


def test_high_khat_is_reported():
    # θ is the sinh of a normal variable, whose tails are far heavier than those of the Gaussian at the mode.
    class Compressed(Line):
        def __call__(self, ts, y0):
            return y0 + jnp.arcsinh(10 * self.slope) * (ts - ts[0])[:, None]

    posterior = one_step(Compressed(jnp.zeros(6)), lp.Gaussian(4.0), 1.0, 1e-6, channels=6)
    with pytest.warns(lp.LaplodeWarning, match=r"Pareto k̂ = .* is above 0.67"):
        draw(posterior, [0.0, 1.0], weigh=True, num_samples=1000)


@pytest.mark.parametrize("num_samples", [1, 2, 65])
@pytest.mark.filterwarnings("ignore::laplode.LaplodeWarning")
def test_any_number_of_draws(growth_posterior, num_samples):
    ts = growth_posterior.problem.data.ts
    predictions = draw(growth_posterior, ts, method="sampled", num_samples=num_samples)
    assert predictions.f.shape[0] == predictions.log_weights.shape[0] == num_samples
    linearized = draw(growth_posterior, ts, num_samples=num_samples)
    # Close to each other, draw by draw, so that batches kept their order.
    np.testing.assert_allclose(predictions.f, linearized.f, rtol=0.2)


# ---- Times that a model takes for something else than the user does


class Stepped(eqx.Module):
    """Euler's method with the first interval for its step, in closed form; or another step."""

    rate: jax.Array
    dt: float | None = eqx.field(static=True, default=None)

    def __call__(self, ts, y0):
        dt = ts[1] - ts[0] if self.dt is None else self.dt
        return y0 * (1 - self.rate * dt) ** ((ts - ts[0])[:, None] / dt)


def stepped_posterior(dt=None, ts=(0.0, 0.5, 1.0, 1.5, 2.0)):
    ts = np.array(ts)
    data = lp.Trajectories(ts, np.asarray(Stepped(jnp.array(0.7), dt)(ts, np.ones(1))), np.ones((1, 1)))
    return lp.laplace(Stepped(jnp.array(0.7), dt), lp.Problem(data, lp.Gaussian(0.01), 1e-3), progress=False)


@pytest.mark.parametrize("times", [np.linspace(0, 4, 101), [1.25, 2.0, 4.0]], ids=["finer", "forecast"])
@pytest.mark.parametrize("y0", [None, [[2.0]]], ids=["observed", "new"])
def test_a_model_whose_steps_depend_on_the_times_is_found_out(times, y0):
    with pytest.warns(lp.LaplodeWarning, match=r"(?s)at time .*standard deviation.*dt0 = ts\[1\] - ts\[0\]"):
        draw(stepped_posterior(), times, y0)


def test_a_model_whose_steps_do_not_depend_on_the_times_passes():
    posterior = stepped_posterior(0.5)
    draw(posterior, np.linspace(0, 4, 101))  # warnings are errors
    draw(posterior, [3.0, 4.0, 5.0])
    draw(stepped_posterior(), [0.0, 0.5, 1.0, 1.5, 2.0])  # the data's own times


class Ending(eqx.Module):
    """A solve that an event ends when the state falls below a level."""

    rate: jax.Array

    def __call__(self, ts, y0):
        y = y0 * jnp.exp(-self.rate * (ts - ts[0]))[:, None]
        return jnp.where(y > 0.3, y, jnp.inf)


@pytest.mark.parametrize("method", ["linearized", "sampled"])
def test_an_event_leaves_the_times_before_it(method):
    ts = np.linspace(0, 1, 6)
    data = lp.Trajectories(ts, np.exp(-ts)[:, None], np.ones((1, 1)))
    posterior = lp.laplace(Ending(jnp.array(1.0)), lp.Problem(data, lp.Gaussian(0.01), 1e-3), progress=False)
    with pytest.warns(lp.LaplodeWarning, match="no finite prediction at θ. in channel 0 of trajectory 0 at time 1.5"):
        found = draw(posterior, [0.0, 0.5, 1.0, 1.5], method=method, weigh=False)
    assert np.all(found.ok) and np.all(np.isfinite(found.y[:, :, :3]))
    assert np.all(np.isnan(found.y[:, :, 3])) and np.all(np.isnan(found.mean[:, 3]))
    with pytest.raises(lp.LaplodeError, match="predicts nan in channel 0 of trajectory 0"):
        draw(posterior, [0.0, 1.0], [[0.1]], method=method, weigh=False)


class Forced(eqx.Module):
    gain: jax.Array

    def __call__(self, ts, y0, args):
        return y0 + self.gain * jax.vmap(args.evaluate)(ts)[:, None]


def test_a_forcing_beyond_its_times_is_said():
    ts = np.linspace(0, 1, 5)
    forcing = jax.vmap(diffrax.LinearInterpolation)(ts[None], ts[None] ** 2)
    data = lp.Trajectories(ts, (ts**2)[:, None], np.zeros((1, 1)), forcing)
    posterior = lp.laplace(Forced(jnp.array(1.0)), lp.Problem(data, lp.Gaussian(0.1), 1e-3), progress=False)
    draw(posterior, [0.0, 0.3, 1.0])
    with pytest.warns(lp.LaplodeWarning, match="a LinearInterpolation in `args` .* from 0 to 1 only"):
        draw(posterior, [0.0, 0.5, 1.5])


class OnItsGrid(eqx.Module):
    rate: jax.Array

    def __call__(self, ts, y0):
        return y0 * jnp.exp(-self.rate * jnp.linspace(0, 1, 5))[:, None]


def test_a_model_with_a_grid_of_its_own_is_named():
    data = lp.Trajectories(np.linspace(0, 1, 5), np.ones((5, 1)), [1.0])
    posterior = lp.laplace(OnItsGrid(jnp.array(0.1)), lp.Problem(data, lp.Gaussian(0.1), 1.0), progress=False)
    with pytest.raises(lp.LaplodeError, match=r"predicts shape \(5, 1\) where it is asked for 3 times"):
        draw(posterior, [0.0, 0.5, 1.0])


class ForcedByArrays(eqx.Module):
    gain: jax.Array

    def __call__(self, ts, y0, args):
        return y0 + self.gain * jnp.interp(ts, args["times"], args["force"])[:, None]


def test_arrays_of_times_among_the_args_are_known_by_their_name():
    ts = np.linspace(0, 1, 5)
    args = {"times": ts[None], "force": ts[None] ** 2}
    data = lp.Trajectories(ts, (ts**2)[:, None], np.zeros((1, 1)), args)
    posterior = lp.laplace(ForcedByArrays(jnp.array(1.0)), lp.Problem(data, lp.Gaussian(0.1), 1e-3), progress=False)
    draw(posterior, [0.0, 0.3, 1.0])
    with pytest.warns(lp.LaplodeWarning, match=r"`args\['times'\]` is known from 0 to 1 only"):
        draw(posterior, [0.0, 0.5, 1.5])


# ---- What it costs


def test_draws_too_many_for_memory_are_refused(growth_posterior):
    with pytest.raises(lp.LaplodeError, match=r"`num_samples` = 1000000000000 draws .* GiB are free"):
        draw(growth_posterior, [0.0, 1.0], num_samples=10**12)


TRACED = []


class Counted(eqx.Module):
    rate: jax.Array

    def __call__(self, t, y, args):
        TRACED.append(t)
        return -self.rate * y


def test_another_number_of_times_takes_no_other_program_of_the_solve():
    ts = np.linspace(0, 1, 6)
    data = lp.Trajectories(ts, np.exp(-ts)[:, None], np.ones((1, 1)))
    problem = lp.Problem(data, lp.Gaussian(0.1), 1.0)
    posterior = lp.laplace(lp.NeuralODE(Counted(jnp.array(1.0))), problem, curvature="ggn", progress=False)
    draw(posterior, np.linspace(0, 1, 18))
    before = len(TRACED)
    for num in (20, 31):
        found = draw(posterior, np.linspace(0, 1, num))
        assert found.mean.shape == (1, num, 1) and found.covariance().shape == (1, num, num)
        np.testing.assert_allclose(found.mean[0, -1, 0], np.exp(-1), rtol=1e-6)
    assert before and len(TRACED) == before


# ---- Bad input


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param(dict(ts=[0, 2, 1]), "`ts` must be strictly increasing", id="order"),
        pytest.param(dict(ts=[-1.0, 2.0]), "`ts` of trajectory 0 starts at -1, before its initial state", id="early"),
        pytest.param(dict(ts=np.ones((3, 2)).cumsum(1)), "`ts` has 3 rows, but the data has N = 2", id="rows"),
        pytest.param(dict(ts=[[0.0, 1.0], [0.5, 1.0]]), "`ts` starts at the initial time of some", id="mixed starts"),
        pytest.param(dict(ts=[0, np.nan]), "`ts` must be finite", id="nan"),
        pytest.param(dict(y0=np.ones((1, 3))), "`y0` has D = 3 states", id="states"),
        pytest.param(dict(y0=[[np.nan, 1.0]]), "`y0` must be finite", id="y0 nan"),
        pytest.param(dict(y0=1.0), "`y0`", id="y0 scalar"),
        pytest.param(
            dict(ts=np.ones((2, 2)).cumsum(1), y0=np.ones((3, 2))), "`y0` must have shape.*N = 2", id="y0 rows"
        ),
        pytest.param(dict(args=np.ones((2, 1))), "`args` alone are for a model", id="args alone"),
        pytest.param(dict(y0=np.ones((2, 2)), args=np.ones((3, 1))), "`args` must be.*N = 2", id="args rows"),
        pytest.param(dict(method="exact"), '`method` must be one of "linearized", "geodesic", "sampled"', id="method"),
        pytest.param(dict(num_samples=0), "`num_samples` must be a positive integer", id="none"),
        pytest.param(dict(num_samples=2.5), "`num_samples` must be a positive integer", id="fraction"),
    ],
)
def test_bad_input_is_refused_by_name(growth_posterior, arguments, match):
    arguments = {"ts": [0.0, 1.0]} | arguments
    with pytest.raises(lp.LaplodeError, match=match):
        draw(growth_posterior, **arguments)


def test_bad_posterior(growth):
    with pytest.raises(lp.LaplodeError, match=r"`posterior` must come from laplode.laplace, got Growth"):
        draw(growth.model, [0.0, 1.0])


def test_args_are_missed(dosed_posterior):
    with pytest.raises(lp.LaplodeError, match="`args` is missing"):
        draw(dosed_posterior, [0.0, 1.0], np.ones((1, 1)))


def test_new_states_of_another_size_for_a_learned_initial_state():
    class Decay(eqx.Module):
        rates: jax.Array

        def __call__(self, t, y, args):
            return -self.rates * y

    ts = np.linspace(0, 1, 3)
    fixed = dict(solver=diffrax.Heun(), stepsize_controller=diffrax.ConstantStepSize(), dt0=0.01, max_steps=256)
    model = lp.NeuralODE(Decay(jnp.array([1.0, 2.0])), y0=[1.0, 1.0], **fixed)
    data = lp.Trajectories(ts, np.exp(-ts[:, None] * np.array([1.0, 2.0])))
    posterior = lp.laplace(model, lp.Problem(data, lp.Gaussian(0.1), 1e-6), curvature="ggn", progress=False)
    with pytest.raises(lp.LaplodeError, match="`y0`"):
        draw(posterior, ts, np.ones((1, 3)))


class Uptake(eqx.Module):
    """An amount that is 0 at first."""

    rate: jax.Array

    def __call__(self, ts, y0):
        return self.rate * (ts - ts[0])[:, None]


@pytest.mark.parametrize("likelihood", [lp.LogNormal(0.1), lp.Poisson()], ids=lambda each: type(each).__name__)
def test_what_is_zero_whatever_the_parameters(quiet, likelihood):
    ts = np.arange(6.0)
    ys = np.where(ts > 0, 3 * ts, np.nan)[:, None]
    posterior = quiet(Uptake(jnp.array(3.0)), lp.Problem(lp.Trajectories(ts, ys), likelihood, 1.0))
    found = draw(posterior, ts)
    assert np.all(found.ok) and np.all(found.f[:, 0, 0] == 0)
    assert np.all(np.isfinite(found.y)) and np.all(found.f[:, 0, 1:] > 0)

"""Maximum a posteriori by Optax: that it gets there, and how it stops where it can't."""

import os
import subprocess
import sys

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import laplode as lp
from laplode._fit.fit import _advance

KEY = jax.random.key(0)
ADAM = optax.adam(0.1)


class Decay(eqx.Module):
    """y' = −rate · y in closed form, so that steps cost nothing."""

    rate: jax.Array

    def __call__(self, ts, y0):
        return y0 * jnp.exp(-self.rate * (ts - ts[0])[:, None])


class DecayField(eqx.Module):
    rate: jax.Array

    def __call__(self, t, y, args):
        return -self.rate * y


FLAT = np.array(1e-6)


def decay(rate=0.1):
    return Decay(jnp.array(rate))


def decay_problem(likelihood=None, prior=None, noise=0.0, channels=1):
    """y' = −y from two initial states, seen at 25 times."""
    ts = np.linspace(0, 2, 25)
    y0 = np.array([[1.0], [2.0]]) * np.ones(channels)
    ys = y0[:, None] * np.exp(-ts[:, None]) + noise * np.random.default_rng(0).normal(size=(2, 25, channels))
    return lp.Problem(lp.Trajectories(ts, ys, y0), likelihood or lp.Gaussian(0.1), FLAT if prior is None else prior)


def run(model, problem, optimizer=None, **options):
    defaults = {"steps": 60, "key": KEY, "progress": False, "horizons": (1.0,)}
    return lp.fit(model, problem, optimizer or ADAM, **defaults | options)


@pytest.fixture(scope="module")
def fitted():
    return run(decay(), decay_problem(), steps=120)


def test_recovers_the_rate(fitted):
    np.testing.assert_allclose(fitted.model.rate, 1.0, rtol=2e-3)
    assert fitted.losses.shape == (120,)
    assert fitted.losses[-1] < fitted.losses[0] - 10
    assert fitted.reason == "budget" and not fitted.converged


def test_a_neural_ode():
    fixed = dict(solver=diffrax.Heun(), stepsize_controller=diffrax.ConstantStepSize(), dt0=0.1, max_steps=32)
    model = lp.NeuralODE(DecayField(jnp.array(0.1)), **fixed)
    fit = run(model, decay_problem(), steps=120)
    np.testing.assert_allclose(fit.model.vector_field.rate, 1.0, rtol=1e-2)


def test_losses_are_the_negative_log_joint_and_the_best_is_kept(fitted):
    problem = fitted.problem  # which knows that the given initial states are no observations
    ts, y0 = problem.data.ts, problem.data.y0

    @eqx.filter_jit
    def loss(model):
        predictions = jax.vmap(model)(ts, y0)
        return -problem.log_likelihood(predictions) - jax.scipy.stats.norm.logpdf(model.rate, scale=1e3)

    np.testing.assert_allclose(fitted.losses[0], loss(decay()), rtol=1e-12)
    np.testing.assert_allclose(fitted.loss, loss(fitted.model), rtol=1e-12)
    assert fitted.loss == fitted.losses.min()


def test_the_fit_is_where_laplace_expects_it(fitted):
    decrement = lp.laplace(fitted.model, fitted.problem, progress=False).diagnostics.newton_decrement
    assert decrement < 0.05


def test_the_prior_pulls(fitted):
    strong = run(decay(), decay_problem(prior=lp.GaussianPrior(1e6, mean=0.3)), steps=120)
    np.testing.assert_allclose(strong.model.rate, 0.3, atol=5e-3)


def test_the_same_call_gives_the_same_fit(fitted):
    np.testing.assert_array_equal(run(decay(), decay_problem(), steps=120).losses, fitted.losses)


def test_growing_horizon():
    fit = run(decay(), decay_problem(), horizons=(0.25, 0.5, 1.0), steps=92)
    assert fit.horizons == ((7, 30), (13, 30), (25, 32))
    assert fit.losses.shape == (92,)
    # The model that is returned was met on all of the data.
    assert fit.loss == fit.losses[60:].min()
    np.testing.assert_allclose(fit.model.rate, 1.0, rtol=0.05)


def test_horizons_that_round_to_the_same_length_are_one():
    ts = np.linspace(0, 1, 3)
    problem = lp.Problem(lp.Trajectories(ts, np.exp(-ts)[:, None], [1.0]), lp.Gaussian(0.1), 1.0)
    assert run(decay(), problem, horizons=(0.1, 0.2, 1.0), steps=5).horizons == ((2, 2), (3, 3))


def test_restarts_keep_the_best():
    starts = iter([5.0, 0.9])
    fit = run(decay(), decay_problem(), steps=3, restarts=3, initialize=lambda key: decay(next(starts)))
    every = fit.restart_losses
    assert every.shape == (3,) and np.argmin(every) == 2
    assert fit.loss == every.min()
    np.testing.assert_allclose(fit.model.rate, 0.9, atol=0.4)
    assert fit.losses.shape == (3,)


def test_a_restart_that_diverges_does_not_stop_the_others():
    starts = iter([-1000.0])
    fit = run(decay(), decay_problem(), steps=10, restarts=2, initialize=lambda key: decay(next(starts)))
    every = fit.restart_losses
    assert np.isfinite(every[0]) and np.isnan(every[1])
    assert np.isfinite(fit.loss)


def test_default_restarts_shuffle_matrices_and_leave_the_first_start_alone():
    from laplode._fit.fit import _shuffled
    from laplode._model.parameters import Parameters

    tree = {"weight": jnp.arange(1.0, 13.0).reshape(3, 4), "bias": jnp.arange(3.0)}
    other = _shuffled(Parameters(tree, None, (None, None)), KEY)
    np.testing.assert_array_equal(other["bias"], tree["bias"])
    np.testing.assert_array_equal(np.sort(np.abs(other["weight"]).ravel()), np.arange(1.0, 13.0))
    assert np.any(other["weight"] < 0) and np.any(np.abs(other["weight"]) != tree["weight"])
    fit = run(decay(), decay_problem(), steps=2, restarts=2)
    np.testing.assert_allclose(fit.restart_losses[0], run(decay(), decay_problem(), steps=2).loss, rtol=1e-12)


def test_where_leaves_the_rest_fixed():
    class Shifted(Decay):
        shift: jax.Array

        def __call__(self, ts, y0):
            return super().__call__(ts, y0) + self.shift

    fit = run(Shifted(jnp.array(0.5), jnp.array(0.125)), decay_problem(), where=lambda m: m.rate, steps=5)
    assert fit.model.shift == 0.125
    assert fit.model.rate != 0.5


def test_noise_scales_are_learned_per_channel():
    noise = np.array([0.05, 0.4])
    problem = decay_problem(lp.Gaussian(0.2, learned=True), noise=noise, channels=2)
    fit = run(decay(0.9), problem, optax.adam(0.05), steps=150)
    found = fit.problem.likelihood.scale
    assert found.shape == (2,)
    # The closed form at the rate that was found.
    predictions = jax.jit(jax.vmap(fit.model))(problem.data.ts, problem.data.y0)
    np.testing.assert_allclose(found, np.sqrt(np.mean((problem.data.ys - predictions) ** 2, axis=(0, 1))), rtol=1e-2)
    np.testing.assert_allclose(found, noise, rtol=0.3)
    assert lp.laplace(fit.model, fit.problem, progress=False).diagnostics.num_observations == 100


def test_a_given_scale_stays(fitted):
    assert fitted.problem.likelihood.scale == 0.1


# ---- Stopping


def test_divergence_stops_with_step_loss_and_the_best_so_far():
    with pytest.raises(lp.FitError, match=r"The fit stopped at step \d+ of 500: the loss is (nan|inf) after") as caught:
        run(decay(2.0), decay_problem(), optax.sgd(30.0), steps=500)
    fit = caught.value.fit
    assert np.isfinite(fit.loss) and fit.loss <= fit.losses[0]
    step = int(str(caught.value).split("at step ")[1].split()[0])
    assert np.all(np.isfinite(fit.losses[:step])) and not np.isfinite(fit.losses[step])


def test_a_first_guess_that_cannot_be_solved():
    with pytest.raises(lp.FitError, match="The fit stopped at the first guess: the loss is") as caught:
        run(decay(-1000.0), decay_problem())
    assert caught.value.fit is None


def test_a_gradient_that_is_not_finite_is_told_apart_from_the_loss():
    class Root(Decay):
        def __call__(self, ts, y0):
            return y0 * jnp.exp(-jnp.sqrt(self.rate) * (ts - ts[0])[:, None])

    with pytest.raises(lp.FitError, match=r"at the first guess: the gradient is no longer finite .the loss is"):
        run(Root(jnp.array(0.0)), decay_problem())


def test_divergence_on_a_longer_horizon_keeps_the_best_of_the_shorter_one():
    """y' = y²/2 is fine until t = 2 from y = 1: a short prefix says nothing of what follows."""

    class Pole(Decay):
        def __call__(self, ts, y0):
            left = 1 - self.rate * y0 * (ts - ts[0])[:, None]
            return jnp.where(left > 0, y0 / left, jnp.nan)

    with pytest.raises(lp.FitError, match="best model so far") as caught:
        run(Pole(jnp.array(0.5)), decay_problem(), optax.sgd(1e-9), steps=4, horizons=(0.25, 1.0))
    np.testing.assert_allclose(caught.value.fit.model.rate, 0.5, rtol=1e-3)


def test_interruption_returns_the_best_so_far(monkeypatch):
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return _advance(*arguments)

    monkeypatch.setattr("laplode._fit.fit._advance", interrupted)
    with pytest.warns(lp.LaplodeWarning, match="interrupted"):
        fit = run(decay(), decay_problem(), steps=120)
    assert fit.reason == "interrupted" and fit.losses.shape == (50,)
    assert fit.loss == fit.losses.min()


# ---- Bad input


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param(dict(model=lambda t, y, args: y), "`model`", id="model"),
        pytest.param(dict(problem=None), "`problem` must be laplode.Problem", id="problem"),
        pytest.param(dict(optimizer="adam"), "`optimizer` must be an Optax optimizer", id="optimizer"),
        pytest.param(dict(optimizer=optax.adam), "`optimizer` must be an Optax optimizer", id="factory"),
        pytest.param(dict(steps=0), "`steps` must be a positive integer", id="no steps"),
        pytest.param(dict(steps=1.5), "`steps` must be a positive integer", id="half a step"),
        pytest.param(dict(steps=2, horizons=(0.2, 0.5, 1.0)), "`steps` = 2 is fewer than the 3 horizons", id="few"),
        pytest.param(dict(restarts=0), "`restarts` must be a positive integer", id="restarts"),
        pytest.param(dict(horizons=(0.5, 0.25, 1.0)), "`horizons` must be increasing", id="decreasing"),
        pytest.param(dict(horizons=(0.5,)), "`horizons` must be .* end with 1", id="short"),
        pytest.param(dict(horizons=(0.0, 1.0)), "`horizons` must be", id="zero"),
        pytest.param(dict(horizons=()), "`horizons` must be", id="empty"),
        pytest.param(dict(horizons="all"), "`horizons` must be", id="string"),
        pytest.param(dict(horizons=(np.nan, 1.0)), "`horizons` must be", id="nan"),
        pytest.param(dict(where=lambda m: m.nothing), "`where` must be a function that picks nodes", id="where"),
        pytest.param(
            dict(restarts=2, initialize=lambda key: Decay(jnp.ones(2))), "`initialize` returns", id="initialize"
        ),
        pytest.param(dict(problem=decay_problem(prior=np.ones(3))), "`precision` of the prior", id="prior"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(arguments, match):
    model, problem = arguments.pop("model", decay()), arguments.pop("problem", decay_problem())
    with pytest.raises(lp.LaplodeError, match=match):
        run(model, problem, **arguments)


def test_fits_in_32_bits_and_laplace_asks_for_64():
    script = """
import jax, jax.numpy as jnp, numpy as np, equinox as eqx, optax, diffrax
import laplode as lp
class Decay(eqx.Module):
    rate: jax.Array
    def __call__(self, t, y, args):
        return -self.rate * y
ts = np.linspace(0, 2, 9)
constant = diffrax.ConstantStepSize()
model = lp.NeuralODE(Decay(jnp.array(0.3)), solver=diffrax.Heun(), stepsize_controller=constant, dt0=0.1)
problem = lp.Problem(lp.Trajectories(ts, np.exp(-ts)[:, None], [1.0]), lp.Gaussian(0.1), 1e-3)
fit = lp.fit(model, problem, optax.adam(0.1), steps=60, key=jax.random.key(0), horizons=(1.0,), progress=False)
assert fit.model.vector_field.rate.dtype == jnp.float32
assert abs(fit.model.vector_field.rate - 1) < 0.05, fit.model.vector_field.rate
try:
    lp.laplace(fit.model, fit.problem, progress=False)
except lp.LaplodeError as error:
    assert 'jax.config.update("jax_enable_x64", True)' in str(error)
    print("done")
"""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_ENABLE_X64"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "done", done.stderr

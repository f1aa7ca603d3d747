"""`fit` takes every Optax optimizer, and compiles one program for all of a kind."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import laplode as lp
from laplode._fit import fit as module

TS = np.linspace(0, 2, 9)


class Decay(eqx.Module):
    rate: jax.Array

    def __call__(self, t, y, args):
        return -self.rate * y


class Closed(eqx.Module):
    rate: jax.Array

    def __call__(self, ts, y0):
        return y0 * jnp.exp(-self.rate * ts)[:, None]


DATA = lp.Trajectories(TS, np.exp(-0.7 * TS)[:, None], y0=[1.0])
PROBLEM = lp.Problem(DATA, lp.Gaussian(0.1), 1e-6)


def fitted(optimizer, model=None, *, problem=PROBLEM, steps=150, horizons=(1.0,)):
    model = Closed(jnp.array(0.3)) if model is None else model
    return lp.fit(model, problem, optimizer, steps=steps, key=jax.random.key(0), horizons=horizons, progress=False)


OPTIMIZERS = {
    "adam": lambda: optax.adam(0.05),
    "weight decay": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05, weight_decay=1e-5)),
    "schedule": lambda: optax.adam(optax.cosine_decay_schedule(0.1, 150)),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.05),
    "plateau": lambda: optax.chain(optax.adam(0.05), optax.contrib.reduce_on_plateau(patience=40)),
    "polyak": lambda: optax.polyak_sgd(max_learning_rate=0.1, f_min=fitted(optax.lbfgs(), steps=10).loss),
    "lbfgs": lambda: optax.lbfgs(),
    "several steps": lambda: optax.MultiSteps(optax.adam(0.05), every_k_schedule=2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_kind_of_optimizer_finds_the_rate(name):
    found = fitted(OPTIMIZERS[name]())
    np.testing.assert_allclose(found.model.rate, 0.7, atol=2e-3)


def test_lbfgs_searches_along_the_solve_too():
    found = fitted(optax.lbfgs(), lp.NeuralODE(Decay(jnp.array(0.3))), steps=15)
    np.testing.assert_allclose(found.model.vector_field.rate, 0.7, atol=1e-4)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(lp.LaplodeError, match="`optimizer` must be an Optax optimizer"):
        fitted(0.1)


@pytest.fixture
def traces(monkeypatch):
    """How often the training program is traced."""
    seen = []
    shown = module.replayed
    monkeypatch.setattr(module, "replayed", lambda *args: seen.append(1) or shown(*args))
    return seen


def test_another_optimizer_of_a_kind_and_another_horizon_compile_nothing(traces):
    class Own(Decay):  # a type that no other test has compiled a program for
        pass

    model = lp.NeuralODE(Own(jnp.array(0.3)))
    one = fitted(optax.adam(0.01), model, steps=20)
    first = len(traces)
    other = fitted(optax.adam(0.02), model, steps=20, horizons=(0.5, 1.0))
    scaled = fitted(optax.adam(0.02), model, problem=lp.Problem(DATA, lp.Gaussian(0.2), 1e-6), steps=20)
    assert first and len(traces) == first
    assert one.loss != other.loss and scaled.loss != other.loss


def test_losses_are_those_of_plain_diffrax():
    model, optimizer = lp.NeuralODE(Decay(jnp.array(0.3))), optax.adam(0.02)
    prior = 1e-6

    @jax.jit
    @jax.value_and_grad
    def loss(rate):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(Decay(rate)),
            diffrax.Tsit5(),
            0.0,
            2.0,
            None,
            jnp.array([1.0]),
            saveat=diffrax.SaveAt(ts=TS),
            stepsize_controller=model.stepsize_controller,
        )
        residuals = (solution.ys[1:] - DATA.ys[0, 1:]) / 0.1  # the first state is given, and no observation
        normal = jnp.sum(0.5 * residuals**2) + (len(TS) - 1) * jnp.log(0.1 * jnp.sqrt(2 * jnp.pi))
        return normal + 0.5 * prior * rate**2 - 0.5 * jnp.log(prior / (2 * jnp.pi))

    rate, expected = jnp.array(0.3), []
    state = optimizer.init(rate)
    for _ in range(200):
        value, gradient = loss(rate)
        expected.append(value)
        updates, state = optimizer.update(gradient, state)
        rate = optax.apply_updates(rate, updates)
    np.testing.assert_allclose(fitted(optimizer, model, steps=200).losses, expected, rtol=1e-9)


class Hastening(eqx.Module):
    """The faster it turns, the more steps it takes."""

    speed: jax.Array

    def __call__(self, t, y, args):
        return self.speed * jnp.array([-y[1], y[0]])


def test_room_for_steps_grows_with_the_model():
    angle = 60 * TS
    data = lp.Trajectories(TS, np.stack([np.cos(angle), np.sin(angle)], axis=1), y0=[1.0, 0.0])
    model = lp.NeuralODE(Hastening(jnp.array(1.0)), stepsize_controller=diffrax.PIDController(1e-6, 1e-8))
    rising = optax.sgd(lambda step: 0.0)
    push = optax.stateless(lambda updates, params: jax.tree.map(lambda x: jnp.full_like(x, 2.0), updates))
    found = fitted(optax.chain(rising, push), model, problem=lp.Problem(data, lp.Gaussian(1.0), 1e-6), steps=31)
    assert np.all(np.isfinite(found.losses)) and len(found.losses) == 31
    exact = [float(np.sum((np.stack([np.cos(s * TS), np.sin(s * TS)], 1) - data.ys[0]) ** 2) / 2) for s in (1, 61)]
    np.testing.assert_allclose(found.losses[-1] - found.losses[0], exact[1] - exact[0], atol=2e-3)


def test_where_memory_is_short_diffrax_differentiates(monkeypatch):
    model = lp.NeuralODE(Decay(jnp.array(0.3)))
    expected = fitted(optax.adam(0.02), model, steps=20, horizons=(0.5, 1.0))
    monkeypatch.setattr(module, "free_bytes", lambda: 1000)
    monkeypatch.setattr(module, "replayed", None)
    found = fitted(optax.adam(0.02), model, steps=20, horizons=(0.5, 1.0))
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-9)

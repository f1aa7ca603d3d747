"""Jumps of the vector field that are declared to the step size controller."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplode as lp
from laplode._model.parameters import parameters
from laplode._solve.maps import evaluate, flow, linearize

TS = np.array([[0.0, 0.4, 1.0, 1.7, 2.5, 3.0], [0.0, 0.2, 0.6, 1.0, 2.0, 2.5]])


class Dosed(eqx.Module):
    """One compartment, infused at another rate in each piece of time; `args` are the two times at which it changes."""

    decay: jax.Array
    rates: jax.Array

    def __call__(self, t, y, args):
        return self.rates[jnp.sum(t >= args)] - self.decay * y


def in_pieces(model, ts, jumps):
    """The same in closed form, piece after piece."""

    def at(t):
        decay, y, edges = model.decay, 1.0, jnp.concatenate([jnp.zeros(1), jumps, jnp.array([jnp.inf])])
        for rate, start, end in zip(model.rates, edges[:-1], edges[1:], strict=True):
            lasted = jnp.exp(-decay * (jnp.clip(t, start, end) - start))
            y = y * lasted + rate / decay * (1 - lasted)
        return y

    return jax.vmap(at)(ts)[:, None]


EACH = np.array([[0.7, 1.7], [0.2, 1.1]])  # of each trajectory, some of them at an observation


CONTROLLERS = {  # orders from 2 to 8, and one implicit
    "Heun": (diffrax.Heun(), 1e-6),
    "Bosh3": (diffrax.Bosh3(), 1e-8),
    "Tsit5": (diffrax.Tsit5(), 1e-9),
    "Dopri8": (diffrax.Dopri8(), 1e-9),
    "Kvaerno3": (diffrax.Kvaerno3(), 1e-8),
}


@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("name", CONTROLLERS)
def test_values_and_derivatives_are_those_of_the_field_in_pieces(name, num):
    (solver, tolerance), jumps = CONTROLLERS[name], EACH[:, :num]
    controller = diffrax.ClipStepSizeController(
        diffrax.PIDController(tolerance, tolerance), jump_ts=np.unique(np.append(jumps, 3.0))
    )
    field = Dosed(jnp.array(0.8), jnp.array([2.0, 0.3, 1.2][: num + 1]))
    view = parameters(lp.NeuralODE(field, solver=solver, stepsize_controller=controller))
    around = flow(view, TS, np.ones((2, 1)), jumps)
    assert jnp.all(around.steps.lengths >= 0)
    assert jnp.all(~((around.steps.starts[0] < 0.7) & (around.steps.ends[0] >= 0.7)))
    exact = lambda theta: jax.vmap(lambda ts, jumps: in_pieces(view.unravel(theta).vector_field, ts, jumps))(TS, jumps)
    predictions, jacobian = linearize(around)
    close = 3e2 * tolerance
    np.testing.assert_allclose(predictions, exact(view.vector), rtol=close, atol=close)
    np.testing.assert_allclose(jacobian, jax.jacfwd(exact)(view.vector).reshape(12, -1), rtol=close, atol=close)
    np.testing.assert_allclose(predictions, around.solved(view.vector), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", [diffrax.Tsit5(), diffrax.Kvaerno3()], ids=lambda solver: type(solver).__name__)
def test_second_derivatives_are_those_of_the_field_in_pieces(solver):
    controller = diffrax.PIDController(1e-8, 1e-9, jump_ts=np.unique(EACH))
    field = Dosed(jnp.array(0.8), jnp.array([2.0, 0.3, 1.2]))
    view = parameters(lp.NeuralODE(field, solver=solver, stepsize_controller=controller))
    around = flow(view, TS, np.ones((2, 1)), EACH)
    cotangents = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 1)))
    exact = lambda theta: jax.vmap(lambda ts, jumps: in_pieces(view.unravel(theta).vector_field, ts, jumps))(TS, EACH)
    expected = jax.hessian(lambda theta: jnp.sum(cotangents * exact(theta)))(view.vector)
    if isinstance(solver, diffrax.Tsit5):
        lagrangian, rest = around.local_hessian(cotangents, jnp.zeros((2, 6, 1, 1)))
        found = jax.hessian(lagrangian)(view.vector) + rest
    else:  # implicit steps are differentiated automatically
        found = jax.hessian(lambda theta: jnp.sum(cotangents * around(theta)))(view.vector)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_renewed_flow_keeps_to_its_side_of_the_jump():
    controller = diffrax.PIDController(1e-7, 1e-7, jump_ts=np.unique(EACH))
    view = parameters(lp.NeuralODE(Dosed(jnp.array(0.8), jnp.array([2.0, 0.3, 1.2])), stepsize_controller=controller))
    around = flow(view, TS, np.ones((2, 1)), EACH, spare=0.5)
    theta = view.vector * 1.1
    found = evaluate(eqx.filter_jit(lambda flow, theta: flow.renewed(theta)[0])(around, theta), theta)
    np.testing.assert_allclose(found, around.solved(theta), rtol=1e-12, atol=1e-12)

"""Derivatives that are not finite, and predictions that a likelihood does not allow, are named with their place."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplode as lp

KEY = jax.random.key(0)
TS = np.linspace(0, 1, 5)


class Drag(eqx.Module):
    """A body slows by the square of its speed: the norm has no derivative at rest."""

    c: jax.Array

    def __call__(self, t, y, args):
        v = y[2:]
        return jnp.concatenate([v, jnp.array([0.0, -9.81]) - self.c * jnp.linalg.norm(v) * v])


class Leak(eqx.Module):
    """A tank fills while it leaks as the root of its level, empty at first: in closed form for a small leak."""

    k: jax.Array

    def __call__(self, ts, y0):
        return y0 + ts[:, None] - self.k * jnp.sqrt(self.k * ts)[:, None]


class Power(eqx.Module):
    """First derivatives are finite everywhere, second ones not where the base is 0."""

    k: jax.Array

    def __call__(self, t, y, args):
        return 1.0 - self.k * jnp.abs(y) ** 1.5


def drag():
    model, y0 = lp.NeuralODE(Drag(jnp.array(0.1))), np.array([[1.0, 0, 0, 1.0], [0, 0, 0, 0]])
    return model, lp.Problem(lp.Trajectories(TS, np.ones((2, 5, 4)), y0), lp.Gaussian(0.1), 1.0)


def leak():
    model = Leak(jnp.array(0.1))
    return model, lp.Problem(lp.Trajectories(TS, np.ones((1, 5, 1)), np.zeros((1, 1))), lp.Gaussian(0.1), 1.0)


def power():
    model = lp.NeuralODE(Power(jnp.array(0.5)), y0=[0.0])
    return model, lp.Problem(lp.Trajectories(TS, np.ones((1, 5, 1))), lp.Gaussian(0.1), 1.0)


@pytest.mark.parametrize(
    ("case", "options", "match"),
    [
        *(
            pytest.param(drag, options, r"first derivatives.* trajectory 1 at time 0, .*components 2, 3 .*the state")
            for options in (
                dict(curvature="ggn"),
                dict(curvature="ggn", structure="low_rank"),
                dict(curvature="hessian"),
                dict(structure="low_rank"),
                dict(structure="diagonal"),
                dict(structure="block_diagonal"),
            )
        ),
        pytest.param(leak, dict(curvature="ggn"), r"of `model`.*trajectory 0 at time 0 .*channel 0"),
        pytest.param(power, dict(curvature="hessian"), r'second derivatives.*component 0 .*curvature="ggn"'),
    ],
)
def test_derivatives_that_are_not_finite_are_named(case, options, match):
    model, problem = case()
    with pytest.raises(lp.LaplodeError, match=match):
        lp.laplace(model, problem, progress=False, **options)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_refine_names_them_too(curvature):
    with pytest.raises(lp.LaplodeError, match=r"trajectory 1 at time 0.*jnp\.where twice"):
        lp.refine(*drag(), curvature=curvature, progress=False)


class Emptying(eqx.Module):
    """What is left falls below 0 by a solver's error, or is a little more than that."""

    k: jax.Array
    left: float

    def __call__(self, ts, y0):
        return (5 * jnp.exp(-self.k * ts) + self.left - 5 * jnp.exp(-self.k * ts[-1]))[:, None]


def emptying(left):
    data = lp.Trajectories(np.linspace(0, 40, 5), np.array([5.0, 0, 0, 0, 0])[:, None])
    return Emptying(jnp.array(1.0), left), lp.Problem(data, lp.Poisson(), 1.0)


class Explosive(eqx.Module):
    rate: jax.Array

    def __call__(self, ts, y0):
        return y0 * jnp.exp(self.rate * ts)[:, None]


@pytest.mark.parametrize("sign", [1, -1])
def test_predictions_that_run_away_are_not_told_to_be_positive(sign):
    data = lp.Trajectories(np.linspace(0, 4, 5), np.ones((5, 1)), [float(sign)])
    with pytest.raises(lp.LaplodeError, match=r"log-likelihood of -inf.*predictions run away") as found:
        lp.laplace(Explosive(jnp.array(150.0)), lp.Problem(data, lp.Gaussian(0.1), 1.0), progress=False)
    assert "positive" not in str(found.value)


@pytest.mark.parametrize("stage", [lp.laplace, lp.refine])
def test_a_rate_that_the_solver_makes_negative_is_named(stage):
    with pytest.raises(lp.LaplodeError, match=r"trajectory 0, channel 0.*time 30, .* -9.99.*-10 .*maximum"):
        stage(*emptying(-1e-9), curvature="ggn", progress=False)


# ---- In what comes after


@pytest.fixture(scope="module")
def posterior():
    class Exponential(eqx.Module):
        rate: jax.Array
        late: jax.Array

        def __call__(self, ts, y0):
            rooted = jnp.sqrt(self.late * jnp.where(ts == 2.0, 0.0, 1.0))[:, None]
            return y0 * jnp.exp(self.rate * ts)[:, None] + rooted

    model = Exponential(jnp.array(0.3), jnp.array(1.0))
    ys = np.exp(0.3 * TS)[:, None] + 1
    problem = lp.Problem(lp.Trajectories(TS, ys, np.ones(1)), lp.Gaussian(0.1), 1.0)
    return lp.laplace(lp.refine(model, problem, progress=False).model, problem, progress=False)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        pytest.param(lambda p: lp.predict(p, [0.0, 2.0], key=KEY, progress=False), "at time 2", id="predict"),
        pytest.param(lambda p: lp.information_gain(p, [0.0, 2.0]), "at time 2", id="design"),
        pytest.param(
            lambda p: lp.information_gain(p, TS, target=lambda m: jnp.sqrt(m.late * 0)),
            "`target` has first",
            id="target",
        ),
        pytest.param(
            lambda p: lp.predict_function(p, lambda m: jnp.sqrt(m.late * 0), key=KEY),
            "`function` has first",
            id="function",
        ),
        pytest.param(lambda p: lp.profile(p, lambda m: jnp.sqrt(m.late * 0), progress=False), "`of` has", id="profile"),
    ],
)
def test_each_stage_names_them(posterior, call, match):
    with pytest.raises(lp.LaplodeError, match=match):
        call(posterior)

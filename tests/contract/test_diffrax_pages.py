"""Models that behave as those of Diffrax's documentation: they come out with intervals that hold, or with one refusal.

Neural ODE, neural CDE, stiff, a known part beside a neural one, and the page on second derivatives; written anew, with
less data. By hand, `-m whole`: networks are trained here.
"""

import warnings

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import laplode as lp

pytestmark = pytest.mark.whole

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)
        yield


def trained(model, loss, steps=800, rate=1e-2):
    """As in those pages: a loop of one's own around Optax."""
    optimizer = optax.adam(rate)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        gradient = eqx.filter_grad(loss)(model)
        updates, state = optimizer.update(gradient, state)
        return eqx.apply_updates(model, updates), state

    for _ in range(steps):
        model, state = step(model, state)
    return model


def covered(draws, truth, prob=0.9):
    lower, upper = draws.interval(prob, noise=False)
    assert np.all(np.isfinite(lower)) and np.all(np.isfinite(upper)) and np.all(upper >= lower)
    inside = (lower <= truth) & (truth <= upper)
    return np.mean(inside[:, 1:])


class Func(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(2, 2, 8, 1, jax.nn.softplus, key=key)

    def __call__(self, t, y, args):
        return self.mlp(y)


class NeuralODE(eqx.Module):
    """A float32 network, the first step from the first interval, the default adjoint."""

    func: Func

    def __call__(self, ts, y0):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(self.func),
            diffrax.Tsit5(),
            t0=ts[0],
            t1=ts[-1],
            dt0=ts[1] - ts[0],
            y0=y0,
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6),
            saveat=diffrax.SaveAt(ts=ts),
        )
        return solution.ys


def spirals(num=4, length=20):
    ts, rng = np.linspace(0, 3, length), np.random.default_rng(5678)
    turn = lambda t: np.exp(-0.1 * t) * np.array([[np.cos(t), np.sin(t)], [-np.sin(t), np.cos(t)]])
    y0 = rng.uniform(0.5, 1, size=(num, 2))
    clean = np.stack([[turn(t) @ y for t in ts] for y in y0])
    return ts, y0, clean, clean + 0.05 * rng.normal(size=clean.shape)


def test_neural_ode():
    ts, y0, clean, ys = spirals()
    data = lp.Trajectories(ts, ys, y0)
    loss = lambda model: jnp.mean((jax.vmap(model, (None, 0))(ts, y0) - ys) ** 2)
    model = trained(NeuralODE(Func(jax.random.key(1))), loss)
    problem, match = lp.problem_from_loss(model, data, loss, precision=1.0)
    assert 0.04 < match.scale < 0.08
    with pytest.raises(lp.LaplodeError, match="DirectAdjoint"):
        lp.laplace(model, problem, progress=False)
    fit = lp.refine(model, problem, curvature="ggn", progress=False)
    posterior = lp.laplace(fit.model, problem, curvature="ggn", progress=False)
    draws = lp.predict(posterior, ts, num_samples=500, key=KEY, progress=False)
    assert covered(draws, clean) > 0.7
    # The same field as laplode solves it has second derivatives too, and intervals alike.
    ready = lp.NeuralODE(fit.model.func)
    refined = lp.refine(ready, problem, progress=False)
    exact = lp.laplace(refined.model, problem, progress=False)
    assert covered(lp.predict(exact, ts, num_samples=500, key=KEY, progress=False), clean) > 0.7


class NeuralCDE(eqx.Module):
    """Classifies a path; called as (ts, coeffs), which is not how laplode calls a model."""

    initial: eqx.nn.Linear
    field: eqx.nn.MLP
    readout: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.initial = eqx.nn.Linear(3, 4, key=keys[0])
        self.field = eqx.nn.MLP(4, 12, 8, 1, jax.nn.softplus, final_activation=jnp.tanh, key=keys[1])
        self.readout = eqx.nn.Linear(4, 1, key=keys[2])

    def __call__(self, ts, coeffs, evolving_out=False):
        control = diffrax.CubicInterpolation(ts, coeffs)
        term = diffrax.ControlTerm(lambda t, y, args: self.field(y).reshape(4, 3), control).to_ode()
        solution = diffrax.diffeqsolve(
            term,
            diffrax.Tsit5(),
            ts[0],
            ts[-1],
            dt0=None,
            y0=self.initial(control.evaluate(ts[0])),
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6),
            saveat=diffrax.SaveAt(ts=ts) if evolving_out else diffrax.SaveAt(t1=True),
        )
        prediction = jax.vmap(lambda y: jax.nn.sigmoid(self.readout(y))[0])(solution.ys)
        return prediction if evolving_out else prediction[-1]


class Classifier(eqx.Module):
    """The same, as laplode calls a model: coefficients come as args, and all times go out."""

    cde: NeuralCDE

    def __call__(self, ts, y0, args):
        return self.cde(ts, args, evolving_out=True)[:, None]


def test_neural_cde():
    rng, num, ts = np.random.default_rng(0), 12, jnp.linspace(0, 4, 12)
    side = jnp.asarray(rng.integers(0, 2, num) * 2.0 - 1)
    phase = jnp.asarray(rng.uniform(0, 2 * np.pi, num))
    angle = phase[:, None] + side[:, None] * ts
    paths = jnp.stack([jnp.broadcast_to(ts, (num, 12)), jnp.cos(angle), jnp.sin(angle)], axis=-1)
    coeffs = jax.vmap(diffrax.backward_hermite_coefficients, (None, 0))(ts, paths)
    labels = (np.asarray(side) + 1) / 2
    ys = np.full((num, 12, 1), np.nan)
    ys[:, -1, 0] = labels  # a label is an observation at the last time
    data = lp.Trajectories(ts, ys, args=coeffs)
    likelihood = lambda p: dist.Bernoulli(probs=p, validate_args=False)
    problem = lp.Problem(data, likelihood, 1.0)
    cde = NeuralCDE(jax.random.key(3))
    with pytest.raises(lp.LaplodeError, match=r"third parameter is `evolving_out`.*\(self, ts, y0, args"):
        lp.laplace(cde, problem, progress=False)

    def loss(model):
        found = jax.vmap(model, (None, 0))(ts, coeffs)
        return -jnp.mean(labels * jnp.log(found) + (1 - labels) * jnp.log1p(-found))

    cde = trained(cde, lambda model: loss(model) + 0.01 * optax.tree.norm(eqx.filter(model, eqx.is_array)) ** 2, 200)
    fit = lp.refine(Classifier(cde), problem, curvature="ggn", steps=10, progress=False)
    posterior = lp.laplace(fit.model, problem, curvature="ggn", progress=False)
    decided = lambda model: jax.vmap(lambda each: model(ts, None, each)[-1, 0])(coeffs)
    found = lp.predict_function(posterior, decided, key=KEY, num_samples=200, progress=False)
    assert np.all(np.isfinite(found.std)) and np.all(found.std > 0)
    assert np.mean((np.asarray(found.mean) > 0.5) == labels) > 0.9


class Robertson(eqx.Module):
    k1: jax.Array
    k2: jax.Array
    k3: jax.Array

    def __call__(self, t, y, args):
        k1, k2, k3 = jnp.exp(jnp.stack([self.k1, self.k2, self.k3]))
        f0 = -k1 * y[0] + k3 * y[1] * y[2]
        f1 = k1 * y[0] - k2 * y[1] ** 2 - k3 * y[1] * y[2]
        return jnp.stack([f0, f1, k2 * y[1] ** 2])


def test_stiff():
    """Log rates, an implicit solver, and channels whose sizes differ by five decades."""
    rates = np.log([0.04, 3e7, 1e4])
    options = dict(solver=diffrax.Kvaerno5(), stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-11))
    truth = lp.NeuralODE(Robertson(*map(jnp.asarray, rates)), **options)
    ts, y0 = np.linspace(0, 100, 16), np.array([1.0, 0.0, 0.0])
    clean, scale = np.asarray(truth(ts, y0)), np.array([0.02, 1e-6, 0.02])
    ys = clean + scale * np.random.default_rng(0).normal(size=clean.shape)
    prior = lp.GaussianPrior(0.01, mean=float(rates.mean()))
    problem = lp.Problem(lp.Trajectories(ts, ys, y0), lp.Gaussian(scale), prior)
    fit = lp.refine(truth, problem, progress=False)
    assert fit.reason in ("converged", "no progress")
    posterior = lp.laplace(fit.model, problem, progress=False)
    z = (np.asarray(posterior.mean) - rates) / np.asarray(posterior.marginal_std())
    assert np.all(np.abs(z) < 3.5)
    step = 1e-4

    def slope(i):  # central differences of plain solves
        at = lambda sign: np.asarray(posterior.parameters.unravel(posterior.mean.at[i].add(sign * step))(ts, y0))
        return ((at(1) - at(-1)) / (2 * step) / scale).ravel()

    J = np.stack([slope(i) for i in range(3)], axis=1)
    ggn = lp.laplace(fit.model, problem, curvature="ggn", progress=False)
    np.testing.assert_allclose(ggn.precision(), J.T @ J + 0.01 * np.eye(3), rtol=2e-3)
    assert covered(lp.predict(posterior, ts, num_samples=500, key=KEY, progress=False), clean[None]) > 0.6


class Hybrid(eqx.Module):
    """A known decay beside a network for what is not known."""

    rate: jax.Array
    mlp: eqx.nn.MLP

    def __call__(self, t, y, args):
        return -jnp.exp(self.rate) * y + self.mlp(y)


def test_known_and_neural_parts_together():
    rng, ts = np.random.default_rng(1), np.linspace(0, 4, 20)
    truth = lp.NeuralODE(lambda t, y, args: -0.5 * y + jnp.array([1.0, -1.0]) * jnp.sin(y[::-1]))
    y0 = rng.uniform(-1, 1, size=(4, 2))
    clean = np.stack([np.asarray(truth(ts, y)) for y in y0])
    ys = clean + 0.05 * rng.normal(size=clean.shape)
    mlp = eqx.nn.MLP(2, 2, 5, 1, jnp.tanh, key=jax.random.key(2))
    model = lp.NeuralODE(Hybrid(jnp.array(-1.0), mlp))
    prior = lp.NamedPriors({"vector_field.rate": dist.Normal(-0.7, 0.5)}, rest=lp.GaussianPrior(1.0))
    problem = lp.Problem(lp.Trajectories(ts, ys, y0), lp.Gaussian(0.05), prior)
    fit = lp.refine(model, problem, progress=False)
    posterior = lp.laplace(fit.model, problem, progress=False)
    assert covered(lp.predict(posterior, ts, num_samples=500, key=KEY, progress=False), clean) > 0.7
    low, high = posterior.summary().loc["vector_field.rate"].iloc[2:]
    assert low < np.log(0.5) < high


class LotkaVolterra(eqx.Module):
    """Parameters as args and the state as a tuple, as on the page about Hessians."""

    rates: tuple[jax.Array, ...]
    adjoint: diffrax.AbstractAdjoint

    def __call__(self, ts, y0):
        def vector_field(t, y, args):
            prey, predator = y
            a, b, c, d = args
            return a * prey - b * prey * predator, -c * predator + d * prey * predator

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            diffrax.Tsit5(scan_kind="bounded"),
            ts[0],
            ts[-1],
            0.1,
            tuple(y0),
            self.rates,
            saveat=diffrax.SaveAt(ts=ts),
            adjoint=self.adjoint,
            max_steps=512,
        )
        return jnp.stack(solution.ys, axis=-1)


def test_second_derivatives():
    ts, y0 = np.linspace(0, 20, 8), np.array([10.0, 10.0])
    model = LotkaVolterra(tuple(map(jnp.array, (0.1, 0.02, 0.4, 0.02))), diffrax.DirectAdjoint())
    ys = np.asarray(model(ts, jnp.asarray(y0))) + 0.1 * np.random.default_rng(0).normal(size=(8, 2))
    problem = lp.Problem(lp.Trajectories(ts, ys, y0), lp.Gaussian(0.1), 1.0)
    default = eqx.tree_at(lambda m: m.adjoint, model, diffrax.RecursiveCheckpointAdjoint())
    with pytest.raises(lp.LaplodeError, match=r"adjoint=diffrax\.DirectAdjoint\(\)"):
        lp.laplace(default, problem, progress=False)
    fit = lp.refine(model, problem, progress=False)
    posterior = lp.laplace(fit.model, problem, progress=False)

    @jax.jit
    def loss(theta):
        there = LotkaVolterra(tuple(theta), diffrax.DirectAdjoint())
        return 0.5 * jnp.sum(((there(ts, jnp.asarray(y0)) - ys) / 0.1) ** 2) + 0.5 * jnp.sum(theta**2)

    np.testing.assert_allclose(posterior.precision(), jax.jit(jax.hessian(loss))(posterior.mean), rtol=1e-8)
    assert np.all(np.abs(posterior.mean - np.array([0.1, 0.02, 0.4, 0.02])) < 4 * posterior.marginal_std())


def test_a_field_of_a_tuple_is_told_what_to_write():
    model = lp.NeuralODE(lambda t, y, args: (y[0], -y[1]))
    problem = lp.Problem(lp.Trajectories(np.arange(3.0), np.ones((3, 2)), [1.0, 1.0]), lp.Gaussian(0.1), 1.0)
    with pytest.raises(lp.LaplodeError, match="tuple"):
        lp.laplace(model, problem, progress=False)

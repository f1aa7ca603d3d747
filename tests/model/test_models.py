"""Models of the kinds that people have, against plain solves and closed forms: the snippets of notebooks/models.md."""

import re
import warnings
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import laplode as lp
from laplode._curvature.strategies import At
from laplode._model.neural_ode import starts
from laplode._model.own import check_model, predict_trajectory
from laplode._model.parameters import parameters
from laplode._solve.maps import flow

PAGE = (Path(__file__).parents[2] / "notebooks" / "how_to" / "models.md").read_text()
HEADINGS = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def snippets():
    """What each snippet leaves behind, by the heading that it stands under."""
    names, found = {}, {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], names)
    for section in PAGE.split("\n## ")[1:]:
        for default in ("likelihood", "prior"):
            names.pop(default, None)
        for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
            exec(code, names)
        found[section.split("\n")[0]] = dict(names)
    return found


def test_the_table_leads_to_every_snippet():
    anchors = re.findall(r"\]\(#(.*?)\)", PAGE)
    assert anchors == [heading.lower().replace(" ", "-") for heading in HEADINGS]


def by_scipy(view, data, direction):
    """Predictions, and their central difference along a direction, of SciPy's solves."""
    split = lambda theta: eqx.partition(view.unravel(theta), eqx.is_array)
    static = split(view.vector)[1]
    field = jax.jit(lambda arrays, t, y, args: eqx.combine(arrays, static).vector_field(t, y, args))

    @jax.jit
    def observe(arrays, states, args):
        return eqx.combine(arrays, static).observe_states(states, args)

    def predictions(theta):
        arrays, found = split(theta)[0], []
        for i, ts in enumerate(data.ts):
            args = jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), data.args)
            model = eqx.combine(arrays, static)
            place = i if model.has_state_for_each else None
            y0 = np.asarray(model.initial_state(place if data.y0 is None else data.y0[i], args))
            rhs = lambda t, y, args=args: np.asarray(field(arrays, t, y, args))
            states = solve_ivp(rhs, ts[[0, -1]], y0, "DOP853", ts, rtol=1e-11, atol=1e-13).y.T
            found.append(observe(arrays, states, args))
        return np.stack(found)

    forward, backward = (predictions(view.vector + sign * 1e-3 * direction) for sign in (1, -1))
    return (forward + backward) / 2, (forward - backward) / 2e-3


def doses(model, data):
    """In closed form: each decays on its own."""
    rate, times = np.exp(model.log_clearance - model.log_volume), np.array([0.0, 1.7, 3.1])
    since = data.ts[..., None] - times
    left = np.where(since >= 0, np.exp(-rate * np.maximum(since, 0)), 0)
    return np.sum(data.args["dose"][:, None] * left, axis=-1, keepdims=True) / np.exp(model.log_volume)


# Derivatives of the others have their tests elsewhere, and take long to compile.
WITH_DERIVATIVES = [
    "Forcing and covariates",
    "Second-order and Hamiltonian fields",
    "Initial states that are computed",
    "Noise that the model predicts",
]


@pytest.mark.parametrize("heading", HEADINGS)
def test_predictions_and_derivatives_are_right(snippets, heading):
    """Derivatives along a direction in which all parameters move."""
    names = snippets[heading]
    model, data = names["model"], names["data"]
    dosed, predicted = heading == "Doses and events", "likelihood" in names
    if not dosed:
        model = eqx.tree_at(lambda m: m.stepsize_controller, model, diffrax.PIDController(rtol=1e-10, atol=1e-12))
    problem = lp.Problem(data, names.get("likelihood", lp.Gaussian(0.3)), names.get("prior", 2.0))
    check_model(model, problem)
    view = parameters(model, None, problem.prior)
    direction = jax.random.normal(jax.random.key(0), (view.size,)) / np.sqrt(view.size)
    f, slope = (doses(model, data), None) if dosed else by_scipy(view, data, direction)
    if heading not in WITH_DERIVATIVES:
        states = starts(model, data.y0, len(data.ts))
        found = jax.jit(jax.vmap(lambda *each: predict_trajectory(model, *each)))(data.ts, states, data.args)
        np.testing.assert_allclose(found, f, rtol=0, atol=1e-5 * np.abs(f).max())
        return
    assert slope is not None
    around = flow(view, data.ts, data.y0, data.args)
    found = lp.GaussNewton().dense(At(around, problem))
    information = np.full(f.shape, 0.3**-2)
    if predicted:
        information = np.concatenate([np.exp(-2 * f[..., 2:]), np.full_like(f[..., 2:], 2.0)], axis=-1)
    seen = problem.informed
    expected = slope[seen]
    np.testing.assert_allclose(found.factor @ direction, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(found.weights, information[seen], rtol=1e-5)


class Relaxing(eqx.Module):
    """Toward `level`: known in closed form."""

    rate: jax.Array
    level: jax.Array

    def __call__(self, t, y, args):
        return self.rate * (self.level - y)


def relaxing(theta, ts, y0):
    rate, level = theta
    return level + (y0 - level) * jnp.exp(-rate * ts)


@pytest.mark.parametrize(
    ("num", "length", "curvature"),
    [
        pytest.param(1, 10_001, "ggn", id="a long series"),
        pytest.param(1, 10_001, "hessian", id="a long series, exact"),
        pytest.param(500, 5, "hessian", id="many short ones"),
    ],
)
def test_long_series_and_many_short_ones(num, length, curvature):
    rng = np.random.default_rng(0)
    ts = np.sort(rng.uniform(0, 5, size=(num, length)), axis=1)
    ts[:, 0] = 0
    y0 = rng.uniform(1, 3, size=(num, 1))
    ys = np.asarray(relaxing((0.8, 0.4), ts, y0))[..., None] + 0.1 * rng.normal(size=(num, length, 1))
    tight = diffrax.PIDController(rtol=1e-10, atol=1e-12)
    model = lp.NeuralODE(Relaxing(jnp.array(0.8), jnp.array(0.4)), stepsize_controller=tight)
    problem = lp.Problem(lp.Trajectories(ts, ys, y0), lp.Gaussian(0.1), 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)
        posterior = lp.laplace(model, problem, curvature=curvature, progress=False)
    theta = posterior.mean
    loss = lambda theta: 0.5 * jnp.sum(((relaxing(theta, ts, y0) - ys[..., 0]) / 0.1) ** 2)
    if curvature == "hessian":
        expected = jax.jit(jax.hessian(loss))(theta)
    else:
        J = np.asarray(jax.jit(jax.jacfwd(lambda theta: relaxing(theta, ts, y0)))(theta)).reshape(-1, 2)
        expected = J.T @ J / 0.01
    np.testing.assert_allclose(posterior.precision(), expected + np.eye(2), rtol=1e-7)
    # The data and their derivatives, but no table of all times against all steps.
    needed = lp.estimate(model, problem, curvature=curvature).num_bytes
    assert needed < 100 * ys.size * 8 + 2**20

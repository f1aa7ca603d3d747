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

import laplode as lp
from laplode._vector import parameters

PAGE = (Path(__file__).parent.parent / "notebooks" / "models.md").read_text()
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


def solved(model, ts, y0, args):
    """One trajectory by Diffrax alone."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(model.vector_field),
        model.solver,
        t0=ts[0],
        t1=ts[-1],
        dt0=None,
        y0=y0,
        args=args,
        saveat=diffrax.SaveAt(ts=ts),
        stepsize_controller=model.stepsize_controller,
        adjoint=diffrax.ForwardMode(),
    )
    return solution.ys if model.observe is None else jax.vmap(lambda y: model.observe(y, args))(solution.ys)


def by_hand(view, data):
    """Predictions as a function of θ."""

    def predictions(theta):
        model = view.unravel(theta)
        starts = data.y0
        if starts is None:
            starts = jnp.broadcast_to(model.y0, (len(data.ts), model.y0.shape[-1]))
        return jax.vmap(lambda ts, y0, args: solved(model, ts, y0, args))(data.ts, starts, data.args)

    return predictions


def closed_form(view, data):
    """Of the doses: each decays on its own."""

    def predictions(theta):
        model, times = view.unravel(theta), jnp.array([0.0, 1.7, 3.1])
        since = data.ts[..., None] - times
        rate = jnp.exp(model.log_clearance - model.log_volume)
        left = jnp.where(since >= 0, jnp.exp(-rate * since), 0)
        return jnp.sum(data.args["dose"][:, None] * left, axis=-1, keepdims=True) / jnp.exp(model.log_volume)

    return predictions


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_posterior_is_that_made_by_hand(snippets, heading):
    names = snippets[heading]
    model, data = names["model"], names["data"]
    scale, predicted = 0.3, "likelihood" in names
    problem = lp.Problem(data, names.get("likelihood", lp.Gaussian(scale)), names.get("prior", 2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)  # nothing was fitted
        posterior = lp.laplace(model, problem, curvature="ggn", progress=False)
    view = parameters(model, None, problem.prior)
    dosed = heading == "Doses and events"
    reference = (closed_form if dosed else by_hand)(view, data)
    both = lambda theta: (reference(theta), reference(theta))
    jacobian, f = jax.jit(jax.jacfwd(both, has_aux=True))(view.vector)
    information = jnp.full(f.shape, scale**-2)
    if predicted:
        information = jnp.concatenate([jnp.exp(-2 * f[..., 2:]), jnp.full_like(f[..., 2:], 2.0)], axis=-1)
    seen = np.tile(data.observed, (1, 1, 2 if predicted else 1))
    rows = np.asarray(jacobian)[seen]
    expected = (rows.T * np.asarray(information)[seen]) @ rows
    found = posterior.curvature.matrix()
    # The solves in pieces have an error of their own.
    tolerance = 1e-6 if dosed else 1e-5 if heading == "Stiff fields" else 1e-9
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    assert posterior.diagnostics.num_observations == np.sum(data.observed)
    if heading != "Unknown initial states":  # where the prior is not the same for all
        np.testing.assert_allclose(posterior.precision(), found + 2.0 * np.eye(view.size), rtol=1e-9, atol=1e-9)


class Relaxing(eqx.Module):
    """Toward `level`: known in closed form."""

    rate: jax.Array
    level: jax.Array

    def __call__(self, t, y, args):
        return self.rate * (self.level - y)


def relaxing(theta, ts, y0):
    rate, level = theta
    return level + (y0 - level) * jnp.exp(-rate * ts)


SHAPES = {"a long series": (1, 10_001), "many short series": (500, 5)}


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("shape", SHAPES)
def test_long_series_and_many_short_ones(shape, curvature):
    num, length = SHAPES[shape]
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

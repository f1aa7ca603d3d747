"""The evidence as a function of hyperparameters, its maximum, and the comparison of models by it."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize as so
import scipy.stats as st
from jax.flatten_util import ravel_pytree

import laplode as lp
from laplode._posterior import maximize


def quietly(posterior, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)
        return lp.maximize_evidence(posterior, **{"progress": False} | options)


@pytest.fixture(scope="module")
def posteriors(growth, quiet):
    """Of a model with two leaves, two channels and a missing value, away from its minimum."""
    ys = growth.problem.data.ys.copy()
    ys[0, 3, 1] = np.nan
    data = lp.Trajectories(growth.problem.data.ts, ys, growth.problem.data.y0)
    problem = lp.Problem(data, lp.LogNormal(np.array([0.15, 0.1])), lp.GaussianPrior(2.0, mean=0.1))
    made = {}

    def make(curvature, structure, problem=problem):
        if (curvature, structure) not in made:
            made[curvature, structure] = quiet(growth.model, problem, curvature=curvature, structure=structure)
        return made[curvature, structure]

    return make


CASES = [("hessian", s) for s in ("full", "block_diagonal", "diagonal")] + [
    ("ggn", s) for s in ("full", "low_rank", "block_diagonal", "diagonal")
]


@pytest.mark.parametrize("curvature, structure", CASES)
@pytest.mark.parametrize("precision", ["one", "leaf", "parameter"])
def test_the_function_is_the_evidence_and_has_its_gradient(posteriors, curvature, structure, precision):
    posterior = posteriors(curvature, structure)
    function, start = lp.evidence_function(posterior, precision=precision)
    np.testing.assert_allclose(function(start), posterior.log_evidence, rtol=1e-12)
    assert start.log_scale.shape == (2,)
    assert start.log_precision.shape == ({"one": 1, "leaf": 2, "parameter": 3}[precision],)
    flat, unflatten = ravel_pytree(start)
    there = unflatten(flat + np.linspace(-0.5, 0.5, flat.size))
    np.testing.assert_allclose(*slopes(function, there), rtol=1e-6, atol=1e-8)


def slopes(function, start, step=1e-4):
    """The gradient of the evidence by automatic differentiation and by differences."""
    flat, unflatten = ravel_pytree(start)
    value = jax.jit(lambda x: function(unflatten(x)))
    slope = lambda e: (8 * (value(flat + e) - value(flat - e)) - (value(flat + 2 * e) - value(flat - 2 * e))) / 12
    return jax.grad(value)(flat), np.array([slope(e) / step for e in step * np.eye(flat.size)])


class Curve(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, ts, y0):
        return jax.vmap(self.mlp)(ts[:, None])


@pytest.fixture(scope="module")
def few():
    """Fewer observations than parameters, and a Hessian with negative eigenvalues that are clipped."""
    mlp = eqx.nn.MLP(1, 2, 4, 1, jnp.tanh, key=jax.random.key(0))
    data = lp.Trajectories(np.linspace(-1, 1, 4), np.random.default_rng(0).normal(size=(4, 2)))
    return Curve(mlp), lp.Problem(data, lp.Gaussian(0.3), 1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"curvature": "ggn"},
        {"curvature": "ggn", "structure": lp.LowRank(rank=5)},
        {"curvature": "hessian", "structure": lp.LowRank(rank=6)},
        {"curvature": "hessian"},
        {"curvature": "hessian", "structure": "block_diagonal", "regularization": "abs"},
    ],
)
def test_in_data_space_and_where_eigenvalues_are_changed(few, quiet, options):
    posterior = quiet(*few, **options)
    assert options["curvature"] == "ggn" or posterior.diagnostics.num_negative > 0
    function, start = lp.evidence_function(posterior, precision="leaf")
    np.testing.assert_allclose(function(start), posterior.log_evidence, rtol=1e-9)
    np.testing.assert_allclose(*slopes(function, start), rtol=1e-6, atol=1e-8)
    found = quietly(posterior, precision="leaf")
    again = quiet(few[0], found.problem, **options)
    np.testing.assert_allclose(found.log_evidence, again.log_evidence, rtol=1e-8)
    assert found.log_evidence > posterior.log_evidence


@pytest.mark.parametrize("curvature, structure", CASES)
def test_the_result_is_the_laplace_approximation_of_the_new_problem(growth, posteriors, quiet, curvature, structure):
    posterior = posteriors(curvature, structure)
    found = quietly(posterior, precision="leaf")
    again = quiet(growth.model, found.problem, curvature=curvature, structure=structure)
    np.testing.assert_allclose(found.precision(), again.precision(), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(found.log_evidence, again.log_evidence, rtol=1e-10)
    np.testing.assert_allclose(found.diagnostics.newton_decrement, again.diagnostics.newton_decrement, rtol=1e-8)
    assert found.log_evidence > posterior.log_evidence
    assert jax.tree.structure(found.problem.prior.precision) != jax.tree.structure(1.0)


def exact_evidence(linear, log_precision, log_scale):
    """log p(Y) of the linear model by its marginal covariance; the initial state says nothing of the parameters."""
    design = linear.design(linear.problem.data.ts[0])
    noise = np.tile(np.exp(log_scale), len(linear.target) // 2)
    covariance = design @ design.T / np.exp(log_precision) + np.diag(noise**2)
    return st.multivariate_normal(np.zeros(len(noise)), covariance).logpdf(linear.target)


@pytest.fixture(scope="module")
def online(linear):
    start = lp.Problem(linear.problem.data, lp.Gaussian(0.4), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)
        posterior = lp.laplace(linear.model, start, curvature="ggn", progress=False)
    return lp.maximize_evidence(posterior, online=True, progress=False)


def test_online_it_finds_the_maximum_of_the_exact_evidence(linear, online):
    minus = lambda h: -exact_evidence(linear, h[0], h[1:])
    best = so.minimize(minus, np.zeros(3), method="BFGS")
    found = np.append(np.log(online.problem.prior.precision), np.log(online.problem.likelihood.scale))
    np.testing.assert_allclose(found, best.x, atol=0.05)  # the evidence is flat there
    np.testing.assert_allclose(online.log_evidence, -best.fun, atol=2e-3)
    np.testing.assert_allclose(online.log_evidence, exact_evidence(linear, found[0], found[1:]), atol=1e-3)


def test_the_maximum_is_mackays_fixed_point(linear, online):
    dof = online.diagnostics.effective_dof
    precision = float(online.problem.prior.precision)
    np.testing.assert_allclose(dof / np.sum(online.mean**2), precision, rtol=0.02)
    residual = (linear.problem.data.ys[0] - online.flow(online.mean)[0]) / online.problem.likelihood.scale
    # Both channels have the same design, so that each determines half of the parameters but for their noise.
    data = linear.problem.data
    np.testing.assert_allclose(np.sum(residual**2), data.ys.size - dof, rtol=0.02)


def test_held_fixed(posteriors):
    posterior = posteriors("ggn", "full")
    noise = quietly(posterior, precision="fixed")
    assert noise.problem.prior.precision == posterior.problem.prior.precision
    prior = quietly(posterior, noise="fixed", precision="parameter")
    np.testing.assert_array_equal(prior.problem.likelihood.scale, posterior.problem.likelihood.scale)
    assert prior.problem.prior.precision.shape == (3,)
    one = quietly(posterior, noise="one")
    ratio = np.asarray(one.problem.likelihood.scale / posterior.problem.likelihood.scale)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-12)
    assert prior.problem.prior.mean == posterior.problem.prior.mean


def test_a_part_of_the_parameters(growth, quiet):
    posterior = quiet(growth.model, growth.problem, where=lambda m: m.rate)
    found = quietly(posterior, precision="leaf", online=True)
    assert found.size == 2
    assert float(found.parameters.model.gain) == float(growth.model.gain)
    assert found.diagnostics.newton_decrement < 1e-2


def test_a_start_from_which_a_step_along_the_gradient_ends_nowhere(growth, quiet, monkeypatch):
    """The evidence is not finite there: it is not that nothing can be gained."""
    problem = lp.Problem(growth.problem.data, lp.LogNormal(0.02), 1.0)
    posterior = quiet(growth.model, problem, curvature="ggn")
    expected = quietly(posterior, noise="one")
    start = ravel_pytree(lp.evidence_function(posterior, noise="one")[1])[0]

    def near(function, there, value_and_gradient=maximize._value_and_gradient):
        value, gradient = value_and_gradient(function, there)
        far = np.max(np.abs(ravel_pytree(there)[0] - start)) > 4
        return (-np.inf if far else value), gradient

    monkeypatch.setattr(maximize, "_value_and_gradient", near)
    found = quietly(posterior, noise="one")
    assert found.log_evidence > posterior.log_evidence + 1
    np.testing.assert_allclose(found.log_evidence, expected.log_evidence, rtol=1e-6)


def test_a_search_that_ends_on_a_slope_is_said(growth, quiet):
    problem = lp.Problem(growth.problem.data, lp.LogNormal(0.02), 1.0)
    posterior = quiet(growth.model, problem, curvature="ggn")
    with pytest.warns(lp.LaplodeWarning, match="has not settled: allow more `steps`"):
        lp.maximize_evidence(posterior, noise="one", steps=1, progress=False)


def test_bounds_are_named(posteriors):
    posterior = posteriors("ggn", "full")
    with pytest.warns(lp.LaplodeWarning, match="upper bound of the prior precision"):
        lp.maximize_evidence(posterior, noise="fixed", precision_bounds=(1e-6, 1e-3), progress=False)
    with pytest.warns(lp.LaplodeWarning, match="lower bound of the noise scale of channel 0"):
        lp.maximize_evidence(posterior, precision="fixed", scale_bounds=(2.0, 3.0), progress=False)


def test_a_moved_optimum_is_said(posteriors):
    with pytest.warns(lp.LaplodeWarning, match="optimum lies elsewhere.*online=True"):
        lp.maximize_evidence(posteriors("ggn", "full"), progress=False)


def test_student_t_has_its_noise_with_ggn_only(growth, quiet):
    problem = lp.Problem(growth.problem.data, lp.StudentT(4.0, 0.2), 1.0)
    posterior = quiet(growth.model, problem)
    assert lp.evidence_function(posterior)[1].log_scale is None
    with pytest.raises(lp.LaplodeError, match=r'`noise`="one".*"ggn"'):
        lp.maximize_evidence(posterior, noise="one")
    found = quietly(quiet(growth.model, problem, curvature="ggn"))
    again = quiet(growth.model, found.problem, curvature="ggn")
    np.testing.assert_allclose(found.log_evidence, again.log_evidence, rtol=1e-10)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"precision": "layer"}, '`precision` must be one of "one", "leaf"'),
        ({"noise": "each"}, '`noise` must be one of "channel", "one", "fixed"'),
        ({"precision": "fixed", "noise": "fixed"}, "nothing is left"),
        ({"precision_bounds": (1.0, 0.1)}, "`precision_bounds`"),
        ({"scale_bounds": 3.0}, "`scale_bounds`"),
        ({"steps": 0}, "`steps`"),
        ({"rounds": 1.5}, "`rounds`"),
        ({"online": "yes"}, "`online`"),
    ],
)
def test_bad_options(growth_posterior, options, match):
    with pytest.raises(lp.LaplodeError, match=match):
        lp.maximize_evidence(growth_posterior, **options)


def test_no_scale_to_optimize(growth, quiet):
    data = eqx.tree_at(lambda d: d.ys, growth.problem.data, np.round(growth.problem.data.ys))
    posterior = quiet(growth.model, lp.Problem(data, lp.Poisson(), 1.0), curvature="ggn")
    with pytest.raises(lp.LaplodeError, match=r'`noise`="one".*Poisson, has no scale'):
        lp.maximize_evidence(posterior, noise="one")
    assert quietly(posterior).log_evidence > posterior.log_evidence
    with pytest.raises(lp.LaplodeError, match="`posterior`"):
        lp.maximize_evidence(growth)


def test_against_quadrature(growth):
    """A mechanistic model with three parameters: the integral over a grid, against the Laplace approximation."""
    fit = lp.refine(growth.model, growth.problem, progress=False)
    posterior = lp.laplace(fit.model, growth.problem, progress=False)
    std = np.asarray(posterior.marginal_std())
    nodes = np.linspace(-6, 6, 41)
    grid = np.stack(np.meshgrid(nodes, nodes, nodes, indexing="ij"), -1).reshape(-1, 3)
    whiten = np.linalg.cholesky(posterior.covariance())
    thetas = posterior.mean + grid @ whiten.T
    data = growth.problem.data

    @jax.jit
    def log_joint(theta):
        model = posterior.unravel(theta)
        predictions = jax.vmap(model)(jnp.asarray(data.ts), jnp.asarray(data.y0))
        return growth.problem.log_likelihood(predictions) + jnp.sum(jax.scipy.stats.norm.logpdf(theta))

    cell = (nodes[1] - nodes[0]) ** 3 * np.prod(np.diag(whiten))
    exact = jax.scipy.special.logsumexp(jax.lax.map(log_joint, thetas, batch_size=1000)) + np.log(cell)
    assert np.all(std < 0.1)
    np.testing.assert_allclose(posterior.log_evidence, exact, atol=0.01)


def test_comparison(growth, growth_posterior, quiet):
    worse = quiet(eqx.tree_at(lambda m: m.rate, growth.model, jnp.array([0.0, 0.0])), growth.problem, curvature="ggn")
    table = lp.compare_evidence({"flat": worse, "grows": growth_posterior})
    assert list(table.index) == ["grows", "flat"] and list(table["rank"]) == [0, 1]
    assert table.loc["flat", "warning"] and table.loc["grows", "diff"] == 0
    np.testing.assert_allclose(table["diff"], growth_posterior.log_evidence - table["log_evidence"])
    np.testing.assert_allclose(table["weight"].sum(), 1)
    np.testing.assert_allclose(
        table["p"], [growth_posterior.diagnostics.effective_dof, worse.diagnostics.effective_dof]
    )


def test_comparison_wants_the_same_data(growth, growth_posterior, neural_posterior):
    with pytest.raises(lp.LaplodeError, match=r"'b'.*other data"):
        lp.compare_evidence({"a": growth_posterior, "b": neural_posterior})
    with pytest.raises(lp.LaplodeError, match="not empty"):
        lp.compare_evidence({})
    with pytest.raises(lp.LaplodeError, match="'a'"):
        lp.compare_evidence({"a": growth.model})


# ---- Where it is hard


@pytest.mark.parametrize("progress", [True, False])
def test_rounds_are_counted(growth_posterior, monkeypatch, progress):
    calls = []

    def refined(posterior, problem):
        """Always more probable than before."""
        calls.append(problem)
        return eqx.tree_at(lambda p: p.log_joint, posterior, posterior.log_joint + 1)

    monkeypatch.setattr("laplode._posterior.maximize._refined", refined)
    monkeypatch.setattr("laplode._posterior.maximize._SETTLED", -np.inf)
    with pytest.warns(lp.LaplodeWarning, match="has not settled"):
        lp.maximize_evidence(growth_posterior, online=True, rounds=3, progress=progress)
    assert len(calls) == 1 + 3


def test_a_step_that_loses_evidence_is_cut_short(growth_posterior, monkeypatch):
    scales = []

    def refined(posterior, problem):
        """Less probable wherever the hyperparameters are other ones by more than a tenth of the first step."""
        scales.append(np.log(problem.likelihood.scale / posterior.problem.likelihood.scale))
        first = scales[1] if len(scales) > 1 else np.inf
        worse = np.max(np.abs(scales[-1] / first)) > 0.1
        moved = eqx.tree_at(lambda p: p.log_joint, posterior, posterior.log_joint + (-1 if worse else 1))
        return eqx.tree_at(lambda p: p.problem, moved, problem)

    monkeypatch.setattr("laplode._posterior.maximize._refined", refined)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)
        lp.maximize_evidence(growth_posterior, precision="fixed", online=True, rounds=1, progress=False)
    assert len(scales) > 3 and np.max(np.abs(scales[1])) > 1e-3
    np.testing.assert_array_equal(scales[0], 0)
    assert np.max(np.abs(scales[-1] / scales[1])) < 0.1
    monkeypatch.setattr(
        "laplode._posterior.maximize._refined",
        lambda posterior, problem: eqx.tree_at(lambda p: p.log_joint, posterior, posterior.log_joint - 1),
    )
    kept = lp.maximize_evidence(growth_posterior, precision="fixed", online=True, progress=False)
    np.testing.assert_array_equal(kept.problem.likelihood.scale, growth_posterior.problem.likelihood.scale)


class Redundant(eqx.Module):
    """Two parameters of which only the sum is seen."""

    slopes: jax.Array

    def __call__(self, ts, y0):
        return jnp.sum(self.slopes) * ts[:, None]


def test_eigenvalues_that_are_far_apart(quiet):
    """The matrix written out has lost the smaller one; the evidence has not."""
    ts, scale = np.linspace(1, 2, 6), 1e-9
    ys = 0.7 * ts + scale * np.random.default_rng(0).normal(size=6)
    slope = ys @ ts / (ts @ ts)  # the prior adds nothing to that
    problem = lp.Problem(lp.Trajectories(ts, ys[:, None]), lp.Gaussian(scale), 1.0)
    posterior = quiet(Redundant(jnp.full(2, slope / 2)), problem, curvature="ggn")
    assert posterior.diagnostics.condition_number > 1e16
    function, start = lp.evidence_function(posterior)
    np.testing.assert_allclose(function(start), posterior.log_evidence, rtol=1e-8)
    flat, unflatten = ravel_pytree(start)
    for move in ([0.0, 0.0], [1.0, 0.0], [-1.0, 0.5]):
        precision, noise = np.exp(move[0]), scale * np.exp(move[1])
        # Of y ~ N(0, noise² + 2 t tᵀ / precision), by the part along t and the rest.
        along, total = ys @ ts / np.linalg.norm(ts), noise**2 + 2 * ts @ ts / precision
        rest = np.sum((ys - slope * ts) ** 2)
        exact = st.norm.logpdf(along, scale=np.sqrt(total)) - rest / noise**2 / 2 - 5 * np.log(2 * np.pi * noise**2) / 2
        np.testing.assert_allclose(function(unflatten(flat + np.array(move))), exact, rtol=1e-7)
    np.testing.assert_allclose(*slopes(function, start), rtol=1e-6)

"""laplace() in every structure, against the dense algebra of the same curvature; the estimate that comes before it."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import laplode
from laplode._curvature.hessian import hessian, hessian_diagonal
from laplode._curvature.strategies import At
from laplode._model.parameters import parameters
from laplode._solve.maps import flow

# Few stages and few steps: what is compared here shares its grid.
COARSE = {"solver": diffrax.Bosh3(), "stepsize_controller": diffrax.PIDController(rtol=1e-3, atol=1e-4)}


class Field(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t, y, args):
        return self.mlp(jnp.concatenate([y, jnp.sin(t)[None]]))


class Observe(eqx.Module):
    weight: jax.Array

    def __call__(self, y, args):
        return args * jnp.exp(0.3 * self.weight @ y)


def _problem(model, trajectories, times, likelihood, args=None, missing=False):
    rng = np.random.default_rng(0)
    ts = np.sort(rng.uniform(0, 2, (trajectories, times)), axis=1)
    y0 = None if model.y0 is not None else rng.normal(size=(trajectories, 2))
    data = laplode.Trajectories(ts, np.zeros((trajectories, times, 1)), y0, args)
    exact = jax.vmap(model)(jnp.asarray(data.ts), y0, args)
    ys = np.asarray(exact) * np.exp(0.1 * rng.normal(size=exact.shape))
    if missing:
        ys[0, 3:6] = np.nan
        ys[-1, 2, 0] = np.nan
    return laplode.Problem(laplode.Trajectories(ts, ys, y0, args), likelihood, laplode.GaussianPrior(1.5))


@pytest.fixture(scope="module")
def plain():
    model = laplode.NeuralODE(Field(eqx.nn.MLP(3, 2, 5, 1, jnp.tanh, key=jax.random.key(0))), **COARSE)
    return model, _problem(model, 2, 8, laplode.StudentT(4.0, 0.2), missing=True)


@pytest.fixture(scope="module")
def observed():
    model = laplode.NeuralODE(
        Field(eqx.nn.MLP(3, 2, 4, 1, jnp.tanh, key=jax.random.key(1))),
        y0=[0.3, -0.2],
        observe=Observe(jnp.array([[1.0, 0.5], [0.2, -0.3], [0.7, 0.1]])),
        **COARSE,
    )
    args = jnp.array([1.0, 2.5])
    return model, _problem(model, 2, 8, laplode.LogNormal(0.2), args, missing=True)


@pytest.fixture(scope="module")
def constrained():
    """Initial states and noise scales are positive parameters, so that θ enters through its logarithms."""
    field = Field(eqx.nn.MLP(3, 2, 3, 1, jnp.tanh, key=jax.random.key(2)))
    clean = laplode.NeuralODE(field, y0=[[0.5, 0.8], [1.1, 0.4]], **COARSE)
    ts = np.linspace(0, 2, 6)
    ys = np.stack([clean(ts, i) for i in range(2)]) + 0.1 * np.random.default_rng(3).normal(size=(2, 6, 2))
    ys[0, 2, 1] = np.nan
    model = laplode.NeuralODE(field, y0=[[0.6, 0.7], [1.0, 0.5]], scale=[0.2, 0.3], **COARSE)
    prior = laplode.NamedPriors({"y0": dist.LogNormal(0.0, 1.0), "scale": dist.HalfNormal(1.0)}, rest=1.5)
    return model, laplode.Problem(laplode.Trajectories(ts, ys), laplode.Gaussian(), prior)


@pytest.mark.parametrize("name", ["observed", "constrained"])
def test_local_hessian_equals_tangents_through_the_solve(name, request, monkeypatch):
    model, problem = request.getfixturevalue(name)
    data = problem.data
    around = flow(parameters(model, None, problem.prior), data.ts, data.y0, data.args)
    monkeypatch.setattr("laplode._curvature.hessian._FEW_PARAMETERS", 10**9)
    through = hessian(around, problem, batch_size=None)
    monkeypatch.setattr("laplode._curvature.hessian._FEW_PARAMETERS", 0)
    local = hessian(around, problem, batch_size=None)
    np.testing.assert_allclose(local.matrix, through.matrix, rtol=0, atol=1e-12 * np.abs(through.matrix).max())
    assert local.symmetry_defect < 1e-12 and through.symmetry_defect < 1e-12
    batched = hessian(around, problem, batch_size=5)
    np.testing.assert_allclose(batched.matrix, local.matrix, rtol=0, atol=1e-12 * np.abs(local.matrix).max())


@pytest.mark.parametrize(
    ("curvature", "where"),
    [("hessian", None), ("ggn", lambda m: m.vector_field.mlp.layers[-1]), ("fisher", None)],
    ids=["hessian", "ggn of the last layer", "fisher"],
)
@pytest.mark.filterwarnings("ignore::laplode.LaplodeWarning")  # the model is not fitted
def test_structures_are_parts_of_the_full_matrix(plain, curvature, where):
    model, problem = plain
    run = lambda structure, **more: laplode.laplace(
        model,
        problem,
        curvature=curvature,
        structure=structure,
        regularization=laplode.Clip(always=True),
        where=where,
        progress=False,
        **more,
    )
    full = run("full")
    found = np.asarray(full.form.matrix)
    eye = np.eye(full.size)

    diagonal = run("diagonal")
    clipped = np.maximum(np.diagonal(found), 0)
    np.testing.assert_allclose(diagonal.precision(), np.diag(clipped + 1.5), rtol=1e-9, atol=1e-9)

    blocks, expected = run("block_diagonal"), 1.5 * eye
    for _, _, start, stop in full.parameters.leaves:
        eigenvalues, vectors = np.linalg.eigh(found[start:stop, start:stop])
        expected[start:stop, start:stop] += (vectors * np.maximum(eigenvalues, 0)) @ vectors.T
    np.testing.assert_allclose(blocks.precision(), expected, rtol=1e-8, atol=1e-8)

    low_rank = run("low_rank")  # of full rank here, for the Hessian too: P is below its default rank
    np.testing.assert_allclose(low_rank.covariance(), full.covariance(), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(low_rank.log_evidence, full.log_evidence, rtol=1e-9)
    np.testing.assert_allclose(low_rank.marginal_std(), full.marginal_std(), rtol=1e-8)
    np.testing.assert_allclose(low_rank.diagnostics.effective_dof, full.diagnostics.effective_dof, rtol=1e-7)
    assert low_rank.diagnostics.num_negative == full.diagnostics.num_negative
    theta = full.mean + 0.1
    for posterior in (full, diagonal, blocks, low_rank):
        covariance = np.asarray(posterior.covariance())
        quadratic = 0.01 * np.sum(np.linalg.inv(covariance))
        log_prob = -0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * covariance)[1])
        np.testing.assert_allclose(posterior.log_prob(theta), log_prob, rtol=1e-8)
        np.testing.assert_allclose(posterior.marginal_std() ** 2, np.diagonal(covariance), rtol=1e-8)
        assert posterior.sample(jax.random.key(0), 3).shape == (3, full.size)


@pytest.mark.parametrize("trajectories", [4, 20], ids=["M = 200", "M = 1000"])
@pytest.mark.filterwarnings("ignore::laplode.LaplodeWarning")
def test_low_rank_equals_full(trajectories):
    model = laplode.NeuralODE(Field(eqx.nn.MLP(3, 2, 17, 2, jnp.tanh, key=jax.random.key(2))), **COARSE)
    problem = _problem(model, trajectories, 25, laplode.Gaussian(0.1))
    full = laplode.laplace(model, problem, curvature="ggn", progress=False)
    low_rank = laplode.laplace(model, problem, curvature="ggn", structure="low_rank", progress=False)
    assert 380 < full.size < 420 and full.diagnostics.num_observations == 50 * trajectories
    covariance = full.covariance()
    np.testing.assert_allclose(low_rank.covariance(), covariance, rtol=0, atol=1e-8 * np.abs(covariance).max())
    np.testing.assert_allclose(low_rank.built.log_det, full.built.log_det, rtol=1e-8)
    root = low_rank.built.root_product(jnp.eye(full.size)).T  # what turns standard normals into draws
    np.testing.assert_allclose(root @ root.T, covariance, rtol=0, atol=1e-8 * np.abs(covariance).max())
    ts = np.linspace(2.0, 3.0, 5)
    predictive = [
        laplode.predict(p, ts, num_samples=2, key=jax.random.key(0), progress=False).covariance()
        for p in (full, low_rank)
    ]
    np.testing.assert_allclose(predictive[1], predictive[0], rtol=0, atol=1e-8 * np.abs(predictive[0]).max())
    for name in ("eigenvalue_min", "eigenvalue_max", "condition_number", "effective_dof", "newton_decrement"):
        values = [getattr(p.diagnostics, name) for p in (low_rank, full)]
        np.testing.assert_allclose(*values, rtol=1e-6, err_msg=name)


@pytest.mark.filterwarnings("ignore::laplode.LaplodeWarning")
def test_truncation_only_widens(plain):
    model, problem = plain
    run = lambda rank: laplode.laplace(
        model, problem, curvature="ggn", structure=laplode.LowRank(rank=rank), progress=False
    ).marginal_std()
    widths = [run(rank) for rank in (2, 6, 12)]
    assert np.all(widths[0] >= widths[1] * (1 - 1e-12)) and np.all(widths[1] >= widths[2] * (1 - 1e-12))
    assert np.any(widths[0] > widths[2] * 1.01)


@pytest.mark.filterwarnings("ignore::laplode.LaplodeWarning")
def test_stochastic_diagonal_tends_to_the_exact_one(plain):
    model, problem = plain
    exact = hessian_diagonal(
        flow(parameters(model), problem.data.ts, problem.data.y0, None), problem, batch_size=None
    ).diagonal
    run = lambda num, seed: (
        laplode.laplace(
            model,
            problem,
            curvature=laplode.Hessian(num_probes=num, key=jax.random.key(seed)),
            structure="diagonal",
            progress=False,
        ).form.diagonal
    )
    error = lambda num: np.mean([np.linalg.norm(run(num, seed) - exact) for seed in range(4)])
    # The standard error falls with the square root of the number of probes, here by 8.
    assert error(1024) < error(16) / 4
    assert error(1024) < 0.2 * np.linalg.norm(exact)


def test_products(plain):
    model, problem = plain
    products = laplode.curvature_products(model, problem)
    rng = np.random.default_rng(3)
    v = jnp.asarray(rng.normal(size=products.theta.size))
    around = products.flow
    factored = laplode.GaussNewton().dense(At(around, problem))
    matrix = hessian(around, problem, batch_size=None).matrix
    np.testing.assert_allclose(products.hessian(v), matrix @ v, rtol=1e-9, atol=1e-9 * np.abs(matrix).max())
    np.testing.assert_allclose(products.gauss_newton(v), factored.matrix @ v, rtol=1e-9, atol=1e-8)
    push = products.jacobian(v)
    assert push.shape == problem.data.ys.shape
    np.testing.assert_allclose(push.ravel()[problem.data.observed.ravel()], factored.factor @ v, rtol=1e-9, atol=1e-11)
    u = jnp.asarray(rng.normal(size=push.shape))
    np.testing.assert_allclose(jnp.vdot(products.jacobian_transposed(u), v), jnp.vdot(u, push), rtol=1e-11)


def test_estimate(plain, capsys):
    model, problem = plain
    found = laplode.estimate(model, problem, curvature="ggn", structure="low_rank")
    size = parameters(model).size
    assert (found.num_parameters, found.num_observations) == (size, int(problem.data.observed.sum()))
    assert (found.num_states, found.num_trajectories, found.route) == (2, 2, "sensitivity")
    assert found.num_steps > 0 and 0 < found.num_bytes < found.free_bytes and found.seconds > 0
    assert "sensitivity" in str(found) and f"P = {size}" in str(found)
    assert laplode.estimate(model, problem).route == "forward over reverse"


def test_what_does_not_fit_is_refused_with_what_does(plain, monkeypatch):
    _, problem = plain
    wide = laplode.NeuralODE(Field(eqx.nn.MLP(3, 2, 1000, 2, key=jax.random.key(0))))
    with pytest.raises(laplode.LaplodeError) as error:
        laplode.laplace(wide, problem, curvature="ggn")
    for text in ("`structure`", '"full"', "TiB", 'structure="low_rank"', 'structure="diagonal"', "where"):
        assert text in str(error.value)
    with pytest.raises(laplode.LaplodeError, match='curvature="ggn" with structure="low_rank"'):
        laplode.estimate(wide, problem)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: {"structure": laplode.LowRank(rank=0)}, "`rank` must be a positive integer"),
        (lambda: {"curvature": laplode.Hessian(num_probes=3, key=jax.random.key(0))}, "`num_probes` goes with"),
        (lambda: {"curvature": laplode.Hessian(num_probes=3), "structure": "diagonal"}, "`key` is needed"),
        (lambda: {"curvature": laplode.Hessian(batch_size=1.5)}, "`batch_size` must be a positive integer"),
        (lambda: {"structure": "low_rank", "regularization": "jitter"}, "jitter"),
        (lambda: {"structure": "low_rank", "mesh": jax.make_mesh((1,), ("all",))}, "`mesh` goes with"),
    ],
)
def test_options_that_do_not_go_together(plain, options, message):
    with pytest.raises(laplode.LaplodeError, match=message):
        laplode.laplace(*plain, progress=False, **options())

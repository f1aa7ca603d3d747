"""A posterior as the prior of the next data: the same as all data at once where that can be, and refused where not."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.linalg

import laplode as lp
from laplode._algebra.low_rank import low_rank
from laplode._algebra.precision import BlockDiagonalPrecision, DiagonalPrecision, FullPrecision
from laplode._model.parameters import parameters
from laplode._predict.surface import Surface

KEY = jax.random.key(0)


def seen(problem, times, prior=None):
    """The problem with what was observed at some times only."""
    ys = np.full_like(problem.data.ys, np.nan)
    ys[:, times] = problem.data.ys[:, times]
    with_data = eqx.tree_at(lambda p: p.data.ys, problem, ys)
    return with_data if prior is None else lp.Problem(with_data.data, problem.likelihood, prior)


def at_mean(linear, times, precision, mean):
    """The model at the posterior mean of what is seen at some times, after Normal(mean, precision⁻¹)."""
    rows = np.zeros(12, bool)
    rows[times] = True
    design = linear.design(np.linspace(0, 3, 12))[np.repeat(rows, 2)] / 0.1
    target = linear.target[np.repeat(rows, 2)] / 0.1
    total = design.T @ design + precision
    mean = np.linalg.solve(total, design.T @ target + precision @ mean)
    model = eqx.tree_at(lambda m: m.vector_field.w, linear.model, jnp.asarray(mean.reshape(2, 3)))
    return model, total, mean


BATCHES = [slice(0, 3), slice(3, 8), slice(8, 12)]
EXACT = [
    ("hessian", "full"),
    ("ggn", "full"),
    ("ggn", "low_rank"),
    ("hessian", "low_rank"),
    ("hessian", "block_diagonal"),  # there is one block
    ("ggn", "block_diagonal"),
]


@pytest.mark.parametrize(("curvature", "structure"), EXACT)
def test_one_batch_after_another_equals_all_at_once(linear, linear_posterior, curvature, structure):
    options = {"curvature": curvature, "structure": structure, "progress": False}
    prior, precision, mean, evidence = None, 2.0 * np.eye(6), np.zeros(6), 0.0
    for times in BATCHES:
        problem = seen(linear.problem, times, prior)
        model, total, mean = at_mean(linear, times, precision, mean)
        posterior = lp.laplace(model, problem, **options)
        dof = 6 - np.trace(np.linalg.solve(total, precision))
        np.testing.assert_allclose(posterior.diagnostics.effective_dof, dof, rtol=1e-7)
        assert posterior.diagnostics.newton_decrement < 1e-12
        evidence += float(posterior.log_evidence)
        prior, precision = posterior.as_prior(), total
    np.testing.assert_allclose(posterior.mean, linear.mean, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(posterior.precision(), linear.precision, rtol=1e-8, atol=1e-6)
    np.testing.assert_allclose(posterior.covariance(), np.linalg.inv(linear.precision), rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(evidence, linear_posterior.log_evidence, rtol=1e-8)


def test_a_diagonal_posterior_is_an_independent_prior(linear):
    options = {"curvature": "ggn", "structure": "diagonal", "progress": False}
    model, total, mean = at_mean(linear, BATCHES[0], 2.0 * np.eye(6), np.zeros(6))
    prior = lp.laplace(model, seen(linear.problem, BATCHES[0]), **options).as_prior()
    assert prior.rows.shape == (0, 6)
    after, second, _ = at_mean(linear, slice(3, 12), np.diag(np.diag(total)), mean)
    posterior = lp.laplace(after, seen(linear.problem, slice(3, 12), prior), **options)
    np.testing.assert_allclose(posterior.built.precision, np.diag(second), rtol=1e-8)
    assert posterior.diagnostics.newton_decrement < 1e-12
    assert "parameters are determined" in str(lp.identifiability(posterior))


def test_truncation_leaves_the_prior_whole(linear, linear_posterior):
    """Strong data don't push a weak prior out of a low rank."""
    prior = linear_posterior.as_prior()
    data = linear.problem.data
    precise = lp.Problem(lp.Trajectories(data.ts, data.ys, data.y0), lp.Gaussian(1e-3), prior)
    options = dict(curvature="ggn", progress=False)
    for rank in (1, 2, 4):
        found = lp.laplace(linear.model, precise, structure=lp.LowRank(rank=rank), **options)
        assert np.all(found.marginal_std() <= linear_posterior.marginal_std() * (1 + 1e-9))
        assert 0 < found.diagnostics.effective_dof < rank + 1e-6


@pytest.fixture(scope="module")
def second(linear):
    """Of the linear problem, what came first and what came after it."""
    first = at_mean(linear, slice(0, 5), 2.0 * np.eye(6), np.zeros(6))[0]
    before = lp.laplace(first, seen(linear.problem, slice(0, 5)), progress=False)
    problem = seen(linear.problem, slice(5, 12), before.as_prior())
    return before, lp.laplace(linear.model, problem, progress=False)


def test_the_prior_is_the_posterior_before(second):
    before, after = second
    prior, view = after.problem.prior, after.parameters
    thetas = before.sample(KEY, 5)
    np.testing.assert_allclose(prior.log_density(view, thetas), before.log_prob(thetas), rtol=1e-10)
    draws = np.asarray(prior.sample(view, KEY, 20_000))
    deviation = np.asarray(before.marginal_std())
    np.testing.assert_allclose(draws.mean(axis=0), before.mean, atol=5 * deviation.max() / np.sqrt(20_000))
    whitened = np.linalg.cholesky(np.asarray(before.precision())).T @ (draws - np.asarray(before.mean)).T
    np.testing.assert_allclose(np.cov(whitened), np.eye(6), atol=5 * np.sqrt(2 / 20_000))


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_refinement_finds_the_mode_of_all_data(linear, second, curvature):
    before, after = second
    fit = lp.refine(before.parameters.model, after.problem, curvature=curvature, decrement=1e-12, progress=False)
    np.testing.assert_allclose(fit.model.vector_field.w.ravel(), linear.mean, rtol=1e-6, atol=1e-7)
    assert fit.reason == "converged"


def test_files_keep_it(second, tmp_path):
    after = second[1]
    lp.save(tmp_path / "after.laplode", after)
    loaded = lp.load(tmp_path / "after.laplode", like=after.parameters.model)
    assert eqx.tree_equal(loaded.problem.prior, after.problem.prior)
    np.testing.assert_array_equal(loaded.log_evidence, after.log_evidence)


# ---- Constrained parameters


@pytest.fixture(scope="module")
def constrained(growth):
    """Of the first trajectory, of the second after it, and of both at once."""
    prior = lp.NamedPriors({"gain": dist.LogNormal(0.0, 0.5)}, rest=1.0)
    together = lp.Problem(growth.problem.data, lp.LogNormal(0.1), prior)

    def posterior(trajectories, prior):
        ys = np.full_like(together.data.ys, np.nan)
        ys[trajectories] = together.data.ys[trajectories]
        problem = lp.Problem(eqx.tree_at(lambda d: d.ys, together.data, ys), lp.LogNormal(0.1), prior)
        fit = lp.refine(growth.model, problem, curvature="ggn", decrement=1e-14, progress=False)
        return lp.laplace(fit.model, problem, progress=False)

    before = posterior([0], prior)
    return before, posterior([1], before.as_prior()), posterior([0, 1], prior)


def test_constrained_parameters(constrained):
    """Linear in the rates and the logarithm of the gain, with noise and prior normal there: exact."""
    before, after, joint = constrained
    data = after.problem.data

    def loss(theta):
        """The second trajectory by hand."""
        clean = jnp.log(data.y0[1]) + theta[2] + theta[:2] * data.ts[1][:, None]
        offset = theta - before.mean
        return 0.5 * jnp.sum(((jnp.log(data.ys[1]) - clean) / 0.1) ** 2) + 0.5 * offset @ before.precision() @ offset

    np.testing.assert_allclose(after.precision(), jax.jit(jax.hessian(loss))(after.mean), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(after.unravel(after.mean).gain, jnp.exp(after.mean[2]), rtol=1e-12)
    np.testing.assert_allclose(after.covariance(), joint.covariance(), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(after.mean, joint.mean, rtol=1e-7)
    np.testing.assert_allclose(before.log_evidence + after.log_evidence, joint.log_evidence, rtol=1e-10)


def test_the_metric_of_geodesics_and_draws_of_the_prior(constrained):
    before, after, _ = constrained
    surface, origin = Surface.of(after, 0.3)
    tangent = surface.tangent(after.mean) * surface.root_prior
    metric = tangent.T @ tangent + jnp.diag(surface.root_prior**2)
    np.testing.assert_allclose(metric, after.precision(), rtol=1e-8, atol=1e-8)
    # In these coordinates nothing is curved.
    step = jnp.ones(3)
    along = surface.tangent(after.mean) @ step
    np.testing.assert_allclose(surface.bend(after.mean, origin.seen, step, along), 0, atol=1e-9)
    prior = lp.to_datatree(after, key=KEY, num_samples=4000)["prior"]
    deviation = before.marginal_std()
    np.testing.assert_allclose(np.log(prior["gain"]).std(), deviation[2], rtol=5 / np.sqrt(8000))
    np.testing.assert_allclose(prior["rate"].std(axis=(0, 1)), deviation[:2], rtol=5 / np.sqrt(8000))


# ---- A precision as a diagonal and rows


def test_every_structure_is_a_diagonal_and_rows():
    rng = np.random.default_rng(0)
    root, base = rng.normal(size=(7, 7)), rng.uniform(0.5, 2, size=7)
    factor, weights = jnp.asarray(rng.normal(size=(4, 7))), jnp.asarray(rng.uniform(1, 2, size=4))
    data = (factor.T * weights) @ factor
    cases = {
        "beyond the base": FullPrecision(jnp.linalg.cholesky(data + jnp.diag(base))),
        "below the base": FullPrecision(jnp.linalg.cholesky(jnp.asarray(root @ root.T / 50))),
        "low_rank": low_rank(factor, weights, jnp.asarray(base)),
        "truncated": low_rank(factor, weights, jnp.asarray(base), 2),
        "diagonal": DiagonalPrecision(jnp.asarray(2 * base)),
        "blocks": BlockDiagonalPrecision(
            (
                FullPrecision(jnp.linalg.cholesky((data + jnp.diag(base))[:3, :3])),
                FullPrecision(0.1 * jnp.eye(4) + 0.01 * jnp.eye(4, k=-1)),
            )
        ),
    }
    for name, structure in cases.items():
        diagonal, rows = structure.split(jnp.asarray(base))
        assert np.all(diagonal > 0), name
        expected = np.asarray(structure.precision_product(jnp.eye(7)))
        np.testing.assert_allclose(np.diag(diagonal) + rows.T @ rows, expected, rtol=1e-10, atol=1e-12, err_msg=name)
    assert cases["beyond the base"].split(jnp.asarray(base))[1].shape == (4, 7)


# ---- What it is not for


def test_what_it_is_not_for(second, linear_posterior):
    after = second[1]
    with pytest.raises(lp.LaplodeError, match=r"prior that is the posterior of other data.*precision"):
        lp.maximize_evidence(after, progress=False)
    before = np.asarray(second[0].precision())
    report = lp.identifiability(after)
    expected = scipy.linalg.eigh(np.asarray(after.precision()) - before, before, eigvals_only=True)
    np.testing.assert_allclose(report.directions["strength"], expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(report.leaves["determined"].sum(), after.diagnostics.effective_dof, rtol=1e-8)
    contraction = np.asarray(after.marginal_std()) ** 2 / np.diagonal(np.linalg.inv(before))
    np.testing.assert_allclose(report.leaves["contraction"], np.sqrt(np.mean(contraction)), rtol=1e-8)


def test_a_posterior_of_other_parameters_is_refused(linear, growth, growth_posterior):
    prior = growth_posterior.as_prior()
    problem = lp.Problem(growth.problem.data, lp.LogNormal(0.1), prior)
    with pytest.raises(lp.LaplodeError, match="it has gain, which is not among the parameters"):
        lp.laplace(growth.model, problem, where=lambda m: m.rate)
    with pytest.raises(lp.LaplodeError, match="it has rate, gain"):
        lp.refine(linear.model, seen(linear.problem, slice(0, 12), prior))
    larger = eqx.tree_at(lambda m: m.rate, growth.model, jnp.ones((3,)))
    with pytest.raises(lp.LaplodeError, match=r"rate of shape \(2,\), and the model has it of shape \(3,\)"):
        parameters(larger, None, prior)
    assert prior.local(growth_posterior.parameters).rows.shape[1] == 3

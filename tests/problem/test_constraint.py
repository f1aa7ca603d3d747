"""Functions of the model that are near a value, against conjugate algebra where everything is linear."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal

import laplode as lp
from laplode._model.parameters import parameters
from laplode._posterior.laplace import reassembled
from laplode._predict.solves import log_joint
from laplode._predict.surface import Surface

KEY = jax.random.key(0)
TS = np.linspace(0, 3, 12)
SCALE = 0.1


def conserved(model):
    """The rate of y0 + y1, whatever the time: one number for each function in the basis."""
    return jnp.sum(model.vector_field.w, axis=0)


def odd_times_even(model):
    """What an exchange of the states changes in the field."""
    return model.vector_field.w - model.vector_field.w[::-1]


_AT_ZERO = np.kron(np.eye(2), [[1.0, 0.0, 1.0]])  # the field at t = 0 is w (1, 0, 1)
_SKEWED = np.array([[0.2, 0.05, 0.0], [0.05, 0.1, -0.02], [0.0, -0.02, 0.4]])
_EXCHANGE = np.block([[np.eye(3), -np.eye(3)], [-np.eye(3), np.eye(3)]])
# Of each what is known: function, value, covariance; the same as rows A θ, value and covariance matrix.
KNOWN = {
    "conserved": (conserved, [0.1, 0.0, -0.2], _SKEWED, np.hstack([np.eye(3), np.eye(3)]), _SKEWED),
    "equilibrium": (lp.field_at([[1.0, 2.0]]), 0.0, 0.01, _AT_ZERO, 0.01 * np.eye(2)),
    "symmetry": (odd_times_even, 0.0, 0.3, _EXCHANGE, 0.3 * np.eye(6)),
}


class Exact:
    """Everything by dense algebra, for the linear problem of the tests with a prior Normal(mean, precision⁻¹)."""

    def __init__(self, linear, rows, value, covariance, precision=2.0):
        value = np.broadcast_to(value, len(rows))
        inverse = np.linalg.inv(covariance)
        self.prior_precision = precision * np.eye(6) + rows.T @ inverse @ rows
        self.prior_mean = np.linalg.solve(self.prior_precision, rows.T @ inverse @ value)
        design = linear.design(TS)
        self.precision = self.prior_precision + design.T @ design / SCALE**2
        shift = self.prior_precision @ self.prior_mean + design.T @ linear.target / SCALE**2
        self.mean = np.linalg.solve(self.precision, shift)
        covariance = design @ np.linalg.solve(self.prior_precision, design.T) + SCALE**2 * np.eye(24)
        self.evidence = multivariate_normal.logpdf(linear.target, design @ self.prior_mean, covariance)
        self.model = eqx.tree_at(lambda m: m.vector_field.w, linear.model, jnp.asarray(self.mean.reshape(2, 3)))


def constrained(linear, function, value, covariance, weights=2.0):
    prior = lp.SoftConstraint(function, value, covariance, weights=weights)
    return lp.Problem(linear.problem.data, lp.Gaussian(SCALE), prior)


@pytest.fixture(scope="module", params=KNOWN)
def case(request, linear):
    function, value, covariance, rows, matrix = KNOWN[request.param]
    return Exact(linear, rows, value, matrix), constrained(linear, function, value, covariance)


EXACT = [("hessian", "full"), ("ggn", "full"), ("ggn", "low_rank"), ("hessian", "low_rank"), ("ggn", "block_diagonal")]


@pytest.mark.parametrize(("curvature", "structure"), EXACT)
def test_a_linear_constraint_is_conjugate(case, curvature, structure):
    exact, problem = case
    options = {"curvature": curvature, "structure": structure, "progress": False}
    posterior = lp.laplace(exact.model, problem, **options)
    assert posterior.diagnostics.newton_decrement < 1e-10
    np.testing.assert_allclose(posterior.precision(), exact.precision, rtol=1e-8, atol=1e-6)
    np.testing.assert_allclose(posterior.log_evidence, exact.evidence, rtol=1e-8)
    dof = 6 - np.trace(np.linalg.solve(exact.precision, exact.prior_precision))
    np.testing.assert_allclose(posterior.diagnostics.effective_dof, dof, rtol=1e-7)
    function, start = lp.evidence_function(posterior)
    np.testing.assert_allclose(function(start), exact.evidence, rtol=1e-8)


def test_predictions_and_refinement(case, linear):
    exact, problem = case
    fit = lp.refine(linear.model, problem, curvature="ggn", decrement=1e-12, progress=False)
    np.testing.assert_allclose(fit.model.vector_field.w.ravel(), exact.mean, rtol=1e-6, atol=1e-7)
    posterior = lp.laplace(exact.model, problem, curvature="ggn", progress=False)
    later = np.array([0.0, 4.0, 5.0])
    design = linear.design(later)
    predictions = lp.predict(posterior, later, key=KEY, num_samples=2, progress=False)
    expected = design @ np.linalg.solve(exact.precision, design.T)
    np.testing.assert_allclose(predictions.covariance()[0], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("precision", [2.0, 5.0])
def test_the_evidence_at_other_precisions(linear, precision):
    """The normalizer of the product of priors is part of it."""
    function, value, covariance, rows, matrix = KNOWN["conserved"]
    exact = Exact(linear, rows, value, matrix, precision)
    posterior = lp.laplace(
        exact.model, constrained(linear, function, value, covariance), curvature="ggn", progress=False
    )
    evidence, start = lp.evidence_function(posterior)
    at = lambda log: evidence(eqx.tree_at(lambda h: h.log_precision, start, log))
    log = jnp.log(jnp.array([precision]))
    # At θ* of this precision it is exact; its slope there is that of the evidence, since θ* is a maximum.
    np.testing.assert_allclose(at(log), exact.evidence, rtol=1e-8)
    there = [Exact(linear, rows, value, matrix, precision * np.exp(h)).evidence for h in (-1e-4, 1e-4)]
    np.testing.assert_allclose(jax.grad(at)(log), (there[1] - there[0]) / 2e-4, rtol=1e-5)
    again = reassembled(posterior, constrained(linear, function, value, covariance, weights=precision), posterior.form)
    np.testing.assert_allclose(again.log_evidence, exact.evidence, rtol=1e-8)


def test_the_density_and_its_draws(case):
    exact, problem = case
    posterior = lp.laplace(exact.model, problem, curvature="ggn", progress=False)
    prior, view = problem.prior, posterior.parameters
    some = posterior.mean + 0.1 * jax.random.normal(KEY, (3, 6))
    exactly = multivariate_normal.logpdf(some, exact.prior_mean, jnp.linalg.inv(exact.prior_precision))
    normalized = prior.log_density(view, some) - prior.local(view).log_normalizer
    np.testing.assert_allclose(normalized, exactly, rtol=1e-8)
    np.testing.assert_allclose(log_joint(posterior, some)[1] - log_joint(posterior, some)[0],
                               posterior.log_prob(some)[1] - posterior.log_prob(some)[0], rtol=1e-6)  # fmt: skip
    draws = np.asarray(prior.sample(view, KEY, 20_000)) - exact.prior_mean
    whitened = np.linalg.cholesky(exact.prior_precision).T @ draws.T
    np.testing.assert_allclose(whitened.mean(axis=1), 0, atol=5 / np.sqrt(20_000))
    np.testing.assert_allclose(np.cov(whitened), np.eye(6), atol=5 * np.sqrt(2 / 20_000))


def test_a_truncated_curvature_keeps_the_constraint(case):
    exact, problem = case
    options = {"curvature": "ggn", "structure": lp.LowRank(rank=2), "progress": False}
    posterior = lp.laplace(exact.model, problem, **options)
    assert np.all(posterior.marginal_std() ** 2 <= np.diag(np.linalg.inv(exact.prior_precision)) * (1 + 1e-9))
    function, start = lp.evidence_function(posterior)
    np.testing.assert_allclose(function(start), posterior.log_evidence, rtol=1e-8)


def test_one_within_another(linear):
    first, second = KNOWN["conserved"], KNOWN["equilibrium"]
    inner = lp.SoftConstraint(*first[:3], weights=2.0)
    value = np.concatenate([first[1], np.zeros(2)])
    covariance = np.block([[first[4], np.zeros((3, 2))], [np.zeros((2, 3)), second[4]]])
    exact = Exact(linear, np.vstack([first[3], second[3]]), value, covariance)
    posterior = lp.laplace(exact.model, constrained(linear, *second[:3], inner), curvature="ggn", progress=False)
    np.testing.assert_allclose(posterior.precision(), exact.precision, rtol=1e-8, atol=1e-6)
    np.testing.assert_allclose(posterior.log_evidence, exact.evidence, rtol=1e-8)
    # As the prior of what comes next it is a posterior like any other.
    before = posterior.as_prior()
    np.testing.assert_allclose(before.log_density(posterior.parameters, posterior.mean + 0.1),
                               posterior.log_prob(posterior.mean + 0.1), rtol=1e-8)  # fmt: skip


# ---- Where the function is not linear


def energy(model):
    return model.rate[0] * model.rate[1]


@pytest.fixture(scope="module")
def bent(growth):
    prior = lp.SoftConstraint(energy, -0.1, 1e-4, weights=1.0)
    problem = lp.Problem(growth.problem.data, lp.LogNormal(0.1), prior)
    fit = lp.refine(growth.model, problem, curvature="ggn", decrement=1e-12, progress=False)
    return lp.laplace(fit.model, problem, curvature="ggn", progress=False)


def test_derivatives_of_a_bent_constraint(bent):
    prior, view = bent.problem.prior, bent.parameters
    local, density = prior.local(view), lambda theta: prior.log_density(view, theta)
    np.testing.assert_allclose(jax.grad(density)(view.vector), -local.gradient, rtol=1e-8)
    rate = bent.mean[:2]
    np.testing.assert_allclose(local.rows, [[100 * rate[1], 100 * rate[0], 0]], rtol=1e-8)
    assert abs(float(energy(bent.model)) + 0.1) < 0.02
    known = lp.predict_function(bent, energy, key=KEY, num_samples=2, progress=False)
    assert float(known.std) < 0.01


def test_geodesic_draws_keep_to_it(bent):
    surface, _ = Surface.of(bent, 0.3)
    theta = bent.mean + 0.1
    np.testing.assert_allclose(surface.renewed(theta)[1][-1], (theta[0] * theta[1] + 0.1) / 0.01, rtol=1e-8)
    tangent = surface.tangent(theta)[-1] * surface.root_prior
    np.testing.assert_allclose(tangent, [100 * theta[1], 100 * theta[0], 0], rtol=1e-8)
    drawn = lp.predict_function(bent, energy, method="geodesic", key=KEY, num_samples=40, progress=False)
    assert np.all(drawn.ok) and np.std(drawn.draws) < 0.015
    assert drawn.khat < 0.7


def test_profiles_take_it(bent):
    found = lp.profile(bent, energy, num=5, progress=False)
    ((low, high),) = found.intervals
    assert -0.15 < low < float(energy(bent.model)) < high < -0.08


def test_files_and_draws_of_the_prior(bent, tmp_path):
    lp.save(tmp_path / "bent.laplode", bent)
    loaded = lp.load(tmp_path / "bent.laplode", like=(bent.model, bent.problem))
    np.testing.assert_array_equal(loaded.log_evidence, bent.log_evidence)
    tree = lp.to_datatree(bent, key=KEY, num_samples=50, progress=False)
    assert tree["prior"]["rate"].shape == (1, 50, 2)


def test_a_trajectory_of_the_data(growth):
    at_end = lp.trajectory_at(4.0, channel=0, trajectory=1)
    prior = lp.SoftConstraint(at_end, 8.0, 1e-6, weights=1.0)
    problem = lp.Problem(growth.problem.data, lp.LogNormal(0.1), prior)
    fit = lp.refine(growth.model, problem, curvature="ggn", progress=False)
    predicted = fit.model(jnp.array([0.0, 4.0]), problem.data.y0[1])
    np.testing.assert_allclose(predicted[1, 0], 8.0, atol=5e-3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: lp.SoftConstraint(1.0, 0.0, 1.0, weights=1.0), "`function` must be callable"),
        (lambda: lp.SoftConstraint(energy, np.nan, 1.0, weights=1.0), "`value` must be finite"),
        (lambda: lp.SoftConstraint(energy, 0.0, 0.0, weights=1.0), "`covariance` must be positive"),
        (lambda: lp.SoftConstraint(energy, [0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]], weights=1.0), "positive definite"),
        (lambda: lp.SoftConstraint(energy, 0.0, np.ones(3), weights=1.0), r"`covariance` has shape \(3,\)"),
        (lambda: lp.SoftConstraint(energy, 0.0, 1.0, weights=-1.0), "`weights` is no precision"),
    ],
)
def test_bad_constraints(make, match):
    with pytest.raises(lp.LaplodeError, match=match):
        make()


@pytest.mark.parametrize(
    ("function", "value", "match"),
    [
        (energy, np.zeros(2), r"returns an array of shape \(\).*`value` has shape \(2,\)"),
        (lambda model: model.gain / 0, 0.0, "`function` of the prior is not finite"),
        (lambda model: model.speed, 0.0, "`function` of the prior fails at the model: AttributeError"),
    ],
)
def test_constraints_that_do_not_fit_the_model(growth, function, value, match):
    prior = lp.SoftConstraint(function, value, 1.0, weights=1.0)
    with pytest.raises(lp.LaplodeError, match=match):
        lp.laplace(growth.model, lp.Problem(growth.problem.data, lp.LogNormal(0.1), prior), progress=False)


def test_a_residual_that_nothing_ties():
    view = parameters(eqx.nn.Linear(2, 2, key=KEY))
    assert lp.GaussianPrior(1.0).residual(view, view.vector).shape == (0,)

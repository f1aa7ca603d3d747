"""The Hessian and its approximations against computations that share no code with them."""

import warnings

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st
from jax.flatten_util import ravel_pytree

import laplode as lp
from laplode._algebra.forms import symmetrized
from laplode._curvature.hessian import hessian
from laplode._devices import free_bytes
from laplode._solve.maps import linearize


def plain_nll(case, adjoint, unravel):
    """−log p(Y | θ) through diffeqsolve itself, with any of its adjoints."""
    data = case.problem.data

    def nll(theta):
        model = unravel(theta)

        def solve(ts, y0):
            saveat = diffrax.SaveAt(ts=ts)
            return model.solve(ts, y0, None, saveat=saveat, adjoint=adjoint, throw=False).ys

        return -case.problem.log_likelihood(jax.vmap(solve)(data.ts, data.y0))

    return nll


def split(model):
    """As equinox does it: parameters first."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    theta, unravel = ravel_pytree(params)
    return theta, lambda theta: eqx.combine(unravel(theta), static)


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


FIELDS = ["predator_prey", "neural"]


@pytest.fixture(params=FIELDS)
def solved(request):
    """A case and its posterior, on a mechanistic and on a neural field."""
    return request.getfixturevalue(request.param), request.getfixturevalue(f"{request.param}_posterior")


def test_hessian_against_central_differences_of_the_gradient(solved):
    case, posterior = solved
    theta, unravel = split(case.model)
    gradient = jax.jacfwd(plain_nll(case, diffrax.ForwardMode(), unravel))
    # Fourth order, so that neither rounding nor truncation comes near the tolerance.
    step = 1e-3
    shifts = step * jnp.concatenate([k * jnp.eye(theta.size) for k in (-2, -1, 1, 2)])
    g = jax.jit(lambda shifts: jax.lax.map(lambda s: gradient(theta + s), shifts, batch_size=32))(shifts)
    low2, low1, high1, high2 = g.reshape(4, theta.size, theta.size)
    expected = (low2 - 8 * low1 + 8 * high1 - high2) / (12 * step)
    assert relative(posterior.form.matrix, expected) < 1e-6
    assert posterior.diagnostics.symmetry_defect < 1e-12


def direct_hessian(case, wrong=False):
    """By jax.hessian through DirectAdjoint, which pays for max_steps: there are few of them here."""
    controller = diffrax.PIDController(rtol=1e-8, atol=1e-9)
    model = lp.NeuralODE(case.model.vector_field, stepsize_controller=controller, max_steps=64)
    theta, unravel = split(model)
    params = ravel_pytree(eqx.filter(model, eqx.is_inexact_array))[1]
    build = (lambda theta: eqx.combine(model, params(theta))) if wrong else unravel
    return jax.jit(jax.hessian(plain_nll(case, diffrax.DirectAdjoint(), build)))(theta)


def test_hessian_against_direct_adjoint(solved):
    case, posterior = solved
    assert relative(posterior.form.matrix, direct_hessian(case)) < 1e-6


def test_the_wrong_order_of_combine_gives_a_zero_hessian_and_laplode_the_right_one(
    predator_prey, predator_prey_posterior
):
    """eqx.combine keeps the first leaf that is not None: with the template first, θ has no influence."""
    np.testing.assert_array_equal(direct_hessian(predator_prey, wrong=True), 0)
    # And right it is, as the test above has it.
    assert np.linalg.norm(predator_prey_posterior.form.matrix) > 1


class Trapped(eqx.Module):
    """Falls into the trap by itself: the template it carries hides the parameters it is given."""

    params: eqx.Module
    template: eqx.Module

    def __call__(self, ts, y0):
        return eqx.combine(self.template, self.params)(ts, y0)


def test_a_model_with_the_trap_inside_has_its_idle_copy_reported_by_name(growth):
    model = Trapped(growth.model, growth.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Newton decrement", lp.LaplodeWarning)
        with pytest.warns(lp.LaplodeWarning, match=r"without any influence.*: params\.rate, params\.gain\.$"):
            posterior = lp.laplace(model, growth.problem, progress=False)
    assert posterior.diagnostics.inert == ("params.rate", "params.gain")
    with pytest.raises(lp.LaplodeError, match="No parameter of `model` has any influence"):
        lp.laplace(model, growth.problem, where=lambda m: m.params, progress=False)


# ---- Gauss-Newton and Fisher


def jacobian(case):
    """(M, P) by forward differentiation of the plain solve."""
    theta, unravel = split(case.model)
    data = case.problem.data

    def predictions(theta):
        model = unravel(theta)
        solve = lambda ts, y0: (
            model.solve(ts, y0, None, saveat=diffrax.SaveAt(ts=ts), adjoint=diffrax.ForwardMode(), throw=False).ys
        )
        return jax.vmap(solve)(data.ts, data.y0).ravel()

    return jax.jit(lambda theta: (predictions(theta), jax.jacfwd(predictions)(theta)))(theta)


def test_ggn_and_fisher_against_forward_differentiation(predator_prey):
    predictions, J = map(np.asarray, jacobian(predator_prey))
    ys = predator_prey.problem.data.ys.ravel()
    ggn = quiet(predator_prey, curvature="ggn")
    information = 1 / (0.1 * predictions) ** 2
    expected = J.T @ (information[:, None] * J)
    assert relative(ggn.form.matrix, expected) < 1e-10
    np.testing.assert_allclose(ggn.precision(), expected + np.eye(4), rtol=1e-8)
    fisher = quiet(predator_prey, curvature="fisher")
    scores = ((np.log(ys) - np.log(predictions)) / (0.1**2 * predictions))[:, None] * J
    assert relative(fisher.form.matrix, scores.T @ scores) < 1e-9
    assert ggn.diagnostics.symmetry_defect == fisher.diagnostics.symmetry_defect == 0


def quiet(case, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)
        return lp.laplace(*case, progress=False, **options)


def test_ggn_of_a_linear_model_is_its_hessian(linear_posterior, linear_ggn):
    assert relative(linear_ggn.form.matrix, linear_posterior.form.matrix) < 1e-12


LIKELIHOODS = {
    "gaussian": lp.Gaussian(np.array([0.2, 0.5])),
    "lognormal": lp.LogNormal(0.3),
    "student": lp.StudentT(5.0, 0.4),
    "poisson": lp.Poisson(),
    "counts": lp.NegativeBinomial(3.0),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_hessian_and_ggn_under_every_likelihood(growth, name):
    """On a model in closed form, by jax.hessian, and with the missing values left out."""
    data = growth.problem.data
    ys = np.round(data.ys)
    ys = np.where(ys == 0, 1.0, ys)
    ys[0, 2, 1] = ys[1, 0, 0] = np.nan
    problem = lp.Problem(lp.Trajectories(data.ts, ys, data.y0), LIKELIHOODS[name], 1.0)
    posterior = quiet((growth.model, problem), regularization="abs")
    observed = np.isfinite(ys)

    def predictions(theta):
        rate, gain = theta[:2], theta[2]
        return gain * data.y0[:, None] * jnp.exp(rate * (data.ts - data.ts[:, :1])[..., None])

    def nll(theta):
        f = predictions(theta)
        log_prob = LIKELIHOODS[name].distribution(f).log_prob(np.where(observed, ys, 1.0))
        return -jnp.sum(jnp.where(observed, log_prob, 0))

    theta = posterior.mean
    assert relative(posterior.form.matrix, jax.jit(jax.hessian(nll))(theta)) < 1e-11
    J = np.asarray(jax.jit(jax.jacfwd(predictions))(theta))[observed]
    weights = np.broadcast_to(LIKELIHOODS[name].fisher(predictions(theta), ys), ys.shape)[observed]
    ggn = quiet((growth.model, problem), curvature="ggn")
    assert relative(ggn.form.matrix, J.T @ (weights[:, None] * J)) < 1e-12


class Noisy(eqx.Module):
    """A model in closed form that predicts the logarithms of its noise scales too."""

    curve: eqx.Module
    log_scale: jax.Array

    def __call__(self, ts, y0):
        f = self.curve(ts, y0)  # pyright: ignore[reportCallIssue]
        return jnp.concatenate([f, jnp.broadcast_to(self.log_scale, f.shape)], axis=1)


def between(law, y, lower, upper):
    beyond = np.where(y <= lower, law.logcdf(lower), law.logsf(upper))
    return np.where((y > lower) & (y < upper), law.logpdf(y), beyond)


SCALE = np.array([0.3, 0.8])
DENSITIES = {
    "gaussian": (lp.Gaussian(SCALE), lambda y, f, s: st.norm(f, SCALE).logpdf(y)),
    "lognormal": (lp.LogNormal(SCALE), lambda y, f, s: st.lognorm(SCALE, scale=f).logpdf(y)),
    "student": (lp.StudentT(4.0, SCALE), lambda y, f, s: st.t(4.0, f, SCALE).logpdf(y)),
    "poisson": (lp.Poisson(), lambda y, f, s: st.poisson(f).logpmf(y)),
    "counts": (lp.NegativeBinomial(2.5), lambda y, f, s: st.nbinom(2.5, 2.5 / (2.5 + f)).logpmf(y)),
    "limits": (
        lp.Gaussian(SCALE, lower=1.5, upper=3.5),
        lambda y, f, s: between(st.norm(f, SCALE), y, 1.5, 3.5),
    ),
    "detection": (
        lp.LogNormal(SCALE, lower=1.5),
        lambda y, f, s: between(st.lognorm(SCALE, scale=f), y, 1.5, np.inf),
    ),
    "user": (lambda f: dist.Gamma(3.0, 3.0 / f), lambda y, f, s: st.gamma(3.0, scale=f / 3).logpdf(y)),
    "gaussian's": (lp.Gaussian(), lambda y, f, s: st.norm(f, s).logpdf(y)),
    "lognormal's": (lp.LogNormal(), lambda y, f, s: st.lognorm(s, scale=f).logpdf(y)),
    "student's": (lp.StudentT(4.0), lambda y, f, s: st.t(4.0, f, s).logpdf(y)),
    "counts's": (lp.NegativeBinomial(), lambda y, f, s: st.nbinom(s, s / (s + f)).logpmf(y)),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_hessian_under_every_likelihood_against_differences(growth, name):
    """Central differences of SciPy's densities, extrapolated twice."""
    likelihood, log_density = DENSITIES[name]
    data = growth.problem.data
    ys = np.maximum(np.round(data.ys), 1.0)
    ys[0, 2, 1] = ys[1, 0, 0] = np.nan
    model = Noisy(growth.model, jnp.log(SCALE)) if name.endswith("'s") else growth.model
    problem = lp.Problem(lp.Trajectories(data.ts, ys, data.y0), likelihood, 1.0)
    found = quiet((model, problem), regularization="abs").form.matrix
    theta = np.concatenate([[0.3, -0.4], [1.2], np.log(SCALE)])[: len(found)]

    def nll(theta):
        f = theta[2] * data.y0[:, None] * np.exp(theta[:2] * (data.ts - data.ts[:, :1])[..., None])
        values = log_density(np.where(np.isnan(ys), 1.0, ys), f, np.exp(theta[3:]) if len(theta) > 3 else None)
        return -np.sum(values, where=~np.isnan(ys))

    def second(i, j, step):
        a, b = step * np.eye(len(theta))[[i, j]]
        return (nll(theta + a + b) - nll(theta + a - b) - nll(theta - a + b) + nll(theta - a - b)) / (4 * step**2)

    def extrapolated(i, j):
        coarse, middle, fine = (second(i, j, step) for step in (0.002, 0.001, 0.0005))
        once = (4 * middle - coarse) / 3, (4 * fine - middle) / 3
        return (16 * once[1] - once[0]) / 15

    expected = [[extrapolated(i, j) for j in range(len(theta))] for i in range(len(theta))]
    assert relative(found, np.array(expected)) < 1e-7


# ---- Chunks, symmetry, products


@pytest.mark.parametrize("batch_size", [1, 7, 27, 1000])
def test_chunks_make_the_same_matrix(neural, neural_posterior, batch_size):
    found = hessian(neural_posterior.flow, neural.problem, batch_size=batch_size)
    assert relative(found.matrix, neural_posterior.form.matrix) < 1e-13


def test_symmetrization_keeps_the_defect():
    matrix = np.array([[1.0, 2.0], [2.2, -1.0]])
    found = symmetrized(matrix)
    np.testing.assert_allclose(found.matrix, [[1.0, 2.1], [2.1, -1.0]])
    np.testing.assert_allclose(found.symmetry_defect, np.sqrt(2) * 0.2 / np.linalg.norm(matrix), rtol=1e-12)
    assert symmetrized(np.zeros((2, 2))).symmetry_defect == 0


def test_products_without_matrices(predator_prey, predator_prey_posterior):
    products = lp.curvature_products(*predator_prey)
    rng = np.random.default_rng(0)
    v, u = jnp.asarray(rng.normal(size=4)), jnp.asarray(rng.normal(size=(2, 9, 2)))
    J = linearize(predator_prey_posterior.flow)[1]
    np.testing.assert_allclose(products.jacobian(v).ravel(), J @ v, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(products.jacobian_transposed(u), J.T @ u.ravel(), rtol=1e-9)
    np.testing.assert_allclose(products.hessian(v), predator_prey_posterior.form.matrix @ v, rtol=1e-9)
    ggn = quiet(predator_prey, curvature="ggn").form.matrix
    np.testing.assert_allclose(products.gauss_newton(v), ggn @ v, rtol=1e-9)


def test_memory_that_is_free_is_counted():
    assert 2**20 < free_bytes() < 2**50

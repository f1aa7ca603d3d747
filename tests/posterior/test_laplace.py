"""Curvature and prior in, posterior out: closed forms, regularization, diagnostics, and what is refused at the door."""

import os
import subprocess
import sys
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats as st

import laplode as lp


def silent(model, problem, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)
        return lp.laplace(model, problem, **{"progress": False} | options)


class Curve(eqx.Module):
    """A neural function of time, with nothing to be solved."""

    mlp: eqx.nn.MLP

    def __call__(self, ts, y0):
        return jax.vmap(lambda t: self.mlp(t[None]))(ts)


@pytest.fixture(scope="module")
def curve():
    """A small network far from a minimum: its Hessian, 18 × 18, is indefinite."""
    mlp = eqx.nn.MLP(1, 2, 4, 1, jnp.tanh, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    data = lp.Trajectories(np.linspace(-1, 1, 9), rng.normal(size=(9, 2)))
    return Curve(mlp), lp.Problem(data, lp.Gaussian(0.3), 1.0)


# ---- A model that is linear in its parameters has a closed form


@pytest.fixture(params=["hessian", "ggn"])
def conjugate(request, linear_posterior, linear_ggn):
    return {"hessian": linear_posterior, "ggn": linear_ggn}[request.param]


def test_posterior_of_a_linear_model(linear, conjugate):
    covariance = np.linalg.inv(linear.precision)
    np.testing.assert_allclose(conjugate.mean, linear.mean, rtol=1e-14)
    np.testing.assert_allclose(conjugate.precision(), linear.precision, rtol=1e-8, atol=1e-8 * linear.precision.max())
    np.testing.assert_allclose(conjugate.covariance(), covariance, rtol=1e-8, atol=1e-8 * covariance.max())
    # One Newton step from anywhere leads to the conjugate mean; from the mean it leads nowhere.
    assert conjugate.diagnostics.newton_decrement < 1e-15


def test_evidence_of_a_linear_model(linear, conjugate):
    design = linear.design(linear.problem.data.ts[0])
    marginal = st.multivariate_normal(np.zeros(24), 0.1**2 * np.eye(24) + design @ design.T / 2.0)
    np.testing.assert_allclose(conjugate.log_evidence, marginal.logpdf(linear.target), rtol=1e-8)


def test_diagnostics_of_a_linear_model(linear, conjugate):
    found = conjugate.diagnostics
    eigenvalues = np.linalg.eigvalsh(linear.precision)
    dof = np.trace((linear.precision - 2 * np.eye(6)) @ np.linalg.inv(linear.precision))
    assert (found.num_parameters, found.num_observations) == (6, 24)
    # In units of the prior's precision.
    np.testing.assert_allclose([found.eigenvalue_min, found.eigenvalue_max], eigenvalues[[0, -1]] / 2, rtol=1e-7)
    np.testing.assert_allclose(found.condition_number, eigenvalues[-1] / eigenvalues[0], rtol=1e-7)
    np.testing.assert_allclose(found.effective_dof, dof, rtol=1e-8)
    assert (found.num_negative, found.regularized, found.inert) == (0, None, ())
    assert found.symmetry_defect < 1e-12
    assert found.gradient_norm < 1e-6


def test_away_from_the_mean_a_newton_step_leads_back(linear):
    """The gradient, the decrement and the precision fit together."""
    shifted = eqx.tree_at(lambda m: m.vector_field.w, linear.model, replace_fn=lambda w: w + 0.1)
    with pytest.warns(lp.LaplodeWarning, match="Newton decrement is .* nats"):
        posterior = lp.laplace(shifted, linear.problem, progress=False)
    offset = np.full(6, 0.1)
    np.testing.assert_allclose(
        posterior.diagnostics.newton_decrement, 0.5 * offset @ linear.precision @ offset, rtol=1e-7
    )
    np.testing.assert_allclose(
        posterior.diagnostics.gradient_norm, np.linalg.norm(linear.precision @ offset), rtol=1e-7
    )


class Line(eqx.Module):
    slope: jax.Array

    def __call__(self, ts, y0):
        return y0 + self.slope * (ts - ts[0])[:, None]


class Decay(eqx.Module):
    """x' = −rate · x in closed form."""

    rate: jax.Array

    def __call__(self, ts, y0):
        return y0 * jnp.exp(-self.rate * (ts - ts[0])[:, None])


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_one_parameter_with_unit_precisions_has_variance_one_half(curvature):
    # y(1) = θ is observed once with unit noise.
    data = lp.Trajectories([0.0, 1.0], [[np.nan], [0.0]], [0.0])
    problem = lp.Problem(data, lp.Gaussian(1.0), 1.0)
    posterior = lp.laplace(Line(jnp.array(0.0)), problem, curvature=curvature, progress=False)
    np.testing.assert_allclose(posterior.covariance(), [[0.5]], rtol=1e-14)
    np.testing.assert_allclose(posterior.marginal_std(), [np.sqrt(0.5)], rtol=1e-14)
    np.testing.assert_allclose(posterior.log_evidence, st.norm(0, np.sqrt(2)).logpdf(0), rtol=1e-14)


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
def test_exponential_decay_against_its_derivatives(curvature):
    rate, ts = 0.8, np.linspace(0, 2, 6)
    ys = np.exp(-ts) + 0.1 * np.cos(7 * ts)
    problem = lp.Problem(lp.Trajectories(ts, ys[:, None], [1.0]), lp.Gaussian(0.2), 3.0)
    f, slope, bend = np.exp(-rate * ts), -ts * np.exp(-rate * ts), ts**2 * np.exp(-rate * ts)
    expected = {
        "hessian": np.sum(slope**2 + (f - ys) * bend) / 0.2**2,
        "ggn": np.sum(slope**2) / 0.2**2,
        "fisher": np.sum((slope * (f - ys) / 0.2**2) ** 2),
    }[curvature]
    posterior = silent(Decay(jnp.array(rate)), problem, curvature=curvature)
    np.testing.assert_allclose(posterior.precision(), [[expected + 3.0]], rtol=1e-12)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_missing_data_equal_dropped_rows(growth, curvature):
    data = growth.problem.data
    kept = [0, 1, 3, 4, 6, 7]
    ys = data.ys.copy()
    ys[:, [2, 5, 8]] = np.nan
    masked = lp.Problem(lp.Trajectories(data.ts, ys, data.y0), growth.problem.likelihood, 1.0)
    short = lp.Trajectories(data.ts[:, kept], data.ys[:, kept], data.y0)
    dropped = lp.Problem(short, growth.problem.likelihood, 1.0)
    a, b = silent(growth.model, masked, curvature=curvature), silent(growth.model, dropped, curvature=curvature)
    np.testing.assert_allclose(a.precision(), b.precision(), rtol=1e-12)
    np.testing.assert_allclose(a.log_evidence, b.log_evidence, rtol=1e-12)
    assert a.diagnostics.num_observations == b.diagnostics.num_observations == 24


def test_a_scale_that_is_still_to_be_learned_is_refused(growth):
    learned = lp.Problem(growth.problem.data, lp.LogNormal(0.1, learned=True), 1.0)
    for function in (lp.laplace, lp.refine):
        with pytest.raises(lp.LaplodeError, match=r"still to be learned .* then fit\.problem"):
            function(growth.model, learned, progress=False)


# ---- Parameters of every kind


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("form", ["function", "bool pytree"])
def test_subset_has_the_sub_block_of_the_precision(curve, form, curvature):
    if form == "function":
        where = lambda m: m.mlp.layers[1]
    else:
        nothing = jax.tree.map(lambda _: False, curve[0])
        everything = lambda node: jax.tree.map(lambda _: True, node)
        where = eqx.tree_at(lambda m: m.mlp.layers[1], nothing, replace_fn=everything)
    subset = silent(*curve, where=where, curvature=curvature, regularization="abs")
    whole = silent(*curve, curvature=curvature, regularization="abs")
    assert [leaf[0] for leaf in subset.parameters.leaves] == ["mlp.layers[1].weight", "mlp.layers[1].bias"]
    if curvature == "ggn":
        found, expected = subset.precision(), whole.precision()
    else:
        found, expected = subset.form.matrix, whole.form.matrix
    np.testing.assert_allclose(found, expected[8:, 8:], rtol=0, atol=1e-13 * np.abs(expected).max())
    changed = subset.unravel(subset.mean + 1).mlp.layers
    np.testing.assert_array_equal(changed[0].weight, curve[0].mlp.layers[0].weight)
    np.testing.assert_allclose(changed[1].bias, curve[0].mlp.layers[1].bias + 1, rtol=1e-15)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_float32_model_is_cast(linear, curvature):
    trained = eqx.tree_at(lambda m: m.vector_field.w, linear.model, replace_fn=lambda w: w.astype(jnp.float32))
    posterior = silent(trained, linear.problem, curvature=curvature)
    assert posterior.mean.dtype == posterior.covariance().dtype == jnp.float64
    covariance = np.linalg.inv(linear.precision)
    np.testing.assert_allclose(posterior.covariance(), covariance, rtol=1e-8, atol=1e-8 * covariance.max())
    # Its stationarity is measured where the rounded parameters lie.
    offset = np.asarray(trained.vector_field.w, np.float64).ravel() - linear.mean
    decrement = 0.5 * offset @ linear.precision @ offset
    assert decrement > 1e-14
    np.testing.assert_allclose(posterior.diagnostics.newton_decrement, decrement, rtol=1e-2)


def test_prior_per_parameter_and_per_leaf(growth, growth_posterior):
    hessian = growth_posterior.form.matrix
    leaves = eqx.tree_at(lambda m: (m.rate, m.gain), growth.model, (2.0, 30.0))
    for precision in (np.array([2.0, 2.0, 30.0]), leaves):
        problem = lp.Problem(growth.problem.data, growth.problem.likelihood, lp.GaussianPrior(precision, mean=0.5))
        posterior = silent(growth.model, problem)
        values = np.array([2.0, 2.0, 30.0])
        np.testing.assert_allclose(posterior.precision(), hessian + np.diag(values), rtol=1e-12)
        log_prior = st.norm(0.5, values**-0.5).logpdf(posterior.mean).sum()
        before = st.norm(0, 1).logpdf(posterior.mean).sum()
        np.testing.assert_allclose(posterior.log_joint - growth_posterior.log_joint, log_prior - before, rtol=1e-10)
        spectrum = np.linalg.eigvalsh((hessian + np.diag(values)) / np.sqrt(np.outer(values, values)))
        np.testing.assert_allclose(posterior.diagnostics.eigenvalue_min, spectrum[0], rtol=1e-12)


class Partly(eqx.Module):
    """`idle` and one entry of `rate` never reach the predictions."""

    rate: jax.Array
    idle: jax.Array

    def __call__(self, ts, y0):
        return y0 * jnp.exp(-self.rate[0] * ts)[:, None]


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_inert_parameters_are_named(curvature):
    data = lp.Trajectories([0.0, 0.5, 1.0], np.exp([[0.0], [-0.5], [-1.0]]), [1.0])
    model = Partly(jnp.array([1.0, 2.0]), jnp.ones(3))
    problem = lp.Problem(data, lp.Gaussian(0.1), 1e-6)
    with pytest.warns(lp.LaplodeWarning, match=r"without any influence.*: rate\[1\], idle\."):
        posterior = lp.laplace(model, problem, curvature=curvature, progress=False)
    assert posterior.diagnostics.inert == ("rate[1]", "idle")
    # Only the prior knows about them.
    np.testing.assert_allclose(posterior.marginal_std()[1:], 1e3, rtol=1e-12)


def test_a_parameter_whose_influence_is_weak_is_not_inert():
    data = lp.Trajectories([0.0, 1.0], [[np.nan, np.nan], [1.0, 1e-9]], [0.0, 0.0])

    class Weak(eqx.Module):
        slopes: jax.Array

        def __call__(self, ts, y0):
            return self.slopes * jnp.array([1.0, 1e-9]) * ts[:, None]

    posterior = silent(Weak(jnp.ones(2)), lp.Problem(data, lp.Gaussian(1.0), 1e-3))
    assert posterior.diagnostics.inert == ()


# ---- Regularization


def dense(kind, hessian):
    eigenvalues, vectors = np.linalg.eigh(hessian)
    changed = {
        "clip": np.maximum(eigenvalues, 0),
        "abs": np.abs(eigenvalues),
        "jitter": eigenvalues - eigenvalues[0],
    }[kind]
    return (vectors * changed) @ vectors.T, eigenvalues, changed


@pytest.mark.parametrize("kind", ["clip", "abs", "jitter"])
def test_regularization_of_an_indefinite_hessian(curve, kind):
    told = pytest.warns(lp.LaplodeWarning, match=f"negative eigenvalues, regularized by {kind}")
    with told, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Newton decrement", lp.LaplodeWarning)
        posterior = lp.laplace(*curve, regularization=kind, progress=False)
    hessian = np.asarray(posterior.form.matrix)
    regular, eigenvalues, changed = dense(kind, hessian)
    assert np.sum(eigenvalues < -1) >= 2
    expected = regular + np.eye(len(hessian))
    np.testing.assert_allclose(posterior.precision(), expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    found, change = posterior.diagnostics, np.abs(changed - eigenvalues)
    np.testing.assert_allclose([found.eigenvalue_min, found.eigenvalue_max], eigenvalues[[0, -1]] + 1, rtol=1e-10)
    used = np.sort(changed) + 1
    np.testing.assert_allclose(found.condition_number, used[-1] / used[0], rtol=1e-9)
    assert found.num_negative == np.sum(eigenvalues < -1e-10)
    assert found.regularized.kind == kind
    assert found.regularized.count == np.sum(change > 1e-10)
    np.testing.assert_allclose(
        [found.regularized.largest, found.regularized.total], [change.max(), change.sum()], rtol=1e-9
    )
    gradient = gradient_of(posterior)
    np.testing.assert_allclose(found.gradient_norm, np.linalg.norm(gradient), rtol=1e-9)
    np.testing.assert_allclose(found.newton_decrement, 0.5 * gradient @ np.linalg.solve(expected, gradient), rtol=1e-9)
    np.testing.assert_allclose(found.effective_dof, np.trace(regular @ np.linalg.inv(expected)), rtol=1e-9)
    np.testing.assert_allclose(posterior.built.log_det, np.linalg.slogdet(expected)[1], rtol=1e-12)


@eqx.filter_jit
def gradient_of(posterior):
    """Of −log p(Y | θ) − log p(θ), written out."""
    data = posterior.problem.data

    def loss(theta):
        model = posterior.unravel(theta)
        predictions = jax.vmap(lambda ts, y0: model(ts, y0))(data.ts, data.y0)
        return 0.5 * jnp.sum((predictions - data.ys) ** 2) / 0.3**2 + 0.5 * jnp.sum(theta**2)

    return jax.grad(loss)(posterior.mean)


def test_no_regularization_raises_where_the_precision_is_indefinite(curve):
    with pytest.raises(lp.LaplodeError, match=r'not positive definite.*laplode.refine.*"clip".*"ggn"'):
        silent(*curve, regularization="none")


def test_no_regularization_is_enough_at_a_minimum(linear, linear_posterior):
    posterior = lp.laplace(linear.model, linear.problem, regularization="none", progress=False)
    np.testing.assert_array_equal(posterior.precision(), linear_posterior.precision())


def test_regularization_is_in_the_metric_of_a_nonuniform_prior(curve):
    precision = np.linspace(0.5, 5.0, 18)
    problem = lp.Problem(curve[1].data, curve[1].likelihood, precision)
    posterior = silent(curve[0], problem)
    metric = np.sqrt(np.outer(precision, precision))
    regular, eigenvalues, changed = dense("clip", np.asarray(posterior.form.matrix) / metric)
    expected = regular * metric + np.diag(precision)
    np.testing.assert_allclose(posterior.precision(), expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    used = np.sort(changed) + 1
    np.testing.assert_allclose(posterior.diagnostics.condition_number, used[-1] / used[0], rtol=1e-9)
    np.testing.assert_allclose(posterior.diagnostics.eigenvalue_min, eigenvalues[0] + 1, rtol=1e-9)


class Bent(eqx.Module):
    """exp(θ) at one time: where it is seen below its value, the likelihood's curvature in θ may be negative."""

    log: jax.Array

    def __call__(self, ts, y0):
        return jnp.exp(self.log) * jnp.ones((len(ts), 1))


def test_at_a_strict_minimum_nothing_is_clipped():
    """The prior outweighs what is negative, and the posterior is wider than the prior: exactly so."""
    scale, seen, log = 1.0, 5.0, 0.5
    f = np.exp(log)
    bend = (2 * f**2 - f * seen) / scale**2  # d²/dθ² of ½ (exp θ − y)² / scale²
    slope = f * (f - seen) / scale**2
    precision = -1.5 * bend
    assert bend < 0
    prior = lp.GaussianPrior(precision, mean=log + slope / precision)  # so that θ is where the gradient vanishes
    problem = lp.Problem(lp.Trajectories([0.0, 1.0], [[seen], [np.nan]]), lp.Gaussian(scale), prior)
    posterior = lp.laplace(Bent(jnp.array(log)), problem, progress=False)  # without a warning
    np.testing.assert_allclose(posterior.marginal_std(), (precision + bend) ** -0.5, rtol=1e-10)
    assert posterior.marginal_std()[0] > precision**-0.5
    found = posterior.diagnostics
    assert (found.num_negative, found.regularized) == (1, None) and found.newton_decrement < 1e-12
    with pytest.warns(lp.LaplodeWarning, match="though the prior makes up for them"):
        clipped = lp.laplace(Bent(jnp.array(log)), problem, regularization=lp.Clip(always=True), progress=False)
    np.testing.assert_allclose(clipped.marginal_std(), precision**-0.5, rtol=1e-10)
    # At other hyperparameters the evidence is that of the clipped curvature, which is bounded.
    function, start = lp.evidence_function(posterior, noise="fixed")
    np.testing.assert_allclose(function(start), clipped.log_evidence, rtol=1e-10)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_a_precision_too_ill_conditioned_for_float64_is_refused(curve, curvature):
    # Four observations leave fourteen directions to the prior, 1e24 times flatter than the others.
    problem = lp.Problem(lp.Trajectories([0.0, 1.0], np.zeros((2, 2))), lp.Gaussian(1e-8), 1e-8)
    with pytest.raises(lp.LaplodeError, match=r"can't be factored|not positive definite"):
        silent(curve[0], problem, curvature=curvature)


def test_diagnostics_print(curve):
    text = str(silent(*curve).diagnostics)
    assert "negative eigenvalues" in text and "clip" in text and "nats" in text


# ---- What is refused at the door


class Untouchable(eqx.Module):
    """Its solve must never begin."""

    w: jax.Array

    def __call__(self, t, y, args):
        def fail(y):
            raise AssertionError("solved before the input was checked")

        return jax.pure_callback(fail, jax.ShapeDtypeStruct(y.shape, y.dtype), self.w * y, vmap_method="sequential")


def untouchable(size=None):
    return lp.NeuralODE(Untouchable(jnp.ones(() if size is None else size)))


def small_problem(**arguments):
    ts = np.array([0.0, 1.0, 2.0])
    arguments = {"ys": np.ones((1, 3, 2)), "y0": np.ones((1, 2))} | arguments
    prior = arguments.pop("prior", 1.0)
    return lp.Problem(lp.Trajectories(ts, **arguments), lp.Gaussian(1.0), prior)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(curvature="kfac"), '`curvature` must be one of "hessian", "ggn", "fisher".*\'kfac\''),
        (dict(curvature=None), '`curvature` must be one of "hessian"'),
        (dict(structure="kron"), "`structure` must be one of \"full\".*'kron'"),
        (dict(regularization="ridge"), '`regularization` must be one of "clip", "abs", "jitter", "none".*\'ridge\''),
        (dict(where=lambda m: m.vector_field.v), "`where` must be a function that picks nodes"),
        (dict(where="w"), "`where` must be"),
    ],
)
def test_bad_options_are_refused_before_any_solve(options, match):
    with pytest.raises(lp.LaplodeError, match=match):
        lp.laplace(untouchable(), small_problem(), **options)


class Callable3(eqx.Module):
    w: jax.Array

    def __call__(self, ts, y0, args):
        raise AssertionError("called before the input was checked")


@pytest.mark.parametrize(
    ("model", "problem", "match"),
    [
        pytest.param(lambda t, y, args: y, small_problem(), "`model`", id="function"),
        pytest.param("model", small_problem(), "`model`", id="string"),
        pytest.param(untouchable(), None, "`problem` must be laplode.Problem", id="no problem"),
        pytest.param(untouchable(), small_problem().data, "`problem` must be.*got Trajectories", id="data"),
        pytest.param(lp.NeuralODE(lambda t, y, args: -y), small_problem(), "`model` .*no parameters", id="parameters"),
        pytest.param(untouchable(), small_problem(y0=None), "`y0` is missing", id="y0"),
        pytest.param(untouchable(), small_problem(ys=np.ones((1, 3, 1))),
                     r"`model` and `ys` disagree.*\(3, 2\).*\(3, 1\)", id="ys"),
        pytest.param(untouchable(3), small_problem(), "`model` can't be evaluated.*y0 of shape \\(2,\\)", id="states"),
        pytest.param(untouchable(), small_problem(prior=np.ones(3)), "`precision` of the prior", id="prior"),
        pytest.param(untouchable(1_000_000), small_problem(ys=np.ones((1, 3, 1_000_000)), y0=np.ones((1, 1_000_000))),
                     r'`structure`="full".*P = 1000000.*`where`', id="memory"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_solve(model, problem, match):
    with pytest.raises(lp.LaplodeError, match=match):
        lp.laplace(model, problem, progress=False)


def test_x64_off_is_refused_before_any_solve():
    refused = pytest.raises(lp.LaplodeError, match=r'jax.config.update\("jax_enable_x64", True\)')
    with jax.enable_x64(False), refused:
        lp.laplace(untouchable(), small_problem())


def test_a_solve_that_fails_names_trajectory_and_time():
    class Square(eqx.Module):
        rate: jax.Array

        def __call__(self, t, y, args):
            return self.rate * y**2

    data = lp.Trajectories([0.0, 1.0], np.ones((2, 2, 1)), [[0.1], [2.0]])
    with pytest.raises(
        lp.LaplodeError, match=r"failed in trajectory 1 at time 0\.[45].*1 of 2.*max_steps = 99.*Kvaerno5"
    ):
        lp.laplace(lp.NeuralODE(Square(jnp.array(1.0)), max_steps=99), lp.Problem(data, lp.Gaussian(1.0), 1.0))


def test_predictions_outside_the_support_are_located():
    data = lp.Trajectories([0.0, 1.0], np.ones((2, 2, 1)), np.array([[1.0], [0.5]]))
    problem = lp.Problem(data, lp.LogNormal(1.0), 1.0)
    with pytest.raises(lp.LaplodeError, match=r"trajectory 1, channel 0 .* at time 1, where it predicts -0.25"):
        lp.laplace(Line(jnp.array(-0.75)), problem, progress=False)


def test_no_influence_at_all_is_an_error():
    class Trapped(Decay):
        def __call__(self, ts, y0):
            return jax.lax.stop_gradient(super().__call__(ts, y0))

    for curvature in ("hessian", "ggn"):
        with pytest.raises(lp.LaplodeError, match=r"No parameter of `model` has any influence.*eqx.combine\(params"):
            lp.laplace(Trapped(jnp.array(0.5)), small_problem(), curvature=curvature, progress=False)


def test_importing_changes_no_setting_and_x64_is_asked_for():
    """In a process of its own, where nothing has switched 64-bit JAX on."""
    script = """
import jax
before = dict(jax.config.values)
import laplode as lp
assert dict(jax.config.values) == before, "importing laplode changed a JAX setting"
import jax.numpy as jnp, equinox as eqx
class Decay(eqx.Module):
    rate: jax.Array
    def __call__(self, t, y, args):
        return -self.rate * y
data = lp.Trajectories([0.0, 1.0], [[1.0], [0.5]], [1.0])
try:
    lp.laplace(lp.NeuralODE(Decay(jnp.array(0.5))), lp.Problem(data, lp.Gaussian(1.0), 1.0))
except lp.LaplodeError as error:
    assert "jax_enable_x64" in str(error)
    print("refused")
"""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_ENABLE_X64"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "refused", done.stderr


class Squared(eqx.Module):
    x: jax.Array
    level: jax.Array

    def __call__(self, ts, y0):
        return (self.x**2 + self.level * jnp.sign(ts - 1.5))[:, None]


def test_negative_curvature_that_the_prior_outweighs_counts_as_no_freedom():
    data = lp.Trajectories([1.0, 2.0], np.full((2, 1), 0.1))
    model = Squared(jnp.array(0.0), jnp.array(0.0))
    found = lp.laplace(model, lp.Problem(data, lp.Gaussian(1.0), 1.0), progress=False)
    np.testing.assert_allclose(found.precision(), np.diag([0.6, 3.0]), rtol=1e-12)
    np.testing.assert_allclose(found.diagnostics.effective_dof, 2 / 3, rtol=1e-12)

"""A prior on the vector field, against dense conjugate algebra where the field is linear in its parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal

import laplode as lp
from laplode._model.parameters import parameters
from laplode._predict.surface import Surface
from laplode._problem.prior import GROUPINGS

KEY = jax.random.key(0)
TS, SCALE, WEIGHTS, NUGGET = np.linspace(0, 3, 12), 0.1, 0.5, 1e-4
TIMES = np.linspace(0, 3, 7)
STATES = np.stack([1 + TIMES / 3, 2 - TIMES / 2], axis=1)
BASIS = np.stack([np.ones(7), np.sin(TIMES), np.cos(2 * TIMES)], axis=1)


def correlation(length):
    inputs = np.concatenate([STATES, TIMES[:, None]], axis=1) / length
    return np.exp(-0.5 * np.sum((inputs[:, None] - inputs) ** 2, axis=-1))


class Exact:
    """Everything by dense algebra: dy/dt = w φ(t), a Gaussian process on the field at seven contexts."""

    def __init__(self, linear, amplitude, length, scale=SCALE):
        kernel = [a**2 * (correlation(np.asarray(l)) + NUGGET * np.eye(7)) for a, l in zip(amplitude, length)]
        of_field = np.zeros((6, 6))
        for i, each in enumerate(kernel):
            of_field[3 * i : 3 * i + 3, 3 * i : 3 * i + 3] = BASIS.T @ np.linalg.solve(each, BASIS)
        self.prior = WEIGHTS * np.eye(6) + of_field
        design = linear.design(TS)
        self.precision = self.prior + design.T @ design / scale**2
        self.mean = np.linalg.solve(self.precision, design.T @ linear.target / scale**2)
        seen = design @ np.linalg.solve(self.prior, design.T) + scale**2 * np.eye(24)
        self.evidence = float(multivariate_normal.logpdf(linear.target, np.zeros(24), seen))
        self.model = eqx.tree_at(lambda m: m.vector_field.w, linear.model, jnp.asarray(self.mean.reshape(2, 3)))


AMPLITUDE, LENGTH = np.array([2.0, 0.7]), np.array([[1.0, 2.0, 3.0], [0.5, 1.0, 2.0]])


def problem_of(linear, **options):
    prior = lp.FieldPrior(
        **{"amplitude": AMPLITUDE, "length": LENGTH, "contexts": STATES, "ts": TIMES, "weights": WEIGHTS} | options,
        nugget=NUGGET,
    )
    return lp.Problem(linear.problem.data, lp.Gaussian(SCALE), prior)


@pytest.fixture(scope="module")
def exact(linear):
    return Exact(linear, AMPLITUDE, LENGTH)


@pytest.fixture(scope="module")
def posterior(linear, exact):
    return lp.laplace(exact.model, problem_of(linear), curvature="ggn", progress=False)


@pytest.mark.parametrize(("curvature", "structure"), [("hessian", "full"), ("ggn", "full"), ("ggn", "low_rank")])
def test_a_linear_field_is_conjugate(linear, exact, curvature, structure):
    options = {"curvature": curvature, "structure": structure, "progress": False}
    posterior = lp.laplace(exact.model, problem_of(linear), **options)
    assert posterior.diagnostics.newton_decrement < 1e-10
    np.testing.assert_allclose(posterior.precision(), exact.precision, rtol=1e-8, atol=1e-6)
    np.testing.assert_allclose(posterior.log_evidence, exact.evidence, rtol=1e-8)
    evidence, start = lp.evidence_function(posterior, precision="leaf")
    np.testing.assert_allclose(evidence(start), exact.evidence, rtol=1e-8)
    later = np.array([0.0, 4.0, 5.0])
    predictions = lp.predict(posterior, later, key=KEY, num_samples=2, progress=False)
    design = linear.design(later)
    expected = design @ np.linalg.solve(exact.precision, design.T)
    np.testing.assert_allclose(predictions.covariance()[0], expected, rtol=1e-8, atol=1e-10)


def test_the_prior_is_normalized_and_drawn(exact, posterior):
    prior, view = posterior.problem.prior, posterior.parameters
    some = posterior.mean + 0.1 * jax.random.normal(KEY, (3, 6))
    normalized = prior.log_density(view, some) - prior.local(view).log_normalizer
    exactly = multivariate_normal.logpdf(some, jnp.zeros(6), jnp.linalg.inv(exact.prior))
    np.testing.assert_allclose(normalized, exactly, rtol=1e-6)
    tree = lp.to_datatree(posterior, key=KEY, num_samples=20_000, progress=False)
    draws = tree["prior"]["vector_field.w"].values[0].reshape(-1, 6)
    np.testing.assert_allclose(np.cov(np.linalg.cholesky(exact.prior).T @ draws.T), np.eye(6), atol=0.06)


def test_the_slope_of_the_evidence(linear, exact, posterior):
    evidence, start = lp.evidence_function(posterior, precision="leaf", noise="one")
    slopes = jax.grad(lambda h: evidence(h))(start)
    step = 1e-4

    def along(amplitude=(0.0, 0.0), length=(0.0, 0.0), scale=0.0):
        at = lambda s: Exact(
            linear, AMPLITUDE * np.exp(s * np.array(amplitude)), LENGTH * np.exp(s * np.array(length))[:, None],
            SCALE * np.exp(s * scale),
        ).evidence  # fmt: skip
        return (at(step) - at(-step)) / (2 * step)

    expected = [along((1, 0)), along((0, 1)), along(length=(1, 0)), along(length=(0, 1))]
    # At θ* of these hyperparameters it has the slope of the evidence, since θ* is a maximum.
    np.testing.assert_allclose(slopes.log_precision, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slopes.log_scale, [along(scale=1.0)], rtol=1e-5)


def test_the_evidence_far_from_where_it_was_taken(linear, exact, posterior, quiet):
    """Of a linear model it is exact at all hyperparameters, though θ* is the optimum of the first ones only."""
    evidence, start = lp.evidence_function(posterior, precision="leaf", noise="one")
    moved = jnp.array([1.0, -2.0, 0.7, 1.5])
    there = type(start)(start.log_precision + moved, jnp.array([0.8]))
    amplitude, length = AMPLITUDE * np.exp(moved[:2]), LENGTH * np.exp(moved[2:])[:, None]
    expected = Exact(linear, amplitude, length, SCALE * np.exp(0.8)).evidence
    assert abs(expected - exact.evidence) > 10
    np.testing.assert_allclose(evidence(there), expected, rtol=1e-8)
    # And from any θ, since a linear model leads to the same optimum.
    elsewhere = eqx.tree_at(lambda m: m.vector_field.w, exact.model, jnp.ones((2, 3)))
    beside = quiet(elsewhere, problem_of(linear), curvature="ggn")
    assert beside.diagnostics.newton_decrement > 10
    evidence, _ = lp.evidence_function(beside, precision="leaf", noise="one")
    np.testing.assert_allclose(evidence(there), expected, rtol=1e-8)


def test_what_the_field_is_at_its_contexts_is_asked_once(posterior):
    prior, view = posterior.problem.prior, posterior.parameters
    linear = prior.linear(view)
    assert linear[0].shape == (7, 2) and linear[1].shape == (7, 2, 6)
    other = prior.at(view, GROUPINGS["leaf"], jnp.array([1.0, 2.0, 0.5, 0.1]))
    jax.tree.map(np.testing.assert_array_equal, other.local(view, linear), other.local(view))


def test_amplitude_and_length_by_evidence(linear, posterior):
    found = lp.maximize_evidence(posterior, noise="fixed", online=True, progress=False)
    prior = found.problem.prior
    # One factor of all amplitudes, and one of all lengths.
    factors = [np.asarray(prior.amplitude) / AMPLITUDE, np.asarray(prior.length) / LENGTH]
    for each in factors:
        np.testing.assert_allclose(each, each.ravel()[0], rtol=1e-10)
    assert float(found.log_evidence) > float(posterior.log_evidence)
    exactly = lambda a, l: Exact(linear, prior.amplitude * np.exp(a), np.asarray(prior.length) * np.exp(l)).evidence
    best = exactly(0.0, 0.0)
    np.testing.assert_allclose(found.log_evidence, best, atol=1e-3)
    # It has settled to a thousandth of a nat, on a ridge along which amplitude and length grow together.
    around = [(0.3, 0), (-0.3, 0), (0, 0.3), (0, -0.3), (0.1, 0.1), (-0.1, -0.1)]
    assert best > max(exactly(a, l) for a, l in around) - 1e-3
    assert best > exactly(1.0, -1.0) + 0.1


def test_a_search_from_afar_finds_the_same(linear, posterior, quiet):
    options = {"noise": "fixed", "online": True, "progress": False}
    near = lp.maximize_evidence(posterior, **options)
    far = quiet(posterior.model, problem_of(linear, amplitude=30 * AMPLITUDE, length=0.1 * LENGTH), curvature="ggn")
    np.testing.assert_allclose(lp.maximize_evidence(far, **options).log_evidence, near.log_evidence, atol=2e-2)
    prior = posterior.problem.prior
    shorter, longer = prior.starts()
    np.testing.assert_allclose(longer.length / shorter.length, longer.amplitude[0] / shorter.amplitude[0])
    assert longer.length[0, 0] > 2 * shorter.length[0, 0]


def test_geodesics_and_files(exact, posterior, tmp_path):
    surface, _ = Surface.of(posterior, 0.3)
    tangent = np.asarray(surface.tangent(posterior.mean) * surface.root_prior)
    np.testing.assert_allclose(tangent.T @ tangent + WEIGHTS * np.eye(6), exact.precision, rtol=1e-8, atol=1e-6)
    lp.save(tmp_path / "field.laplode", posterior)
    loaded = lp.load(tmp_path / "field.laplode", like=posterior.model)
    np.testing.assert_array_equal(loaded.log_evidence, posterior.log_evidence)
    again = loaded.problem.prior.local(loaded.parameters)
    np.testing.assert_array_equal(again.rows, posterior.problem.prior.local(posterior.parameters).rows)


# ---- What it takes from the data


def test_defaults_are_those_of_the_data(neural):
    data = neural.problem.data
    prior = lp.Problem(data, lp.Gaussian(0.3), lp.FieldPrior(kernel=lp.Matern52(), num_contexts=20)).prior
    seen = np.concatenate([data.ys.reshape(-1, 2), data.y0])
    low, high = seen.min(axis=0), seen.max(axis=0)
    assert prior.contexts.shape == (20, 2)
    assert np.all(np.abs(prior.contexts - (low + high) / 2) <= 1.3 * (high - low) / 2)
    assert np.all(np.ptp(prior.contexts, axis=0) > (high - low))
    # The rest is in the units of the data.
    by = np.array([100.0, 0.01])
    other = lp.Trajectories(data.ts / 60, data.ys * by, data.y0 * by)
    changed = lp.Problem(other, lp.Gaussian(0.3), lp.FieldPrior(num_contexts=20)).prior
    np.testing.assert_allclose(changed.contexts, prior.contexts * by, rtol=1e-12)
    np.testing.assert_allclose(changed.amplitude, prior.amplitude * by * 60, rtol=1e-12)
    np.testing.assert_allclose(changed.length, prior.length * by, rtol=1e-12)


def test_the_amplitude_of_a_sine_is_its_slope():
    ts = np.linspace(0, 10, 101)
    ys = np.stack([3 * np.sin(2 * ts), np.cos(ts)], axis=1)
    noisy = ys + np.random.default_rng(0).normal(size=ys.shape) * [0.15, 0.05]
    for each in (ys, noisy):
        prior = lp.Problem(lp.Trajectories(ts, each), lp.Gaussian(0.1), lp.FieldPrior()).prior
        np.testing.assert_allclose(prior.amplitude, [6.0, 1.0], rtol=0.25)


@pytest.mark.parametrize("kernel", [lp.SquaredExponential, lp.Matern52])
def test_kernels(kernel):
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(9, 2)))
    matrix = kernel()(inputs, jnp.array([0.5, 2.0]))
    assert np.all(np.linalg.eigvalsh(matrix) > 0)
    np.testing.assert_allclose(np.diag(matrix), 1.0, rtol=1e-12)
    turned = kernel(periods=[2 * np.pi, np.inf])
    around = turned(inputs + jnp.array([2 * np.pi, 0.0]) * jnp.arange(9)[:, None], jnp.array([0.5, 2.0]))
    np.testing.assert_allclose(around, turned(inputs, jnp.array([0.5, 2.0])), rtol=1e-9)
    assert np.all(np.linalg.eigvalsh(around) > 0)
    slope = jax.grad(lambda length: jnp.sum(kernel()(inputs, length) ** 2))(jnp.ones(2))
    assert np.all(np.isfinite(slope)) and np.all(slope > 0)
    apart = kernel()(jnp.array([[0.0], [1.3]]), jnp.ones(1))[0, 1]
    r = np.sqrt(5) * 1.3
    expected = {lp.SquaredExponential: np.exp(-0.5 * 1.3**2), lp.Matern52: (1 + r + r**2 / 3) * np.exp(-r)}
    np.testing.assert_allclose(apart, expected[kernel], rtol=1e-12)


def test_a_part_of_the_model():
    """Only the unknown part is held small; the known one is as it is."""

    class Split(eqx.Module):
        known: jax.Array
        unknown: eqx.nn.Linear

        def __call__(self, t, y, args):
            return self.known * y + self.unknown(y)

    model = lp.NeuralODE(Split(jnp.ones(2), eqx.nn.Linear(2, 1, use_bias=False, key=KEY, dtype=float)))
    prior = lp.FieldPrior(
        0.1, contexts=STATES, part=lambda m: lambda t, y, args: m.vector_field.unknown(y), weights=1.0
    )
    problem = lp.Problem(lp.Trajectories([0.0, 1.0], np.ones((2, 2)), np.ones(2)), lp.Gaussian(0.1), prior)
    view = parameters(model, None, problem.prior)
    rows = problem.prior.local(view).rows
    assert rows.shape == (7, 4)
    np.testing.assert_array_equal(rows[:, :2], 0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ts": None, "length": 1.0}, "`ts` of the field prior is missing: the field depends on time"),
        ({"amplitude": np.ones(3)}, r"`amplitude` of the field prior has shape \(3,\)"),
        ({"contexts": None, "ts": None, "length": None}, "the field depends on time"),
        ({"part": lambda model: model.nothing}, "`the field` of the prior fails at the model"),
    ],
)
def test_field_priors_that_do_not_fit_the_model(linear, options, match):
    with pytest.raises(lp.LaplodeError, match=match):
        lp.laplace(linear.model, problem_of(linear, **options), progress=False)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: lp.FieldPrior(-1.0), "`amplitude` must be positive"),
        (lambda: lp.FieldPrior(length=0.0), "`length` must be positive"),
        (lambda: lp.FieldPrior(kernel=1.0), "`kernel` must be SquaredExponential"),
        (lambda: lp.FieldPrior(contexts=np.ones(3)), r"`contexts` must be finite and of shape \(C, D\)"),
        (lambda: lp.FieldPrior(contexts=np.ones((3, 2)), ts=np.ones(2)), "`ts` must be one time for each of the C = 3"),
        (lambda: lp.FieldPrior(ts=np.ones(2)), "`contexts` is missing"),
        (lambda: lp.FieldPrior(part=1.0), "`part` must pick a part of the model"),
        (lambda: lp.Matern52(periods=[-1.0]), "`periods` must be positive"),
        (lambda: lp.FieldPrior(num_contexts=0), "`num_contexts` must be a positive integer"),
    ],
)  # fmt: skip
def test_bad_field_priors(make, match):
    with pytest.raises(lp.LaplodeError, match=match):
        make()

"""What must hold for any data: invariances, sums, limits, against dense algebra, and under JAX's transformations.

On models in closed form, with shapes that stay the same, so that little compiles.
"""

import warnings

import equinox as eqx
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

import laplode as lp
from laplode._algebra.low_rank import low_rank
from laplode._algebra.precision import BlockDiagonalPrecision, DiagonalPrecision, FullPrecision
from laplode._model.parameters import parameters

settings.register_profile(
    "laplode",
    deadline=None,
    max_examples=6,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # to shrink would take minutes
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("laplode")

KEY = jax.random.key(0)
TS = np.linspace(0, 4, 7)
N, T, K = 3, len(TS), 2

scales = st.floats(-12, 12).map(lambda power: 10.0**power)
masks = hnp.arrays(bool, (N, T, K)).filter(lambda mask: np.all(np.any(mask, axis=(1, 2))))
seeds = st.integers(0, 2**32 - 1)


class Growth(eqx.Module):
    rate: jax.Array
    gain: jax.Array

    def __call__(self, ts, y0):
        return self.gain * y0 * jnp.exp(self.rate * (ts - ts[0])[:, None])


class Reversed(eqx.Module):
    """The same model with its leaves in another order."""

    gain: jax.Array
    rate: jax.Array

    def __call__(self, ts, y0):
        return self.gain * y0 * jnp.exp(self.rate * (ts - ts[0])[:, None])


MODEL = Growth(jnp.array([0.3, -0.4]), jnp.array(1.2))


def drawn(seed, mask=None):
    rng = np.random.default_rng(seed)
    y0 = 1 + rng.random((N, K))
    ys = np.stack([MODEL(TS, y) for y in y0]) + 0.1 * rng.normal(size=(N, T, K))
    return (ys if mask is None else np.where(mask, ys, np.nan)), y0


def posterior_of(ys, y0, *, model=MODEL, ts=TS, scale=0.1, prior=1.0, **options):
    problem = lp.Problem(lp.Trajectories(ts, ys, y0), lp.Gaussian(scale), prior)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)  # the model is not fitted
        return lp.laplace(model, problem, progress=False, regularization=lp.Abs(always=True), **options)


def assert_close(found, expected, tolerance=1e-9):
    """To a part of the largest entry."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))


# ---- Invariances


@given(seeds, masks, scales)
def test_the_unit_of_y(seed, mask, unit):
    ys, y0 = drawn(seed, mask)
    one, other = posterior_of(ys, y0), posterior_of(unit * ys, unit * y0, scale=0.1 * unit)
    assert_close(other.form.matrix, one.form.matrix)
    assert_close(other.marginal_std(), one.marginal_std())
    np.testing.assert_allclose(other.log_evidence, one.log_evidence - mask.sum() * np.log(unit), rtol=1e-9, atol=1e-6)


@given(seeds, masks, scales)
def test_the_unit_of_t(seed, mask, unit):
    """Rates are per time: their curvature goes as its square, and their prior precision with it."""
    ys, y0 = drawn(seed, mask)
    factors = np.array([unit, unit, 1.0])
    slower = Growth(MODEL.rate / unit, MODEL.gain)
    one = posterior_of(ys, y0, curvature="ggn", structure="low_rank")
    problem = dict(model=slower, ts=TS * unit, prior=factors**2)
    other = posterior_of(ys, y0, **problem, curvature="ggn", structure="low_rank")
    assert_close(other.marginal_std() * factors, one.marginal_std())
    # As a matrix, unless units lie so far apart that it is refused.
    exact = posterior_of(ys, y0)
    try:
        other = posterior_of(ys, y0, **problem)
    except lp.LaplodeError as error:
        assert "positive definite" in str(error) and not 1e-6 < unit < 1e6
    else:
        assert_close(np.asarray(other.form.matrix) / np.outer(factors, factors), exact.form.matrix)


@given(seeds, masks, st.permutations(range(N)))
def test_the_order_of_trajectories(seed, mask, order):
    ys, y0 = drawn(seed, mask)
    one, other = posterior_of(ys, y0), posterior_of(ys[order], y0[order])
    assert_close(other.form.matrix, one.form.matrix)
    np.testing.assert_allclose(other.log_evidence, one.log_evidence, rtol=1e-12)


@given(seeds, masks)
def test_the_order_of_leaves(seed, mask):
    ys, y0 = drawn(seed, mask)
    one, other = posterior_of(ys, y0), posterior_of(ys, y0, model=Reversed(MODEL.gain, MODEL.rate))
    order = [2, 0, 1]
    assert_close(other.precision(), np.asarray(one.precision())[np.ix_(order, order)])
    np.testing.assert_allclose(other.log_evidence, one.log_evidence, rtol=1e-12)


@given(seeds, masks, masks)
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
def test_curvature_is_a_sum_over_data(curvature, seed, mask, first):
    """Any data set split in two, value by value."""
    ys, y0 = drawn(seed)
    second = mask & ~first
    if not np.all(np.any(second, axis=(1, 2))):
        second = ~first
        if not np.all(np.any(second, axis=(1, 2))):
            return
    of = lambda some: posterior_of(np.where(some, ys, np.nan), y0, curvature=curvature).form.matrix
    assert_close(of(first) + of(second), of(first | second))


# ---- Priors and their limits


@given(seeds, scales)
def test_prior_precisions_from_weak_to_strong(seed, precision):
    ys, y0 = drawn(seed)
    posterior = posterior_of(ys, y0, prior=precision)
    assert_close(posterior.precision(), _abs(posterior.form.matrix) + precision * np.eye(3), 1e-8)
    std = np.asarray(posterior.marginal_std())
    assert np.all(std > 0) and np.all(std <= (1 + 1e-9) / np.sqrt(precision))


def _abs(matrix):
    eigenvalues, vectors = np.linalg.eigh(matrix)
    return (vectors * np.abs(eigenvalues)) @ vectors.T


@pytest.mark.parametrize("limit", [0.0, np.inf, -0.0, np.nan, -1.0])
def test_precisions_beyond_the_limits_are_refused(limit):
    ys, y0 = drawn(0)
    with pytest.raises(lp.LaplodeError, match="`precision"):
        posterior_of(ys, y0, prior=limit)
    with pytest.raises(lp.LaplodeError, match="`precision"):
        lp.GaussianPrior(np.array([1.0, limit, 1.0]))
    with pytest.raises(lp.LaplodeError, match="`scale`"):
        lp.Gaussian(limit)


# ---- Shapes, dtypes, trees


@given(seeds, st.sampled_from([np.float32, np.float64, np.float16, int, list]))
def test_dtypes_of_data(seed, kind):
    ys = np.round(8 * drawn(seed)[0]) + 1.0  # held by all of them
    cast = (lambda x: np.asarray(x).tolist()) if kind is list else (lambda x: np.asarray(x).astype(kind))
    one, other = lp.Trajectories(TS * 3, ys, ys[:, 0]), lp.Trajectories(TS * 3, cast(ys), cast(ys[:, 0]))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype == np.float64
        np.testing.assert_array_equal(a, b)


class Tree(eqx.Module):
    tree: object


leaves = st.one_of(
    hnp.arrays(st.sampled_from([np.float32, np.float64]), hnp.array_shapes(min_dims=0, max_dims=3, max_side=3),
               elements=st.floats(-1e6, 1e6, width=32)).map(jnp.asarray),
    st.integers(), st.none(), st.text(max_size=3), st.floats(), st.booleans(),
    hnp.arrays(int, 2).map(jnp.asarray), st.just(jnp.tanh),
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text("ab.[]'0", max_size=3), inner, max_size=3),
        inner.map(Tree),
    ),
    max_leaves=6,
).map(Tree)


@given(trees)
@settings(max_examples=60)
def test_any_tree_is_a_vector_and_back(model):
    found = [x for x in jax.tree.leaves(model) if eqx.is_inexact_array(x)]
    size = sum(x.size for x in found)
    if not size:
        with pytest.raises(lp.LaplodeError, match="has no parameters"):
            parameters(model)
        return
    view = parameters(model)
    assert view.size == size and view.vector.shape == (size,) and view.vector.dtype == np.float64
    np.testing.assert_array_equal(view.vector, np.concatenate([np.ravel(x) for x in found]))
    back = view.unravel(2 * view.vector)
    assert jax.tree.structure(back) == jax.tree.structure(model)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(model), strict=True):
        if eqx.is_inexact_array(b):
            assert a.shape == b.shape
            np.testing.assert_array_equal(a, 2 * np.asarray(b, float))
        else:
            assert a is b or np.array_equal(a, b, equal_nan=isinstance(b, float))
    assert [stop - start for _, _, start, stop in view.leaves] == [x.size for x in found]
    assert len(set(view.names(np.arange(size)))) <= len(found)


# ---- Structures against dense algebra


P, M = 6, 4
dense_inputs = st.tuples(seeds, st.floats(-4, 4), st.floats(-4, 4)).map(lambda x: (x[0], 10 ** x[1], 10 ** x[2]))


def structure_of(name, seed, strength, spread):
    """A structure and the dense matrix that it stands for."""
    rng = np.random.default_rng(seed)
    prior = spread ** rng.uniform(-1, 1, size=P)
    factor, weights = rng.normal(size=(M, P)), strength * rng.random(M)
    matrix = factor.T @ (weights[:, None] * factor)
    if name == "low_rank":
        return low_rank(jnp.asarray(factor), jnp.asarray(weights), jnp.asarray(prior)), matrix + np.diag(prior)
    if name == "diagonal":
        precision = np.diagonal(matrix) + prior
        return DiagonalPrecision(jnp.asarray(precision)), np.diag(precision)
    whole = matrix + np.diag(prior)
    full = lambda block: FullPrecision(jnp.linalg.cholesky(jnp.asarray(block)))
    if name == "full":
        return full(whole), whole
    whole[:2, 2:] = whole[2:, :2] = 0
    return BlockDiagonalPrecision((full(whole[:2, :2]), full(whole[2:, 2:]))), whole


@given(dense_inputs)
@pytest.mark.parametrize("name", ["full", "low_rank", "block_diagonal", "diagonal"])
def test_structures_against_dense_algebra(name, numbers):
    structure, dense = structure_of(name, *numbers)
    condition = np.linalg.cond(dense)
    tolerance = max(1e-12, 1e-14 * condition)
    v = np.random.default_rng(numbers[0]).normal(size=(2, P))
    inverse = np.linalg.inv(dense)
    assert_close(structure.precision_product(v), v @ dense, 1e-12)
    assert_close(structure.covariance_product(v), v @ inverse, tolerance)
    assert_close(structure.variance(), np.diagonal(inverse), tolerance)
    assert_close(structure.predictive_covariance(jnp.asarray(v)), v @ inverse @ v.T, tolerance)
    root = np.asarray(structure.root_product(jnp.eye(P)))
    assert_close(root.T @ root, inverse, tolerance)
    np.testing.assert_allclose(structure.log_det, np.linalg.slogdet(dense)[1], rtol=1e-10, atol=1e-9)


# ---- Transformations of JAX


def test_jit_vmap_and_grad(growth, growth_posterior):
    posterior, center = growth_posterior, growth_posterior.mean
    thetas = posterior.sample(KEY, 4)
    density = posterior.log_prob
    np.testing.assert_allclose(jax.jit(lambda thetas: density(thetas))(thetas), density(thetas), rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(density)(thetas), density(thetas), rtol=1e-12)
    slopes = jax.vmap(jax.grad(density))(thetas)
    assert_close(slopes, (center - thetas) @ posterior.precision(), 1e-10)
    assert_close(-jax.hessian(density)(center), posterior.precision(), 1e-10)
    draws = eqx.filter_jit(lambda posterior, key: posterior.sample(key, 4))(posterior, KEY)
    np.testing.assert_allclose(draws, thetas, rtol=1e-12)
    many = jax.vmap(lambda key: posterior.sample(key, 4))(jax.random.split(KEY, 2))
    assert many.shape == (2, 4, 3) and not np.allclose(many[0], many[1])
    function, at = lp.evidence_function(posterior)
    value, slope = eqx.filter_jit(eqx.filter_value_and_grad(lambda at: function(at)))(at)
    np.testing.assert_allclose(value, function(at), rtol=1e-12)
    step = 1e-4
    up, down = (function(jax.tree.map(lambda x: x + sign * step, at)) for sign in (1, -1))
    total = sum(float(jnp.sum(x)) for x in jax.tree.leaves(slope))
    np.testing.assert_allclose(total, (up - down) / (2 * step), rtol=1e-5)


@given(seeds, masks)
@pytest.mark.parametrize("likelihood", [lp.Gaussian(0.3), lp.LogNormal(0.3), lp.StudentT(4.0, 0.3), lp.Poisson(),
                                        lp.NegativeBinomial(2.0)], ids=lambda l: type(l).__name__)  # fmt: skip
def test_missing_values_add_nothing_to_likelihoods_or_gradients(likelihood, seed, mask):
    rng = np.random.default_rng(seed)
    f, ys = 1 + rng.random((N, T, K)), np.round(1 + 3 * rng.random((N, T, K)))
    missing = jnp.where(mask, ys, jnp.nan)
    log_prob, score = _log_prob_and_score(likelihood, f, missing)
    expected, slopes = _log_prob_and_score(likelihood, f, jnp.asarray(ys))
    np.testing.assert_allclose(log_prob, jnp.where(mask, expected, 0), rtol=1e-12)
    np.testing.assert_allclose(score, jnp.where(mask, slopes, 0), rtol=1e-12)


@eqx.filter_jit
def _log_prob_and_score(likelihood, f, ys):
    return likelihood.log_prob(f, ys), likelihood.score(f, ys)


# ---- Conditioning


class Confused(eqx.Module):
    """y0 + (a + b) t + 1e-8 c t²: two parameters do the same, and one next to nothing."""

    a: jax.Array
    b: jax.Array
    c: jax.Array

    def __call__(self, ts, y0):
        return y0 + ((self.a + self.b) * ts + 1e-8 * self.c * ts**2)[:, None]


@pytest.mark.parametrize("power", [0, -4, -8, -10])
@pytest.mark.parametrize("options", [dict(), dict(curvature="ggn", structure="low_rank"), dict(curvature="ggn")],
                         ids=["hessian", "low rank", "ggn"])  # fmt: skip
def test_duplicate_directions_up_to_a_condition_of_1e16(power, options):
    """The sum of the two is known by the data whatever the prior, and their difference by the prior alone."""
    precision, scale = 10.0**power, 0.01
    model = Confused(jnp.array(0.5), jnp.array(0.5), jnp.array(0.0))
    problem = lp.Problem(lp.Trajectories(TS, TS[:, None], [0.0]), lp.Gaussian(scale), precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)
        posterior = lp.laplace(model, problem, progress=False, **options)
    information = np.sum(TS**2) / scale**2
    condition = (2 * information + precision) / precision
    # As far as it can be known.
    assert posterior.diagnostics.condition_number > 0.5 * min(condition, 1e16)
    rows = jnp.array([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0]])
    together, apart = np.diagonal(posterior.built.predictive_covariance(rows))
    # Of the sum and of 1e-8 c, whose matrix is well conditioned.
    sums = np.array([[np.sum(TS ** (i + j)) for i in (1, 2)] for j in (1, 2)]) / scale**2
    expected = np.linalg.inv(sums + np.diag([precision / 2, 1e16 * precision]))[0, 0]
    np.testing.assert_allclose(together, expected, rtol=1e-12 + 100 * np.finfo(float).eps * condition)
    np.testing.assert_allclose(apart, 2 / precision, rtol=1e-12 + 10 * np.finfo(float).eps * condition)
    assert np.all(np.isfinite(posterior.sample(KEY, 3)))

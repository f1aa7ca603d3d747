"""One contract for every structure: dense algebra on the precision that it stands for."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from laplode._algebra.build import built, determinant
from laplode._algebra.forms import BlockForm, DenseForm, DiagonalForm, EigenForm, FactoredForm, symmetrized
from laplode._algebra.low_rank import LowRankPrecision, ModesPrecision, low_rank
from laplode._algebra.precision import BlockDiagonalPrecision, DiagonalPrecision, FullPrecision
from laplode._algebra.regularization import Abs, Clip, Jitter, Refuse
from laplode._algebra.structure import BlockDiagonal, Diagonal, Full, LowRank
from laplode._errors import LaplodeError
from laplode._problem.prior import LocalPrior

LEAVES = (5, 1, 6)
SIZE = sum(LEAVES)


def _factor(num, seed=0, size=SIZE):
    rng = np.random.default_rng(seed)
    rows, weights = rng.normal(size=(num, size)), rng.uniform(0.5, 9.0, num)
    return FactoredForm(jnp.asarray(rows), jnp.asarray(weights), np.arange(num) % 2)


def _prior(uniform):
    return jnp.full(SIZE, 1.7) if uniform else jnp.asarray(np.random.default_rng(1).uniform(0.2, 5.0, SIZE))


def _local(precision, deficit=None, rows=None):
    zeros = jnp.zeros(precision.size)
    rows = jnp.zeros((0, precision.size)) if rows is None else rows
    return LocalPrior(jnp.zeros(()), zeros, precision, zeros if deficit is None else deficit, rows)


def _leaves():
    stops = np.cumsum(LEAVES)
    return list(zip(stops - np.array(LEAVES), stops, strict=True))


def _blocks_of(matrix):
    kept, start = np.zeros_like(matrix), 0
    for size in LEAVES:
        block = slice(start, start + size)
        kept[block, block] = matrix[block, block]
        start += size
    return kept


def _leading_of(matrix, prior, rank):
    """The matrix whose whitened form keeps only its leading eigenpairs."""
    root = np.sqrt(prior)
    eigenvalues, vectors = np.linalg.eigh(matrix / np.outer(root, root))
    eigenvalues[: len(eigenvalues) - rank] = 0
    return (vectors * eigenvalues) @ vectors.T * np.outer(root, root)


def _columns(form):
    return BlockForm(tuple(form.columns(*map(int, leaf)) for leaf in _leaves()))


def _diagonal(form):
    return DiagonalForm(jnp.stack([each.diagonal for each in form.by_channel()]))


# Of each structure the form that it asks of a factored curvature, what it builds, and the dense matrix.
CASES = {
    "full": (Full(), lambda form: form, lambda C, prior: C),
    "block_diagonal": (BlockDiagonal(), _columns, lambda C, prior: _blocks_of(C)),
    "diagonal": (Diagonal(), _diagonal, lambda C, prior: np.diag(np.diagonal(C))),
    "low_rank": (LowRank(), lambda form: form, lambda C, prior: C),
    "truncated": (LowRank(rank=3), lambda form: form, lambda C, prior: _leading_of(C, prior, 3)),
}
KINDS = {
    "full": {FullPrecision},
    "block_diagonal": {BlockDiagonalPrecision},
    "diagonal": {DiagonalPrecision},
    "low_rank": {LowRankPrecision, ModesPrecision},
    "truncated": {LowRankPrecision, ModesPrecision},
}


@pytest.fixture(
    params=[(name, num, uniform) for name in CASES for num in (4, 30) for uniform in (True, False)], ids=str
)
def case(request):
    name, num, uniform = request.param
    structure, asked, dense = CASES[name]
    form, prior = _factor(num), _prior(uniform)
    found = built(structure, asked(form), _local(prior), Clip())
    assert type(found.built.precision) in KINDS[name]
    precision = dense(np.asarray(form.matrix), np.asarray(prior)) + np.diag(prior)
    return found, precision, prior


def test_products(case):
    found, precision, _ = case
    structure, eye = found.built.precision, jnp.eye(SIZE)
    covariance = np.linalg.inv(precision)
    np.testing.assert_allclose(structure.precision_product(eye), precision, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(structure.covariance_product(eye), covariance, rtol=1e-10, atol=1e-11)
    root = np.asarray(structure.root_product(eye)).T  # the columns are C e_i
    np.testing.assert_allclose(root @ root.T, covariance, rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(structure.variance(), np.diagonal(covariance), rtol=1e-10)
    np.testing.assert_allclose(structure.log_det, np.linalg.slogdet(precision)[1], rtol=1e-11)
    J = np.random.default_rng(2).normal(size=(7, SIZE))
    np.testing.assert_allclose(
        structure.predictive_covariance(jnp.asarray(J)), J @ covariance @ J.T, rtol=1e-9, atol=1e-10
    )


def test_products_take_single_vectors_and_batches(case):
    structure = case[0].built.precision
    v = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, SIZE)))
    for product in (structure.precision_product, structure.covariance_product, structure.root_product):
        batched = product(v)
        assert batched.shape == v.shape
        np.testing.assert_allclose(batched[1, 2], product(v[1, 2]), rtol=1e-11)
        np.testing.assert_allclose(jax.jit(jax.vmap(jax.vmap(product)))(v), batched, rtol=1e-11)


def test_a_quadratic_form_is_a_sum_of_squares(case):
    v = jnp.asarray(np.random.default_rng(9).normal(size=SIZE))
    expected = v @ np.linalg.solve(case[1], v)
    np.testing.assert_allclose(case[0].built.precision.inverse_quadratic(v), expected, rtol=1e-10)


def test_effective_dof_and_spectrum(case):
    found, precision, prior = case
    covariance = np.linalg.inv(precision)
    dof = np.trace((precision - np.diag(prior)) @ covariance)
    np.testing.assert_allclose(found.built.precision.effective_dof(prior), dof, rtol=1e-9)
    spectrum = np.linalg.eigvalsh(precision / np.sqrt(np.outer(prior, prior)))
    np.testing.assert_allclose(
        [found.spectrum.eigenvalue_min, found.spectrum.eigenvalue_max], spectrum[[0, -1]], rtol=1e-7
    )
    np.testing.assert_allclose(found.spectrum.condition_number, spectrum[-1] / spectrum[0], rtol=1e-6)


def test_split_into_a_diagonal_and_rows(case):
    found, precision, prior = case
    diagonal, rows = found.built.precision.split(prior)
    np.testing.assert_allclose(np.diag(diagonal) + rows.T @ rows, precision, rtol=1e-9, atol=1e-9)


def test_samples_have_the_stated_covariance(case):
    structure, covariance = case[0].built.precision, np.linalg.inv(case[1])
    n = 40_000
    draws = np.asarray(structure.root_product(jax.random.normal(jax.random.key(0), (n, SIZE))))
    std = np.sqrt(np.diagonal(covariance))
    # Standardized covariances estimated from n draws have a standard error of at most sqrt(2 / n).
    error = (np.cov(draws.T) - covariance) / np.outer(std, std)
    assert np.abs(error).max() < 5 * np.sqrt(2 / n)


# ---- Curvature of either sign


def _whitened(matrix, prior):
    return matrix / np.sqrt(np.outer(prior, prior))


def _changed(function, matrix, prior):
    """The matrix with its eigenvalues changed in the metric of the prior."""
    eigenvalues, vectors = np.linalg.eigh(_whitened(matrix, prior))
    return (vectors * function(eigenvalues)) @ vectors.T * np.sqrt(np.outer(prior, prior))


def _indefinite(size=SIZE):
    H = np.random.default_rng(4).normal(size=(size, size))
    return H + H.T


CHANGES = {
    Clip: lambda x: np.maximum(x, 0),
    Abs: np.abs,
    Jitter: lambda x: x - x.min(),
}


@pytest.mark.parametrize("regularization", CHANGES, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e9])
def test_regularization_in_the_metric_of_the_prior(regularization, unit):
    """The same posterior in all units of the parameters."""
    factors = np.where(np.arange(SIZE) % 2, unit, 1.0)
    H, prior = _indefinite() / np.outer(factors, factors), np.asarray(_prior(False)) / factors**2
    change = CHANGES[regularization]
    stops = [slice(*leaf) for leaf in _leaves()]
    blocks, expected = tuple(symmetrized(H[s, s]) for s in stops), np.zeros_like(H)
    for s in stops:
        one = np.linalg.eigvalsh(_whitened(H[s, s], prior[s]))
        expected[s, s] = _changed(change, H[s, s], prior[s]) if one[0] <= -1 else H[s, s]
    cases = [
        (Full(), symmetrized(H), _changed(change, H, prior)),
        (BlockDiagonal(), BlockForm(blocks), expected),
        (Diagonal(), DiagonalForm(jnp.asarray(np.diagonal(H))[None]), np.diag(change(np.diagonal(H) / prior) * prior)),
    ]
    eigenvalues, vectors = np.linalg.eigh(_whitened(H, prior))
    if regularization is not Jitter:  # of any basis, such as one that is orthonormal in another metric
        form = EigenForm(jnp.asarray(vectors.T * np.sqrt(prior)), jnp.asarray(eigenvalues))
        cases.append((LowRank(), form, _changed(change, H, prior)))
    for structure, form, changed in cases:
        found = built(structure, form, _local(jnp.asarray(prior)), regularization())
        precision = np.asarray(found.built.precision.precision_product(jnp.eye(SIZE)))
        np.testing.assert_allclose(_whitened(precision, prior), _whitened(changed, prior) + np.eye(SIZE), atol=1e-11)
        assert (
            found.spectrum.regularized.kind == regularization.kind
            and found.spectrum.eigenvalue_min < 0 < found.spectrum.num_negative
        )
        with pytest.raises(LaplodeError, match="not positive definite"):
            built(structure, form, _local(jnp.asarray(prior)), Refuse())


@pytest.mark.parametrize("structure", [Full(), BlockDiagonal(), Diagonal(), LowRank()], ids=lambda s: s.name)
def test_what_the_prior_outweighs_stays_as_it_is(structure):
    """A posterior wider than its prior, of a strict minimum, is exact."""
    H = 0.1 * _indefinite()
    prior = 3 * np.abs(np.linalg.eigvalsh(H)).max() * np.linspace(1, 2, SIZE)
    eigenvalues, vectors = np.linalg.eigh(_whitened(H, prior))
    stops = [slice(*leaf) for leaf in _leaves()]
    form, expected = {
        "full": (symmetrized(H), H),
        "block_diagonal": (BlockForm(tuple(symmetrized(H[s, s]) for s in stops)), _blocks_of(H)),
        "diagonal": (DiagonalForm(jnp.asarray(np.diagonal(H))[None]), np.diag(np.diagonal(H))),
        "low_rank": (EigenForm(jnp.asarray(vectors.T * np.sqrt(prior)), jnp.asarray(eigenvalues)), H),
    }[structure.name]
    local = _local(jnp.asarray(prior))
    found = built(structure, form, local, Clip())
    assert (
        found.spectrum.num_negative > 0 and found.spectrum.regularized is None and 0 < found.spectrum.eigenvalue_min < 1
    )
    covariance = found.built.precision.covariance_product(jnp.eye(SIZE))
    np.testing.assert_allclose(covariance, np.linalg.inv(expected + np.diag(prior)), rtol=1e-9, atol=1e-12)
    diagonal, rows = found.built.precision.split(jnp.asarray(prior))
    np.testing.assert_allclose(np.diag(diagonal) + rows.T @ rows, expected + np.diag(prior), rtol=1e-9, atol=1e-9)
    always = built(structure, form, local, Clip(always=True))
    assert always.spectrum.regularized is not None and always.spectrum.eigenvalue_min < 1


# ---- A prior that bends upward, or in which parameters depend on one another


@pytest.mark.parametrize("name", ["full", "block_diagonal", "diagonal", "low_rank", "truncated"])
def test_a_prior_with_rows(name):
    structure, asked, dense = CASES[name]
    form, prior, rows = _factor(4), _prior(False), jnp.asarray(np.random.default_rng(8).normal(size=(2, SIZE)))
    matrix = np.asarray(form.matrix)
    expected = dense(matrix + rows.T @ rows, prior) if name != "truncated" else dense(matrix, prior) + rows.T @ rows
    found = built(structure, asked(form), _local(prior, rows=rows), Clip())
    precision = found.built.precision.precision_product(jnp.eye(SIZE))
    np.testing.assert_allclose(precision, expected + np.diag(prior), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["full", "block_diagonal", "diagonal"])
def test_a_prior_that_bends_upward(name):
    structure, asked, dense = CASES[name]
    form, prior = _factor(30), _prior(False)
    deficit = jnp.zeros(SIZE).at[3].set(2.0)
    found = built(structure, asked(form), _local(prior, deficit=deficit), Clip())
    precision = found.built.precision.precision_product(jnp.eye(SIZE))
    expected = dense(np.asarray(form.matrix), prior) + np.diag(prior - deficit)
    np.testing.assert_allclose(precision, expected, rtol=1e-9, atol=1e-9)


# ---- The log-determinant at other scales and precisions


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num", [4, 30])
@pytest.mark.parametrize("groups", ["one", "leaf", "parameter"])
def test_the_determinant_is_that_of_the_precision(name, num, groups):
    """In data space, in parts by channel, or built anew: one number, with one derivative."""
    structure, asked, _ = CASES[name]
    form = asked(_factor(num))
    number = {"one": np.zeros(SIZE, int), "leaf": np.repeat(np.arange(3), LEAVES), "parameter": np.arange(SIZE)}[groups]
    values = jnp.linspace(0.5, 2.0, number.max() + 1)
    found = determinant(structure, form, _local(jnp.ones(SIZE)), Clip(always=True), number, 1.0)

    def directly(log_values, by):
        precision = jnp.exp(log_values)[number]
        return structure.build(form.scaled(by), _local(precision), Clip()).precision.log_det

    quickly = lambda log_values, by: found(_local(jnp.exp(log_values)[number]), by)
    at = (jnp.log(values), jnp.array([0.7, 1.9]))
    np.testing.assert_allclose(quickly(*at), directly(*at), rtol=1e-12)
    slopes = [jax.grad(f, argnums=(0, 1))(*at) for f in (quickly, directly)]
    for one, other in zip(*slopes, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("regularization", CHANGES, ids=lambda kind: kind.kind)
def test_the_derivative_of_changed_eigenvalues(regularization):
    """Also where eigenvalues coincide."""
    parts = np.stack([np.diag([3.0, 3.0, -2.0, -2.0, 0.5]), 0.3 * _indefinite(5)])
    form = DenseForm(jnp.asarray(parts), 0.0)
    log_det = lambda by: Full().build(form.scaled(by), _local(jnp.ones(5)), regularization()).precision.log_det
    for by in ([1.0, 0.0], [1.0, 1.3]):
        at, step = jnp.array(by), 1e-6
        slope = jax.grad(log_det)(at)
        moved = [(log_det(at + e) - log_det(at - e)) / (2 * step) for e in step * jnp.eye(2)]
        np.testing.assert_allclose(slope[0], moved[0], rtol=1e-6, atol=1e-8)
        if by[1]:
            np.testing.assert_allclose(slope, moved, rtol=1e-6, atol=1e-8)


# ---- Numbers far apart


def test_low_rank_equals_full_where_the_prior_hardly_matters():
    """Strong data: variances 1e-8 of the prior's keep their digits."""
    rng = np.random.default_rng(5)
    rows = jnp.asarray(rng.normal(size=(8, SIZE)))
    prior = _prior(False)
    low = low_rank(rows, jnp.full(8, 1e8), prior)
    F = np.asarray(rows)
    # In data space, where nothing cancels: (W + (F Λ0⁻¹ Fᵀ)⁻¹)⁻¹.
    exact = np.linalg.inv(1e8 * np.eye(8) + np.linalg.inv((F / np.asarray(prior)) @ F.T))
    np.testing.assert_allclose(low.predictive_covariance(rows[:3]), exact[:3, :3], rtol=1e-5, atol=1e-6 * exact.max())


@pytest.mark.parametrize("strength", [1e6, 1e10, 1e14, 1e18])
def test_all_modes_keep_their_digits(strength):
    """With as many modes as parameters, variances are right however strong the data are."""
    rng = np.random.default_rng(7)
    rows = rng.normal(size=(9, 3))
    prior = np.array([1.0, 1e-4, 1e4])
    found = low_rank(jnp.asarray(rows), jnp.full(9, strength), jnp.asarray(prior))
    exact = np.linalg.inv(rows.T @ rows * strength + np.diag(prior))
    np.testing.assert_allclose(found.variance(), np.diag(exact), rtol=1e-5)
    assert float(found.rounding) == 0 and float(found.inverse_quadratic(jnp.asarray(rows[0]))) > 0


def test_rounding_is_known_where_modes_are_few():
    rows = jnp.asarray(np.random.default_rng(7).normal(size=(3, SIZE)))
    weak, strong = (float(low_rank(rows, jnp.full(3, w), _prior(True)).rounding) for w in (1.0, 1e14))
    assert weak < 1e-12 and strong > 1e-3


def test_log_density_integrates():
    structure = built(Full(), _factor(4), _local(_prior(False)), Clip()).built.precision
    eye = jnp.eye(SIZE)
    reference = multivariate_normal(np.zeros(SIZE), np.asarray(structure.covariance_product(eye)))
    v = np.random.default_rng(6).normal(size=SIZE)
    log_prob = 0.5 * (structure.log_det - SIZE * np.log(2 * np.pi) - v @ structure.precision_product(jnp.asarray(v)))
    np.testing.assert_allclose(log_prob, reference.logpdf(v), rtol=1e-10)


@pytest.mark.parametrize("num", [4, 30])
def test_precisions_are_pytrees(num):
    precision = low_rank(jnp.asarray(_factor(num).factor), jnp.ones(num), _prior(True))
    same = eqx.filter_jit(lambda s: s)(precision)
    assert jax.tree.structure(same) == jax.tree.structure(precision)


@pytest.mark.parametrize("structure", [Full(), LowRank()], ids=lambda s: s.name)
def test_eigenvalues_farther_apart_than_float64_can_add(structure):
    """Curvatures of 10²⁰ beside a prior precision of 2, as of a trajectory that grows without bound."""
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(SIZE, 4)))[0].T
    form = FactoredForm(jnp.asarray(1e10 * rows), jnp.ones(4), np.zeros(4, int))
    found = built(structure, form, _local(jnp.full(SIZE, 2.0)), Refuse())
    covariance = (np.eye(SIZE) - rows.T @ rows) / 2 + rows.T @ rows / (1e20 + 2)
    np.testing.assert_allclose(found.built.precision.covariance_product(jnp.eye(SIZE)), covariance, atol=1e-7)
    log_det = 4 * np.log(1e20) + (SIZE - 4) * np.log(2)
    np.testing.assert_allclose(found.built.precision.log_det, log_det, rtol=1e-8)
    # A root of Λ is found to 1e10 ε, and 1 in it to a part of that.
    rounding = 4 * np.finfo(float).eps * 1e10
    np.testing.assert_allclose([found.spectrum.eigenvalue_min, found.spectrum.eigenvalue_max], [1, 5e19], rtol=rounding)


def test_extreme_eigenvalues_of_a_large_precision():
    size = 300
    form = _factor(900, size=size)
    found = built(Full(), form, _local(jnp.linspace(0.5, 2.0, size)), Clip())
    root = np.sqrt(np.linspace(0.5, 2.0, size))
    spectrum = 1 + np.linalg.eigvalsh(np.asarray(form.matrix) / np.outer(root, root))
    np.testing.assert_allclose(
        [found.spectrum.eigenvalue_min, found.spectrum.eigenvalue_max], spectrum[[0, -1]], rtol=1e-3
    )

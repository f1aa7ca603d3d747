"""One contract for every structure: dense algebra on the precision that it stands for."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from laplode._algebra.build import Sizes, build_block_diagonal, build_diagonal, build_full, build_low_rank
from laplode._algebra.forms import BlockCurvature, DiagonalCurvature, EigenCurvature, FactoredCurvature, symmetrized
from laplode._algebra.regularization import Regularize
from laplode._algebra.structure import BlockDiagonalPrecision, DiagonalPrecision, FullPrecision, LowRankPrecision
from laplode._errors import LaplodeError

CLIP = Regularize("clip", lambda eigenvalues: np.maximum(eigenvalues, 0))
NONE = Regularize("none", lambda eigenvalues: eigenvalues)
LEAVES = (5, 1, 6)
SIZE = sum(LEAVES)


def _factor(num, seed=0):
    rng = np.random.default_rng(seed)
    return FactoredCurvature(jnp.asarray(rng.normal(size=(num, SIZE))), jnp.asarray(rng.uniform(0.5, 9.0, num)))


def _prior(uniform):
    return jnp.full(SIZE, 1.7) if uniform else jnp.asarray(np.random.default_rng(1).uniform(0.2, 5.0, SIZE))


def _sizes(num, rank=None):
    return Sizes(SIZE, num, LEAVES, rank)


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


CASES = {
    "full": (build_full, None, FullPrecision, lambda C, prior: C),
    "block_diagonal": (build_block_diagonal, None, BlockDiagonalPrecision, lambda C, prior: _blocks_of(C)),
    "diagonal": (build_diagonal, None, DiagonalPrecision, lambda C, prior: np.diag(np.diagonal(C))),
    "low_rank": (build_low_rank, None, LowRankPrecision, lambda C, prior: C),
    "truncated": (build_low_rank, 3, LowRankPrecision, lambda C, prior: _leading_of(C, prior, 3)),
}


@pytest.fixture(
    params=[(name, num, uniform) for name in CASES for num in (4, 30) for uniform in (True, False)], ids=str
)
def case(request):
    name, num, uniform = request.param
    build, rank, kind, dense = CASES[name]
    curvature, prior = _factor(num), _prior(uniform)
    built = build(curvature, prior, CLIP, _sizes(num, rank))
    assert isinstance(built.structure, kind)
    F, w = np.asarray(curvature.factor), np.asarray(curvature.weights)
    precision = dense(F.T @ (w[:, None] * F), np.asarray(prior)) + np.diag(prior)
    return built, precision, prior


def test_products(case):
    built, precision, _ = case
    structure, eye = built.structure, jnp.eye(SIZE)
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
    structure = case[0].structure
    v = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, SIZE)))
    for product in (structure.precision_product, structure.covariance_product, structure.root_product):
        batched = product(v)
        assert batched.shape == v.shape
        np.testing.assert_allclose(batched[1, 2], product(v[1, 2]), rtol=1e-11)
        np.testing.assert_allclose(jax.jit(jax.vmap(jax.vmap(product)))(v), batched, rtol=1e-11)


def test_effective_dof_and_spectrum(case):
    built, precision, prior = case
    covariance = np.linalg.inv(precision)
    dof = np.trace((precision - np.diag(prior)) @ covariance)
    np.testing.assert_allclose(built.structure.effective_dof(prior), dof, rtol=1e-9)
    spectrum = np.linalg.eigvalsh(precision)
    np.testing.assert_allclose([built.eigenvalue_min, built.eigenvalue_max], spectrum[[0, -1]], rtol=1e-7)
    np.testing.assert_allclose(built.condition_number, spectrum[-1] / spectrum[0], rtol=1e-6)


def test_samples_have_the_stated_covariance(case):
    structure, covariance = case[0].structure, np.linalg.inv(case[1])
    n = 40_000
    draws = np.asarray(structure.root_product(jax.random.normal(jax.random.key(0), (n, SIZE))))
    std = np.sqrt(np.diagonal(covariance))
    # Standardized covariances estimated from n draws have a standard error of at most sqrt(2 / n).
    error = (np.cov(draws.T) - covariance) / np.outer(std, std)
    assert np.abs(error).max() < 5 * np.sqrt(2 / n)


def test_indefinite_curvature():
    rng = np.random.default_rng(4)
    H = rng.normal(size=(SIZE, SIZE))
    H = H + H.T
    prior = np.full(SIZE, 0.3)
    blocks, start = [], 0
    for size in LEAVES:
        blocks.append(symmetrized(H[start : start + size, start : start + size]))
        start += size

    def clipped(matrix):
        eigenvalues, vectors = np.linalg.eigh(matrix)
        return (vectors * np.maximum(eigenvalues, 0)) @ vectors.T

    clipped_blocks, start = np.zeros_like(H), 0
    for size in LEAVES:
        block = slice(start, start + size)
        clipped_blocks[block, block] = clipped(H[block, block])
        start += size
    eigenvalues, vectors = np.linalg.eigh(H)
    cases = [
        (build_full, symmetrized(H), clipped(H), np.sum(eigenvalues < 0)),
        (build_block_diagonal, BlockCurvature(tuple(blocks)), clipped_blocks, None),
        (
            build_diagonal,
            DiagonalCurvature(jnp.asarray(np.diagonal(H))),
            np.diag(np.maximum(np.diagonal(H), 0)),
            None,
        ),
        (build_low_rank, EigenCurvature(jnp.asarray(vectors.T), jnp.asarray(eigenvalues)), clipped(H), None),
    ]
    for build, curvature, expected, num_negative in cases:
        built = build(curvature, jnp.asarray(prior), CLIP, _sizes(9))
        np.testing.assert_allclose(
            built.structure.precision_product(jnp.eye(SIZE)), expected + np.diag(prior), rtol=1e-9, atol=1e-10
        )
        assert built.regularized is not None and built.regularized.kind == "clip"
        if num_negative is not None:
            assert built.num_negative == num_negative
        with pytest.raises(LaplodeError, match="not positive definite"):
            build(curvature, jnp.asarray(prior), NONE, _sizes(9))


def test_low_rank_equals_full_where_the_prior_hardly_matters():
    """Strong data: variances 1e-8 of the prior's keep their digits."""
    rng = np.random.default_rng(5)
    curvature = FactoredCurvature(jnp.asarray(rng.normal(size=(8, SIZE))), jnp.full(8, 1e8))
    prior = _prior(False)
    low = build_low_rank(curvature, prior, CLIP, _sizes(8)).structure
    J = curvature.factor[:3] + 0.0
    F = np.asarray(curvature.factor)
    # In data space, where nothing cancels: (W + (F Λ0⁻¹ Fᵀ)⁻¹)⁻¹.
    exact = np.linalg.inv(1e8 * np.eye(8) + np.linalg.inv((F / np.asarray(prior)) @ F.T))
    np.testing.assert_allclose(low.predictive_covariance(J), exact[:3, :3], rtol=1e-5, atol=1e-6 * exact.max())


def test_log_density_integrates():
    structure = build_full(_factor(4), _prior(False), CLIP, _sizes(4)).structure
    eye = jnp.eye(SIZE)
    reference = multivariate_normal(np.zeros(SIZE), np.asarray(structure.covariance_product(eye)))
    v = np.random.default_rng(6).normal(size=SIZE)
    log_prob = 0.5 * (structure.log_det - SIZE * np.log(2 * np.pi) - v @ structure.precision_product(jnp.asarray(v)))
    np.testing.assert_allclose(log_prob, reference.logpdf(v), rtol=1e-10)


def test_structures_are_pytrees():
    structure = build_low_rank(_factor(4), _prior(True), CLIP, _sizes(4)).structure
    same = eqx.filter_jit(lambda s: s)(structure)
    assert jax.tree.structure(same) == jax.tree.structure(structure)


@pytest.mark.parametrize("build", [build_full, build_low_rank], ids=["full", "low_rank"])
def test_eigenvalues_farther_apart_than_float64_can_add(build):
    """Curvatures of 10²⁰ beside a prior precision of 2, as of a trajectory that grows without bound."""
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(SIZE, 4)))[0].T
    found = FactoredCurvature(jnp.asarray(1e10 * rows), jnp.ones(4))
    built = build(found, jnp.full(SIZE, 2.0), NONE, _sizes(4))
    covariance = (np.eye(SIZE) - rows.T @ rows) / 2 + rows.T @ rows / (1e20 + 2)
    np.testing.assert_allclose(built.structure.covariance_product(jnp.eye(SIZE)), covariance, atol=1e-7)
    log_det = 4 * np.log(1e20) + (SIZE - 4) * np.log(2)
    np.testing.assert_allclose(built.structure.log_det, log_det, rtol=1e-8)
    # A root of Λ is found to 1e10 ε, and √2 in it to a part of that.
    rounding = 4 * np.finfo(float).eps * 1e10
    np.testing.assert_allclose([built.eigenvalue_min, built.eigenvalue_max], [2, 1e20], rtol=rounding)

"""What the data determine, of models in which that is known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.linalg

import laplode as lp

TS = np.linspace(0, 2, 6)
A, B = 1.5, 0.8


class Products(eqx.Module):
    """y = (a b, c d t): of four numbers only two products are seen; `idle` is not seen at all."""

    a: jax.Array
    b: jax.Array
    c: jax.Array
    d: jax.Array
    idle: jax.Array

    def __call__(self, ts, y0):
        return jnp.stack([self.a * self.b * jnp.ones_like(ts), self.c * self.d * ts], axis=1)


MODEL = Products(*map(jnp.array, (A, B, 0.7, 1.1)), jnp.zeros(2))
YS = np.asarray(MODEL(jnp.asarray(TS), None)) + 0.1 * np.random.default_rng(0).normal(size=(6, 2))
LIKELIHOOD = lp.Gaussian(0.1)
SEEN = lambda m: (m.a, m.b)


@pytest.fixture(scope="module")
def products(quiet):
    def make(prior=1.0, **options):
        return quiet(MODEL, lp.Problem(lp.Trajectories(TS, YS), LIKELIHOOD, prior), **{"curvature": "ggn"} | options)

    return make


@pytest.mark.parametrize("structure", ["full", "low_rank"])
def test_a_product_is_named(products, structure):
    report = lp.identifiability(products(structure=structure, where=SEEN))
    free, known = report.directions.itertuples()
    np.testing.assert_allclose([free.strength, free.determined], 0, atol=1e-9)
    assert free.parameters == ("a", "b") and free.count == 1
    np.testing.assert_allclose(free.loadings, np.array([A**2, B**2]) / (A**2 + B**2), rtol=1e-8)
    np.testing.assert_allclose(known.strength, 6 * (A**2 + B**2) / 0.1**2, rtol=1e-8)
    np.testing.assert_allclose(known.loadings, np.array([A**2, B**2]) / (A**2 + B**2), rtol=1e-8)
    assert known.parameters == ("b", "a")
    assert list(report.uninformed.index) == [0]
    assert "a 0.78, b 0.22" in str(report)


@pytest.mark.parametrize("structure", ["full", "low_rank", "block_diagonal", "diagonal"])
def test_every_structure_agrees_with_its_own_matrix(products, structure):
    prior = lp.GaussianPrior(Products(*map(jnp.array, (1.0, 2.0, 0.5, 3.0)), jnp.array(4.0)))
    posterior = products(prior, structure=structure)
    report = lp.identifiability(posterior)
    root = np.sqrt([1.0, 2.0, 0.5, 3.0, 4.0, 4.0])
    whitened = np.asarray(posterior.precision()) / root / root[:, None] - np.eye(6)
    np.testing.assert_allclose(report.directions["strength"], np.linalg.eigvalsh(whitened), rtol=1e-7, atol=1e-9)
    assert report.directions["count"].sum() == 6
    strength = report.directions["strength"]
    np.testing.assert_allclose(report.directions["determined"], strength / (1 + strength))
    np.testing.assert_allclose(report.directions["determined"].sum(), posterior.diagnostics.effective_dof, rtol=1e-7)
    np.testing.assert_allclose(report.leaves["determined"].sum(), posterior.diagnostics.effective_dof, rtol=1e-7)
    np.testing.assert_allclose(report.leaves["contraction"][:4], np.asarray(posterior.marginal_std())[:4] * root[:4])
    np.testing.assert_allclose(report.leaves.loc["idle", ["prior_std", "posterior_std", "contraction"]], [0.5, 0.5, 1])
    if structure in ("full", "low_rank"):
        free = set(report.uninformed["parameters"])
        assert {frozenset(names) for names in free} == {
            frozenset({"a", "b"}),
            frozenset({"c", "d"}),
            frozenset({"idle[0]"}),
            frozenset({"idle[1]"}),
        }


def test_what_a_constraint_says_is_the_prior(products):
    tied = lp.SoftConstraint(lambda m: m.a - m.b, A - B, 0.05**2, weights=1.0)
    row = np.array([1.0, -1.0]) / 0.05
    before = np.eye(2) + np.outer(row, row)
    for structure in ("full", "low_rank"):
        posterior = products(tied, where=SEEN, structure=structure)
        report = lp.identifiability(posterior)
        expected = scipy.linalg.eigh(np.asarray(posterior.precision()) - before, before, eigvals_only=True)
        np.testing.assert_allclose(report.directions["strength"], expected, rtol=1e-7, atol=1e-8)
        np.testing.assert_allclose(report.leaves["determined"].sum(), posterior.diagnostics.effective_dof, rtol=1e-7)
        np.testing.assert_allclose(report.leaves["prior_std"], np.sqrt(np.diagonal(np.linalg.inv(before))), rtol=1e-9)
    # The data see the product alone; what is left is the prior's.
    assert report.directions["determined"][0] < 1e-8 and report.directions["determined"][1] > 0.99
    with pytest.raises(lp.LaplodeError, match=r'structure="diagonal".*take "full" or "low_rank"'):
        lp.identifiability(products(tied, where=SEEN, structure="diagonal"))


def test_a_product_of_constrained_parameters_is_named_in_their_coordinates(products):
    """In logarithms a product is a sum; the one with the wider prior has the larger share."""
    named = lp.NamedPriors({"a": dist.LogNormal(0.0, 0.4), "b": dist.LogNormal(0.0, 0.8)}, rest=1.0)
    report = lp.identifiability(products(named, where=SEEN))
    np.testing.assert_allclose(report.directions["strength"][0], 0, atol=1e-9)
    # Along (1, −1) in logarithms, in prior deviations (1 / 0.4, −1 / 0.8).
    np.testing.assert_allclose(report.directions["loadings"][0], [0.8, 0.2], rtol=1e-8)
    np.testing.assert_allclose(report.leaves["prior_std"], [0.4, 0.8])
    # Given the sum, each logarithm varies with the part of its prior that is orthogonal to the sum.
    np.testing.assert_allclose(report.leaves["contraction"], np.sqrt([0.8, 0.2]), rtol=1e-2)


def test_many_directions_without_information_are_told_as_one(quiet):
    class Wide(eqx.Module):
        seen: jax.Array
        idle: jax.Array

        def __call__(self, ts, y0):
            return self.seen * jnp.ones((len(ts), 2))

    problem = lp.Problem(lp.Trajectories(TS, YS), LIKELIHOOD, 1.0)
    model = Wide(jnp.array(1.0), jnp.zeros(100))
    for structure in ("full", "low_rank"):
        report = lp.identifiability(quiet(model, problem, curvature="ggn", structure=structure))
        assert list(report.directions["count"]) == [100, 1]
        assert all(name.startswith("idle") for name in report.directions["parameters"][0])
        np.testing.assert_allclose(report.directions["loadings"][0], 0.01, rtol=1e-8)
        assert "100 directions" in str(report)


def test_what_does_not_fit(linear_posterior):
    with pytest.raises(lp.LaplodeError, match="posterior"):
        lp.identifiability(3)
    with pytest.raises(lp.LaplodeError, match="threshold"):
        lp.identifiability(linear_posterior, threshold=2)


def test_before_any_fit_the_open_directions_are_those_of_the_products():
    problem = lp.Problem(lp.Trajectories(TS, YS), LIKELIHOOD, 1.0)
    found = lp.identifiability(MODEL, problem, key=jax.random.key(0))
    empty = found.directions[found.directions["strength"] < 1e-9]
    assert int(np.sum(empty["count"])) == 4 and "best of 5 draws" in repr(found)
    named = {name for names in empty["parameters"] for name in names}
    assert {"idle[0]", "idle[1]"} < named and named & {"a", "b"} and named & {"c", "d"}
    only = lp.identifiability(MODEL, problem, where=["a", "c"], key=jax.random.key(0))
    assert only.uninformed.empty


class Nowhere(eqx.Module):
    """Finite at no draw of a prior around 0."""

    a: jax.Array

    def __call__(self, ts, y0):
        return jnp.sqrt(self.a - 100 + 0 * ts)[:, None]


def test_before_any_fit_what_does_not_work_is_said():
    problem = lp.Problem(lp.Trajectories(TS, YS[:, :1]), LIKELIHOOD, 1.0)
    with pytest.raises(lp.LaplodeError, match="no sensitivities at any of 5 draws"):
        lp.identifiability(Nowhere(jnp.array(101.0)), problem, key=jax.random.key(0))
    with pytest.raises(lp.LaplodeError, match="`key` is needed"):
        lp.identifiability(Nowhere(jnp.array(101.0)), problem)
    with pytest.raises(lp.LaplodeError, match="beside `problem`"):
        lp.identifiability(Nowhere(jnp.array(101.0)))

"""NUTS on the exact posterior, and posteriors as distributions in NumPyro."""

import warnings

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.integrate as si
import scipy.stats as st
from arviz_stats.base import array_stats
from numpyro.infer import SVI, Trace_ELBO

import laplode as lp
from laplode._model.parameters import parameters
from laplode._predict.solves import log_joint
from laplode._report.nuts import _advance, _begin, _kernel, _largest, _rhat, _Target

KEY = jax.random.key(0)
LONG = {"key": KEY, "num_warmup": 200, "num_samples": 500, "progress": False}


def assert_means(draws, expected):
    """Draws (chain, draw, ...) have these means, within Monte-Carlo errors."""
    error = array_stats.mcse(draws, chain_axis=0, draw_axis=1, method="mean")
    assert np.all(np.abs(draws.mean(axis=(0, 1)) - expected) < 4.5 * error)


def unlimited(posterior):
    return _Target(posterior.problem, posterior.parameters, posterior.built, jnp.array(jnp.inf))


class Line(eqx.Module):
    theta: jax.Array

    def __call__(self, ts, y0):
        return y0 * (self.theta[0] + self.theta[1] * ts)[:, None]


@pytest.fixture(scope="module")
def line():
    """The posterior of two trajectories that are linear in θ, and its conjugate mean and covariance."""
    ts, y0 = np.linspace(0.1, 2, 4), np.array([[1.0], [2.0]])
    design = np.concatenate([scale * np.stack([np.ones(4), ts], axis=1) for scale in (1, 2)])
    ys = design @ [1.0, 0.5] + np.array([0.3, -0.2, 0.1, -0.4, 0.2, 0.1, -0.1, 0.3])
    precision = design.T @ design / 0.3**2 + np.eye(2)
    mean = np.linalg.solve(precision, design.T @ ys / 0.3**2)
    problem = lp.Problem(lp.Trajectories(ts, ys.reshape(2, 4, 1), y0), lp.Gaussian(0.3), 1.0)
    return lp.laplace(Line(jnp.asarray(mean)), problem, progress=False), mean, np.linalg.inv(precision)


LATER = np.linspace(3, 4, 3)
COORDS = {"trajectory": ["north", "south"], "channel": ["hare"]}


@pytest.fixture(scope="module")
def line_tree(line):
    return lp.nuts(line[0], LATER, num_prior=5, coords=COORDS, **LONG)


# ---- The exact posterior


def test_a_linear_model_has_its_conjugate_posterior(line, line_tree):
    _, mean, covariance = line
    draws = line_tree["posterior"]["theta"].values
    assert draws.shape == (4, 500, 2)
    assert_means(draws, mean)
    offset = draws - mean
    assert_means(offset[..., :, None] * offset[..., None, :], covariance)
    attrs = line_tree["posterior"].attrs
    assert attrs["max_rhat"] < 1.01 and attrs["max_rhat_f"] < 1.01 and attrs["num_divergences"] == 0
    assert attrs["inference_library"] == "numpyro" and attrs["inference_library_version"] == numpyro.__version__


def test_statistics_of_the_sampler(line, line_tree):
    posterior, stats = line[0], line_tree["sample_stats"]
    names = ["diverging", "energy", "lp", "n_steps", "tree_depth", "acceptance_rate", "step_size"]
    assert set(stats.data_vars) == set(names) and stats["lp"].dims == ("chain", "draw")
    thetas = jnp.asarray(line_tree["posterior"]["theta"].values.reshape(-1, 2))
    np.testing.assert_allclose(stats["lp"].values.ravel(), log_joint(posterior, thetas), rtol=1e-10)
    assert np.all(stats["energy"] > -stats["lp"])
    assert np.all(2 ** (stats["tree_depth"] - 1) <= stats["n_steps"])
    assert np.all(stats["n_steps"] < 2 ** stats["tree_depth"])
    assert np.all(np.ptp(stats["step_size"].values, axis=1) == 0)  # not adapted any more
    np.testing.assert_allclose(stats["acceptance_rate"].mean(), 0.85, atol=0.12)


def test_the_groups_are_those_of_to_datatree(line, line_tree):
    posterior, data = line[0], line[0].problem.data
    same = {"key": KEY, "num_samples": 20, "progress": False}
    predictions = [lp.predict(posterior, ts, **same) for ts in (data.ts, LATER)]
    other = lp.to_datatree(posterior, *predictions, key=KEY, num_samples=5, coords=COORDS)
    assert set(line_tree.children) == set(other.children)
    sizes = lambda group: {name: size for name, size in group.sizes.items() if name not in ("chain", "draw")}
    for group in set(line_tree.children) - {"sample_stats"}:
        assert sizes(line_tree[group]) == sizes(other[group])
        dims = [{name: x.dims for name, x in tree[group].data_vars.items()} for tree in (line_tree, other)]
        assert dims[0] == dims[1]
        for name in set(line_tree[group].coords) - {"chain", "draw"}:
            np.testing.assert_array_equal(line_tree[group][name], other[group][name])
    assert dict(line_tree["posterior"].sizes) == {"chain": 4, "draw": 500, "theta_dim_0": 2}
    # In each draw, prediction and likelihood belong to its parameters.
    theta = line_tree["posterior"]["theta"].values[:, :, None, None, None]
    exact = lambda ts: data.y0[:, None] * (theta[..., 0] + theta[..., 1] * ts[:, None])
    np.testing.assert_allclose(line_tree["posterior_predictive"]["f"], exact(data.ts[0]), rtol=1e-10)
    np.testing.assert_allclose(line_tree["predictions"]["f"], exact(LATER), rtol=1e-10)
    expected = st.norm.logpdf(data.ys, exact(data.ts[0]), 0.3)
    np.testing.assert_allclose(line_tree["log_likelihood"]["y"], expected, rtol=1e-9)
    noise = (line_tree["predictions"]["y"] - line_tree["predictions"]["f"]).values
    assert_means(noise**2, 0.09)


def test_a_part_of_the_parameters_and_chains_one_after_another(growth, quiet):
    posterior = quiet(growth.model, growth.problem, where=lambda m: m.gain, curvature="ggn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)  # two short chains may disagree a little
        tree = lp.nuts(posterior, **LONG | {"num_samples": 300, "num_chains": 2, "chain_method": "sequential"})
    assert list(tree["posterior"].data_vars) == ["gain"] and tree["posterior"]["gain"].shape == (2, 300)
    assert len(np.unique(tree["posterior"]["gain"].values[:, 0])) == 2
    grid = np.linspace(1.0, 1.5, 201)
    density = np.exp(log_joint(posterior, jnp.asarray(grid)[:, None]) - posterior.log_joint)
    assert_means(tree["posterior"]["gain"].values, si.simpson(grid * density, grid) / si.simpson(density, grid))


@pytest.mark.parametrize(
    "likelihood",
    [lp.LogNormal(0.1), lp.StudentT(4.0, 0.2), lp.Poisson(), lambda f: dist.Laplace(f, 0.3)],
    ids=["lognormal", "student", "poisson", "function"],
)
def test_the_density_has_a_gradient_under_every_likelihood(growth, growth_posterior, likelihood):
    data = growth.problem.data
    ys = np.round(data.ys) if isinstance(likelihood, lp.Poisson) else data.ys.copy()
    ys[0, 3, 1] = np.nan
    problem = lp.Problem(lp.Trajectories(data.ts, ys, data.y0), likelihood, 1.0)
    posterior = eqx.tree_at(lambda p: p.problem, growth_posterior, problem)
    target = unlimited(posterior)
    start = jnp.array([0.3, -0.2, 0.1])
    value, gradient = jax.jit(jax.value_and_grad(target))(start)
    steps = 1e-5 * jnp.concatenate([jnp.eye(3), -jnp.eye(3), jnp.zeros((1, 3))])
    rows = posterior.mean + posterior.built.root_product(start + steps)
    found = log_joint(posterior, rows)
    np.testing.assert_allclose(-value, found[6], rtol=1e-10)
    np.testing.assert_allclose(-gradient, (found[:3] - found[3:6]) / 2e-5, rtol=1e-5, atol=1e-5)


# ---- Where a solve fails


class Pole(eqx.Module):
    """y' = θ y² from 1, which leaves for infinity at t = 1/θ, in closed form."""

    rate: jax.Array

    def __call__(self, ts, y0):
        left = 1 - self.rate * y0 * (ts - ts[0])[:, None]
        return jnp.where(left > 0, y0 / left, jnp.inf)


@pytest.fixture(scope="module")
def pole():
    """θ is 0.5 ± 0.7 by its prior, and there is a solution at the data below 1."""
    data = lp.Trajectories([0.0, 1.0], np.array([[np.nan], [2.0]]), np.ones((1, 1)))
    problem = lp.Problem(data, lp.LogNormal(5.0), lp.GaussianPrior(2.0, mean=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)
        return lp.laplace(Pole(jnp.array(0.5)), problem, curvature="ggn", progress=False)


def test_a_region_without_solutions_is_not_entered(pole):
    with pytest.warns(lp.LaplodeWarning) as caught:
        tree = lp.nuts(pole, [0.0, 2.0], **LONG)
    said = [str(warning.message) for warning in caught]
    assert any("transitions diverged, where the posterior bends" in message for message in said)
    assert any("have no finite trajectory at `ts`" in message for message in said)
    draws = tree["posterior"]["rate"].values
    assert np.all(draws < 1) and np.all(np.isfinite(tree["posterior_predictive"]["f"]))
    grid = np.linspace(-3, 1, 20_001)[:-1]
    density = st.norm.pdf(grid, 0.5, np.sqrt(0.5)) * st.norm.pdf(np.log(2 * (1 - grid)), 0, 5)
    assert_means(draws, si.simpson(grid * density, grid) / si.simpson(density, grid))
    assert 0 < np.sum(draws > 0.5) < draws.size
    np.testing.assert_array_equal(np.isnan(tree["predictions"]["f"][:, :, 0, 1, 0]), draws > 0.5)


class Square(eqx.Module):
    rate: jax.Array

    def __call__(self, t, y, args):
        return self.rate * y**2


def test_a_solve_that_fails_has_no_density_and_a_finite_force(pole):
    loose = diffrax.PIDController(rtol=1e-4, atol=1e-6)
    model = lp.NeuralODE(Square(jnp.array(0.5)), solver=diffrax.Heun(), stepsize_controller=loose, max_steps=128)
    posterior = eqx.tree_at(lambda p: p.parameters, pole, parameters(model))
    target = unlimited(posterior)
    at = jax.jit(jax.vmap(jax.value_and_grad(target)))
    std = posterior.marginal_std()[0]
    (there, nowhere, outside), force = at(jnp.array([[0.1], [1 / std], [1e150]]))
    assert nowhere == outside == np.inf and np.all(np.isfinite(force))
    theta = 0.5 + 0.1 * std
    expected = st.norm.logpdf(theta, 0.5, np.sqrt(0.5)) + st.norm.logpdf(np.log(2), -np.log1p(-theta), 5) - np.log(2)
    np.testing.assert_allclose(-there, expected, rtol=1e-4)


def test_chains_that_stand_still_do_not_agree(line, monkeypatch):
    apart = np.broadcast_to(np.arange(4.0)[:, None, None], (4, 9, 2))
    assert np.all(_rhat(apart) == np.inf) and _largest(_rhat(apart)) == np.inf
    assert np.isnan(_largest(_rhat(np.ones((4, 9, 2)))))  # as a given initial state in every prediction
    monkeypatch.setattr("laplode._report.nuts._rhat", lambda draws: np.full(draws.shape[2:], np.nan))
    with pytest.warns(lp.LaplodeWarning, match=r"The chains do not agree: r̂ is inf for theta\[0\]"):
        tree = lp.nuts(line[0], **LONG | {"num_samples": 4})
    assert tree["posterior"].attrs["max_rhat"] == np.inf


@pytest.mark.parametrize("structure", ["full", "low_rank", "block_diagonal", "diagonal"])
def test_chains_start_where_they_are_told_to(by_structure, structure):
    posterior = by_structure[structure]
    starts = np.asarray(posterior.mean) + 0.01 * np.arange(12.0).reshape(2, 6)
    target, first = _begin(posterior, starts, 2, KEY)
    np.testing.assert_allclose(target.theta(first.z), starts, rtol=1e-9)
    np.testing.assert_allclose(-first.potential_energy, log_joint(posterior, jnp.asarray(starts)), rtol=1e-8)


def test_one_program_serves_other_data(line, monkeypatch):
    (posterior, mean, covariance), traced = line, []
    problem, data = posterior.problem, posterior.problem.data
    design = data.y0[:, None] * np.stack([np.ones((2, 4)), data.ts], axis=-1)
    shift = covariance @ np.sum(design, axis=(0, 1)) * 0.1 / 0.3**2
    shifted = eqx.tree_at(lambda p: p.data.ys, problem, data.ys + 0.1)
    other = lp.laplace(Line(jnp.asarray(mean + shift)), shifted, progress=False)
    monkeypatch.setattr("laplode._report.nuts._kernel", lambda *given: traced.append(given) or _kernel(*given))
    few = LONG | {"num_samples": 100}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)  # a hundred draws may disagree a little
        lp.nuts(posterior, **few)
        num = len(traced)
        tree = lp.nuts(other, **few)
    assert len(traced) == num
    assert_means(tree["posterior"]["theta"].values, mean + shift)


# ---- Several optima


class Even(eqx.Module):
    """Predicts x² t, so that x and −x are optima."""

    x: jax.Array

    def __call__(self, ts, y0):
        return (self.x**2 * ts)[:, None]


def test_chains_that_start_at_several_optima_say_that_they_disagree():
    ts = np.linspace(0.5, 2, 4)
    problem = lp.Problem(lp.Trajectories(ts, 1.7 * ts[None, :, None]), lp.Gaussian(0.1), 1.0)
    posterior = lp.laplace(Even(jnp.array(1.3)), problem, curvature="ggn", progress=False)
    starts = np.array([[1.3], [1.31], [1.29], [-1.3]])
    with pytest.warns(lp.LaplodeWarning, match=r"r̂ is .* for x, the worst parameter, and at most (1|0.99)"):
        tree = lp.nuts(posterior, starts=starts, **LONG | {"num_samples": 100})
    assert np.sum(tree["posterior"]["x"].values.mean(axis=1) > 0) == 3
    assert tree["posterior"].attrs["max_rhat"] > 1.5 and tree["posterior"].attrs["max_rhat_f"] < 1.1


# ---- Bad input, and an impatient user


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(num_samples=0), "`num_samples` must be a positive integer, got 0"),
        (dict(num_warmup=1.5), "`num_warmup` must be a positive integer"),
        (dict(num_chains=True), "`num_chains` must be a positive integer"),
        (dict(max_tree_depth=0), "`max_tree_depth` must be a positive integer"),
        (dict(num_prior=-1), "`num_prior` must be an integer of at least 0"),
        (dict(target_accept_prob=1.0), "`target_accept_prob` must lie between 0 and 1"),
        (dict(dense_mass="full"), "`dense_mass` must be True or False"),
        (dict(chain_method="parallel"), '`chain_method` must be one of "vectorized", "sequential"'),
        (dict(starts=np.zeros((2, 3))), r"`starts` must be .* \(4, 2\), got \(2, 3\)"),
        (dict(starts=np.full((4, 2), 1e200)), "`starts`: the density is not finite where chain 0 would start"),
        (dict(coords={"time": [1]}), "`coords` may name"),
        (dict(ts=[-1.0, 2.0]), "`ts` of trajectory 0 starts at -1"),
        (dict(y0=[[1.0]]), "`ts` is missing"),
    ],
)
def test_bad_input_is_refused_by_name(line, options, match):
    with pytest.raises(lp.LaplodeError, match=match):
        lp.nuts(line[0], **LONG | options)


def test_bad_posterior(growth):
    with pytest.raises(lp.LaplodeError, match=r"`posterior` must come from .* got Growth"):
        lp.nuts(growth.model, **LONG)


def test_a_model_without_reverse_mode_is_refused():
    class Forward(eqx.Module):
        rate: jax.Array

        def __call__(self, ts, y0):  # JAX pushes through a loop of unknown length, and does not pull
            decayed = jax.lax.while_loop(lambda y: jnp.all(y > 0.5), lambda y: y * self.rate, y0)
            return decayed * ts[:, None]

    data = lp.Trajectories([0.0, 1.0], [[np.nan], [0.4]], [1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LaplodeWarning)
        problem = lp.Problem(data, lp.Gaussian(0.1), 1.0)
        posterior = lp.laplace(Forward(jnp.array(0.9)), problem, curvature="ggn", progress=False)
    with pytest.raises(lp.LaplodeError, match="can't be differentiated in reverse"):
        lp.nuts(posterior, **LONG)


def interrupted_after(calls, monkeypatch):

    def stopping(*arguments):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise KeyboardInterrupt
        return _advance(*arguments)

    monkeypatch.setattr("laplode._report.nuts._advance", stopping)


def test_interruption_after_warmup_keeps_what_was_drawn(line, line_tree, monkeypatch):
    interrupted_after(12, monkeypatch)
    with pytest.warns(lp.LaplodeWarning, match="Interrupted: each chain has .* of 500 draws"):
        tree = lp.nuts(line[0], **LONG)
    num = tree.posterior.sizes["draw"]
    assert 0 < num < 500
    np.testing.assert_allclose(tree["posterior"]["theta"], line_tree["posterior"]["theta"][:, :num], rtol=1e-12)


def test_interruption_in_warmup_gives_control_back(line, monkeypatch):
    interrupted_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        lp.nuts(line[0], **LONG)


# ---- As a distribution in NumPyro


@pytest.fixture(scope="module")
def by_structure(linear, linear_ggn):
    full = {"full": linear_ggn}
    ggn = lambda structure: lp.laplace(
        linear.model, linear.problem, curvature="ggn", structure=structure, progress=False
    )
    return full | {name: ggn(name) for name in ("low_rank", "block_diagonal", "diagonal")}


@pytest.mark.parametrize("structure", ["full", "low_rank", "block_diagonal", "diagonal"])
def test_a_distribution_of_every_structure(by_structure, structure):
    posterior = by_structure[structure]
    found = posterior.to_numpyro()
    assert found.event_shape == (6,) and found.batch_shape == () and found.support is dist.constraints.real_vector
    thetas = posterior.sample(KEY, 4)
    log_prob = jax.jit(lambda d, thetas: d.log_prob(thetas))  # a pytree: it goes through as an argument
    np.testing.assert_allclose(log_prob(found, thetas), posterior.log_prob(thetas), rtol=1e-12)
    np.testing.assert_allclose(found.mean, posterior.mean)
    np.testing.assert_allclose(found.variance, posterior.marginal_std() ** 2, rtol=1e-10)
    draws = jax.jit(lambda d: d.sample(KEY, (40, 50)))(found)
    assert draws.shape == (40, 50, 6) and found.sample(KEY).shape == (6,)
    assert_means(np.asarray(draws), posterior.mean)
    offset = np.asarray(draws) - posterior.mean
    assert_means(offset[..., :, None] * offset[..., None, :], posterior.covariance())


def test_as_a_guide_its_bound_is_the_evidence(linear, linear_ggn):
    """On a linear model the guide is the posterior, so that every draw has the same bound, and it is exact."""
    design, ys = linear.design(linear.problem.data.ts[0]), linear.target

    def model():
        theta = numpyro.sample("theta", dist.Normal(jnp.zeros(6), 1 / np.sqrt(2.0)).to_event(1))
        numpyro.sample("y", dist.Normal(design @ theta, 0.1).to_event(1), obs=ys)

    guide = lambda: numpyro.sample("theta", linear_ggn.to_numpyro())
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO(num_particles=3))
    np.testing.assert_allclose(-svi.evaluate(svi.init(KEY)), linear_ggn.log_evidence, rtol=1e-6)


def test_as_a_prior_for_more_data(line):
    """With the posterior of all data as guide, the bound is the probability of the new data given the old."""
    posterior, mean, covariance = line
    design, ys = np.array([[1.0, 3.0], [1.0, 4.0]]), np.array([2.0, 3.5])
    precision = np.linalg.inv(covariance) + design.T @ design / 0.3**2
    both = np.linalg.solve(precision, np.linalg.solve(covariance, mean) + design.T @ ys / 0.3**2)

    def model():
        theta = numpyro.sample("theta", posterior.to_numpyro())
        numpyro.sample("y", dist.Normal(design @ theta, 0.3).to_event(1), obs=ys)

    guide = lambda: numpyro.sample("theta", dist.MultivariateNormal(both, precision_matrix=precision))
    expected = st.multivariate_normal(design @ mean, design @ covariance @ design.T + 0.3**2 * np.eye(2)).logpdf(ys)
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO(num_particles=3))
    np.testing.assert_allclose(-svi.evaluate(svi.init(KEY)), expected, rtol=1e-8)

"""What ArviZ is given, and that it can work with it, also after a round trip through a file."""

import sys

import equinox as eqx
import jax
import numpy as np
import pytest
import xarray as xr

import laplode as lp

if sys.version_info >= (3, 12):
    import arviz as az
else:
    import arviz.preview as az

KEY = jax.random.key(0)
NAMES = ["rate[0]", "rate[1]", "gain"]


def draw(posterior, ts, y0=None, **options):
    return lp.predict(posterior, ts, y0, **{"key": KEY, "num_samples": 200, "progress": False} | options)


@pytest.fixture(scope="module")
def here(growth_posterior):
    return draw(growth_posterior, growth_posterior.problem.data.ts, khat=True)


@pytest.fixture(scope="module")
def later(growth_posterior):
    return draw(growth_posterior, np.linspace(5.5, 7, 4))


COORDS = {"trajectory": ["north", "south"], "channel": ["hare", "lynx"]}


@pytest.fixture(scope="module")
def tree(growth_posterior, here, later):
    return lp.to_datatree(growth_posterior, here, later, key=KEY, num_samples=50, coords=COORDS)


@pytest.fixture(scope="module")
def reopened(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("tree") / "posterior.nc"
    tree.to_netcdf(path)
    with xr.open_datatree(path) as opened:
        return opened.load()


def test_groups(tree):
    assert set(tree.children) == {
        "posterior",
        "posterior_predictive",
        "log_likelihood",
        "predictions",
        "predictions_constant_data",
        "sample_stats",
        "prior",
        "observed_data",
        "constant_data",
    }


def test_parameters_are_named_by_their_path(tree, here):
    assert list(tree["posterior"].data_vars) == ["rate", "gain"]
    assert tree["posterior"]["rate"].dims[:2] == ("chain", "draw")
    np.testing.assert_array_equal(tree["posterior"]["rate"][0], here.thetas[:, :2])
    np.testing.assert_array_equal(tree["posterior"]["gain"][0], here.thetas[:, 2])
    assert tree["prior"]["gain"].shape == (1, 50)


def test_array_parameters_of_a_neural_field_keep_their_shape(neural_posterior):
    tree = lp.to_datatree(neural_posterior, key=KEY, num_samples=7)
    assert tree["posterior"]["vector_field.mlp.layers[0].weight"].shape == (1, 7, 5, 2)
    assert set(tree.children) == {"posterior", "prior", "observed_data", "constant_data"}


def test_prior_draws(growth, quiet):
    problem = lp.Problem(growth.problem.data, lp.LogNormal(0.1), lp.GaussianPrior(np.full(3, 25.0), mean=3.0))
    posterior = quiet(growth.model, problem, curvature="ggn")
    prior = lp.to_datatree(posterior, key=KEY, num_samples=2000)["prior"]["gain"]
    np.testing.assert_allclose(prior.mean(), 3.0, atol=5 * 0.2 / np.sqrt(2000))
    np.testing.assert_allclose(prior.std(), 0.2, rtol=5 / np.sqrt(4000))


def test_dims_and_coordinates(tree, here, later, growth):
    data = growth.problem.data
    dims = ("chain", "draw", "trajectory", "time", "channel")
    for group, item in (("posterior_predictive", here), ("predictions", later)):
        for name, draws in (("y", item.predictive), ("f", item.epistemic)):
            variable = tree[group][name]
            assert variable.dims == dims
            np.testing.assert_array_equal(variable[0], draws)
            np.testing.assert_array_equal(variable["time"], item.ts[0])
            assert list(variable["trajectory"].values) == COORDS["trajectory"]
            assert list(variable["channel"].values) == COORDS["channel"]
    assert tree["observed_data"]["y"].dims == dims[2:]
    np.testing.assert_array_equal(tree["observed_data"]["y"], data.ys)
    np.testing.assert_array_equal(tree["constant_data"]["y0"], data.y0)
    np.testing.assert_array_equal(tree["constant_data"]["ts"], data.ts)
    np.testing.assert_array_equal(tree["predictions_constant_data"]["ts"], later.ts)


def test_log_likelihood_is_that_of_the_noise_free_draws(tree, here, growth):
    found = tree["log_likelihood"]["y"]
    assert found.dims == ("chain", "draw", "trajectory", "time", "channel")
    expected = growth.problem.likelihood.log_prob(here.epistemic, growth.problem.data.ys)
    np.testing.assert_allclose(found[0], expected, rtol=1e-14)


def test_observations_that_no_draw_changes_have_no_place_in_the_log_likelihood(growth, here, growth_posterior):
    """At the time of a given initial state, say; az.loo finds no tail to fit there."""
    fixed = eqx.tree_at(lambda p: p.epistemic, here, here.epistemic.at[:, :, 0].set(1.0))
    found = lp.to_datatree(growth_posterior, fixed)["log_likelihood"]["y"]
    assert found.dims == ("chain", "draw", "observation") and found.sizes["observation"] == 32
    assert not np.any(found["time"] == 0.0)
    expected = growth.problem.likelihood.log_prob(here.epistemic, growth.problem.data.ys)[:, :, 1:]
    np.testing.assert_allclose(found[0], expected.reshape(200, -1), rtol=1e-14)


def test_sample_stats(tree, here):
    stats = tree["sample_stats"]
    assert np.all(stats["success"])
    for name in ("log_p", "log_q", "log_weights"):
        np.testing.assert_array_equal(stats[name][0], getattr(here, name))
    assert stats.attrs["khat"] == here.khat and stats.attrs["num_failed"] == 0
    assert tree["posterior"].attrs["inference_library"] == "laplode"


def test_round_trip_keeps_every_value(tree, reopened):
    assert set(reopened.children) == set(tree.children)
    for group in tree.children:
        xr.testing.assert_equal(reopened[group].to_dataset(), tree[group].to_dataset())


def test_summary(reopened, here):
    summary = az.summary(reopened, round_to="none")
    assert list(summary.index) == NAMES
    np.testing.assert_allclose(summary["mean"].to_numpy(float), here.thetas.mean(axis=0), rtol=1e-12)


def test_summary_of_predictions(reopened):
    summary = az.summary(reopened, group="predictions", var_names=["f"])
    assert len(summary) == 2 * 4 * 2
    assert "f[south, 7.0, lynx]" in summary.index


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")  # few observations
def test_loo(reopened):
    found = az.loo(reopened)
    assert np.isfinite(found.elpd) and found.n_data_points == 36


@pytest.mark.filterwarnings("ignore:Deleting a single level of a MultiIndex:FutureWarning")  # inside arviz-plots
def test_plot_ppc_dist(reopened):
    az.plot_ppc_dist(reopened, num_samples=20, backend="matplotlib")


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")  # few observations
@pytest.mark.filterwarnings("ignore:Deleting a single level of a MultiIndex:FutureWarning")  # inside arviz-plots
def test_missing_values(growth, here, quiet, tmp_path):
    data = growth.problem.data
    ys = data.ys.copy()
    ys[0, 3, 1] = ys[1, :2, 0] = np.nan
    problem = lp.Problem(lp.Trajectories(data.ts, ys, data.y0), growth.problem.likelihood, 1.0)
    posterior = quiet(growth.model, problem, curvature="ggn")
    predictions = draw(posterior, data.ts)
    lp.to_datatree(posterior, predictions).to_netcdf(tmp_path / "missing.nc")
    with xr.open_datatree(tmp_path / "missing.nc") as opened:
        tree = opened.load()
    found = tree["log_likelihood"]["y"]
    assert found.dims == ("chain", "draw", "observation") and found.sizes["observation"] == 33
    expected = problem.likelihood.log_prob(predictions.epistemic, ys)
    at = (found["trajectory"] == 1) & (found["time"] == data.ts[0, 1]) & (found["channel"] == 1)
    assert at.sum() == 1
    np.testing.assert_allclose(found[0, :, np.flatnonzero(at)[0]], expected[:, 1, 1, 1], rtol=1e-14)
    assert az.loo(tree, var_name="y").n_data_points == 33
    assert np.isnan(tree["observed_data"]["y"].values).sum() == 3
    az.plot_ppc_dist(tree, num_samples=20, backend="matplotlib")


def test_times_that_differ_between_trajectories_are_indices(growth, quiet):
    data = growth.problem.data
    ts = data.ts + 0.1 * np.arange(9) * np.array([[0.0], [1.0]])
    problem = lp.Problem(lp.Trajectories(ts, data.ys, data.y0), growth.problem.likelihood, 1.0)
    posterior = quiet(growth.model, problem, curvature="ggn")
    tree = lp.to_datatree(posterior, draw(posterior, ts))
    np.testing.assert_array_equal(tree["posterior_predictive"]["time"], np.arange(9))
    np.testing.assert_array_equal(tree["constant_data"]["ts"], ts)


def test_failed_draws_are_left_out_and_counted(growth_posterior, here):
    broken = eqx.tree_at(lambda p: p.ok, here, here.ok.at[np.array([3, 5])].set(False))
    with pytest.warns(lp.LaplodeWarning, match="2 of 200 draws .* left out"):
        tree = lp.to_datatree(growth_posterior, broken)
    assert tree["posterior"].sizes["draw"] == tree["posterior_predictive"].sizes["draw"] == 198
    np.testing.assert_array_equal(tree["posterior"]["gain"][0], np.delete(here.thetas[:, 2], [3, 5]))
    assert tree["sample_stats"].attrs["num_failed"] == 2
    none = eqx.tree_at(lambda p: p.ok, here, here.ok & False)
    with pytest.raises(lp.LaplodeError, match="no draw whose solve succeeded"):
        lp.to_datatree(growth_posterior, none)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(coords={"time": [1]}), '`coords` may name "trajectory", "channel" and "state", got \'time\''),
        (dict(coords={"channel": ["hare"]}), "`coords` has 1 names for channel, but there are 2"),
    ],
)
def test_bad_coords(growth_posterior, here, options, match):
    with pytest.raises(lp.LaplodeError, match=match):
        lp.to_datatree(growth_posterior, here, **options)


def test_bad_input(growth_posterior, here, later):
    with pytest.raises(lp.LaplodeError, match="`posterior` must come from"):
        lp.to_datatree(here)
    with pytest.raises(lp.LaplodeError, match="`predictions` must come from"):
        lp.to_datatree(growth_posterior, growth_posterior)
    with pytest.raises(lp.LaplodeError, match="`predictions` holds 2 on the observed times"):
        lp.to_datatree(growth_posterior, here, here)
    with pytest.raises(lp.LaplodeError, match="`key` is needed"):
        lp.to_datatree(growth_posterior)


def test_predictions_must_share_their_draws(growth_posterior, here):
    ts = np.linspace(5.5, 7, 4)
    with pytest.raises(lp.LaplodeError, match="`predictions` differ"):
        lp.to_datatree(growth_posterior, here, draw(growth_posterior, ts, num_samples=100))
    # As many draws, but not the same ones: the parameters would be paired with another draw's trajectory.
    with pytest.raises(lp.LaplodeError, match="`predictions` differ"):
        lp.to_datatree(growth_posterior, here, draw(growth_posterior, ts, key=jax.random.key(9)))

"""What ArviZ is given, and that it can work with it, also after a round trip through a file."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import laplode as lp
from laplode._algebra.precision import DiagonalPrecision
from laplode._model.parameters import parameters

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
    return draw(growth_posterior, growth_posterior.problem.data.ts, weigh=True)


@pytest.fixture(scope="module")
def later(growth_posterior):
    return draw(growth_posterior, np.linspace(5.5, 7, 4))


COORDS = {"trajectory": ["north", "south"], "channel": ["hare", "lynx"], "state": ["a", "b"]}


@pytest.fixture(scope="module")
def sampled(growth_posterior):
    return draw(growth_posterior, growth_posterior.problem.data.ts, method="sampled", key=jax.random.key(1))


@pytest.fixture(scope="module")
def history(growth):
    """As `fit` and `refine` return it."""
    restarts = dict(horizons=((3, 2), (9, 3)), restart_losses=np.array([-1.5, np.nan]))
    first = lp.Fit(growth.model, np.arange(4.0), growth.problem, -1.5, "interrupted", 4, **restarts)
    refined = lp.Fit(growth.model, np.array([-1.5, -2.0]), growth.problem, -2.0, "converged", 2, newton_decrement=1e-9)
    return [first, refined]


@pytest.fixture(scope="module")
def tree(growth_posterior, here, later, sampled, history):
    return lp.to_datatree(
        growth_posterior,
        here,
        later,
        fit=history,
        key=KEY,
        num_samples=50,
        prior_predictive=True,
        coords=COORDS,
        progress=False,
        sampled=[sampled],
    )


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
        "prior_predictive",
        "observed_data",
        "constant_data",
        "fit_history",
        "sampled",
    }
    inside = {"posterior", "posterior_predictive", "log_likelihood", "sample_stats", "observed_data", "constant_data"}
    assert set(tree["sampled"].children) == inside


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


class Haiku(eqx.Module):
    params: dict

    def __call__(self, ts, y0):
        return y0 * jnp.exp(self.params["linear/~/w"] * ts[:, None])


def test_names_with_a_slash_come_through(growth, quiet, tmp_path):
    posterior = quiet(Haiku({"linear/~/w": jnp.zeros(2)}), growth.problem, curvature="ggn")
    tree = lp.to_datatree(posterior, draw(posterior, growth.problem.data.ts), key=KEY, num_samples=5)
    (name,) = tree["posterior"].data_vars
    assert name == "params['linear.~.w']" and tree["prior"][name].shape == (1, 5, 2)
    tree.to_netcdf(tmp_path / "tree.nc")
    with xr.open_datatree(tmp_path / "tree.nc") as opened:
        np.testing.assert_array_equal(opened["posterior"][name], tree["posterior"][name])


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
        for name, draws in (("y", item.y), ("f", item.f)):
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
    expected = growth.problem.likelihood.log_prob(here.f, growth.problem.data.ys)
    np.testing.assert_allclose(found[0], expected, rtol=1e-14)


def test_observations_that_no_draw_changes_have_no_place_in_the_log_likelihood(growth, here, growth_posterior):
    """At the time of a given initial state, say; az.loo finds no tail to fit there."""
    fixed = eqx.tree_at(lambda p: p.log_likelihood, here, here.log_likelihood.at[:, :, 0].set(-1.0))
    found = lp.to_datatree(growth_posterior, fixed)["log_likelihood"]["y"]
    assert found.dims == ("chain", "draw", "observation") and found.sizes["observation"] == 32
    assert not np.any(found["time"] == 0.0)
    expected = growth.problem.likelihood.log_prob(here.f, growth.problem.data.ys)[:, :, 1:]
    np.testing.assert_allclose(found[0], expected.reshape(200, -1), rtol=1e-14)


def test_sample_stats(tree, here):
    stats = tree["sample_stats"]
    assert np.all(stats["success"])
    for name in ("log_p", "log_q", "log_weights"):
        np.testing.assert_array_equal(stats[name][0], getattr(here, name))
    assert stats.attrs["khat"] == here.khat and stats.attrs["num_failed"] == 0
    attrs = tree["posterior"].attrs
    assert attrs["inference_library"] == "laplode" and attrs["method"] == "linearized"
    assert (attrs["curvature"], attrs["structure"], attrs["regularization"]) == ("hessian", "full", "none")
    assert attrs["num_parameters"] == 3 and attrs["parameters"] == "all"


def test_round_trip_keeps_every_value(tree, reopened):
    assert set(reopened.groups) == set(tree.groups)
    for group in tree.groups:
        xr.testing.assert_equal(reopened[group].to_dataset(), tree[group].to_dataset())
        for name, value in tree[group].attrs.items():
            np.testing.assert_array_equal(reopened[group].attrs[name], value)


@pytest.mark.filterwarnings("ignore")  # zarr's own, of what its format does not promise yet
def test_round_trip_through_zarr(growth_posterior, here, tmp_path):
    pytest.importorskip("zarr")
    # An infinite k̂ and names of trajectories, which a text format may stumble over.
    few = eqx.tree_at(lambda p: p.khat, here, float("inf"))
    tree = lp.to_datatree(growth_posterior, few, coords=COORDS, fit=())
    tree.to_zarr(tmp_path / "tree.zarr")
    opened = xr.open_datatree(tmp_path / "tree.zarr", engine="zarr").load()
    for group in tree.groups:
        xr.testing.assert_equal(opened[group].to_dataset(), tree[group].to_dataset())
    assert opened["posterior"].attrs["khat"] == float("inf")


def test_attributes_are_plain(tree):
    """None and bool do not go into every file format, and a file written by one Python is read by another."""
    for group in tree.groups:
        for name, value in tree[group].attrs.items():
            values = value if isinstance(value, list) else [value]
            assert all(type(item) in (str, int, float) for item in values), (group, name, value)


def test_named_predictions_keep_their_own_draws(tree, here, sampled):
    np.testing.assert_array_equal(tree["posterior"]["gain"][0], here.thetas[:, 2])
    np.testing.assert_array_equal(tree["sampled"]["posterior"]["gain"][0], sampled.thetas[:, 2])
    assert tree["sampled"]["posterior"].attrs["method"] == "sampled"
    np.testing.assert_array_equal(tree["sampled"]["posterior_predictive"]["f"][0], sampled.f)
    np.testing.assert_array_equal(tree["sampled"]["sample_stats"]["log_p"][0], sampled.log_p)


def test_the_key_gives_the_same_draws_again(tree, growth_posterior, here):
    key = jax.random.wrap_key_data(np.uint32(tree["posterior_predictive"].attrs["key"]))
    again = draw(growth_posterior, growth_posterior.problem.data.ts, key=key)
    np.testing.assert_array_equal(again.f, here.f)


def test_prior_predictive_is_of_the_draws_of_the_prior(tree, growth):
    """Half of the draws of the prior have a negative gain, at which a LogNormal likelihood has no answer."""
    found, prior = tree["prior_predictive"], tree["prior"]
    gain = prior["gain"][0].values
    assert found.attrs["num_failed"] == np.sum(gain < 0) > 0
    np.testing.assert_array_equal(found["draw"], np.flatnonzero(gain > 0))
    at = int(found["draw"][3])
    model = type(growth.model)(prior["rate"].values[0, at], gain[at])
    for i, y0 in enumerate(growth.problem.data.y0):
        np.testing.assert_allclose(found["f"].sel(draw=at)[0, i], model(growth.problem.data.ts[i], y0), rtol=1e-12)
    noise = np.log(found["y"] / found["f"])
    np.testing.assert_allclose(noise.std(), 0.1, rtol=5 / np.sqrt(2 * noise.size))


def test_fit_history(tree):
    found = tree["fit_history"]
    np.testing.assert_array_equal(found["loss"], [0, 1, 2, 3, -1.5, -2])
    np.testing.assert_array_equal(found["fit"], [0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(found["num_times"], [3, 3, 9, 9, 9, 9])  # interrupted before the last step
    np.testing.assert_array_equal(found["restart_loss"], [-1.5, np.nan])
    assert found.attrs["fit_reason"] == "converged" and found.attrs["fit_loss"] == -2.0


def test_parameters_by_layers(neural_posterior):
    options = dict(key=KEY, num_samples=20)
    every = lp.to_datatree(neural_posterior, **options, parameters="all")
    layers = lp.to_datatree(neural_posterior, **options, parameters="layers")
    assert layers["posterior"].attrs["parameters"] == "layers"
    for group in ("posterior", "prior"):
        weight = every[group]["vector_field.mlp.layers[0].weight"].values.reshape(1, 20, 10)
        # Up to ten entries an array stays whole.
        np.testing.assert_array_equal(
            layers[group]["vector_field.mlp.layers[0].weight"].values.reshape(1, 20, 10), weight
        )
    summary = az.summary(layers, kind="stats")
    assert len(summary) == len(az.summary(every, kind="stats")) == 27


def test_a_large_array_becomes_three_rows(linear_ggn, monkeypatch):
    import laplode._report.datatree as module

    monkeypatch.setattr("laplode._report.layout._SHORT", 5)
    monkeypatch.setattr(module, "_MOST_ROWS", 5)
    monkeypatch.setattr(module, "_BLOCK", 6 * 8)  # eight vectors at a time
    tree = lp.to_datatree(linear_ggn, key=KEY, num_samples=20)
    assert tree["posterior"].attrs["parameters"] == "layers"
    summary = az.summary(tree, kind="stats", round_to="none")
    assert list(summary.index) == [f"vector_field.w[{name}]" for name in ("mean", "std", "norm")]
    every = lp.to_datatree(linear_ggn, key=KEY, num_samples=20, parameters="all")
    w = every["posterior"]["vector_field.w"].values.reshape(20, 6)
    assert len(np.unique(w[:, 0])) == 20  # blocks have keys of their own
    found = tree["posterior"]["vector_field.w"].values[0]
    np.testing.assert_allclose(found, np.stack([w.mean(1), w.std(1), np.linalg.norm(w, axis=1)], axis=1), rtol=1e-12)


def test_a_learned_initial_state_has_the_names_of_states(linear_ggn):
    model = lp.NeuralODE(linear_ggn.parameters.model.vector_field, y0=[1.0, 2.0])
    changed = (parameters(model), DiagonalPrecision(jnp.ones(8)))
    posterior = eqx.tree_at(lambda p: (p.parameters, p.built), linear_ggn, changed)
    tree = lp.to_datatree(posterior, key=KEY, num_samples=5, coords={"channel": ["p", "q"]})
    assert list(tree["posterior"]["y0"]["state"].values) == ["p", "q"]  # without `observe` a channel is a state


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
def test_loo_with_an_approximate_posterior(reopened):
    """Of a posterior that is nearly exact, the correction by log_p and log_q changes little."""
    stats = reopened["sample_stats"]
    found = az.loo_approximate_posterior(reopened, log_p=stats["log_p"], log_q=stats["log_q"])
    assert abs(found.elpd - az.loo(reopened).elpd) < 1


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")  # few observations
def test_compare(reopened, growth, quiet):
    noisy = lp.Problem(growth.problem.data, lp.LogNormal(1.0), 1.0)
    posterior = quiet(growth.model, noisy, curvature="ggn")
    other = lp.to_datatree(posterior, draw(posterior, growth.problem.data.ts))
    table = az.compare({"noisy": other, "linearized": reopened, "sampled": reopened["sampled"]})
    assert list(table.index)[-1] == "noisy" and set(table.index[:2]) == {"linearized", "sampled"}


PANEL = {"channel": "hare", "trajectory": "south"}
RECIPES = {
    "plot_lm": lambda tree, **options: az.plot_lm(
        tree.sel(PANEL), x="ts", y="y", plot_dim="time", ci_prob=[0.5, 0.9], smooth=False, **options
    ),
    "plot_lm of a forecast": lambda tree, **options: az.plot_lm(
        tree.sel(PANEL), x="ts", y="y", plot_dim="time", group="predictions", smooth=False, **options
    ),
    "plot_ppc_dist": lambda tree, **options: az.plot_ppc_dist(tree, num_samples=20, **options),
    "plot_ppc_dist of the prior": lambda tree, **options: az.plot_ppc_dist(
        tree, group="prior_predictive", num_samples=10, **options
    ),
    "plot_ppc_pit": lambda tree, **options: az.plot_ppc_pit(tree.sel(PANEL), var_names="y", **options),
    "plot_khat": lambda tree, **options: az.plot_khat(az.loo(tree, pointwise=True), **options),
    "plot_forest": lambda tree, **options: az.plot_forest(tree, combined=True, **options),
    "plot_pair": lambda tree, **options: az.plot_pair(tree, var_names=["rate", "gain"], **options),
    "plot_loo_pit": lambda tree, **options: az.plot_loo_pit(tree, **options),
    "plot_prior_posterior": lambda tree, **options: az.plot_prior_posterior(tree, **options),
    "plot_ppc_dist of named predictions": lambda tree, **options: az.plot_ppc_dist(
        tree["sampled"], num_samples=10, **options
    ),
}


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")  # few observations
@pytest.mark.filterwarnings("ignore:Deleting a single level of a MultiIndex:FutureWarning")  # inside arviz-plots
@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, reopened):
    picture = RECIPES[name](reopened, backend="none")
    assert set(picture.viz.children) | set(picture.viz.data_vars), "nothing was drawn"


def test_plot_lm_draws_the_data_and_the_mean(reopened, here):
    picture = RECIPES["plot_lm"](reopened, backend="matplotlib", point_estimate="mean")
    line = picture.viz["pe_line"]["ts"].item().get_xydata()
    np.testing.assert_allclose(line[:, 1], here.y[:, 1, :, 0].mean(axis=0), rtol=1e-9)
    points = picture.viz["observed_scatter"]["ts"].item().get_offsets()
    np.testing.assert_allclose(points[:, 1], reopened["observed_data"]["y"].sel(PANEL), rtol=1e-12)


def test_plot_pair_on_a_part_of_the_parameters(growth, quiet):
    posterior = quiet(growth.model, growth.problem, curvature="ggn", where=lambda model: model.rate)
    tree = lp.to_datatree(posterior, key=KEY, num_samples=20)
    assert list(tree["posterior"].data_vars) == ["rate"]
    az.plot_pair(tree, backend="none")


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
    expected = problem.likelihood.log_prob(predictions.f, ys)
    at = (found["trajectory"] == 1) & (found["time"] == data.ts[0, 1]) & (found["channel"] == 1)
    assert at.sum() == 1
    np.testing.assert_allclose(found[0, :, np.flatnonzero(at)[0]], expected[:, 1, 1, 1], rtol=1e-14)
    assert az.loo(tree, var_name="y").n_data_points == 33
    at = {dim: found[dim] for dim in ("trajectory", "time", "channel")}
    flat = tree.copy()
    for group in ("posterior_predictive", "observed_data"):
        flat[group] = xr.DataTree(tree[group].to_dataset().sel(at))
    assert flat["posterior_predictive"]["y"].dims == found.dims
    pit = az.loo_pit(flat)["y"]
    assert pit.dims == ("observation",) and pit.size == 33 and np.all((pit >= 0) & (pit <= 1))
    az.plot_loo_pit(flat, backend="none")
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
    with pytest.raises(lp.LaplodeError, match=r"`predictions` holds 2 on the observed times .* second=other\)"):
        lp.to_datatree(growth_posterior, here, here)
    with pytest.raises(lp.LaplodeError, match="`geodesic` holds 2 on the observed times"):
        lp.to_datatree(growth_posterior, here, geodesic=[here, here])
    with pytest.raises(lp.LaplodeError, match=r"`num_sample` must come from laplode\.predict, got int"):
        lp.to_datatree(growth_posterior, here, num_sample=3)
    with pytest.raises(lp.LaplodeError, match="`prior` can't name predictions"):
        lp.to_datatree(growth_posterior, here, prior=here)
    with pytest.raises(lp.LaplodeError, match="`fit` must come from"):
        lp.to_datatree(growth_posterior, here, fit=growth_posterior)
    with pytest.raises(lp.LaplodeError, match='`parameters` must be one of "all", "layers"'):
        lp.to_datatree(growth_posterior, here, parameters="some")
    with pytest.raises(lp.LaplodeError, match="`key` is needed to draw from the prior"):
        lp.to_datatree(growth_posterior, here, prior_predictive=True)
    with pytest.raises(lp.LaplodeError, match="`key` is needed"):
        lp.to_datatree(growth_posterior)


def test_predictions_must_share_their_draws(growth_posterior, here):
    ts = np.linspace(5.5, 7, 4)
    with pytest.raises(lp.LaplodeError, match="`predictions` differ"):
        lp.to_datatree(growth_posterior, here, draw(growth_posterior, ts, num_samples=100))
    # As many draws, but not the same ones: the parameters would be paired with another draw's trajectory.
    with pytest.raises(lp.LaplodeError, match="`predictions` differ"):
        lp.to_datatree(growth_posterior, here, draw(growth_posterior, ts, key=jax.random.key(9)))

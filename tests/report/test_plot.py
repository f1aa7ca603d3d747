"""Pictures: the right panels with the right things in them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.linalg

import laplode as lp
from laplode._algebra.forms import BlockForm, DenseForm, DiagonalForm, EigenForm

KEY = jax.random.key(0)
COORDS = {"trajectory": ["north", "south"], "channel": ["hare", "lynx"]}


@pytest.fixture(scope="module")
def parts(growth_posterior):
    options = {"key": KEY, "num_samples": 30, "progress": False}
    here = lp.predict(growth_posterior, growth_posterior.problem.data.ts, **options)
    return growth_posterior, here, lp.predict(growth_posterior, np.linspace(5.5, 7, 4), **options)


@pytest.fixture(scope="module")
def tree(parts):
    return lp.to_datatree(*parts, key=KEY, num_samples=400, coords=COORDS)


@pytest.fixture(scope="module")
def linear_forecast(linear_ggn):
    return lp.predict(linear_ggn, np.linspace(0, 4, 9), key=KEY, num_samples=50, progress=False)


def legend(picture):
    return [text.get_text() for text in picture.get_viz("figure").legends[0].get_texts()]


def drawn(picture, label):
    """What ArviZ's collection keeps under a label, of whatever variable, by panel."""
    return next(iter(picture.viz[label].to_dataset().data_vars.values())).to_numpy()


def offsets(scatter):
    return np.asarray(scatter.get_offsets())


# ---- Trajectories


def test_a_panel_for_each_trajectory_and_channel(parts):
    posterior, here, later = parts
    picture = lp.plot_trajectories(posterior, here, later)
    assert picture.viz["plot"].dims == ("trajectory", "channel") and picture.viz["plot"].shape == (2, 2)
    data, points, horizons = posterior.problem.data, drawn(picture, "data"), drawn(picture, "horizon")
    for i in range(2):
        for k in range(2):
            panel = picture.viz["plot"].to_numpy()[i, k]
            assert points[i, k].axes is panel and horizons[i, k].axes is panel
            np.testing.assert_array_equal(offsets(points[i, k]), np.stack([data.ts[i], data.ys[i, :, k]], axis=-1))
            assert horizons[i, k].get_xdata()[0] == 4.0
    assert {"data", "last observation fitted", "median", "draws", "90% noise-free"} <= set(legend(picture))


def test_profiles_of_forecasts_are_dotted_lines(parts):
    posterior, _, later = parts
    profiles = lp.profile(posterior, lp.trajectory_at([5.5, 6.5], channel=1, trajectory=1), num=4, progress=False)
    assert [each.place.time for each in profiles] == [5.5, 6.5]
    picture = lp.plot_trajectories(posterior, later, profiles=profiles)
    low, high = drawn(picture, "profile_low")[1, 1], drawn(picture, "profile_high")[1, 1]
    np.testing.assert_allclose(low.get_xydata(), [(each.place.time, each.intervals[0][0]) for each in profiles])
    np.testing.assert_allclose(high.get_ydata(), [each.intervals[0][1] for each in profiles])
    assert "95% profile" in legend(picture) and drawn(picture, "profile_low")[0, 0] is None
    with pytest.raises(lp.LaplodeError, match="`profiles`"):
        lp.plot_trajectories(posterior, later, profiles=[later])


def test_a_datatree_and_its_parts_give_the_same_picture(parts, tree):
    one, other = lp.plot_trajectories(tree), lp.plot_trajectories(*parts)
    for label in ("median", "median_forecast"):
        for a, b in zip(drawn(one, label).flat, drawn(other, label).flat, strict=True):
            np.testing.assert_array_equal(a.get_xydata(), b.get_xydata())
    assert one.viz["plot"].to_numpy()[1, 1].get_title() == "lynx, south"


def test_ribbons_are_central_quantiles(parts):
    posterior, here, _ = parts
    picture = lp.plot_trajectories(posterior, here, prob=0.5, num_draws=3)
    for label, draws in (("ribbon", here.f), ("noise_ribbon", here.y)):
        low, high = np.quantile(draws[:, 1, :, 0], [0.25, 0.75], axis=0)
        vertices = drawn(picture, label)[1, 0].get_paths()[0].vertices
        at = vertices[vertices[:, 0] == here.ts[1, 4]][:, 1]
        np.testing.assert_allclose([at.min(), at.max()], [low[4], high[4]], rtol=1e-12)
    median = drawn(picture, "median")[1, 0].get_xydata()
    np.testing.assert_allclose(median, np.stack([here.ts[1], np.median(here.f[:, 1, :, 0], axis=0)], axis=-1))
    lines = drawn(picture, "draws")[1, 0].get_segments()
    assert len(lines) == 3
    np.testing.assert_array_equal(lines[2][:, 1], here.f[2, 1, :, 0])


def test_a_choice_of_trajectories_on_given_axes(parts):
    _, given = plt.subplots(1, 2, layout="constrained")
    picture = lp.plot_trajectories(*parts, trajectories=[1], axes=given, labels={"time": "year", "y": "pelts"})
    assert picture.viz["plot"].shape == (1, 2) and picture.viz["plot"].to_numpy()[0, 0] is given[0]
    assert (given[0].get_xlabel(), given[0].get_ylabel()) == ("year", "pelts")
    points = drawn(picture, "data")[0, 1]
    assert points.axes is given[1]
    np.testing.assert_array_equal(offsets(points)[:, 1], parts[0].problem.data.ys[1, :, 1])


def test_held_out_trajectories(parts):
    posterior, here, later = parts
    held_out = lp.Trajectories([5.5, 7.0], np.arange(8.0).reshape(2, 2, 2))
    picture = lp.plot_trajectories(posterior, here, later, held_out=held_out)
    assert "held out" in legend(picture)
    np.testing.assert_array_equal(offsets(drawn(picture, "held_out")[1, 0]), [[5.5, 4.0], [7.0, 6.0]])


def test_forecast_alone_and_no_line_without_forecast(parts):
    posterior, here, later = parts
    assert "last observation fitted" in legend(lp.plot_trajectories(posterior, later))
    assert "last observation fitted" not in legend(lp.plot_trajectories(posterior, here))


def test_new_initial_states_have_no_data(parts):
    posterior, _, _ = parts
    new = lp.predict(posterior, [0.0, 1.0], np.ones((3, 2)), key=KEY, num_samples=30, progress=False)
    picture = lp.plot_trajectories(posterior, new)
    assert picture.viz["plot"].shape == (3, 2)
    assert "data" not in legend(picture)


def test_bad_input(parts):
    posterior, here, _ = parts
    with pytest.raises(lp.LaplodeError, match="`source` must be"):
        lp.plot_trajectories(here)
    with pytest.raises(lp.LaplodeError, match="`source` has no predictions"):
        lp.plot_trajectories(lp.to_datatree(posterior, key=KEY))
    for prob in (0.0, 1.0, 90):
        with pytest.raises(lp.LaplodeError, match="`prob` must lie between 0 and 1"):
            lp.plot_trajectories(posterior, here, prob=prob)
    with pytest.raises(lp.LaplodeError, match="`trajectories`"):
        lp.plot_trajectories(posterior, here, trajectories=[7])
    with pytest.raises(lp.LaplodeError, match='`backend` must be one of "matplotlib"'):
        lp.plot_trajectories(posterior, here, backend="gnuplot")
    with pytest.raises(lp.LaplodeError, match="`axes` must be 4, of shape"):
        lp.plot_trajectories(posterior, here, axes=plt.subplots(1, 2)[1])
    with pytest.raises(lp.LaplodeError, match="`axes` are Matplotlib's"):
        lp.plot_trajectories(posterior, here, axes=plt.subplots(2, 2)[1], backend="plotly")


# ---- Other backends


def test_plotly(parts, linear_ggn, linear_forecast, tree):
    pytest.importorskip("plotly")
    pytest.importorskip("webcolors")  # which arviz-plots needs for it
    posterior, here, _ = parts
    picture = lp.plot_trajectories(posterior, here, backend="plotly")
    median = drawn(picture, "median")[1, 0]
    np.testing.assert_allclose(median.y, np.median(here.f[:, 1, :, 0], axis=0))
    assert "<html>" in picture.get_viz("figure").to_html()
    spectrum = lp.plot_spectrum(linear_ggn, backend="plotly")
    assert spectrum.get_viz("figure").layout.yaxis.type == "log"
    lp.plot_phase(linear_ggn, linear_forecast, backend="plotly")
    lp.plot_marginals(tree, backend="plotly")


def test_bokeh(parts, linear_ggn, linear_forecast, tree):
    pytest.importorskip("bokeh")
    posterior, here, _ = parts
    picture = lp.plot_trajectories(posterior, here, backend="bokeh")
    median = drawn(picture, "median")[1, 0].data_source.data
    np.testing.assert_allclose(next(v for k, v in median.items() if "y" in k), np.median(here.f[:, 1, :, 0], 0))
    spectrum = lp.plot_spectrum(linear_ggn, backend="bokeh")
    assert type(spectrum.get_target(None, {}).y_scale).__name__ == "LogScale"
    lp.plot_phase(linear_ggn, linear_forecast, backend="bokeh")
    lp.plot_marginals(tree, backend="bokeh")


def test_a_backend_that_is_not_installed(parts, monkeypatch):
    import laplode._report.plot.shared as module

    def missing(name):
        raise ModuleNotFoundError("No module named 'plotly'")

    monkeypatch.setattr(module, "import_module", missing)
    with pytest.raises(lp.LaplodeError, match=r'not installed: pip install "arviz-plots\[plotly\]"'):
        lp.plot_trajectories(*parts, backend="plotly")


# ---- Phase portrait


def test_phase_portrait(linear_ggn, linear_forecast):
    data, draws = linear_ggn.problem.data, np.asarray(linear_forecast.f)[:, 0]
    picture = lp.plot_phase(linear_ggn, linear_forecast, num_draws=4, prob=0.8, labels={0: "p", 1: "q"})
    panel = picture.get_target(None, {})
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("p", "q")
    np.testing.assert_array_equal(picture.viz["median"]["f"].item().get_xydata(), np.median(draws, axis=0))
    np.testing.assert_array_equal(offsets(picture.viz["data"]["f"].item()), data.ys[0])
    # The last observation is at 3, so that forecasts are the times 3, 3.5 and 4, joined to what was before.
    forecast = picture.viz["draws_forecast"]["f"].item().get_xydata().reshape(4, 4, 2)
    np.testing.assert_array_equal(forecast[:, :3], draws[:4, 6:])
    assert np.all(np.isnan(forecast[:, 3]))
    np.testing.assert_array_equal(picture.viz["draws"]["f"].item().get_xydata().reshape(4, 8, 2)[:, :7], draws[:4, :7])
    # Rings: the Mahalanobis distance from the mean is that of a chi-squared.
    ring = picture.viz["rings"]["f"].item().get_xydata().reshape(6, 42, 2)[-1, :41] - draws[:, -1].mean(axis=0)
    distance = np.sum(ring @ np.linalg.inv(np.cov(draws[:, -1].T)) * ring, axis=1)
    np.testing.assert_allclose(distance, -2 * np.log(0.2), rtol=1e-9)


def test_arrows_point_along_the_field(linear_ggn, linear_forecast):
    """dy/dt = w φ(t) is the same at all states, here that of t = 0: all arrows are parallel."""
    picture = lp.plot_phase(linear_ggn, linear_forecast)
    labels = [label for label in ("field", "field_uncertain", "field_unknown") if label in picture.viz.children]
    arrows = np.concatenate([picture.viz[label]["f"].item().get_xydata().reshape(-1, 6, 2) for label in labels])
    assert len(arrows) == 15**2
    along = arrows[:, 1] - arrows[:, 0]
    field = np.asarray(linear_ggn.parameters.model.vector_field(0.0, jnp.zeros(2), None))
    np.testing.assert_allclose(along[:, 0] * field[1], along[:, 1] * field[0], atol=1e-9)
    assert np.all(along @ field > 0)


def test_phase_portrait_of_a_model_without_a_known_field(parts):
    posterior, here, _ = parts
    picture = lp.plot_phase(posterior, here, trajectory=1, channels=(1, 0))
    assert not {"field", "field_unknown", "draws_forecast"} & set(picture.viz.children)
    np.testing.assert_array_equal(offsets(picture.viz["data"]["f"].item()), posterior.problem.data.ys[1, :, ::-1])
    # LogNormal: rings are ellipses of the logarithm, and stay where the likelihood can be.
    assert np.nanmin(picture.viz["rings"]["f"].item().get_xydata()) > 0
    for match, options in (
        ("`field`", dict(field=True)),
        ("`channels`", dict(channels=(0, 2))),
        ("`channels` must be two of", dict(channels=(0, 0))),
        ("`trajectory`", dict(trajectory=2)),
    ):
        with pytest.raises(lp.LaplodeError, match=match):
            lp.plot_phase(posterior, here, **options)
    with pytest.raises(lp.LaplodeError, match="`predictions`"):
        lp.plot_phase(posterior)


# ---- Spectrum


def spectrum(picture, label):
    return offsets(picture.viz[label]["f"].item())[:, 1]


def test_spectrum_of_a_linear_problem(linear, linear_ggn):
    picture = lp.plot_spectrum(linear_ggn)
    expected = np.linalg.eigvalsh(linear.precision - 2.0 * np.eye(6))[::-1]
    np.testing.assert_allclose(spectrum(picture, "eigenvalues"), expected, rtol=1e-9)
    assert picture.viz["prior"]["f"].item().get_ydata()[0] == 2.0
    dof = np.sum(expected / (expected + 2.0))
    np.testing.assert_allclose(picture.viz["effective_dof"]["f"].item().get_xdata()[0], dof, rtol=1e-9)
    assert "negative" not in picture.viz.children and "prior precision 2" in legend(picture)


MATRIX = np.array([[4.0, 1.0, 0.0], [1.0, -2.0, 0.5], [0.0, 0.5, 0.3]])
BLOCKS = MATRIX * np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]])
EIGENVALUES, VECTORS = np.linalg.eigh(MATRIX)
CURVATURES = {
    "full": (MATRIX, DenseForm(MATRIX[None], 0.0)),
    "low rank": (MATRIX, EigenForm(VECTORS.T, EIGENVALUES)),
    "blocks": (BLOCKS, BlockForm((DenseForm(MATRIX[None, :2, :2], 0.0), DenseForm(MATRIX[None, 2:, 2:], 0.0)))),
    "diagonal": (np.diag(np.diag(MATRIX)), DiagonalForm(np.diag(MATRIX)[None])),
}


@pytest.mark.parametrize("name", CURVATURES)
def test_spectrum_of_an_indefinite_hessian(growth_posterior, name):
    """With a prior of its own for each parameter: eigenvalues in units of the prior, negative ones apart."""
    matrix, curvature = CURVATURES[name]
    precision = np.array([1.0, 2.0, 30.0])
    where = lambda p: (p.form, p.problem.prior)
    posterior = eqx.tree_at(where, growth_posterior, (curvature, lp.GaussianPrior(precision)))
    expected = np.linalg.eigvalsh(matrix / np.sqrt(np.outer(precision, precision)))[::-1]
    picture = lp.plot_spectrum(posterior)
    np.testing.assert_allclose(spectrum(picture, "eigenvalues"), expected[:2], rtol=1e-9)
    np.testing.assert_allclose(spectrum(picture, "negative"), -expected[2:], rtol=1e-9)
    assert picture.viz["prior"]["f"].item().get_ydata()[0] == 1.0
    assert "negative ones, absolute value" in legend(picture)


def test_spectrum_with_a_prior_in_which_parameters_depend_on_one_another(growth_posterior):
    prior = growth_posterior.as_prior()
    before = np.diag(prior.precision) + np.asarray(prior.rows).T @ np.asarray(prior.rows)
    where = lambda p: (p.form, p.problem.prior)
    posterior = eqx.tree_at(where, growth_posterior, (DenseForm(MATRIX[None], 0.0), prior))
    expected = scipy.linalg.eigh(MATRIX, before, eigvals_only=True)[::-1]
    picture = lp.plot_spectrum(posterior)
    np.testing.assert_allclose(spectrum(picture, "eigenvalues"), expected[:2], rtol=1e-8)
    np.testing.assert_allclose(spectrum(picture, "negative"), -expected[2:], rtol=1e-8)
    assert picture.viz["prior"]["f"].item().get_ydata()[0] == 1.0


def test_spectrum_of_no_posterior(growth_posterior):
    with pytest.raises(lp.LaplodeError, match="`posterior` must come from"):
        lp.plot_spectrum(growth_posterior.parameters)


# ---- Correlation in time


def correlations(figure):
    return [
        [np.ma.filled(p.collections[0].get_array(), np.nan) for p in row] for row in np.reshape(figure.axes[:4], (2, 2))
    ]


def test_time_correlation_is_that_of_the_closed_form(linear_forecast):
    picture = lp.plot_time_correlation(linear_forecast, labels={0: "p", 1: "q", "time": "hour"})
    covariance = np.asarray(linear_forecast.covariance()[0]).reshape(9, 2, 9, 2)
    mesh = correlations(picture)
    np.testing.assert_allclose(mesh[0][1][1:, 1:], 0.0, atol=1e-9)  # channels are independent here
    shown = mesh[1][1]
    assert np.all(np.isnan(shown[0])) and np.all(np.isnan(shown[:, 0]))  # the given initial state
    q = covariance[1:, 1, 1:, 1]
    expected = q / np.sqrt(np.outer(np.diag(q), np.diag(q)))
    np.testing.assert_allclose(shown[1:, 1:], expected, rtol=1e-9)
    assert (picture.axes[2].get_xlabel(), picture.axes[0].get_ylabel()) == ("p, hour", "p, hour")


def test_time_correlation_of_draws(parts):
    later = lp.predict(parts[0], np.linspace(5.5, 7, 4), key=KEY, num_samples=30, method="sampled", progress=False)
    picture = lp.plot_time_correlation(later, trajectory=1)
    draws = np.asarray(later.f)[np.asarray(later.ok), 1]
    expected = np.corrcoef(draws.reshape(len(draws), -1).T).reshape(4, 2, 4, 2)
    np.testing.assert_allclose(correlations(picture)[0][1], expected[:, 0, :, 1], rtol=1e-9)
    assert picture.axes[3].get_xlabel() == "channel 1, time"
    with pytest.raises(lp.LaplodeError, match="`trajectory`"):
        lp.plot_time_correlation(later, trajectory=2)
    with pytest.raises(lp.LaplodeError, match="`predictions` must come from"):
        lp.plot_time_correlation(parts[0])


# ---- Marginals


def test_marginals_are_densities_of_the_draws(tree):
    picture = lp.plot_marginals(tree)
    assert list(picture.viz["plot"]["parameter"].values) == ["rate[0]", "rate[1]", "gain"]
    for i, name in enumerate(("rate", "rate", "gain")):
        draws = tree["posterior"][name].values[0].reshape(30, -1)[:, i % 2 if name == "rate" else 0]
        x, density = drawn(picture, "posterior")[i].get_xydata().T
        np.testing.assert_allclose(np.trapezoid(density, x), 1.0, rtol=0.02)
        np.testing.assert_allclose(np.trapezoid(density * x, x), draws.mean(), atol=0.2 * draws.std())
        # The prior is Normal(0, 1), and level where the posterior is.
        x, density = drawn(picture, "prior")[i].get_xydata().T
        np.testing.assert_allclose(density.mean(), np.exp(-(x.mean() ** 2) / 2) / np.sqrt(2 * np.pi), rtol=0.25)
    assert picture.viz["plot"].to_numpy()[2].get_title().startswith("gain\nsd 0.0")


def test_a_choice_of_marginals(growth_posterior, tree):
    assert list(lp.plot_marginals(tree, num=1).viz["plot"]["parameter"].values) == ["rate[0]"]
    assert lp.plot_marginals(growth_posterior, key=KEY, names=["gain", "rate[1]"]).viz["plot"].size == 2
    assert lp.plot_marginals(tree, names=["rate"]).viz["plot"].size == 2
    with pytest.raises(lp.LaplodeError, match="there is no parameter 'loss'; there are rate"):
        lp.plot_marginals(tree, names=["loss"])
    with pytest.raises(lp.LaplodeError, match="`key` is needed"):
        lp.plot_marginals(growth_posterior)
    layers = lp.to_datatree(growth_posterior, key=KEY, num_samples=5, parameters="layers")
    with pytest.raises(lp.LaplodeError, match="by layers"):
        lp.plot_marginals(layers)

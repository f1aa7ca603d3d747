"""Pictures: the right panels with the right things in them."""

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

import laplode as lp

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def parts(growth_posterior):
    options = {"key": KEY, "num_samples": 30, "progress": False}
    here = lp.predict(growth_posterior, growth_posterior.problem.data.ts, **options)
    return growth_posterior, here, lp.predict(growth_posterior, np.linspace(5.5, 7, 4), **options)


def labels(ax):
    return ax.get_legend_handles_labels()[1]


def test_a_panel_for_each_trajectory_and_channel(parts):
    posterior, here, later = parts
    axes = lp.plot_trajectories(posterior, here, later)
    assert axes.shape == (2, 2)
    data = posterior.problem.data
    for i in range(2):
        for k in range(2):
            points = next(line for line in axes[i, k].lines if line.get_label() == "data")
            np.testing.assert_array_equal(points.get_xdata(), data.ts[i])
            np.testing.assert_array_equal(points.get_ydata(), data.ys[i, :, k])
            assert "last observation fitted" in labels(axes[i, k])
    horizon = next(line for line in axes[0, 0].lines if line.get_label() == "last observation fitted")
    assert horizon.get_xdata()[0] == 4.0


def test_a_datatree_and_its_parts_give_the_same_picture(parts):
    tree = lp.to_datatree(*parts, coords={"trajectory": ["north", "south"], "channel": ["hare", "lynx"]})
    axes = lp.plot_trajectories(tree)
    again = lp.plot_trajectories(*parts)
    assert len(axes[1, 0].lines) == len(again[1, 0].lines)
    assert axes[1, 1].get_title() == "lynx, south"


def test_ribbons_are_central_quantiles(parts):
    posterior, here, _ = parts
    ax = lp.plot_trajectories(posterior, here, prob=0.5)[1, 0]
    ribbon = next(c for c in ax.collections if c.get_label() == "50% noise-free")
    low, high = np.quantile(here.epistemic[:, 1, :, 0], [0.25, 0.75], axis=0)
    vertices = ribbon.get_paths()[0].vertices
    at = vertices[vertices[:, 0] == here.ts[1, 4]][:, 1]
    np.testing.assert_allclose([at.min(), at.max()], [low[4], high[4]], rtol=1e-12)


def test_a_choice_of_trajectories_on_given_axes(parts):
    _, given = plt.subplots(1, 2)
    axes = lp.plot_trajectories(*parts, trajectories=[1], axes=given, labels={"time": "year", "y": "pelts"})
    assert axes.shape == (1, 2) and axes[0, 0] is given[0]
    assert (given[0].get_xlabel(), given[0].get_ylabel()) == ("year", "pelts")
    points = next(line for line in given[1].lines if line.get_label() == "data")
    np.testing.assert_array_equal(points.get_ydata(), parts[0].problem.data.ys[1, :, 1])


def test_held_out_trajectories(parts):
    posterior, here, later = parts
    held_out = lp.Trajectories([5.5, 7.0], np.ones((2, 2, 2)))
    axes = lp.plot_trajectories(posterior, here, later, held_out=held_out)
    assert "held out" in labels(axes[1, 1])


def test_forecast_alone_and_no_line_without_forecast(parts):
    posterior, here, later = parts
    assert "last observation fitted" in labels(lp.plot_trajectories(posterior, later)[0, 0])
    assert "last observation fitted" not in labels(lp.plot_trajectories(posterior, here)[0, 0])


def test_new_initial_states_have_no_data(parts):
    posterior, _, _ = parts
    new = lp.predict(posterior, [0.0, 1.0], np.ones((3, 2)), key=KEY, num_samples=30, progress=False)
    axes = lp.plot_trajectories(posterior, new)
    assert axes.shape == (3, 2)
    assert "data" not in labels(axes[0, 0])


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

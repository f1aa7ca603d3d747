"""Data as people have them: tables, lists of different lengths, dates, dicts."""

import jax
import numpy as np
import pandas as pd
import pytest

import laplode as lp

WIDE = pd.DataFrame(
    {
        "who": ["b", "b", "b", "a", "a"],
        "day": [0.0, 2.0, 1.0, 0.0, 3.0],
        "prey": [1.0, 3.0, 2.0, 5.0, np.nan],
        "predator": [4.0, 6.0, np.nan, 7.0, 8.0],
        "dose": [1.0, 1.0, 1.0, 2.0, 2.0],
    }
)
LONG = WIDE.melt(["who", "day", "dose"], ["prey", "predator"], "species", "number").dropna()


@pytest.mark.parametrize(
    "data",
    [
        lp.Trajectories.from_dataframe(
            WIDE, time="day", channels=["prey", "predator"], trajectory="who", y0=["prey", "predator"], args="dose"
        ),
        lp.Trajectories.from_dataframe(
            LONG, time="day", channels="species", value="number", trajectory="who", y0=["prey", "predator"], args="dose"
        ),
    ],
    ids=["wide", "long"],
)
def test_tables(data):
    assert data.trajectories == ("b", "a") and data.channels == ("prey", "predator")
    np.testing.assert_array_equal(data.ts, [[0, 1, 2], [0, 1.5, 3]])
    np.testing.assert_array_equal(data.ys[0], [[1, 4], [2, np.nan], [3, 6]])
    np.testing.assert_array_equal(data.ys[1], [[5, 7], [np.nan, np.nan], [np.nan, 8]])
    np.testing.assert_array_equal(data.y0, [[1, 4], [5, 7]])
    np.testing.assert_array_equal(data.args, [1, 2])


def test_dates_become_a_named_unit():
    table = pd.DataFrame(
        {"date": pd.to_datetime(["2021-03-01 00:00", "2021-03-02 12:00", "2021-03-08 00:00"]), "y": [1.0, 2.0, 3.0]}
    )
    read = lambda unit: lp.Trajectories.from_dataframe(table, time="date", channels="y", unit=unit).ts[0]
    np.testing.assert_allclose(read("D"), [0, 1.5, 7])
    np.testing.assert_allclose(read("h"), [0, 36, 168])
    with pytest.raises(lp.LaplodeError, match=r"`unit` is needed.*counts days from 2021-03-01"):
        read(None)
    with pytest.raises(lp.LaplodeError, match=r"`unit` must be.*'month'"):
        read("month")
    data = lp.Trajectories.from_dataframe(table, time="date", channels="y", unit="h")
    assert data.clock == ("2021-03-01T00:00:00", "h")
    np.testing.assert_array_equal(data.dates(data.ts)[0], table["date"].to_numpy())


def test_dates_and_names_come_back_in_the_datatree(growth, quiet):
    table = pd.DataFrame(growth.problem.data.ys.reshape(-1, 2), columns=["x", "z"])
    days = pd.date_range("2021-03-01", periods=9)
    table = table.assign(date=np.tile(days, 2), who=pd.Categorical(["b"] * 9 + ["a"] * 9))
    data = lp.Trajectories.from_dataframe(
        table, time="date", channels=["x", "z"], trajectory="who", unit="D", y0=["x", "z"]
    )
    posterior = quiet(growth.model, lp.Problem(data, lp.Gaussian(0.3), 1.0), curvature="ggn")
    later = lp.predict(posterior, [0.0, 0.5], num_samples=2, key=jax.random.key(0), progress=False)
    tree = lp.to_datatree(posterior, later, progress=False)
    assert list(tree["constant_data"]["trajectory"].values) == ["b", "a"]
    np.testing.assert_array_equal(tree["constant_data"]["date"], [days, days])
    half = np.array(["2021-03-01", "2021-03-01T12"], dtype="datetime64[ns]")
    np.testing.assert_array_equal(tree["predictions_constant_data"]["date"], [half, half])


def test_dates_that_could_be_read_in_two_ways_are_not_read():
    table = pd.DataFrame({"date": ["01/03/2021", "02/03/2021"], "y": [1.0, 2.0]})
    with pytest.raises(lp.LaplodeError, match="format="):
        lp.Trajectories.from_dataframe(table, time="date", channels="y", unit="D")


@pytest.mark.parametrize(
    ("change", "options", "match"),
    [
        pytest.param(lambda t: t, dict(channels="fish"), "`channels`='fish' is no column.*'prey'", id="column"),
        pytest.param(lambda t: pd.concat([t, t[:1]]), {}, "more than one row at.*Give replicates as traj", id="twice"),
        pytest.param(lambda t: t.assign(day=None), {}, "rows without 'who' or 'day'", id="no time"),
        pytest.param(lambda t: t, dict(trajectory=["who", "dose"]), r"`trajectory`=.*is no column", id="two columns"),
        pytest.param(lambda t: t.assign(prey="few"), {}, r"values in \['prey'\] of 'b' that are no num", id="words"),
        pytest.param(lambda t: t, dict(y0=["who"]), r"values in \['who'\] of 'b' that are no numbers", id="state"),
        pytest.param(lambda t: t.to_dict(), {}, "`table` must be a pandas DataFrame, got dict", id="dict"),
    ],
)
def test_tables_that_are_refused(change, options, match):
    with pytest.raises(lp.LaplodeError, match=match):
        lp.Trajectories.from_dataframe(change(WIDE), **dict(time="day", channels="prey", trajectory="who") | options)


def test_what_is_masked_is_missing():
    ys = np.ma.masked_array([[1.0], [-999.0], [3.0]], mask=[[False], [True], [False]])
    np.testing.assert_array_equal(lp.Trajectories([0, 1, 2], ys, [1.0]).ys[0], [[1], [np.nan], [3]])
    with pytest.raises(lp.LaplodeError, match="`ts` must be finite"):
        lp.Trajectories(np.ma.masked_array([0, 1, 2], mask=[0, 0, 1]), ys, [1.0])


def test_lists_of_different_lengths():
    """Nothing is solved beyond the last time of each."""
    ts, ys = [np.arange(4.0), np.array([0.0, 1.0])], [np.ones((4, 1)), np.zeros((2, 1))]
    data = lp.Trajectories(ts, ys, y0=[[1.0], [0.0]])
    np.testing.assert_allclose(data.ts, [[0, 1, 2, 3], [0, 1 / 3, 2 / 3, 1]])
    np.testing.assert_array_equal(data.ys[1, :, 0], [0, np.nan, np.nan, 0])
    with pytest.raises(lp.LaplodeError, match=r"`ys\[1\]` must have shape \(T, K\)"):
        lp.Trajectories(ts, [ys[0], np.zeros(2)])


DAYS = pd.date_range("2021-03-01", periods=3)
TS, YS = np.arange(3.0), np.ones((3, 1))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param((DAYS, YS), "`ts` holds dates.*timedelta64", id="dates"),
        pytest.param((DAYS - DAYS[0], YS), "`ts` holds dates", id="differences of dates"),
        pytest.param((list(DAYS.to_pydatetime()), YS), "`ts` holds dates", id="Python's dates"),
        pytest.param((TS[::-1], YS), r"Trajectories\(-ts, ys", id="backward"),
        pytest.param(([0.0, 1.0, 1.0], YS), "replicates as trajectories", id="replicates"),
        pytest.param((TS, {"x": YS}), "`ys` is a dict of 'x'", id="dict of observations"),
        pytest.param((TS, YS, {"x": 1.0, "v": 2.0}), r"`y0` is a dict of 'x', 'v'(.|\n)*np.stack", id="dict of states"),
        pytest.param((TS, YS, [1.0], {"group": np.array(["a"])}), "must hold numbers.*code words", id="words"),
        pytest.param((TS, YS, [1.0], {"start": DAYS.to_numpy()[:1]}), r"'start'\]` must hold", id="a date"),
    ],
)
def test_what_is_refused_with_the_line_to_write(arguments, match):
    with pytest.raises(lp.LaplodeError, match=match):
        lp.Trajectories(*arguments)


def test_names():
    assert lp.Trajectories(TS, YS, channels=["x"], trajectories=[7]).trajectories == (7,)
    with pytest.raises(lp.LaplodeError, match="`channels` must be 1 different names"):
        lp.Trajectories(TS, YS, channels=["x", "y"])

"""What a user's type checker sees of laplode: pyright in its strict mode has nothing to say about this file."""

# pyright: strict, reportUnknownMemberType=false, reportMissingTypeStubs=false

from collections.abc import Callable
from typing import Any, assert_type

import jax
import numpy as np
import optax
import pandas as pd
import xarray as xr

import laplode


def analysis(vector_field: Callable[..., jax.Array], ts: np.ndarray, ys: np.ndarray) -> pd.DataFrame:
    """Public functions, and the types of what they return."""
    data = laplode.Trajectories.from_dataframe(pd.read_csv("data.csv"), time="t", channels=["x"])
    assert_type(data, laplode.Trajectories)
    problem = laplode.Problem(data, laplode.Gaussian(0.1), laplode.GaussianPrior(1.0))
    model = laplode.NeuralODE(vector_field, y0=[1.0])
    assert_type(model, laplode.NeuralODE)
    matched = laplode.problem_from_loss(model, data, lambda model: model(ts), squares="sum")
    assert_type(matched, tuple[laplode.Problem, laplode.MatchedLoss])
    fitted = laplode.fit(model, problem, optax.adam(1e-2), steps=10, key=jax.random.key(0))
    assert_type(fitted, laplode.Fit)
    refined = laplode.refine(fitted.model, fitted.problem)
    assert_type(refined, laplode.Fit)
    posterior = laplode.laplace(refined.model, problem, structure=laplode.LowRank(rank=5), curvature="ggn")
    assert_type(posterior, laplode.Posterior)
    assert_type(posterior.diagnostics.effective_dof, float)
    assert_type(posterior.summary(), pd.DataFrame)
    assert_type(posterior.sample(jax.random.key(2), 5), jax.Array)
    assert_type(laplode.estimate(model, problem), laplode.Estimate)
    better = laplode.maximize_evidence(posterior, online=True)
    assert_type(better, laplode.Posterior)
    predictions = laplode.predict(better, ts, key=jax.random.key(1), method=laplode.Geodesic())
    assert_type(predictions, laplode.Predictions)
    low, high = predictions.interval(0.9)
    print(low.shape, high.shape)
    rates = laplode.predict_function(posterior, laplode.field_at(ys[0]), key=jax.random.key(1))
    assert_type(rates, laplode.FunctionPredictions)
    assert_type(laplode.identifiability(posterior), laplode.Identifiability)
    assert_type(laplode.residual_table(posterior), pd.DataFrame)
    assert_type(laplode.choose_measurements(posterior, ts, 2), laplode.Measurements)
    assert_type(laplode.nuts(posterior, key=jax.random.key(3)), xr.DataTree)
    tree = laplode.to_datatree(posterior, predictions)
    assert_type(tree, xr.DataTree)
    laplode.plot_trajectories(tree).savefig("trajectories.png")
    laplode.plot_time_correlation(predictions).savefig("correlation.png")
    laplode.save("posterior.laplode", posterior)
    kept: Any = laplode.load("posterior.laplode", like=model)
    print(kept)
    return laplode.compare_evidence({"first": posterior, "second": better})

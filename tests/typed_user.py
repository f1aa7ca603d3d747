"""What a user's type checker sees of laplode: pyright has nothing to say about this file."""

from typing import assert_type

import jax
import numpy as np
import optax
import pandas as pd
import xarray as xr

import laplode


def analysis(vector_field: laplode.NeuralODE, ts: np.ndarray, ys: np.ndarray) -> pd.DataFrame:
    """Ten public functions, and the types of what they return."""
    data = laplode.Trajectories(ts, ys, y0=ys[:, 0])
    problem = laplode.Problem(data, laplode.Gaussian(0.1), laplode.GaussianPrior(1.0))
    model = laplode.NeuralODE(vector_field)
    fitted = laplode.fit(model, problem, optax.adam(1e-2), steps=10, key=jax.random.key(0))
    assert_type(fitted, laplode.Fit)
    refined = laplode.refine(fitted.model, fitted.problem)
    posterior = laplode.laplace(refined.model, problem)
    assert_type(posterior, laplode.Posterior)
    assert_type(laplode.estimate(model, problem), laplode.Estimate)
    better = laplode.maximize_evidence(posterior, online=True)
    predictions = laplode.predict(better, ts, key=jax.random.key(1))
    assert_type(predictions, laplode.Predictions)
    low, high = predictions.interval(0.9)
    print(low.shape, high.shape, laplode.identifiability(posterior))
    tree = laplode.to_datatree(posterior, predictions)
    assert_type(tree, xr.DataTree)
    laplode.save("posterior.laplode", posterior)
    return laplode.compare_evidence({"first": posterior, "second": better})

"""Gauss-Newton and empirical Fisher matrices, as factors."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._algebra.forms import FactoredForm
from .._problem.problem import Problem
from .._solve.finite import check_finite
from .._solve.maps import AbstractFlow


def ggn(flow: AbstractFlow, problem: Problem, linear: tuple[Array, Array]) -> FactoredForm:
    """The generalized Gauss-Newton matrix Jᵀ R J, R the Fisher information of each observation in its prediction."""
    predictions, jacobian = linear
    return _factored(flow, problem, jacobian, problem.information(predictions))


def fisher(flow: AbstractFlow, problem: Problem, linear: tuple[Array, Array]) -> FactoredForm:
    """The empirical Fisher matrix Σ_m s_m s_mᵀ, s_m the gradient of the log-likelihood of observation m."""
    predictions, jacobian = linear
    return _factored(flow, problem, jacobian, problem.likelihood.score(predictions, problem.ys) ** 2)


def _factored(
    flow: AbstractFlow, problem: Problem, jacobian: Float[Array, "N*T*K P"], weights: Float[Array, "N T K"]
) -> FactoredForm:
    check_finite(jnp.sqrt(weights), flow, problem)
    informed = problem.informed
    channel = problem.channel[np.nonzero(informed)[2]]
    if np.all(informed):  # a matrix this large is not copied for nothing
        return FactoredForm(jacobian, weights.ravel(), channel)
    factor, kept = _rows(jacobian, weights.ravel(), np.flatnonzero(informed))
    return FactoredForm(factor, kept, channel)


@jax.jit
def _rows(jacobian: Float[Array, "N*T*K P"], weights: Float[Array, " N*T*K"], chosen: Int[np.ndarray, " M"]):
    return jacobian[chosen], weights[chosen]

"""Products with derivatives, for callers that need no matrix."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float

from .._checks import check_x64
from .._model.given import taken
from .._model.parameters import Where
from .._problem.problem import Problem
from .._solve.flows import AbstractFlow
from .._solve.maps import flow
from .._solve.objective import hessian_vector_product


class CurvatureProducts(eqx.Module):
    """Products with the derivatives of a model at its parameters θ*, for callers that need no matrix.

    Made by `curvature_products`. J is the Jacobian of the predictions (N, T, K) in θ, R their Fisher information.
    """

    flow: AbstractFlow
    problem: Problem

    @property
    def theta(self) -> Float[Array, " P"]:
        """θ*."""
        return self.flow.parameters.vector

    @eqx.filter_jit
    def jacobian(self, v: Float[Array, " P"]) -> Float[Array, "N T F"]:
        """J v."""
        return jax.jvp(self.flow, (self.theta,), (v,))[1]

    @eqx.filter_jit
    def jacobian_transposed(self, u: Float[Array, "N T F"]) -> Float[Array, " P"]:
        """Jᵀ u."""
        return jax.vjp(self.flow, self.theta)[1](u)[0]

    @eqx.filter_jit
    def gauss_newton(self, v: Float[Array, " P"]) -> Float[Array, " P"]:
        """Jᵀ R J v; missing observations have no information."""
        predictions, push = jax.jvp(self.flow, (self.theta,), (v,))
        return self.jacobian_transposed(self.problem.information(predictions) * push)

    @eqx.filter_jit
    def hessian(self, v: Float[Array, " P"]) -> Float[Array, " P"]:
        """∇²(−log p(Y | θ)) v."""
        return hessian_vector_product(self.flow, self.problem, self.theta, v)


def curvature_products(model: Any, problem: Problem, *, where: Where = None) -> CurvatureProducts:
    """Jacobian, Gauss-Newton and Hessian products of a fitted model, each at the cost of a solve or two.

    **Arguments:** as for `laplace`.

    **Returns:** `CurvatureProducts`, with `.jacobian(v)`, `.jacobian_transposed(u)`, `.gauss_newton(v)`, `.hessian(v)`.

    **Raises:** `LaplodeError` when 64-bit JAX is off, model and data disagree, or the solve fails.
    """
    check_x64()
    view, problem = taken(model, problem, where)
    data = problem.data
    return CurvatureProducts(flow(view, data.ts, data.y0, data.args, seen=problem.seen), problem)

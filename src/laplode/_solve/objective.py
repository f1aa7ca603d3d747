"""What is minimized, as a function of θ: −log p(Y | θ) and −log p(Y, θ), with their derivatives."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._model.parameters import Parameters
from .._problem.problem import Problem
from .maps import AbstractFlow, linearize


class NegativeLogLikelihood(eqx.Module):
    """θ ↦ −log p(Y | θ), in nats."""

    flow: AbstractFlow
    problem: Problem

    def __call__(self, theta: Float[Array, " P"]) -> Float[Array, ""]:
        return -self.problem.log_likelihood(self.flow(theta))


def log_joint(
    problem: Problem, view: Parameters, theta: Float[Array, " P"], predictions: Float[Array, "N T F"]
) -> Float[Array, ""]:
    """log p(Y | predictions) + log p(θ) in nats, with the predictions at θ at hand."""
    return problem.log_likelihood(predictions) + problem.prior.log_density(view, theta)


class NegativeLogJoint(eqx.Module):
    """θ ↦ −log p(Y | θ) − log p(θ), in nats."""

    flow: AbstractFlow
    problem: Problem

    def __call__(self, theta: Float[Array, " P"]) -> Float[Array, ""]:
        return -log_joint(self.problem, self.flow.parameters, theta, self.flow(theta))


def value_and_gradient(flow: AbstractFlow, problem: Problem) -> tuple[Float[Array, ""], Float[Array, " P"]]:
    """−log p(Y | θ) and its gradient, shape (P,), at the flow's parameters.

    The value is NaN where the likelihood does not allow a prediction, such as a rate below 0: it has no information.
    """
    if flow.has_reverse():
        return _value_and_gradient(flow, problem)
    predictions, jacobian = linearize(flow)
    return _value_and_score(problem, predictions, jacobian)


@eqx.filter_jit
def _value_and_gradient(flow: AbstractFlow, problem: Problem):
    def loss(theta):
        predictions = flow(theta)
        return -problem.log_likelihood(predictions), predictions

    (value, predictions), gradient = jax.value_and_grad(loss, has_aux=True)(flow.parameters.vector)
    return _if_allowed(problem, predictions, value), gradient


@eqx.filter_jit
def _value_and_score(problem: Problem, predictions: Float[Array, "N T K"], jacobian: Float[Array, "N*T*K P"]):
    score = problem.likelihood.score(predictions, problem.ys)
    return _if_allowed(problem, predictions, -problem.log_likelihood(predictions)), -score.ravel() @ jacobian


def _if_allowed(problem: Problem, predictions: Float[Array, "N T F"], value: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(jnp.all(problem.information(predictions) >= 0), value, jnp.nan)


def hessian_vector_product(flow: AbstractFlow, problem: Problem, theta: Float[Array, " P"], vector: Float[Array, " P"]):
    """∇²(−log p(Y | θ)) · vector by forward over reverse differentiation, shape (P,)."""
    gradient = jax.grad(NegativeLogLikelihood(flow, problem))
    return jax.jvp(gradient, (theta,), (vector,))[1]


class _Tilted(eqx.Module):
    """θ ↦ −log p(Y | θ) + ⟨tilt, f(θ)⟩, f the predictions."""

    flow: AbstractFlow
    problem: Problem
    tilt: Float[Array, "N T K"]

    def __call__(self, theta: Float[Array, " P"]) -> Float[Array, ""]:
        predictions = self.flow(theta)
        return jnp.sum(self.tilt * predictions) - self.problem.log_likelihood(predictions)


@eqx.filter_jit
def _loss_derivatives(flow: AbstractFlow, problem: Problem) -> tuple[Float[Array, "N T F"], Float[Array, "N T F F"]]:
    """First and second derivatives of −log p(y | f) in the predictions f at each time."""
    predictions = flow(flow.parameters.vector)
    score = problem.likelihood.score
    each = jax.vmap(jax.vmap(lambda f, y: (-score(f, y), -jax.jacfwd(score)(f, y))))
    return each(predictions, problem.ys)

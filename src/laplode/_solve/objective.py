"""What is minimized, as a function of θ: −log p(Y | θ) and −log p(Y, θ), with their derivatives."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._devices import compiled
from .._model.parameters import Parameters
from .._problem.problem import Problem
from .flows import AbstractFlow
from .maps import evaluate, linearize

# A Jacobian with no more entries than this takes less time than the program of a gradient takes to compile.
_SMALL = 2**20


class NegativeLogLikelihood(eqx.Module):
    """θ ↦ −log p(Y | θ), in nats."""

    flow: AbstractFlow
    problem: Problem

    def __call__(self, theta: Float[Array, " P"]) -> Float[Array, ""]:
        return -self.problem.log_likelihood(self.flow(theta))


def log_joint(
    problem: Problem,
    view: Parameters,
    theta: Float[Array, " P"],
    predictions: Float[Array, "N T F"],
) -> Float[Array, ""]:
    """log p(Y | predictions) + log p(θ) in nats, with the predictions at θ at hand."""
    return problem.log_likelihood(predictions) + problem.prior.log_density(view, theta)


_log_joint = eqx.filter_jit(log_joint)


def negative_log_joint(flow: AbstractFlow, problem: Problem, theta: Float[Array, " P"]) -> Float[Array, ""]:
    """−log p(Y | θ) − log p(θ), in nats.

    The program of the solve serves any likelihood and prior.
    """
    return -_log_joint(problem, flow.parameters, theta, evaluate(flow, theta))


def value_and_gradient(
    flow: AbstractFlow, problem: Problem, linear: tuple[Array, Array] | None = None
) -> tuple[Float[Array, ""], Float[Array, " P"]]:
    """−log p(Y | θ) and its gradient, shape (P,), at the flow's parameters.

    The value is NaN where the likelihood does not allow a prediction, such as a rate below 0: it has no information.
    `linear` are the predictions and their Jacobian there, if they are known.
    """
    if linear is None and flow.has_reverse() and not is_small(flow, problem):
        return _value_and_gradient(flow, problem)
    return _value_and_score(problem, *(linear or linearize(flow)))


def is_small(flow: AbstractFlow, problem: Problem) -> bool:
    """Whether the Jacobian costs next to nothing, so that no other program of derivatives is worth its compilation."""
    return flow.is_frozen and problem.informed.size * flow.parameters.size <= _SMALL


@compiled
def _value_and_gradient(flow: AbstractFlow, problem: Problem):
    def loss(theta):
        predictions = flow(theta)
        return -problem.log_likelihood(predictions), predictions

    (value, predictions), gradient = jax.value_and_grad(loss, has_aux=True)(flow.parameters.vector)
    return _if_allowed(problem, predictions, value), gradient


@eqx.filter_jit
def _value_and_score(problem: Problem, predictions: Float[Array, "N T K"], jacobian: Float[Array, "NTF P"]):
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
def _loss_derivatives(problem: Problem, predictions: Float[Array, "N T F"]):
    """First (N, T, F) and second derivatives (N, T, F, F) of −log p(y | f) in the predictions f at each time."""
    score = lambda f: -problem.likelihood.score(f, problem.ys)
    # Times are independent, so that one direction for each of the F predictions is enough for all of them.
    along = lambda direction: jax.jvp(score, (predictions,), (jnp.broadcast_to(direction, predictions.shape),))[1]
    return score(predictions), jax.vmap(along, out_axes=-1)(jnp.eye(predictions.shape[-1]))

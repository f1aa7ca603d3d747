"""Predictions by solving at draws of the parameters."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._solve.flows import OfModel
from .method import AbstractMethod, Proposal, check_df, straight, straight_log_density
from .solves import in_batches, solve_at


class AbstractSolved(AbstractMethod):
    """A method that solves the ODE at each draw."""

    def trajectories(self, posterior, grid, thetas, states, *, mesh, progress):
        thetas = jnp.concatenate([posterior.mean[None], thetas])  # one program for the mean and the draws
        states = None if grid.start is None else jnp.concatenate([grid.start.mean[None], states])
        where = grid.solve_ts, grid.y0, grid.args
        solve = lambda rows: solve_at(posterior, *where, rows[0], mesh, states=rows[1])
        label = "Solving at draws" if progress else None
        solved = in_batches(solve, (thetas, states), label, mesh)[:, :, grid.skip :]
        return solved[0], solved[1:], None

    def values(self, posterior, function, thetas, *, progress):
        label = "Evaluating at draws" if progress else None
        return in_batches(lambda some: _at(function, some), thetas, label), None

    def failure(self, failed, num):
        return (
            f"{super().failure(failed, num)} They reach parameters at which the ODE blows up. "
            'method="linearized" does not solve at draws.'
        )


class Sampled(AbstractSolved):
    """The ODE solved at draws of θ from the posterior, which is right only where the posterior is tight.

    **Arguments:**

    - `df`: None for draws from the posterior; or the degrees of freedom of the multivariate t distribution with scale
        matrix Λ⁻¹ to draw from instead, whose tails cover more: for draws that are weighed.

    **Raises:** `LaplodeError` when `df` is not positive.
    """

    df: float | None = None

    name: ClassVar[str] = "sampled"

    def __check_init__(self):
        check_df(self.df)

    def propose(self, posterior, key, num, *, mesh, progress):
        thetas = straight(posterior, self.df, key, num)
        return Proposal(thetas, jnp.ones(num, bool), lambda: straight_log_density(posterior, self.df, thetas))


@eqx.filter_jit
def _at(function: OfModel, thetas: Float[Array, "B P"]) -> Float[Array, "B ..."]:
    return jax.vmap(function)(thetas)

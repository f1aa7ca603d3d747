"""Where to predict."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._errors import LaplodeError
from .._model.neural_ode import NeuralODE
from .._model.own import predicted_shape
from .._posterior.posterior import Posterior
from .._problem.data import check_args, check_initial_state, check_solvable, check_times
from .._problem.likelihood import AbstractLikelihood
from .start import UncertainStart


class Grid(eqx.Module):
    """Where to predict. `skip` leading times only carry the solve from the initial state to the first time wanted.

    Where there is a `start`, `y0` is its mean.
    """

    ts: Float[np.ndarray, "N T"]
    solve_ts: Float[np.ndarray, "N all"]
    y0: Float[np.ndarray, "N D"] | None
    args: PyTree
    skip: int = eqx.field(static=True)
    observed: bool = eqx.field(static=True)
    start: UncertainStart | None = None

    def draw_states(self, key: PRNGKeyArray, num: int) -> Float[Array, "S ..."]:
        """Initial states, (S, N, D); (S, 0) where they are known."""
        return jnp.zeros((num, 0)) if self.start is None else self.start.sample(key, num)

    def likelihood(self, posterior: Posterior, scale: Any) -> AbstractLikelihood:
        """The posterior's likelihood here, with the noise scale `scale` where it knows that of observed values only."""
        problem = posterior.problem
        return problem.likelihood.elsewhere(scale, (*self.ts.shape, problem.data.ys.shape[2]), self.observed)

    @classmethod
    def of(cls, posterior: Posterior, ts: Any, y0: Any, args: PyTree) -> "Grid":
        """**Raises:** `LaplodeError` when an argument does not fit, or the model can't predict there."""
        grid = cls._of(posterior, ts, y0, args)
        if not grid.observed:
            given = [name for name, value in (("`y0`", y0), ("`args`", args)) if value is not None]
            grid._check_predicted(posterior.model, " and ".join(given))
        return grid

    def _check_predicted(self, model: Any, given: str) -> None:
        if isinstance(model, NeuralODE) and not given:
            return
        num = self.solve_ts.shape[1]
        try:
            shape = predicted_shape(model, self.solve_ts, self.y0, self.args)
        except Exception as error:
            states = "" if self.y0 is None else f" from D = {self.y0.shape[1]} states"
            raise LaplodeError(
                f"{given or '`ts`'} do not fit the model, which can't predict{states}: {type(error).__name__}: {error}"
            ) from error
        if shape[0] != num:
            raise LaplodeError(
                f"`model` predicts shape {shape} where it is asked for {num} times: it has a grid of its own. Let it "
                "use the times `ts` that it is called with."
            )

    @classmethod
    def _of(cls, posterior: Posterior, ts: Any, y0: Any, args: PyTree) -> "Grid":
        data = posterior.problem.data
        ts = check_times("ts", ts)
        if y0 is not None:
            check_solvable("ts", ts)
            num = ts.shape[0] if ts.ndim == 2 else (np.shape(y0)[0] if np.ndim(y0) > 1 else 1)
            y0 = check_initial_state("y0", y0, num)
            if data.y0 is not None and y0.shape[1] != data.y0.shape[1]:
                raise LaplodeError(f"`y0` has D = {y0.shape[1]} states, but the data's y0 has {data.y0.shape[1]}.")
            if args is None and data.args is not None:
                raise LaplodeError("`args` is missing: the data came with args, so new initial states need theirs.")
            ts = np.broadcast_to(ts, (num, ts.shape[-1])).copy()
            return cls(ts, ts, y0, check_args("args", args, num), 0, False)
        if args is not None:
            return cls._of_args(posterior, ts, args)
        num = data.ts.shape[0]
        if ts.ndim == 2 and ts.shape[0] != num:
            raise LaplodeError(
                f"`ts` has {ts.shape[0]} rows, but the data has N = {num} trajectories. For other trajectories give "
                "their initial states as `y0`."
            )
        ts = np.broadcast_to(ts, (num, ts.shape[-1])).copy()
        start = data.ts[:, :1]
        if np.any(ts[:, :1] < start):
            i = int(np.argmax(ts[:, 0] < start[:, 0]))
            raise LaplodeError(
                f"`ts` of trajectory {i} starts at {ts[i, 0]:g}, before its initial state at {start[i, 0]:g}. "
                "Start later, or give the state at ts[:, 0] as `y0`."
            )
        observed = ts.shape == data.ts.shape and bool(np.all(ts == data.ts))
        if np.all(ts[:, :1] == start):
            check_solvable("ts", ts)
            return cls(ts, ts, data.y0, data.args, 0, observed)
        if np.any(ts[:, :1] == start):
            raise LaplodeError(
                "`ts` starts at the initial time of some trajectories and later in others: start all of them at their "
                "initial times, or all later."
            )
        return cls(ts, np.concatenate([start, ts], axis=1), data.y0, data.args, 1, False)

    @classmethod
    def _of_args(cls, posterior: Posterior, ts: np.ndarray, args: PyTree) -> "Grid":
        """New trajectories by their args alone, of a model that has the initial state of any trajectory."""
        data, model = posterior.problem.data, posterior.model
        if data.y0 is not None or (isinstance(model, NeuralODE) and model.has_state_for_each):
            raise LaplodeError(
                "`args` alone are for a model that has one initial state for all trajectories or computes it: give "
                "`y0` with them, or leave both to continue the data."
            )
        check_solvable("ts", ts)
        num = len(ts) if ts.ndim == 2 else next((len(leaf) for leaf in jax.tree.leaves(args) if np.ndim(leaf)), 1)
        ts = np.broadcast_to(ts, (num, ts.shape[-1])).copy()
        return cls(ts, ts, None, check_args("args", args, num), 0, False)

"""What a fit returns."""

from typing import Any

import numpy as np
from jaxtyping import Float

from .._problem.problem import Problem
from .._show import Shown, rows


class Fit(Shown):
    """A fitted model, as `fit` and `refine` return it.

    - `model`: the best model found.
    - `losses`: −log p(Y | θ) − log p(θ) in nats before each step. While the horizon of `fit` grows, Y is the prefix of
        the data that was fitted at the time.
    - `problem`: the problem, with the noise scale found where it was learned. `refine` and `laplace` take this one.
    - `loss`: −log p(Y | θ) − log p(θ) of `model` in nats, on all data unless `fit` was interrupted before.
    - `reason`: why it ended: "converged", "budget" (all steps were taken), "no progress" or "interrupted". `fit` has no
        criterion for convergence: it takes all of its steps.
    - `steps`: the number of steps taken, those of Optax or of Levenberg-Marquardt.
    - `newton_steps`: the number of Newton steps taken.
    - `newton_decrement`: ½ gᵀΛ⁻¹g in nats at `model`, about what is left to gain; None where it was not looked at.
    - `num_negative`: the number of negative eigenvalues of the exact Λ; None where it was not looked at.
    - `horizons`: the number of times and of steps of each stage of `fit`.
    - `restarts`: the best model of each restart that did not fail, the best first; empty without restarts.
    - `restart_losses`: the loss of each restart in nats, NaN where it failed; None from `refine`.
    """

    model: Any
    losses: Float[np.ndarray, " steps"]
    problem: Problem
    loss: float
    reason: str
    steps: int
    newton_steps: int = 0
    newton_decrement: float | None = None
    num_negative: int | None = None
    horizons: tuple[tuple[int, int], ...] = ()
    restarts: tuple[Any, ...] = ()
    restart_losses: Float[np.ndarray, " restarts"] | None = None

    def _shown(self):
        taken = f"{self.steps} steps" + (f" and {self.newton_steps} Newton steps" if self.newton_steps else "")
        named = {"loss": f"{self.loss:.6g} nats", "ended": f"{self.reason}, after {taken}"}
        if self.newton_decrement is not None:
            negative = f", {self.num_negative} directions of negative curvature" if self.num_negative else ""
            named["decrement"] = f"{self.newton_decrement:.2g} nats left to gain{negative}"
        following = "laplace" if self.converged else "refine"
        named["next"] = f"{following}(fit.model, fit.problem)"
        return rows(named, f"Fit of {type(self.model).__name__}")

    @property
    def converged(self) -> bool:
        """Whether the fit ended at a stationary point."""
        return self.reason == "converged"

"""Several optima as one posterior."""

import itertools
from collections.abc import Sequence
from typing import NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import real_array
from .._errors import LaplodeError
from .._model.parameters import Parameters
from .._posterior.posterior import AbstractPosterior, Diagnostics, Posterior
from .._problem.problem import Problem
from .._solve.maps import evaluate

# Two posteriors are of the same optimum when they agree to this, in nats and in the noise of an observation.
_SAME = 1e-2


class MixturePosterior(AbstractPosterior):
    """θ ~ Σ_c weight_c Normal(mean_c, Λ_c⁻¹): the Laplace approximations around several optima.

    Made by `mixture`. `components` are the posteriors, the heaviest first, `log_weights` the logarithms of their
    weights (C,). What belongs to one model (`parameters`, `problem`, `diagnostics`) is that of the heaviest.
    """

    components: tuple[Posterior, ...]
    log_weights: Float[Array, " C"]

    @property
    def parameters(self) -> Parameters:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of the heaviest component."""
        return self.components[0].parameters

    @property
    def problem(self) -> Problem:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the heaviest component."""
        return self.components[0].problem

    @property
    def diagnostics(self) -> Diagnostics:
        """Those of the heaviest component."""
        return self.components[0].diagnostics

    @property
    def mean(self) -> Float[Array, " P"]:
        """The mean of θ, shape (P,): between the optima, where no model need be."""
        return self.weights @ jnp.stack([c.mean for c in self.components])

    @property
    def log_evidence(self) -> Float[Array, ""]:
        """log Σ p(Y, near optimum c), in nats."""
        return jax.scipy.special.logsumexp(jnp.stack([c.log_evidence for c in self.components]))

    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, "n P"]:
        """Draw `n` parameter vectors, shape (n, P)."""
        key_choice, *keys = jax.random.split(key, len(self.components) + 1)
        chosen = self.choose(key_choice, n)
        draws = np.empty((n, self.size))
        for c, (component, key) in enumerate(zip(self.components, keys, strict=True)):
            places = np.flatnonzero(chosen == c)
            if places.size:
                draws[places] = component.sample(key, places.size)
        return jnp.asarray(draws)

    def log_prob(self, theta: Float[Array, "... P"]) -> Float[Array, "..."]:
        """The log density at `theta`, in nats."""
        each = jnp.stack([c.log_prob(theta) for c in self.components], axis=-1)
        return jax.scipy.special.logsumexp(each + self.log_weights, axis=-1)

    def as_prior(self) -> NoReturn:
        """Refused: a prior is one Gaussian.

        **Raises:** `LaplodeError`, with what to do instead.
        """
        raise LaplodeError(
            "A mixture can't be the prior of further data, which is one Gaussian: take one of its `.components`, "
            "`posterior.components[0].as_prior()`, or update each and mix them again."
        )

    def covariance(self) -> Float[Array, "P P"]:
        """The covariance within the components and between them."""
        offsets = jnp.stack([c.mean for c in self.components]) - self.mean
        within = [w * c.covariance() for w, c in zip(self.weights, self.components, strict=True)]
        return sum(within, (offsets.T * self.weights) @ offsets)

    def precision(self) -> Float[Array, "P P"]:
        """The inverse of the covariance."""
        return jnp.linalg.inv(self.covariance())

    def marginal_std(self) -> Float[Array, " P"]:
        """The standard deviation of each parameter, shape (P,)."""
        offsets = jnp.stack([c.mean for c in self.components]) - self.mean
        within = jnp.stack([c.structure.variance() for c in self.components])
        return jnp.sqrt(self.weights @ (within + offsets**2))


def mixture(posteriors: Sequence[Posterior], weights: Sequence[float] | None = None) -> MixturePosterior:
    """Laplace approximations around several optima of one model, from restarts of its fit, as one posterior.

    ```python
    fit = laplode.fit(model, problem, optimizer, steps=2000, key=key, restarts=5)
    optima = [laplode.refine(model, fit.problem).model for model in fit.restarts]
    posterior = laplode.mixture([laplode.laplace(model, fit.problem) for model in optima])
    ```

    **Arguments:**

    - `posteriors`: of the same data and the same parameters. Those of an optimum that is there already (or of its
        mirror image, hidden units exchanged) are left out: found twice, it is no more probable.
    - `weights`: their probabilities, up to a factor; by default their evidence.

    **Returns:** a `MixturePosterior`, which `predict` takes too.

    **Raises:** `LaplodeError` when the posteriors are not of the same data and parameters, or weights are negative.
    """
    if not isinstance(posteriors, Sequence) or not posteriors:
        raise LaplodeError("`posteriors` must be a list of posteriors from laplode.laplace, and not empty.")
    for i, posterior in enumerate(posteriors):
        if not isinstance(posterior, Posterior):
            got = type(posterior).__name__
            raise LaplodeError(f"`posteriors`[{i}] must come from laplode.laplace, got {got}.")
        first = posteriors[0]
        data, other = first.problem.data, posterior.problem.data
        if not eqx.tree_equal((data.ts, data.ys, data.y0), (other.ts, other.ys, other.y0)):
            # NaN marks what is missing on both sides, and equals nothing.
            same = data.ys.shape == other.ys.shape and np.array_equal(data.ys, other.ys, equal_nan=True)
            if not same or not np.array_equal(data.ts, other.ts):
                raise LaplodeError(f"`posteriors`[{i}] is of other data than the first.")
        if [leaf[:2] for leaf in posterior.parameters.leaves] != [leaf[:2] for leaf in first.parameters.leaves]:
            raise LaplodeError(
                f"`posteriors`[{i}] has other parameters than the first: a mixture is over optima of one model. "
                "Compare different models by laplode.compare_evidence."
            )
    if weights is None:
        log_weights = np.array([float(p.log_evidence) for p in posteriors])
    else:
        given = real_array("weights", weights)
        if given.shape != (len(posteriors),) or not np.all(given >= 0) or not 0 < np.sum(given) < np.inf:
            raise LaplodeError(
                f"`weights` must be {len(posteriors)} numbers of at least 0, one for each posterior; got {weights!r}."
            )
        with np.errstate(divide="ignore"):
            log_weights = np.log(given)
    kept = [int(i) for i in np.argsort(-log_weights, kind="stable") if np.isfinite(log_weights[i])]
    twins = {j for i, j in itertools.combinations(kept, 2) if weights is None and _same(posteriors[i], posteriors[j])}
    kept = [i for i in kept if i not in twins]
    found = log_weights[kept] - np.logaddexp.reduce(log_weights[kept])
    components = tuple(posteriors[i] for i in kept)
    return MixturePosterior(components, jnp.asarray(found))  # pyright: ignore[reportCallIssue]


def _same(one: Posterior, other: Posterior) -> bool:
    """Whether two posteriors are of the same optimum, up to its symmetries."""
    apart = lambda a, b: abs(float(a) - float(b)) > _SAME
    if apart(one.log_evidence, other.log_evidence) or apart(one.log_joint, other.log_joint):
        return False
    f, g = (evaluate(p.flow, p.mean) for p in (one, other))
    return not np.any(np.sqrt(one.problem.information(f)) * np.abs(f - g) > _SAME)

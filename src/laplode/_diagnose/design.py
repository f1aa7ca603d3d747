"""Where to measure next: what observations not yet made would tell, by the posterior as it is."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .._checks import check_from, check_x64
from .._devices import free_bytes
from .._errors import LaplodeError, choose
from .._posterior.posterior import Posterior
from .._predict.function import of_posterior, value_at_mean
from .._predict.grid import Grid
from .._show import Shown, rows
from .._solve.finite import check_finite, check_slope
from .._solve.maps import flow, linearize


class AbstractCriterion(eqx.Module):
    """What observations are worth. Candidate c holds r numbers: of each channel's location, and of its scale if any."""

    @property
    @abc.abstractmethod
    def each(self) -> Float[np.ndarray, " C"]:
        """The gain of each candidate alone."""

    @abc.abstractmethod
    def after(self, c: int) -> "AbstractCriterion":
        """The same when candidate c has been observed."""

    @abc.abstractmethod
    def together(self, counts: Float[np.ndarray, " C"]) -> float:
        """The gain of a set, in which candidate c is observed `counts[c]` times."""


def _own(covariance: Float[np.ndarray, "C r C r"]) -> Float[np.ndarray, "C r r"]:
    """I and the covariance of each candidate with itself."""
    return np.eye(covariance.shape[1]) + np.einsum("crcs->crs", covariance)


def _observed(covariance: Float[np.ndarray, "C r C r"], values: Float[np.ndarray, "C r X"], c: int) -> np.ndarray:
    """Covariances with the candidates, `values`, when candidate c has been observed."""
    with_c = covariance[:, :, c] @ np.linalg.inv(_own(covariance)[c])
    return values - np.einsum("crs,sx->crx", with_c, values[c])


def _conditioned(covariance: Float[np.ndarray, "C r C r"], c: int) -> Float[np.ndarray, "C r C r"]:
    flat = covariance.reshape(*covariance.shape[:2], -1)
    return _observed(covariance, flat, c).reshape(covariance.shape)


def _of_set(covariance: Float[np.ndarray, "C r C r"], counts: Float[np.ndarray, " C"]):
    """I + S of those with a count, S the covariance; as often as they are counted."""
    chosen = np.flatnonzero(counts)
    root = np.repeat(np.sqrt(counts[chosen]), covariance.shape[1])
    part = covariance[chosen][:, :, chosen].reshape(len(root), len(root))
    return chosen, root, np.eye(len(root)) + root[:, None] * part * root


class _Information(AbstractCriterion):
    """½ log det(I + S), less the same given the target: of all parameters, nothing is left then."""

    covariance: Float[np.ndarray, "C r C r"]
    given_target: Float[np.ndarray, "C r C r"] | None

    @property
    def each(self):
        gain = np.linalg.slogdet(_own(self.covariance))[1]
        return 0.5 * (gain if self.given_target is None else gain - np.linalg.slogdet(_own(self.given_target))[1])

    def after(self, c):
        given = None if self.given_target is None else _conditioned(self.given_target, c)
        return _Information(_conditioned(self.covariance, c), given)

    def together(self, counts):
        parts = [self.covariance] if self.given_target is None else [self.covariance, self.given_target]
        log_dets = [np.linalg.slogdet(_of_set(part, counts)[2])[1] for part in parts]
        return 0.5 * float(log_dets[0] - sum(log_dets[1:]))


class _Variance(AbstractCriterion):
    """By how much the variances of a target, which has the covariances `cross` with the candidates, fall in sum."""

    covariance: Float[np.ndarray, "C r C r"]
    cross: Float[np.ndarray, "C r Q"]

    @property
    def each(self):
        return np.einsum("crq,crq->c", self.cross, np.linalg.solve(_own(self.covariance), self.cross))

    def after(self, c):
        return _Variance(_conditioned(self.covariance, c), _observed(self.covariance, self.cross, c))

    def together(self, counts):
        chosen, root, matrix = _of_set(self.covariance, counts)
        cross = root[:, None] * self.cross[chosen].reshape(len(root), self.cross.shape[2])
        return float(np.sum(cross * np.linalg.solve(matrix, cross)))


class InformationGain(Shown):
    """What observations would tell.

    - `ts`: candidate times, (N, T).
    - `each`: the gain of each single observation, (N, T, K): in nats by the criterion "information", in squared
        units of the target, or of the parameters, by "variance".
    - `total`: the gain of all of them together, never more than their sum by "information" without a target.
    - `criterion`: what `of` computes the gain of other sets from.
    """

    ts: Float[np.ndarray, "N T"]
    each: Float[np.ndarray, "N T K"]
    total: float
    criterion: AbstractCriterion

    def _shown(self):
        trajectory, time, channel = np.unravel_index(np.argmax(self.each), self.each.shape)
        best = f"time {self.ts[trajectory, time]:.4g} of trajectory {trajectory}, channel {channel}"
        named = {
            "candidates": "{} trajectories, {} times, {} channels".format(*self.each.shape),
            "best one": f"{np.max(self.each):.3g}, {best}",
            "all together": f"{self.total:.3g}",
            "next": "choose_measurements(posterior, ts, num)",
        }
        return rows(named, "Information gain")

    def of(self, counts: Any) -> float:
        """The gain of a set of observations together.

        `counts` says how often each is made, (N, T, K): numbers that are not negative, or True and False.
        """
        counts = np.asarray(counts, dtype=float)
        if counts.shape != self.each.shape or not np.all(counts >= 0) or not np.all(np.isfinite(counts)):
            raise LaplodeError(
                f"`counts` must say how often each candidate is observed, shape (N, T, K) = {self.each.shape}; got "
                f"shape {counts.shape}" + (" with negative or infinite numbers." if np.any(~(counts >= 0)) else ".")
            )
        return self.criterion.together(counts.ravel())


class Measurements(Shown):
    """Observations to make, in the order in which they were chosen.

    - `trajectory`, `time`, `channel`: their indices, (num,); `ts`: their times, (num,).
    - `gains`: what each adds to those before it, (num,), as in `InformationGain`; `total`: their sum, which is the gain
        of all of them.
    """

    trajectory: Int[np.ndarray, " num"]
    time: Int[np.ndarray, " num"]
    channel: Int[np.ndarray, " num"]
    ts: Float[np.ndarray, " num"]
    gains: Float[np.ndarray, " num"]

    def _shown(self):
        chosen = zip(self.ts[:8], self.trajectory, self.channel, self.gains, strict=False)
        lines = [f"  time {t:.4g}, trajectory {i}, channel {k}: {gain:.3g} more" for t, i, k, gain in chosen]
        left = [f"  and {len(self.ts) - 8} more"] if len(self.ts) > 8 else []
        return "\n".join([f"Measurements, {self.total:.3g} together", *lines, *left])

    @property
    def total(self) -> float:
        """The gain of all of them together."""
        return float(np.sum(self.gains))


def information_gain(
    posterior: Posterior,
    ts: Any,
    y0: Any = None,
    args: PyTree = None,
    *,
    scale: Any = None,
    criterion: str = "information",
    target: Callable[[Any], Any] | None = None,
) -> InformationGain:
    """What an observation at each of the candidate times would tell, in each channel, and all of them together.

    **Arguments:**

    - `posterior`: from `laplace`.
    - `ts`, `y0`, `args`: candidate times and the trajectories to observe, as in `predict`: without `y0` those of the
        data, otherwise new ones.
    - `scale`: the noise scale of the candidates, as in `predict`, for a likelihood that knows it for each observed
        value only.
    - `criterion`: "information": expected information gain about all parameters, or about the target, in nats.
        "variance": by how much the variances of the target, or of all parameters in the coordinates of θ, are expected
        to fall, in sum.
    - `target`: what is to become known, called as `target(model)`, as in `predict_function`: `lambda m: m.rate`, say.

    **Returns:** `InformationGain`.

    **Raises:** `LaplodeError` when an argument does not fit, a candidate has a prediction that the likelihood does not
    allow, or the candidates' Jacobian does not fit into memory.

    The model is linearized at θ* and the noise is known there, so that what is observed does not matter, only where.
    With B = R^½ J, J the Jacobian of the candidates' predictions and R their Fisher information, S = B Λ⁻¹ Bᵀ, and G
    the target's Jacobian, the gain is

    - "information": ½ log det(I + S) = ½ log det(Λ + Bᵀ B) − ½ log det Λ about the parameters; about the target the
        mutual information ½ log det(I + S) − ½ log det(I + S − B Λ⁻¹ Gᵀ (G Λ⁻¹ Gᵀ)⁻¹ G Λ⁻¹ Bᵀ);
    - "variance": tr(G Λ⁻¹ Bᵀ (I + S)⁻¹ B Λ⁻¹ Gᵀ), with G = I without a target.

    The first is exact for models that are linear in θ with Gaussian noise. For a user's own distribution R is the mean
    over 1000 observations drawn at θ*.

    Lindley (1956), "On a measure of the information provided by an experiment"; Chaloner and Verdinelli (1995),
    "Bayesian experimental design: a review".
    """
    grid, found = _candidates(posterior, ts, y0, args, scale, criterion, target)
    shape = (*grid.ts.shape, posterior.problem.data.ys.shape[2])
    each = found.each.reshape(shape)
    return InformationGain(grid.ts, each, found.together(np.ones(each.size)), found)


def choose_measurements(
    posterior: Posterior,
    ts: Any,
    num: int,
    y0: Any = None,
    args: PyTree = None,
    *,
    scale: Any = None,
    criterion: str = "information",
    target: Callable[[Any], Any] | None = None,
    repeat: bool = False,
) -> Measurements:
    """The observations to make next: one after another, each time the one that adds most to those before.

    **Arguments:** as in `information_gain`, and

    - `num`: how many.
    - `repeat`: whether the same may be observed more than once, with independent noise.

    **Returns:** `Measurements`.

    **Raises:** `LaplodeError` as `information_gain` does, and when there are fewer candidates than `num`.

    The information about all parameters is submodular, so that the greedy choice has at least 1 − 1/e of the largest
    gain that `num` observations can have (Nemhauser, Wolsey and Fisher, 1978); the other criteria have no such bound.
    """
    if not isinstance(num, int | np.integer) or num < 1:
        raise LaplodeError(f"`num` must be a positive integer, got {num!r}.")
    grid, found = _candidates(posterior, ts, y0, args, scale, criterion, target)
    shape = (*grid.ts.shape, posterior.problem.data.ys.shape[2])
    if not repeat and num > np.prod(shape):
        raise LaplodeError(
            f"`num` = {num} is more than the {np.prod(shape)} candidates: give more times, or `repeat`=True."
        )
    chosen, gains = [], []
    free = np.ones(int(np.prod(shape)), bool)
    for _ in range(num):
        each = np.where(free, found.each, -np.inf)
        best = int(np.argmax(each))
        chosen.append(best)
        gains.append(float(each[best]))
        found = found.after(best)
        free[best] = repeat
    trajectory, time, channel = np.unravel_index(chosen, shape)
    return Measurements(trajectory, time, channel, grid.ts[trajectory, time], np.array(gains))


def _candidates(posterior: Any, ts, y0, args, scale, criterion: str, target: Any) -> tuple[Grid, AbstractCriterion]:
    check_x64()
    make = choose("criterion", criterion, {"information": _information, "variance": _variance})
    check_from("posterior", posterior, Posterior, "laplace")
    grid = Grid.of(posterior, ts, y0, args)
    likelihood = grid.likelihood(posterior, scale)
    _check_memory(posterior, grid)
    wanted = None
    if target is not None:
        of_target = of_posterior("target", target, posterior)
        value_at_mean(of_target, "target")
        wanted = linearize(of_target)[1]
        check_slope("target", wanted)
    around = flow(posterior.parameters, grid.solve_ts, grid.y0, grid.args)
    predictions, jacobian = linearize(around)
    check_finite(jacobian, around)
    rows = jacobian.reshape(*predictions.shape, -1)[:, grid.skip :]
    predictions = predictions[:, grid.skip :]
    information = likelihood.expected_fisher(predictions)
    # What no parameter reaches tells nothing, such as a known initial state, whatever the likelihood makes of it.
    inert = jnp.all(rows == 0, axis=-1)
    wrong = ~inert & ~(jnp.isfinite(information) & jnp.isfinite(posterior.problem.likelihood.stabilize(predictions)))
    if jnp.any(wrong):
        i, t, k = (int(x) for x in np.argwhere(np.asarray(wrong))[0])
        raise LaplodeError(
            f"`ts` has a candidate that the likelihood does not allow: trajectory {i} at {grid.ts[i, t]:g} is "
            f"predicted to be {float(predictions[i, t, k]):g} in channel {k}. Leave that time out."
        )
    scaled = jnp.where(inert, 0, jnp.sqrt(jnp.where(inert, 0, information)))[..., None] * rows
    # A channel's location and the logarithm of its scale are told by the same observation.
    channel, channels = posterior.problem.channel, posterior.problem.data.ys.shape[2]
    own = [np.flatnonzero(channel == k) for k in range(channels)]
    most = max(map(len, own))
    none = jnp.zeros((*scaled.shape[:2], most, posterior.size))
    each = [none.at[:, :, : len(mine)].set(scaled[:, :, mine]) for mine in own]
    candidates = jnp.stack(each, axis=2).reshape(-1, most, posterior.size)
    return grid, make(posterior, candidates, wanted)


def _check_memory(posterior: Posterior, grid: Grid) -> None:
    num = grid.solve_ts.size * posterior.problem.prediction_shape[1]
    needed = 8 * num * (3 * posterior.size + 4 * num)
    if needed > free_bytes():
        raise LaplodeError(
            f"`ts` makes {num} candidates, whose Jacobian and covariance take {needed / 2**30:.1f} GiB, more than "
            "fits. Give fewer times."
        )


def _with_target(posterior: Posterior, candidates: Float[Array, "C r P"], wanted: Float[Array, "Q P"] | None):
    """S among the candidates, with the target, and of the target."""
    rows = candidates.reshape(-1, posterior.size)
    stacked = rows if wanted is None else jnp.concatenate([rows, wanted])
    covariance, num = np.asarray(posterior.built.predictive_covariance(stacked)), len(rows)
    return covariance[:num, :num], covariance[:num, num:], covariance[num:, num:]


def _information(posterior: Posterior, candidates, wanted) -> AbstractCriterion:
    shape = candidates.shape[:2] * 2
    covariance, cross, own = _with_target(posterior, candidates, wanted)
    if wanted is None:
        return _Information(covariance.reshape(shape), None)
    eigenvalues, vectors = np.linalg.eigh(own)
    known = eigenvalues > len(own) * np.finfo(float).eps * eigenvalues[-1]
    half = cross @ vectors[:, known] / np.sqrt(eigenvalues[known])
    return _Information(covariance.reshape(shape), (covariance - half @ half.T).reshape(shape))


def _variance(posterior: Posterior, candidates, wanted) -> AbstractCriterion:
    shape = candidates.shape[:2] * 2
    covariance, cross, _ = _with_target(posterior, candidates, wanted)
    if wanted is None:
        cross = np.asarray(posterior.built.covariance_product(candidates))
    return _Variance(covariance.reshape(shape), cross.reshape(*shape[:2], -1))

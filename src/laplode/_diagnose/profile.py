"""Profiles: the best fit at each value of a quantity, and the interval that the data allow for it."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from .._checks import check_count, check_fraction, check_from, real_array
from .._devices import check_mesh, compiled
from .._errors import FitError, LaplodeError, LaplodeWarning
from .._files import Checkpoint, Path
from .._late import pd
from .._model.parameters import Parameters
from .._posterior.posterior import Posterior
from .._predict.function import trajectory_at
from .._show import Shown
from .._solve.finite import check_slope
from .path import Side
from .quantity import AbstractQuantity, Named, Place, quantities
from .side_by_side import Ask, Record, profiled

# A drop below this, in nats, is none.
_FLAT = 1e-3

# Of quantities that vary together the rest varies by less than this part.
_TOGETHER = 1e-8


class Profile(Shown):
    """The profile of one quantity. Made by `profile`.

    - `name`: of the quantity; `estimate`: its value at the optimum, in the user's units.
    - `values`: at which it was held, in order, (n,); `drop`: by how much −log p(Y, θ), or −log p(Y | θ), is above its
        minimum there, in nats, (n,); `likelihood_drop`: the part of it that is the likelihood's, (n,).
    - `thetas`: the best parameters at each value, (n, P); `unravel(i)` is the model there. `decrement`: what is left
        to gain there along the constraint, in nats, (n,).
    - `level`, `threshold`, `df`: of the interval, and the drop at its ends: half the quantile of χ² with `df` degrees
        of freedom.
    - `intervals`: where the drop is at most the threshold, (low, high) each, in order; an end that was not found is
        infinite, or the end of the prior's support.
    - `laplace`: the interval of the Gaussian posterior beside it.
    - `nonlinearity`: the largest distance between the signed root √(2 drop) and that of the Gaussian's parabola within
        the interval, as a part of the root at its ends: near 0 the Gaussian is right.
    - `verdict`: "identifiable", "one-sided", "practically not identifiable", "structurally not identifiable", or
        "unfinished" after Ctrl-C; and `why`.
    - `moves`: the parameters that move most along the profile, by name.
    - `place`: trajectory, channel and time of a prediction of `trajectory_at`, else None.
    """

    name: str = eqx.field(static=True)
    estimate: float
    values: Float[np.ndarray, " n"]
    drop: Float[np.ndarray, " n"]
    likelihood_drop: Float[np.ndarray, " n"]
    decrement: Float[np.ndarray, " n"]
    thetas: Float[np.ndarray, "n P"]
    level: float
    threshold: float
    df: int = eqx.field(static=True)
    intervals: tuple[tuple[float, float], ...]
    laplace: tuple[float, float]
    nonlinearity: float
    verdict: str = eqx.field(static=True)
    why: str = eqx.field(static=True)
    moves: tuple[str, ...] = eqx.field(static=True)
    place: Place | None = eqx.field(static=True)
    _quantity: AbstractQuantity
    _parameters: Parameters

    def unravel(self, index: int) -> Any:
        """The model at one of the values."""
        return self._parameters.unravel(jnp.asarray(self.thetas[index]))

    @property
    def target(self) -> Callable[[Any], Array]:
        """The quantity as a function of the model, for `choose_measurements` and `predict_function`."""
        return self._quantity.of_model(self._parameters)

    def row(self) -> dict[str, Any]:
        """What `profile_table` says of it."""
        low, high = self.intervals[0][0], self.intervals[-1][1]
        return {
            "estimate": self.estimate,
            "low": low,
            "high": high,
            "laplace_low": self.laplace[0],
            "laplace_high": self.laplace[1],
            "nonlinearity": self.nonlinearity,
            "verdict": self.verdict,
            "moves": ", ".join(self.moves[:3]),
        }

    def _shown(self):
        parts = " and ".join(f"{low:.4g} to {high:.4g}" for low, high in self.intervals)
        freedom = f" together with others (χ² with {self.df} degrees of freedom)" if self.df > 1 else ""
        return (
            f"{self.name} = {self.estimate:.4g}, {self.level:.0%}{freedom} {parts} (Gaussian {self.laplace[0]:.4g} to "
            f"{self.laplace[1]:.4g}): {self.verdict}. {self.why}"
        )


def profile_table(profiles: Sequence[Profile]) -> "pd.DataFrame":
    """A table of profiles, a row each: estimate, interval, that of the Gaussian, and the verdict.

    **Arguments:**

    - `profiles`: from `profile`.

    **Returns:** a `pandas.DataFrame` with the names of the quantities as its index.

    **Raises:** `LaplodeError` when something else than profiles is given.
    """
    if not isinstance(profiles, Sequence) or not all(isinstance(each, Profile) for each in profiles):
        raise LaplodeError("`profiles` must be a list of what laplode.profile returns.")
    return pd.DataFrame([each.row() for each in profiles], index=pd.Index([each.name for each in profiles]))


def profile(
    posterior: Posterior,
    of: str | Callable[[Any], Any] | trajectory_at | Sequence[str | Callable[[Any], Any] | trajectory_at],
    *,
    level: float = 0.95,
    num: int = 20,
    values: Any = None,
    prior: bool = True,
    simultaneous: bool = False,
    mesh: Mesh | None = None,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> Any:
    """Profile likelihood: the best fit at each value of a quantity, and the interval of values that the data allow.

    L(θ) = −log p(Y | θ) − log p(θ) is minimized subject to g(θ) = c along a path of values c, from the optimum to both
    sides, until 2 (L − L*) crosses the quantile of χ² with one degree of freedom. Where the posterior is Gaussian that
    is the interval of `laplace`; where it is not, the profile is the answer. The path goes on to twice the threshold,
    and a function that levels off at one side is also followed through infinity to the other, as a ratio whose
    denominator may vanish: where the drop comes back there are several intervals.

    ```python
    print(laplode.profile(posterior, "vector_field.birth"))
    ```

    **Arguments:**

    - `posterior`: from `laplace`, at an optimum.
    - `of`: the name of a parameter, such as "vector_field.birth" or "y0[1]"; a function of the model to one or a few
        numbers, such as `lambda m: m.birth / m.death`; `trajectory_at`; or a list of those. The name of an array stands
        for all of its entries. A parameter with a prior on a part of the line is held in its unconstrained coordinate,
        in which p(θ) is, and shown in the user's units.
    - `level`: of the intervals, between 0 and 1.
    - `num`: steps to the threshold on each side, about.
    - `values`: where to hold the quantity, (n,), in the user's units, in place of steps of its own. Ends beyond these
        are not looked for.
    - `prior`: whether the prior is part of L. Without it the profile is that of the likelihood, and directions that the
        data leave open are flat.
    - `simultaneous`: whether the intervals hold all at once with probability `level`, as a band over times: χ² then has
        as many degrees of freedom as there are quantities that vary independently (Scheffé).
    - `mesh`: devices that share the work: both sides of all quantities are looked for side by side.
    - `checkpoint`: a file to keep finished sides in. Where it exists, the same call goes on from it.
    - `progress`: whether to show a progress bar.

    **Returns:** a `Profile`; a tuple of them for a list or several numbers. After Ctrl-C, those so far.

    **Raises:** `LaplodeError` when an argument does not fit; `FitError` when a better optimum is met on the way, which
    is handed over as `.fit`.

    Raue et al. (2009), "Structural and practical identifiability analysis of partially observed dynamical models by
    exploiting the profile likelihood"; Kreutz, Raue and Timmer (2012), "Likelihood based observability analysis and
    confidence intervals for predictions of dynamic models"; Fieller (1954) for ratios.
    """
    check_from("posterior", posterior, Posterior, "laplace")
    check_count("num", num, 3)
    level = check_fraction("level", level)
    devices = check_mesh(mesh)
    found = quantities(of, posterior)
    given = None if values is None else _values(values)
    slopes = _slopes(found, posterior)
    df = _independent(slopes, posterior) if simultaneous else 1
    ask = Ask(posterior, prior, level, df, num, given)
    saved = None
    if checkpoint is not None:
        settings = (found, slopes, prior, level, df, num, given)  # functions may share a name
        told = {"`posterior`": (posterior.parameters, posterior.problem), "`of` or another argument": settings}
        saved = Checkpoint(checkpoint, "profile", told)
    units = np.sqrt(np.diag(posterior.built.predictive_covariance(slopes)))
    records = profiled(found, units, ask, mesh=devices, saved=saved, progress=progress)
    profiles = tuple(_made(found[i], ask, records[i]) for i in sorted(records))
    if not profiles:
        raise KeyboardInterrupt
    if len(profiles) < len(found) or profiles[-1].verdict == "unfinished":
        message = f"The profiles were interrupted: {len(profiles)} of {len(found)} are returned."
        warnings.warn(message, LaplodeWarning, stacklevel=2)
    single = len(found) == 1 and (isinstance(of, str) or not isinstance(of, Sequence))
    return profiles[0] if single else profiles


def _values(values: Any) -> Float[np.ndarray, " n"]:
    given = np.unique(real_array("values", values))
    if np.ndim(values) != 1 or not given.size or not np.all(np.isfinite(given)):
        raise LaplodeError(f"`values` must be finite numbers, shape (n,); got {values!r}.")
    return given


@compiled
def _slope(quantity: AbstractQuantity, view: Parameters):
    local = quantity.local(view, view.vector)
    return local.value, local.slope


def _slopes(found: list[Named], posterior: Posterior) -> Float[Array, "n P"]:
    """The gradients of all quantities at the optimum."""
    slopes = []
    for each in found:
        value, slope = _slope(each.of, posterior.parameters)
        check_slope("of", np.append(slope, value))
        slopes.append(slope)
    return jnp.stack(slopes)


def _independent(slopes: Float[Array, "n P"], posterior: Posterior) -> int:
    """How many of the quantities vary independently: the rank of their covariance by the Gaussian."""
    covariance = np.asarray(posterior.built.predictive_covariance(slopes))
    root = np.sqrt(np.diag(covariance))
    eigenvalues = np.linalg.eigvalsh(covariance / np.outer(root, root))
    return int(np.sum(eigenvalues > _TOGETHER * eigenvalues[-1]))


# ---- What is made of it


def _made(named: Named, ask: Ask, record: Record) -> Profile:
    view, center, sides, quantity = ask.posterior.parameters, record.center, record.found, named.of
    # Both sides begin with the center.
    numbers = np.concatenate([sides[0].numbers, *(side.numbers[:, 1:] for side in sides[1:])], axis=1)
    thetas = np.concatenate([sides[0].thetas, *(side.thetas[1:] for side in sides[1:])])
    better = record.better()
    if better is not None:
        raise FitError(
            f"The profile of {named.name} met a better optimum, by {center.loss - np.min(numbers[1]):.3g} nats. It "
            "is in `.fit` of this error: refine from there, and begin anew.",
            view.unravel(jnp.asarray(better)),
        )
    shown = lambda value: quantity.shown(view, value)
    root, sd = math.sqrt(2 * ask.threshold), math.sqrt(center.variance)

    def interval(*ends: float) -> tuple[float, float]:
        low, high = sorted(map(shown, ends))
        return low, high

    intervals = sorted(interval(*pair) for pair in _intervals(sides))
    moves = _moves(view, ask.posterior, named.name, thetas)
    verdict, why = _verdict(record, ask, intervals)
    raw = numbers[0]
    known = np.array([shown(value) for value in raw])
    order = np.argsort(known, kind="stable")
    drop = numbers[1] - center.loss
    return Profile(
        name=named.name,
        estimate=shown(center.value),
        values=known[order],
        drop=drop[order],
        likelihood_drop=(numbers[2] - center.likelihood)[order],
        decrement=numbers[3][order],
        thetas=thetas[order],
        level=ask.level,
        threshold=ask.threshold,
        df=ask.df,
        intervals=tuple(intervals),
        laplace=interval(center.value - root * sd, center.value + root * sd),
        nonlinearity=_nonlinearity((raw - center.value) / sd, drop, root),
        verdict=verdict,
        why=why + (f" {', '.join(moves[:3])} move with it." if moves and verdict != "identifiable" else ""),
        moves=moves,
        place=named.place,
        _quantity=quantity,
        _parameters=view,
    )


def _intervals(sides: list[Side]) -> list[tuple[float, float]]:
    """Where the drop is below the threshold, by the crossings of both sides from the center outward."""
    infinite = lambda side, sign: [sign * math.inf] if side.is_open else []
    outward = [[*side.crossings, *infinite(side, sign)] for side, sign in zip(sides, (-1, 1), strict=False)]
    low, high = [*outward, [math.inf]][:2]
    pairs = lambda ends: list(zip(ends[1::2], ends[2::2], strict=True))
    return [(low[0], high[0]), *pairs(low), *pairs(high)]


def _verdict(record: Record, ask: Ask, intervals: list[tuple[float, float]]) -> tuple[str, str]:
    sides = record.found
    if record.interrupted:
        return "unfinished", "It was interrupted."
    said = [float(np.max(side.numbers[2])) - record.center.likelihood for side in sides]
    ends = (intervals[0][0], intervals[-1][1])
    several = f" There are {len(intervals)} intervals." if len(intervals) > 1 else ""
    open_ends = []
    for name, side, end in zip(("below", "above"), sides, ends, strict=True):
        support = f" to the end of its support, {end:g}" if np.isfinite(end) else ""
        if side.is_open:
            open_ends.append(name + support + (" (no fit was found further out)" if side.ended == "stuck" else ""))
    if max(said) < _FLAT and not any(side.ended == "values" for side in sides):
        return "structurally not identifiable", "The likelihood is the same everywhere along the profile."
    if any(side.ended == "values" and side.is_open for side in sides):
        several += " It was followed no further than the values given."
    if len(open_ends) == 2:
        return "practically not identifiable", f"The profile is below the threshold {' and '.join(open_ends)}.{several}"
    if open_ends:
        return "one-sided", f"The profile is below the threshold {open_ends[0]}.{several}"
    if ask.prior and min(said) < 0.1 * ask.threshold:
        return "practically not identifiable", "At an end of the interval it is the prior that says no, not the data."
    return "identifiable", f"The profile crosses the threshold to both sides.{several}"


def _nonlinearity(offsets: Float[np.ndarray, " n"], drop: Float[np.ndarray, " n"], most: float) -> float:
    roots = np.sign(offsets) * np.sqrt(2 * np.maximum(drop, 0))
    inside = np.abs(roots) <= 1.001 * most
    return float(np.max(np.abs(roots - offsets)[inside], initial=0.0) / most)


def _moves(view: Parameters, posterior: Posterior, name: str, thetas: Float[np.ndarray, "n P"]) -> tuple[str, ...]:
    """Of all parameters but the one profiled, those that the path moves by more than a standard deviation."""
    moved = np.ptp(thetas, axis=0) / np.asarray(posterior.marginal_std())
    return tuple(view.name(int(i)) for i in np.argsort(-moved) if moved[i] > 1 and view.name(int(i)) != name)

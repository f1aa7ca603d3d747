"""The path of best fits along a quantity: from the optimum to one side, until the drop is past a threshold."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from .._errors import LaplodeError
from .constrained import Aim, Point, Walker, corrected, measured

# An end is found when the drop there is right to this, in nats.
_CROSSING = 1e-5

# The minimum of a profile is known to this, in nats; at infinity, a step of more than a standard deviation gains less
# than the second.
_CENTERED, _NOTHING, _MOST_TO_CENTER, _SHORTEST = 1e-9, 1e-4, 50, 1e-4

# A profile that gains less than this part of the threshold while its distance doubles has leveled off.
_LEVEL, _MOST_QUIET = 0.02, 4

# Beyond an end the path goes on until the drop is this many thresholds, to see whether it comes back.
_BEYOND = 2.0

# Behind infinity the path is taken up where the last step, as often as this at most, changes the sign.
_EXTRAPOLATED = (1.0, 2.0, 4.0)


class Side(NamedTuple):
    """One side of a profile, its n points in the order in which they were found, the center first.

    - `ended`: why it is no longer: "above" the threshold, "level" below it, "stuck" where no fit is found any more,
        "budget", "values" where those given were done, or "interrupted".
    - `crossings`: where the drop passes the threshold, from the center outward.
    """

    ended: str
    crossings: tuple[float, ...]
    numbers: Float[np.ndarray, "4 n"]  # the quantity, L, −log p(Y | θ), the decrement
    thetas: Float[np.ndarray, "n P"]

    @property
    def is_open(self) -> bool:
        """Whether the drop is below the threshold at infinity, as far as is known."""
        return len(self.crossings) % 2 == 0

    @property
    def values(self) -> Float[np.ndarray, " n"]:
        """The quantity at each point."""
        return self.numbers[0]


class Walk(NamedTuple):
    """How a side is walked: `num` steps to the threshold, of the signed root √(2 drop), or to `values` given.

    `unit` is a standard deviation of the quantity, with the sign of the side.
    """

    threshold: float
    num: int
    unit: float
    values: tuple[float, ...] | None = None

    @property
    def most(self) -> float:
        """The root at the threshold."""
        return math.sqrt(2 * self.threshold)


class _Trail(NamedTuple):
    """What was found so far: points, and crossings of the threshold. Both grow."""

    start: Point
    aim: Aim
    threshold: float
    points: list[Point]
    crossings: list[float]

    def drop(self, point: Point) -> float:
        """By how much L is above its minimum."""
        return point.loss - self.start.loss

    def to(self, here: Point, value: float) -> Walker:
        """The best fit at a value, from a point nearby; if the threshold lies between, the crossing is found too."""
        found = yield from corrected(self.aim, here, value)
        if found is None:
            return None
        self.points.append(found)
        if (self.drop(here) < self.threshold) != (self.drop(found) < self.threshold):
            self.crossings.append((yield from self._crossing(here, found)))
        return found

    def _crossing(self, first: Point, last: Point) -> Walker:
        """Where the drop is the threshold, between two points, by the Illinois method."""
        gap = lambda point: self.drop(point) - self.threshold
        (low, high), (f_low, f_high) = (first.value, last.value), (gap(first), gap(last))
        nearest, side = first if abs(f_low) < abs(f_high) else last, 0
        for _ in range(20):
            value = (low * f_high - high * f_low) / (f_high - f_low)
            found = yield from corrected(self.aim, nearest, value)
            if found is None:
                break
            self.points.append(found)
            nearest, f = found, gap(found)
            if abs(f) < _CROSSING:
                return value
            if (f > 0) == (f_high > 0):
                high, f_high, f_low, side = value, f, f_low * (0.5 if side == 1 else 1), 1
            else:
                low, f_low, f_high, side = value, f, f_high * (0.5 if side == -1 else 1), -1
        return (low * f_high - high * f_low) / (f_high - f_low)

    def side(self, ended: str) -> Side:
        """What is kept of it."""
        numbers = [(point.value, point.loss, point.likelihood, point.decrement) for point in self.points]
        thetas = [point.theta for point in self.points]
        return Side(
            ended,
            tuple(self.crossings),
            np.reshape(numbers, (-1, 4)).T,
            np.reshape(thetas, (-1, len(self.start.theta))),
        )


def centered(aim: Aim, theta: Float[np.ndarray, " P"], unit: float) -> Walker:
    """The minimum of the profile: Newton steps along it, of which dL/dc is the multiplier, shortened where L rises.

    Where the minimum lies at infinity, that is where ever longer steps gain next to nothing.
    """
    start, longest = (yield from measured(aim, theta)), unit
    for _ in range(_MOST_TO_CENTER):
        if 0.5 * start.multiplier**2 * start.variance < _CENTERED or longest < _SHORTEST * unit:
            break
        step = float(np.clip(-start.multiplier * start.variance, -longest, longest))
        found = yield from corrected(aim, start, start.value + step)
        if found is None or found.loss > start.loss:
            longest = abs(step) / 4
            continue
        gained, start = start.loss - found.loss, found
        if abs(step) > unit and gained < _NOTHING:
            break
        longest = 2 * max(longest, abs(step))
    return start


def walked(start: Point, aim: Aim, walk: Walk) -> Walker:
    """From the optimum to one side. Ctrl-C ends it where it is."""
    trail = _Trail(start, aim, walk.threshold, [start], [])
    try:
        to_its_end = _stepped(trail, walk) if walk.values is None else _visited(trail, walk.values)
        return trail.side((yield from to_its_end))
    except KeyboardInterrupt:
        return trail.side("interrupted")


def _visited(trail: _Trail, values: tuple[float, ...]) -> Walker:
    """To each of the values, by halves of the way where need be."""
    here = trail.start
    for value in values:
        for part in (0.5, 0.25, 0.125):
            found = yield from trail.to(here, value)
            if found is not None:
                break
            here = (yield from trail.to(here, here.value + part * (value - here.value))) or here
        else:
            return "stuck"
        here = found
    return "values"


def _stepped(trail: _Trail, walk: Walk) -> Walker:
    """By even steps of the root, which may triple; twice as long beyond an end."""
    here, root, quiet = trail.start, 0.0, 0
    even = 2 * walk.most / walk.num
    step = even * walk.unit
    for _ in range(4 * walk.num):
        found = yield from trail.to(here, here.value + step)
        if found is None:
            step *= 0.25
            if abs(step) < 1e-4 * even * abs(walk.unit):
                return "above" if root > walk.most else "stuck"
            continue
        before, root = root, math.sqrt(2 * max(trail.drop(found), 0.0))
        if root**2 >= 2 * _BEYOND * walk.threshold:
            return "above"
        # It has leveled off where the last of many ever longer steps gained next to nothing.
        gained = 0.5 * (root**2 - before**2)
        quiet = quiet + 1 if gained < _LEVEL * walk.threshold and abs(step) > abs(walk.unit) else 0
        if quiet > _MOST_QUIET:
            return "above" if root > walk.most else "level"
        if len(trail.points) > 2 * walk.num:
            return "above" if root > walk.most else "budget"
        slope = (root - before) / abs(step)
        wanted = even / slope if slope > 0 else math.inf
        if root > walk.most:
            wanted = 2 * wanted if slope > 0 else abs(step)  # what comes back is not to be stepped over
        here, step = found, math.copysign(min(wanted, 3 * abs(step)), walk.unit)
    return "budget"


def joined(other: Side, side: Side, start: Point, aim: Aim, walk: Walk) -> Walker:
    """The `other` side of one that has leveled off, with what lies behind infinity.

    A ratio whose denominator may vanish comes back from the other end of the line. So the path is taken on in θ to
    where the quantity lies on the other side of its center, and walked from there toward the center.
    """
    if side.ended != "level" or other.ended != "above" or len(side.thetas) < 2:
        return other
    trail = _Trail(start, aim, walk.threshold, [], [])
    here = yield from _reached(side, start, aim)
    if here is not None:
        step = 0.5 * (start.value - here.value)
        for _ in range(4 * walk.num):
            found = yield from trail.to(here, here.value + step)
            if found is None or trail.crossings:
                break
            slope = (trail.drop(found) - trail.drop(here)) / abs(step)
            wanted = 2 * walk.threshold / walk.num / slope if slope > 0 else math.inf
            here, step = found, math.copysign(min(wanted, 0.5 * abs(start.value - found.value)), step)
    if not trail.crossings:
        return other
    more = trail.side(other.ended)
    numbers, thetas = ([one, two] for one, two in zip(other[2:], more[2:], strict=True))
    return Side(
        other.ended, other.crossings + more.crossings, np.concatenate(numbers, axis=1), np.concatenate(thetas, axis=0)
    )


def _reached(side: Side, start: Point, aim: Aim) -> Walker:
    """A fit behind infinity: in the direction of the last step in θ, on the other side of the center."""
    last, direction = side.thetas[-1], side.thetas[-1] - side.thetas[-2]
    for length in _EXTRAPOLATED:
        try:
            found = yield from measured(aim, last + length * direction)
        except LaplodeError:
            return None
        if (found.value - start.value) * (side.values[-1] - start.value) < 0:
            return (yield from corrected(aim, found, 0.5 * (found.value + start.value)))
    return None

"""Profiles under way: their centers, then their sides, of all quantities side by side; what is known is kept."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from .._files import Checkpoint
from .._posterior.posterior import Posterior
from .._progress import tqdm
from .constrained import Aim, Held, Point, measured, together
from .path import Side, Walk, centered, joined, walked
from .quantity import Named

# An optimum that is better by this, in nats, is another one.
_BETTER = 1e-2


class Ask(eqx.Module):
    """What is asked of each quantity."""

    posterior: Posterior
    prior: bool
    level: float
    df: int
    num: int
    values: Float[np.ndarray, " n"] | None

    @property
    def threshold(self) -> float:
        """The drop at the ends."""
        from scipy.special import chdtri

        return 0.5 * float(chdtri(self.df, 1 - self.level))


class Record(NamedTuple):
    """What is known of a profile: its center, its sides, the lower first, and whether these have been joined."""

    center: Point
    sides: tuple[Side | None, Side | None] = (None, None)
    whole: bool = False

    def with_side(self, number: int, side: Side) -> "Record":
        """One more, or in place of another."""
        low, high = self.sides
        return self._replace(sides=(side, high) if number == 0 else (low, side))

    @property
    def found(self) -> list[Side]:
        """The sides that there are."""
        return [side for side in self.sides if side is not None]

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C came."""
        return len(self.found) < 2 or any(side.ended == "interrupted" for side in self.found)

    def better(self) -> Float[np.ndarray, " P"] | None:
        """Parameters on the path at which L is less than at its center; None where there are none."""
        best = min(self.found, key=lambda side: np.min(side.numbers[1]))
        index = int(np.argmin(best.numbers[1]))
        return best.thetas[index] if best.numbers[1, index] < self.center.loss - _BETTER else None


class _Under(NamedTuple):
    """What is under way: the profiles by their numbers, and what they are of. `records` grow."""

    found: list[Named]
    units: Float[np.ndarray, " n"]
    ask: Ask
    aims: list[Aim]
    records: dict[int, Record]
    keep: Callable[[], None]

    def walk(self, index: int, number: int) -> Walk:
        """How a side is walked."""
        ask, center, sign = self.ask, self.records[index].center, (-1, 1)[number]
        values = None
        if ask.values is not None:
            hidden = [self.found[index].of.hidden(ask.posterior.parameters, float(value)) for value in ask.values]
            offsets = sorted(sign * (value - center.value) for value in hidden)
            values = tuple(center.value + sign * offset for offset in offsets if offset > 0)
        return Walk(ask.threshold, ask.num, sign * self.units[index], values)

    def with_center(self, index: int, center: Point) -> None:
        """Of what a checkpoint holds, sides that are known remain."""
        known = self.records.get(index)
        self.records[index] = Record(center) if known is None else known._replace(center=center)

    def with_side(self, key: tuple[int, int], side: Side) -> None:
        """One that has come to its end."""
        self.records[key[0]] = self.records[key[0]].with_side(key[1], side)
        self.keep()


def profiled(
    found: list[Named],
    units: Float[np.ndarray, " n"],
    ask: Ask,
    *,
    mesh: Mesh | None,
    saved: Checkpoint | None,
    progress: bool,
) -> dict[int, Record]:
    """What is known of each quantity, by its number; after Ctrl-C of those that were begun."""
    records = {} if saved is None else _read(saved)
    with tqdm(total=2 * len(found), desc="Profile", unit="side", disable=not progress) as bar:

        def keep() -> None:
            bar.update(sum(len(each.found) for each in records.values()) - bar.n)
            if saved is not None:
                _write(saved, records)

        under = _Under(found, units, ask, aims_of(found, ask), records, keep)
        try:
            for group in _groups(under.aims):
                begin = {i: np.asarray(ask.posterior.mean) for i in group if i not in records}
                while begin or any(not records[i].whole for i in group):
                    begin = _round(under, group, begin, mesh)
        except KeyboardInterrupt:
            pass
    return records


def _round(
    under: _Under, group: list[int], begin: dict[int, Float[np.ndarray, " P"]], mesh: Mesh | None
) -> dict[int, Float[np.ndarray, " P"]]:
    """All profiles that one program serves, from where they `begin`; of those to begin anew, where.

    They begin at the posterior's optimum. That is one with the prior: without it the likelihood may have a better one
    on the path, and then a profile begins anew from there.
    """
    aims, records, held = under.aims, under.records, under.aims[group[0]].held
    starts = {i: centered(aims[i], theta, under.units[i]) for i, theta in begin.items()}
    starts |= {i: measured(aims[i], records[i].center.theta) for i in group if i in records and not records[i].whole}
    together(held, starts, under.with_center, mesh)
    keys = [(i, number) for i in starts for number in (0, 1)]
    sides = {
        (i, number): walked(records[i].center, aims[i], under.walk(i, number))
        for i, number in keys
        if records[i].sides[number] is None
    }
    together(held, sides, under.with_side, mesh)
    both = {
        (i, number): joined(
            *(records[i].found[number], records[i].found[1 - number], records[i].center),
            *(aims[i], under.walk(i, 1 - number)),
        )
        for i, number in keys
    }
    together(held, both, under.with_side, mesh)
    anew = {}
    for i in starts:
        better = None if under.ask.prior else records[i].better()
        if better is None:
            records[i] = records[i]._replace(whole=True)
        else:
            anew[i] = better
            del records[i]
    under.keep()
    return anew


def aims_of(found: list[Named], ask: Ask) -> list[Aim]:
    """What each of them is looked for by."""
    posterior = ask.posterior
    around = posterior.flow
    held = lambda quantity: Held(
        flow=around,
        problem=posterior.problem,
        quantity=eqx.filter(quantity, eqx.is_array, inverse=True),
        weight=jnp.asarray(float(ask.prior)),
        route=around.jacobian_route(),
        bends=around.has_second_pushforward(),
    )
    return [Aim(held(each.of), eqx.filter(each.of, eqx.is_array)) for each in found]


def _groups(aims: list[Aim]) -> list[list[int]]:
    """The numbers of those that one program serves: of one kind, with arrays of one shape."""
    groups: list[list[int]] = []
    shapes = lambda aim: [x.shape for x in jax.tree.leaves(aim.quantity)]
    for i, aim in enumerate(aims):
        for group in groups:
            first = aims[group[0]]
            if shapes(first) == shapes(aim) and eqx.tree_equal(first.held.quantity, aim.held.quantity) is True:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def _write(saved: Checkpoint, records: Mapping[int, Record]) -> None:
    state, arrays = [], []
    for index, record in records.items():
        kept = [(i, side) for i, side in enumerate(record.sides) if side is not None and side.ended != "interrupted"]
        sides = [(i, side.ended, side.crossings) for i, side in kept]
        state.append((index, record.whole, record.center[2:], sides))
        arrays += [record.center.theta, *(array for _, side in kept for array in side[2:])]
    saved.write({"records": state}, arrays)


def _read(saved: Checkpoint) -> dict[int, Record]:
    found = saved.read()
    if found is None:
        return {}
    state, arrays = found
    rest = iter(np.asarray(array) for array in arrays)
    records = {}
    for index, whole, numbers, sides in state["records"]:
        record = Record(Point(next(rest), (), *numbers), whole=whole)
        for i, ended, crossings in sides:
            record = record.with_side(i, Side(ended, tuple(crossings), next(rest), next(rest)))
        records[index] = record
    return records

"""Channels of different kinds."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._errors import LaplodeError
from .likelihood import AbstractLikelihood, check_scale_fits, likelihood_of


class PerChannel(AbstractLikelihood):
    """A likelihood for each channel, such as counts in one and a concentration in another.

    **Arguments:**

    - `in_order`: likelihoods in the order of the channels, `PerChannel(Poisson(), LogNormal(0.15))`; or one mapping
        from the names of the channels to them. Each sees one channel: its scale and its limits are numbers.
    - `by_name`: the same by the names of the channels, `PerChannel(cases=Poisson(), drug=LogNormal(0.15))`, which are
        those of `Trajectories(channels=...)`.

    Where some of the likelihoods have no scale, the model predicts the K locations and then the logarithms of the
    scales of these channels alone, in their order: `NeuralODE(..., scale=...)` has so many.

    **Raises:** `LaplodeError` when there is no likelihood, there are two ways to tell their channels, or one is of the
    wrong kind. `Problem` raises where they do not fit the channels of the data.
    """

    likelihoods: tuple[AbstractLikelihood, ...]
    names: tuple[str | int, ...] | None = eqx.field(static=True)

    def __init__(self, *in_order: Any, **by_name: Any):
        named = by_name
        if len(in_order) == 1 and isinstance(in_order[0], Mapping):
            named, in_order = {**in_order[0], **by_name}, ()
        if bool(in_order) == bool(named):
            raise LaplodeError(
                "`in_order`: give a likelihood for each channel, either in order, as PerChannel(Poisson(), "
                "LogNormal(0.15)), or by the names of the channels, as PerChannel(cases=Poisson(), "
                f"drug=LogNormal(0.15)); got {len(in_order)} in order and {len(named)} by name."
            )
        given = named or dict(enumerate(in_order))
        self.likelihoods = tuple(likelihood_of(f"likelihood of channel {name!r}", each) for name, each in given.items())
        self.names = tuple(named) or None

    def channel_of(self, channels):
        scales = (k for k, each in enumerate(self.likelihoods) for _ in each.channel_of(1)[1:])
        return (*range(channels), *scales)

    def _split(self, prediction: Float[Array, "... F"]) -> list[Array]:
        """The predictions of each channel."""
        channel = np.array(self.channel_of(len(self.likelihoods)))
        return [prediction[..., np.flatnonzero(channel == k)] for k in range(len(self.likelihoods))]

    def _joined(self, parts: list[Array]) -> Float[Array, "... F"]:
        """Inverse of `_split`."""
        order = np.argsort(self.channel_of(len(self.likelihoods)), kind="stable")
        return jnp.concatenate(parts, axis=-1)[..., np.argsort(order)]

    def _pairs(self, prediction: Float[Array, "... F"]) -> list[tuple[AbstractLikelihood, Array]]:
        return list(zip(self.likelihoods, self._split(prediction), strict=True))

    @eqx.filter_jit
    def sample(self, key, prediction):
        keys = jax.random.split(key, len(self.likelihoods))
        drawn = [each.sample(k, part) for k, (each, part) in zip(keys, self._pairs(prediction), strict=True)]
        return jnp.concatenate(drawn, axis=-1)

    @eqx.filter_jit
    def log_prob(self, prediction, ys):
        seen = [each.log_prob(part, ys[..., k : k + 1]) for k, (each, part) in enumerate(self._pairs(prediction))]
        return jnp.concatenate(seen, axis=-1)

    def fisher(self, prediction, ys):
        pairs = enumerate(self._pairs(prediction))
        return self._joined([each.fisher(part, ys[..., k : k + 1]) for k, (each, part) in pairs])

    def expected_fisher(self, prediction):
        return self._joined([each.expected_fisher(part) for each, part in self._pairs(prediction)])

    def stabilize(self, prediction):
        return self._joined([each.stabilize(part) for each, part in self._pairs(prediction)])

    def unstabilize(self, stabilized):
        return self._joined([each.unstabilize(part) for each, part in self._pairs(stabilized)])

    def noise(self, channels):
        return tuple(noise for each in self.likelihoods for noise in each.noise(1))

    def scaled(self, by):
        by = jnp.broadcast_to(by, (len(self.likelihoods),))
        scaled = tuple(each.scaled(by[k]) for k, each in enumerate(self.likelihoods))
        return eqx.tree_at(lambda l: l.likelihoods, self, scaled)

    def found(self):
        return eqx.tree_at(lambda l: l.likelihoods, self, tuple(each.found() for each in self.likelihoods))

    @property
    def by_value(self):
        return any(each.by_value for each in self.likelihoods)

    def elsewhere(self, scale, shape, observed):
        if not self.by_value:
            return super().elsewhere(scale, shape, observed)
        if scale is not None:
            check_scale_fits(scale, shape)
        found = []
        for k, each in enumerate(self.likelihoods):
            own = scale if scale is None or not np.ndim(scale) else np.asarray(scale)[..., k : k + 1]
            found.append(each.elsewhere(own if each.by_value else None, (*shape[:2], 1), observed))
        return eqx.tree_at(lambda l: l.likelihoods, self, tuple(found))

    def with_data(self, data):
        given, num = dict(zip(self._labels(), self.likelihoods, strict=True)), data.ys.shape[2]
        names = range(num) if self.names is None else data.channels
        if names is None:
            raise LaplodeError(
                f"`likelihood` names channels, {', '.join(map(repr, given))}, and those of the data have no names: "
                "Trajectories(ts, ys, channels=[...]), or give the likelihoods in order."
            )
        if set(names) != set(given):
            of, there = (", ".join(map(repr, some)) for some in (given, names))
            raise LaplodeError(
                f"`likelihood` is of {len(given)} channels, {of}, and the data have K = {num}, {there}. Give each one."
            )
        found = []
        for k, name in enumerate(names):
            with _naming(name):
                found.append(given[name].with_data(eqx.tree_at(lambda d: d.ys, data, data.ys[..., k : k + 1])))
        made = PerChannel(*found)
        return made if self.names is None else PerChannel(dict(zip(names, made.likelihoods, strict=True)))

    def check(self, ys):
        for k, (name, each) in enumerate(zip(self._labels(), self.likelihoods, strict=True)):
            # The others are missing rather than cut away, so that a message has the index of the user's array.
            alone = np.where(np.arange(ys.shape[2]) == k, ys, np.nan)
            with _naming(name):
                each.check(alone)

    def _labels(self) -> tuple[str | int, ...]:
        return tuple(range(len(self.likelihoods))) if self.names is None else self.names


@contextlib.contextmanager
def _naming(channel: str | int) -> Iterator[None]:
    """Errors that name the channel."""
    try:
        yield
    except LaplodeError as error:
        raise LaplodeError(f"The likelihood of channel {channel!r} does not fit: {error}") from error

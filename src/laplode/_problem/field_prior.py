"""A prior on the vector field itself: a Gaussian process at context states."""

import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._checks import check_count, check_positive, is_real_array, real_array
from .._errors import LaplodeError
from .constraint import AbstractConstraint, value_of
from .data import Trajectories, check_args
from .prior import GROUPINGS, AbstractPrior, Grouping, prior_of

# ---- Kernels


class AbstractKernel(eqx.Module):
    """A correlation of the field at two inputs, which falls with their distance in lengths.

    Along a dimension with a finite period, the distance is that of the two points on a circle.
    """

    periods: eqx.AbstractVar[Float[np.ndarray, " I"] | None]

    @abc.abstractmethod
    def of_square(self, square: Float[Array, "C C"]) -> Float[Array, "C C"]:
        """The correlation at a squared distance in lengths."""

    def __call__(self, inputs: Float[Array, "C I"], length: Float[Array, " I"]) -> Float[Array, "C C"]:
        """The correlations of all pairs of inputs."""
        apart = inputs[:, None] - inputs
        if self.periods is not None:
            turning = np.isfinite(self.periods)
            around = np.where(turning, self.periods, 1.0) / np.pi
            apart = jnp.where(turning, around * jnp.sin(apart / around), apart)
        return self.of_square(jnp.sum((apart / length) ** 2, axis=-1))


def _check_periods(periods: Any) -> Float[np.ndarray, " I"] | None:
    if periods is None:
        return None
    found = real_array("periods", periods)
    if found.ndim != 1 or not np.all(found > 0):
        raise LaplodeError(f"`periods` must be positive, one for each input, np.inf for none; got {periods!r}.")
    return found


class SquaredExponential(AbstractKernel):
    """The correlation exp(−½ r²): smooth fields.

    **Arguments:**

    - `periods`: of each input of the field, as of an angle; `np.inf` where it has none. None if none has.

    **Raises:** `LaplodeError` when a period is not positive.
    """

    periods: Float[np.ndarray, " I"] | None = eqx.field(converter=_check_periods, default=None)

    def of_square(self, square):
        return jnp.exp(-0.5 * square)


class Matern52(AbstractKernel):
    """The correlation (1 + √5 r + 5/3 r²) exp(−√5 r): fields with two derivatives.

    **Arguments:**

    - `periods`: as in `SquaredExponential`.

    **Raises:** `LaplodeError` when a period is not positive.

    Rasmussen and Williams (2006), "Gaussian processes for machine learning", (4.17).
    """

    periods: Float[np.ndarray, " I"] | None = eqx.field(converter=_check_periods, default=None)

    def of_square(self, square):
        # A distance has no derivative at 0, where the correlation does not change.
        r = jnp.sqrt(5 * jnp.where(square > 0, square, 1.0))
        return jnp.where(square > 0, (1 + r + r**2 / 3) * jnp.exp(-r), 1.0)


# ---- The prior


# The box of the context states is this much wider than that of the data.
_WIDER = 1.3


# The evidence has maxima at short and at long lengths: a second search starts so much farther, at the same slope.
_LONGER = 4.0


class FieldPrior(AbstractConstraint):
    """A Gaussian process as the prior of the vector field, at context states in and around the data.

    A prior of weights says little of the field where no data are. This one says that the field there is as large as
    `amplitude`, and changes over a `length`: f(c₁), …, f(c_C) ~ Normal(0, K) for each output of the field, beside a
    weak prior of the weights. Amplitude and length are best chosen by the data:

    ```python
    problem = laplode.Problem(data, laplode.Gaussian(0.1), laplode.FieldPrior())
    fit = laplode.refine(model, problem)
    posterior = laplode.maximize_evidence(laplode.laplace(fit.model, problem), online=True)
    ```

    With `precision="one"`, `maximize_evidence` finds one factor of all amplitudes and one of all lengths, with "leaf"
    or "parameter" one of each output, by the evidence of the model linearized around θ*, of which the prior's
    normalizer is known. The curvature is taken of the linearized field too, as in `SoftConstraint`.

    **Arguments:**

    - `amplitude`: the standard deviation of the field, in its units, a number or one for each output; by default the
        steepest change over half of a channel's range seen in the data.
    - `length`: over which it changes, in the units of its inputs: a number, one for each input (I,), or for each output
        and input; by default half of the range of the contexts. Inputs are the states and, as far as these are given,
        `ts` and the numbers in `args`.
    - `weights`: the prior of the parameters beside it, any that `Problem` takes.
    - `kernel`: `SquaredExponential()` or `Matern52()`, with periods where an input is an angle.
    - `contexts`: states (C, D). By default `num_contexts` points of a Sobol sequence in the box of the data, 1.3 times
        as wide, where predictions are the states.
    - `ts`, `args`: times (C,) and `args` with leading axis C of the contexts, for a field that depends on them.
    - `part`: the part of the model that it is on, a function that picks what is called as (t, y, args), as in
        `part=lambda model: model.vector_field.unknown`; the whole vector field by default.
    - `nugget`: the variance, as a part of that by `amplitude`, of what in the field the kernel does not describe; it
        keeps K invertible.
    - `num_contexts`: how many contexts are made, unless they are given.

    **Raises:** `LaplodeError` when an argument is of the wrong kind or shape.

    Cinquin, Pförtner, Fortuin, Hennig and Bamler (2024), "FSP-Laplace: function-space priors for the Laplace
    approximation in Bayesian deep learning".
    """

    amplitude: Any  # These three are None until `Problem` shows the data to what was not given.
    length: Any
    contexts: Any
    weights: AbstractPrior
    kernel: AbstractKernel
    ts: Float[np.ndarray, " C"] | None
    args: PyTree
    part: Callable[[Any], Callable[..., Any]] | None
    nugget: float = eqx.field(static=True)
    num_contexts: int = eqx.field(static=True)
    of_states: bool = eqx.field(static=True)

    def __init__(
        self,
        amplitude: Any = None,
        length: Any = None,
        *,
        weights: Any = 0.03,
        kernel: AbstractKernel | None = None,
        contexts: Any = None,
        ts: Any = None,
        args: PyTree = None,
        part: Callable[[Any], Callable[..., Any]] | None = None,
        nugget: float = 1e-6,
        num_contexts: int = 41,
    ):
        positive = lambda name, value: None if value is None else jnp.asarray(check_positive(name, value))
        self.amplitude, self.length = positive("amplitude", amplitude), positive("length", length)
        self.weights, self.kernel = prior_of("weights", weights), SquaredExponential() if kernel is None else kernel
        self.nugget, self.num_contexts = (
            float(check_positive("nugget", nugget)),
            check_count("num_contexts", num_contexts),
        )
        self.of_states, self.part = contexts is None, part
        if not isinstance(self.kernel, AbstractKernel):
            raise LaplodeError(f"`kernel` must be SquaredExponential() or Matern52(), got {type(kernel).__name__}.")
        if part is not None and not callable(part):
            raise LaplodeError(f"`part` must pick a part of the model, as in lambda model: ...; got {part!r}.")
        if contexts is None:
            if not (ts is None and args is None):
                raise LaplodeError("`contexts` is missing: `ts` and `args` are those of contexts of your own.")
            self.contexts = self.ts = self.args = None
            return
        self.contexts = real_array("contexts", contexts)
        if self.contexts.ndim != 2 or not np.all(np.isfinite(self.contexts)):
            raise LaplodeError(f"`contexts` must be finite and of shape (C, D), got shape {self.contexts.shape}.")
        num = len(self.contexts)
        self.ts = None if ts is None else real_array("ts", ts, "times")
        if self.ts is not None and self.ts.shape != (num,):
            raise LaplodeError(f"`ts` must be one time for each of the C = {num} contexts, got shape {self.ts.shape}.")
        self.args = check_args("args", args, num)

    def with_data(self, data):
        self = super().with_data(data)
        is_none = lambda x: x is None
        if self.contexts is None:
            if data.args is not None:
                raise LaplodeError(
                    "`contexts` of the field prior is missing: the data have `args`, so give states, and `args` for "
                    "each of them."
                )
            self = eqx.tree_at(lambda p: p.contexts, self, _around(data, self.num_contexts), is_leaf=is_none)
        if self.amplitude is None:
            if self.part is not None:
                raise LaplodeError("`amplitude` of the field prior is missing: that of a `part` is not in the data.")
            self = eqx.tree_at(lambda p: p.amplitude, self, jnp.asarray(_slopes(data)), is_leaf=is_none)
        if self.length is None:
            self = eqx.tree_at(lambda p: p.length, self, self._half_range, is_leaf=is_none)
        return self

    @property
    def _inputs(self) -> Float[Array, "C I"]:
        """What the field depends on, a row for each context."""
        columns = [self.contexts, self.ts, *filter(is_real_array, jax.tree.leaves(self.args))]
        return jnp.concatenate([jnp.reshape(x, (len(x), -1)) for x in columns if x is not None], axis=1)

    @property
    def _half_range(self) -> Float[Array, " I"]:
        """Of each input; 1 where it does not change."""
        half = jnp.ptp(self._inputs, axis=0) / 2
        return jnp.where(half > 0, half, 1.0)

    def values_of(self, model: Any) -> Float[Array, "C D"]:
        """The field at the contexts."""
        field = model.vector_field if self.part is None else self.part(model)
        ts = np.zeros(len(self.contexts)) if self.ts is None else self.ts
        return jax.vmap(lambda t, y, args: jnp.asarray(field(t, y, args)).ravel())(ts, self.contexts, self.args)

    def check(self, view):
        self.weights.check(view)
        if self.of_states and not getattr(view.model, "sees_states", True):
            raise LaplodeError(
                "`contexts` of the field prior is missing: the model observes something else than its states, so that "
                "the data do not say where these are. Give contexts, as an array of states."
            )
        found = value_of("the field", self.values_of, view)
        num, width = found.shape[1], self._inputs.shape[1]
        for name, value, shapes in (
            ("amplitude", self.amplitude, ((), (num,))),
            ("length", self.length, ((), (width,), (num, width))),
        ):
            if value.shape not in shapes:
                raise LaplodeError(
                    f"`{name}` of the field prior has shape {value.shape}, which is none of "
                    f"{', '.join(map(str, shapes))}, for the {num} outputs of the field and its {width} inputs."
                )
        if self.ts is None and np.any(value_of("the field", self._moves_with_time, view)):
            raise LaplodeError(
                "`ts` of the field prior is missing: the field depends on time. Give contexts, and the time of each of "
                "them."
            )

    def _moves_with_time(self, model: Any) -> Float[Array, "C D"]:
        """The derivative of the field in time at the contexts."""
        zeros = jnp.zeros(len(self.contexts))
        at = lambda ts: eqx.tree_at(lambda p: p.ts, self, ts, is_leaf=lambda x: x is None).values_of(model)
        return jax.jvp(at, (zeros,), (jnp.ones_like(zeros),))[1]

    def whitened(self, values):
        inputs, (amplitude, length) = self._inputs, self._by_output(values.shape[1])

        def of_output(values, amplitude, length):
            correlation = self.kernel(inputs, length) + self.nugget * jnp.eye(len(inputs))
            return jsl.solve_triangular(jnp.linalg.cholesky(correlation), values / amplitude, lower=True)

        return jax.vmap(of_output, in_axes=(1, 0, 0))(values, amplitude, length).ravel()

    def _num_outputs(self, view: Any) -> int:
        return eqx.filter_eval_shape(self.values_of, view.model).shape[1]

    def _by_output(self, num: int) -> tuple[Float[Array, " D"], Float[Array, "D I"]]:
        """The amplitude and the lengths of each output."""
        return jnp.broadcast_to(self.amplitude, num), jnp.broadcast_to(self.length, (num, self._half_range.size))

    # ---- Hyperparameters: logarithms of amplitudes and, in half-ranges of the contexts, of lengths

    @property
    def at_bounds(self):
        """What it means where one has run to a bound."""
        return (
            "the field is smaller or changes faster than that",
            "the field is as good as linear, or the prior as good as flat",
        )

    def starts(self):
        longer = eqx.tree_at(lambda p: (p.amplitude, p.length), self, (_LONGER * self.amplitude, _LONGER * self.length))
        return [self, longer]

    def groups(self, view, grouping):
        return np.full(view.size, -1)

    def hyperparameters(self, view, grouping):
        amplitude, length = self._by_output(self._num_outputs(view))
        lengths = jnp.mean(jnp.log(length / self._half_range), axis=1)
        return jnp.concatenate([_shared(grouping, jnp.log(amplitude)), _shared(grouping, lengths)])

    def hyperparameter_names(self, view, grouping):
        num = self.hyperparameters(view, grouping).size // 2
        of = [""] if num == 1 else [f" of output {i}" for i in range(num)]
        return [f"the {what} of the field prior{each}" for what in ("amplitude", "length") for each in of]

    def at(self, view, grouping, log_values):
        amplitude, length = self._by_output(self._num_outputs(view))
        more = jnp.exp(log_values - self.hyperparameters(view, grouping)).reshape(2, -1)
        return eqx.tree_at(lambda p: (p.amplitude, p.length), self, (more[0] * amplitude, more[1][:, None] * length))


def _shared(grouping: Grouping, each: Float[Array, " D"]) -> Float[Array, " G"]:
    """The mean, if there is one hyperparameter for all outputs."""
    return jnp.mean(each, keepdims=True) if grouping is GROUPINGS["one"] else each


def _around(data: Trajectories, num: int) -> Float[np.ndarray, "C K"]:
    """Points of a Sobol sequence in the box of what was observed, and somewhat around it."""
    from scipy.stats import qmc  # it takes a while to import

    seen = data.ys.reshape(-1, data.ys.shape[2])
    seen = seen if data.y0 is None or data.y0.shape[1] != seen.shape[1] else np.concatenate([seen, data.y0])
    low, high = np.nanmin(seen, axis=0), np.nanmax(seen, axis=0)
    middle, half = (low + high) / 2, _WIDER * np.maximum(high - low, np.finfo(float).tiny) / 2
    unit = qmc.Sobol(seen.shape[1], scramble=False).random_base2(math.ceil(math.log2(num + 1)))[1 : num + 1]
    return middle + half * (2 * unit - 1)


# Of more times than this, so many are looked at.
_MOST_TIMES = 400


def _slopes(data: Trajectories) -> Float[np.ndarray, " K"]:
    """The steepest change of each channel over half of its range or more, which noise does not make much steeper."""
    half = (np.nanmax(data.ys, axis=(0, 1)) - np.nanmin(data.ys, axis=(0, 1))) / 2
    steepest = np.zeros(len(half))
    for ts, ys in zip(np.asarray(data.ts), np.asarray(data.ys), strict=True):
        some = np.unique(np.linspace(0, len(ts) - 1, min(len(ts), _MOST_TIMES)).astype(int))
        earlier, later = np.triu_indices(len(some), 1)
        ts, ys = ts[some], ys[some]
        time, change = (ts[later] - ts[earlier])[:, None], np.abs(ys[later] - ys[earlier])
        slope = np.where((change >= half) & (time > 0), change / np.where(time > 0, time, 1.0), 0.0)
        steepest = np.maximum(steepest, np.max(slope, axis=0, initial=0.0))
    if not np.all(steepest > 0):
        raise LaplodeError(
            f"`amplitude` of the field prior is missing: channel {int(np.argmin(steepest))} of the data is constant."
        )
    return steepest

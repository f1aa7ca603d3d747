"""From a first guess to a fitted model: maximum a posteriori by Optax."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree

from .._checks import check_count, check_key
from .._devices import compiled, free_bytes
from .._errors import FitError, LaplodeError, warn
from .._files import Checkpoint, Path
from .._model.given import taken
from .._model.neural_ode import NeuralODE, starts
from .._model.parameters import Parameters, Where, parameters
from .._problem.problem import Problem, check_problem
from .._progress import tqdm
from .._solve.autodiff import pullback_bytes
from .._solve.flows import ForeignFlow, ReplayedFlow
from .._solve.maps import replayed
from .._solve.objective import NegativeLogLikelihood
from .._solve.replay import Steps, accepted_steps, padded_size
from .optimizer import AbstractUpdate, optimizer_of, update_of
from .result import Fit

# Optimization steps between two looks at the loss.
_CHUNK = 25


class _State(eqx.Module):
    """One restart. `losses` is a buffer of one chunk, of which `done` steps are; `alive` turns false at the first step
    that is not finite, and `gradient_failed` says that the loss still was. `needed` is how many steps of the solver the
    last step took.
    """

    trainable: PyTree
    optimizer_state: PyTree
    alive: Array
    gradient_failed: Array
    best: PyTree
    best_loss: Array
    losses: Array
    done: Array
    needed: Array


class _Course(NamedTuple):
    """What a fit goes through: a share of the steps on the first times of the data, for each of some lengths."""

    view: Parameters
    problem: Problem
    update: AbstractUpdate
    lengths: tuple[int, ...]
    share: tuple[int, ...]

    def fitted(self, best: PyTree, best_loss: Array, losses: Sequence[np.ndarray], reason: str) -> Fit:
        """The best of all restarts, and the others with it."""
        every, view = np.asarray(best_loss), self.view
        finite = np.isfinite(every)
        first = int(np.argmin(np.where(finite, every, np.inf)))
        chosen = lambda i: _split(self.problem, jax.tree.map(lambda x: x[i], best))
        selected, found = chosen(first)
        history = np.concatenate(losses, axis=1)[first] if losses else np.zeros(0)
        order = [int(i) for i in np.argsort(every) if len(every) > 1 and finite[i]]
        return Fit(
            view.build(selected),
            history,
            eqx.tree_at(lambda p: p.likelihood, found, found.likelihood.found()),
            loss=float(every[first]),
            reason=reason,
            steps=len(history),
            horizons=tuple(zip(self.lengths, self.share, strict=True)),
            restarts=tuple(view.build(chosen(i)[0]) for i in order),
            restart_losses=np.where(finite, every, np.nan),
        )


class _Progress(NamedTuple):
    """How far a fit has come: the restarts, losses chunk by chunk, the best of the stage before this one, if any, the
    number of this stage, and how many of its steps are done.
    """

    state: _State
    losses: tuple[np.ndarray, ...] = ()
    before: tuple[PyTree, Array] | None = None
    stage: int = 0
    done: int = 0

    @property
    def ran(self) -> int:
        """The number of steps of all stages."""
        return sum(part.shape[1] for part in self.losses)

    def best(self, course: _Course, reason: str) -> Fit | None:
        """The best so far: of this stage, or else of the one before; None where no loss is finite."""
        found = ((self.state.best, self.state.best_loss), self.before)
        usable = (each for each in found if each is not None and np.any(np.isfinite(each[1])))
        best = next(usable, None)
        return None if best is None else course.fitted(*best, self.losses, reason)


def fit(
    model: Any,
    problem: Problem,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    key: PRNGKeyArray,
    horizons: Sequence[float] = (0.25, 0.5, 1.0),
    restarts: int = 1,
    initialize: Callable[[PRNGKeyArray], Any] | None = None,
    where: Where = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
) -> Fit:
    """Minimize −log p(Y | θ) − log p(θ), and over learned noise scales, with any Optax optimizer.

    **Arguments:**

    - `model`: the first guess.
    - `problem`: data, likelihood and prior.
    - `optimizer`: such as `optax.adam(1e-2)`. It sees the model's parameters, and the log noise scales beside them as a
        tuple `(parameters, log_scale)` where they are learned, as multiples of the first guess.
    - `steps`: in all, shared equally among the horizons.
    - `key`: a JAX random key, for the restarts.
    - `horizons`: the growing fractions of the times that are fitted one after another, the last of them 1. A Neural ODE
        started on whole oscillations settles on a flat line; started on a prefix it follows the data out. (1.0,) fits
        everything from the start.
    - `restarts`: how many fits to run side by side. The first starts from `model`, the others from `initialize(key)`,
        or by default from `model` with the entries of each matrix shuffled and their signs redrawn, which for the usual
        initializations is a fresh draw.
    - `initialize`: `key -> model` of the same structure, for the restarts.
    - `where`: the parameters to fit, as in `laplace`.
    - `checkpoint`: a file to keep the state of the fit in. Where it exists, the same call goes on from it, to the same
        bits as without a break; when it is of a finished fit, that is returned at once.
    - `checkpoint_every`: at least so many steps lie between two checkpoints, at most 24 more. The file is replaced as a
        whole, so that a crash leaves the checkpoint before; where the disk is full, the fit warns and goes on.
        What a process killed while writing leaves beside it, named `.tmp`, is removed at the next call.
    - `progress`: whether to show a progress bar with the loss.

    **Returns:** a `Fit` holding the best model met at the full horizon. After Ctrl-C, the best so far.

    **Raises:** `FitError` when every restart has met a loss or gradient that is not finite, with the step, the loss,
    and the best model before it; `LaplodeError` when an argument does not fit, or `checkpoint` is damaged or of other
    arguments.
    """
    check_problem(problem)
    optimizer = optimizer_of(optimizer)
    for name, value in (("steps", steps), ("restarts", restarts), ("checkpoint_every", checkpoint_every)):
        check_count(name, value)
    check_key("key", key)
    if initialize is not None and not callable(initialize):
        raise LaplodeError(f"`initialize` must be callable as initialize(key), got {type(initialize).__name__}.")
    lengths = _stage_lengths(horizons, problem.data.ts.shape[1])
    if steps < len(lengths):
        raise LaplodeError(f"`steps` = {steps} is fewer than the {len(lengths)} horizons: each takes one at least.")
    view, problem = taken(model, problem, where, scale_found=False)
    if initialize is None:
        fresh = lambda key: _shuffled(view, key)
    else:
        fresh = lambda key: _same(initialize(key), view, where, problem)
    state = _begun(_guesses(view, problem, fresh, jax.random.split(key, restarts)[1:]), optimizer)
    update = update_of(optimizer, *jax.tree.map(lambda x: x[0], (state.optimizer_state, state.trainable)))
    share = [steps // len(lengths)] * len(lengths)
    share[-1] += steps - sum(share)
    course, start = _Course(view, problem, update, lengths, tuple(share)), _Progress(state)
    saved = None if checkpoint is None else _checkpoint(checkpoint, course, state)
    at = start = start if saved is None else _read(saved, start)
    written, reason = at.ran, "budget"
    with tqdm(total=steps, desc="Fit", unit="step", disable=not progress) as bar:
        bar.update(written)
        try:
            for at in _advancing(course, start, bar):
                if saved is not None and (at.ran - written >= checkpoint_every or at.ran == steps):
                    _write(saved, at)
                    written = at.ran
        except KeyboardInterrupt:
            reason = "interrupted"
            if at.best(course, reason) is None:
                raise
            warn("The fit was interrupted; this is the best so far.")
    best = at.best(course, reason)
    assert best is not None
    return best


def _guesses(view: Parameters, problem: Problem, fresh: Callable[[Array], PyTree], keys: Array) -> PyTree:
    """What is trained, of all restarts: parameters and, of noise scales that are learned, the logarithms of factors."""
    guesses, num_scales = [view.selected, *map(fresh, keys)], int(np.sum(_learned(problem)))
    selected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *guesses)
    return (selected, jnp.zeros((len(guesses), num_scales), dtype=float)) if num_scales else selected


def _begun(trainable: PyTree, optimizer: optax.GradientTransformationExtraArgs) -> _State:
    restarts = len(jax.tree.leaves(trainable)[0])
    return _State(
        trainable=trainable,
        optimizer_state=jax.vmap(optimizer.init)(trainable),
        alive=jnp.ones(restarts, bool),
        gradient_failed=jnp.zeros(restarts, bool),
        best=trainable,
        best_loss=jnp.full(restarts, jnp.inf, dtype=float),
        losses=jnp.zeros((restarts, _CHUNK)),
        done=jnp.zeros(restarts, int),
        needed=jnp.zeros(restarts, int),
    )


def _advancing(course: _Course, at: _Progress, bar: tqdm) -> Iterator[_Progress]:
    """The progress after each chunk of steps."""
    room = _room(course.view, course.problem, len(at.state.done))
    for stage in range(at.stage, len(course.lengths)):
        if at.stage < stage or not at.done:
            # What was best on a shorter series is not comparable.
            nothing = at.state.trainable, jnp.full_like(at.state.best_loss, jnp.inf)
            state = eqx.tree_at(lambda s: (s.best, s.best_loss), at.state, nothing)
            at = _Progress(state, at.losses, (at.state.best, at.state.best_loss) if stage else None, stage)
        shortened = _shortened(course.problem, course.lengths[stage], masked=room is not None)
        for done in range(at.done, course.share[stage], _CHUNK):
            num = min(_CHUNK, course.share[stage] - done)
            if not at.losses:
                bar.set_postfix_str("compiling")
            state, room = _advanced(course.view, shortened, course.update, at.state, num, room)
            at = at._replace(state=state, losses=(*at.losses, np.asarray(state.losses)[:, :num]), done=done + num)
            if len(at.losses) == 1:
                bar.unpause()  # the time that compilation took says nothing of the steps to come
            if not np.any(state.alive):
                raise _diverged(at, sum(course.share), at.best(course, "budget"))
            bar.update(num)
            bar.set_postfix(loss=f"{float(np.min(state.best_loss)):.4g}", times=course.lengths[stage])
            yield at


def _checkpoint(path: Any, course: _Course, state: _State) -> Checkpoint:
    update = course.update
    arguments = {
        "`model`, `where`, `initialize`, `key` or `restarts`": (state.trainable, course.view),
        "`problem`": course.problem,
        "`optimizer` (or the version of JAX or Optax)": (
            state.optimizer_state,
            update.identity,
            jax.tree.leaves(update),
        ),
        "`steps` or `horizons`": (course.lengths, course.share),
    }
    return Checkpoint(path, "fit", arguments)


def _write(saved: Checkpoint, at: _Progress) -> None:
    arrays = [*jax.tree.leaves((at.state, at.before)), np.concatenate(at.losses, axis=1)]
    saved.write({"stage": at.stage, "done": at.done}, arrays)


def _read(saved: Checkpoint, start: _Progress) -> _Progress:
    """What `_write` wrote; the start where there is no file."""
    found = saved.read()
    if found is None:
        return start
    header, (*arrays, losses) = found
    before = (start.state.best, start.state.best_loss) if header["stage"] else None
    state, before = jax.tree.unflatten(jax.tree.structure((start.state, before)), arrays)
    return _Progress(state, (np.asarray(losses),), before, header["stage"], header["done"])


def _stage_lengths(horizons: Any, num_times: int) -> tuple[int, ...]:
    try:
        fractions = np.atleast_1d(np.asarray(horizons, dtype=float))
    except (TypeError, ValueError):
        fractions = np.zeros(0)
    right = fractions.ndim == 1 and fractions.size and fractions[0] > 0 and fractions[-1] == 1
    if not right or not np.all(np.diff(fractions) > 0):
        raise LaplodeError(f"`horizons` must be increasing fractions of the data that end with 1, got {horizons!r}.")
    lengths = [min(max(2, math.ceil(fraction * num_times)), num_times) for fraction in fractions]
    return tuple(sorted(set(lengths)))


def _learned(problem: Problem) -> Bool[np.ndarray, " K"]:
    """The channels whose noise scale is to be learned."""
    noise = problem.likelihood.noise(problem.data.ys.shape[2])
    return np.array([each is not None and each.learned for each in noise])


def _shuffled(view: Parameters, key: PRNGKeyArray) -> PyTree:
    leaves, structure = jax.tree.flatten(view.selected)

    def fresh(leaf, transform, key):
        if leaf.ndim < 2 or transform is not None:
            return leaf
        key_order, key_sign = jax.random.split(key)
        return jax.random.permutation(key_order, leaf.ravel()).reshape(leaf.shape) * jax.random.rademacher(
            key_sign, leaf.shape, dtype=leaf.dtype
        )

    return jax.tree.unflatten(
        structure,
        [fresh(*each) for each in zip(leaves, view.transforms, jax.random.split(key, len(leaves)), strict=True)],
    )


def _same(model: Any, view: Parameters, where: Where, problem: Problem) -> PyTree:
    other = parameters(model, where, problem.prior).selected
    shapes = lambda tree: [(path, leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    if shapes(other) != shapes(view.selected):
        raise LaplodeError(
            "`initialize` returns a model whose parameters differ in name or shape from those of `model`."
        )
    return jax.tree.unflatten(jax.tree.structure(view.selected), jax.tree.leaves(other))


def _split(problem: Problem, trainable: PyTree) -> tuple[PyTree, Problem]:
    """The model's parameters, and the problem with the noise scales that go with them."""
    learned = _learned(problem)
    if not np.any(learned):
        return trainable, problem
    selected, log_scale = trainable
    by = jnp.ones(len(learned)).at[np.flatnonzero(learned)].set(jnp.exp(log_scale))
    return selected, eqx.tree_at(lambda p: p.likelihood, problem, problem.likelihood.scaled(by))


def _shortened(problem: Problem, length: int, *, masked: bool) -> Problem:
    """The problem with the first `length` times.

    If `masked`, the others stay as repetitions of the last of them, without observations: every horizon then has the
    shapes of the whole, and is served by one program.
    """
    if not masked:
        return eqx.tree_at(lambda p: p.data, problem, problem.data.until(length))
    ts, ys = problem.data.ts.copy(), problem.data.ys.copy()
    ts[:, length:] = ts[:, length - 1 : length]
    ys[:, length:] = np.nan
    return eqx.tree_at(lambda p: (p.data.ts, p.data.ys), problem, (ts, ys))


def _room(view: Parameters, problem: Problem, restarts: int) -> int | None:
    """Room for steps of the solver, from those at the first guess; None for a model with a solver of its own."""
    model, data = view.model, problem.data
    if not isinstance(model, NeuralODE):
        return None
    inputs = jax.tree.map(jnp.asarray, (data.ts[:, 0], data.ts[:, -1], starts(model, data.y0, len(data.ts)), data.args))
    found = accepted_steps(model, *inputs)
    return _roomier(view, problem, int(np.max(np.where(found.arrived, found.number, 0))), restarts)


def _roomier(view: Parameters, problem: Problem, needed: int, restarts: int) -> int | None:
    """Twice the steps that were needed, since a fit takes more of them as it learns, and each new size compiles.

    None where memory does not hold what the gradient keeps of all of these steps: then Diffrax's own reverse mode
    computes some of it twice.
    """
    data, model = problem.data, view.model
    room = min(padded_size(2 * needed, len(data.ts) * view.size), model.max_steps)
    ts, y0, args = jax.tree.map(jnp.asarray, (data.ts, starts(model, data.y0, len(data.ts)), data.args))
    steps = Steps(jnp.zeros((len(ts), room)), jnp.zeros((len(ts), room)), ts, y0, args)
    kept = pullback_bytes(ReplayedFlow(view, steps), view.vector)  # pyright: ignore
    return room if restarts * kept < free_bytes() // 4 else None


def _advanced(view: Parameters, problem: Problem, update: AbstractUpdate, state: _State, num: int, room: int | None):
    """The state after `num` steps more, with the room for steps of the solver that they took."""
    state = eqx.tree_at(lambda s: (s.done, s.needed), state, (jnp.zeros_like(state.done),) * 2)
    while True:
        state = _advance(view, problem, update, state, jnp.asarray(num), room)
        if room is None or np.all(np.asarray(state.done) >= num):
            return state, room
        room = _roomier(view, problem, int(np.max(state.needed)), len(state.done))


@compiled
def _advance(view: Parameters, problem: Problem, update: AbstractUpdate, state: _State, num: Array, room: int | None):
    """Up to `num` steps of every restart, fewer where a solve takes more steps than there is room for."""
    data = problem.data

    def likelihood(trainable):
        selected, scaled = _split(problem, trainable)
        here = Parameters(selected, view.rest, view.transforms)
        ts, y0 = jnp.asarray(data.ts), jax.tree.map(jnp.asarray, starts(here.model, data.y0, len(data.ts)))
        if room is None:
            flow, needed, arrived = ForeignFlow(here, ts, y0, data.args, first_order=True), jnp.zeros((), int), True
        else:
            flow, found = replayed(here, ts, y0, data.args, room)
            needed, arrived = jnp.max(found.number), jnp.all(found.arrived)
        return jnp.where(arrived, NegativeLogLikelihood(flow, scaled)(here.vector), jnp.inf), needed

    def prior(trainable):
        here = Parameters(_split(problem, trainable)[0], view.rest, view.transforms)
        return -problem.prior.log_density(here, here.vector)

    def step(state: _State) -> _State:
        (value, needed), gradient = jax.value_and_grad(likelihood, has_aux=True)(state.trainable)
        more, pull = jax.value_and_grad(prior)(state.trainable)
        # What the data do not see, as behind `stop_gradient`, the prior does not move either.
        seen = lambda slope, pull: slope + jnp.where(jnp.any(slope != 0), pull, 0)
        value, gradient = value + more, jax.tree.map(seen, gradient, pull)
        fits = True if room is None else needed <= room
        finite = jnp.isfinite(value)
        for leaf in jax.tree.leaves(gradient):
            finite &= jnp.all(jnp.isfinite(leaf))
        alive = state.alive & finite
        loss = lambda trainable: likelihood(trainable)[0] + prior(trainable)
        updates, optimizer_state = update(gradient, state.optimizer_state, state.trainable, value, loss)
        keep = lambda condition, new, old: jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
        better = alive & (value < state.best_loss)
        following = _State(
            trainable=keep(alive, optax.apply_updates(state.trainable, updates), state.trainable),
            optimizer_state=keep(alive, optimizer_state, state.optimizer_state),
            alive=alive,
            gradient_failed=state.gradient_failed | (state.alive & ~finite & jnp.isfinite(value)),
            best=keep(better, state.trainable, state.best),
            best_loss=jnp.where(better, value, state.best_loss),
            losses=state.losses.at[state.done].set(jnp.where(state.alive, value, jnp.nan)),
            done=state.done + 1,
            needed=needed,
        )
        return eqx.tree_at(lambda s: s.needed, keep(fits, following, state), needed)

    def going(state: _State):
        return (state.done < num) & (True if room is None else state.needed <= room)

    return jax.vmap(lambda state: jax.lax.while_loop(going, step, state))(state)


def _diverged(at: _Progress, steps: int, best: Fit | None) -> FitError:
    history, gradient_failed = np.concatenate(at.losses, axis=1), np.asarray(at.state.gradient_failed)
    ran = np.sum(np.cumsum(~np.isfinite(history), axis=1) == 0, axis=1) - gradient_failed
    last = int(np.argmax(ran))
    step = int(ran[last])
    value = history[last, step]
    if gradient_failed[last]:
        what = f"the gradient is no longer finite (the loss is {value:.4g})"
    else:
        before = f" after {history[last, step - 1]:.4g} at the step before" if step else ""
        what = f"the loss is {value}{before}"
    where = "at the first guess" if step == 0 else f"at step {step} of {steps}"
    whose = f" of the last of {len(history)} restarts" if len(history) > 1 else ""
    cure = (
        "The model can't be solved or scored there: check its predictions, which LogNormal and Poisson want positive."
        if step == 0
        else "Take a smaller learning rate, clip gradients (optax.chain(optax.clip_by_global_norm(1.0), ...)), "
        "or start from a shorter horizon (`horizons`)."
    )
    kept = " The best model so far is in `.fit` of this error." if best is not None else ""
    return FitError(f"The fit stopped {where}{whose}: {what}. {cure}{kept}", best)

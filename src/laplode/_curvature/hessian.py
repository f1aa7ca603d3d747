"""The exact Hessian of the negative log-likelihood: whole, in blocks, its diagonal, its leading eigenpairs."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matfree.decomp
import matfree.eig
import matfree.stochtrace
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._algebra.forms import BlockForm, DenseForm, DiagonalForm, EigenForm, symmetrized
from .._devices import agreed, compiled, everywhere, free_bytes, num_devices, over_rows, sharing_memory
from .._files import Checkpoint
from .._problem.problem import Problem
from .._progress import tqdm
from .._solve.autodiff import pullback_bytes
from .._solve.finite import check_finite
from .._solve.flows import AbstractFlow
from .._solve.maps import evaluate
from .._solve.objective import _loss_derivatives, _Tilted, hessian_vector_product

# Tangents between two looks at the progress bar; more at once gain a processor nothing.
_CHUNK = 64


# What one batch of tangents may keep where nothing is sequential: a processor's cache, roughly.
_CACHE_BYTES = 2**24


class Work(NamedTuple):
    """How a long computation is done, which is no matter of its result: seen, spread over devices, kept in a file."""

    progress: bool
    mesh: Mesh | None = None
    checkpoint: Checkpoint | None = None


_QUIETLY = Work(progress=False)


@compiled
def _hessian_rows(shared: tuple[Callable[[Array], Array], Array, int], tangents: Int[Array, " C"], _=None):
    """Rows of the Hessian of a scalar function (a pytree) at θ, `batch` of the `tangents` at a time; no sums."""
    function, theta, batch = shared
    gradient = jax.grad(function)
    tangent = lambda i: jnp.zeros_like(theta).at[i].set(1)
    row = lambda i: jax.jvp(gradient, (theta,), (tangent(i),))[1]
    return jax.lax.map(row, tangents, batch_size=min(batch, len(tangents))), ()


def _batch_size(function: Callable[[Array], Array], theta: Float[Array, " P"], budget: int) -> int:
    """Tangents to push at once, so that what reverse differentiation keeps of them stays within `budget` bytes."""
    kept = pullback_bytes(function, theta)
    # Each tangent keeps as much again for itself, and works on a copy.
    return int(min(max(budget // (3 * kept + 8 * theta.nbytes), 1), _CHUNK))


def _row_chunks(
    function: Callable[[Array], Array],
    theta: Float[Array, " P"],
    batch_size: int,
    progress: bool,
    mesh: Mesh | None,
    done: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of the Hessian from `done` on, chunk after chunk, each with the index of its first row.

    `jax.hessian` pushes all P tangents at once, which takes P times the memory of a gradient; here only `batch_size`
    are under way on each device.
    """
    chunk = min(max(_CHUNK, batch_size) * num_devices(mesh), theta.size)
    shared = everywhere(mesh, (function, theta, batch_size))
    with tqdm(total=theta.size, initial=done, desc="Hessian", unit="tangent", disable=not progress) as bar:
        for start in range(done, theta.size, chunk):
            first = min(start, theta.size - chunk)  # the last chunk overlaps its neighbor: one program serves all
            rows, _ = over_rows(mesh, _hessian_rows, shared, np.arange(first, first + chunk))
            yield start, np.asarray(rows)[start - first :]
            bar.update(first + chunk - start)


class _Part(NamedTuple):
    """An array whose first axis are rows `start` … of the Hessian, of which `keep(rows, first)` is kept."""

    start: int
    array: np.ndarray
    keep: Callable[[np.ndarray, int], np.ndarray]

    def put(self, first: int, rows: np.ndarray) -> None:
        """Keep what there is of the rows `first` …"""
        low, high = max(first, self.start), min(first + len(rows), self.start + len(self.array))
        if low < high:
            self.array[low - self.start : high - self.start] = self.keep(rows[low - first : high - first], low)

    def until(self, row: int) -> np.ndarray:
        """Of the rows before that one."""
        return self.array[: min(max(row - self.start, 0), len(self.array))]


def _assemble(
    flow: AbstractFlow,
    problem: Problem,
    parts: Sequence[_Part],
    work: Work,
    *,
    batch_size: int | None,
    local: bool = False,
    tilt: Float[Array, "N T K"] | None = None,
) -> None:
    """Fill the `parts` with the rows of the Hessian, chunk after chunk, each row once.

    Where it is `local`, the solve is taken apart into local pieces (see `local_hessian`), and the tangents need not go
    through it.
    """
    theta, mesh = flow.parameters.vector, work.mesh
    state = {"local": local, "batch_size": batch_size, "done": 0}
    found = None if work.checkpoint is None else work.checkpoint.read()
    if found is not None:
        # Keep the first call's way and batch size: free memory chose them, and they affect rounding.
        state, arrays = found
        for part, array in zip(parts, arrays, strict=True):
            part.array[: len(array)] = array
    done = state["done"]
    if done == theta.size:
        return
    tilt = jnp.zeros(problem.informed.shape) if tilt is None else tilt  # one program for both
    rest = None
    if state["local"]:
        function, rest = _localized(flow, problem, tilt, mesh)
        budget = _CACHE_BYTES
    else:
        flow.check_second_order()
        function = _Tilted(flow, problem, tilt)
        budget = min(free_bytes() // sharing_memory(mesh) // 4, 2**29)
    if state["batch_size"] is None:
        state["batch_size"] = agreed(mesh, _batch_size(function, theta, budget))

    def keep(always: bool) -> None:
        if work.checkpoint is not None:
            rows = [part.until(done) for part in parts]
            work.checkpoint.write({**state, "done": done}, rows, always=always)

    try:
        for start, rows in _row_chunks(function, theta, state["batch_size"], work.progress, mesh, done):
            rows = rows if rest is None else rows + np.asarray(rest[start : start + len(rows)])
            for part in parts:
                part.put(start, rows)
            done = start + len(rows)
            keep(always=done == theta.size)
    except KeyboardInterrupt as interrupt:
        keep(always=True)
        if work.checkpoint is not None:
            interrupt.add_note(f"{done} of {theta.size} rows are saved: the same call goes on from there.")
        raise


# Below so many parameters, a few chunks of tangents pushed through the solve are done before the local way compiles.
_FEW_PARAMETERS = 100


def hessian(
    flow: AbstractFlow,
    problem: Problem,
    *,
    batch_size: int | None,
    work: Work = _QUIETLY,
    tilt: Float[Array, "N T K"] | None = None,
) -> DenseForm:
    """The exact Hessian of −log p(Y | θ) at the flow's parameters, by forward-over-reverse in chunks of tangents.

    With a `tilt`, that of −log p(Y | θ) + ⟨tilt, f(θ)⟩.

    **Raises:** `LaplodeError` when the model has no second derivatives, with the line to change.
    """
    size = flow.parameters.size
    matrix = np.zeros((size, size))
    local = bool(agreed(work.mesh, int(_is_local(flow, work.mesh))))
    _assemble(
        flow, problem, [_Part(0, matrix, lambda rows, _: rows)], work, batch_size=batch_size, local=local, tilt=tilt
    )
    check_finite(matrix, flow, problem)
    return symmetrized(matrix)


def _is_local(flow: AbstractFlow, mesh: Mesh | None = None) -> bool:
    needed = flow.local_hessian_bytes()
    free = free_bytes() // sharing_memory(mesh)
    return flow.parameters.size > _FEW_PARAMETERS and needed is not None and needed < free // 4


def _localized(flow: AbstractFlow, problem: Problem, tilt: Float[Array, "N T K"], mesh: Mesh | None):
    cotangents, weights = _loss_derivatives(problem, evaluate(flow, flow.parameters.vector))
    return flow.local_hessian(cotangents + tilt, weights, mesh)


def hessian_batch_size(flow: AbstractFlow, problem: Problem) -> int | None:
    """What `hessian` would find out about its `batch_size` by tracing, for who calls it often; None if no matter."""
    if not _is_local(flow):
        return None
    nothing = jnp.zeros(problem.informed.shape)
    return _batch_size(_localized(flow, problem, nothing, None)[0], flow.parameters.vector, _CACHE_BYTES)


def hessian_blocks(flow: AbstractFlow, problem: Problem, *, batch_size: int | None, work: Work = _QUIETLY) -> BlockForm:
    """The blocks of the exact Hessian on its diagonal, one for each leaf of the model."""
    columns = lambda start, stop: lambda rows, _: rows[:, start:stop]
    places = [leaf[2:] for leaf in flow.parameters.leaves]
    blocks = [_Part(start, np.zeros((stop - start,) * 2), columns(start, stop)) for start, stop in places]
    _assemble(flow, problem, blocks, work, batch_size=batch_size)
    return BlockForm(tuple(symmetrized(block.array) for block in blocks))


def hessian_diagonal(
    flow: AbstractFlow, problem: Problem, *, batch_size: int | None, work: Work = _QUIETLY
) -> DiagonalForm:
    """The diagonal of the exact Hessian, at the cost of all of it but without its memory."""
    diagonal = np.zeros(flow.parameters.size)
    part = _Part(0, diagonal, lambda rows, first: np.diagonal(rows, offset=first))
    _assemble(flow, problem, [part], work, batch_size=batch_size)
    return DiagonalForm(jnp.asarray(diagonal)[None])


def hessian_diagonal_stochastic(
    flow: AbstractFlow, problem: Problem, *, num_probes: int, key: PRNGKeyArray
) -> DiagonalForm:
    """The diagonal of the exact Hessian as the mean of v ∘ H v over random signs v (Bekas et al., 2007)."""
    flow.check_second_order()
    return DiagonalForm(_hutchinson(flow, problem, num_probes, key)[None])


@compiled
def _hutchinson(flow: AbstractFlow, problem: Problem, num_probes: int, key: PRNGKeyArray) -> Float[Array, " P"]:
    theta = flow.parameters.vector
    probe = matfree.stochtrace.sampler_signs(theta, num=1)
    estimate = matfree.stochtrace.estimator_monte_carlo(matfree.stochtrace.monte_carlo_diagonal(), sampler=probe)
    product = lambda v: hessian_vector_product(flow, problem, theta, v)
    keys = jax.random.split(key, num_probes)
    # A few probes at a time: all at once would hold as many solves.
    return jnp.mean(jax.lax.map(lambda key: estimate(product, key), keys, batch_size=8), axis=0)


@compiled
def _lanczos(flow: AbstractFlow, problem: Problem, root: Float[Array, " P"], num_products: int):
    theta = flow.parameters.vector
    tridiagonalize = matfree.decomp.tridiag_sym(num_products, reortho="full", custom_vjp=False)
    start = jax.random.normal(jax.random.key(0), theta.shape)  # any start with a part in every direction
    product = lambda v: hessian_vector_product(flow, problem, theta, v / root) / root
    return matfree.eig.eigh_partial(tridiagonalize)(product, start)


def hessian_leading(flow: AbstractFlow, problem: Problem, *, rank: int) -> EigenForm:
    """The leading eigenpairs of Λ0^-½ H Λ0^-½, largest in size first, by Lanczos over Hessian-vector products.

    In this metric, that of the prior's precision Λ0, it makes no difference in which units a parameter is given.
    """
    flow.check_second_order()
    # Lanczos finds the ends of the spectrum first; half of the pairs of a run have usually converged.
    num_products = min(flow.parameters.size, 2 * rank + 10)
    root = jnp.sqrt(problem.prior.local(flow.parameters).precision)
    eigenvalues, vectors = _lanczos(flow, problem, root, num_products)
    check_finite(eigenvalues, flow, problem)
    leading = jnp.argsort(-jnp.abs(eigenvalues))[:rank]
    return EigenForm(vectors[leading] * root, eigenvalues[leading])

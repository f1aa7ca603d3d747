"""Devices: compiling for them, their memory, and work in rows spread over a mesh, in one process or in several."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ._errors import LaplodeError

# XLA's older code generator for CPUs takes half the time for the programs of a solve, and they run as fast. JAX 0.12 no
# longer has it; 0.11 was not tried.
_OLDER = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}


def compiled(function: Callable) -> Any:
    """`eqx.filter_jit` for the program of a solve."""
    return _jitted(function, _OLDER)


def compiled_draws(function: Callable) -> Any:
    """`eqx.filter_jit` for a program of random numbers: what is optimized more takes ten times longer to compile."""
    return _jitted(function, {**_OLDER, "xla_backend_optimization_level": 1})


def _jitted(function: Callable, options: dict[str, Any]) -> Any:
    program = eqx.filter_jit(function, compiler_options=options)  # pyright: ignore[reportCallIssue]
    part = eqx.filter_jit(function)  # of another program, which has options of its own

    @functools.wraps(function)
    def call(*args, **kwargs):
        # Within a program, new arrays are traced too.
        traced = any(isinstance(x, Tracer) for x in jax.tree.leaves((args, kwargs, jnp.zeros(()))))
        return (part if traced else program)(*args, **kwargs)

    return call


def free_bytes() -> int:
    """Memory that is free where JAX computes."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return psutil.virtual_memory().available


_AXIS = "devices"


_ALONG, _EVERYWHERE = PartitionSpec(_AXIS), PartitionSpec()


def check_mesh(mesh: Any) -> Mesh | None:
    """Return the devices of `mesh` along one axis, or say what is wrong with it."""
    if mesh is None:
        return None
    if not isinstance(mesh, Mesh) or not isinstance(mesh.devices, np.ndarray):
        raise LaplodeError(
            '`mesh` must be a jax.sharding.Mesh of devices, such as jax.make_mesh((jax.device_count(),), ("all",)), or '
            f"None; got {type(mesh).__name__}."
        )
    if {device.process_index for device in mesh.devices.flat} != set(range(jax.process_count())):
        raise LaplodeError(
            f"`mesh` must hold devices of each of the {jax.process_count()} processes: all of them compute, and all "
            "of them have the result."
        )
    return Mesh(mesh.devices.ravel(), (_AXIS,), axis_types=(AxisType.Auto,))


def num_devices(mesh: Mesh | None) -> int:
    """The number of devices."""
    return 1 if mesh is None else mesh.size


def sharing_memory(mesh: Mesh | None) -> int:
    """How many of the devices share the memory of this machine."""
    return sum(d.platform == "cpu" for d in mesh.local_devices) or 1 if mesh is not None else 1


def agreed(mesh: Mesh | None, value: int) -> int:
    """What the first process has found, as all must run the same program."""
    if mesh is None or jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def _placed(mesh: Mesh, spec: PartitionSpec, tree: PyTree) -> PyTree:
    sharding = NamedSharding(mesh, spec)

    def place(x):
        if not eqx.is_array(x) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree)


def everywhere(mesh: Mesh | None, tree: PyTree) -> PyTree:
    """A copy of the arrays of a pytree on each device."""
    return tree if mesh is None else _placed(mesh, _EVERYWHERE, tree)


def over_rows(
    mesh: Mesh | None,
    function: Callable[[Any, Any, Any], tuple[PyTree, PyTree]],
    shared: PyTree,
    rows: PyTree,
    shares: PyTree = None,
) -> tuple[PyTree, PyTree]:
    """function(shared, rows, shares), each device with its part of the rows; nothing else without a mesh.

    `function` is one of a module, compiled. It returns arrays with a row for each of `rows`, and sums over rows, to
    which those with zero `shares` add nothing. Both come back as arrays of this process, whole in each.
    """
    if mesh is None:
        return function(shared, rows, shares)
    num = len(jax.tree.leaves(rows)[0])
    spare = -num % mesh.size
    fill = lambda x, end: np.concatenate([x, np.broadcast_to(end, (spare, *np.shape(x)[1:]))])
    rows = jax.tree.map(lambda x: fill(x, np.asarray(x)[-1]), rows)
    shares = jax.tree.map(lambda x: fill(x, 0), shares)
    placed = _placed(mesh, _ALONG, (rows, shares))
    each, sums = _spread(mesh, function, everywhere(mesh, shared), *placed)
    local = lambda x: jnp.asarray(np.asarray(x))
    return jax.tree.map(lambda x: local(x)[:num], each), jax.tree.map(local, sums)


@eqx.filter_jit
def _spread(mesh: Mesh, function, shared: PyTree, rows: PyTree, shares: PyTree):
    arrays, others = eqx.partition(shared, eqx.is_array)

    def part(arrays, rows, shares):
        each, sums = function(eqx.combine(arrays, others), rows, shares)
        return each, jax.lax.psum(sums, _AXIS)

    specs = (_EVERYWHERE, _ALONG, _ALONG)
    spread = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=(_ALONG, _EVERYWHERE), check_vma=False)
    each, sums = spread(arrays, rows, shares)
    return jax.lax.with_sharding_constraint(each, NamedSharding(mesh, _EVERYWHERE)), sums

"""How draws and data are laid out in the groups of a DataTree, of arrays that are ready."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import arviz_base
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, PRNGKeyArray

from .._errors import LaplodeError
from .._model.neural_ode import NeuralODE
from .._model.parameters import Parameters
from .._posterior.posterior import Posterior
from .._problem.data import Trajectories

_CELLS = ["trajectory", "time", "channel"]
_SAMPLE = ["chain", "draw"]

# Arrays of more entries than this become three numbers when parameters are summarized.
_SHORT = 10


class Layout(NamedTuple):
    """How draws are laid out: dims of named variables, coordinates, and attributes of every group."""

    parameters: str
    dims: dict[str, list[str]]
    coords: dict[str, Any]
    attrs: dict[str, Any]

    @classmethod
    def of(cls, posterior: Posterior, parameters: str, coords: dict[str, Any]) -> "Layout":
        """`parameters` is "all" or "layers"; `coords` holds trajectory and channel, and state where there is one."""
        attrs = {"inference_library": "laplode", "inference_library_version": version("laplode")}
        model = posterior.parameters.model
        dims = {}
        if isinstance(model, NeuralODE) and eqx.is_array(model.y0):
            dims["y0"] = ["trajectory", "state"] if model.has_state_for_each else ["state"]
        if isinstance(model, NeuralODE) and model.scale is not None and model.scale.size == len(coords["channel"]):
            dims["scale"] = ["channel"]
        if parameters == "layers":
            leaves = posterior.parameters.leaves
            dims |= {name: ["statistic"] for name, _, start, stop in leaves if stop - start > _SHORT}
        return cls(parameters, dims, {**coords, "statistic": ["mean", "std", "norm"]}, attrs)


def check_coords(coords: Any, posterior: Posterior) -> dict[str, Any]:
    """Names, given or numbered, of trajectories, channels and states.

    **Raises:** `LaplodeError` when they do not fit.
    """
    if not isinstance(coords, Mapping):
        raise LaplodeError(f'`coords` must map names such as "channel" to lists, got {coords!r}.')
    data, model = posterior.problem.data, posterior.parameters.model
    named = {"trajectory": data.trajectories, "channel": data.channels}
    coords = {name: names for name, names in named.items() if names is not None} | dict(coords)
    neural = isinstance(model, NeuralODE)
    num_states = posterior.flow.num_states or (0 if data.y0 is None else data.y0.shape[1])
    lengths = {"trajectory": data.ys.shape[0], "channel": data.ys.shape[2], "state": num_states}
    for name, values in coords.items():
        if name not in lengths:
            raise LaplodeError(
                f'`coords` may name "trajectory", "channel" and "state", got {name!r}. Times come with the data.'
            )
        if len(values) != lengths[name]:
            raise LaplodeError(f"`coords` has {len(values)} names for {name}, but there are {lengths[name]}.")
    if neural and model.observe is None and "channel" in coords:  # then a channel is a state
        coords = {"state": coords["channel"], **coords}
    return {name: np.asarray(coords.get(name, np.arange(length))) for name, length in lengths.items() if length}


def _time_coords(ts: Float[np.ndarray, "N T"]) -> dict[str, Any]:
    """The times themselves where trajectories share them; otherwise indices, with the times in constant_data."""
    shared = bool(np.all(ts == ts[0]))
    return {"time": ts[0] if shared else np.arange(ts.shape[1])}


def posterior_attrs(posterior: Posterior) -> dict[str, Any]:
    """What a posterior is and how it was found, as attributes that any file format takes."""
    diagnostics = posterior.diagnostics
    return {
        "curvature": posterior.curvature.name,
        "structure": posterior.structure.name,
        "regularization": "none" if diagnostics.regularized is None else diagnostics.regularized.kind,
        "newton_decrement": float(diagnostics.newton_decrement),
        "effective_dof": float(diagnostics.effective_dof),
        "num_parameters": posterior.size,
    }


def key_attrs(key: PRNGKeyArray | None) -> dict[str, Any]:
    if key is None:
        return {}
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return {"key": [int(word) for word in np.asarray(data).ravel()], "key_impl": str(jax.random.key_impl(key))}


def dataset_of(variables, coords, dims, attrs, sample_dims: Sequence[str] = _SAMPLE) -> xr.Dataset:
    # A slash, as Haiku and Flax have in their names, is a path to xarray.
    variables, dims = ({name.replace("/", "."): x for name, x in each.items()} for each in (variables, dims))
    used = {dim for name in variables for dim in dims.get(name, ())}
    return arviz_base.dict_to_dataset(
        {name: np.asarray(value) for name, value in variables.items()},
        coords={name: value for name, value in coords.items() if name in used},
        dims={name: dim for name, dim in dims.items() if name in variables},
        sample_dims=list(sample_dims),
        attrs=attrs,
    )


# ---- Groups, of arrays that are ready. C chains of S draws.


def summarize(view: Parameters, thetas: Float[Array, "C S P"], layout: Layout) -> dict[str, Array]:
    """Draws of each leaf as the model knows it, (C, S, ...), or, where `layout` has them so, of its mean, standard
    deviation and norm, (C, S, 3).
    """
    known = jax.vmap(jax.vmap(lambda theta: view.constrained(view.with_vector(theta))))
    values = {}
    for (name, *_), leaf in zip(view.leaves, jax.tree.leaves(known(thetas)), strict=True):
        if layout.dims.get(name) == ["statistic"]:
            leaf = leaf.reshape(*thetas.shape[:-1], -1)
            some = (jnp.mean(leaf, axis=-1), jnp.std(leaf, axis=-1), jnp.linalg.norm(leaf, axis=-1))
            values[name] = jnp.stack(some, axis=-1)
        else:
            values[name] = leaf
    return values


def parameters_group(values: dict[str, Array], layout: Layout, attrs: dict[str, Any]) -> xr.Dataset:
    """`posterior` or `prior`, of what `summarize` returns."""
    return dataset_of(values, layout.coords, layout.dims, {**attrs, "parameters": layout.parameters})


def predictive_group(draws: dict[str, Any], ts: Float[np.ndarray, "N T"], layout: Layout, attrs) -> xr.Dataset:
    """Draws at `ts`, (C, S, N, T, K), by name: "y" with noise, "f" without, and maybe "scale", that of the noise, and
    "y0", initial states (C, S, N, D). `layout.coords` names trajectories, channels and states.
    """
    dims = {name: ["trajectory", "state"] if name == "y0" else _CELLS for name in draws}
    return dataset_of(draws, {**layout.coords, **_time_coords(ts)}, dims, attrs)


def log_likelihood_group(
    values: Float[np.ndarray, "C S N T K"], data: Trajectories, layout: Layout, attrs
) -> xr.Dataset:
    """Of each observation that is there and that the draws have any influence on."""
    # A missing value has no likelihood, and one that no parameter changes, as at the time of a given initial state,
    # says nothing about them: az.loo fails on the first as NaN and on the second for want of a tail to fit.
    varies = np.ptp(values, axis=(0, 1)) > 1e-12 * (1 + np.abs(values[0, 0]))
    informative = data.observed & (varies | (values[..., 0, 0, 0].size == 1))
    grid = {**layout.coords, **_time_coords(data.ts)}
    if np.all(informative):
        return dataset_of({"y": values}, grid, {"y": _CELLS}, attrs)
    where = np.nonzero(informative)
    dataset = dataset_of({"y": values[:, :, *where]}, {}, {"y": ["observation"]}, attrs)
    labels = {dim: ("observation", grid[dim][index]) for dim, index in zip(_CELLS, where, strict=True)}
    return dataset.assign_coords(labels)


def data_groups(data: Trajectories, layout: Layout) -> dict[str, xr.Dataset]:
    """`observed_data` and `constant_data`."""
    grid = {**layout.coords, **_time_coords(data.ts)}
    observed = dataset_of({"y": data.ys}, grid, {"y": _CELLS}, layout.attrs, sample_dims=[])
    return {"observed_data": observed, "constant_data": constant_group(data.ts, data.y0, data.dates(data.ts), layout)}


def constant_group(ts: Float[np.ndarray, "N T"], y0: Any, dates: np.ndarray | None, layout: Layout) -> xr.Dataset:
    variables = {"ts": ts} | ({} if y0 is None else {"y0": y0})
    dims = {"ts": ["trajectory", "time"], "y0": ["trajectory", "state"]}
    dataset = dataset_of(variables, {**layout.coords, **_time_coords(ts)}, dims, layout.attrs, sample_dims=[])
    return dataset if dates is None else dataset.assign_coords(date=(dims["ts"], dates))

"""Posteriors and predictions as an ArviZ DataTree. The only module that knows ArviZ's data model.

ArviZ 0.23 (`arviz.preview`, Python 3.11) and ArviZ 1.x are both made of arviz-base, which is used here directly.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import arviz_base
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_count, check_from, check_key
from .._errors import LaplodeError, LaplodeWarning, choose
from .._fit.result import Fit
from .._model.neural_ode import NeuralODE
from .._model.parameters import Parameters
from .._posterior.posterior import Posterior
from .._predict.predictions import Predictions, with_noise
from .._predict.solves import in_batches, solve_at
from .._problem.data import Trajectories

_CELLS = ["trajectory", "time", "channel"]


_SAMPLE = ["chain", "draw"]


# Up to so many parameters each has its own row in a summary.
_MOST_ROWS = 1000


# Arrays of more entries than this become three numbers when parameters are summarized.
_SHORT = 10


# Entries of parameter vectors drawn at once.
_BLOCK = 2**24


def to_datatree(
    posterior: Posterior,
    *predictions: Predictions,
    fit: Fit | Sequence[Fit] | None = None,
    key: PRNGKeyArray | None = None,
    num_samples: int = 1000,
    prior_predictive: bool = False,
    parameters: str | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    progress: bool = True,
    **named: Predictions | Sequence[Predictions],
) -> xr.DataTree:
    """The groups that ArviZ expects, as an `xarray.DataTree`.

    - `posterior`: draws of the parameters, one variable a leaf, named by its path in the model.
    - `posterior_predictive` and `log_likelihood`: of predictions at the observed times.
    - `predictions` and `predictions_constant_data`: of predictions elsewhere.
    - `sample_stats`: solver success and, where they were computed, `log_p`, `log_q` and `log_weights`.
    - `prior`: draws of the prior, when `key` is given, and `prior_predictive`: their trajectories at the observed
        times.
    - `observed_data`, `constant_data`.
    - `fit_history`: the loss before each step, when `fit` is given.

    In the predictive groups `y` has observation noise and `f` has not; `scale` is that of the noise where the model
    predicts it, and `y0` the initial states of the draws where those are uncertain. Dimensions are chain, draw,
    trajectory, time, channel. `log_likelihood` leaves out values that are missing, and those that no draw changes (at
    the time of a given initial state); where there are any, it has the dimension `observation` in place of the last
    three.

    Other predictions come under names of their own, as in `to_datatree(posterior, observed, geodesic=other)`. Each
    name is a tree inside the tree with the groups above made of its own draws, which ArviZ takes like the tree itself:
    `az.loo(tree["geodesic"])`.

    **Arguments:**

    - `posterior`: from `laplace`.
    - `predictions`: from `predict`; at most one on the observed times and one elsewhere, of the same draws.
    - `fit`: from `fit` or `refine`, or several in the order in which they were run.
    - `key`: a JAX random key, for draws of the prior, and of the posterior when no predictions are given.
    - `num_samples`: how many draws of the prior, and of the posterior when no predictions are given.
    - `prior_predictive`: whether to solve at the draws of the prior. Those that fail are left out of that group, and
        counted in its attribute `num_failed`.
    - `parameters`: "all" keeps every parameter; "layers" keeps of each array of more than 10 entries its mean, standard
        deviation and Euclidean norm, draw by draw. By default "all" up to 1000 parameters; the attribute `parameters`
        says which it was.
    - `coords`: names for "trajectory", "channel" and "state"; those of the data, or numbers, by default.
    - `progress`: whether to show a progress bar over solves at draws of the prior.
    - `named`: further predictions by name, one or several of the same draws each.

    **Returns:** the tree. Its attributes tell curvature, structure, regularization, method, k̂ and random key of what is
    in a group: `jax.random.wrap_key_data(np.uint32(attrs["key"]))` is the key that was used.

    **Raises:** `LaplodeError` when several predictions compete for a group, or names do not fit. Warns
    (`LaplodeWarning`) when draws without a solution are left out.
    """
    check_from("posterior", posterior, Posterior, "laplace")
    sets = {name: (given,) if isinstance(given, Predictions) else given for name, given in named.items()}
    for name, given in (("predictions", predictions), *sets.items()):
        _check_predictions(name, given)
    if taken := [name for name in sets if name in _GROUPS or "/" in name]:
        raise LaplodeError(f"`{taken[0]}` can't name predictions: it is the name of a group of the DataTree.")
    fits = (fit,) if isinstance(fit, Fit) else tuple(fit) if isinstance(fit, Sequence) else (fit,) if fit else ()
    if not all(isinstance(each, Fit) for each in fits):
        raise LaplodeError("`fit` must come from laplode.fit or laplode.refine, or be a list of such.")
    if key is not None:
        check_key("key", key)
    check_count("num_samples", num_samples)
    if not predictions and key is None:
        raise LaplodeError("`key` is needed to draw from the posterior when no predictions are given.")
    if prior_predictive and key is None:
        raise LaplodeError("`key` is needed to draw from the prior.")
    if parameters is None:
        parameters = "all" if posterior.size <= _MOST_ROWS else "layers"
    choose("parameters", parameters, dict.fromkeys(("all", "layers")))
    layout = Layout.of(posterior, parameters, check_coords({} if coords is None else coords, posterior))
    basis = {**layout.attrs, **posterior_attrs(posterior)}
    if predictions:
        groups = _arrived(posterior, predictions, layout, basis)
    else:
        assert key is not None
        blocks = _blocks(posterior.sample, jax.random.fold_in(key, 1), num_samples, posterior.size)
        values = _joined([summarize(posterior.parameters, thetas[None], layout) for thetas, _ in blocks])
        groups = {"posterior": _parameters(values, layout, {**basis, **_key_attrs(key)})}
    if key is not None:
        attrs = {**layout.attrs, **_key_attrs(key)}
        groups |= _prior(posterior, layout, attrs, key, num_samples, prior_predictive, progress)
    groups |= _data(posterior.problem.data, layout)
    if fits:
        groups["fit_history"] = _history(fits, posterior.problem.data, layout.attrs)
    for name, given in sets.items():
        inside = _arrived(posterior, given, layout, basis) | _data(posterior.problem.data, layout)
        groups |= {f"{name}/{group}": dataset for group, dataset in inside.items()}
    return xr.DataTree.from_dict(groups)


_GROUPS = (
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "predictions",
    "predictions_constant_data",
    "sample_stats",
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
    "fit_history",
)


def _check_predictions(name: str, given: Any) -> None:
    items = given if isinstance(given, Sequence) else (given,)
    if wrong := [item for item in items if not isinstance(item, Predictions)]:
        raise LaplodeError(f"`{name}` must come from laplode.predict, got {type(wrong[0]).__name__}.")
    if not given and name != "predictions":
        raise LaplodeError(f"`{name}` holds no predictions.")
    here = sum(item.observed_grid for item in given)
    if here > 1 or len(given) - here > 1:
        raise LaplodeError(
            f"`{name}` holds {here} on the observed times and {len(given) - here} elsewhere: a DataTree has one "
            "group for each. Give the others names of their own, as in to_datatree(posterior, first, second=other)."
        )
    same = lambda one, other: one.thetas is other.thetas or np.array_equal(one.thetas, other.thetas)
    if not all(same(given[0], item) for item in given[1:]):
        raise LaplodeError(
            f"`{name}` differ in their draws of θ, so that one draw of the tree would mix two: use the same key and "
            "num_samples for both, or give one of them a name of its own, as in to_datatree(posterior, first, "
            "second=other)."
        )


# ---- What all groups share


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
        if isinstance(model, NeuralODE) and model.y0 is not None:
            dims["y0"] = ["state"] if model.y0.ndim == 1 else ["trajectory", "state"]
        if isinstance(model, NeuralODE) and model.scale is not None and model.scale.size == len(coords["channel"]):
            dims["scale"] = ["channel"]
        if parameters == "layers":
            leaves = posterior.parameters.leaves
            dims |= {name: ["statistic"] for name, _, start, stop in leaves if stop - start > _SHORT}
        return cls(parameters, dims, {**coords, "statistic": ["mean", "std", "norm"]}, attrs)


def check_coords(coords: Mapping[str, Sequence[Any]], posterior: Posterior) -> dict[str, Any]:
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


def _key_attrs(key: PRNGKeyArray | None) -> dict[str, Any]:
    if key is None:
        return {}
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return {"key": [int(word) for word in np.asarray(data).ravel()], "key_impl": str(jax.random.key_impl(key))}


def _dataset(variables, coords, dims, attrs, sample_dims: Sequence[str] = _SAMPLE) -> xr.Dataset:
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


def _parameters(values: dict[str, Array], layout: Layout, attrs: dict[str, Any]) -> xr.Dataset:
    """`posterior` or `prior`, of what `summarize` returns."""
    return _dataset(values, layout.coords, layout.dims, {**attrs, "parameters": layout.parameters})


def _predictive(draws: dict[str, Any], ts: Float[np.ndarray, "N T"], layout: Layout, attrs) -> xr.Dataset:
    """Draws at `ts`, (C, S, N, T, K), by name: "y" with noise, "f" without, and maybe "scale", that of the noise, and
    "y0", initial states (C, S, N, D). `layout.coords` names trajectories, channels and states.
    """
    dims = {name: ["trajectory", "state"] if name == "y0" else _CELLS for name in draws}
    return _dataset(draws, {**layout.coords, **_time_coords(ts)}, dims, attrs)


def _log_likelihood(values: Float[np.ndarray, "C S N T K"], data: Trajectories, layout: Layout, attrs) -> xr.Dataset:
    """Of each observation that is there and that the draws have any influence on."""
    # A missing value has no likelihood, and one that no parameter changes, as at the time of a given initial state,
    # says nothing about them: az.loo fails on the first as NaN and on the second for want of a tail to fit.
    varies = np.ptp(values, axis=(0, 1)) > 1e-12 * (1 + np.abs(values[0, 0]))
    informative = data.observed & (varies | (values[..., 0, 0, 0].size == 1))
    grid = {**layout.coords, **_time_coords(data.ts)}
    if np.all(informative):
        return _dataset({"y": values}, grid, {"y": _CELLS}, attrs)
    where = np.nonzero(informative)
    dataset = _dataset({"y": values[:, :, *where]}, {}, {"y": ["observation"]}, attrs)
    labels = {dim: ("observation", grid[dim][index]) for dim, index in zip(_CELLS, where, strict=True)}
    return dataset.assign_coords(labels)


def _data(data: Trajectories, layout: Layout) -> dict[str, xr.Dataset]:
    """`observed_data` and `constant_data`."""
    grid = {**layout.coords, **_time_coords(data.ts)}
    observed = _dataset({"y": data.ys}, grid, {"y": _CELLS}, layout.attrs, sample_dims=[])
    return {"observed_data": observed, "constant_data": _constant(data.ts, data.y0, data.dates(data.ts), layout)}


def _constant(ts: Float[np.ndarray, "N T"], y0: Any, dates: np.ndarray | None, layout: Layout) -> xr.Dataset:
    variables = {"ts": ts} | ({} if y0 is None else {"y0": y0})
    dims = {"ts": ["trajectory", "time"], "y0": ["trajectory", "state"]}
    dataset = _dataset(variables, {**layout.coords, **_time_coords(ts)}, dims, layout.attrs, sample_dims=[])
    return dataset if dates is None else dataset.assign_coords(date=(dims["ts"], dates))


# ---- Groups, of what laplode returns


def _groups(
    posterior: Posterior,
    predictions: Sequence[Predictions],
    chained: Callable[[Any], Any],
    stats: Mapping[str, Any],
    layout: Layout,
    attrs: dict[str, Any],
) -> dict[str, xr.Dataset]:
    """The groups that predictions of the same draws make; `chained` turns (S, ...) into (C, S, ...)."""
    data, first = posterior.problem.data, predictions[0]
    groups = {
        "posterior": _parameters(summarize(posterior.parameters, chained(first.thetas), layout), layout, attrs),
        "sample_stats": _dataset(stats, {}, {}, attrs),
    }
    for item in predictions:
        drawn = {**attrs, "method": item.method, **_key_attrs(item.key)}
        draws = {"y": item.y, "f": item.f, "scale": item.scale, "y0": item.y0}
        draws = {name: chained(values) for name, values in draws.items() if values is not None}
        same = item.ts.shape[0] == data.ts.shape[0]
        there = layout._replace(coords={name: of for name, of in layout.coords.items() if same or name != "trajectory"})
        group = _predictive(draws, item.ts, there, drawn)
        if item.observed_grid:
            density = _log_likelihood(chained(np.asarray(item.log_likelihood)), data, layout, drawn)
            groups |= {"posterior_predictive": group, "log_likelihood": density}
        else:
            constant = _constant(item.ts, None, data.dates(item.ts), there)
            groups |= {"predictions": group, "predictions_constant_data": constant}
    return groups


def _arrived(
    posterior: Posterior, predictions: Sequence[Predictions], layout: Layout, basis: dict[str, Any]
) -> dict[str, xr.Dataset]:
    """The groups that the draws make of which all predictions are finite."""
    first = predictions[0]
    ok = np.all([np.asarray(item.ok) for item in predictions], axis=0)
    if not np.any(ok):
        raise LaplodeError("`predictions` hold no draw whose solve succeeded; there is nothing to show.")
    if not np.all(ok):
        warnings.warn(
            f"{np.sum(~ok)} of {ok.size} draws have no finite trajectory and are left out of the DataTree "
            "(the attribute num_failed keeps their number).",
            LaplodeWarning,
            stacklevel=3,
        )
    kept = (lambda x: x[None]) if np.all(ok) else (lambda x: x[ok][None])
    attrs = {**basis, **_key_attrs(first.key), "method": first.method, "num_failed": int(np.sum(~ok))}
    stats = {"success": kept(first.ok)}
    weighed = next((item for item in predictions if item.khat is not None), None)
    if weighed is not None:
        attrs["khat"] = float(weighed.khat)  # pyright: ignore[reportArgumentType]
        stats |= {name: kept(getattr(weighed, name)) for name in ("log_p", "log_q", "log_weights")}
    return _groups(posterior, predictions, kept, stats, layout, attrs)


def chains_to_datatree(
    posterior: Posterior,
    predictions: Sequence[Predictions],
    stats: Mapping[str, np.ndarray],
    attrs: dict[str, Any],
    coords: Mapping[str, Sequence[Any]],
    key: PRNGKeyArray,
    num_prior: int,
) -> xr.DataTree:
    """The groups of `to_datatree` for C chains of S draws each, which predictions hold one chain after the other.

    `stats` are (C, S), `attrs` those of all groups, and `num_prior` says how many draws of the prior are wanted.
    """
    layout = Layout.of(posterior, "all", check_coords(coords, posterior))._replace(attrs=attrs)
    chains = len(next(iter(stats.values())))
    chained = lambda x: x.reshape(chains, -1, *x.shape[1:])
    groups = _groups(posterior, predictions, chained, stats, layout, attrs) | _data(posterior.problem.data, layout)
    if num_prior:
        groups |= _prior(posterior, layout, attrs, key, num_prior, False, False)
    return xr.DataTree.from_dict(groups)


def _blocks(
    draw: Callable[[PRNGKeyArray, int], Array], key: PRNGKeyArray, num: int, size: int
) -> Iterator[tuple[Float[Array, "B P"], PRNGKeyArray]]:
    """Draws of θ a few at a time, so that a million parameters are never held a thousand times; and a key for each."""
    together = max(_BLOCK // size, 1)
    for start in range(0, num, together):
        one, other = jax.random.split(jax.random.fold_in(key, start))
        yield draw(one, min(together, num - start)), other


def _joined(parts: list[dict[str, Array]]) -> dict[str, Array]:
    return {name: jnp.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}


def _prior(posterior, layout, attrs, key, num, push, progress) -> dict[str, xr.Dataset]:
    problem, view = posterior.problem, posterior.parameters
    data = problem.data
    draw = lambda key, num: problem.prior.sample(view, key, num)
    parts, trajectories = [], []
    for thetas, key_noise in _blocks(draw, jax.random.fold_in(key, 0), num, view.size):
        parts.append(summarize(view, thetas[None], layout))
        if push:
            solve = lambda some: solve_at(posterior, data.ts, data.y0, data.args, some)
            f = in_batches(solve, thetas, "Solving at draws of the prior" if progress else None)
            everywhere = jnp.ones(f.shape[1:], bool)
            trajectories.append(with_noise(problem.likelihood, everywhere, f, jnp.ones(len(f), bool), key_noise))
    groups = {"prior": _parameters(_joined(parts), layout, attrs)}
    if not push:
        return groups
    ok, f, y = (jnp.concatenate(some) for some in zip(*trajectories, strict=True))
    if not jnp.any(ok):
        raise LaplodeError(
            f"`prior_predictive`: none of {num} draws of the prior has a solution at the observed times. The prior "
            "reaches far beyond what the model can do; a larger precision keeps to it."
        )
    attrs = {**attrs, "num_failed": int(np.sum(~ok))}
    f = f[..., : y.shape[-1]]  # without the noise scale, where the model predicts one
    group = _predictive({"y": y[ok][None], "f": f[ok][None]}, data.ts, layout, attrs)
    groups["prior_predictive"] = group.assign_coords(draw=np.flatnonzero(ok))  # of these draws in `prior`
    return groups


def _history(fits: Sequence[Fit], data: Trajectories, attrs: dict[str, Any]) -> xr.Dataset:
    """Losses of fits, one after another. The attributes are those of the last."""
    losses, number, num_times = [], [], []
    for i, fit in enumerate(fits):
        steps = len(fit.losses)
        losses.append(fit.losses)
        number.append(np.full(steps, i))
        stages = fit.horizons or ((data.ts.shape[1], steps),)
        num_times.append(np.repeat([length for length, _ in stages], [share for _, share in stages])[:steps])
    variables = {"loss": losses, "fit": number, "num_times": num_times}
    told = ("loss", "reason", "steps", "newton_steps", "newton_decrement", "num_negative")
    stats = {f"fit_{name}": value for name in told if (value := getattr(fits[-1], name)) is not None}
    dataset = _dataset(
        {name: np.concatenate(parts) for name, parts in variables.items()},
        {},
        {name: ["step"] for name in variables},
        {**attrs, **stats},
        sample_dims=[],
    )
    restarts = [fit.restart_losses for fit in fits if fit.restart_losses is not None]
    return dataset.assign(restart_loss=("restart", restarts[-1])) if restarts else dataset

"""Posteriors and predictions as an ArviZ DataTree. Only this module and `layout` know ArviZ's data model.

ArviZ 0.23 (`arviz.preview`, Python 3.11) and ArviZ 1.x are both made of arviz-base, which is used here directly.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_count, check_from, check_key
from .._diagnose.profile import Profile
from .._errors import LaplodeError, choose, warn
from .._fit.result import Fit
from .._posterior.posterior import Posterior
from .._predict.predictions import Predictions, with_noise
from .._predict.solves import in_batches, solve_at
from .._problem.data import Trajectories
from .layout import (
    Layout,
    check_coords,
    constant_group,
    data_groups,
    dataset_of,
    key_attrs,
    log_likelihood_group,
    parameters_group,
    posterior_attrs,
    predictive_group,
    summarize,
)

# Up to so many parameters each has its own row in a summary.
_MOST_ROWS = 1000


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
    profiles: Sequence[Profile] = (),
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
    - `profile`: value and drop at each point, and the intervals, when `profiles` are given.

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
    - `profiles`: from `profile`, a list; NaN where one has fewer points or intervals than another.
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
    if not isinstance(profiles, Sequence) or not all(isinstance(each, Profile) for each in profiles):
        raise LaplodeError("`profiles` must be a list of what laplode.profile returns.")
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
        groups = {"posterior": parameters_group(values, layout, {**basis, **key_attrs(key)})}
    if key is not None:
        attrs = {**layout.attrs, **key_attrs(key)}
        groups |= _prior(posterior, layout, attrs, key, num_samples, prior_predictive, progress)
    groups |= data_groups(posterior.problem.data, layout)
    if fits:
        groups["fit_history"] = _history(fits, posterior.problem.data, layout.attrs)
    if profiles:
        groups["profile"] = _profiles(profiles, layout.attrs)
    for name, given in sets.items():
        inside = _arrived(posterior, given, layout, basis) | data_groups(posterior.problem.data, layout)
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
    "profile",
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
        "posterior": parameters_group(summarize(posterior.parameters, chained(first.thetas), layout), layout, attrs),
        "sample_stats": dataset_of(stats, {}, {}, attrs),
    }
    for item in predictions:
        drawn = {**attrs, "method": item.method, **key_attrs(item.key)}
        draws = {"y": item.y, "f": item.f, "scale": item.scale, "y0": item.y0}
        draws = {name: chained(values) for name, values in draws.items() if values is not None}
        same = item.ts.shape[0] == data.ts.shape[0]
        there = layout._replace(coords={name: of for name, of in layout.coords.items() if same or name != "trajectory"})
        group = predictive_group(draws, item.ts, there, drawn)
        if item.observed_grid:
            density = log_likelihood_group(chained(np.asarray(item.log_likelihood)), data, layout, drawn)
            groups |= {"posterior_predictive": group, "log_likelihood": density}
        else:
            constant = constant_group(item.ts, None, data.dates(item.ts), there)
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
        warn(
            f"{np.sum(~ok)} of {ok.size} draws have no finite trajectory and are left out of the DataTree "
            "(the attribute num_failed keeps their number).",
            level=3,
        )
    kept = (lambda x: x[None]) if np.all(ok) else (lambda x: x[ok][None])
    attrs = {**basis, **key_attrs(first.key), "method": first.method, "num_failed": int(np.sum(~ok))}
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
    groups = _groups(posterior, predictions, chained, stats, layout, attrs) | data_groups(
        posterior.problem.data, layout
    )
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
    groups = {"prior": parameters_group(_joined(parts), layout, attrs)}
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
    group = predictive_group({"y": y[ok][None], "f": f[ok][None]}, data.ts, layout, attrs)
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
    dataset = dataset_of(
        {name: np.concatenate(parts) for name, parts in variables.items()},
        {},
        {name: ["step"] for name in variables},
        {**attrs, **stats},
        sample_dims=[],
    )
    restarts = [fit.restart_losses for fit in fits if fit.restart_losses is not None]
    return dataset.assign(restart_loss=("restart", restarts[-1])) if restarts else dataset


def _profiles(profiles: Sequence[Profile], attrs: dict[str, Any]) -> xr.Dataset:
    """Profiles side by side, those with fewer points or intervals padded by NaN."""
    points = ("values", "drop", "likelihood_drop", "decrement")
    variables = {name: _padded([np.asarray(getattr(each, name)) for each in profiles]) for name in points}
    variables["interval"] = _padded([np.asarray(each.intervals) for each in profiles])
    variables["laplace"] = np.array([each.laplace for each in profiles])
    variables["estimate"] = np.array([each.estimate for each in profiles])
    variables["verdict"] = np.array([each.verdict for each in profiles])
    dims = {name: ["quantity", "point"] for name in points} | {
        "interval": ["quantity", "part", "end"],
        "laplace": ["quantity", "end"],
        "estimate": ["quantity"],
        "verdict": ["quantity"],
    }
    coords = {"quantity": [each.name for each in profiles], "end": ["low", "high"]}
    told = {"level": profiles[0].level, "threshold": profiles[0].threshold, "df": profiles[0].df}
    return dataset_of(variables, coords, dims, {**attrs, **told}, sample_dims=[])


def _padded(arrays: Sequence[np.ndarray]) -> np.ndarray:
    most = max(map(len, arrays))
    pad = lambda x: np.pad(x.astype(float), [(0, most - len(x)), *[(0, 0)] * (x.ndim - 1)], constant_values=np.nan)
    return np.stack([pad(array) for array in arrays])

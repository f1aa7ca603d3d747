"""Which directions of θ the data determine, and which are left to the prior."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from .._algebra.low_rank import low_rank
from .._algebra.precision import AbstractPrecision, Eigenpairs
from .._algebra.whitening import whitening
from .._checks import check_count, check_fraction, check_key, check_x64
from .._errors import LaplodeError
from .._late import pd
from .._model.given import with_given
from .._model.own import check_model
from .._model.parameters import Parameters, Where, parameters
from .._posterior.posterior import Posterior
from .._problem.prior import LocalPrior
from .._problem.problem import Problem, check_problem
from .._show import Shown
from .._solve.maps import flow, linearize

# Of more directions without any information than this, no basis is made.
_MOST_EMPTY = 64


# Parameters named for each direction, and the share of it at which names suffice.
_MOST_NAMES, _ENOUGH = 8, 0.95


class Identifiability(Shown):
    """What the data say of the parameters, beside the prior. The coordinates are those of θ, in prior deviations.

    - `directions`: a `pandas.DataFrame`, a row for each direction, the least determined first: "strength" x, the
        likelihood's curvature along it in units of the prior's precision; "determined", x / (1 + x), how much of it is
        the data's: 0 where the posterior is the prior; "parameters" and "loadings", the names of its largest entries
        and their squares, which sum to 1 over all parameters; "count", 1, or the number of directions without any
        information that are too many to be told one by one, whose loadings are their mean.
    - `leaves`: a `pandas.DataFrame`, a row for each array of the model: "size"; "prior_std" and "posterior_std";
        "contraction", the posterior's standard deviation over the prior's, 1 where nothing was learned; "determined",
        how many of its numbers the data determine. Of arrays these are root mean squares, but for the last.
    - `threshold`: below which a direction counts as left to the prior.
    - `draws`: of the prior, of which this is the one where the data determine most; 0 of a posterior.
    """

    directions: "pd.DataFrame"
    leaves: "pd.DataFrame"
    threshold: float
    draws: int = 0

    @property
    def uninformed(self) -> "pd.DataFrame":
        """The directions that are left to the prior."""
        return self.directions.loc[np.asarray(self.directions["determined"]) < self.threshold]

    def _shown(self):
        size, determined = np.sum(np.asarray(self.leaves[["size", "determined"]]), axis=0)
        uninformed = self.uninformed.to_dict("records")
        lines = [
            f"{determined:.2f} of {int(size)} parameters are determined by the data; "
            f"{sum(row['count'] for row in uninformed)} directions are less than {self.threshold:g} so."
            + (f" At the best of {self.draws} draws of the prior." if self.draws else "")
        ]
        for row in uninformed[:10]:
            several = f"{row['count']} directions, " if row["count"] != 1 else ""
            pairs = zip(row["parameters"], row["loadings"], strict=True)
            named = ", ".join(f"{name} {share:.2f}" for name, share in pairs)
            lines.append(f"  {several}determined {row['determined']:.3g}: {named}")
        if len(self.uninformed) > 10:
            lines.append(f"  … ({len(self.uninformed)} in all)")
        return "\n".join([*lines, "", self.leaves.to_string(float_format=lambda x: f"{x:.3g}")])


def identifiability(
    posterior: Posterior | Any,
    problem: Problem | None = None,
    *,
    threshold: float = 0.1,
    where: Where = None,
    num_draws: int = 5,
    key: PRNGKeyArray | None = None,
) -> Identifiability:
    """Which directions of the parameters the data determine, and what those that they leave to the prior are made of.

    Before any fit it takes a model and a problem: directions that no parameters of the model make visible are found
    from the sensitivities at draws of the prior.

    ```python
    print(laplode.identifiability(model, problem, key=key))
    ```

    **Arguments:**

    - `posterior`: from `laplace`, of any structure: a direction of `block_diagonal` lies within one block, of
        `diagonal` it is a single parameter, and what a `low_rank` leaves out counts as left to the prior. Or a model,
        fitted or not, beside `problem`.
    - `problem`: data, likelihood and prior, of a model. Noise scales still to be learned count with their first guess.
    - `threshold`: how much of a direction the data must determine for it not to be left to the prior, between 0 and 1.
    - `where`: the parameters of a model, as in `laplace`.
    - `num_draws`, `key`: how many draws of the prior, and a JAX random key for them. What is reported is the draw at
        which the data determine most, so that what is left open there is open at all of them.

    **Returns:** `Identifiability`, which prints as a report.

    **Raises:** `LaplodeError` when an argument does not fit, or the model can't be solved at any draw.

    The directions are eigenvectors v of Λ0^-½ (Λ − Λ0) Λ0^-½, with Λ0 the precision of the prior, or of the Gaussian
    that a named prior looks like at θ*, in unconstrained coordinates; x is the eigenvalue. A strength below 0, of an
    exact Hessian, is a direction in which the likelihood bends upward. Directions without any information have no
    eigenvectors of their own; among them are shown those with few large entries (varimax). Of a prior that ties
    parameters together, Λ0^½ is the symmetric root, whose coordinates are nearest to the parameters. Of a model Λ − Λ0
    is the Fisher information Jᵀ R J.

    Spantini et al. (2015), "Optimal low-rank approximations of Bayesian linear inverse problems"; MacKay (1992) for
    x / (1 + x); Kaiser (1958), "The varimax criterion for analytic rotation in factor analysis".
    """
    check_fraction("threshold", threshold)
    if isinstance(posterior, Posterior) and problem is None:
        local = posterior.problem.prior.local(posterior.parameters)
        if local.rows.shape[0] and not posterior.structure.holds_rows:
            raise LaplodeError(
                f'`posterior` has structure="{posterior.structure.name}", which leaves out a part of what its '
                'prior says of parameters together: take "full" or "low_rank".'
            )
        return _identified(_Found(posterior.parameters, local, posterior.built), float(threshold), 0)
    if problem is None:
        raise LaplodeError(
            "`posterior` must come from laplode.laplace, or be a model beside `problem`; got "
            f"{type(posterior).__name__}."
        )
    check_x64()
    check_problem(problem)
    check_count("num_draws", num_draws)
    if key is None:
        raise LaplodeError("`key` is needed to draw from the prior.")
    check_key("key", key)
    best = _at_best_draw(check_model(posterior, problem), problem, where, num_draws, key)
    return _identified(best, float(threshold), num_draws)


class _Found(NamedTuple):
    """Parameters, the prior there, and the precision that the data make of it."""

    view: Parameters
    local: LocalPrior
    built: AbstractPrecision


def _at_best_draw(model: Any, problem: Problem, where: Where, num: int, key: PRNGKeyArray) -> _Found:
    """At the draw of the prior at which the data determine most."""
    view = parameters(model, where, problem.prior)
    problem, data = with_given(view, problem), problem.data
    best, most, failure, like = None, -np.inf, None, None
    for theta in problem.prior.sample(view, key, num):
        there = eqx.tree_at(lambda v: v.selected, view, view.with_vector(theta))
        try:
            like = flow(there, data.ts, data.y0, data.args, like=like, seen=problem.seen)
        except LaplodeError as error:
            failure = error
            continue
        predictions, jacobian = linearize(like)
        weights, local = problem.information(predictions).ravel(), problem.prior.local(there)
        if not np.all(np.isfinite(jacobian)) or not np.all(weights >= 0):
            failure = LaplodeError("Its predictions or their derivatives are not finite, or not allowed.")
            continue
        ones = jnp.ones(len(local.rows))
        built = low_rank(jnp.concatenate([jacobian, local.rows]), jnp.append(weights, ones), local.precision)
        determined = float(np.sum(_determined(local, built)))
        if determined > most:
            best, most = _Found(there, local, built), determined
    if best is None:
        raise LaplodeError(
            f"`problem`: the model has no sensitivities at any of {num} draws of its prior, which may be far too wide. "
            f"At the last: {failure}"
        )
    return best


def _identified(found: _Found, threshold: float, draws: int) -> Identifiability:
    view, local, built = found
    prior = np.asarray(local.precision)
    names = _entry_names(view)
    if local.rows.shape[0]:
        root = whitening(local)
        blocks, variance = [_in_coordinates(root, built)], np.sum(root**2, axis=1)
    else:
        blocks, variance = built.eigenpairs(prior), 1 / prior
    rows = [_row(d, names) for block in blocks for d in _directions(block)]
    columns = ["strength", "determined", "count", "parameters", "loadings"]
    directions = pd.DataFrame(rows, columns=columns).sort_values("strength", ignore_index=True)  # pyright: ignore[reportArgumentType]
    leaves = _leaves(view, np.asarray(built.variance()), variance, _determined(local, built))
    return Identifiability(directions, leaves, threshold, draws)


def _in_coordinates(root: Float[np.ndarray, "P P"], built: AbstractPrecision) -> Eigenpairs:
    """Eigenpairs in coordinates u with θ = root u, in which the prior is a standard normal."""
    products = np.asarray(built.precision_product(jnp.asarray(root.T)))
    strengths, vectors = np.linalg.eigh(products @ root - np.eye(len(root)))
    return Eigenpairs(0, len(root), strengths, vectors.T)


def _determined(local: LocalPrior, built: AbstractPrecision) -> Float[np.ndarray, " P"]:
    """How much of each parameter the data determine: the diagonal of 1 − Λ0 Λ⁻¹."""
    rows = np.sum(np.asarray(local.rows * built.covariance_product(local.rows)), axis=0)
    return 1 - np.asarray(local.precision * built.variance()) - rows


def _entry_names(view: Parameters) -> np.ndarray:
    names = []
    for name, shape, _, _ in view.leaves:
        places = np.ndindex(*shape)
        names.extend(name + (f"[{', '.join(map(str, place))}]" if shape else "") for place in places)
    return np.array(names, dtype=object)


def _leaves(
    view: Parameters,
    variance: Float[np.ndarray, " P"],
    before: Float[np.ndarray, " P"],
    determined: Float[np.ndarray, " P"],
) -> "pd.DataFrame":
    rows = {}
    for name, _, start, stop in view.leaves:
        rms = lambda x, s=slice(start, stop): float(np.sqrt(np.mean(x[s])))
        by_data = float(np.sum(determined[start:stop]))
        rows[name] = (stop - start, rms(before), rms(variance), rms(variance / before), by_data)
    columns = ["size", "prior_std", "posterior_std", "contraction", "determined"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


class _Direction(NamedTuple):
    """A direction, or `count` of them together, by its squared entries from `start` on."""

    start: int
    strength: float
    count: int
    squares: Float[np.ndarray, " p"]


def _noise(strengths: Float[np.ndarray, " R"], size: int) -> float:
    """The strength below which there is none, but for rounding."""
    return 10 * size * np.finfo(float).eps * max(1.0, np.max(np.abs(strengths), initial=0.0))


def _directions(block: Eigenpairs) -> Iterator[_Direction]:
    if block.vectors is None:
        for i, strength in enumerate(block.strengths):
            yield _Direction(block.start + i, float(strength), 1, np.ones(1))
        return
    some = np.abs(block.strengths) > _noise(block.strengths, block.size)
    for strength, vector in zip(block.strengths[some], block.vectors[some], strict=True):
        yield _Direction(block.start, float(strength), 1, vector**2)
    num_empty = block.size - int(np.sum(some))
    if num_empty > _MOST_EMPTY:
        rest = np.maximum(1 - np.sum(block.vectors[some] ** 2, axis=0), 0)
        yield _Direction(block.start, 0.0, num_empty, rest / num_empty)
    elif num_empty:
        for vector in _varimax(_complement(block.vectors[some], num_empty)).T:
            yield _Direction(block.start, 0.0, 1, vector**2)


def _complement(vectors: Float[np.ndarray, "R p"], num: int) -> Float[np.ndarray, "p num"]:
    """An orthonormal basis of what is orthogonal to all of the vectors, without a matrix p×p."""
    basis = np.random.default_rng(0).normal(size=(vectors.shape[1], num))
    for _ in range(2):  # once more for what rounding left
        basis = np.linalg.qr(basis - vectors.T @ (vectors @ basis))[0]
    return basis


def _varimax(basis: Float[np.ndarray, "p d"]) -> Float[np.ndarray, "p d"]:
    """The basis rotated so that the squares of its entries vary most."""
    rotation, before = np.eye(basis.shape[1]), 0.0
    for _ in range(200):
        turned = basis @ rotation
        left, values, right = np.linalg.svd(basis.T @ (turned**3 - turned * np.mean(turned**2, axis=0)))
        rotation = left @ right
        if np.sum(values) <= before * (1 + 1e-10):
            break
        before = np.sum(values)
    return basis @ rotation


def _row(direction: _Direction, names: np.ndarray) -> tuple[Any, ...]:
    squares = direction.squares
    leading = np.argpartition(-squares, min(_MOST_NAMES, squares.size) - 1)[:_MOST_NAMES]
    leading = leading[np.argsort(-squares[leading], kind="stable")]
    enough = int(np.searchsorted(np.cumsum(squares[leading]), _ENOUGH)) + 1
    leading = leading[:enough]
    determined = direction.strength / (1 + direction.strength)
    loadings = tuple(float(x) for x in squares[leading])
    return direction.strength, determined, direction.count, tuple(names[direction.start + leading]), loadings

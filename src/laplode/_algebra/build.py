"""From a curvature and a prior to a precision, and what was found on the way."""

import math
from typing import Any, NamedTuple

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, Int

from .._errors import LaplodeError
from .forms import AbstractForm, Built, GramForm
from .regularization import AbstractRegularization, Regularized
from .structure import AbstractStructure

# A condition number beyond which a matrix has lost the smallest of its eigenvalues.
_FAR_APART = 1e12


# The part of the smallest eigenvalue of a root of Λ that may be rounding.
_MOST_ROUNDING = 1e-3


class Spectrum(NamedTuple):
    """What is known of the eigenvalues of a precision in the metric of the prior."""

    eigenvalue_min: float
    eigenvalue_max: float
    condition_number: float
    num_negative: int
    regularized: Regularized | None


class Found(NamedTuple):
    """A precision with what it was made of, and what its eigenvalues are like."""

    built: Built
    spectrum: Spectrum


def built(
    structure: AbstractStructure, form: AbstractForm, local: Any, regularization: AbstractRegularization
) -> Found:
    """Λ for a local prior, looked at from outside of any transformation.

    **Raises:** `LaplodeError` when Λ is not positive definite, or can't be factored.
    """
    form = prepared(form, local)
    found = _examined(structure.build(form, local, regularization), local, regularization)
    if found is None or found.spectrum.condition_number > _FAR_APART:
        form = form.by_roots()
        found = _examined(structure.build(form, local, regularization), local, regularization)
    if found is None:
        raise LaplodeError(
            "The precision can't be factored: its eigenvalues lie too far apart for float64. A larger prior precision "
            "bounds the small ones."
        )
    return found


def prepared(form: AbstractForm, local: Any) -> AbstractForm:
    """The form in which this prior can be added: one with eigenvalues of either sign, if the prior bends upward."""
    return form.written_out() if np.any(local.deficit) else form


def _examined(made: Built, local: Any, regularization: AbstractRegularization) -> Found | None:
    """What a precision is like; None where it could not be made, or its smallest eigenvalue is lost in rounding."""
    before, after = np.asarray(made.before), np.asarray(made.after)
    num_negative, regularized = regularization.examined(before, after)
    if after.size and regularization.is_indefinite(after):
        low = 1 + float(before.min())
        raise LaplodeError(
            f"The precision is not positive definite: its smallest eigenvalue is {low:.3g} of the prior's precision, "
            f"and {num_negative} eigenvalues of the Hessian are negative. The model is not at a minimum: take "
            'that of laplode.refine(model, problem), or `regularization`="clip" or `curvature`="ggn".'
        )
    if not np.isfinite(made.precision.log_det):
        return None
    low, high = made.precision.extremes(local.precision) if not after.size else _range(after, local.precision.size)
    if not local.precision.size * np.finfo(float).eps * math.sqrt(high) < _MOST_ROUNDING * math.sqrt(low):
        return None
    lowest, highest = (low, high) if not before.size else _range(before, local.precision.size)
    return Found(made, Spectrum(lowest, highest, high / low, num_negative, regularized))


def _range(eigenvalues: Float[np.ndarray, " R"], size: int) -> tuple[float, float]:
    """The extremes of 1 + x for the eigenvalues x of a matrix of that size, 0 where they are not given."""
    rest = [] if eigenvalues.size == size else [0.0]
    every = 1 + np.concatenate([eigenvalues, rest])
    return float(every.min()), float(every.max())


class Determinant(eqx.Module):
    """log det Λ as a function of the local prior and of factors on the information of each channel, (B,) or one.

    With a gradient g, less gᵀΛ⁻¹g.
    """

    structure: AbstractStructure
    form: AbstractForm
    regularization: AbstractRegularization

    def __call__(
        self, local: Any, by: Float[Array, "*B"], gradient: Float[Array, " P"] | None = None
    ) -> Float[Array, ""]:
        precision = self.structure.build(self.form.scaled(by), local, self.regularization).precision
        return precision.log_det - (0.0 if gradient is None else precision.inverse_quadratic(gradient))


class GramDeterminant(eqx.Module):
    """log det Λ in data space, for priors without rows whose precisions are alike within the groups it was made for."""

    form: GramForm
    regularization: AbstractRegularization

    def __call__(self, local: Any, by: Float[Array, "*B"], gradient: Any = None) -> Float[Array, ""]:
        assert gradient is None, "only a prior with rows moves θ"
        return self.form.scaled(by).log_det(local.precision, self.regularization)


def determinant(
    structure: AbstractStructure,
    form: AbstractForm,
    local: Any,
    regularization: AbstractRegularization,
    groups: Int[np.ndarray, " P"],
    condition_number: float,
) -> Determinant | GramDeterminant:
    """log det Λ as a function, in the form whose values take the least work.

    `groups` are those of parameters that have the same prior precision at all hyperparameters.
    """
    form = prepared(form, local)
    found = None if local.rows.shape[0] else structure.gram(form, groups)
    if found is not None:
        return GramDeterminant(found, regularization)
    form = form.by_roots() if condition_number > _FAR_APART else form
    return Determinant(structure, form.condensed(), regularization)

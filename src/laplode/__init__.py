"""Laplace approximations for Neural ODEs in JAX: honest error bars for a model that is already fitted."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from ._algebra.regularization import Abs as Abs, Clip as Clip, Jitter as Jitter, Refuse as Refuse
from ._algebra.structure import BlockDiagonal as BlockDiagonal, Diagonal as Diagonal, Full as Full, LowRank as LowRank
from ._curvature.products import CurvatureProducts as CurvatureProducts, curvature_products as curvature_products
from ._curvature.strategies import (
    EmpiricalFisher as EmpiricalFisher,
    GaussNewton as GaussNewton,
    Hessian as Hessian,
)
from ._diagnose.design import (
    InformationGain as InformationGain,
    Measurements as Measurements,
    choose_measurements as choose_measurements,
    information_gain as information_gain,
)
from ._diagnose.identify import Identifiability as Identifiability, identifiability as identifiability
from ._diagnose.misfit import residual_table as residual_table, sandwich as sandwich
from ._diagnose.profile import Profile as Profile, profile as profile, profile_table as profile_table
from ._diagnose.tolerance import check_tolerance as check_tolerance
from ._errors import FitError as FitError, LaplodeError as LaplodeError, LaplodeWarning as LaplodeWarning
from ._fit.fit import fit as fit
from ._fit.from_loss import MatchedLoss as MatchedLoss, problem_from_loss as problem_from_loss
from ._fit.refine import refine as refine
from ._fit.result import Fit as Fit
from ._model.neural_ode import NeuralODE as NeuralODE
from ._posterior.estimate import Estimate as Estimate, estimate as estimate
from ._posterior.evidence import (
    Evidence as Evidence,
    Hyperparameters as Hyperparameters,
    compare_evidence as compare_evidence,
    evidence_function as evidence_function,
)
from ._posterior.laplace import laplace as laplace
from ._posterior.maximize import maximize_evidence as maximize_evidence
from ._posterior.posterior import Diagnostics as Diagnostics, Posterior as Posterior
from ._predict.function import (
    FunctionPredictions as FunctionPredictions,
    field_at as field_at,
    predict_function as predict_function,
    trajectory_at as trajectory_at,
)
from ._predict.geodesic import Geodesic as Geodesic
from ._predict.linearized import Linearized as Linearized
from ._predict.mix import mix as mix
from ._predict.predict import predict as predict
from ._predict.predictions import Predictions as Predictions
from ._predict.sampled import Sampled as Sampled
from ._problem.constraint import SoftConstraint as SoftConstraint
from ._problem.counts import NegativeBinomial as NegativeBinomial, Poisson as Poisson
from ._problem.data import Trajectories as Trajectories
from ._problem.field_prior import (
    FieldPrior as FieldPrior,
    Matern52 as Matern52,
    SquaredExponential as SquaredExponential,
)
from ._problem.named_priors import NamedPriors as NamedPriors
from ._problem.per_channel import PerChannel as PerChannel
from ._problem.prior import GaussianPrior as GaussianPrior
from ._problem.problem import Problem as Problem
from ._problem.scale import Gaussian as Gaussian, LogNormal as LogNormal, StudentT as StudentT
from ._report.save import load as load, save as save

if _TYPE_CHECKING:
    from ._report.datatree import to_datatree as to_datatree
    from ._report.nuts import nuts as nuts
    from ._report.plot.marginals import plot_marginals as plot_marginals
    from ._report.plot.phase import plot_phase as plot_phase
    from ._report.plot.profile import plot_profile as plot_profile
    from ._report.plot.spectrum import plot_spectrum as plot_spectrum
    from ._report.plot.time_correlation import plot_time_correlation as plot_time_correlation
    from ._report.plot.trajectories import plot_trajectories as plot_trajectories

# ArviZ, Matplotlib, xarray and NumPyro's samplers take most of a second to import: not before they are used.
_LATE = {
    "to_datatree": "._report.datatree",
    "nuts": "._report.nuts",
    "plot_marginals": "._report.plot.marginals",
    "plot_phase": "._report.plot.phase",
    "plot_profile": "._report.plot.profile",
    "plot_spectrum": "._report.plot.spectrum",
    "plot_time_correlation": "._report.plot.time_correlation",
    "plot_trajectories": "._report.plot.trajectories",
}


def __getattr__(name: str) -> object:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_LATE[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})

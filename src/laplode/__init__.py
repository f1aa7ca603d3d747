"""Laplace approximations for Neural ODEs in JAX: honest error bars for a model that is already fitted."""

from ._arviz import to_datatree as to_datatree
from ._curvature import CurvatureProducts as CurvatureProducts, curvature_products as curvature_products
from ._design import (
    InformationGain as InformationGain,
    Measurements as Measurements,
    choose_measurements as choose_measurements,
    information_gain as information_gain,
)
from ._errors import FitError as FitError, LaplodeError as LaplodeError, LaplodeWarning as LaplodeWarning
from ._evidence import (
    Evidence as Evidence,
    Hyperparameters as Hyperparameters,
    compare_evidence as compare_evidence,
    evidence as evidence,
    maximize_evidence as maximize_evidence,
)
from ._fit import Fit as Fit, fit as fit
from ._function import (
    FunctionPredictions as FunctionPredictions,
    predict_field as predict_field,
    predict_function as predict_function,
)
from ._identify import Identifiability as Identifiability, identifiability as identifiability
from ._io import load as load, save as save
from ._laplace import Estimate as Estimate, estimate as estimate, laplace as laplace
from ._loss import MatchedLoss as MatchedLoss, problem_from_loss as problem_from_loss
from ._mixture import MixturePosterior as MixturePosterior, mixture as mixture
from ._model import NeuralODE as NeuralODE
from ._numpyro import nuts as nuts
from ._plot import (
    plot_marginals as plot_marginals,
    plot_phase as plot_phase,
    plot_spectrum as plot_spectrum,
    plot_time_correlation as plot_time_correlation,
    plot_trajectories as plot_trajectories,
)
from ._posterior import Diagnostics as Diagnostics, Posterior as Posterior
from ._predict import Predictions as Predictions, predict as predict
from ._problem import (
    Gaussian as Gaussian,
    GaussianPrior as GaussianPrior,
    LogNormal as LogNormal,
    NamedPriors as NamedPriors,
    NegativeBinomial as NegativeBinomial,
    Poisson as Poisson,
    Problem as Problem,
    StudentT as StudentT,
    Trajectories as Trajectories,
)
from ._refine import refine as refine
from ._tolerance import check_tolerance as check_tolerance

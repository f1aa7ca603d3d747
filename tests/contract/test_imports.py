"""The layout of the package: arrows point one way, nothing private of JAX is used, everything public is explained."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import laplode as lp

PACKAGE = Path(lp.__file__).parent
# The rooms in the order of the data's way, and within each room its files: each imports only what stands before it.
ORDER = [
    "_late",
    "_progress",
    "_errors",
    "_show",
    "_checks",
    "_devices",
    "_files",
    "_algebra/columns",
    "_algebra/precision",
    "_algebra/low_rank",
    "_algebra/regularization",
    "_algebra/gram",
    "_algebra/forms",
    "_algebra/structure",
    "_algebra/build",
    "_algebra/whitening",
    "_problem/table",
    "_problem/data",
    "_problem/likelihood",
    "_problem/scale",
    "_problem/counts",
    "_problem/per_channel",
    "_problem/prior",
    "_problem/named_priors",
    "_problem/constraint",
    "_problem/field_prior",
    "_problem/problem",
    "_model/neural_ode",
    "_model/own",
    "_model/parameters",
    "_model/given",
    "_solve/replay",
    "_solve/sensitivity",
    "_solve/second_order",
    "_solve/autodiff",
    "_solve/flows",
    "_solve/maps",
    "_solve/finite",
    "_solve/objective",
    "_solve/frozen",
    "_curvature/hessian",
    "_curvature/strategies",
    "_curvature/products",
    "_curvature/solver_error",
    "_fit/result",
    "_fit/match",
    "_fit/from_loss",
    "_fit/optimizer",
    "_fit/fit",
    "_fit/trust_region",
    "_fit/descent",
    "_fit/refine",
    "_posterior/summary",
    "_posterior/distribution",
    "_posterior/posterior",
    "_posterior/estimate",
    "_posterior/edge",
    "_posterior/laplace",
    "_posterior/evidence",
    "_posterior/maximize",
    "_predict/start",
    "_predict/grid",
    "_predict/solves",
    "_predict/importance",
    "_predict/predictions",
    "_predict/check_grid",
    "_predict/method",
    "_predict/linearized",
    "_predict/sampled",
    "_predict/surface",
    "_predict/geodesic",
    "_predict/predict",
    "_predict/function",
    "_predict/mix",
    "_diagnose/identify",
    "_diagnose/tolerance",
    "_diagnose/misfit",
    "_diagnose/design",
    "_diagnose/quantity",
    "_diagnose/constrained",
    "_diagnose/path",
    "_diagnose/side_by_side",
    "_diagnose/profile",
    "_report/layout",
    "_report/datatree",
    "_report/plot/shared",
    "_report/plot/trajectories",
    "_report/plot/phase",
    "_report/plot/spectrum",
    "_report/plot/time_correlation",
    "_report/plot/marginals",
    "_report/plot/profile",
    "_report/nuts",
    "_report/save",
    "__init__",
]
MODULES = sorted(
    str(path.relative_to(PACKAGE).with_suffix(""))
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py" or path.parent == PACKAGE
)
each = pytest.mark.parametrize("name", MODULES)


def imports(source: str, module: str = "__init__") -> tuple[set[str], set[str]]:
    """Modules of the package that the source of a module imports, at any depth, and full names of all others."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            outside |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            room = module.split("/")[: -node.level]
            given = node.module.split(".") if node.module else []
            targets = [given] if given and "/".join(room + given) in ORDER else [[*given, a.name] for a in node.names]
            inside |= {"/".join(room + target) for target in targets}
        elif isinstance(node, ast.ImportFrom):
            outside |= {f"{node.module}.{alias.name}" for alias in node.names}
    return inside, outside


def test_the_reader_of_imports_finds_every_form():
    source = """
import jax.numpy, os
from .._problem.data import Trajectories
from .._problem import prior
from . import fit
from .._errors import LaplodeError
def late():
    from jax._src import core
    from .._report.save import load
"""
    inside = {"_problem/data", "_problem/prior", "_fit/fit", "_errors", "_report/save"}
    assert imports(source, "_fit/refine") == (inside, {"jax.numpy", "os", "jax._src.core"})


def test_every_module_has_its_place():
    assert set(MODULES) == set(ORDER)


@each
def test_imports_point_upward(name):
    """Which also rules out circles: whatever a module imports stands before it in one order."""
    inside, outside = imports((PACKAGE / f"{name}.py").read_text(), name)
    below = {other for other in inside if ORDER.index(other) >= ORDER.index(name)}
    assert not below, f"{name} imports {below}, which stand below it"
    assert not {other for other in outside if other.split(".")[0] == "laplode"}, "import siblings relatively"


@each
def test_nothing_private_of_jax(name):
    _, outside = imports((PACKAGE / f"{name}.py").read_text())
    assert not {other for other in outside if other.startswith("jax._")}


LATE = ("matplotlib", "arviz_base", "arviz_stats", "arviz_plots", "xarray", "pandas", "numpyro", "scipy")


def test_what_is_slow_to_import_waits_until_it_is_used():
    code = f"import sys, laplode; print([name for name in {LATE} if name in sys.modules]); laplode.plot_spectrum"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'plot_nothing'"):
        _ = lp.plot_nothing


def test_a_notebook_without_widgets_is_no_reason_to_warn():
    """What tqdm says there when it is imported first."""
    code = """
import sys, types
sys.modules["ipykernel.zmqshell"] = types.ModuleType("ipykernel.zmqshell")
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].get_ipython = lambda: None
sys.modules["ipywidgets"] = None
import laplode
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr == ""


PUBLIC = sorted(name for name in dir(lp) if not name.startswith("_"))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_docstrings(name):
    value = getattr(lp, name)
    assert value.__module__.startswith("laplode."), f"{name} comes from {value.__module__}"
    assert value.__doc__ and not value.__doc__.startswith(f"{name}("), f"{name} has no docstring of its own"
    if inspect.isclass(value):
        for attribute, member in vars(value).items():
            public = inspect.isfunction(member) or isinstance(member, property)
            if public and not attribute.startswith("_"):
                assert inspect.getdoc(getattr(value, attribute)), f"{name}.{attribute} has no docstring"


FUNCTIONS = [name for name in PUBLIC if inspect.isfunction(getattr(lp, name))]
MADE_BY_USERS = [
    "Clip",
    "Abs",
    "Jitter",
    "Refuse",
    "Hessian",
    "LowRank",
    "Gaussian",
    "GaussianPrior",
    "LogNormal",
    "NamedPriors",
    "NegativeBinomial",
    "NeuralODE",
    "Poisson",
    "Problem",
    "SoftConstraint",
    "FieldPrior",
    "SquaredExponential",
    "Matern52",
    "StudentT",
    "Trajectories",
]


def section(doc: str, title: str) -> str:
    """What a docstring says under **title:**, up to the next section or paragraph that is not part of a list."""
    found = re.search(rf"\*\*{title}:?\*\*:?(.*?)(?=\n\n(?![ \n]*-)|\Z)", doc, re.DOTALL)
    return found.group(1) if found else ""


def named_arguments(doc: str) -> set[str]:
    """The names in an **Arguments** section, those of the function it refers to included."""
    text = section(doc, "Arguments")
    names = set()
    for item in re.findall(r"^\s*- ((?:`\w+`(?:, )?)+):", text, re.MULTILINE):
        names |= set(re.findall(r"`(\w+)`", item))
    for other in re.findall(r"as (?:for|in) `(\w+)`", text.split("\n\n- ")[0]):
        names |= named_arguments(inspect.getdoc(getattr(lp, other)))
    return names


def raises(function) -> bool:
    """Whether a function itself raises; what it calls, it may say or not."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree))


@pytest.mark.parametrize("name", FUNCTIONS + MADE_BY_USERS)
def test_docstrings_are_complete(name):
    value = getattr(lp, name)
    doc = inspect.getdoc(value)
    purpose = doc.split("\n\n")[0]
    assert purpose.endswith((".", ":")) and len(purpose) < 240, f"{name} does not begin with its purpose"
    signature = inspect.signature(value)
    parameters = {p.name for p in signature.parameters.values()}
    missing = parameters - named_arguments(doc)
    assert not missing, f"{name} does not explain {missing}"
    unknown = named_arguments(doc) - parameters if "as for `" not in doc else set()
    assert not unknown, f"{name} explains {unknown}, which it does not take"
    if inspect.isfunction(value):
        assert section(doc, "Returns"), f"{name} does not say what it returns"
        assert section(doc, "Raises") or not raises(value), f"{name} does not say what it raises"
    elif value.__init__.__code__.co_filename != "<string>":  # not a dataclass's own
        assert section(doc, "Raises") or not raises(value.__init__), f"{name} does not say what it raises"


@pytest.mark.parametrize("name", [*FUNCTIONS, *MADE_BY_USERS, "field_at", "trajectory_at"])
def test_arguments_after_the_first_ones_have_names(name):
    """At most three go by position, beside `y0` and `args`, which follow `ts` as in the call of a model."""
    value = getattr(lp, name)
    signature = inspect.signature(value if inspect.isfunction(value) else value.__init__)
    by_position = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len([given for given in by_position if given not in ("self", "y0", "args")]) <= 3


def test_the_reader_of_docstrings_misses_nothing():
    doc = """Purpose.

    **Arguments:**

    - `a`: one, as in
        `laplace`.
    - `b`, `c`: two.

    **Returns:** `d`.
    """
    assert named_arguments(inspect.cleandoc(doc)) == {"a", "b", "c"}
    assert section(inspect.cleandoc(doc), "Returns") == " `d`."
    assert not section(inspect.cleandoc(doc), "Raises")
    assert named_arguments("Purpose.\n\n**Arguments:** as for `laplace`.") >= {"model", "problem", "where"}

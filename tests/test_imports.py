"""The layout of the package: arrows point one way, nothing private of JAX is used, everything public is explained."""

import ast
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import laplode as lp

PACKAGE = Path(lp.__file__).parent
ORDER = [
    "_errors",
    "_file",
    "_checkpoint",
    "_mesh",
    "_problem",
    "_model",
    "_vector",
    "_prior",
    "_solve",
    "_curvature",
    "_loss",
    "_structure",
    "_posterior",
    "_laplace",
    "_tolerance",
    "_fit",
    "_refine",
    "_evidence",
    "_mixture",
    "_geodesic",
    "_draws",
    "_start",
    "_function",
    "_predict",
    "_design",
    "_identify",
    "_arviz",
    "_plot",
    "_numpyro",
    "_io",
    "__init__",
]
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
each = pytest.mark.parametrize("name", MODULES)


def imports(source: str) -> tuple[set[str], set[str]]:
    """Modules of the package that a source imports, at any depth, and full names of all others."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            outside |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            inside |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outside |= {f"{node.module}.{alias.name}" for alias in node.names}
    return inside, outside


def test_the_reader_of_imports_finds_every_form():
    source = """
import jax.numpy, os
from ._problem import Problem
from . import _fit
def late():
    from jax._src import core
    from ._io import load
"""
    assert imports(source) == ({"_problem", "_fit", "_io"}, {"jax.numpy", "os", "jax._src.core"})


def test_every_module_has_its_place():
    assert set(MODULES) <= set(ORDER)
    assert {"__init__", "_problem", "_laplace"} <= set(MODULES)


@each
def test_imports_point_upward(name):
    """Which also rules out circles: whatever a module imports stands before it in one order."""
    inside, outside = imports((PACKAGE / f"{name}.py").read_text())
    below = {other for other in inside if ORDER.index(other) >= ORDER.index(name)}
    assert not below, f"{name} imports {below}, which stand below it"
    assert not {other for other in outside if other.split(".")[0] == "laplode"}, "import siblings relatively"


@each
def test_nothing_private_of_jax(name):
    _, outside = imports((PACKAGE / f"{name}.py").read_text())
    assert not {other for other in outside if other.startswith("jax._")}


PUBLIC = sorted(name for name in vars(lp) if not name.startswith("_"))


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
    "Gaussian",
    "GaussianPrior",
    "LogNormal",
    "NamedPriors",
    "NegativeBinomial",
    "NeuralODE",
    "Poisson",
    "Problem",
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

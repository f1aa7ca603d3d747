"""The layout of the package: arrows point one way, nothing private of JAX is used, everything public is explained."""

import ast
import inspect
from pathlib import Path

import pytest

import laplode as lp

PACKAGE = Path(lp.__file__).parent
ORDER = [
    "_errors",
    "_problem",
    "_model",
    "_vector",
    "_prior",
    "_solve",
    "_curvature",
    "_structure",
    "_posterior",
    "_laplace",
    "_fit",
    "_refine",
    "_evidence",
    "_mixture",
    "_geodesic",
    "_draws",
    "_function",
    "_predict",
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

"""Every snippet of the documentation runs as it stands, page by page."""

import importlib
import re
import sys
import warnings
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest
import xarray

import laplode as lp

ROOT = Path(__file__).parents[2]
# The page of models has a test of its own, which compares what each model predicts.
PAGES = [p for room in ("how_to", "explanation") for p in sorted((ROOT / "notebooks" / room).glob("*.md"))]
PAGES = [path for path in PAGES if path.name != "models.md" and "```python" in path.read_text()]


def run(text, names):
    for code in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(code, names)


@pytest.mark.parametrize("path", PAGES, ids=[path.stem for path in PAGES])
def test_snippets_run(path, growth, growth_posterior, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in kept}
    names = dict(laplode=lp, jax=jax, jnp=jnp, np=np, eqx=eqx, pandas=pandas, xarray=xarray)
    names |= dict(model=growth.model, problem=growth.problem, posterior=growth_posterior, ts=growth.problem.data.ts[0])
    names |= dict(ys=growth.problem.data.ys, y0=growth.problem.data.y0)
    names |= dict(fit=lp.refine(*growth, progress=False), examples=ROOT / "examples")
    names["az"] = importlib.import_module("arviz.preview" if sys.version_info < (3, 12) else "arviz")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # laplode's and ArviZ's, about draws of a toy
            warnings.simplefilter("ignore", FutureWarning)  # between ArviZ and xarray
            run(path.read_text(), names)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_the_readme_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """And prints what it says that it prints."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text()
    said = re.search(r"^```\n\n((?:    .*\n)+)\nWith Diffrax", text, re.MULTILINE)[1]
    jax.config.update("jax_enable_x64", False)  # as it is when a program begins
    try:
        run(text, {})
    finally:
        jax.config.update("jax_enable_x64", True)
    # The last digits depend on the processor.
    numbers = lambda text: [float(x) for x in re.findall(r"-?\d+\.\d+", text)]
    found = capsys.readouterr().out
    assert re.sub(r"-?\d+\.?\d*(e-?\d+)?", "#", found.strip()) == re.sub(
        r"-?\d+\.?\d*(e-?\d+)?", "#", "\n".join(line.strip() for line in said.strip().splitlines())
    )
    np.testing.assert_allclose(numbers(found)[-3:], numbers(said)[-3:], atol=0.3)
    assert (tmp_path / "trajectories.png").exists()

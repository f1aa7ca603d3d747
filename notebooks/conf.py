"""Sphinx configuration: `sphinx-build -W notebooks site` builds the documentation."""

import importlib.metadata
import re

import laplode

project = "laplode"
author = "the laplode developers"
copyright = "2026, the laplode developers"
release = importlib.metadata.version("laplode")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the outputs are stored
exclude_patterns = ["jupyter_execute", "**.ipynb_checkpoints"]
html_theme = "furo"
html_title = "laplode"
html_show_sourcelink = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_class_signature = "mixed"
python_display_short_literal_types = True
suppress_warnings = ["mystnb.unknown_mime_type"]

# Where names of other libraries are explained.
_ELSEWHERE = {
    r"jax\.(random\.key|sharding\.Mesh|distributed\.initialize|jit|vmap|make_mesh)": (
        "https://docs.jax.dev/en/latest/_autosummary/{name}.html"
    ),
    r"eqx\.(Module|filter_jit)": "https://docs.kidger.site/equinox/api/module/module/",
    r"eqx\.tree_at": "https://docs.kidger.site/equinox/api/manipulation/",
    r"diffrax\.diffeqsolve|diffeqsolve": "https://docs.kidger.site/diffrax/api/diffeqsolve/",
    r"diffrax\.\w+": "https://docs.kidger.site/diffrax/",
    r"optax\.\w+": "https://optax.readthedocs.io/en/latest/",
    r"az\.\w+|arviz_\w+\.\w+": "https://python.arviz.org/",
    r"xarray\.DataTree|DataTree": "https://docs.xarray.dev/en/stable/generated/xarray.DataTree.html",
}
_PUBLIC = {name for name in dir(laplode) if not name.startswith("_")}


def _code(text: str) -> str:
    """What stands between backticks, as a link where it is a name that is explained somewhere."""
    name = re.sub(r"\(.*\)$", "", text.removeprefix("laplode."))
    if name in _PUBLIC:
        return f":py:obj:`{text.replace('<', '')} <laplode.{name}>`"
    for pattern, url in _ELSEWHERE.items():
        if re.fullmatch(pattern, name):
            return f"`{text} <{url.format(name=name)}>`__"
    return f"``{text}``"


def _prose(line: str) -> str:
    """A line of Markdown as reStructuredText."""
    parts = re.split(r"`([^`]+)`", line)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = _code(part)
        else:
            parts[i] = re.sub(r"(?<![\w*])\*(?!\*)|(?<=\w)\*(?!\*)|\||(?<=\w)_(?!\w)", r"\\\g<0>", part)
    # A role needs a space or punctuation around it.
    text = parts[0]
    for i, part in enumerate(parts[1:], start=1):
        glued = text and part and not (text[-1].isspace() or text[-1] in "(['\"-/:")
        after_code = i % 2 == 0 and part and not (part[0].isspace() or part[0] in ".,;:!?)]'\"-/")
        text += ("\\ " if (i % 2 and glued) or after_code else "") + part
    return text


def _docstring(app, what, name, obj, options, lines):
    """Docstrings are written in Markdown; autodoc reads reStructuredText."""
    out, fence, blank, bullet = [], False, True, None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.lstrip().startswith("- "):
            bullet = indent
        elif line.strip() and bullet is not None and not fence:
            # An item goes on below its first word; further to the right it would become a list of definitions.
            bullet = bullet if indent > bullet else None
            line = line if bullet is None else " " * (bullet + 2) + line.lstrip()
        if line.strip().startswith("```"):
            fence = not fence
            indent = line[: len(line) - len(line.lstrip())]
            out += ["", f"{indent}.. code-block:: python", ""] if fence else [""]
            continue
        if fence:
            out.append(f"    {line}")
            continue
        if line.lstrip().startswith("- ") and not blank and not out[-1].lstrip().startswith("- "):
            out.append("")
        out.append(_prose(line))
        blank = not line.strip()
    lines[:] = out


def _members(app, what, name, obj, skip, options):
    """Members that say something of their own."""
    return skip or not getattr(obj, "__doc__", None)


def setup(app):
    """Connect to Sphinx."""
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("autodoc-skip-member", _members)

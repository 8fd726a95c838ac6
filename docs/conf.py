"""Settings of the documentation site: `sphinx-build -W --keep-going -c docs . docs/_build` from the repository's root.

The source folder is the repository itself, so that pages link to `configs/README.md` or `miniature/PAPER.md` by the
same relative paths in a repository browser and on the site.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

PACKAGES = ("lightning_modules", "datamodules", "rewards", "callbacks", "miniature", "benchmarks")


def modules_by_package() -> dict[str, list[str]]:
    """Package of the tree -> the modules in it, less those that only start a command."""
    found: dict[str, list[str]] = {}
    for path in sorted(file for name in PACKAGES for file in ROOT.glob(f"{name}/**/*.py")):
        if not path.stem.startswith("__"):
            package = ".".join(path.parent.relative_to(ROOT).parts)
            found.setdefault(package, []).append(f"{package}.{path.stem}")
    return found


project = "PromptRL on Lightning"
author = "the PromptRL on Lightning authors"
copyright = "2026, Apache-2.0"
release = "0.1.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "docs/api/*.rst",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "configs/README.md",
    "miniature/*.md",
    "notebooks/README.md",
    "rewards/served/README.md",
]
exclude_patterns = ["docs/_build", "runs", ".*", "**/.*"]
html_theme = "furo"
html_title = project
html_static_path: list[str] = []
html_extra_path = ["site"]  # index.html, which leads to docs/index.html

myst_heading_anchors = 3
# ref.python: attributes of ours are called `bytes` and `columns`, which types in signatures are then taken for.
suppress_warnings = ["myst.header", "ref.python"]

autosummary_generate = True
autosummary_context = {"modules_of": modules_by_package()}
templates_path = ["docs/templates"]
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

_SPECIAL = re.compile(r"([*|\\]|_(?!\w)|(?<!\w)_)")
_SECTIONS = {"Args:", "Returns:", "Raises:", "Yields:", "Attributes:", "Note:", "Example:"}
_ITEM = re.compile(r"(\d+\.|[-*]) ")


def markdown_to_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Makes a plain docstring with Markdown's backticks valid reStructuredText, without a change to what it says.

    Doctests stay as they are, indented formulas become literal blocks, lists get the blank lines that reStructuredText
    wants around them.
    """
    result: list[str] = []
    in_doctest = in_section = in_formula = False
    previous = ""
    for line in lines:
        in_doctest = line.lstrip().startswith(">>>") or (in_doctest and bool(line.strip()))
        if line.strip() and not line.startswith(" "):
            in_section = line.strip() in _SECTIONS
        if not in_doctest and not in_section and _indent(line) >= 4 and (in_formula or not previous.strip()):
            if not in_formula:
                result += ["::", ""]
            in_formula, previous = True, line
            result.append(line)
            continue
        in_formula = in_formula and not line.strip()
        if not in_doctest and not in_section and line.strip() and previous.strip():
            deeper = _indent(line) != _indent(previous) and not _ITEM.match(previous.lstrip())
            begins = bool(_ITEM.match(line.lstrip())) and not _ITEM.match(previous.lstrip())
            if (deeper or begins) and not (begins and _indent(previous) > _indent(line)):
                result.append("")
        previous = line
        result.append(line if in_doctest else _literal(line))
    lines[:] = result


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _literal(line: str) -> str:
    """Code of backticks; signs with a meaning elsewhere are escaped."""
    if _ITEM.match(line.lstrip()):
        marker, rest = line[: _indent(line)] + line.lstrip().split(" ", 1)[0], line.lstrip().split(" ", 1)[1]
        return f"{marker} {_literal(rest)}"
    parts = line.split("`")
    if len(parts) % 2 == 0:  # a quotation over two lines
        return _SPECIAL.sub(r"\\\1", line.replace("`", ""))
    text = [_SPECIAL.sub(r"\\\1", part) for part in parts[0::2]]
    code = [f"``{part}``" for part in parts[1::2]]
    text[1:] = [f"\\ {part}" if part[:1].isalnum() else part for part in text[1:]]
    return "".join(a + b for a, b in zip(text, [*code, ""], strict=True))


def setup(app: Any) -> None:
    """Registers the conversion of docstrings before napoleon's."""
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=400)

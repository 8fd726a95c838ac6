"""What the pages name is there: links, files, configurations, modules and classes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "configs/README", "notebooks/README")),
    ROOT / "rewards/served/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "miniature").glob("*.md")),
]
PACKAGES = ("lightning_modules", "datamodules", "rewards", "callbacks", "miniature", "benchmarks")
FOLDERS = (*PACKAGES, "configs", "notebooks", "docs", "tests", ".ci")
BUILT = ("docs/_build",)
"""What the pages name, but only a command makes."""

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def heading_anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as repository browsers make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing(text: str, folder: Path) -> bool:
    """True if a name that looks like a path of this repository leads nowhere; patterns have to match a file."""
    if any(text.startswith(built) for built in BUILT) or re.search(r"[<>]|\.\.\.", text):
        return False
    choices = re.search(r"\{([^{}]+)\}", text)
    if choices:
        return any(missing(text.replace(choices[0], choice, 1), folder) for choice in choices[1].split(","))
    return not any(any(place.glob(text.rstrip("/"))) for place in (ROOT, folder))


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = page if not name else page.parent / name
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in heading_anchors(file), f"{page.name} links to {target}"


@every_page
def test_files_in_code_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w.{},*<>/-]+/[\w.{},*<>/-]*)`", text))
    named |= set(re.findall(r"(?<![\w/])(configs/[\w./-]+\.yaml)", text))
    for name in sorted(named):
        if name.split("/")[0] in FOLDERS:
            assert not missing(name, page.parent), f"{page.name} names {name}"


@every_page
def test_modules_and_classes_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    dotted = set(re.findall(rf"(?<![\w./-])((?:{'|'.join(PACKAGES)})(?:\.\w+)+)", text))
    dotted |= {name for name in re.findall(r"python -m ([\w.]+)", text) if name.split(".")[0] in PACKAGES}
    for name in sorted(dotted):
        parts = name.split(".")
        if parts[-1] in ("py", "md", "yaml", "json", "png"):
            continue
        depth = max((n for n in range(1, len(parts) + 1) if _source("/".join(parts[:n])) is not None), default=0)
        assert depth, f"{page.name} names {name}"
        for attribute in parts[depth : depth + 1]:
            source = _source("/".join(parts[:depth]))
            assert source is not None
            known = rf"^(class|def) {attribute}\b|^{attribute}\b.*=|import .*\b{attribute}\b"
            assert re.search(known, source.read_text(encoding="utf-8"), re.MULTILINE), f"{page.name} names {name}"


def _source(stem: str) -> Path | None:
    for path in (ROOT / f"{stem}.py", ROOT / stem / "__init__.py"):
        if path.is_file():
            return path
    return None


def test_every_package_has_a_page_of_the_api() -> None:
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for name in PACKAGES
        for path in ROOT.glob(f"{name}/**/__init__.py")
    }
    listed = re.findall(r"^   ([a-z_.]+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(packages)

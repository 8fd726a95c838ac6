"""The code of docs/extending.md runs as it stands, block after block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.mark.filterwarnings("ignore:.*has no `val_dataloader`.*", "ignore:.*`val_dataloader`.*", "ignore:.*Trainer.*")
def test_its_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "mine"}
    page = PAGE.read_text(encoding="utf-8")
    for block in re.finditer(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        lines_before = page[: block.start(1)].count("\n")
        code = compile("\n" * lines_before + block.group(1), str(PAGE), "exec")  # errors name the page's own line
        exec(code, names)
    assert {"ColorShare", "CSVPrompts", "TinyPolicy", "BetterHalf"} <= names.keys()

"""The code of docs/extending.md and of the README runs as it stands, block after block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules.tagged import TaggedPrompts

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"


def run_blocks(page: Path, names: dict[str, Any]) -> None:
    """Runs a page's Python blocks in one namespace; errors name the page's own line."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        lines_before = text[: block.start(1)].count("\n")
        exec(compile("\n" * lines_before + block.group(1), str(page), "exec"), names)


def test_the_readmes_reward_scores_red() -> None:
    names: dict[str, Any] = {"__name__": "my_rewards"}
    run_blocks(ROOT / "README.md", names)
    images = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (85, 85, 85))]
    assert names["redness"](["a red thing"] * 2, images, [{}, {}]) == pytest.approx([255 / 256, 85 / 256])


def test_a_file_of_tagged_prompts_is_made_as_the_page_says(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    run_blocks(ROOT / "docs" / "data.md", names)
    samples = ROOT / "datamodules" / "samples"
    rows = names["tagged"](samples / "geneval.jsonl", samples / "ocr.txt", samples / "aesthetic.txt")
    names["write"](rows, tmp_path / "new" / "train.jsonl")
    read = TaggedPrompts(str(tmp_path / "new" / "train.jsonl"), str(samples / "tagged.jsonl"))
    read.setup("fit")
    assert [sample.tag for sample in read.train_samples()] == ["geneval"] * 24 + ["ocr"] * 24 + ["pickscore"] * 24
    assert read.train_samples()[0].metadata["include"] and read.train_samples()[24].metadata["text"]


@pytest.mark.filterwarnings("ignore:.*has no `val_dataloader`.*", "ignore:.*`val_dataloader`.*", "ignore:.*Trainer.*")
def test_its_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "mine"}
    run_blocks(PAGE, names)
    assert {"ColorShare", "CSVPrompts", "TinyPolicy", "BetterHalf"} <= names.keys()
    images = [Image.new("RGB", size, (level,) * 3) for size, level in (((2, 2), 255), ((1, 1), 9), ((2, 2), 51))]
    assert names["brightness"](["x"] * 3, images, [{}] * 3) == [1.0, None, 0.2]
    assert names["above_the_group"](["x", "y", "x"], images[:1] + images[2:] + images[2:], []) == [0.5, 0, 0]

"""Equal prompts of an evaluation file are one prompt with more images; in training and prediction each line counts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from datamodules.base import PromptDataModule, bare
from datamodules.editing.benchmarks import GEditPrompts
from datamodules.editing.prompts import EditPrompts
from datamodules.geneval import GenEvalPrompts
from datamodules.ocr import OCRPrompts
from datamodules.prompt_files import PromptFiles
from datamodules.tagged import TaggedPrompts
from datamodules.text import TextPrompts


def include(kind: str) -> list[dict[str, object]]:
    return [{"class": kind, "count": 1}]


GENEVAL = [
    {"prompt": "a photo of a dog", "tag": "single_object", "include": include("dog")},
    {"include": include("cat"), "prompt": "a photo of a cat", "tag": "single_object"},
    {"prompt": "a photo of a cat", "tag": "two_object", "include": include("cat")},
]
TAGGED = [
    {"prompt": "a dog", "tag": "pickscore"},
    {"prompt": "a dog", "tag": "hps"},
    {"prompt": "a dog", "tag": "hps", "metadata": {"a": 1}},
]


@pytest.mark.parametrize(
    ("kind", "rows", "suffix"),
    [
        (GenEvalPrompts, GENEVAL, "jsonl"),
        (TaggedPrompts, TAGGED, "jsonl"),
        (TextPrompts, [{"prompt": "a", "id": None}, {"prompt": "a", "style": "x"}, {"prompt": "b"}], "jsonl"),
        (TextPrompts, ["a", "b", "c"], "txt"),
        (OCRPrompts, ['a "b"', 'a "c"', 'an "a"'], "txt"),
    ],
)
def test_equal_lines_of_an_evaluation_file_are_one_prompt(
    tmp_path: Path, kind: type[PromptFiles], rows: list[object], suffix: str
) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows * 4]
    random.Random(0).shuffle(lines)
    path = tmp_path / f"p.{suffix}"
    path.write_text("\n".join(lines))
    data = kind(str(path), str(path), predict_file=str(path))
    with pytest.warns(UserWarning, match=r"data\.eval_file: its 12 rows are 3 prompts, each 4 times: evaluation draws"):
        data.setup("fit")
    samples = [sample for part in data.eval_samples().values() for sample in part]
    assert len({sample.content for sample in samples}) == len(samples) == 3
    assert [sample.repeats for sample in samples] == [4, 4, 4]
    assert len(data.train_samples()) == 12
    data.setup("predict")
    assert [len(part) for part in data.predict_samples().values()] == [12]


def test_a_limit_counts_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("".join(f"{i % 4}\n" for i in range(9)))
    data = TextPrompts(str(path), str(path), limit=4, val_limit=2)
    with pytest.warns(UserWarning, match="each 2 to 3 times: evaluation draws at least 2 images of each"):
        data.setup("fit")
    assert [(sample.prompt, sample.repeats) for sample in data.eval_samples()["text"]] == [("0", 3), ("2", 2)]


def edits(folder: Path, kind: str) -> PromptDataModule:
    """Six rows: two instructions, the first on two images that have two file names each, the second on one, twice."""
    for name, color in (("a", "red"), ("b", "red"), ("c", "blue"), ("d", "blue")):
        Image.new("RGB", (8, 8), color).save(folder / f"{name}.png")
    rows = [("remove it", name) for name in "abcd"] + [("add one", "a")] * 2
    path = folder / "edit.jsonl"
    if kind == "edit":
        records: list[dict[str, object]] = [{"prompt": prompt, "image": f"{name}.png"} for prompt, name in rows]
        path.write_text("\n".join(map(json.dumps, records)))
        return EditPrompts(str(path), str(path))
    about = {"task_type": "t", "instruction_language": "en", "Intersection_exist": True}
    records = [
        {"key": str(i), "instruction": prompt, "image": f"{name}.png", **about} for i, (prompt, name) in enumerate(rows)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return GEditPrompts(str(path))


@pytest.mark.parametrize("kind", ["edit", "gedit"])
def test_edits_are_equal_by_image_and_instruction(tmp_path: Path, kind: str) -> None:
    data = edits(tmp_path, kind)
    with pytest.warns(UserWarning, match="its 6 rows are 3 prompts, each 2 times"):
        data.setup("validate")
    ((_, samples),) = data.eval_samples().items()
    assert [(s.prompt, s.repeats) for s in bare(samples)] == [("remove it", 2), ("remove it", 2), ("add one", 2)]
    assert [sample.image.getpixel((0, 0))[0] for sample in samples] == [255, 0, 255]  # type: ignore[union-attr,index]
    assert samples[0].repeats == 2

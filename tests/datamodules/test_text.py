"""Bare and tagged prompts, and the shipped samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from datamodules.geneval import GenEvalPrompts
from datamodules.geneval_names import TAGS
from datamodules.ocr import OCRPrompts
from datamodules.tagged import TaggedPrompts
from datamodules.text import TextPrompts

SAMPLES = Path("datamodules/samples")


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def test_bare_prompts_and_their_metadata(tmp_path: Path) -> None:
    bare = write(tmp_path / "a.txt", "a cat", "", "a dog ")
    rich = write(tmp_path / "b.jsonl", {"prompt": "a cow", "id": "cow", "category": "farm", "tag": "hard"})
    data = TextPrompts(bare, rich)
    data.setup("fit")
    assert [(s.id, s.prompt, s.tag, s.metadata) for s in data.train_samples()] == [
        ("00000", "a cat", "text", {}),
        ("00001", "a dog", "text", {}),
    ]
    (cow,) = data.eval_samples()["text"]
    assert (cow.id, cow.tag, cow.metadata) == ("cow", "hard", {"category": "farm", "tag": "hard"})


def test_tagged_prompts_become_one_set_a_tag(tmp_path: Path) -> None:
    metadata = {"tag": "counting", "include": [{"class": "dog", "count": 2}]}
    rows = [
        {"prompt": "two dogs", "tag": "geneval", "metadata": metadata},
        {"prompt": 'a sign "Open"', "tag": "ocr"},
        {"prompt": "a note", "tag": "ocr", "metadata": {"text": "Later"}},
        {"prompt": "a hill", "tag": "pickscore", "metadata": None},
    ]
    path = write(tmp_path / "t.jsonl", *rows)
    data = TaggedPrompts(path, path)
    data.setup("fit")
    sets = data.eval_samples()
    assert list(sets) == ["geneval", "ocr", "pickscore"]
    assert sets["geneval"][0].metadata == metadata
    assert [sample.metadata["text"] for sample in sets["ocr"]] == [["Open"], "Later"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "`tag` is None: name the reward"),
        ({"prompt": "a", "tag": "x", "metadata": [1]}, r"`metadata` is \[1\]: give an object"),
        ({"prompt": "a", "tag": "ocr"}, "no text in double quotes"),
        ({"prompt": "a", "tag": "g", "metadata": {"include": []}}, "`metadata`: `tag` is None, use one of"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", {"prompt": "good", "tag": "x"}, row)
    with pytest.raises(ValueError, match=rf"bad\.jsonl:2: {message}"):
        TaggedPrompts(path, path).setup("fit")


def test_the_shipped_samples() -> None:
    """24 prompts of each kind, GenEval's six tags four times each, and a mix of all three."""
    for data, name in (
        (GenEvalPrompts(str(SAMPLES / "geneval.jsonl"), str(SAMPLES / "geneval.jsonl")), "geneval"),
        (OCRPrompts(str(SAMPLES / "ocr.txt"), str(SAMPLES / "ocr.txt")), "ocr"),
        (TextPrompts(str(SAMPLES / "aesthetic.txt"), str(SAMPLES / "aesthetic.txt")), "text"),
    ):
        data.setup("fit")
        samples = data.eval_samples()[name]
        assert len({sample.prompt for sample in samples}) == 24
        if name == "geneval":
            assert sorted(s.tag for s in samples) == sorted([*TAGS] * 4)
    mixed = TaggedPrompts(str(SAMPLES / "tagged.jsonl"), str(SAMPLES / "tagged.jsonl"))
    mixed.setup("fit")
    assert {tag: len(part) for tag, part in mixed.eval_samples().items()} == {"geneval": 8, "ocr": 8, "pickscore": 8}

"""Wordings from files: which line belongs to which prompt, and errors that name it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.base import PromptSample
from datamodules.paraphrases.base import check_kinds
from datamodules.paraphrases.files import FileParaphrases

SAMPLES = [
    PromptSample("a", "a red cat", "colors", {}),
    PromptSample("b", "two dogs", "counting", {}),
    PromptSample("c", "two dogs", "counting", {}),
]


def paraphrases(folder: Path, *lines: dict[str, Any] | str, **kwargs: Any) -> FileParaphrases:
    path = folder / "p.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return FileParaphrases(str(path), **kwargs)


def test_lines_are_matched_by_id_text_and_set(tmp_path: Path) -> None:
    source = paraphrases(
        tmp_path,
        {"id": "a", "paraphrase": "  a crimson cat "},
        {"original": "two dogs", "paraphrase": "a pair of dogs"},
        "",
        {"id": "a", "kind": "long", "paraphrase": "a red cat"},  # the prompt itself is no paraphrase
        {"id": "b", "kind": "long", "paraphrase": "two dogs, at night", "original": "two dogs"},
        {"id": "c", "kind": "long", "paraphrase": "three dogs", "original": "three dogs"},  # of an older file
        {"id": "c", "kind": "long", "paraphrase": "elsewhere", "set": "ocr"},
        {"id": "zzz", "paraphrase": "no such prompt"},
        kind="free",
    )
    assert source.kinds == ("free", "long") and source.refined
    assert source.write("geneval", SAMPLES) == {
        "free": ["a crimson cat", "a pair of dogs", "a pair of dogs"],
        "long": [None, "two dogs, at night", None],
    }
    assert source.write("ocr", SAMPLES)["long"] == [None, "two dogs, at night", "elsewhere"]


def test_numbers_serve_as_ids(tmp_path: Path) -> None:
    source = paraphrases(tmp_path, {"id": 7, "paraphrase": "x"})
    assert source.write("s", [PromptSample("7", "y", "t", {})]) == {"file": ["x"]}


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (['{"id": "a"'], r"p\.jsonl:1: not valid JSON .*: correct or delete the line"),
        (["[1]"], r"p\.jsonl:1: a JSON list in place of an object"),
        (["", {"id": "a"}], r"p\.jsonl:2: `paraphrase` is None: give the other wording"),
        ([{"id": "a", "paraphrase": " "}], r"p\.jsonl:1: `paraphrase` is ' '"),
        ([{"paraphrase": "x"}], r"p\.jsonl:1: neither `id` nor `original`"),
        ([{"original": 3, "paraphrase": "x"}], r"p\.jsonl:1: `original` is 3: give text"),
        ([{"id": "a", "paraphrase": "x", "kind": "My kind"}], r"p\.jsonl:1: the kind 'My kind' names a set"),
        ([{"id": "zz", "paraphrase": "x"}], r"p\.jsonl: none of its 1 lines is for the set geneval"),
        (
            [{"id": "b", "paraphrase": "x"}, {"original": "two dogs", "paraphrase": "y"}],
            r"p\.jsonl:2: .*p\.jsonl:1 has a wording of the prompt 'b' of the kind file already",
        ),
        ([], r"p\.jsonl: the file holds no lines"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, lines: list[Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        paraphrases(tmp_path, *lines).write("geneval", SAMPLES)


def test_a_missing_file_and_bad_kinds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which is not a file"):
        FileParaphrases(str(tmp_path / "none.jsonl")).write("geneval", SAMPLES)
    with pytest.raises(ValueError, match="FileParaphrases.kind: the kind 'A B' names a set"):
        FileParaphrases("x.jsonl", kind="A B")
    with pytest.raises(ValueError, match="name one twice"):
        check_kinds(["a", "a"], "here")

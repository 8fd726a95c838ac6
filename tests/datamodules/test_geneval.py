"""GenEval JSONL files: what is read, and what each bad line is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from datamodules.geneval import GenEvalPrompts, read_prompts

DOG = {"prompt": "a photo of a dog", "tag": "single_object", "include": [{"class": "dog", "count": 1}]}


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_reads_records(tmp_path: Path) -> None:
    counting = {**DOG, "tag": "counting", "id": 7, "exclude": [{"class": "dog", "count": 2}]}
    first, second = read_prompts(write(tmp_path / "p.jsonl", DOG, "", counting, ""))
    assert (first.id, first.prompt, first.tag, first.image) == ("00000", "a photo of a dog", "single_object", None)
    assert first.metadata == {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    assert (second.id, second.tag) == ("7", "counting")
    assert second.metadata["exclude"] == [{"class": "dog", "count": 2}]


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(DOG), encoding="utf-8-sig")
    assert len(read_prompts(path)) == 1


def test_a_null_is_as_good_as_no_key(tmp_path: Path) -> None:
    """Tables that became JSON, such as data sets of Hugging Face, have one where a row has no value."""
    include = [{"class": "dog", "count": 1, "color": None, "position": None}]
    (sample,) = read_prompts(write(tmp_path / "p.jsonl", {**DOG, "include": include, "exclude": None, "id": None}))
    assert sample.id == "00000" and sample.metadata == {"tag": DOG["tag"], "include": DOG["include"]}


POSITION = [{"class": "sink", "count": 1}, {"class": "tie", "count": 1, "position": ["above", 2]}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a dog",', r"not valid JSON \(.* at column \d+\): correct or delete the line"),
        ("[1, 2]", r"a JSON list in place of an object"),
        ({**DOG, "tag": "x" * 5000}, r"`tag` is 'x{40,60}\.\.\.x{40,60}', use one of"),
        ({**DOG, "prompt": " "}, r"`prompt` is ' ': give the text"),
        ({"tag": "single_object", "include": DOG["include"]}, r"`prompt` is None: give the text"),
        ({**DOG, "tag": "shapes"}, r"`tag` is 'shapes', use one of single_object"),
        ({"prompt": "a dog", "tag": "colors"}, r"`include` must be a list"),
        ({**DOG, "tag": "position", "include": POSITION}, r"`include\[1\]` has a position that points at entry 2, use"),
        ({**DOG, "id": "00000"}, r"the id '00000' was used in .*:1: make ids unique"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", DOG, "", line)
    with pytest.raises(ValueError, match=rf"bad\.jsonl:3: {message}"):
        read_prompts(path)


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"empty\.jsonl: the file holds no lines: write one JSON object per line"):
        read_prompts(write(tmp_path / "empty.jsonl", "", " "))


def test_files_are_checked_in_setup(tmp_path: Path) -> None:
    train = str(write(tmp_path / "train.jsonl", DOG))
    data = GenEvalPrompts(train, str(tmp_path / "missing.jsonl"))
    with pytest.raises(ValueError, match=r"data\.eval_file is '.*missing\.jsonl', which is not a file"):
        data.setup("fit")
    with pytest.raises(ValueError, match=r"data\.eval_file is .* not a file"):
        data.setup("test")  # no test_file: the evaluation file is the one to name
    with pytest.raises(ValueError, match=r"data\.test_file is '.*gone\.jsonl', which is not a file"):
        GenEvalPrompts(train, train, str(tmp_path / "gone.jsonl")).setup("test")


def test_loaders_and_limit(tmp_path: Path) -> None:
    """10 prompts, 4 kept, spread evenly: 0, 2, 5 and 7."""
    many = str(write(tmp_path / "many.jsonl", *[{**DOG, "prompt": f"dog {i}"} for i in range(10)]))
    one = str(write(tmp_path / "one.jsonl", {**DOG, "prompt": "last dog"}))
    data = GenEvalPrompts(many, many, one, limit=4, batch_size=2, eval_batch_size=3)
    data.setup("fit")
    (loader,) = data.val_dataloader()
    assert [[sample.prompt for sample in batch] for batch in loader] == [["dog 0", "dog 2", "dog 5"], ["dog 7"]]
    assert data.eval_names == ["geneval"]
    trained = sorted(sample.prompt for batch in data.train_dataloader() for sample in batch)
    assert trained == ["dog 0", "dog 2", "dog 5", "dog 7"]
    data.setup("test")
    assert [sample.prompt for sample in next(iter(data.test_dataloader()[0]))] == ["last dog"]
    with pytest.raises(ValueError, match="data.limit is 0, use at least 1"):
        GenEvalPrompts(many, many, limit=0)

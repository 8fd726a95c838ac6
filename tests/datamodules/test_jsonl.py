"""The one reader of JSON lines: what counts as a line, and what becomes of lines that are broken."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.jsonl import Broken, json_lines, read_records

GOOD, CUT = '{"a": 1}\n', '{"a": \n'


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "p.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, '\ufeff{"a": "é"}\r\n \r\n{"a": "\u2028"}')
    assert list(json_lines(path)) == [(f"{path}:1", {"a": "é"}), (f"{path}:3", {"a": "\u2028"})]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (GOOD + CUT + GOOD, r"p\.jsonl:2: not valid JSON \(Expecting value at column \d\): correct or delete the line"),
        (GOOD + "[1]\n", r"p\.jsonl:2: a JSON list in place of an object: write"),
        ("\n", r"p\.jsonl: the file holds no lines: write one JSON object per line"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, content: str, error: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=error):
        list(json_lines(path))
    assert [record for _, record in json_lines(path, broken="skip")] == [{"a": 1}] * content.count(GOOD)


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
@pytest.mark.parametrize(
    ("encode", "line"),
    [
        (lambda text: text.encode("latin-1"), 3),
        (lambda text: text.encode("utf-16"), 1),
        (lambda text: text.encode("utf-16-le"), 1),
        (lambda text: text.encode("utf-32"), 1),
        (lambda text: gzip.compress(text.encode()), 1),
    ],
)
def test_what_is_no_utf_8_is_named_by_line(
    tmp_path: Path, suffix: str, encode: Callable[[str], bytes], line: int
) -> None:
    path = (tmp_path / "p").with_suffix(suffix)
    path.write_bytes(encode('{"prompt": "a"}\n\n{"prompt": "ä"}\n'.replace('{"', "" if suffix == ".txt" else '{"')))
    with pytest.raises(ValueError, match=rf"p{suffix}:{line}: the file is not UTF-8 text: save it as UTF-8"):
        read_records(path, (".jsonl", ".txt"))


@pytest.mark.parametrize("name", ["p.json", "p.JSONL", "p.csv", "p.parquet", "p.txt.gz", "p.txt", "p"])
def test_other_kinds_of_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('[{"prompt": "a cat"}]\n')
    with pytest.raises(ValueError, match=rf"{name}: its name ends in .*: give a file whose name ends in \.jsonl \(a"):
        read_records(tmp_path / name)


@pytest.mark.parametrize("line", ['{"prompt": "a cat"}', '  {"prompt": "a cat"},', '[{"prompt": "a cat"}]', "["])
def test_json_is_no_bare_prompt(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.txt").write_text(f"{{a brace}}\n[1, 2]\n{line}\n")
    with pytest.raises(ValueError, match=r"p\.txt:3: JSON in a file of bare prompts: write an object a line, into a"):
        read_records(tmp_path / "p.txt", (".txt",))


def test_half_a_character_is_named_by_line(tmp_path: Path) -> None:
    """It ended in a traceback of a tokenizer, or of the first file that was written."""
    path = write(tmp_path, '{"prompt": "\\ud83d\\ude00 \\\\ud83d \\ufffd"}\n{"prompt": "a \\ud83d cat"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl:2: half a character"):
        read_records(path)


@pytest.mark.parametrize(("given", "name"), [("null", "00001"), ("7", "7"), ("7.0", "7"), ('"x"', "x"), ("-1", "-1")])
def test_ids(tmp_path: Path, given: str, name: str) -> None:
    path = write(tmp_path, f'{{"prompt": "a", "id": null}}\n{{"prompt": "b", "id": {given}}}\n')
    assert [record["id"] for _, record in read_records(path)] == ["00000", name]


@pytest.mark.parametrize("given", ["true", "[1]", "{}", "1.5", "NaN"])
def test_what_is_no_id(tmp_path: Path, given: str) -> None:
    path = write(tmp_path, f'{{"prompt": "a", "id": {given}}}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl:1: the id is .*: give text or a whole number, or leave it out"):
        read_records(path)


@pytest.mark.parametrize("broken", ["skip", "skip_last"])
def test_a_line_that_a_killed_process_left_is_left_out(tmp_path: Path, broken: Broken) -> None:
    assert [record for _, record in json_lines(write(tmp_path, GOOD + CUT[:-1]), broken=broken)] == [{"a": 1}]
    assert list(json_lines(write(tmp_path, ""), broken=broken)) == []


def test_only_the_unended_line_is_left_out(tmp_path: Path) -> None:
    for content in (CUT, CUT + GOOD):
        with pytest.raises(ValueError, match=r"p\.jsonl:1: not valid JSON"):
            list(json_lines(write(tmp_path, content), broken="skip_last"))


def test_the_reader_loads_nothing_heavy() -> None:
    command = "import sys, datamodules.jsonl; assert not {'torch', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True)

"""The one reader of JSON lines: what counts as a line, and what becomes of lines that are broken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from datamodules.jsonl import Broken, json_lines

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


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"p\.jsonl: the file is not UTF-8 text: save it as UTF-8"):
        list(json_lines(write(tmp_path, '{"a": "ä"}'.encode("latin-1"))))


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

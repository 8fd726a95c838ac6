"""Reads JSONL and text files line by line; errors name the file and the line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from datamodules.local_path import local_path
from datamodules.parsing import parse_json, quoted

Record = dict[str, Any]
"""The object of one line."""
Broken = Literal["stop", "skip_last", "skip"]
"""Treatment of lines that hold no JSON object; see `json_lines`."""
_NO_TEXT = re.compile("[\0\udc80-\udcff]")  # NUL, of UTF-16, and the surrogates of bytes that are no UTF-8
_HALF = re.compile("[\ud800-\udfff]")  # one of the two escapes of an emoji, which no tokenizer and no file takes
_KINDS = {".jsonl": ".jsonl (a JSON object a line)", ".txt": ".txt (a prompt a line)"}


def json_lines(path: str | Path, *, broken: Broken = "stop") -> Iterator[tuple[str, Record]]:
    """Yields `file:line` and the object of each line of a JSONL file; blank lines are skipped.

    Args:
        path: a file of UTF-8 text, with or without a byte order mark.
        broken: `stop` raises at a line that holds no JSON object and at a file without any line. `skip` leaves such
            lines out. `skip_last` does so with a last line that a killed process left without its line feed.

    Raises:
        ValueError: naming `file:line`, what is wrong and what to do.
    """
    for number, text in _lines(path, None if broken != "stop" else "JSON object"):
        where = f"{path}:{number}"
        try:
            record = parse_json(text, where, a_line=True)
        except ValueError:
            if broken == "skip" or (broken == "skip_last" and not text.endswith("\n")):
                continue
            raise
        if isinstance(record, dict):
            if broken == "stop" and "\\u" in text and _HALF.search(json.dumps(record, ensure_ascii=False)):
                raise ValueError(f"{where}: half a character (\\ud800 to \\udfff, alone): correct or delete it.")
            yield where, record
        elif broken != "skip":
            raise ValueError(f"{where}: a JSON {type(record).__name__} in place of an object: write {{...}}.")


def read_records(path: str | Path, suffixes: Sequence[str] = (".jsonl",)) -> list[tuple[str, Record]]:
    """Reads the prompts of a file, of the kind that its name ends in.

    Args:
        path: `.jsonl`, one object per line with a `prompt` and an optional `id`; or `.txt`, one prompt per line and
            nothing else. Blank lines are skipped. Without an `id`, the prompt's position in the file serves, as five
            digits.
        suffixes: kinds of files that are taken.

    Returns:
        `file:line` and the record of each prompt, in file order: `id` (unique text), `prompt` (not blank) and whatever
        else its line holds. A null is as good as no key: tables that became JSON have one where a row has no value.

    Raises:
        ValueError: naming `file:line`, what is wrong and what to do.
    """
    suffix = Path(path).suffix
    if suffix not in suffixes:
        kinds = " or ".join(_KINDS[known] for known in suffixes)
        raise ValueError(f"{path}: its name ends in {suffix!r}: give a file whose name ends in {kinds}.")
    records: list[tuple[str, Record]] = []
    places: dict[str, str] = {}
    for where, given in json_lines(path) if suffix == ".jsonl" else _bare_prompts(path):
        record = _without_null(given)
        prompt = record.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{where}: `prompt` is {quoted(prompt)}: give the text of the prompt.")
        name = record["id"] = id_of(record.get("id"), len(records), where)
        if name in places:
            raise ValueError(f"{where}: the id {quoted(name)} was used in {places[name]}: make ids unique.")
        places[name] = where
        records.append((where, record))
    return records


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(entry) for key, entry in value.items() if entry is not None}
    return [_without_null(entry) for entry in value] if isinstance(value, list) else value


def id_of(value: Any, position: int, where: str) -> str:
    """Returns a record's id as text; the position, as five digits, for null, which is no id.

    Args:
        value: text or a whole number (7.0 is the 7 of a table with gaps), or None.
        position: number of the record in its file, from 0.
        where: place of the value, for the error.

    Raises:
        ValueError: if it is something else, such as true or a list.
    """
    if value is None:
        return f"{position:05d}"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{where}: the id is {quoted(value)}: give text or a whole number, or leave it out.")


def read_text(path: str | Path, setting: str) -> str:
    """Reads a file of UTF-8 text, without a byte order mark.

    Args:
        path: path of the file.
        setting: name of the setting that names it, for the error.

    Raises:
        ValueError: if there is no such file, or with `file:line` at a line that is no UTF-8.
    """
    if not local_path(path, setting).is_file():
        raise ValueError(f"{setting} is {str(path)!r}, which is not a file: give the path of a UTF-8 text file.")
    return "".join(line for _, line in _decoded(path))


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Raises:
        ValueError: with file and line, if it is not there, or holds something else.
    """
    value = parse_json(read_text(path, "a JSON file"), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON {type(value).__name__} in place of an object: write {{...}}.")
    return value


def _bare_prompts(path: str | Path) -> Iterator[tuple[str, Record]]:
    for number, line in _lines(path, "prompt"):
        where = f"{path}:{number}"
        if _holds_object(line.strip().rstrip(",")):
            raise ValueError(
                f"{where}: JSON in a file of bare prompts: write an object a line, into a .jsonl file (a prompt that "
                "is JSON itself as the text of `prompt`)."
            )
        yield where, {"prompt": line.strip()}


def _holds_object(text: str) -> bool:
    """Returns True for a JSON object, a list of some, and for a line on which one of either begins."""
    if not text.startswith(("{", "[")):
        return False
    try:
        value = parse_json(text, "", a_line=True)
    except ValueError:
        return text in ("{", "[", "[{")
    return isinstance(value, dict) or any(isinstance(entry, dict) for entry in value)


def _lines(path: str | Path, unit: str | None) -> Iterator[tuple[int, str]]:
    """Yields number, from 1, and text of each line that is not blank.

    Args:
        path: the file.
        unit: content of a line, for the errors about a file that is empty or no UTF-8; None tolerates both.
    """
    empty = True
    for number, line in _decoded(path, strict=unit is not None):
        if line.strip():
            empty = False
            yield number, line
    if empty and unit:
        raise ValueError(f"{path}: the file holds no lines: write one {unit} per line.")


def _decoded(path: str | Path, *, strict: bool = True) -> Iterator[tuple[int, str]]:
    """Yields number, from 1, and text of each line; `strict` raises ValueError where bytes are no UTF-8 text."""
    # -sig: a byte order mark is not part of the first record
    number = 0
    with open(path, encoding="utf-8-sig", errors="surrogateescape" if strict else "replace") as file:
        for number, line in enumerate(file, start=1):
            if strict and _NO_TEXT.search(line):
                raise ValueError(f"{path}:{number}: the file is not UTF-8 text: save it as UTF-8.")
            yield number, line
        if strict and not number and 0 < os.fstat(file.fileno()).st_size < 3:  # the beginning of a mark, which it drops
            raise ValueError(f"{path}:1: the file is not UTF-8 text: save it as UTF-8.")

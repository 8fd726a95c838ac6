"""Reads JSONL and text files line by line; errors name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

Record = dict[str, Any]
"""The object of one line."""
Broken = Literal["stop", "skip_last", "skip"]
"""Treatment of lines that hold no JSON object; see `json_lines`."""


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
            record: Any = json.loads(text)
        except json.JSONDecodeError as error:
            if broken == "skip" or (broken == "skip_last" and not text.endswith("\n")):
                continue
            raise ValueError(
                f"{where}: not valid JSON ({error.msg} at column {error.colno}): correct or delete the line."
            ) from None
        if isinstance(record, dict):
            yield where, record
        elif broken != "skip":
            raise ValueError(f"{where}: a JSON {type(record).__name__} in place of an object: write {{...}}.")


def read_records(path: str | Path) -> list[tuple[str, Record]]:
    """Reads the prompts of a JSONL file.

    Args:
        path: one object per line with a `prompt` and an optional `id`. Blank lines are skipped. Without an `id`, the
            prompt's position in the file serves, as five digits.

    Returns:
        `file:line` and the record of each prompt, in file order: `id` (unique text), `prompt` (not blank) and whatever
        else its line holds.

    Raises:
        ValueError: naming `file:line`, what is wrong and what to do.
    """
    records: list[tuple[str, Record]] = []
    places: dict[str, str] = {}
    for where, record in json_lines(path):
        prompt = record.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{where}: `prompt` is {prompt!r}: give the text of the prompt.")
        name = record["id"] = str(record.get("id", f"{len(records):05d}"))
        if name in places:
            raise ValueError(f"{where}: the id {name!r} was used in {places[name]}: make ids unique.")
        places[name] = where
        records.append((where, record))
    return records


def read_bare_prompts(path: str | Path) -> list[tuple[str, Record]]:
    """Reads a text file that has one prompt per line and nothing else; returns the same as `read_records`."""
    return [
        (f"{path}:{number}", {"id": f"{position:05d}", "prompt": line.strip()})
        for position, (number, line) in enumerate(_lines(path, "prompt"))
    ]


def _lines(path: str | Path, unit: str | None) -> Iterator[tuple[int, str]]:
    """Yields number, from 1, and text of each line that is not blank.

    Args:
        path: the file.
        unit: content of a line, for the errors about a file that is empty or no UTF-8; None tolerates both.
    """
    empty = True
    # -sig: a byte order mark is not part of the first record
    with open(path, encoding="utf-8-sig", errors="strict" if unit else "replace") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    empty = False
                    yield number, line
        except UnicodeDecodeError:
            raise ValueError(f"{path}: the file is not UTF-8 text: save it as UTF-8.") from None
    if empty and unit:
        raise ValueError(f"{path}: the file holds no lines: write one {unit} per line.")

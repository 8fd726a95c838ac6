"""Parses JSON and YAML of unknown origin; whatever is wrong with a text becomes one sentence with its place."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from typing import Any

import yaml

MAX_YAML_DEPTH = 100
"""Most levels of a YAML text; the shipped configurations have 9."""
MAX_YAML_NODES = 100_000
"""Most values of a YAML text, where those of an alias count at each of its places."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 100
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # faster, where PyYAML has libyaml
# PyYAML's constructors raise these at `2024-13-01`, `!!int ""`, `!!bool x`, `!!timestamp x` and integers too long.
_CONSTRUCTION = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)


def parse_json(text: str, where: str, *, a_line: bool = False) -> Any:
    """Parses a JSON text.

    Args:
        text: the text.
        where: path of its file, or `file:line` of a text that is one line, for the error.
        a_line: the text is one line, whose place `where` says already.

    Raises:
        ValueError: with `file:line`, if it is no JSON, nested too deeply or has an integer of over 4,300 digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = where if a_line else f"{where}:{error.lineno}"
        what = f"{error.msg} at column {error.colno}"
    except RecursionError:
        place, what = where, "nested too deeply"
    except ValueError:  # of Python's bound for the digits of an integer
        place, what = where, "an integer of too many digits"
    raise ValueError(f"{place}: not valid JSON ({what}): correct or delete {'the line' if a_line else 'it'}.")


def parse_yaml(text: str, where: str) -> Any:
    """Parses a YAML text.

    Args:
        text: the text.
        where: path of its file, for the error.

    Raises:
        ValueError: with `file:line`, if it is no YAML, nested too deeply, or its aliases make it too large.
    """
    try:
        line = _line_too_large(text)
        if line is None:
            return yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        place = where if mark is None else f"{where}:{mark.line + 1}"
        broken = "" if mark is None else (text.split("\n")[mark.line : mark.line + 1] or [""])[0]
        if "\t" in broken[: len(broken) - len(broken.lstrip())]:
            what = "a tab, where YAML takes spaces alone"
    except _CONSTRUCTION as error:
        place, what = where, f"a value that cannot be read, {error}"
    else:
        raise _too_large(where, line)
    raise ValueError(f"{place} is no YAML: {what}; correct the line.")


def quoted(value: object) -> str:
    """Returns the `repr` of a value of unknown origin for an error; what is long is cut in the middle.

    >>> quoted("a red cat")
    "'a red cat'"
    """
    return _SHORT.repr(value)


def listed(names: Iterable[str], most: int = 20) -> str:
    """Joins names of unknown origin for an error: the first of them, each cut to 60 characters.

    >>> listed(["id", "prompt"])
    'id, prompt'
    """
    names = list(names)
    shown = [name if len(name) <= 60 else f"{name[:60]}..." for name in names[:most]]
    return ", ".join([*shown, f"and {len(names) - most} more"] if len(names) > most else shown) or "none"


def check_yaml_size(text: str, where: str) -> None:
    """Raises ValueError if a YAML text is nested too deeply, or its aliases make it too large.

    Raises:
        ValueError: with `file:line`.
        yaml.YAMLError: if it is no YAML.
    """
    line = _line_too_large(text)
    if line is not None:
        raise _too_large(where, line)


def _too_large(where: str, line: int) -> ValueError:
    return ValueError(
        f"{where}:{line}: over {MAX_YAML_NODES} values, each alias counted in full, or over {MAX_YAML_DEPTH} levels: "
        "write less."
    )


def _line_too_large(text: str) -> int | None:
    """Returns the line on which a text exceeds the bounds; None if it stays within.

    It reads events, which are not nested and build nothing.
    """
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.NodeEvent):
            # An alias inside its own anchor would be endless.
            own = {anchor for anchor, _ in open_nodes}
            alias = isinstance(event, yaml.AliasEvent)
            endless = alias and event.anchor in own
            total += MAX_YAML_NODES + 1 if endless else sizes.get(event.anchor or "", 1) if alias else 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, total - 1))
            elif not alias and event.anchor is not None:
                sizes[event.anchor] = 1
            if total > MAX_YAML_NODES or len(open_nodes) > MAX_YAML_DEPTH:
                return 1 if event.start_mark is None else int(event.start_mark.line) + 1
    return None

"""Finds mistakes in a command line and its configuration files before anything slow is imported.

The full parser finds them too, with less to say and after the seconds that torch, diffusers and Lightning take to
import. Whatever cannot be judged here is left to it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.jsonl import read_text
from datamodules.parsing import parse_yaml
from lightning_modules.cli.prompts import split_prompts
from lightning_modules.cli.renamed import renamed
from lightning_modules.cli.signatures import arguments

_KEYWORDS = ("class_path", "init_args", "dict_kwargs")
_TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
Node = dict[str, Any]


def misspelt(command: Sequence[str]) -> str | None:
    """Says which argument of a command does not exist, which word is no option, or which file is no YAML.

    Args:
        command: the words after `lightning`: a subcommand, `--config` files and options.

    Returns:
        One sentence, for an argument with its place, owner and nearest spelling; None if nothing is known to be wrong.
    """
    tree: Node = {}
    try:
        words = split_prompts(command)[0][1:]
    except ValueError as error:
        return str(error)
    while words:
        word = words.pop(0)
        key, equals, value = word.partition("=")
        if key in ("-h", "--help") or key.startswith("--") and key.endswith(".help"):
            return None  # a question
        if not key.startswith("--") and key != "-c":
            return _stray(word)
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        if key in ("--config", "-c"):
            try:
                content = _read(Path(value))
            except ValueError as error:
                return str(error)
            if content is None:
                return None  # a missing file is the parser's to explain
            _merge(tree, content)
        else:
            _set(tree, key[2:].split("."), value)
    places = (("model", None), ("data", None), ("trainer", _TRAINER))
    return next((said for key, owner in places for said in _wrong(tree.get(key), owner, key)), None)


def _stray(word: str) -> str:
    """Says how to write a word that stands where an option should."""
    name = word.lstrip("-\u2013\u2014")  # some programs make a long dash of two
    if Path(word).suffix.lower() in (".yaml", ".yml"):
        return f"`{word}` is no option: write `--config {word}`."
    if "=" in word or "." in name:
        return f"`{word}` is no option: write `--{name}`."
    return (
        f"`{word}` is no option: options begin with two dashes, such as `--trainer.max_steps 10`, and a value with "
        "spaces stands in quotes."
    )


def _read(path: Path) -> Node | None:
    """Reads a configuration file; None if it cannot be opened, or holds something else.

    Raises:
        ValueError: with file and line, if it is no YAML.
    """
    try:
        if not path.is_file():
            return None
        content = parse_yaml(read_text(path, "--config"), str(path))
    except OSError:
        return None
    return _nested(content) if isinstance(content, dict) else None


def _nested(content: Any) -> Any:
    """Writes dotted keys, such as `flow.init_args.height`, as mappings in mappings, as the parser does."""
    if isinstance(content, list):
        return [_nested(one) for one in content]
    if not isinstance(content, dict):
        return content
    tree: Node = {}
    for key, value in content.items():
        name, *below = str(key).split(".")
        value = _nested({".".join(below): value} if below else value)
        if isinstance(tree.get(name), dict):
            _merge(tree, {name: value})
        else:
            tree[name] = value
    return tree


def _merge(tree: Node, over: Mapping[str, Any]) -> None:
    """Lays one configuration over another, as the parser does: a new class brings arguments of its own."""
    for key, value in over.items():
        name = str(key).rstrip("+")
        below = tree.get(name)
        if not isinstance(value, dict) or not isinstance(below, dict):
            tree[name] = _appended(below, value) if str(key).endswith("+") else value
        elif value.get("class_path", below.get("class_path")) != below.get("class_path"):
            tree[name] = value
        else:
            _merge(below, value)


def _appended(below: Any, value: Any) -> list[Any]:
    return [one for part in (below, value) if part is not None for one in (part if isinstance(part, list) else [part])]


def _set(tree: Node, keys: list[str], value: str) -> None:
    """Sets an option by its dotted name, in which `init_args` may be left out."""
    *path, last = keys
    for key in path:
        tree = _arguments_of(tree, key)
        if not isinstance(tree.get(key), dict):
            old = tree.get(key)
            tree[key] = {"class_path": old} if isinstance(old, str) else {}
        tree = tree[key]
    tree = _arguments_of(tree, last)
    content: Any = _inline(value)
    below = tree.get(last)
    if isinstance(below, dict) and isinstance(content, str):  # `--reward=path.of.Class`, or its last name alone
        same = str(below.get("class_path")).rpartition(".")[2] == content
        content = below if same else {"class_path": content}
    _merge(tree, {last: content})


def _inline(value: str) -> Any:
    """An option's value; YAML and JSON are read where they hold more than one word."""
    if not value.startswith(("{", "[")):
        return value
    try:
        return _nested(parse_yaml(value, "an option"))
    except ValueError:
        return value


def _arguments_of(node: Node, key: str) -> Node:
    if "class_path" not in node or key in _KEYWORDS:
        return node
    found = node.setdefault("init_args", {})
    return found if isinstance(found, dict) else {}


def _wrong(value: Any, owner: str | None, place: str) -> Iterator[str]:
    """Sentences about what is misspelt at a place and below it.

    Args:
        value: what the configuration has there.
        owner: class path of the value's type, where the configuration need not name it.
        place: dotted name.
    """
    if isinstance(value, list):
        for number, one in enumerate(value):
            yield from _wrong(one, None, f"{place}[{number}]")
    if not isinstance(value, dict):
        return
    if "class_path" in value:
        owner, place = str(value["class_path"]), f"{place}.init_args"
        old = renamed(f"'{owner}'")
        if old is not None:
            yield old
        value = value.get("init_args") or {}
    known = None if owner is None else arguments(owner)
    if not isinstance(value, dict):
        return
    for key, below in value.items():
        name = str(key).rstrip("+")
        if known is not None and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            advice = f"did you mean `{near[0]}`?" if near else f"it takes {', '.join(sorted(known)) or 'none'}."
            yield f"`{place}.{name}`: {str(owner).rpartition('.')[2]} has no argument `{name}`; {advice}"
        yield from _wrong(below, None if known is None else known.get(name), f"{place}.{name}")

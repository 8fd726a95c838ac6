"""Prompts on the command line of `lightning predict`: any text, which no parser may read as YAML or an option."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

TEXTS = ("prompt", "image")
"""Options that may be given several times, each time with a text or a JSON list of texts."""
_OURS = re.compile(rf"--({'|'.join(TEXTS)})(?:=(.*))?", re.DOTALL)
_OPTION = re.compile(r"--[a-z_]+(\.\w+)*\+?(=.*)?", re.DOTALL)


def split_prompts(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Takes `--prompt TEXT`, `--prompt=TEXT` and the same of `--image` out of the words of a command.

    Args:
        words: the words after `lightning`.

    Returns:
        The other words, and option -> its texts, for those that are given; without a subcommand, all words.

    Raises:
        ValueError: if a text is missing, blank or not Unicode, or could as well be the next option; or if the
            subcommand is not `predict`.

    >>> split_prompts(["predict", "--prompt", "--- {a}: ${b}", "--config=c.yaml", '--prompt=["x", "y"]'])
    (['predict', '--config=c.yaml'], {'prompt': ['--- {a}: ${b}', 'x', 'y']})
    """
    if not words or words[0].startswith("-"):  # jsonargparse parses the arguments of each class like a command
        return list(words), {}
    rest, found, left = [words[0]], dict[str, list[str]](), list(words[1:])
    while left:
        word = left.pop(0)
        ours = _OURS.fullmatch(word)
        if ours is None:
            rest.append(word)
            continue
        option, text = ours[1], ours[2]
        if words[0] != "predict":
            raise ValueError(f"`--{option}` is an option of `lightning predict`, not of `lightning {words[0]}`.")
        if text is None and (not left or _OPTION.fullmatch(left[0])):
            where = f"is followed by `{left[0]}` and not by a text" if left else "stands at the end without a text"
            raise ValueError(
                f"`--{option}` {where}: write `--{option} 'a text'`, or `--{option}=TEXT` for one "
                "that looks like an option."
            )
        found.setdefault(option, []).extend(_texts(left.pop(0) if text is None else text))
    for option, texts in found.items():
        for number, text in enumerate(texts, start=1):
            if not text.strip() or re.search("[\0\ud800-\udfff]", text):
                fault = "not UTF-8 text" if text.strip() else "blank"
                raise ValueError(f"`--{option}` number {number} of {len(texts)} is {fault}: give it a text.")
    return rest, found


def _texts(text: str) -> list[str]:
    """Returns the texts of a JSON list of texts; anything else is one text."""
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, list) and found and all(isinstance(one, str) for one in found) else [text]

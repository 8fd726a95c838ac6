"""Data module of prompts that ask for text in the image, in the formats of Flow-GRPO and MARIO-Eval.

Flow-GRPO's files have the wanted text in double quotes, MARIO-Eval's in single quotes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from datamodules.base import PromptSample
from datamodules.jsonl import Record, read_records
from datamodules.parsing import quoted
from datamodules.prompt_files import PromptFiles

Quotes = Literal["auto", "double", "single"]
_SUFFIXES = (".txt", ".jsonl")
# An opening quote follows no letter and a closing one precedes none; between the two an apostrophe has a letter on
# either side. So neither "it's" nor "the dogs' bowl" opens anything, and 'don't' is one keyword.
_SINGLE = re.compile(r"(?<!\w)'(?=\S)((?:[^']|(?<=\w)'(?=\w))+)(?<=\S)'(?!\w)")


def target_text(prompt: str, quotes: Quotes = "auto") -> list[str]:
    """Returns the text that a prompt asks for, by its quotation marks.

    Args:
        prompt: the text as the user wrote it.
        quotes: `double` is the text between the first two double quotes, `single` every text in single quotes (their
            order is kept). `auto` is double if there are two double quotes, else single; for a file, let
            `quote_style` decide once.

    Returns:
        One or more texts, or none if there are none in such quotes. A quoted text may be blank.

    >>> target_text('A sign that reads "No Parking", at night'), target_text("It's a card with 'Don't' and 'Panic'")
    (['No Parking'], ["Don't", 'Panic'])
    """
    if quotes == "auto":
        quotes = quote_style([prompt])
    if quotes == "single":
        return _SINGLE.findall(prompt)
    return prompt.split('"')[1:2] if prompt.count('"') >= 2 else []


def quote_style(prompts: Sequence[str]) -> Literal["double", "single"]:
    """Returns `double` if every prompt has two double quotes, else `single`."""
    return "double" if all(prompt.count('"') >= 2 for prompt in prompts) else "single"


def read_prompts(path: str | Path, quotes: Quotes = "auto") -> list[PromptSample]:
    """Reads a file of prompts and the text that each asks for.

    Args:
        path: `.txt` with one prompt per line, or `.jsonl` with `prompt`, optional `id`, and optional `text` (a string
            or a list of them) where the target is not simply what is quoted. Blank lines are skipped.
        quotes: quotation marks around the wanted text (see `target_text`); `auto` is double if every line without its
            own `text` has double quotes.

    Returns:
        The samples in file order, with the tag `ocr` and `metadata["text"]`, a list of strings.

    Raises:
        ValueError: naming `file:line`, what is wrong and what to do.
    """
    records = read_records(path, _SUFFIXES)
    style = quote_style([r["prompt"] for _, r in records if "text" not in r]) if quotes == "auto" else quotes
    samples: list[PromptSample] = []
    for where, record in records:
        texts = _given_text(record["text"], where) if "text" in record else _quoted_text(record, style, where)
        samples.append(PromptSample(record["id"], record["prompt"], "ocr", {"text": texts}))
    return samples


def _given_text(text: Any, where: str) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise ValueError(f"{where}: `text` is {quoted(text)}: give the wanted text, a string or a list of strings.")
    return texts


def _quoted_text(record: Record, style: Quotes, where: str) -> list[str]:
    texts = target_text(record["prompt"], style)
    if not texts:
        raise ValueError(
            f"{where}: no text in {style} quotes: quote the wanted text in all lines alike (`quotes: auto` takes "
            "double quotes if every line has them, else single), or give it as `text` in a .jsonl file."
        )
    if not all(text.strip() for text in texts):
        raise ValueError(f"{where}: nothing between the {style} quotes: write the wanted text there.")
    return texts


class OCRPrompts(PromptFiles):
    """Prompts with quoted text in `.txt` or `.jsonl` files; the evaluation set is called `ocr`.

    Flow-GRPO's training file has 19,653 prompts and its test file 1,018. `datamodules/samples/ocr.txt` has 24.

    Args:
        *args: as for `PromptFiles`.
        quotes: quotation marks around the wanted text; `auto` finds out for each file (see `read_prompts`).
        **kwargs: as for `PromptFiles`.
    """

    eval_name = "ocr"
    suffixes = _SUFFIXES

    def __init__(self, *args: Any, quotes: Quotes = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if quotes not in get_args(Quotes):
            raise ValueError(f"data.quotes is {quotes!r}, use one of {', '.join(get_args(Quotes))}.")
        self.quotes: Quotes = quotes

    def read(self, path: Path) -> list[PromptSample]:
        """Reads all prompts of a `.txt` or `.jsonl` file."""
        return read_prompts(path, self.quotes)

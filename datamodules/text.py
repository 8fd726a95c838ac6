"""Data module of prompts from text or JSONL files, for rewards that need no metadata."""

from __future__ import annotations

from pathlib import Path

from datamodules.base import PromptSample
from datamodules.jsonl import read_records
from datamodules.parsing import quoted
from datamodules.prompt_files import PromptFiles


class TextPrompts(PromptFiles):
    """Bare prompts in `.txt` (one a line) or `.jsonl` files; the evaluation set is called `text`.

    For preference rewards (PickScore, HPSv2.1, ...). `datamodules/samples/aesthetic.txt` has 24 prompts.
    """

    eval_name = "text"
    suffixes = (".txt", ".jsonl")

    def read(self, path: Path) -> list[PromptSample]:
        """Reads all prompts of a file; JSON keys but `id` and `prompt` become metadata, and `tag` the tag too."""
        samples = []
        for where, record in read_records(path, self.suffixes):
            metadata = {key: value for key, value in record.items() if key not in ("id", "prompt")}
            tag = record.get("tag", "text")
            if not isinstance(tag, str) or not tag:
                raise ValueError(f"{where}: `tag` is {quoted(tag)}: give text, or leave the key out.")
            samples.append(PromptSample(record["id"], record["prompt"], tag, metadata))
        return samples

"""Data module of prompts from text or JSONL files, for rewards that need no metadata."""

from __future__ import annotations

from pathlib import Path

from datamodules.base import PromptSample
from datamodules.jsonl import read_bare_prompts, read_records
from datamodules.prompt_files import PromptFiles


class TextPrompts(PromptFiles):
    """Bare prompts in `.txt` (one a line) or `.jsonl` files; the evaluation set is called `text`.

    For preference rewards (PickScore, HPSv2.1, ...). `datamodules/samples/aesthetic.txt` has 24 prompts.
    """

    eval_name = "text"
    suffixes = (".txt", ".jsonl")

    def read(self, path: Path) -> list[PromptSample]:
        """Reads all prompts of a file; JSON keys but `id` and `prompt` become metadata, and `tag` the tag too."""
        records = read_records(path) if path.suffix == ".jsonl" else read_bare_prompts(path)
        samples = []
        for _, record in records:
            metadata = {key: value for key, value in record.items() if key not in ("id", "prompt")}
            samples.append(PromptSample(record["id"], record["prompt"], str(record.get("tag", "text")), metadata))
        return samples

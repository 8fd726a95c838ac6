"""Data module of GenEval prompts in JSONL files (the format of djghosh13/geneval and Flow-GRPO)."""

from __future__ import annotations

from pathlib import Path

from datamodules.base import PromptSample
from datamodules.geneval_names import validate_metadata
from datamodules.jsonl import read_records
from datamodules.prompt_files import PromptFiles


def read_prompts(path: str | Path) -> list[PromptSample]:
    """Reads the GenEval prompts of a JSONL file.

    Args:
        path: one object per line: `prompt`, `tag`, `include`, optional `exclude` and `id`. Blank lines are skipped.
            Without an `id`, the prompt's position in the file serves, as five digits (GenEval's folder names).

    Returns:
        The samples in file order; `metadata` holds all keys but `id` and `prompt`.

    Raises:
        ValueError: naming `file:line`, what is wrong and what to do.
    """
    samples: list[PromptSample] = []
    for where, record in read_records(path):
        metadata = {key: value for key, value in record.items() if key not in ("id", "prompt")}
        try:
            validate_metadata(metadata)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        samples.append(PromptSample(record["id"], record["prompt"], metadata["tag"], metadata))
    return samples


class GenEvalPrompts(PromptFiles):
    """GenEval training and evaluation prompts in JSONL files; the evaluation set is called `geneval`.

    Flow-GRPO's training file has 50,000 prompts, the official evaluation set 553.
    """

    eval_name = "geneval"
    test_images_per_prompt = 4  # 553 x 4, as everybody reports

    def read(self, path: Path) -> list[PromptSample]:
        """Reads all prompts of a JSONL file."""
        return read_prompts(path)

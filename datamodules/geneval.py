"""GenEval prompts from JSONL files (the format of djghosh13/geneval and Flow-GRPO)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datamodules.base import PromptDataModule, PromptSample
from rewards.geneval.rules import validate_metadata


def read_prompts(path: str | Path) -> list[PromptSample]:
    """Read a JSONL file.

    Args:
        path: one object per line: `prompt`, `tag`, `include`, optional `exclude` and `id`. Blank lines are skipped.
            Without an `id`, the prompt's position in the file serves, as five digits (GenEval's folder names).

    Returns:
        The samples in file order; `metadata` holds all keys but `id` and `prompt`.

    Raises:
        ValueError: naming `file:line`, what is wrong and what to do.
    """
    samples: list[PromptSample] = []
    line_of_id: dict[str, int] = {}
    with open(path, encoding="utf-8-sig") as file:  # -sig: a byte order mark is not part of the first record
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            sample = _parse(line, where=f"{path}:{number}", default_id=f"{len(samples):05d}")
            if sample.id in line_of_id:
                raise ValueError(
                    f"{path}:{number}: the id {sample.id!r} was used in line {line_of_id[sample.id]}: make ids unique."
                )
            line_of_id[sample.id] = number
            samples.append(sample)
    if not samples:
        raise ValueError(f"{path}: the file holds no prompts: write one JSON object per line.")
    return samples


def _parse(line: str, *, where: str, default_id: str) -> PromptSample:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}): write one JSON object per line."
        ) from None
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: a JSON {type(record).__name__} in place of an object: write {{...}} with a `prompt`."
        )
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: `prompt` is {prompt!r}: give the text of the prompt.")
    metadata = {key: value for key, value in record.items() if key not in ("id", "prompt")}
    try:
        validate_metadata(metadata)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return PromptSample(id=str(record.get("id", default_id)), prompt=prompt, tag=metadata["tag"], metadata=metadata)


class GenEvalPrompts(PromptDataModule):
    """GenEval training and evaluation prompts; the evaluation set is called `geneval`.

    Args:
        train_file: JSONL of training prompts (Flow-GRPO's has 50,000).
        eval_file: JSONL of held-out prompts for validation (the official set has 553).
        test_file: JSONL for `lightning test`; `eval_file` when not given.
        limit: at most so many prompts of each file, spread evenly over it since GenEval files are sorted by tag.
        batch_size: prompts per process and step.
        eval_batch_size: prompts per process in a validation or test step.
        seed: of the training order.
        num_workers: loader processes.
    """

    def __init__(
        self,
        train_file: str,
        eval_file: str,
        test_file: str | None = None,
        limit: int | None = None,
        batch_size: int = 1,
        eval_batch_size: int = 8,
        seed: int = 42,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed, num_workers)
        if limit is not None and limit < 1:
            raise ValueError(f"data.limit is {limit}, use at least 1, or null for all prompts.")
        self.train_file = train_file
        self.eval_file = eval_file
        self.test_file = test_file
        self.limit = limit
        self._samples: dict[str, list[PromptSample]] = {}

    def setup(self, stage: str) -> None:
        """Read the files that this stage needs."""
        needed = {"fit": ("train_file", "eval_file"), "validate": ("eval_file",), "test": ("test_file",)}
        for key in needed.get(stage, ()):
            self._samples[key] = self._read(key)

    def train_samples(self) -> list[PromptSample]:
        """Prompts of `train_file`."""
        return self._samples["train_file"]

    def eval_samples(self) -> dict[str, list[PromptSample]]:
        """Prompts of `eval_file`."""
        return {"geneval": self._samples["eval_file"]}

    def test_samples(self) -> dict[str, list[PromptSample]]:
        """Prompts of `test_file`, or of `eval_file` when there is none."""
        return {"geneval": self._samples["test_file"]}

    def _read(self, key: str) -> list[PromptSample]:
        key = "eval_file" if key == "test_file" and self.test_file is None else key
        path = Path(getattr(self, key))
        if not path.is_file():
            raise ValueError(f"data.{key} is {str(path)!r}, which is not a file: give the path of a JSONL file.")
        samples = read_prompts(path)
        if self.limit is None or self.limit >= len(samples):
            return samples
        return [samples[index * len(samples) // self.limit] for index in range(self.limit)]

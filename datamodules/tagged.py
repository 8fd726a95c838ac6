"""Data module of mixed prompts, each with the tag of the one reward that judges it."""

from __future__ import annotations

from pathlib import Path

from datamodules.base import PromptSample
from datamodules.geneval_names import validate_metadata
from datamodules.jsonl import read_records
from datamodules.ocr import target_text
from datamodules.parsing import quoted
from datamodules.prompt_files import PromptFiles


class TaggedPrompts(PromptFiles):
    """Prompts of several kinds, each with the tag of the one reward that judges it (`rewards.tagged.TaggedReward`).

    A line is `{"prompt", "tag", "metadata"?}`. Prompts with a GenEval record as metadata are checked like GenEval's,
    and a tag `ocr` without `metadata.text` takes the text in double quotes. The evaluation sets are called as the tags.
    """

    eval_name = "tagged"

    def read(self, path: Path) -> list[PromptSample]:
        """Reads all prompts of a JSONL file."""
        samples = []
        for where, record in read_records(path):
            tag, metadata = record.get("tag"), record.get("metadata", {})
            if not isinstance(tag, str) or not tag:
                raise ValueError(f"{where}: `tag` is {quoted(tag)}: name the reward that judges this prompt.")
            if not isinstance(metadata, dict):
                raise ValueError(f"{where}: `metadata` is {quoted(metadata)}: give an object, or leave it out.")
            if "include" in metadata:
                try:
                    validate_metadata(metadata)
                except ValueError as error:
                    raise ValueError(f"{where}: `metadata`: {error}") from None
            if tag == "ocr" and "text" not in metadata:
                texts = [text for text in target_text(record["prompt"], "double") if text.strip()]
                if not texts:
                    raise ValueError(f"{where}: no text in double quotes: quote it, or give `metadata.text`.")
                metadata = metadata | {"text": texts}
            samples.append(PromptSample(record["id"], record["prompt"], tag, metadata))
        return samples

    def eval_samples(self) -> dict[str, list[PromptSample]]:
        """Returns the prompts of `eval_file` by tag."""
        return _by_tag(self._samples["eval_file"])

    def test_samples(self) -> dict[str, list[PromptSample]]:
        """Returns the prompts of `test_file`, or of `eval_file` when there is none, by tag."""
        return _by_tag(self._samples["test_file"])


def _by_tag(samples: list[PromptSample]) -> dict[str, list[PromptSample]]:
    return {tag: [s for s in samples if s.tag == tag] for tag in sorted({sample.tag for sample in samples})}

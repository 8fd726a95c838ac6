"""Loader options are written once, in the base classes, and every data module takes them from the command line."""

from __future__ import annotations

import pytest
from jsonargparse import ArgumentParser

from datamodules.base import PromptDataModule
from datamodules.editing.benchmarks import GEditPrompts
from datamodules.editing.prompts import EditPrompts
from datamodules.geneval import GenEvalPrompts
from datamodules.ocr import OCRPrompts
from miniature.edits.prompts import ShapesEdits

FILES = ["--train_file=a.jsonl", "--eval_file=b.jsonl", "--limit=5"]


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        (GenEvalPrompts, FILES),
        (OCRPrompts, [*FILES, "--quotes=single"]),
        (EditPrompts, [*FILES, "--min_side=9"]),
        (GEditPrompts, ["--path=a.parquet", "--limit=5"]),
        (ShapesEdits, ["--train_prompts=7"]),
    ],
)
def test_options_reach_the_base_class(kind: type[PromptDataModule], own: list[str]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    assert "prompts per process in a validation or test step" in " ".join(parser.format_help().split())
    options = parser.parse_args([*own, "--eval_batch_size=3", "--num_workers=2"])
    data = kind(**options.as_dict())
    assert (data.eval_batch_size, data.num_workers) == (3, 2)
    assert getattr(data, "limit", 5) == 5

"""Base class of the data modules that read prompts from files."""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from datamodules.base import Chosen, LazySamples, PromptDataModule, PromptSample, contents, spread
from datamodules.editing.hub import locate
from datamodules.jsonl import read_records
from datamodules.local_path import local_path
from datamodules.public_sets import origin
from datamodules.repeats import distinct
from datamodules.splits import files_for

EVALUATED = ("eval_file", "test_file")
"""Settings of the files whose equal prompts are one."""


class PromptFiles(PromptDataModule):
    """Base class of the data modules that read a training, an evaluation and a test file; a subclass reads one file.

    Equal prompts (text, tag and metadata) of an evaluation or test file are one prompt, of which validation and test
    draw at least as many images. In training a prompt counts as often as it is listed, and `lightning predict` draws
    each line of `predict_file`.

    A file is a path, a folder (of which `train*`, `test*` and so on are taken, as in Flow-GRPO's `dataset/geneval`), or
    one on the hub: `hf://datasets/owner/name/train.jsonl`.

    Args:
        train_file: training prompts.
        eval_file: held-out prompts for validation.
        test_file: prompts for `lightning test`; `eval_file` when not given.
        limit: at most so many prompts of each file, spread evenly over it since files may be sorted. Of an evaluation
            or test file, distinct ones.
        predict_file: prompts for `lightning predict`, where they are a set named as the file; the test prompts when not
            given. `.txt` files with one prompt per line serve here too, unless prompts need an image.
        eval_name: name of the evaluation set in logs and results (such as `tmdb`); null is the class's own.
        val_limit: at most so many prompts of `eval_file` in the validations within a fit; `lightning test` takes all.
        **kwargs: as for `PromptDataModule`.
    """

    eval_name: str
    """Name of the evaluation set in logs and results, where `eval_name` is not given."""
    suffixes: tuple[str, ...] = (".jsonl",)
    """Suffixes of the files that `read` knows, for the error message."""

    def __init__(
        self,
        train_file: str,
        eval_file: str,
        test_file: str | None = None,
        limit: int | None = None,
        predict_file: str | None = None,
        eval_name: str | None = None,
        val_limit: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if eval_name is not None:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", eval_name):
                raise ValueError(f"data.eval_name is {eval_name!r}: use letters, digits, _ and -.")
            self.eval_name = eval_name
        for name, value in (("limit", limit), ("val_limit", val_limit)):
            if value is not None and value < 1:
                raise ValueError(f"data.{name} is {value}, use at least 1, or null for all prompts.")
        self.train_file = train_file
        self.eval_file = eval_file
        self.test_file = test_file
        self.predict_file = predict_file
        self.limit = limit
        self.val_limit = val_limit
        self._samples: dict[str, list[PromptSample]] = {}

    @abstractmethod
    def read(self, path: Path) -> list[PromptSample]:
        """Reads all samples of one file, in its order."""

    def setup(self, stage: str) -> None:
        """Reads the files that this stage needs."""
        drawn = "test_file" if self.predict_file is None else "predict_file"
        needed = {
            "fit": ("train_file", "eval_file"),
            "validate": ("eval_file",),
            "test": ("test_file",),
            "predict": (drawn,),
        }
        for key in needed[stage]:
            self._samples[key] = self._read(key)
        if stage == "fit":
            self._samples["eval_file"] = _at_most(self._samples["eval_file"], self.val_limit)

    def train_samples(self) -> list[PromptSample]:
        """Returns the prompts of `train_file`."""
        return self._samples["train_file"]

    def eval_samples(self) -> dict[str, list[PromptSample]]:
        """Returns the prompts of `eval_file`."""
        return {self.eval_name: self._samples["eval_file"]}

    def test_samples(self) -> dict[str, list[PromptSample]]:
        """Returns the prompts of `test_file`, or of `eval_file` when there is none."""
        return {self.eval_name: self._samples["test_file"]}

    def predict_samples(self) -> dict[str, list[PromptSample]]:
        """Returns the prompts of `predict_file`, or the test sets when there is none."""
        if self.predict_file is None:
            return self.test_samples()
        return {Path(self.predict_file).stem: self._samples["predict_file"]}

    def _read(self, key: str) -> list[PromptSample]:
        key = "eval_file" if key == "test_file" and self.test_file is None else key
        path = self._find(key)
        if key == "predict_file" and path.suffix == ".txt":
            samples = [PromptSample(r["id"], r["prompt"], "text", {}) for _, r in read_records(path, (".txt",))]
        else:
            samples = self.read(path)
        if key in EVALUATED:
            listed = distinct(contents(samples), f"data.{key}")
            if len(listed) < len(samples):
                samples = [replace(samples[row], repeats=number) for row, number in listed.items()]
        return _at_most(samples, self.limit)

    def _find(self, key: str) -> Path:
        """Returns the file that a setting names, of a folder the one whose name says that it is for this setting."""
        name = str(getattr(self, key))
        suffixes = tuple(dict.fromkeys((*self.suffixes, *((".txt",) if key == "predict_file" else ()))))
        kinds = " or ".join(suffixes)
        if name.startswith("hf://"):
            (path, *more) = locate(name, f"data.{key}")
            if more:
                raise ValueError(f"data.{key} is {name!r}, {len(more) + 1} files: name one of them, or their folder.")
        else:
            path = local_path(name, f"data.{key}")
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in suffixes)
            found = files_for(key, files)
            if len(found) != 1:
                has = ", ".join(file.name for file in found or files) or f"no {kinds} file"
                raise ValueError(f"data.{key} is the folder {name!r}, which holds {has}: name the file.")
            return found[0]
        if not path.is_file():
            advice = origin(path)
            raise ValueError(
                f"data.{key} is {name!r}, which is not a file: "
                f"{f'{advice}; or ' if advice else ''}give the path of a {kinds} file."
            )
        return path


def _at_most(samples: list[PromptSample], limit: int | None) -> list[PromptSample]:
    chosen = Chosen(samples, spread(len(samples), limit))
    # A list would hold every image of samples that read theirs when asked.
    return cast("list[PromptSample]", chosen) if isinstance(samples, LazySamples) else list(chosen)

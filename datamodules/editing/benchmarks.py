"""Data modules of GEdit-Bench and ImgEdit-Bench, editing prompts that are for evaluation only."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from datamodules.base import PromptDataModule, PromptSample, spread
from datamodules.editing.hub import locate
from datamodules.editing.prompts import EditSamples
from datamodules.editing.rows import Row, Table, distinct_rows, image_file, tables
from datamodules.jsonl import read_text
from datamodules.local_path import local_path
from datamodules.parsing import listed, parse_json, quoted

_GEDIT = ("key", "task_type", "instruction", "instruction_language", "Intersection_exist")
_GEDIT_IMAGES = ("input_image_raw", "input_image", "image", "source_image")


class EditBenchmarkPrompts(PromptDataModule):
    """Base class of editing benchmarks, which have no training prompts.

    Args:
        limit: at most so many prompts of each set, spread evenly over it since files may be sorted.
        **kwargs: as for `PromptDataModule`, without `batch_size` and `seed`, which concern training.
    """

    def __init__(self, limit: int | None = None, **kwargs: Any) -> None:
        super().__init__(batch_size=1, seed=0, **kwargs)
        if limit is not None and limit < 1:
            raise ValueError(f"data.limit is {limit}, use at least 1, or null for all prompts.")
        self.limit = limit
        self._sets: dict[str, EditSamples] = {}

    @abstractmethod
    def read(self) -> dict[str, list[Row]]:
        """Reads the rows of each evaluation set."""

    def setup(self, stage: str) -> None:
        """Reads the rows of all sets; their images are read later."""
        if stage == "fit":
            self.train_samples()
        self._sets = {
            name: EditSamples([rows[i] for i in spread(len(rows), self.limit)])
            for name, read in self.read().items()
            for rows in [distinct_rows(read, f"the set {name}")]
        }

    def train_samples(self) -> list[PromptSample]:
        """Raises ValueError, because a benchmark has no training prompts."""
        raise ValueError(
            f"{type(self).__name__} has no prompts to train on: use it with `lightning test`, validate or predict."
        )

    def eval_samples(self) -> dict[str, list[PromptSample]]:
        """Returns the prompts of all evaluation sets, by name."""
        # The loaders only count, slice and index; a list would hold every image.
        return cast("dict[str, list[PromptSample]]", dict(self._sets))


class GEditPrompts(EditBenchmarkPrompts):
    """GEdit-Bench (arXiv 2504.17761): 606 edits, each in English and in Chinese; sets `gedit_en` and `gedit_cn`.

    The tag is the row's `task_type` (11 groups). Metadata are its other columns, among them `Intersection_exist`: the
    published "intersection" numbers are over the rows where it is true.

    Args:
        path: `.parquet`, `.arrow` or `.jsonl` file, a folder with one or more files of one kind, or one of these on the
            hub (see `EditPrompts`). Columns: `key`, `task_type`, `instruction`, `instruction_language`,
            `Intersection_exist`, and the image; in JSONL the image is a path relative to the file.
        image_column: name of the image's column; null is the first there is of `input_image_raw` (whose images the
            published scores are about), `input_image`, `image` and `source_image`.
        languages: languages to evaluate (`en`, `cn`); null is all that are there.
        **kwargs: as for `EditBenchmarkPrompts`.
    """

    def __init__(
        self,
        path: str,
        image_column: str | None = None,
        languages: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path = path
        self.image_column = image_column
        self.languages = languages

    def read(self) -> dict[str, list[Row]]:
        """Reads the rows of each language."""
        sets: dict[str, list[Row]] = {}
        places: dict[tuple[str, str], str] = {}
        for table in tables(locate(self.path, "data.path")):
            column = self._image_column(table)
            for number, (where, record) in enumerate(table.records):
                sample = _gedit_sample(where, record)
                with _at(where):
                    source = table.source(number, record, column)
                language = sample.metadata["instruction_language"]
                if places.setdefault((language, sample.id), where) != where:
                    first = places[language, sample.id]
                    raise ValueError(f"{where}: {sample.id} is {first} in this language, too: drop one of them.")
                sets.setdefault(language, []).append((where, sample, source))
        wanted = list(sets) if self.languages is None else self.languages
        for language in wanted:
            if language not in sets:
                raise ValueError(f"data.languages has {language!r}, {self.path} has {', '.join(sets) or 'no rows'}.")
        return {f"gedit_{language}": sets[language] for language in wanted}

    def _image_column(self, table: Table) -> str:
        """Returns the name of the image's column; raises ValueError if that or one of GEdit-Bench's is missing."""
        has = listed(table.columns)
        if missing := [name for name in _GEDIT if name not in table.columns]:
            raise ValueError(f"{table.path}: no column {missing[0]}, only {has}: GEdit-Bench's rows are needed.")
        known = _GEDIT_IMAGES if self.image_column is None else (self.image_column,)
        if found := [name for name in known if name in table.columns]:
            return found[0]
        raise ValueError(
            f"{table.path}: no {' or '.join(known)} among {has}: name the image's column in data.image_column."
        )


class ImgEditPrompts(EditBenchmarkPrompts):
    """ImgEdit-Bench's single edits (arXiv 2505.20275); the evaluation set is called `imgedit`.

    The tag, and `edit_type` in the metadata, is the kind of edit (nine of them).

    Args:
        file: `basic_edit.json`: `{key: {"id": image, "prompt": instruction, "edit_type": kind}}`.
        images: folder that the images' paths are relative to.
        **kwargs: as for `EditBenchmarkPrompts`.
    """

    def __init__(self, file: str, images: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.file = file
        self.images = images

    def read(self) -> dict[str, list[Row]]:
        """Reads the rows of the one set, `imgedit`."""
        path = local_path(self.file, "data.file")
        if not path.is_file():
            raise ValueError(f"data.file is {self.file!r}, which is not a file: give ImgEdit's basic_edit.json.")
        entries = parse_json(read_text(path, "data.file"), str(path))
        if not isinstance(entries, dict) or not entries:
            raise ValueError(f'{path}: not an object of entries: write {{"1": {{"id", "prompt", "edit_type"}}, ...}}.')
        rows: list[Row] = []
        for key, entry in entries.items():
            where = f"{path}, entry {quoted(key)}"
            if not isinstance(entry, dict):
                raise ValueError(
                    f"{where}: {quoted(entry)} in place of an object: give `id`, `prompt` and `edit_type`."
                )
            name, prompt, kind = (_text(where, entry, column) for column in ("id", "prompt", "edit_type"))
            sample = PromptSample(key, prompt, kind, {"edit_type": kind})
            with _at(where):
                rows.append((where, sample, image_file(local_path(self.images, "data.images"), name)))
        return {"imgedit": rows}


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Context manager that puts the place of a row in front of the ValueErrors raised in it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _text(where: str, record: Mapping[str, Any], column: str) -> str:
    value = record.get(column)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: `{column}` is {quoted(value)}: give a text.")
    return value


def _gedit_sample(where: str, record: Mapping[str, Any]) -> PromptSample:
    """Makes a sample of a row; keys are unique within a task and a language."""
    key, task, instruction, language = (_text(where, record, column) for column in _GEDIT[:4])
    if not re.fullmatch(r"[A-Za-z_-]+", language):
        raise ValueError(f"{where}: `instruction_language` is {quoted(language)}: give a short name such as en or cn.")
    shared = record.get("Intersection_exist")
    if not isinstance(shared, bool):
        raise ValueError(f"{where}: `Intersection_exist` is {quoted(shared)}: give true or false.")
    metadata = {"key": key, "task_type": task, "instruction_language": language, "Intersection_exist": shared}
    return PromptSample(f"{task}-{key}", instruction, task, metadata)

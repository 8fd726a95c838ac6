"""GEdit-Bench and ImgEdit-Bench: editing prompts that are for evaluation only, read from local files."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from datamodules.base import PromptDataModule, PromptSample, spread
from datamodules.editing.arrow import ArrowRows, Image
from datamodules.editing.hub import DATA_SUFFIXES
from datamodules.editing.prompts import EditSamples
from datamodules.editing.rows import Row, files_by_kind
from datamodules.jsonl import json_lines

_GEDIT = ("key", "task_type", "instruction", "instruction_language", "Intersection_exist")
_GEDIT_IMAGES = ("input_image_raw", "input_image", "image", "source_image")


class EditBenchmarkPrompts(PromptDataModule):
    """Base of the data modules that have nothing to train on.

    Args:
        limit: at most so many prompts of each set, spread evenly over it since files may be sorted.
        **kwargs: as for `PromptDataModule`, but for `batch_size` and `seed`, which are of training.
    """

    def __init__(self, limit: int | None = None, **kwargs: Any) -> None:
        super().__init__(batch_size=1, seed=0, **kwargs)
        if limit is not None and limit < 1:
            raise ValueError(f"data.limit is {limit}, use at least 1, or null for all prompts.")
        self.limit = limit
        self._sets: dict[str, EditSamples] = {}

    @abstractmethod
    def read(self) -> dict[str, list[Row]]:
        """Rows of each evaluation set."""

    def setup(self, stage: str) -> None:
        """Reads the rows; their images are read later."""
        if stage == "fit":
            self.train_samples()
        self._sets = {
            name: EditSamples([rows[i] for i in spread(len(rows), self.limit)]) for name, rows in self.read().items()
        }

    def train_samples(self) -> list[PromptSample]:
        """There are none."""
        raise ValueError(
            f"{type(self).__name__} has no prompts to train on: use it with `lightning test`, validate or predict."
        )

    def eval_samples(self) -> dict[str, list[PromptSample]]:
        """All sets."""
        # The loaders only count, slice and index; a list would hold every image.
        return cast("dict[str, list[PromptSample]]", dict(self._sets))


class GEditPrompts(EditBenchmarkPrompts):
    """GEdit-Bench (arXiv 2504.17761): 606 edits, each in English and in Chinese; sets `gedit_en` and `gedit_cn`.

    The tag is the row's `task_type` (11 groups). Metadata are its other columns, among them `Intersection_exist`: the
    published "intersection" numbers are over the rows where it is true.

    Args:
        path: `.parquet`, `.arrow` or `.jsonl` file, or a folder with one or more files of one kind. Columns: `key`,
            `task_type`, `instruction`, `instruction_language`, `Intersection_exist`, and the image; in JSON lines the
            image is a path relative to the file.
        image_column: name of the image's column; null is the first there is of `input_image_raw` (what the published
            scores are about), `input_image`, `image` and `source_image`.
        languages: which to evaluate; null is all that are there.
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
        """Rows of each language."""
        sets: dict[str, list[Row]] = {}
        places: dict[tuple[str, str], str] = {}
        for file in _files(self.path):
            records = _json_rows(file) if file.suffix == ".jsonl" else _arrow_rows(file, self.image_column)
            for where, record, given in records:
                sample = _gedit_sample(where, record)
                source = given or _image_file(where, file.parent, record, self.image_column)
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
        """Rows of the one set."""
        path = Path(self.file)
        if not path.is_file():
            raise ValueError(f"data.file is {self.file!r}, which is not a file: give ImgEdit's basic_edit.json.")
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON ({error}): fetch it anew.") from None
        if not isinstance(entries, dict) or not entries:
            raise ValueError(f'{path}: not an object of entries: write {{"1": {{"id", "prompt", "edit_type"}}, ...}}.')
        rows: list[Row] = []
        for key, entry in entries.items():
            where = f"{path}, entry {key!r}"
            if not isinstance(entry, dict):
                raise ValueError(f"{where}: {entry!r} in place of an object: give `id`, `prompt` and `edit_type`.")
            name, prompt, kind = (_text(where, entry, column) for column in ("id", "prompt", "edit_type"))
            sample = PromptSample(key, prompt, kind, {"edit_type": kind})
            rows.append((where, sample, _existing(where, Path(self.images), name)))
        return {"imgedit": rows}


def _files(path: str) -> list[Path]:
    """The file, or all files of one kind in the folder, by name."""
    given = Path(path)
    if given.is_file() and given.suffix in DATA_SUFFIXES:
        return [given]
    found = files_by_kind(given) if given.is_dir() else {}
    if len(found) != 1:
        has = f"holds {' and '.join(found)} files" if found else f"is no {', '.join(DATA_SUFFIXES)} file and holds none"
        raise ValueError(f"data.path is {path!r}, which {has}: give a file, or a folder with files of one kind.")
    return next(iter(found.values()))


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any], None]]:
    """Place, columns, and no image yet."""
    return ((where, record, None) for where, record in json_lines(path))


def _arrow_rows(path: Path, image_column: str | None) -> Iterator[tuple[str, dict[str, Any], Image]]:
    """Place, columns without the image, and what reads the image."""
    rows = ArrowRows(path)
    columns = rows.columns
    missing = [name for name in _GEDIT if name not in columns]
    if missing:
        raise ValueError(f"{path}: no column {missing[0]}, only {', '.join(columns)}: GEdit-Bench's rows are needed.")
    column = _image_column(str(path), columns, image_column)
    for number, record in enumerate(rows.read(_GEDIT)):
        yield f"{path}, row {number}", record, Image(rows, number, column)


def _image_column(where: str, columns: Sequence[str], asked: str | None) -> str:
    for name in _GEDIT_IMAGES if asked is None else (asked,):
        if name in columns:
            return name
    known = " or ".join(_GEDIT_IMAGES) if asked is None else asked
    raise ValueError(f"{where}: no {known} among {', '.join(columns)}: name the image's column in data.image_column.")


def _image_file(where: str, folder: Path, record: dict[str, Any], image_column: str | None) -> Path:
    return _existing(where, folder, _text(where, record, _image_column(where, list(record), image_column)))


def _existing(where: str, folder: Path, name: str) -> Path:
    file = folder / name
    if not file.is_file():
        raise ValueError(f"{where}: there is no image {file}: paths are relative to {folder}.")
    return file


def _text(where: str, record: dict[str, Any], column: str) -> str:
    value = record.get(column)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: `{column}` is {value!r}: give a text.")
    return value


def _gedit_sample(where: str, record: dict[str, Any]) -> PromptSample:
    """The row as a sample; keys are unique within a task and a language."""
    key, task, instruction, language = (_text(where, record, column) for column in _GEDIT[:4])
    if not re.fullmatch(r"[A-Za-z_-]+", language):
        raise ValueError(f"{where}: `instruction_language` is {language!r}: give a short name such as en or cn.")
    shared = record.get("Intersection_exist")
    if not isinstance(shared, bool):
        raise ValueError(f"{where}: `Intersection_exist` is {shared!r}: give true or false.")
    metadata = {"key": key, "task_type": task, "instruction_language": language, "Intersection_exist": shared}
    return PromptSample(f"{task}-{key}", instruction, task, metadata)

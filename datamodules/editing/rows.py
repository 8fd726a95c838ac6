"""Reads rows of editing data from Parquet, Arrow, JSONL and folders of images, and finds out which column is which."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from datamodules.editing.arrow import SUFFIXES, ArrowRows, Image
from datamodules.editing.hub import DATA_SUFFIXES
from datamodules.editing.images import Source
from datamodules.jsonl import id_of, json_lines, read_text
from datamodules.parsing import listed, quoted
from datamodules.repeats import distinct
from datamodules.sample import PromptSample

Row = tuple[str, PromptSample, Source]
"""Place (`file:line`), sample without its image, and the image's path or a callable that reads its bytes."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
COLUMNS = ("image", "prompt", "category", "id")
"""Roles that a column can have."""

# Names in the order of preference. `image` counts before all others; of two other names for images neither does. The
# lists of images of Flow-Factory and UniRL count where there is no such column.
_IMAGES = ("src_img", "source_img", "source_image", "input_image", "original_image", "input_image_raw", "file_name")
_LISTS = ("images", "media")
_KNOWN = {
    "prompt": ("prompt", "instruction", "edit_instruction", "edit_prompt", "edited_prompt_list", "text", "caption"),
    "category": ("category", "task", "task_type", "edit_type"),
    "id": ("id", "omni_edit_id", "index"),
}
TASKS = {
    "obj_swap": "swap",
    "style": "style",
    "obj_add": "addition",
    "attr_mod": "attribute_modification",
    "env": "env",
    "obj_remove": "removal",
}
"""Short name in OmniEdit's ids (`task_obj_swap_rand_mask_401099`) -> name of the category in the editing table."""


@dataclass
class BadRows:
    """Treatment of rows that cannot be used.

    Args:
        how: `stop` raises at the first of them, `skip` lists them.
    """

    how: Literal["stop", "skip"]
    found: list[str] = field(default_factory=list)
    """The problem of each such row, in the files' order."""

    def add(self, problem: str) -> None:
        """Lists the problem of a row, or raises it as a ValueError if `how` is `stop`."""
        if self.how == "stop":
            raise ValueError(problem)
        self.found.append(problem)


def read_rows(
    places: Sequence[Path], bad: BadRows, columns: Mapping[str, str] | None = None, prompt_index: int = -1
) -> list[Row]:
    """Reads the rows of some files, or of one folder, without looking into their images.

    Args:
        places: Parquet, Arrow or JSONL files, or a folder that holds some of one kind, or images with captions.
        bad: gets the rows without an instruction or an image.
        columns: names of the columns that hold `image`, `prompt`, `category` and `id`; those not given are looked for.
        prompt_index: index of the entry to take where the instruction is a list.

    Raises:
        ValueError: if a file cannot be read, an id occurs twice or the columns are unclear.
    """
    rows: list[Row] = []
    lines: dict[str, str] = {}
    total = 0
    for table in tables(places):
        found = find_columns(table, columns or {})
        for number, (where, record) in enumerate(table.records):
            # A row that is left out keeps its number, so the others' ids stay what they are.
            name = id_of(record.get(found.get("id", "")), total, where)
            total += 1
            if name in lines:
                raise ValueError(f"{where}: the id {quoted(name)} was used in {lines[name]}: make ids unique.")
            lines[name] = where
            try:
                source = table.source(number, record, found["image"])
                prompt = _prompt(record, found["prompt"], prompt_index)
            except ValueError as error:
                bad.add(f"{where}: {error}")
                continue
            own = (found["image"], found["prompt"], found.get("id", "id"))
            metadata = {key: value for key, value in record.items() if key not in own}
            tag = category_of(record.get(found.get("category", "")), name)
            rows.append((where, PromptSample(name, prompt, tag, metadata), source))
    return rows


def distinct_rows(rows: Sequence[Row], setting: str) -> list[Row]:
    """Makes one row of those with equal instruction, category and image; its sample counts them in `repeats`.

    Args:
        rows: rows of an evaluation set.
        setting: name of the setting that names their file.
    """
    asked = Counter((sample.prompt, sample.tag) for _, sample, _ in rows)
    keys = [
        (sample.prompt, sample.tag, _image_key(source) if asked[sample.prompt, sample.tag] > 1 else b"")
        for _, sample, source in rows
    ]
    return [
        (rows[row][0], replace(rows[row][1], repeats=number), rows[row][2])
        for row, number in distinct(keys, setting).items()
    ]


def _image_key(source: Source) -> object:
    """Returns a digest of an image's file; the source itself, equal to no other, if it cannot be read."""
    try:
        return hashlib.sha256(source.read_bytes() if isinstance(source, Path) else source()).digest()
    except (OSError, ValueError):
        return source


def category_of(given: Any, name: str) -> str:
    """Returns the tag of a row: its category, else the one that its id begins with, else `edit`.

    Args:
        given: the row's category, if it has one; OmniEdit's short names become the full ones.
        name: the row's id.

    >>> category_of("obj_add", "7"), category_of(None, "task_env_weather_63722"), category_of("recolour", "7")
    ('addition', 'env', 'recolour')
    """
    short = "|".join(TASKS)
    if given is not None and str(given).strip():
        match = re.fullmatch(rf"(?:task_)?({short})", str(given)) or re.match(rf"task_({short})(?:_|$)", str(given))
        return TASKS[match[1]] if match else str(given)
    match = re.match(rf"task_({short})(?:_|$)", name) or re.match(r"(style)(?:_|$)", name)
    return TASKS[match[1]] if match else "edit"


def _prompt(record: Mapping[str, Any], column: str, index: int) -> str:
    value = record.get(column)
    if isinstance(value, list) and value:
        if not -len(value) <= index < len(value):
            raise ValueError(f"`{column}` has {len(value)} entries, none at {index}: change prompt_index.")
        value = value[index]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{column}` is {quoted(value)}: give the text of the prompt.")
    return value


@dataclass(frozen=True)
class Table:
    """The rows of one file, or of a folder of images; images inside the file are left unread.

    Args:
        path: the file, or the folder that the images' paths are relative to.
        columns: names of all columns.
        records: place (`file:line`) and values of each row.
        images: names of the columns that hold images or paths of images.
        stored: row and column -> reader of an image that lies in the file itself.
    """

    path: Path
    columns: Sequence[str]
    records: Sequence[tuple[str, Mapping[str, Any]]]
    images: Sequence[str]
    stored: Callable[[int, str], Image] | None = None

    def source(self, number: int, record: Mapping[str, Any], column: str) -> Source:
        """Returns the path of a row's image, or a callable that reads it.

        Args:
            number: index of the row.
            record: values of the row.
            column: name of the image's column.

        Raises:
            ValueError: if the row names no image, or one that is not there; the message lacks the row's place.
        """
        if self.stored is not None and column not in record:
            return self.stored(number, column)
        value = record.get(column)
        if isinstance(value, list):
            if len(value) != 1:
                raise ValueError(f"`{column}` has {len(value)} entries: give the one source image.")
            value = value[0]
        name = value.get("uri") if isinstance(value, dict) else value
        if not isinstance(name, str) or not name:
            raise ValueError(f"`{column}` is {quoted(record.get(column))}: give the path of the source image.")
        return image_file(self.path if self.path.is_dir() else self.path.parent, name)


def image_file(folder: Path, name: str) -> Path:
    """Returns the path of an image in a folder or its `images/`; raises ValueError if it is in neither."""
    for path in (folder / name, folder / "images" / name):
        if path.is_file():
            return path
    raise ValueError(f"there is no image {folder / name}: paths are relative to {folder}, or to images/ in it.")


def find_columns(table: Table, given: Mapping[str, str]) -> dict[str, str]:
    """Finds the columns of a table by their names.

    Args:
        table: rows with their columns.
        given: role (one of `COLUMNS`) -> name of its column, where the user says it.

    Returns:
        Role -> name of its column: `image` and `prompt`, and `category` and `id` where there are such columns.

    Raises:
        ValueError: with a list of the columns, if one is missing or it is unclear which one holds the source image.
    """
    has = listed(table.columns)
    for role, name in given.items():
        if name not in table.columns:
            raise ValueError(f"{table.path}: data.columns.{role} is {name!r}, and the columns are {has}.")
    found = dict(given)
    if "image" not in found:
        named = ["image"] if "image" in table.columns else [name for name in _IMAGES if name in table.columns]
        likely = named or list(table.images) or [name for name in _LISTS if name in table.columns]
        if len(likely) != 1:
            which = f"any of {listed(likely)}" if likely else "no column"
            raise ValueError(
                f"{table.path}: {which} may hold the source images, the columns are {has}: name it in "
                "data.columns.image."
            )
        found["image"] = likely[0]
    for role, names in _KNOWN.items():
        if role not in found and (present := [name for name in names if name in table.columns]):
            found[role] = present[0]
    if "prompt" not in found:
        raise ValueError(
            f"{table.path}: no column is called {' or '.join(_KNOWN['prompt'])}, the columns are {has}: name the "
            "instruction's in data.columns.prompt."
        )
    return found


def tables(places: Sequence[Path]) -> Iterator[Table]:
    """Opens Parquet, Arrow and JSONL files, a folder that holds files of one of these kinds, or images with captions.

    Raises:
        ValueError: naming the file and, for JSONL, the line that cannot be read.
    """
    for place in places:
        if place.is_dir():
            kinds = _files_by_kind(place)
            if len(kinds) > 1:
                raise ValueError(
                    f"{place} holds {' and '.join(kinds)} files: give a file, or a folder with files of one kind."
                )
            yield from tables(next(iter(kinds.values()))) if kinds else [_captions(place)]
        elif place.suffix in SUFFIXES:
            yield _arrow(place)
        elif place.suffix == ".jsonl":
            records = list(json_lines(place))
            columns = list(dict.fromkeys(key for _, record in records for key in record))
            yield Table(place, columns, records, _paths(columns, records))
        else:
            raise ValueError(
                f"{place}: the name ends in {place.suffix!r}: give {' or '.join(DATA_SUFFIXES)}, or a folder."
            )


def _files_by_kind(folder: Path) -> dict[str, list[Path]]:
    """Suffix -> the folder's files of that kind, sorted by name; kinds that are not there are left out."""
    found = {suffix: sorted(folder.glob(f"*{suffix}")) for suffix in DATA_SUFFIXES}
    return {suffix: files for suffix, files in found.items() if files}


def _arrow(path: Path) -> Table:
    """Opens a Parquet or Arrow file; columns that hold neither images nor values that fit into JSON are not read."""
    rows = ArrowRows(path)
    kinds = rows.kinds
    values = rows.read([name for name, kind in kinds.items() if kind == "value"])
    records = [
        (f"{path}, row {number}", {name: _finite(value) for name, value in record.items()})
        for number, record in enumerate(values)
    ]
    if not records:
        raise ValueError(f"{path}: the file holds no rows: fetch it anew.")
    images = [name for name, kind in kinds.items() if kind == "image"]
    return Table(
        path, list(kinds), records, images + _paths(kinds, records), lambda row, column: Image(rows, row, column)
    )


def _captions(folder: Path) -> Table:
    """Lists the images of a folder, each with a `.txt` file of its name as prompt; a subfolder is the category."""
    records = []
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            name, caption = file.relative_to(folder), file.with_suffix(".txt")
            text = read_text(caption, "the caption").strip() if caption.is_file() else None
            record = {"id": name.with_suffix("").as_posix(), "image": name.as_posix(), "prompt": text}
            if len(name.parts) > 1:
                record["category"] = name.parts[0]
            records.append((str(file if text is None else caption), record))
    if not records:
        raise ValueError(
            f"{folder} holds neither {' nor '.join(DATA_SUFFIXES)} files nor images with .txt files beside them."
        )
    return Table(folder, ["id", "image", "prompt", "category"], records, ["image"])


def _paths(columns: Iterable[str], records: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Returns the columns whose first value is the file name of an image."""
    firsts = {name: next((r[name] for _, r in records if r.get(name) is not None), None) for name in columns}
    return [name for name, v in firsts.items() if isinstance(v, str) and Path(v).suffix.lower() in IMAGE_SUFFIXES]


def _finite(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

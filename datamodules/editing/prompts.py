"""Data module of editing instructions with their source images, from files, folders or the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.progress import Progress

from datamodules.base import LazySamples, PromptSample, spread
from datamodules.editing.hub import RepoType, locate
from datamodules.editing.images import ImageRules, check_image, read_image
from datamodules.editing.rows import COLUMNS, BadRows, Row, distinct_rows, read_rows
from datamodules.prompt_files import EVALUATED, PromptFiles
from datamodules.splits import files_for

_LONG = 1000
"""Rows whose check is worth a progress bar."""

OnBadRow = Literal["stop", "skip"]
CheckImages = Literal["header", "full", "none"]


class EditSamples(LazySamples):
    """Editing prompts whose source images are read, from their files, when they are asked for.

    Args:
        rows: place (`file:line`), sample without its image, and the image's path or a callable that reads its bytes.
        rules: bounds on the images' size.
    """

    def __init__(self, rows: Sequence[Row], rules: ImageRules | None = None) -> None:
        self.rows = rows
        self.rules = rules or ImageRules()

    def __len__(self) -> int:
        return len(self.rows)

    def without_images(self) -> list[PromptSample]:
        """Returns the samples without their images."""
        return [sample for _, sample, _ in self.rows]

    def some(self, index: slice) -> EditSamples:
        """Returns some of the samples; their images stay unread."""
        return EditSamples(self.rows[index], self.rules)

    def at(self, index: int) -> PromptSample:
        """Reads the image of a sample (RGB, upright); raises ValueError with the row's place if that fails."""
        where, sample, source = self.rows[index]
        try:
            image = read_image(source, self.rules)
        except ValueError as error:
            raise ValueError(_complaint(self.rows[index], error)) from None
        return replace(sample, image=image)

    def checked(self, bad: BadRows, *, full: bool) -> EditSamples:
        """Returns the samples whose images can be used.

        Args:
            bad: gets the rows of the others.
            full: unpack each image; otherwise its header alone is read, which does not see what is cut off.
        """
        good = []
        quiet = len(self) < _LONG or getattr(rank_zero_only, "rank", 0) != 0
        with Progress(transient=True, disable=quiet) as progress:
            for row in progress.track(self.rows, description="Checking the source images"):
                try:
                    (read_image if full else check_image)(row[2], self.rules)
                except ValueError as error:
                    bad.add(_complaint(row, error))
                else:
                    good.append(row)
        return EditSamples(good, self.rules)


class EditPrompts(PromptFiles):
    """Editing instructions and their source images; the evaluation set is called `edit`.

    Each of the files may be one of these:

    - `.parquet` or `.arrow`, whose images are binary, `datasets`' `{"bytes", "path"}`, or paths;
    - `.jsonl`, a line being `{"prompt": instruction, "image": path, "category"?: ..., "id"?: ...}`;
    - a folder with files of one of these kinds (so a `metadata.jsonl` beside its images), or with images and a `.txt`
      file of the same name beside each, where a subfolder is the category;
    - a pattern such as `data/train-*.parquet`;
    - the same on the hub: `hf://datasets/owner/name/data/train-*.parquet`, `hf://owner/name/file.parquet` in a
      repository for models, or `owner/name` if that has one such file. Loading scripts are never run.

    `.arrow` suits training, whose order is random: the file is mapped into memory (0.2 ms an image), while Parquet has
    to unpack a row group for each image (76 ms where groups have 15 MB).

    Of a folder with `train.jsonl` and `test.jsonl` each setting takes its own (see `PromptFiles`). Paths of images are
    relative to the file that names them, or to the folder `images/` beside it, as in Flow-Factory's sets; a list of one
    path, or UniRL's `media: [{"uri": path}]`, does as well. Columns are found by name (OmniEdit's `src_img`,
    `edited_prompt_list`, `task` and `omni_edit_id` among others) unless `columns` says which. The category becomes the
    tag, `task_obj_swap` and its like under the names of the editing table (swap, style, addition,
    attribute_modification, env, removal); without one the id's beginning says it, else it is `edit`. Everything else
    that fits into JSON becomes metadata.

    Images become RGB, upright, transparent parts white, 16 bits scaled to 8; none are resized here: `source_size` of
    the flow model crops them, and each family then resizes by its pipeline's own rule. Rows that cannot be used have no
    instruction, or an image that is missing, unreadable, animated, of 32-bit numbers, smaller than `min_side` or larger
    than `max_pixels`.

    Args:
        *args: as for `PromptFiles`.
        columns: names of the columns that hold `image`, `prompt`, `category` and `id`; those left out are looked for.
        prompt_index: index of the entry to take where the instruction is a list, from the end if negative; the paper's
            released preparation takes the last.
        repo_type: kind of repository, for names on the hub that do not say it.
        on_bad_row: `stop` at the first row that cannot be used, or `skip` such rows with one warning that counts them.
        check_images: when files are read, look at each image's `header` (what is cut off is then found when its turn
            comes, and stops the run), unpack each (`full`), or look at no image before its turn (`none`).
        min_side: smallest width and height of an image, in pixels.
        max_pixels: largest number of pixels of an image.
        **kwargs: as for `PromptFiles`.
    """

    eval_name = "edit"
    suffixes = (".parquet", ".arrow", ".jsonl")

    def __init__(
        self,
        *args: Any,
        columns: dict[str, str] | None = None,
        prompt_index: int = -1,
        repo_type: RepoType | None = None,
        on_bad_row: OnBadRow = "stop",
        check_images: CheckImages = "header",
        min_side: int = 8,
        max_pixels: int = 2**26,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        for role in columns or {}:
            if role not in COLUMNS:
                raise ValueError(f"data.columns names {role!r}: its keys are {', '.join(COLUMNS)}.")
        for name, value, choices in (
            ("repo_type", repo_type or "model", get_args(RepoType)),
            ("on_bad_row", on_bad_row, get_args(OnBadRow)),
            ("check_images", check_images, get_args(CheckImages)),
        ):
            if value not in choices:
                raise ValueError(f"data.{name} is {value!r}, use one of {', '.join(choices)}.")
        if min_side < 1 or max_pixels < min_side**2:
            raise ValueError(f"data.min_side is {min_side} and data.max_pixels {max_pixels}: no image could have both.")
        self.columns = columns
        self.prompt_index = prompt_index
        self.repo_type: RepoType | None = repo_type
        self.on_bad_row: OnBadRow = on_bad_row
        self.check_images: CheckImages = check_images
        self.rules = ImageRules(min_side, max_pixels)

    def read(self, path: Path) -> list[PromptSample]:
        """Reads all rows of a file or a folder and checks their images, which are read later."""
        return self._samples_of([path], str(path), None, None)

    def predict_samples(self) -> dict[str, list[PromptSample]]:
        """Returns the prompts of `predict_file`, or the test sets when there is none.

        In the set's name, the signs of a pattern (`*`, `?`, `[`) become `_`.
        """
        return {re.sub(r"[^\w.-]+", "_", name): samples for name, samples in super().predict_samples().items()}

    def _read(self, key: str) -> list[PromptSample]:
        key = "eval_file" if key == "test_file" and self.test_file is None else key
        name: str = getattr(self, key)
        evaluated = f"data.{key}" if key in EVALUATED else None
        places = locate(name, f"data.{key}", self.repo_type)
        if len(places) == 1 and places[0].is_dir():
            places = files_for(key, sorted(places[0].glob("*.jsonl"))) or places
        return self._samples_of(places, name, self.limit, evaluated)

    def _samples_of(
        self, places: Sequence[Path], name: str, limit: int | None, evaluated: str | None
    ) -> list[PromptSample]:
        bad = BadRows(self.on_bad_row)
        rows = read_rows(places, bad, self.columns, self.prompt_index)
        if evaluated is not None:
            rows = distinct_rows(rows, evaluated)
        samples = EditSamples([rows[number] for number in spread(len(rows), limit)], self.rules)
        if self.check_images != "none":
            samples = samples.checked(bad, full=self.check_images == "full")
        if bad.found:
            total = len(bad.found) + len(samples)
            what = f"{name}: {len(bad.found)} of {total} rows are left out (data.on_bad_row is skip)"
            if not len(samples):
                raise ValueError(f"{what}, and none is left; the first: {bad.found[0]}")
            rank_zero_warn(f"{what}, {len(samples)} are left; the first: {bad.found[0]}")
        # The loaders only count, slice and index; a list would hold every image.
        return cast("list[PromptSample]", samples)


def _complaint(row: Row, error: ValueError) -> str:
    where, _, source = row
    return f"{where}: the image {source} {error}: replace it or drop the row."

"""`Gallery`: images of a run's evaluations and one group of its rollouts, kept in its folder for the page."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from datamodules.atomic_write import replaced_file, write_atomically
from datamodules.jsonl import read_json
from lightning_modules.image_store import safe_name

FOLDER = "report"
_LARGEST = 512
"""Side in pixels above which a kept image is shrunk."""
_SMALL = 128 * 128
"""Pixels up to which an image is kept without loss."""
_MOST = 16
"""Evaluations that are kept; of more, every second one goes."""


@dataclass(frozen=True)
class Rating:
    """What a benchmark said of an image.

    Attributes:
        name: the score's name.
        value: mean over the prompt's images; None if none could be scored.
        right: True or False where the score is a verdict and all of the prompt's images agree.
    """

    name: str
    value: float | None
    right: bool | None = None


@dataclass(frozen=True)
class Sample:
    """An image of an evaluation prompt; prompts and noise are the same in every evaluation.

    Attributes:
        step: number of updates made.
        rollouts: images drawn for training so far.
        name: name of the set.
        mode: `without_pe` or `with_pe`.
        id: the prompt's id.
        prompt: the prompt as the user wrote it.
        drawn: the text that was drawn, a rewrite for `with_pe`.
        file: the image, from the run's folder.
        source: the image to edit, or None.
        ratings: what the benchmarks said.
    """

    step: int
    rollouts: int
    name: str
    mode: str
    id: str
    prompt: str
    drawn: str
    file: str
    source: str | None = None
    ratings: tuple[Rating, ...] = ()


@dataclass(frozen=True)
class Slot:
    """One image of a group.

    Attributes:
        file: the image, from the run's folder.
        drawn: the text that was drawn.
        retained: True if that is the original prompt.
        reward: total reward; None if the image could not be scored.
        task: the scorer's part of it.
        advantage: what the flow model learnt from.
        right: True or False where the score is a verdict.
    """

    file: str
    drawn: str
    retained: bool
    reward: float | None
    task: float | None
    advantage: float
    right: bool | None = None


@dataclass(frozen=True)
class Group:
    """A group of the latest rollout.

    Attributes:
        step: number of updates made.
        rollouts: images drawn for training so far.
        prompt: the prompt that its images are judged against.
        source: the image to edit, or None.
        slots: its images, retained prompts first.
    """

    step: int
    rollouts: int
    prompt: str
    source: str | None
    slots: tuple[Slot, ...]


@dataclass
class Gallery:
    """Images in `<folder>/report/`, and what is known of them in `gallery.json` there.

    Args:
        folder: the run's folder.
        samples: images of evaluations, in order.
        group: the latest group.
    """

    folder: Path
    samples: list[Sample] = field(default_factory=list)
    group: Group | None = None

    @classmethod
    def read(cls, folder: Path) -> Gallery:
        """Reads what a run has left; nothing where it has left none.

        Raises:
            ValueError: if the file is damaged.
        """
        path = folder / FOLDER / "gallery.json"
        if not path.is_file():
            return cls(folder)
        try:
            found = read_json(path)
            samples = [
                Sample(**line | {"ratings": tuple(Rating(**one) for one in line["ratings"])})
                for line in found["samples"]
            ]
            group = found["group"]
            slots = tuple(Slot(**slot) for slot in group["slots"]) if group else ()
            files = [file for sample in samples for file in (sample.file, sample.source)]
            files += [group["source"], *(slot.file for slot in slots)] if group else []
            for file in files:  # a folder may come from others, and its images are copied and removed by these names
                if file is not None and Path(file).parent != Path(FOLDER):
                    raise ValueError(f"{path} is damaged: {file} is no image in {FOLDER}/; delete it.")
            return cls(folder, samples, Group(**group | {"slots": slots}) if group else None)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}; delete it.") from error

    @property
    def steps(self) -> list[int]:
        """Steps of which there are images, rising."""
        return sorted({sample.step for sample in self.samples})

    def keep(self, image: Image.Image, name: str) -> str:
        """Writes an image, at most 512 pixels wide and high.

        Args:
            image: the image.
            name: what it is of.

        Returns:
            Its path from the run's folder.
        """
        small = image.convert("RGB")
        small.thumbnail((_LARGEST, _LARGEST))
        lossless = small.width * small.height <= _SMALL
        path = self.folder / FOLDER / f"{safe_name(name)}.{'png' if lossless else 'jpg'}"
        with replaced_file(path) as file:
            small.save(file, "PNG" if lossless else "JPEG", quality=88)
        return path.relative_to(self.folder).as_posix()

    def write(self) -> None:
        """Writes `gallery.json`, and drops every second evaluation where there are many, but the first and the last."""
        steps = self.steps
        if len(steps) > _MOST:
            dropped = set(steps[1:-1:2])
            kept = [sample for sample in self.samples if sample.step not in dropped]
            for sample in self.samples:
                if sample.step in dropped:
                    (self.folder / sample.file).unlink(missing_ok=True)
            self.samples = kept
        (self.folder / FOLDER).mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {
            "samples": [asdict(sample) for sample in self.samples],
            "group": None if self.group is None else asdict(self.group),
        }
        path = self.folder / FOLDER / "gallery.json"
        write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    def begin_with(self, earlier: Path, step: int) -> None:
        """Copies the images of the run that is resumed, up to the step of its checkpoint.

        Args:
            earlier: its folder.
            step: number of updates made by then.
        """
        for sample in Gallery.read(earlier).samples:
            if sample.step <= step:
                files = [self._copied(earlier, file) for file in (sample.file, sample.source)]
                if files[0] is not None:
                    self.samples.append(replace(sample, file=files[0], source=files[1]))

    def _copied(self, earlier: Path, file: str | None) -> str | None:
        if file is None or not (earlier / file).is_file():
            return None
        (self.folder / FOLDER).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(earlier / file, self.folder / file)
        return file

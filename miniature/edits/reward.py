"""Reward of the miniature's edits: did the edit do what was asked, and did it leave the rest alone?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL.Image import Image

from datamodules.sample import PromptSample
from miniature.edits.wording import CATEGORIES, TINTS
from miniature.scenes.detector import ShapesDetector
from miniature.scenes.world import CELL, GRID, GROUNDS, SIZE, quadrant_of
from rewards.base import Reward, RewardBatch, Score
from rewards.geneval.rules import Detection


@dataclass(frozen=True)
class _Thing:
    """An object as the detector sees it, in the cell that holds its middle."""

    shape: str
    color: str | None
    cell: int


@dataclass(frozen=True)
class _Sight:
    """An image as the detector sees it: objects, the best seen first, and the ground's RGB."""

    things: tuple[_Thing, ...]
    ground: np.ndarray


class ShapesEditReward(Reward):
    """Scores an edit by its source image, its result and its metadata. native = table = rl = followed x kept, 0..1.

    `followed` says how far the result does what was asked:

    * swap, attribute_modification: 1 for an object in the old cell with the shape and colour asked for, 0.5 if it has
      the new shape (colour) but lost its old colour (shape);
    * removal: 1 if the object's cell is empty;
    * move: the share of shape and colour (0.5 each) that an object new in the quadrant has, halved if the old cell is
      not empty;
    * addition: 1 if an object in a free cell has both shape and colour, 0.25 if it has only one of them;
    * env: 1 if the ground's colour is within 6 (RGB distance) of the one asked for, falling to 0 at 14.

    `kept` is the mean over all other objects of the share of shape and colour that is still in their cell, divided by
    1 + the number of objects that nobody asked for, and, unless the ground was to change, up to halved by a change of
    the ground. Doing nothing follows nothing and a blank image keeps nothing: both score 0. `strict` in the detail
    is 1 if both are perfect.

    Args:
        detector: detector that finds the objects.
        threshold: objects with a score of at most this, in [0, 1), are ignored; the default is GenEval's.
    """

    name = "shapes_edit"
    needs = ("image", "category", "index", "value")
    native_range = (0.0, 1.0)

    def __init__(self, detector: ShapesDetector | None = None, threshold: float = 0.3) -> None:
        if not 0 <= threshold < 1:
            raise ValueError(f"ShapesEditReward has threshold={threshold}, use a number in [0, 1).")
        self.detector = detector or ShapesDetector()
        self.threshold = threshold

    @property
    def version(self) -> str:
        """Name, threshold and the detector's settings, on which the scores depend."""
        d = self.detector
        return f"{self.name} threshold={self.threshold} by {d.min_area}/{d.max_distance}/{d.good_fit}"

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Scores B edits; a sample without its source image, or with another than its metadata says, is invalid."""
        return [self._score(sample, image) for sample, image in zip(batch.samples, batch.images, strict=True)]

    def _score(self, sample: PromptSample, image: Image) -> Score:
        category = sample.metadata["category"]
        if category not in CATEGORIES:
            raise ValueError(
                f"the prompt {sample.id!r} has the category {category!r}: use one of {', '.join(CATEGORIES)}."
            )
        if sample.image is None:
            return Score.invalid("the sample has no source image")
        if (SIZE, SIZE) != image.size or image.size != sample.image.size:
            return Score.invalid(f"source {sample.image.size} and result {image.size} must both be {(SIZE, SIZE)}")
        before, after = self._look(sample.image), self._look(image)
        items = [_Thing(item["shape"], item["color"], item["cell"]) for item in sample.metadata["items"]]
        if {*items} != {*before.things}:
            return Score.invalid("the source image does not show the objects of the metadata")
        parts = judge_edit(before, after, items[sample.metadata["index"]], sample.metadata)
        native = parts["followed"] * parts["kept"]
        return Score(native, native, native, detail={"category": category, **parts, "strict": float(native == 1)})

    def _look(self, image: Image) -> _Sight:
        found = [one for one in self.detector.detect([image])[0] if one.score > self.threshold]
        found.sort(key=lambda one: -one.score)
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64).reshape(-1, 3)
        return _Sight(tuple(_Thing(one.label, one.color, _cell(one)) for one in found), np.median(pixels, axis=0))


def _cell(found: Detection) -> int:
    left, top, right, bottom = found.box
    row, column = (min(int((low + high) / 2 / CELL), GRID - 1) for low, high in ((top, bottom), (left, right)))
    return row * GRID + column


def _likeness(thing: _Thing | None, shape: str, color: str | None) -> float:
    """Returns 0.5 for the right shape plus 0.5 for the right colour."""
    return 0.0 if thing is None else 0.5 * (thing.shape == shape) + 0.5 * (thing.color == color)


def _ground_likeness(seen: np.ndarray, asked: np.ndarray) -> float:
    """Returns 1 up to an RGB distance of 6, falling to 0 at 14.

    Grounds are at least 14.6 apart, and an autoencoder errs by about 2.
    """
    return float(np.clip((14 - np.linalg.norm(seen - asked)) / 8, 0, 1))


def judge_edit(before: _Sight, after: _Sight, meant: _Thing, metadata: Mapping[str, Any]) -> dict[str, float]:
    """Returns `followed`, `kept` (both 0..1) and the number of objects that nobody asked for (`extra`).

    Args:
        before: the source as the detector sees it.
        after: the result as the detector sees it.
        meant: the object that the instruction is about.
        metadata: metadata of the example (`EditExample.metadata`); category and value are used.
    """
    category, value = metadata["category"], metadata["value"]
    rest = list(after.things)

    def take(cell: int) -> _Thing | None:
        thing = next((thing for thing in rest if thing.cell == cell), None)
        if thing is not None:
            rest.remove(thing)
        return thing

    others = [thing for thing in before.things if thing != meant or category in ("addition", "env")]
    still = [_likeness(take(thing.cell), thing.shape, thing.color) for thing in others]
    old = take(meant.cell)
    new = None
    if category in ("move", "addition"):
        spots = [one for one in rest if category == "addition" or quadrant_of(one.cell) == value]
        new = max(spots, key=lambda one: _likeness(one, meant.shape, meant.color), default=None)
    likeness = _likeness(new, meant.shape, meant.color)
    if new is not None and likeness > 0:
        rest.remove(new)

    if category == "swap":
        followed = _likeness(old, value, meant.color) if old is not None and old.shape == value else 0.0
    elif category == "attribute_modification":
        followed = _likeness(old, meant.shape, value) if old is not None and old.color == value else 0.0
    elif category == "removal":
        followed = float(old is None)
    elif category == "move":
        followed = likeness if old is None else likeness / 2
    elif category == "addition":
        followed = likeness if likeness == 1 else likeness / 2
    else:
        followed = _ground_likeness(after.ground, np.array(GROUNDS[TINTS.index(value)], dtype=np.float64))

    kept = sum(still) / len(still) / (1 + len(rest))
    if category != "env":
        kept *= (1 + _ground_likeness(after.ground, before.ground)) / 2
    return {"followed": followed, "kept": kept, "extra": float(len(rest))}

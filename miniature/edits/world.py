"""The miniature world of edits: source scenes, edits of them, and the scenes that fulfil an edit.

Six categories, named as OmniEdit's tasks (`move` takes the place of `style`).
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from typing import Any, Literal

from miniature.edits.wording import CATEGORIES, SIDES, TINTS, Edit, write_edit
from miniature.scenes.world import FEW_COLORS as COLORS
from miniature.scenes.world import FEW_SHAPES as SHAPES
from miniature.scenes.world import GRID, QUADRANTS, Item, Scene, quadrant_of

Split = Literal["train", "val", "test"]

MATCHES = {"red": "peach", "yellow": "peach", "green": "mint", "blue": "sky", "purple": "sky", "black": "white"}
"""Colour -> the ground that matches it, its palest relative."""


@dataclass(frozen=True)
class EditExample:
    """A source scene and an edit of it."""

    source: Scene
    edit: Edit

    @property
    def category(self) -> str:
        """Category of the edit, one of `CATEGORIES`."""
        return self.edit.category

    @property
    def meant(self) -> Item:
        """The object that the instruction is about."""
        return self.source.items[self.edit.index]

    @property
    def id(self) -> str:
        """Id of source and edit; two wordings of one edit (by another side, too) share it."""
        return f"{self.category}-{_digest(self):016x}"

    @property
    def split(self) -> Split:
        """Split of the example, a fixed function of source and edit: 60 % train, 20 % val, 20 % test."""
        share = _digest(self) / 2**64
        return "train" if share < 0.6 else "val" if share < 0.8 else "test"

    @property
    def instruction(self) -> str:
        """Canonical instruction, the wording of training prompts, ambiguous without the image."""
        return write_edit(self.edit, self.source, "canonical", random.Random(0))

    @property
    def explicit(self) -> str:
        """Instruction that names the object by what the image shows, as a faithful rewrite would."""
        return write_edit(self.edit, self.source, "explicit", random.Random(0))

    @property
    def metadata(self) -> dict[str, Any]:
        """Category, source (objects in order, ground's name), index of the object meant, and new value, for JSON."""
        items = [{"shape": item.shape, "color": item.color, "cell": item.cell} for item in self.source.items]
        return {
            "category": self.category,
            "items": items,
            "ground": TINTS[self.source.ground],
            "index": self.edit.index,
            "value": self.edit.value,
        }

    @property
    def targets(self) -> tuple[Scene, ...]:
        """Every scene that fulfils the edit and leaves the rest alone."""
        if self.category in ("move", "addition"):
            return tuple(fulfil(self.source, self.edit, cell) for cell in landing_cells(self.source, self.edit))
        return (fulfil(self.source, self.edit),)

    def target(self, rng: random.Random) -> Scene:
        """Draws one of `targets`."""
        return rng.choice(self.targets)


def _digest(example: EditExample) -> int:
    key = repr((example.source, example.category, example.edit.index, example.edit.value))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


# --- what an edit does ------------------------------------------------------------------------------------------------


def landing_cells(scene: Scene, edit: Edit) -> tuple[int, ...]:
    """Returns the free cells for a moved object (in its new quadrant) or for an added one (anywhere)."""
    taken = {item.cell for item in scene.items}
    free = (cell for cell in range(GRID * GRID) if cell not in taken)
    return tuple(cell for cell in free if edit.category == "addition" or quadrant_of(cell) == edit.value)


def fulfil(scene: Scene, edit: Edit, cell: int | None = None) -> Scene:
    """Returns the scene after the edit.

    Args:
        scene: the source.
        edit: the edit.
        cell: cell that the object goes to, for "move" and "addition" only: one of `landing_cells`.
    """
    items, meant = list(scene.items), scene.items[edit.index]
    if edit.category == "removal":
        del items[edit.index]
    elif edit.category == "env":
        return replace(scene, ground=TINTS.index(str(edit.value)))
    elif edit.category == "addition":
        items.append(replace(meant, cell=_given(cell)))
    elif edit.category == "move":
        items[edit.index] = replace(meant, cell=_given(cell))
    elif edit.category == "swap":
        items[edit.index] = replace(meant, shape=str(edit.value))
    else:
        assert edit.category == "attribute_modification"
        items[edit.index] = replace(meant, color=str(edit.value))
    return replace(scene, items=tuple(items))


def _given(cell: int | None) -> int:
    assert cell is not None
    return cell


def outermost(scene: Scene, side: str) -> int | None:
    """Returns the index of the object that lies further to a side than all others; None if two share the place."""
    ranks = {
        "left": [item.cell % GRID for item in scene.items],
        "right": [-(item.cell % GRID) for item in scene.items],
        "upper": [item.cell // GRID for item in scene.items],
        "lower": [-(item.cell // GRID) for item in scene.items],
    }[side]
    return ranks.index(min(ranks)) if ranks.count(min(ranks)) == 1 else None


# --- examples ---------------------------------------------------------------------------------------------------------


def source_scene(rng: random.Random) -> Scene:
    """Draws a scene of 2-4 objects in reading order, with distinct (shape, colour) pairs and cells."""
    num = rng.randint(2, 4)
    kinds = rng.sample([(shape, color) for shape in SHAPES for color in COLORS], num)
    cells = sorted(rng.sample(range(GRID * GRID), num))
    return Scene(tuple(Item(*kind, cell) for kind, cell in zip(kinds, cells, strict=True)), rng.randrange(len(TINTS)))


def example(rng: random.Random, category: str, split: Split) -> EditExample:
    """Draws an example of a category from a split."""
    if category not in CATEGORIES:
        raise ValueError(f"unknown category {category!r}: use one of {', '.join(CATEGORIES)}")
    while True:
        scene, side = source_scene(rng), rng.choice(SIDES)
        index = outermost(scene, side)
        if index is None:
            continue
        values = possible_values(scene, category, index)
        if not values:
            continue
        drawn = EditExample(scene, Edit(category, index, side, rng.choice(values)))
        if drawn.split == split:
            return drawn


def possible_values(scene: Scene, category: str, index: int) -> tuple[str | None, ...]:
    """Returns the values that an edit of this object can take.

    They change the object and keep all (shape, colour) pairs of the scene distinct.
    """
    meant = scene.items[index]
    kinds = {(item.shape, item.color) for item in scene.items}
    if category == "swap":
        return tuple(shape for shape in SHAPES if (shape, meant.color) not in kinds)
    if category == "attribute_modification":
        return tuple(color for color in COLORS if (meant.shape, color) not in kinds)
    if category == "move":
        return tuple(quadrant for quadrant in QUADRANTS if quadrant != quadrant_of(meant.cell))
    if category == "env":
        tint = MATCHES[meant.color]
        return () if tint == TINTS[scene.ground] else (tint,)
    return (None,)

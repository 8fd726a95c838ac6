"""The miniature world: what its scenes hold, what prompts can ask for, and how a scene is drawn.

A `Content` is what a prompt asks for, by GenEval's six tags; a `Scene` is what an image of 32 x 32 pixels shows.
`miniature.scenes.wording` words a content, `miniature.scenes.interpretation` turns it and its wording into a scene.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations, product
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond", "bar", "arch")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 200),
    "yellow": (240, 190, 20),
    "purple": (140, 60, 170),
    "black": (30, 30, 34),
    "orange": (245, 120, 20),
    "cyan": (0, 185, 200),
}
FEW_SHAPES, FEW_COLORS = SHAPES[:4], dict(list(COLORS.items())[:6])
"""Shapes and colours of the editing world and of the models that also know signs: they have not seen the others."""
GROUNDS: tuple[tuple[int, int, int], ...] = ((244, 244, 240), (230, 240, 250), (250, 236, 226), (232, 246, 232))
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITES = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
GRID = 4
CELL = 8
SIZE = GRID * CELL


@dataclass(frozen=True)
class Ask:
    """One entry of a prompt: `count` objects of one shape; `color` and `quadrant` are free when None."""

    shape: str
    color: str | None = None
    count: int = 1
    quadrant: str | None = None


@dataclass(frozen=True)
class Content:
    """Content of a prompt; with a `relation`, `asks[0]` stands in that relation to `asks[1]`."""

    tag: str
    asks: tuple[Ask, ...]
    relation: str | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """GenEval metadata; `exclude` asks for exact counts of every class, else "draw everything" would pass."""
        target_first = self.asks if self.relation is None else tuple(reversed(self.asks))
        include: list[dict[str, Any]] = []
        for ask in target_first:
            item: dict[str, Any] = {"class": ask.shape, "count": ask.count}
            if ask.color is not None:
                item["color"] = ask.color
            include.append(item)
        if self.relation is not None:
            include[1]["position"] = [self.relation, 0]
        asked = {shape: sum(ask.count for ask in self.asks if ask.shape == shape) for shape in SHAPES}
        exclude = [{"class": shape, "count": count + 1} for shape, count in asked.items()]
        return {"tag": self.tag, "include": include, "exclude": exclude}


@dataclass(frozen=True)
class Item:
    """A drawn object; `cell` counts row by row from the upper left, 0..15."""

    shape: str
    color: str
    cell: int


@dataclass(frozen=True)
class Scene:
    """Objects of an image, and the index of its ground colour."""

    items: tuple[Item, ...]
    ground: int = 0

    @property
    def things(self) -> list[int]:
        """Number of the thing in each of the 16 cells: 1 + 8 * shape + colour, both as indices, or 0 for none."""
        things = [0] * GRID**2
        for item in self.items:
            things[item.cell] = 1 + SHAPES.index(item.shape) * len(COLORS) + tuple(COLORS).index(item.color)
        return things


def quadrant_of(cell: int) -> str:
    """Returns the one of `QUADRANTS` that a cell lies in."""
    row, column = divmod(cell, GRID)
    return QUADRANTS[2 * (row >= GRID // 2) + (column >= GRID // 2)]


# --- contents ---------------------------------------------------------------------------------------------------------


@lru_cache
def all_contents(tag: str) -> tuple[Content, ...]:
    """Returns all contents of a tag, in a fixed order (8, 56, 24, 64, 224 and 3,136 of them)."""
    pairs = tuple(permutations(SHAPES, 2))
    if tag == "single_object":
        return tuple(Content(tag, (Ask(shape),)) for shape in SHAPES)
    if tag == "two_object":
        return tuple(Content(tag, (Ask(a), Ask(b))) for a, b in pairs)
    if tag == "counting":
        return tuple(Content(tag, (Ask(shape, count=n),)) for shape, n in product(SHAPES, (2, 3, 4)))
    if tag == "colors":
        return tuple(Content(tag, (Ask(shape, color),)) for shape, color in product(SHAPES, COLORS))
    if tag == "position":
        return tuple(Content(tag, (Ask(a), Ask(b)), relation) for (a, b), relation in product(pairs, RELATIONS))
    if tag == "color_attr":
        colors = tuple(permutations(COLORS, 2))
        return tuple(Content(tag, (Ask(a, c), Ask(b, d))) for (a, b), (c, d) in product(pairs, colors))
    raise ValueError(f"unknown tag {tag!r}: use one of {', '.join(TAGS)}")


@lru_cache
def contents(tag: str, split: Literal["train", "val", "test"], few: bool = False) -> tuple[tuple[Content, ...], ...]:
    """Returns the scenes of one split, each as the contents that ask for it: 40 % train, 20 % val, 40 % test.

    Two objects can be asked for in two ways ("a circle left of a square", "a square right of a circle"). The order is
    fixed. `single_object` has eight contents in all, so the splits share them.

    Args:
        tag: one of `TAGS`.
        split: part of the scenes.
        few: true leaves out the scenes with others than `FEW_SHAPES` and `FEW_COLORS`.
    """
    ways: dict[Hashable, list[Content]] = {}
    for content in all_contents(tag):
        key: Hashable = frozenset(content.asks)
        if content.relation in ("left of", "above"):
            key = (content.relation, content.asks)
        elif content.relation is not None:
            key = (OPPOSITES[content.relation], content.asks[::-1])
        ways.setdefault(key, []).append(content)
    chosen: list[tuple[Content, ...]] = []
    for known in (True, False)[: 1 if few else 2]:
        scenes = [tuple(same) for same in ways.values() if _is_few(same[0]) is known]
        if tag != "single_object":
            random.Random(f"split-{tag}").shuffle(scenes)
            first, second = round(0.4 * len(scenes)), round(0.6 * len(scenes))
            scenes = {"train": scenes[:first], "val": scenes[first:second], "test": scenes[second:]}[split]
        chosen += scenes
    return tuple(chosen)


def _is_few(content: Content) -> bool:
    return all(ask.shape in FEW_SHAPES and ask.color in (None, *FEW_COLORS) for ask in content.asks)


def elaborate(content: Content, rng: random.Random) -> Content:
    """Settles what a content leaves free (colours, quadrants), as a detailed caption would."""
    colors = rng.sample(tuple(COLORS), len(content.asks))
    quadrants: Sequence[str | None] = rng.sample(QUADRANTS, len(content.asks))
    if content.relation is not None or content.tag == "counting":
        quadrants = [None] * len(content.asks)  # the relation or the number already says where
    asks = tuple(
        replace(ask, color=ask.color or color, quadrant=quadrant)
        for ask, color, quadrant in zip(content.asks, colors, quadrants, strict=True)
    )
    return replace(content, asks=asks)


# --- images -----------------------------------------------------------------------------------------------------------


@lru_cache
def stencil(shape: str) -> np.ndarray:
    """Returns [8, 8] float: the share of each pixel of a cell that the shape covers, 0..1."""
    scale = 16
    image = Image.new("L", (CELL * scale, CELL * scale))
    draw = ImageDraw.Draw(image)

    def at(*points: float) -> list[float]:
        return [scale * p for p in points]

    if shape == "circle":
        draw.ellipse(at(1, 1, 7, 7), fill=255)
    elif shape == "square":
        draw.rectangle(at(1.2, 1.2, 6.8, 6.8), fill=255)
    elif shape == "triangle":
        draw.polygon(at(4, 0.6, 7.2, 7, 0.8, 7), fill=255)
    elif shape == "cross":
        draw.rectangle(at(3, 1, 5, 7), fill=255)
        draw.rectangle(at(1, 3, 7, 5), fill=255)
    elif shape == "ring":
        draw.ellipse(at(0.8, 0.8, 7.2, 7.2), fill=255)
        draw.ellipse(at(2.8, 2.8, 5.2, 5.2), fill=0)
    elif shape == "diamond":
        draw.polygon(at(4, 0.4, 7.6, 4, 4, 7.6, 0.4, 4), fill=255)
    elif shape == "bar":
        draw.rectangle(at(0.8, 2.8, 7.2, 5.2), fill=255)
    elif shape == "arch":
        draw.rectangle(at(1, 1, 7, 7), fill=255)
        draw.rectangle(at(3, 3.2, 5, 8), fill=0)
    else:
        raise ValueError(f"unknown shape {shape!r}: use one of {', '.join(SHAPES)}")
    return np.asarray(image, dtype=np.float64).reshape(CELL, scale, CELL, scale).mean((1, 3)) / 255


def render(scene: Scene) -> np.ndarray:
    """Draws a scene as [32, 32, 3] uint8 RGB."""
    image = np.empty((SIZE, SIZE, 3))
    image[:] = GROUNDS[scene.ground]
    for item in scene.items:
        row, column = divmod(item.cell, GRID)
        patch = image[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        cover = stencil(item.shape)[..., None]
        patch[:] = (1 - cover) * patch + cover * np.array(COLORS[item.color])
    return image.round().astype(np.uint8)


def random_scene(rng: random.Random) -> Scene:
    """Draws a scene of 1-4 unrelated objects (for the autoencoder, which needs no captions)."""
    cells = rng.sample(range(GRID * GRID), rng.randint(1, 4))
    items = tuple(Item(rng.choice(SHAPES), rng.choice(tuple(COLORS)), cell) for cell in cells)
    return Scene(items, rng.randrange(len(GROUNDS)))

"""Turns a content and its wording into a scene, with the mistakes and the habits of a real text-to-image model.

This is where the base model gets the two properties that the paper measured on FLUX.1-dev. Layout, free colours and
most mistakes are functions of the caption's *words*: one prompt gives nearly one image, another wording of the same
content gives another. The rest of the mistakes are pure chance, so that no wording is perfect.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from statistics import NormalDist
from typing import Self

import numpy as np

from miniature.scenes.wording import FILLER, STYLES, write
from miniature.scenes.world import (
    COLORS,
    GRID,
    GROUNDS,
    RELATIONS,
    SHAPES,
    TAGS,
    Content,
    Item,
    Scene,
    all_contents,
    elaborate,
    quadrant_of,
)


@dataclass(frozen=True)
class Habits:
    """Rates at which the world's images depart from their captions.

    Attributes:
        mistakes: chance of a mistake that the wording decides, by tag (FLUX.1-dev's order of difficulty).
        slips: chance of a mistake that nothing decides.
        freedom: chance that layout and free colours are random rather than decided by the words.
    """

    mistakes: tuple[tuple[str, float], ...] = (
        ("single_object", 0.15),
        ("two_object", 0.3),
        ("counting", 0.4),
        ("colors", 0.3),
        ("position", 0.45),
        ("color_attr", 0.45),
    )
    slips: float = 0.15
    freedom: float = 0.1

    @property
    def faithful(self) -> Self:
        """Habits of a faithful model: these without mistakes and slips."""
        return replace(self, mistakes=tuple((name, 0.0) for name, _ in self.mistakes), slips=0.0)


FAITHFUL = Habits().faithful


@cache
def fixed_gaussian(*key: str) -> float:
    """Returns a standard normal number that is a fixed function of the key."""
    digest = hashlib.blake2b("\0".join(key).encode(), digest_size=8).digest()
    return NormalDist().inv_cdf((int.from_bytes(digest, "big") + 0.5) / 2**64)


@cache
def _word_preferences(word: str, purpose: str, size: int) -> np.ndarray:
    return np.array([fixed_gaussian(word, purpose, str(i)) for i in range(size)])


def preferences(caption: str, purpose: str, size: int) -> np.ndarray:
    """Returns the caption's preference for each of `size` choices.

    It is a sum over the caption's words, which a small network can learn.
    """
    return np.sum([_word_preferences(word, purpose, size) for word in caption.split()], axis=0)


def _spoilt(content: Content, caption: str, habits: Habits) -> bool:
    """Returns True if the world misdraws this wording of this content.

    It is a threshold on a sum over adjacent *pairs* of content words: no single word is lucky everywhere, so a refiner
    has to learn which wording suits which content.
    """
    words = [word for word in caption.split() if word not in {*FILLER, "a", "one", "1", "at"}]
    pairs = list(zip(words, words[1:], strict=False)) or [(words[0], words[0])]
    score = sum(fixed_gaussian(*pair, "mistake") for pair in pairs) / len(pairs) ** 0.5
    chance = dict(habits.mistakes)[content.tag]
    return chance > 0 and score > NormalDist().inv_cdf(1 - chance)


def _misread(content: Content, choice: int) -> Content:
    """Returns the content with one mistake of its tag's kind; `choice` (any int >= 0) picks the mistake."""
    first, last = content.asks[0], content.asks[-1]
    if content.tag == "counting":
        counts = [n for n in (1, 2, 3, 4) if abs(n - first.count) == 1]
        return replace(content, asks=(replace(first, count=counts[choice % len(counts)]),))
    if content.tag == "position":
        assert content.relation is not None
        opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
        return replace(content, relation=opposite[content.relation])
    if content.tag == "color_attr" and choice % 2 == 0:
        return replace(content, asks=(replace(first, color=last.color), replace(last, color=first.color)))
    if content.tag in ("colors", "color_attr"):
        colors = [color for color in COLORS if color not in (first.color, last.color)]
        return replace(content, asks=(*content.asks[:-1], replace(last, color=colors[choice % len(colors)])))
    if content.tag == "two_object" and choice % 2 == 0:
        return replace(content, asks=(first,))
    shapes = [shape for shape in SHAPES if shape not in (first.shape, last.shape)]
    return replace(content, asks=(*content.asks[:-1], replace(last, shape=shapes[choice % len(shapes)])))


def _related(cell: int, other: int, relation: str) -> bool:
    """Returns True if `cell` is clearly in a relation to `other`: nearer to the axis than to 45 degrees."""
    dy, dx = divmod(cell, GRID)[0] - divmod(other, GRID)[0], cell % GRID - other % GRID
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along > 0 and abs(across) <= along // 2


def _cells(content: Content, scores: np.ndarray) -> list[list[int]]:
    """Returns cells for every ask: the best by `scores` [asks, 16] that quadrants and the relation allow."""
    if content.relation is not None:
        pairs = [pair for pair in product(range(GRID * GRID), repeat=2) if _related(pair[0], pair[1], content.relation)]
        best = max(pairs, key=lambda pair: scores[0, pair[0]] + scores[1, pair[1]])
        return [[best[0]], [best[1]]]
    taken: set[int] = set()
    chosen: list[list[int]] = []
    for ask, row in zip(content.asks, scores, strict=True):
        allowed = [
            cell for cell in range(GRID * GRID) if ask.quadrant in (None, quadrant_of(cell)) and cell not in taken
        ]
        cells = sorted(allowed, key=lambda cell: -row[cell])[: ask.count]
        taken.update(cells)
        chosen.append(cells)
    return chosen


def imagine(content: Content, caption: str, rng: random.Random, habits: Habits = Habits()) -> Scene:
    """Returns the scene that the world shows for a caption of this content.

    Args:
        content: content of the caption, as returned by `elaborate` for detailed captions.
        caption: wording, which decides layout, free colours and `habits.mistakes`.
        rng: random numbers, which decide the rest.
        habits: rates of mistakes; `FAITHFUL` has none.
    """
    if rng.random() < habits.slips:
        content = _misread(content, rng.randrange(60))
    elif _spoilt(content, caption, habits):
        content = _misread(content, int(np.argmax(preferences(caption, "misread", 12))))

    def decide(purpose: str, size: int) -> np.ndarray:
        if rng.random() < habits.freedom:
            return np.array([rng.gauss(0, 1) for _ in range(size)])
        return preferences(caption, purpose, size)

    layout = np.stack([decide(f"layout {i}", GRID * GRID) for i in range(len(content.asks))])
    items = []
    for i, (ask, cells) in enumerate(zip(content.asks, _cells(content, layout), strict=True)):
        color = ask.color or tuple(COLORS)[int(np.argmax(decide(f"color {i}", len(COLORS))))]
        items += [Item(ask.shape, color, cell) for cell in cells]
    return Scene(tuple(items), ground=int(np.argmax(decide("ground", len(GROUNDS)))))


def captioned_scenes(rng: random.Random, habits: Habits) -> Iterator[tuple[str, Scene]]:
    """Yields captions and scenes without end, over all tags alike; canonical captions come most."""
    shares = [1.5 if style == "canonical" else 1.0 for style in STYLES]
    while True:
        content = rng.choice(all_contents(rng.choice(TAGS)))
        style = rng.choices(STYLES, shares)[0]
        content = elaborate(content, rng) if style == "detailed" else content
        caption = write(content, style, rng)
        yield caption, imagine(content, caption, rng, habits)

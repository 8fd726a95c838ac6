"""Turns a content and its wording into a scene, with the habits of a real text-to-image model.

This is where the base model gets the properties that the paper measured on FLUX.1-dev. Layout and free colours are
functions of the caption's *words*: one prompt gives nearly one image, another wording of the same content gives
another. And the words decide whether numbers, colours and relations are heeded at all: the model can draw them (it is
trained on faithful images first), but in most wordings it does not.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, reduce
from statistics import NormalDist
from typing import Self

import numpy as np

from miniature.scenes.wording import FILLER, NOUNS, STYLES, write
from miniature.scenes.world import (
    COLORS,
    GRID,
    GROUNDS,
    TAGS,
    Ask,
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
        mistakes: share of wordings that are not heeded, by tag (FLUX.1-dev's order of difficulty).
        slips: chance that this is random, at the rate of `mistakes`, rather than decided by the words.
        freedom: chance that layout and free colours are random rather than decided by the words.
        lucky_words: true makes a wording heeded by the sum of what its words bring, false by what its pairs of words
            do (see `heeded`). The shipped base has false; true is for asking what a claim hangs on.
    """

    mistakes: tuple[tuple[str, float], ...] = (
        ("single_object", 0.0),
        ("two_object", 0.45),
        ("counting", 0.65),
        ("colors", 0.55),
        ("position", 0.85),
        ("color_attr", 0.7),
    )
    slips: float = 0.1
    freedom: float = 0.03
    lucky_words: bool = False

    @property
    def faithful(self) -> Self:
        """Habits of a faithful model: these without mistakes and slips."""
        return replace(self, mistakes=tuple((name, 0.0) for name, _ in self.mistakes), slips=0.0)

    def heed(self, caption: str, tag: str) -> bool:
        """Returns True if a wording of this tag is heeded, slips aside."""
        return heeded(caption, dict(self.mistakes)[tag], lucky_words=self.lucky_words)


FAITHFUL = Habits().faithful
UNIMPORTANT = {*FILLER, "a", "one", "1", "at"}
RANK = 3
"""Numbers that a word brings to either sum of `heeded`: more are harder to learn, for everyone."""


SALTS = {False: " 4803", True: " 6954"}
"""Part of the key of `heeded`, without and with lucky words, each chosen among thousands so that the share of a
split's scenes that are heeded is close in all wordings, as a model draws them: by the rule, those that a small model
learns less well are somewhat above."""


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
    return reduce(np.add, [_word_preferences(word, purpose, size) for word in caption.split()])


def heeded(caption: str, rate: float, *, lucky_words: bool = False) -> bool:
    """Returns True if the world draws this wording as it says; `rate` is the share of wordings that it does not.

    It is a threshold on the sum of a product for every two of the words: no word is lucky beside all others, so a
    refiner has to learn which wording suits which content. With `lucky_words` it is one on a plain sum, so that words
    which help one content help all, and a refiner only has to learn them.
    """
    words = [word for word in caption.split() if word not in UNIMPORTANT]
    if rate in (0, 1) or len(words) < 2:
        return rate < 1

    def brought(name: str, size: int) -> np.ndarray:
        return np.stack([_word_preferences(word, name + SALTS[lucky_words], size) for word in words])

    if lucky_words:
        score, terms = brought("lucky", 1).sum(), len(words)
    else:
        one, other = brought("heeded", RANK), brought("beside", RANK)
        score, terms = one.sum(0) @ other.sum(0) - (one * other).sum(), len(words) * (len(words) - 1) * RANK
    return bool(score > terms**0.5 * NormalDist().inv_cdf(rate))


def _unheeded(content: Content, nouns: list[str]) -> Content:
    """Returns the content without colours, places and relation; numbers are the words' favourites, pairs lose one."""
    number = 1 + int(np.argmax(_word_preferences(nouns[0], "number", 4))) if content.tag == "counting" else 1
    asks = content.asks[:1] if content.tag == "two_object" else content.asks
    return Content(content.tag, tuple(Ask(ask.shape, count=number) for ask in asks))


def _cells(content: Content, scores: np.ndarray, lines: np.ndarray) -> list[list[int]]:
    """Returns cells for every ask: the best by `scores` [asks, 16] that quadrants and the relation allow.

    Objects in a relation are in one row or column, the best by `lines` [4], each in its half of it.
    """
    if content.relation is not None:
        line, chosen = int(np.argmax(lines)), []
        for far, row in zip((0, 1) if content.relation in ("left of", "above") else (1, 0), scores, strict=True):
            place = far * GRID // 2 + int(row[1] > row[0])
            chosen.append([place * GRID + line if content.relation in ("above", "below") else line * GRID + place])
        return chosen
    taken: set[int] = set()
    chosen = []
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

    Every word for a shape has favourite places and, for objects whose colour is free, a favourite colour. The caption's
    first two words decide the ground, and the row or column of a relation.

    Args:
        content: content of the caption, as returned by `elaborate` for detailed captions.
        caption: wording, which decides layout, free colours and, by `habits.mistakes`, if it is heeded.
        rng: random numbers, which decide the rest.
        habits: rates of mistakes; `FAITHFUL` has none.
    """
    words = caption.split()
    nouns = [word for word in words if word in NOUNS]
    start = " ".join(words[:2])
    rate = dict(habits.mistakes)[content.tag]
    if rng.random() < rate if rng.random() < habits.slips else not habits.heed(caption, content.tag):
        content = _unheeded(content, nouns)

    def decide(words: str, purpose: str, size: int) -> np.ndarray:
        if rng.random() < habits.freedom:
            return np.array([rng.gauss(0, 1) for _ in range(size)])
        return preferences(words, purpose, size)

    asks = list(zip(content.asks, nouns, strict=False))  # one of two may be forgotten
    places = np.stack([decide(noun, f"layout {i}", GRID * GRID) for i, (_, noun) in enumerate(asks)])
    items = []
    for (ask, noun), cells in zip(asks, _cells(content, places, decide(start, "line", GRID)), strict=True):
        color = ask.color or tuple(COLORS)[int(np.argmax(decide(noun, "color", len(COLORS))))]
        items += [Item(ask.shape, color, cell) for cell in cells]
    return Scene(tuple(items), ground=int(np.argmax(decide(start, "ground", len(GROUNDS)))))


@dataclass(frozen=True)
class CaptionedScene:
    """A caption and its scenes.

    Attributes:
        caption: the wording.
        scene: what the world shows for it.
        asked: what it shows when it heeds the wording.
        heeded: true if the wording is one that the world heeds.
    """

    caption: str
    scene: Scene
    asked: Scene
    heeded: bool


def captioned_scenes(rng: random.Random, habits: Habits) -> Iterator[CaptionedScene]:
    """Yields captions and scenes without end, over all tags alike; canonical captions come most."""
    shares = [1.5 if style == "canonical" else 1.0 for style in STYLES]
    while True:
        content = rng.choice(all_contents(rng.choice(TAGS)))
        style = rng.choices(STYLES, shares)[0]
        content = elaborate(content, rng) if style == "detailed" else content
        caption = write(content, style, rng)
        asked = imagine(content, caption, rng, habits.faithful)
        scene = asked if habits == habits.faithful else imagine(content, caption, rng, habits)
        yield CaptionedScene(caption, scene, asked, habits.heed(caption, content.tag))

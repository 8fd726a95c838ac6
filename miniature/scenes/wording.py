"""Words a content of the miniature world in one of five styles, each with a vocabulary and templates of its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from miniature.scenes.world import COLORS, QUADRANTS, RELATIONS, SHAPES, Ask, Content

Style = Literal["canonical", "gallery", "terse", "detailed", "unseen"]
STYLES: tuple[Style, ...] = ("canonical", "gallery", "terse", "detailed", "unseen")


@dataclass(frozen=True)
class Lexicon:
    """Words of one vocabulary, in the order of SHAPES, COLORS, the numbers 2 3 4, and RELATIONS."""

    shapes: tuple[str, ...]
    colors: tuple[str, ...]
    numbers: tuple[str, ...]
    relations: tuple[str, ...]
    one: str


LEXICONS: dict[str, Lexicon] = {
    "canonical": Lexicon(SHAPES, tuple(COLORS), ("two", "three", "four"), RELATIONS, "a"),
    "gallery": Lexicon(
        ("disc", "box", "wedge", "plus", "hoop", "gem", "beam", "gate"),
        ("crimson", "emerald", "azure", "golden", "violet", "ebony", "tangerine", "turquoise"),
        ("a pair of", "a trio of", "a quartet of"),
        ("on the left side of", "on the right side of", "over", "under"),
        "one",
    ),
    "terse": Lexicon(
        ("ball", "block", "cone", "star", "donut", "kite", "stick", "bridge"),
        ("scarlet", "lime", "navy", "amber", "plum", "charcoal", "apricot", "teal"),
        ("2", "3", "4"),
        ("west of", "east of", "north of", "south of"),
        "1",
    ),
}
PREFIXES: dict[Style, tuple[str, ...]] = {
    "canonical": ("a photo of",),
    "gallery": ("an image showing", "a painting with", "artwork depicting"),
    "terse": ("draw", "render", "picture :"),
    "detailed": ("detailed view of", "crisp rendering of", "clean composition of"),
    "unseen": ("there should be", "we can see", "imagine having"),
}
JOIN: dict[Style, str] = {
    "canonical": "and",
    "gallery": "next to",
    "terse": "+",
    "detailed": "with",
    "unseen": "and also",
}

FILLER = sorted({w for phrases in (*PREFIXES.values(), JOIN.values()) for phrase in phrases for w in phrase.split()})


def plural(noun: str) -> str:
    """Returns the plural of one of the world's nouns."""
    return noun + ("es" if noun.endswith(("s", "x", "ch")) else "s")


NOUNS = {
    noun: shape for own in LEXICONS.values() for shape, word in enumerate(own.shapes) for noun in (word, plural(word))
}
"""Every word for a shape, singular and plural -> index of the shape."""


def write(content: Content, style: Style, rng: random.Random, *, mix: float = 0.0) -> str:
    """Words a content in a style.

    Args:
        content: content to word; "detailed" says its quadrants too (see `elaborate`).
        style: "canonical" is the training prompts' own; "unseen" is for evaluation only: it draws each word from the
            vocabulary of "gallery" or "terse" and has templates of its own.
        rng: picks prefixes and, where vocabularies mix, words.
        mix: chance that "gallery" and "terse" take a word from the other's vocabulary.
    """
    own = {"unseen": "gallery", "detailed": "canonical"}.get(style, style)
    share = 0.5 if style == "unseen" else mix

    def lexicon() -> Lexicon:
        if own in ("gallery", "terse") and rng.random() < share:
            return LEXICONS["terse" if own == "gallery" else "gallery"]
        return LEXICONS[own]

    return _compose(content, rng.choice(PREFIXES[style]), JOIN[style], lexicon)


def write_with(content: Content, lexicon: Lexicon) -> str:
    """Words a content in the first template of "gallery" with a vocabulary of one's own."""
    return _compose(content, PREFIXES["gallery"][0], JOIN["gallery"], lambda: lexicon)


def write_loosely(content: Content, rng: random.Random) -> str:
    """Words a content with any vocabulary and random filler for a template: how strangers might put it.

    The refiner learns from these that filler means nothing. The "unseen" style's filler words occur, its templates do
    not.
    """
    templates = (*PREFIXES["unseen"], JOIN["unseen"])

    def filler(most: int) -> str:
        words = " ".join(rng.choice(FILLER) for _ in range(rng.randint(1, most)))
        return filler(most) if any(template in words for template in templates) else words

    return _compose(content, filler(4), filler(2), lambda: rng.choice(tuple(LEXICONS.values())))


def _compose(content: Content, prefix: str, join: str, lexicon: Callable[[], Lexicon]) -> str:
    """Joins a prefix and noun phrases to a sentence; `lexicon` is called anew for every word."""

    def noun_phrase(ask: Ask) -> str:
        shape = lexicon().shapes[SHAPES.index(ask.shape)]
        count = lexicon().one if ask.count == 1 else lexicon().numbers[ask.count - 2]
        words = [count, plural(shape) if ask.count > 1 else shape]
        if ask.color is not None:
            words.insert(1, lexicon().colors[tuple(COLORS).index(ask.color)])
        if ask.quadrant is not None:
            words += ["at", ask.quadrant]
        return " ".join(words)

    if content.relation is not None:
        join = lexicon().relations[RELATIONS.index(content.relation)]
    return f"{prefix} " + f" {join} ".join(noun_phrase(ask) for ask in content.asks)


def vocabulary() -> list[str]:
    """Returns every word that `write` can use, sorted."""
    phrases: list[str] = [*QUADRANTS, "at", *JOIN.values()]
    for lexicon in LEXICONS.values():
        phrases += [*lexicon.shapes, *map(plural, lexicon.shapes), *lexicon.colors, *lexicon.numbers]
        phrases += [*lexicon.relations, lexicon.one]
    for prefixes in PREFIXES.values():
        phrases += prefixes
    return sorted({word for phrase in phrases for word in phrase.split()})

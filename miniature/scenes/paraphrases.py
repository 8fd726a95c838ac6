"""Paraphrases of the miniature's prompts in its other styles, and the check that a wording keeps the content."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, cast

from datamodules.base import PromptSample, bare
from datamodules.paraphrases.base import ContentCheck, Paraphraser, Wordings, choose_kinds
from miniature.scenes.wording import LEXICONS, STYLES, Style, plural, write
from miniature.scenes.world import COLORS, OPPOSITES, RELATIONS, SHAPES, Ask, Content, elaborate


def content_of(metadata: Mapping[str, Any]) -> Content:
    """Returns the content that a prompt's metadata describes.

    Raises:
        ValueError: if the metadata belongs to another world.
    """
    include: list[Any] = list(metadata.get("include") or ())
    asks = tuple(Ask(item["class"], item.get("color"), item.get("count", 1)) for item in include)
    relation = None
    if len(asks) == 2 and "position" in include[1]:
        asks, relation = asks[::-1], include[1]["position"][0]
    content = Content(metadata.get("tag", ""), asks, relation)
    words = [ask.shape in SHAPES and ask.color in (None, *COLORS) and 1 <= ask.count <= 4 for ask in asks]
    if not asks or not all(words) or relation not in (None, *RELATIONS):
        raise ValueError(
            f"{dict(metadata)} is no prompt of the miniature world: use RuleParaphrases and PromptContent."
        )
    return content


class StyleParaphrases(Paraphraser):
    """Source of paraphrases: the miniature's prompts in the other styles of its world.

    A wording depends on the seed, the style, and the prompt's id and metadata, not on the other prompts.

    Args:
        styles: some of the world's styles; null is all but the training prompts' own.
        seed: seed of the words.
        refined: true evaluates the run's own refiner on these wordings too.
    """

    def __init__(self, styles: list[str] | None = None, seed: int = 0, refined: bool = True) -> None:
        super().__init__(refined)
        styles = [style for style in STYLES if style != "canonical"] if styles is None else styles
        self._kinds = choose_kinds(styles, STYLES, "StyleParaphrases.styles")
        self.seed = seed

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the chosen styles."""
        return self._kinds

    def write(self, name: str, samples: Sequence[PromptSample]) -> Wordings:
        """Writes, for every style, one wording for each prompt; None where it is the prompt itself."""
        return {kind: [self._reword(cast(Style, kind), sample) for sample in bare(samples)] for kind in self.kinds}

    def _reword(self, style: Style, sample: PromptSample) -> str | None:
        content = content_of(sample.metadata)
        rng = random.Random(f"{self.seed}/{style}/{sample.id}/{content}")
        wording = write(elaborate(content, rng) if style == "detailed" else content, style, rng)
        return None if wording == sample.prompt else wording


class ShapesContent(ContentCheck):
    """Check that a wording, read with the words of all styles, asks for what the metadata says.

    A number and a colour go with the shape that follows. Colours and places beyond those asked for are no loss, nor
    are two shapes turned round together with their relation; further shapes are, since the miniature's prompts ask for
    nothing else to be there.
    """

    def lost(self, sample: PromptSample, wording: str) -> str | None:
        """Returns the first thing missing or too much, such as `2 circle`, `red circle`, `left of`, `no square`."""
        content = content_of(sample.metadata)
        asks, relation = read_wording(wording)
        left = list(asks)
        for ask in content.asks:
            same = [i for i, other in enumerate(left) if other.shape == ask.shape]
            if not same:
                return ask.shape
            same = [i for i in same if left[i].count == ask.count]
            if not same:
                return f"{ask.count} {ask.shape}"
            same = [i for i in same if ask.color in (None, left[i].color)]
            if not same:
                return f"{ask.color} {ask.shape}"
            del left[same[0]]
        if left:
            return f"no {left[0].shape}"
        if content.relation is not None:
            turned = bool(asks) and asks[0].shape != content.asks[0].shape
            if relation != (OPPOSITES[content.relation] if turned else content.relation):
                return content.relation
        return None


def read_wording(wording: str) -> tuple[list[Ask], str | None]:
    """Parses a wording: what it asks for, shape by shape, and the relation of the first to the second.

    A shape without number is one, but for a plural, which is 0: nobody knows how many.

    >>> read_wording("We can see a pair of crimson discs")
    ([Ask(shape='circle', color='red', count=2, quadrant=None)], None)
    >>> read_wording("render 1 ball north of one box")[1]
    'above'
    """
    asks: list[Ask] = []
    relation: str | None = None
    count: int | None = None
    color: str | None = None
    for kind, meaning in _meanings(re.findall(r"\w+", wording.lower())):
        if kind == "color":
            color = meaning
            continue
        if kind in ("shape", "shapes"):
            several = kind == "shapes"
            asks.append(Ask(meaning, color, 0 if several and count in (None, 1) else count or 1))
        elif kind == "relation":
            # "below a square, a circle" says it of the second shape.
            relation = relation or (meaning if asks else OPPOSITES[meaning])
        count, color = (meaning if kind == "count" else None), None  # an adjective that found no noun is dropped
    return asks, relation


def _meanings(words: list[str]) -> Iterator[tuple[str, Any]]:
    """Yields the meanings of words, the longest phrases first; words that no style knows have none."""
    phrases = _phrases()
    longest = max(map(len, phrases))
    start = 0
    while start < len(words):
        for stop in range(min(start + longest, len(words)), start, -1):
            if (meaning := phrases.get(tuple(words[start:stop]))) is not None:
                yield meaning
                break
        else:
            stop = start + 1
        start = stop


@cache
def _phrases() -> dict[tuple[str, ...], tuple[str, Any]]:
    """Returns phrase -> meaning: its kind ("shape", "shapes", "color", "count" or "relation") and its value."""
    phrases: dict[str, tuple[str, Any]] = {}
    for lexicon in LEXICONS.values():
        phrases[lexicon.one] = ("count", 1)
        phrases |= {word: ("count", count) for count, word in enumerate(lexicon.numbers, start=2)}
        for shape, word in zip(SHAPES, lexicon.shapes, strict=True):
            phrases |= {word: ("shape", shape), plural(word): ("shapes", shape)}
        phrases |= {word: ("color", color) for color, word in zip(COLORS, lexicon.colors, strict=True)}
        phrases |= {word: ("relation", relation) for relation, word in zip(RELATIONS, lexicon.relations, strict=True)}
    return {tuple(phrase.split()): meaning for phrase, meaning in phrases.items()}

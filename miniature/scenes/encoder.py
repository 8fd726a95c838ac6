"""Embeds images and texts of the miniature world as bags of coloured shapes, as CLIP embeds real ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize

from miniature.scenes.detector import ShapesDetector
from miniature.scenes.wording import LEXICONS
from miniature.scenes.world import COLORS, SHAPES
from rewards.geneval.rules import MIN_SCORE


class ShapesEncoder:
    """Encoder of images and texts in the miniature world, where it takes the place of CLIP.

    An image is the bag of things in it: 64 counts of a shape in a colour.

    A text is the bag of things it asks for in any of the world's vocabularies, a thing of no colour as an eighth of it
    in each: no image fits such a text with a cosine above 0.35 (1 / sqrt 8) by one thing alone. Where nothing is, or
    nothing is asked for, a 65th number is 1. Places do not matter.
    """

    version = "bag of shapes"

    def __init__(self) -> None:
        self.detector = ShapesDetector()

    def load(self) -> None:
        """Does nothing, because there are no weights to load."""

    def images(self, images: Sequence[Image]) -> Tensor:
        """Embeds B images as [B, 65] fp32."""
        return torch.stack([_embed({thing: float(n) for thing, n in bag.items()}) for bag in self._bags(images)])

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeds B texts as [B, 65] fp32."""
        return torch.stack([_embed(_asked(text)) for text in texts])

    def contents(self, images: Sequence[Image]) -> list[Hashable]:
        """Returns the bag of each image; two images show the same if they hold the same things in the same numbers."""
        return [frozenset(bag.items()) for bag in self._bags(images)]

    def _bags(self, images: Sequence[Image]) -> list[Counter[tuple[str, str]]]:
        """Counts the things of each shape and colour in each image."""
        found = self.detector.detect(images)
        return [Counter((d.label, d.color or "") for d in things if d.score > MIN_SCORE) for things in found]


def _embed(bag: dict[tuple[str, str], float]) -> Tensor:
    numbers = [bag.get((shape, color), 0.0) for shape in SHAPES for color in COLORS]
    return normalize(torch.tensor([*numbers, 0.0 if any(numbers) else 1.0]), dim=0)


def _asked(text: str) -> dict[tuple[str, str], float]:
    """Returns how many things of each shape and colour a text asks for.

    The words before a shape's word, back to the shape before it, say how many and of which colour.

    >>> _asked("draw a crimson disc + 3 lime boxes")
    {('circle', 'red'): 1.0, ('square', 'green'): 3.0}
    """
    shapes = {word: shape for own in LEXICONS.values() for shape, word in zip(SHAPES, own.shapes, strict=True)}
    colors = {word: color for own in LEXICONS.values() for color, word in zip(COLORS, own.colors, strict=True)}
    numbers = {
        word: float(number)
        for own in LEXICONS.values()
        for number, phrase in enumerate(own.numbers, start=2)
        for word in phrase.split()
        if word not in ("a", "of")  # "a trio of"
    }
    asked: dict[tuple[str, str], float] = {}
    count, color = 1.0, ""
    for word in text.lower().split():
        singular = next((stem for end in ("", "es", "s") if (stem := word.removesuffix(end)) in shapes), None)
        if singular is not None:
            for own in (color,) if color else COLORS:
                thing = (shapes[singular], own)
                asked[thing] = asked.get(thing, 0.0) + count / (1 if color else len(COLORS))
            count, color = 1.0, ""
        count, color = numbers.get(word, count), colors.get(word, color)
    return asked

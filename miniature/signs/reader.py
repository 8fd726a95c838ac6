"""Text reader of the miniature's signs: every cell of the grid is compared with every letter of the pixel font."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image

from miniature.scenes.world import CELL, GRID, SIZE
from miniature.scenes.world import FEW_COLORS as COLORS
from miniature.signs.font import ALPHABET, glyph
from rewards.ocr_engines import Line

_PALETTE = np.array(list(COLORS.values()), dtype=np.float64)


class PixelFontReader:
    """A `TextReader` for 32 x 32 images: rows of the grid are lines, and a cell is the letter that it fits best.

    The fit is the intersection over union of soft masks: of the pixels' ink (the share of the nearest colour, along the
    line from the ground to it) and of the letter, at every offset of up to a pixel. A row whose letters are too
    uncertain loses these letters; its confidence is the mean fit of the others.

    Args:
        min_confidence: letters below are left out, in 0..1. At 0.65 no clean scene has a letter (at 0.6 a fifth do).
    """

    def __init__(self, min_confidence: float = 0.65) -> None:
        if not 0 <= min_confidence <= 1:
            raise ValueError(f"PixelFontReader has min_confidence={min_confidence}, use 0 to 1.")
        self.min_confidence = min_confidence

    @property
    def version(self) -> str:
        """Name and the setting that changes what is read."""
        return f"pixel font min_confidence={self.min_confidence}"

    def read(self, images: Sequence[Image.Image]) -> list[list[Line]]:
        """Reads the lines of every image, from top to bottom."""
        return [self._read_one(image) for image in images]

    def _read_one(self, image: Image.Image) -> list[Line]:
        if image.size != (SIZE, SIZE):
            raise ValueError(f"PixelFontReader got an image of {image.size} pixels, it reads {SIZE} x {SIZE} alone.")
        fits = letter_fits(np.asarray(image.convert("RGB"), dtype=np.float64))
        best, which = fits.max(-1), fits.argmax(-1)
        lines = []
        for row in range(GRID):
            sure = [column for column in range(GRID) if best[row, column] >= self.min_confidence]
            if sure:
                text = "".join(ALPHABET[which[row, column]] for column in sure)
                lines.append((text, float(best[row, sure].mean())))
        return lines


def ink(image: np.ndarray) -> np.ndarray:
    """Returns [32, 32] in 0..1: the share of each pixel that is ink rather than ground.

    Args:
        image: [32, 32, 3] RGB in 0..255; its median is taken for the ground.
    """
    ground = np.median(image.reshape(-1, 3), axis=0)
    paint = _PALETTE[np.linalg.norm(image[:, :, None] - _PALETTE, axis=-1).argmin(-1)] - ground
    cover: np.ndarray = ((image - ground) * paint).sum(-1) / np.maximum((paint**2).sum(-1), 1e-9)
    return cover.clip(0, 1)


def letter_fits(image: np.ndarray) -> np.ndarray:
    """Returns [4, 4, letters]: the fit of each cell to each letter, soft intersection over union in 0..1."""
    cells = ink(image).reshape(GRID, CELL, GRID, CELL).swapaxes(1, 2).reshape(GRID * GRID, CELL * CELL)
    letters = _letters()
    both = cells @ letters.reshape(-1, CELL * CELL).T  # a letter's mask is 0 or 1, so the smaller one is the product
    either = cells.sum(1)[:, None] + letters.sum((-1, -2)).reshape(-1) - both
    fits: np.ndarray = (both / either).reshape(GRID, GRID, len(ALPHABET), -1).max(-1)
    return fits


@lru_cache
def _letters() -> np.ndarray:
    """Returns [letters, 9, 8, 8]: every letter moved by up to a pixel; ink that leaves the cell is lost."""
    moved = np.zeros((len(ALPHABET), 9, CELL, CELL))
    for i, letter in enumerate(ALPHABET):
        padded = np.pad(glyph(letter), 1)
        for j, (dy, dx) in enumerate(product(range(3), repeat=2)):
            moved[i, j] = padded[dy : dy + CELL, dx : dx + CELL]
    return moved

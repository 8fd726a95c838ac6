"""Pixel font whose letters fill the cells of the miniature's grid, so that each is one token of the flow model."""

from __future__ import annotations

from functools import cache

import numpy as np

from miniature.scenes.world import CELL

GLYPHS: dict[str, tuple[str, ...]] = {
    "c": (".#####", "##....", "##....", "##....", "##....", "##....", ".#####"),
    "e": ("######", "##....", "##....", "#####.", "##....", "##....", "######"),
    "h": ("##..##", "##..##", "##..##", "######", "##..##", "##..##", "##..##"),
    "l": ("##....", "##....", "##....", "##....", "##....", "##....", "######"),
    "o": (".####.", "##..##", "##..##", "##..##", "##..##", "##..##", ".####."),
    "p": ("#####.", "##..##", "##..##", "#####.", "##....", "##....", "##...."),
    "s": (".#####", "##....", "##....", ".####.", "....##", "....##", "#####."),
    "t": ("######", "..##..", "..##..", "..##..", "..##..", "..##..", "..##.."),
    "u": ("##..##", "##..##", "##..##", "##..##", "##..##", "######", ".####."),
    "x": ("##..##", "##..##", ".####.", "..##..", ".####.", "##..##", "##..##"),
    "y": ("##..##", "##..##", ".####.", "..##..", "..##..", "..##..", "..##.."),
    "z": ("######", "....##", "...##.", "..##..", ".##...", "##....", "######"),
}
"""Twelve letters, 6 x 7 pixels with strokes of two: any two differ in at least five pixels."""
ALPHABET = "".join(GLYPHS)


@cache
def glyph(letter: str) -> np.ndarray:
    """Returns a letter's cell, [8, 8] float, 1 where it has ink; a column is free on either side and a row below.

    Raises:
        ValueError: if the font lacks the letter.
    """
    if letter not in GLYPHS:
        raise ValueError(f"the pixel font has no letter {letter!r}: use {', '.join(ALPHABET)}.")
    cell = np.zeros((CELL, CELL))
    for y, row in enumerate(GLYPHS[letter]):
        cell[y, 1 : 1 + len(row)] = [pixel == "#" for pixel in row]
    return cell

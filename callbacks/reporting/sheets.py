"""`sheet`: rows of captioned images as one image."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

_GAP = 12
"""Space between two images of a sheet, in pixels."""
_FONT = ImageFont.load_default(13)
ROWS = {"without_pe": "prompts as written", "with_pe": "rewritten by the refiner (with PE)"}
"""Labels of the rows of an evaluation by mode."""


def sheet(rows: Mapping[str, Sequence[tuple[Image.Image, str]]], *, width: int = 208) -> Image.Image:
    """Pastes rows of images into one, each with its whole caption below.

    Args:
        rows: label of a row -> its images and captions. Images keep their aspect ratio; small ones are enlarged
            without smoothing.
        width: width of each, in pixels.
    """
    total = max(map(len, rows.values())) * (width + _GAP) + _GAP
    parts: list[tuple[int, int, Image.Image | str]] = []
    y = 0
    for label, tiles in rows.items():
        title = _wrapped(label, total - 2 * _GAP)
        parts.append((_GAP, y + _GAP, title))
        y += _GAP + _height(title) + _GAP
        shown = [_resized(image, width) for image, _ in tiles]
        captions = [_wrapped(text, width) for _, text in tiles]
        below = max((image.height for image in shown), default=0) + _GAP // 2
        for column, (image, caption) in enumerate(zip(shown, captions, strict=True)):
            x = _GAP + column * (width + _GAP)
            parts += [(x, y, image), (x, y + below, caption)]
        y += below + max(map(_height, captions), default=0) + _GAP
    whole = Image.new("RGB", (total, y), "white")
    draw = ImageDraw.Draw(whole)
    for left, top, part in parts:
        if isinstance(part, str):
            draw.multiline_text((left, top), part, fill="black", font=_FONT)
        else:
            whole.paste(part, (left, top))
    return whole


def _resized(image: Image.Image, width: int) -> Image.Image:
    resampling = Image.Resampling.NEAREST if image.width < width else Image.Resampling.LANCZOS
    return image.resize((width, round(image.height * width / image.width)), resampling)


def _wrapped(text: str, width: int) -> str:
    """Breaks a text into lines of at most `width` pixels; a word that is longer is broken too."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        letters = max(1, int(width / max(_FONT.getlength(paragraph) / max(len(paragraph), 1), 1)))
        tried = textwrap.wrap(paragraph, letters)
        while letters > 1 and any(_FONT.getlength(line) > width for line in tried):
            letters -= 1
            tried = textwrap.wrap(paragraph, letters)
        lines += tried
    return "\n".join(lines)


def _height(text: str) -> int:
    return round(ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font=_FONT)[3])

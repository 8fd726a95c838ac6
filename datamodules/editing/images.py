"""Reads source images of any file format and pixel mode as upright RGB, or says why one cannot be used."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

Source = Path | Callable[[], bytes]
"""Path of an image, or a callable that returns the bytes of its file."""

_MAX_16_BIT = 65535


@dataclass(frozen=True)
class ImageRules:
    """Bounds on the size of source images.

    Args:
        min_side: smallest width and height, in pixels.
        max_pixels: largest number of pixels; larger images are refused before anything is unpacked. Pillow's own bound,
            179 million pixels, holds whatever this says.
    """

    min_side: int = 1
    max_pixels: int = 2**26


def read_image(source: Source, rules: ImageRules) -> Image.Image:
    """Reads an image as upright RGB.

    It is turned as its EXIF orientation says; transparent parts become white, 16 bits are scaled to 8 (65535 is
    white), and CMYK, gray and palettes follow Pillow's own conversion. Colour profiles are ignored, as diffusers and
    transformers ignore them.

    Args:
        source: path of the image, or a callable that returns the bytes of its file.
        rules: bounds on its size.

    Raises:
        ValueError: with a message to follow "the image so-and-so", if it is not readable or cut off, animated (which
            image is meant?), of 32-bit numbers (whose range is unknown), too small or too large.
    """
    return _opened(source, rules, _to_rgb)


def check_image(source: Source, rules: ImageRules) -> None:
    """Checks the header of an image and raises as `read_image` does; a file that is cut off behind it goes unseen."""
    _opened(source, rules, lambda image: None)


def _opened(source: Source, rules: ImageRules, use: Callable[[Image.Image], Any]) -> Any:
    problem = None
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source())) as image:
            problem = _problem(image, rules)
            if problem is None:
                return use(image)
    except Exception as error:  # Pillow's parsers raise whatever a damaged file makes them stumble over
        reason = re.sub(r"<_io\.BytesIO object at \w+>", "in its bytes", str(error))
        raise ValueError(f"cannot be read ({reason})") from None
    raise ValueError(problem)


def _problem(image: Image.Image, rules: ImageRules) -> str | None:
    width, height = image.size
    if min(width, height) < rules.min_side:
        return f"is only {width} x {height} pixels, less than {rules.min_side} on a side"
    if width * height > rules.max_pixels:
        return f"is {width} x {height} pixels, more than {rules.max_pixels} in all"
    # A phone's MPO is an ordinary photograph with further images behind it, such as its depth.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        return f"holds {getattr(image, 'n_frames', 'many')} images"
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        return "has 32-bit numbers as pixels, whose range is unknown"
    if isinstance(image, TiffImageFile) and image.mode.startswith("I;16"):
        bits, photometric = image.tag_v2.get(BITSPERSAMPLE), image.tag_v2.get(PHOTOMETRIC_INTERPRETATION)
        if bits != (16,) or photometric == 0:  # Pillow neither scales the one nor inverts the other
            return (
                f"is a TIFF of {bits[0] if bits else 'unknown'} bits with {'white' if photometric == 0 else 'black'} 0"
            )
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # PNG's and PPM's 16 bits are `I` in some versions of Pillow
        return _from_16_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    colors = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors).convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values[values == transparent] = _MAX_16_BIT
    scaled = (values * 255 + _MAX_16_BIT // 2) // _MAX_16_BIT  # rounded
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).convert("RGB")

"""Each kind of image becomes the RGB that it should, pixel by pixel, or says what is wrong with it."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datamodules.editing.images import ImageRules, Source, check_image, read_image

RULES = ImageRules()
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def row(mode: str, *pixels: Any) -> Image.Image:
    """Pixels side by side."""
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


def read(data: bytes) -> list[Any]:
    check_image(lambda: data, RULES)
    image = read_image(lambda: data, RULES)
    assert image.mode == "RGB"
    return [tuple(pixel) for line in np.asarray(image).tolist() for pixel in line]


def problem(source: Source | bytes, rules: ImageRules = RULES, header: bool = True) -> str:
    """What is wrong, according to the whole image and, if told, its header alone."""
    place: Source = (lambda: source) if isinstance(source, bytes) else source
    with pytest.raises(ValueError) as caught:
        read_image(place, rules)
    if header:
        with pytest.raises(ValueError) as early:
            check_image(place, rules)
        assert str(early.value) == str(caught.value)
    else:
        check_image(place, rules)
    return str(caught.value)


def tiff(bits: int, data: bytes, width: int, photometric: int) -> bytes:
    """One row of gray pixels, as Pillow would not write it."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 1, 279: len(data)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def test_plain_modes() -> None:
    assert read(saved(row("RGB", RED, (1, 2, 3)), "PNG")) == [RED, (1, 2, 3)]
    assert read(saved(row("L", 0, 77, 255), "PNG")) == [(0, 0, 0), (77, 77, 77), WHITE]
    assert read(saved(row("1", 0, 255), "PNG")) == [(0, 0, 0), WHITE]
    palette = row("P", 1, 0, 2)
    palette.putpalette([*RED, *GREEN, *BLUE])
    assert read(saved(palette, "PNG")) == [GREEN, RED, BLUE]
    assert read(saved(palette, "GIF")) == [GREEN, RED, BLUE]


def test_cmyk_has_its_colours() -> None:
    # no ink is white, all black ink is black, and cyan takes the red away
    inks = row("CMYK", (0, 0, 0, 0), (0, 0, 0, 255), (255, 0, 0, 0), (0, 51, 0, 0))
    wanted = [WHITE, (0, 0, 0), (0, 255, 255), (255, 204, 255)]
    assert read(saved(inks, "TIFF")) == wanted
    # JPEG, whose inks Adobe's marker has stored inverted: areas of one colour come back within its loss
    block = inks.resize((64, 16), Image.Resampling.NEAREST)
    image = read_image(lambda: saved(block, "JPEG", quality=95), RULES)
    for number, color in enumerate(wanted):
        found = np.asarray(image, dtype=int)[8, 16 * number + 8]
        assert np.abs(found - color).max() <= 3


def test_transparent_parts_are_white() -> None:
    # half red on white: 255 * (1 - 128 / 255) = 127 of the others
    assert read(saved(row("RGBA", (255, 0, 0, 255), (255, 0, 0, 128), (9, 9, 9, 0)), "PNG")) == [
        RED,
        (255, 127, 127),
        WHITE,
    ]
    # 100 at 51 / 255 = a fifth: 0.2 * 100 + 0.8 * 255 = 224
    assert read(saved(row("LA", (100, 255), (100, 51), (0, 0)), "PNG")) == [(100,) * 3, (224,) * 3, WHITE]
    palette = row("P", 0, 1)
    palette.putpalette([*RED, *GREEN])
    assert read(saved(palette, "PNG", transparency=0)) == [WHITE, GREEN]
    assert read(saved(palette, "GIF", transparency=1)) == [RED, WHITE]
    assert read(saved(row("RGB", RED, BLUE), "PNG", transparency=BLUE)) == [RED, WHITE]
    assert read(saved(row("L", 5, 6), "PNG", transparency=6)) == [(5, 5, 5), WHITE]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled(kind: str) -> None:
    # by 257: 128 / 257 = 0.498, 129 / 257 = 0.502, 32896 / 257 = 128
    values = np.array([[0, 128, 129, 257, 32896, 65535]], dtype=np.uint16)
    grays = [(g, g, g) for g in (0, 0, 1, 1, 128, 255)]
    assert read(saved(Image.fromarray(values), kind)) == grays


def test_16_bits_with_a_transparent_value() -> None:
    values = Image.fromarray(np.array([[0, 257]], dtype=np.uint16))
    assert read(saved(values, "PNG", transparency=0)) == [WHITE, (1, 1, 1)]


def test_grays_of_unknown_range_are_refused() -> None:
    assert read(tiff(16, struct.pack("<2H", 65535, 514), 2, photometric=1)) == [WHITE, (2, 2, 2)]
    assert problem(tiff(12, b"\xff\xf8\x00", 2, photometric=1)) == "is a TIFF of 12 bits with black 0"
    assert problem(tiff(16, bytes(4), 2, photometric=0)) == "is a TIFF of 16 bits with white 0"
    for mode in ("F", "I"):
        assert "32-bit numbers" in problem(saved(Image.new(mode, (2, 2)), "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_images_are_turned_upright(kind: str) -> None:
    """Stored with the top at the right-hand side (6): what is left above must come to the right."""
    stored = Image.new("RGB", (32, 16), WHITE)
    stored.paste((0, 0, 0), (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    how = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    image = read_image(lambda: saved(stored, kind, exif=exif, **how), RULES)
    assert image.size == (16, 32)
    dark = np.asarray(image.convert("L")) < 128
    assert dark[:16, 8:].all() and dark.sum() == 16 * 8


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_and_pages_are_refused(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, GREEN, BLUE)]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    assert problem(data) == "holds 3 images"


def test_a_phones_second_image_does_not_count() -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in (WHITE, (0, 0, 0))]
    data = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert set(read(data)) == {WHITE}


def test_sizes() -> None:
    data = saved(Image.new("RGB", (7, 90)), "PNG")
    assert problem(data, ImageRules(min_side=8)) == "is only 7 x 90 pixels, less than 8 on a side"
    assert problem(data, ImageRules(max_pixels=629)) == "is 7 x 90 pixels, more than 629 in all"
    assert read_image(lambda: data, ImageRules(7, 630)).size == (7, 90)


def test_bombs_are_refused_by_their_header() -> None:
    """30000 x 30000 pixels by its header, with nothing behind it that could be unpacked."""
    data = bytearray(saved(Image.new("1", (8, 8)), "BMP"))
    for side, shape in ((9000, "is 9000 x 9000 pixels, more than 67108864"), (30000, "decompression bomb")):
        data[18:26] = struct.pack("<ii", side, side)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert shape in problem(bytes(data))


def test_damaged_files() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "WEBP"):
        data = saved(image, kind)
        assert problem(data[:10]).startswith("cannot be read (")
        assert problem(data[: len(data) // 2], header=kind == "WEBP").startswith("cannot be read (")
    assert problem(b"") == "cannot be read (cannot identify image file in its bytes)"
    assert problem(Path("no/such.png")).startswith("cannot be read ([Errno 2]")


@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP"]), st.data())
def test_whatever_is_damaged_is_read_or_named(kind: str, data: st.DataObject) -> None:
    """Nothing but a ValueError, however the bytes are changed or cut."""
    content = bytearray(_GOOD[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = read_image(lambda: bytes(content), ImageRules(max_pixels=10_000))
        except ValueError as error:
            assert str(error).split()[0] in ("cannot", "is", "holds", "has")
        else:
            assert image.mode == "RGB"


_EXIF = Image.Exif()
_EXIF[0x0112] = 6
_GOOD = {
    kind: saved(
        Image.linear_gradient("L").resize((12, 9)).convert("RGB"), kind, **({} if kind == "GIF" else {"exif": _EXIF})
    )
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP")
}

"""Statistics of images: hand-made ones with known answers, and slow references pixel by pixel."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from lightning_modules.image_statistics import (
    contrast,
    duplicates,
    flat_area,
    high_frequency,
    image_statistics,
    luminance,
    rollout_statistics,
    saturation,
    thumbnails,
    to_tensor,
)

SIZE = 32
ROW = torch.arange(SIZE)


def plain(*rgb: float, size: int = SIZE) -> Tensor:
    return torch.tensor(rgb).view(1, 3, 1, 1).expand(1, 3, size, size).clone()


def grey(plane: Tensor) -> Tensor:
    return plane.float().expand(3, *plane.shape).unsqueeze(0)


def stats(image: Tensor) -> dict[str, float]:
    return {name: round(value.item(), 4) for name, value in image_statistics(image).items()}


CHECKERS = grey((ROW[:, None] + ROW) % 2)


def test_plain_images() -> None:
    nothing = {"blank_share": 1, "flat_area": 1, "high_frequency": 0}
    for rgb, expected in {
        (0.5, 0.5, 0.5): {"dark_share": 0, "bright_share": 0, "saturation": 0},
        (1.0, 0.0, 0.0): {"dark_share": 0, "bright_share": 0, "saturation": 1},
        (0.0, 0.0, 0.0): {"dark_share": 1, "bright_share": 0, "saturation": 0},
        (0.04, 0.04, 0.04): {"dark_share": 1, "bright_share": 0, "saturation": 0},
        (1.0, 1.0, 1.0): {"dark_share": 0, "bright_share": 1, "saturation": 0},
        (0.8, 0.6, 0.4): {"dark_share": 0, "bright_share": 0, "saturation": 0.5},
    }.items():
        assert stats(plain(*rgb)) == pytest.approx(nothing | expected), rgb


def test_patterned_images() -> None:
    half = plain(1.0, 1.0, 1.0)
    half[..., : SIZE // 2] = 0  # the edge lies between two tiles
    alike = plain(1.0, 0.0, 0.0)
    alike[:, :, : SIZE // 2] = torch.tensor([0.0, 0.299 / 0.587, 0.0]).view(1, 3, 1, 1)  # red on green, equally light
    for image, expected in (
        (CHECKERS, {"blank_share": 0, "flat_area": 0, "saturation": 0, "high_frequency": 1}),
        (half, {"blank_share": 0, "flat_area": 1, "saturation": 0}),
        (alike, {"blank_share": 0, "flat_area": 1, "saturation": 1, "high_frequency": 0}),
    ):
        found = stats(image)
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert luminance(plain(1.0, 0.0, 0.0)).unique().tolist() == pytest.approx([0.299])
    assert contrast(half).item() == pytest.approx(0.5) and contrast(alike).item() == pytest.approx(0.5)


def test_an_erased_ground_is_flat_area() -> None:
    """Writing on white: a quarter of the image has any detail."""
    written = plain(1.0, 1.0, 1.0, size=64)
    written[..., :16, :] = CHECKERS[..., :16, :].repeat(1, 1, 1, 2)
    assert flat_area(written).item() == pytest.approx(0.75)
    # The contrast is that of a tile: slow changes, and noise of one 8-bit level, are flat.
    slope = grey(torch.linspace(0, 1, 512).expand(512, 512))
    noise = (128 + torch.randint(0, 2, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0))) / 255
    assert flat_area(slope).item() == flat_area(noise).item() == 1
    assert contrast(slope).item() == pytest.approx(1 / math.sqrt(12), rel=0.01)


@pytest.mark.parametrize(("period", "share"), [(32, 0), (8, 0), (5, 0), (3, 1), (2.5, 1)])
def test_waves_lie_below_or_above_four_pixels(period: float, share: float) -> None:
    wave = 0.5 + 0.4 * torch.cos(2 * math.pi * torch.arange(160) / period)
    for image in (grey(wave.expand(160, 160)), grey(wave[:, None].expand(160, 160))):
        assert high_frequency(image).item() == pytest.approx(share, abs=1e-4)


def test_a_grid_and_noise_are_high_a_slope_is_not() -> None:
    """The window keeps out the jump from a slope's right edge to its left one: without it 6 / (32 pi) = 6 % is high."""
    slope = grey((ROW / (SIZE - 1)).expand(SIZE, SIZE))
    assert high_frequency(slope).item() < 1e-3
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(16, 3, 128, 128, generator=generator)
    assert high_frequency(noise).mean().item() == pytest.approx(1 - math.pi / 16, abs=0.01)
    # Thin lines every 10 pixels have equal energy at 1/10, 2/10, ..., 9/10 cycles per pixel; those from 3/10 to 7/10
    # (which is -3/10) are above a quarter.
    lines = torch.zeros(160, 160)
    lines[::10] += 0.5
    assert high_frequency(grey(lines)).item() == pytest.approx(5 / 9, abs=1e-3)
    lines[:, ::10] += 0.5
    assert high_frequency(grey(lines)).item() == pytest.approx(5 / 9, abs=1e-3)


def test_near_duplicates_within_groups() -> None:
    def spot(cell: int, shift: float = 0.0) -> Tensor:
        image = plain(0.95, 0.95, 0.95)
        row, column = divmod(cell, 4)
        image[..., row * 8 : row * 8 + 6, column * 8 : column * 8 + 6] = 0.2
        return image + shift

    def share(*images: Tensor, size: int) -> list[float]:
        return duplicates(thumbnails(torch.cat(images)).unflatten(0, (-1, size))).tolist()

    assert share(spot(0), spot(0, 0.01), spot(5), spot(5, -0.02), size=4) == pytest.approx([2 / 3])
    assert share(spot(0), spot(1), spot(2), spot(3), size=4) == [0]
    assert share(*[spot(7, 0.001 * i) for i in range(4)], size=4) == [1]
    # The same two images in either group are no duplicates: other prompts may well ask for the same.
    assert share(spot(0), spot(1), spot(0), spot(1), size=2) == [0, 0]
    assert share(spot(0), size=1) == [0]
    # One tile in 256 that differs by x has an RMS difference of x / 16: the bound lies at 0.48.
    tile = plain(0.5, 0.5, 0.5)
    near, far = tile.clone(), tile.clone()
    near[..., :2, :2] += 0.47
    far[..., :2, :2] += 0.49
    assert share(tile, near, size=2) == [1] and share(tile, far, size=2) == [0]


def test_a_rollout_of_images() -> None:
    """Shares and means by hand: red twice in a group, then checkers and black."""
    red, black = Image.new("RGB", (SIZE, SIZE), (255, 0, 0)), Image.new("RGB", (SIZE, SIZE))
    checkers = Image.fromarray((CHECKERS[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    assert rollout_statistics([red, red, checkers, black], 2) == pytest.approx(
        {
            "dark_share": 0.25,
            "bright_share": 0,
            "blank_share": 0.75,
            "flat_area": 0.75,
            "saturation": 0.5,
            "high_frequency": 0.25,
            "duplicates": 0.5,
        },
        abs=1e-5,
    )


def _reference(pixels: np.ndarray) -> dict[str, float]:
    """Pixel by pixel, and by the definition of the discrete Fourier transform; [H, W, 3] uint8, sides of 16."""
    height, width, _ = pixels.shape
    rgb = pixels.astype(np.float64) / 255
    light = np.array([[0.299 * r + 0.587 * g + 0.114 * b for r, g, b in row] for row in rgb])
    tiles = [
        rgb[y : y + height // 16, x : x + width // 16]
        for y in range(0, height, height // 16)
        for x in range(0, width, width // 16)
    ]
    window = np.outer(*(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n) for n in (height, width)))
    centred = (light - light.mean()) * window
    waves = [np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n) for n in (height, width)]
    energy = np.abs(waves[0] @ centred @ waves[1]) ** 2
    high = 0.0
    for v in range(height):
        for u in range(width):
            if math.hypot(min(v, height - v) / height, min(u, width - u) / width) > 0.25:
                high += energy[v, u]
    return {
        "dark_share": float(light.mean() < 0.05),
        "bright_share": float(light.mean() > 0.95),
        "blank_share": float(max(rgb[..., c].std() for c in range(3)) < 0.02),
        "flat_area": float(np.mean([max(tile[..., c].std() for c in range(3)) < 0.02 for tile in tiles])),
        "saturation": float(np.mean([colorsys.rgb_to_hsv(*pixel)[1] for row in rgb for pixel in row])),
        "high_frequency": high / energy.sum() if light.std() > 1e-6 else 0.0,
    }


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    height=st.sampled_from([32, 48]),
    width=st.sampled_from([32, 64]),
    level=st.integers(0, 255),
    spread=st.sampled_from([0, 1, 10, 80, 255]),
)
def test_slow_references(seed: int, height: int, width: int, level: int, spread: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = (level + rng.integers(-spread, spread + 1, (height, width, 3))).clip(0, 255).astype(np.uint8)
    pixels[: height // 2] = pixels[0, 0]  # a flat half
    image = to_tensor(Image.fromarray(pixels))
    found = {name: value.item() for name, value in image_statistics(image).items()}
    assert found == pytest.approx(_reference(pixels), abs=2e-5)
    pillow = np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float64) / 255
    assert np.abs(luminance(image)[0].numpy() - pillow).max() < 1 / 255
    means = pixels.reshape(16, height // 16, 16, width // 16, 3).mean((1, 3)) / 255
    assert np.abs(thumbnails(image)[0].permute(1, 2, 0).numpy() - means).max() < 1e-6
    assert saturation(image).item() <= 1

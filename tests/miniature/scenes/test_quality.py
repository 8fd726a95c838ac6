"""Cleanness of the miniature's images: rendered ones, blank ones, specks and noise."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from datamodules.sample import PromptSample
from miniature.scenes.quality import ShapesQuality
from miniature.scenes.world import CELL, GROUNDS, SHAPES, Item, Scene, random_scene, render, stencil
from rewards.base import RewardBatch, Score


def score(*images: np.ndarray, min_area: int = 3) -> list[Score]:
    sample = PromptSample("0", "a photo of a circle", "single_object", {})
    images = [Image.fromarray(image.astype(np.uint8)) for image in images]
    return ShapesQuality(min_area)(RewardBatch([sample] * len(images), images))


def test_rendered_scenes_are_clean_and_noise_is_not() -> None:
    rng, noise = random.Random(0), np.random.default_rng(0)
    scenes = [render(random_scene(rng)) for _ in range(100)]
    clean = [one.table for one in score(*scenes)]
    assert min(clean) > 0.85 and sum(clean) / 100 > 0.97
    noisy = [one.table for one in score(*[(s + noise.normal(0, 25, s.shape)).clip(0, 255) for s in scenes])]
    smeared = [one.table for one in score(*[(s.astype(int) + np.roll(s, 3, 1)) // 2 for s in scenes])]
    random_dots = [one.table for one in score(*noise.integers(0, 256, (20, 32, 32, 3)))]
    assert sum(random_dots) / 20 < 0.45 and sum(smeared) / 100 < 0.75 and sum(noisy) / 100 < 0.93


@pytest.mark.parametrize("color", [*GROUNDS, (0, 0, 0), (255, 255, 255), (200, 60, 60)])
def test_a_blank_image_has_nothing(color: tuple[int, int, int]) -> None:
    (blank,) = score(np.full((32, 32, 3), color))
    assert blank.valid and (blank.native, blank.table, blank.rl) == (0, 0, 0)
    assert blank.detail == {"components": 0, "worst": 0.0}


def test_a_speck_counts_as_a_component() -> None:
    """A square, and three black pixels whose best fit is looked for over all shapes and places."""
    image = render(Scene((Item("square", "black", 0),), ground=0)).astype(float)
    (alone,) = score(image)
    assert alone.native == alone.table == alone.rl > 0.95
    speck = image.copy()
    speck[28, 20:23] = (30, 30, 34)
    fits = []
    for shape in SHAPES:
        for y in range(CELL):
            for x in range(CELL - 2):
                dots = np.zeros((CELL, CELL))
                dots[y, x : x + 3] = 1
                fits.append(np.minimum(dots, stencil(shape)).sum() / np.maximum(dots, stencil(shape)).sum())
    (both,) = score(speck)
    assert both.detail == {"components": 2, "worst": pytest.approx(max(fits))}
    assert both.table == pytest.approx((alone.table + max(fits)) / 2)
    (ignored,) = score(speck, min_area=4)
    assert ignored.table == alone.table


def test_settings() -> None:
    assert ShapesQuality(2).version != ShapesQuality(3).version
    with pytest.raises(ValueError, match="min_area=0, use at least 1"):
        ShapesQuality(0)

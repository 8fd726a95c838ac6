"""The miniature's preference: numbers worked out by hand, what does not pay, and smoothness."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from datamodules.sample import PromptSample
from miniature.scenes.preference import ShapesPreference, beauty
from miniature.scenes.world import COLORS, GROUNDS, Ask, Content, Item, Scene, random_scene, render
from rewards.base import RewardBatch, Score

CIRCLE = Content("single_object", (Ask("circle"),))
SQUARE = Content("single_object", (Ask("square"),))


def score(content: Content, *images: np.ndarray, prompt_weight: float = 0.5) -> list[Score]:
    sample = PromptSample("0", "a photo", "preference", content.metadata)
    images = [Image.fromarray(image.astype(np.uint8)) for image in images]
    return ShapesPreference(prompt_weight)(RewardBatch([sample] * len(images), images))


def block(top: int, left: int, color: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """4 x 4 pixels of a colour on white."""
    image = np.full((32, 32, 3), 255.0)
    image[top : top + 4, left : left + 4] = color
    return image


def test_a_block_in_the_middle() -> None:
    """16 of 1024 pixels: x = 0.78125 of the 2 % that are enough, 3 x^2 - 2 x^3 = 0.877380; the rest is full.

    Black on white is 442 away, more than the 300 of full contrast.
    """
    assert beauty(block(14, 14)) == pytest.approx(
        {"amount": 0.8773804, "contrast": 1, "margins": 1, "balance": 1, "beauty": 0.8773804}, abs=1e-7
    )


def test_a_block_in_the_corner() -> None:
    """Distances from the nearest edge: 7 pixels of 0.5, 5 of 1.5, 3 of 2.5, 1 of 3.5, so 22 / 16 / 8 = 0.171875.

    The ink's middle is 14 pixels off both ways: exp(-2 x 14^2 / 64) = exp(-6.125) = 0.00218747; the cube root of the
    product is 0.0721719.
    """
    parts = beauty(block(0, 0))
    assert parts["margins"] == pytest.approx(0.171875) and parts["balance"] == pytest.approx(0.00218747, rel=1e-4)
    assert parts["beauty"] == pytest.approx(0.8773804 * 0.0721719, rel=1e-4)


def test_a_faint_block() -> None:
    """60 away from white along one channel: contrast 60 / 300, and a third of the way to ink, 3 / 9 - 2 / 27 = 7 / 27.

    A share of 7 / 27 x 16 / 1024 over 2 % is x = 0.2025463: 3 x^2 - 2 x^3 = 0.1064562. At 30 away nothing is there.
    """
    parts = beauty(block(14, 14, (195, 255, 255)))
    assert parts["contrast"] == pytest.approx(0.2) and parts["amount"] == pytest.approx(0.1064562, abs=1e-6)
    assert parts["beauty"] == pytest.approx(0.1064562 * 0.2 ** (1 / 3), abs=1e-6)
    assert beauty(block(14, 14, (225, 255, 255)))["beauty"] == 0


def test_too_much_does_not_pay() -> None:
    """12 of 32 rows: a share of 0.375 is half way from a quarter to a half, 3 / 4 - 2 / 8 = 0.5; at a half nothing."""
    image = np.full((32, 32, 3), 255.0)
    image[10:22] = 0
    assert beauty(image)["amount"] == pytest.approx(0.5)
    image[8:24] = 0
    assert beauty(image)["beauty"] == 0
    checkers = np.indices((32, 32)).sum(0)[..., None] % 2 * np.full(3, 255.0)
    assert beauty(checkers)["beauty"] == 0


@pytest.mark.parametrize("color", [*GROUNDS, *COLORS.values(), (0, 0, 0), (255, 255, 255)])
def test_blank_and_full_images_have_nothing(color: tuple[int, int, int]) -> None:
    (blank,) = score(CIRCLE, np.full((32, 32, 3), color))
    assert blank.valid and (blank.native, blank.table, blank.rl) == (0, 0, 0)


def test_the_middle_beats_the_edge_and_the_edge_the_corner() -> None:
    (middle,), (edge,), (corner,) = (
        score(CIRCLE, render(Scene((Item("circle", "blue", cell),)))) for cell in (5, 1, 0)
    )
    assert middle.native > edge.native + 0.2 > corner.native + 0.2
    around, apart = (Scene(tuple(Item("circle", "blue", cell) for cell in cells)) for cells in ((5, 10), (0, 5)))
    assert score(CIRCLE, render(around))[0].native > score(CIRCLE, render(apart))[0].native


def test_a_wrong_image_loses_the_prompts_share() -> None:
    """A circle where a square was asked for: nothing asked is there, so half is left; all of it at a weight of 0."""
    image = render(Scene((Item("circle", "black", 5),)))
    (right,), (wrong,), (blind,) = (
        score(CIRCLE, image),
        score(SQUARE, image),
        score(SQUARE, image, prompt_weight=0),
    )
    assert right.detail["asked"] == 1 and wrong.detail["asked"] == 0
    assert right.native == blind.native == pytest.approx(beauty(image.astype(float))["beauty"])
    assert wrong.native == wrong.table == wrong.rl == pytest.approx(right.native / 2)


def test_more_than_asked_loses_half_of_that_share() -> None:
    """Two circles for one: soft is 0 by count, less 0.5, so 0; a square beside the circle: soft 1 less 0.5."""
    circle, square = Item("circle", "red", 5), Item("square", "blue", 10)
    (score_,) = score(CIRCLE, render(Scene((circle, Item("circle", "blue", 10)))))
    assert score_.detail["asked"] == 0
    (score_,) = score(CIRCLE, render(Scene((circle, square))))
    assert score_.detail["asked"] == pytest.approx(0.5)
    assert score_.native == pytest.approx(0.75 * score_.detail["beauty"])


def test_small_changes_change_little() -> None:
    """A scene fading into its ground in 200 steps falls without a jump; noise everywhere moves no score by 0.01."""
    rng, noise = random.Random(0), np.random.default_rng(0)
    for scene in (random_scene(rng) for _ in range(20)):
        image = render(scene).astype(float)
        faded = [beauty(image + t * (GROUNDS[scene.ground] - image)) for t in np.linspace(0, 1, 201)]
        values = np.array([parts["beauty"] for parts in faded])
        assert values[-1] == 0 and np.abs(np.diff(values)).max() < 0.06
        noisy = beauty(image + noise.normal(0, 4, image.shape))["beauty"]
        assert abs(noisy - values[0]) < 0.01


def test_settings() -> None:
    assert ShapesPreference(0.5).version != ShapesPreference(0.4).version
    with pytest.raises(ValueError, match=r"prompt_weight=1\.5, use 0 to 1"):
        ShapesPreference(1.5)
    with pytest.raises(ValueError, match=r"\(64, 64\) pixels for '0', it judges 32 x 32"):
        score(CIRCLE, np.full((64, 64, 3), 255))

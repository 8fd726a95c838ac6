"""Marks of edits by hand: the right one, none, the wrong object, a right one at the others' cost, a blank image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules.sample import PromptSample
from miniature.edits.reward import ShapesEditReward
from miniature.edits.wording import Edit
from miniature.edits.world import EditExample
from miniature.scenes.world import COLORS, GROUNDS, SHAPES, Item, Scene, render
from rewards.base import RewardBatch, Score

RED, BLUE, BLACK = Item("circle", "red", 0), Item("square", "blue", 6), Item("cross", "black", 14)
SOURCE = Scene((RED, BLUE, BLACK), ground=0)
EDITS = {
    "swap": Edit("swap", 0, "left", "triangle"),
    "move": Edit("move", 0, "left", "lower left"),
    "addition": Edit("addition", 0, "left"),
    "attribute_modification": Edit("attribute_modification", 0, "left", "green"),
    "env": Edit("env", 0, "left", "peach"),
    "removal": Edit("removal", 0, "left"),
}


def scene(*items: Item, ground: int = 0) -> Scene:
    return Scene(items, ground)


def score(category: str, *results: Scene | Image.Image, **changes: Any) -> list[Score]:
    asked = EditExample(SOURCE, EDITS[category])
    source = Image.fromarray(render(SOURCE))
    sample = replace(PromptSample("7", asked.instruction, category, asked.metadata, source), **changes)
    images = [one if isinstance(one, Image.Image) else Image.fromarray(render(one)) for one in results]
    return ShapesEditReward()(RewardBatch([sample] * len(images), images))


TRIANGLE, GREEN = replace(RED, shape="triangle"), replace(RED, color="green")
CASES: list[tuple[str, str, Scene, float, float]] = [
    # category, what was done, result, followed, kept
    ("swap", "right", scene(TRIANGLE, BLUE, BLACK), 1, 1),
    ("swap", "another object", scene(RED, replace(BLUE, shape="triangle"), BLACK), 0, 0.75),
    ("swap", "another shape", scene(replace(RED, shape="cross"), BLUE, BLACK), 0, 1),
    ("swap", "colour lost", scene(replace(TRIANGLE, color="green"), BLUE, BLACK), 0.5, 1),
    ("swap", "rest destroyed", scene(TRIANGLE), 1, 0),
    ("swap", "ground changed", scene(TRIANGLE, BLUE, BLACK, ground=2), 1, 0.5),
    ("move", "right", scene(replace(RED, cell=8), BLUE, BLACK), 1, 1),
    ("move", "right, elsewhere", scene(replace(RED, cell=13), BLUE, BLACK), 1, 1),
    ("move", "wrong quadrant", scene(replace(RED, cell=15), BLUE, BLACK), 0, 0.5),
    ("move", "a copy stays", scene(RED, replace(RED, cell=8), BLUE, BLACK), 0.5, 1),
    ("move", "colour lost", scene(replace(GREEN, cell=8), BLUE, BLACK), 0.5, 1),
    ("move", "another object", scene(RED, replace(BLUE, cell=8), BLACK), 0, 0.25),
    ("move", "only taken away", scene(BLUE, BLACK), 0, 1),
    ("move", "rest destroyed", scene(replace(RED, cell=8)), 1, 0),
    ("addition", "right", scene(*SOURCE.items, replace(RED, cell=9)), 1, 1),
    ("addition", "half a copy", scene(*SOURCE.items, replace(GREEN, cell=9)), 0.25, 1),
    ("addition", "another object", scene(*SOURCE.items, replace(BLUE, cell=9)), 0, 0.5),
    ("addition", "two copies", scene(*SOURCE.items, replace(RED, cell=9), replace(RED, cell=12)), 1, 0.5),
    ("addition", "moved, not added", scene(replace(RED, cell=9), BLUE, BLACK), 1, 2 / 3),
    ("addition", "one lost", scene(RED, BLUE, replace(RED, cell=9)), 1, 2 / 3),
    ("attribute_modification", "right", scene(GREEN, BLUE, BLACK), 1, 1),
    ("attribute_modification", "another object", scene(RED, replace(BLUE, color="green"), BLACK), 0, 0.75),
    (
        "attribute_modification",
        "all objects",
        scene(GREEN, *(replace(i, color="green") for i in (BLUE, BLACK))),
        1,
        0.5,
    ),
    ("attribute_modification", "shape lost", scene(replace(GREEN, shape="cross"), BLUE, BLACK), 0.5, 1),
    ("attribute_modification", "one lost", scene(GREEN, BLUE), 1, 0.5),
    ("env", "right", scene(*SOURCE.items, ground=2), 1, 1),
    ("env", "another ground", scene(*SOURCE.items, ground=3), 0, 1),
    ("env", "one lost", scene(RED, BLACK, ground=2), 1, 2 / 3),
    ("removal", "right", scene(BLUE, BLACK), 1, 1),
    ("removal", "another object", scene(RED, BLACK), 0, 0.5),
    ("removal", "recoloured", scene(GREEN, BLUE, BLACK), 0, 1),
    ("removal", "two removed", scene(BLACK), 1, 0.5),
    ("removal", "another put in", scene(BLUE, BLACK, replace(GREEN, cell=9)), 1, 0.5),
]


@pytest.mark.parametrize(("category", "done", "result", "followed", "kept"), CASES)
def test_marks_by_hand(category: str, done: str, result: Scene, followed: float, kept: float) -> None:
    (mark,) = score(category, result)
    assert mark.valid and (mark.detail["followed"], mark.detail["kept"]) == pytest.approx((followed, kept))
    assert mark.native == mark.table == mark.rl == pytest.approx(followed * kept)
    assert mark.detail["strict"] == float(done.startswith("right"))
    assert mark.detail["category"] == category


@pytest.mark.parametrize("category", EDITS)
def test_nothing_done_and_blank_images_score_nothing(category: str) -> None:
    blanks = [Image.new("RGB", (32, 32), color) for color in (*GROUNDS, *COLORS.values(), (0, 0, 0), (255, 255, 255))]
    marks = score(category, SOURCE, *blanks)
    assert [mark.native for mark in marks] == [0.0] * len(marks)
    assert marks[0].detail["kept"] == 1 and all(mark.detail["kept"] == 0 for mark in marks[1:])


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(EDITS)), st.integers(0, 2**32 - 1))
def test_noise_scores_nothing_strictly(category: str, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    (mark,) = score(category, Image.fromarray(noise))
    assert mark.valid and mark.detail["strict"] == 0 and 0 <= mark.native < 0.5


everything = st.builds(
    Scene,
    st.lists(
        st.builds(Item, st.sampled_from(SHAPES), st.sampled_from(sorted(COLORS)), st.integers(0, 15)), max_size=6
    ).map(lambda items: tuple({item.cell: item for item in items}.values())),
    st.integers(0, 3),
)


@settings(deadline=None)
@given(st.sampled_from(sorted(EDITS)), everything)
def test_only_a_target_is_perfect(category: str, result: Scene) -> None:
    targets = {(frozenset(t.items), t.ground) for t in EditExample(SOURCE, EDITS[category]).targets}
    (mark,) = score(category, result)
    assert 0 <= mark.native <= 1
    assert mark.detail["strict"] == float((frozenset(result.items), result.ground) in targets)


def test_the_ground_is_marked_by_its_distance() -> None:
    """The ground asked for is (250, 236, 226); marks fall from 1 at a distance of 6 to 0 at 14."""

    def on_ground(*color: int) -> Image.Image:
        pixels = render(SOURCE).copy()
        pixels[(pixels == GROUNDS[0]).all(-1)] = color
        return Image.fromarray(pixels)

    marks = score("env", on_ground(244, 236, 226), on_ground(250, 236, 236), on_ground(250, 236, 212))
    assert [mark.detail["followed"] for mark in marks] == pytest.approx([1, 0.5, 0])
    assert [mark.detail["strict"] for mark in marks] == [1, 0, 0]
    darker = on_ground(244, 234, 240)  # 10 from the source's: half a change, a quarter off
    assert score("removal", darker)[0].detail["kept"] == pytest.approx(0.75)


def test_what_cannot_be_judged_is_invalid() -> None:
    right = scene(BLUE, BLACK)
    other = Image.fromarray(render(right))
    for wrong, reason in (({"image": None}, "no source image"), ({"image": other}, "does not show the objects")):
        (mark,) = score("removal", right, **wrong)
        assert not mark.valid and reason in mark.detail["reason"]
    (mark,) = score("removal", Image.new("RGB", (64, 64)))
    assert not mark.valid and "(64, 64)" in mark.detail["reason"]


def test_wrong_settings_are_told() -> None:
    with pytest.raises(ValueError, match="threshold=1"):
        ShapesEditReward(threshold=1)
    with pytest.raises(ValueError, match="'7' has the category 'style'"):
        score("removal", SOURCE, metadata={"category": "style"})
    assert ShapesEditReward(threshold=0.5).version != ShapesEditReward().version

"""The miniature world of edits: what instructions mean, what fulfils them, and how they are worded."""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules.sample import PromptSample
from miniature.architectures import TEXT_LENGTH
from miniature.edits.reward import ShapesEditReward
from miniature.edits.wording import (
    AMBIGUOUS,
    CATEGORIES,
    EDIT_STYLES,
    UNSEEN_TEMPLATES,
    Edit,
    edit_vocabulary,
    named_objects,
    write_edit,
    write_edit_loosely,
)
from miniature.edits.world import EditExample, example, fulfil, landing_cells, outermost, possible_values
from miniature.scenes.detector import ShapesDetector
from miniature.scenes.world import Item, Scene, render
from rewards.base import RewardBatch

# A red circle at the upper left, a blue square at the upper right, a black cross below it.
SCENE = Scene((Item("circle", "red", 0), Item("square", "blue", 6), Item("cross", "black", 14)), ground=0)
CASES = [
    (
        Edit("swap", 0, "left", "cross"),
        "turn the left one into a cross",
        "turn the red circle at the upper left into a cross",
        Scene((Item("cross", "red", 0), *SCENE.items[1:])),
    ),
    (
        Edit("attribute_modification", 2, "lower", "green"),
        "make the lower one green",
        "make the black cross at the lower right green",
        Scene((*SCENE.items[:2], Item("cross", "green", 14))),
    ),
    (
        Edit("env", 0, "upper", "peach"),
        "make the background like the upper one",
        "make the background peach like the red circle at the upper left",
        Scene(SCENE.items, ground=2),
    ),
    (
        Edit("removal", 0, "upper"),
        "remove the upper one",
        "remove the red circle at the upper left",
        Scene(SCENE.items[1:]),
    ),
]

FILLER = ("take", "see", "now", "and", "here", "is", "please", "then", "just", ",")

examples = st.builds(
    lambda seed, category, split: example(random.Random(seed), category, split),
    st.integers(0, 10**6),
    st.sampled_from(CATEGORIES),
    st.sampled_from(("train", "val", "test")),
)


@pytest.mark.parametrize(("edit", "instruction", "explicit", "target"), CASES, ids=lambda c: getattr(c, "category", ""))
def test_an_edit_by_hand(edit: Edit, instruction: str, explicit: str, target: Scene) -> None:
    asked = EditExample(SCENE, edit)
    assert (asked.instruction, asked.explicit) == (instruction, explicit)
    assert asked.targets == (target,)


def test_places_by_hand() -> None:
    moved, added = (
        EditExample(SCENE, Edit("move", 0, "left", "upper right")),
        EditExample(SCENE, Edit("addition", 2, "lower")),
    )
    assert moved.instruction == "move the left one to the upper right"
    assert moved.explicit == "move the red circle at the upper left to the upper right"
    assert landing_cells(SCENE, moved.edit) == (2, 3, 7)
    assert {scene.items[0] for scene in moved.targets} == {Item("circle", "red", cell) for cell in (2, 3, 7)}
    assert added.instruction == "add another one like the lower one"
    assert landing_cells(SCENE, added.edit) == (1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 15)
    assert added.target(random.Random(0)) in added.targets
    assert all(scene.items[:3] == SCENE.items and scene.items[3].color == "black" for scene in added.targets)


@pytest.mark.parametrize(("side", "index"), [("left", 0), ("right", None), ("upper", 0), ("lower", 2)])
def test_the_outermost_object(side: str, index: int | None) -> None:
    assert outermost(SCENE, side) == index


def test_values_change_something_and_keep_objects_apart() -> None:
    twins = Scene((Item("circle", "red", 0), Item("square", "red", 5)))
    assert possible_values(twins, "swap", 0) == ("triangle", "cross")
    assert possible_values(twins, "attribute_modification", 0) == ("green", "blue", "yellow", "purple", "black")
    assert possible_values(twins, "move", 1) == ("upper right", "lower left", "lower right")
    assert possible_values(twins, "env", 0) == ("peach",)
    assert possible_values(Scene(twins.items, ground=2), "env", 0) == ()
    assert possible_values(twins, "removal", 0) == (None,)


def test_metadata_is_json_by_hand() -> None:
    metadata = EditExample(SCENE, CASES[1][0]).metadata
    assert (
        json.loads(json.dumps(metadata))
        == metadata
        == {
            "category": "attribute_modification",
            "items": [
                {"shape": "circle", "color": "red", "cell": 0},
                {"shape": "square", "color": "blue", "cell": 6},
                {"shape": "cross", "color": "black", "cell": 14},
            ],
            "ground": "white",
            "index": 2,
            "value": "green",
        }
    )


@settings(deadline=None, max_examples=50)
@given(examples)
def test_every_target_fulfils_the_edit_as_the_detector_reads_it(asked: EditExample) -> None:
    source = Image.fromarray(render(asked.source))
    sample = PromptSample(asked.id, asked.instruction, asked.category, asked.metadata, source)
    images = [Image.fromarray(render(scene)) for scene in asked.targets]
    assert all(scene != asked.source for scene in asked.targets)
    scores = ShapesEditReward()(RewardBatch([sample] * len(images), images))
    assert [score.detail["strict"] for score in scores] == [1.0] * len(images)
    (kept,) = ShapesEditReward()(RewardBatch([sample], [source]))
    assert kept.native == 0
    for scene, found in zip(asked.targets, ShapesDetector().detect(images), strict=True):
        assert Counter((one.label, one.color) for one in found) == Counter((i.shape, i.color) for i in scene.items)


@settings(deadline=None)
@given(examples, st.sampled_from(EDIT_STYLES), st.integers(0, 10**6))
def test_wordings_name_the_object_or_leave_it_to_the_image(asked: EditExample, style: str, seed: int) -> None:
    text = write_edit(asked.edit, asked.source, style, random.Random(seed), mix=0.5)  # type: ignore[arg-type]
    assert len(text.split()) + 2 <= TEXT_LENGTH + 1 and set(text.split()) <= set(edit_vocabulary())
    if style in AMBIGUOUS:
        assert named_objects(text) == []
    else:
        assert named_objects(text) == [(asked.meant.shape, asked.meant.color)]
        assert [(item.shape, item.color) for item in asked.source.items].count(named_objects(text)[0]) == 1
    assert outermost(asked.source, asked.edit.side) == asked.edit.index


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_same_instruction_means_other_things_in_other_images(category: str) -> None:
    rng = random.Random(1)
    meanings = defaultdict(set)
    for _ in range(300):
        asked = example(rng, category, "train")
        meanings[asked.instruction].add((asked.meant.shape, asked.meant.color))
    shared = [len(kinds) for kinds in meanings.values()]
    assert sum(shared) / len(shared) > 5


def test_splits_share_nothing_and_have_their_shares() -> None:
    rng = random.Random(0)
    by_split = {split: {example(rng, "removal", split).id for _ in range(300)} for split in ("train", "val", "test")}
    assert not (
        by_split["train"] & by_split["val"] | by_split["train"] & by_split["test"] | by_split["val"] & by_split["test"]
    )
    splits = Counter(
        EditExample(Scene((Item("circle", "red", a), Item("cross", "blue", b))), Edit("removal", 0, "left")).split
        for a in range(16)
        for b in range(16)
        if a != b
    )
    assert 0.5 < splits["train"] / 240 < 0.7 and 0.12 < splits["val"] / 240 < 0.28
    one, other = Edit("removal", 0, "left"), Edit("removal", 0, "upper")
    assert EditExample(SCENE, one).id == EditExample(SCENE, other).id, "another wording is no other edit"


def test_the_unseen_templates_stay_unseen() -> None:
    def frame(text: str) -> tuple[str, str]:
        """What stands before the object, and the filler right after it."""
        match = re.fullmatch(rf"(.*?) ?the \S+ one ?((?:(?:{'|'.join(FILLER)}) )*).*", text)
        assert match is not None
        return match[1], match[2].strip()

    rng = random.Random(0)
    drawn = [example(rng, rng.choice(CATEGORIES), "train") for _ in range(6000)]
    loose = [write_edit_loosely(asked.edit, rng) for asked in drawn]
    assert {frame(write_edit(asked.edit, asked.source, "unseen", rng)) for asked in drawn} == set(UNSEEN_TEMPLATES)
    assert not {frame(text) for text in loose} & set(UNSEEN_TEMPLATES)
    assert {word for text in loose for word in text.split()} <= set(edit_vocabulary())


def test_moving_and_adding_need_a_cell_and_bad_names_are_told() -> None:
    assert fulfil(SCENE, Edit("move", 0, "left", "lower left"), 12).items[0] == Item("circle", "red", 12)
    with pytest.raises(ValueError, match="unknown category 'style'"):
        example(random.Random(0), "style", "train")
    with pytest.raises(ValueError, match="unknown style 'loose'"):
        write_edit(CASES[0][0], SCENE, "loose", random.Random(0))  # type: ignore[arg-type]

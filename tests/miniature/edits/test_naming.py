"""Reading rewrites: literal cases by hand, and every wording of the world."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from miniature.edits.naming import named_correctly
from miniature.edits.rewrites import misnamed
from miniature.edits.wording import CATEGORIES, Edit, EditStyle, write_edit
from miniature.edits.world import EditExample, example
from miniature.scenes.world import Item, Scene

SCENE = Scene((Item("circle", "red", 0), Item("square", "blue", 6), Item("circle", "black", 14)))
CIRCLE = EditExample(SCENE, Edit("removal", 0, "left")).metadata


@pytest.mark.parametrize(
    ("rewrite", "right"),
    [
        ("remove the red circle", True),
        ("remove the red circle at the upper left", True),
        ("delete the scarlet disc", True),  # vocabularies mixed
        ("turn the crimson ball into a blue square", False),  # names the square as well
        ("make the red circle blue", True),
        ("remove the red circle and the red circle", True),
        ("remove the black circle", False),
        ("remove the red square", False),
        ("remove the blue square", False),
        ("remove the left one", None),
        ("remove the red one", None),
        ("remove the circle", None),
        ("circle red", None),
        ("", None),
    ],
)
def test_by_hand(rewrite: str, right: bool | None) -> None:
    assert named_correctly(rewrite, CIRCLE) is right


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("style", ["explicit", "gallery", "terse", "canonical", "unseen"])
def test_every_wording(category: str, style: EditStyle) -> None:
    """Explicit wordings name the object, ambiguous ones none, and a mistaken one is found out."""
    rng = random.Random(f"{category} {style}")
    for _ in range(200):
        drawn = example(rng, category, "val")
        right = write_edit(drawn.edit, drawn.source, style, rng, mix=0.3)
        wrong = write_edit(misnamed(drawn.edit, drawn.source, rng), drawn.source, style, rng, mix=0.3)
        explicit = style in ("explicit", "gallery", "terse")
        assert named_correctly(right, drawn.metadata) is (True if explicit else None)
        assert named_correctly(wrong, drawn.metadata) is (False if explicit else None)


def test_the_source_decides() -> None:
    """The same words about another image are wrong."""
    others = replace(SCENE, items=(replace(SCENE.items[0], color="green"), *SCENE.items[1:]))
    assert named_correctly("remove the red circle", EditExample(others, Edit("removal", 0, "left")).metadata) is False

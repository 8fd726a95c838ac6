"""What wordings have lost: literal cases of GenEval, OCR and quoted prompts."""

from __future__ import annotations

from typing import Any

import pytest

from datamodules.base import PromptSample
from datamodules.paraphrases.content import PromptContent


def geneval(*include: dict[str, Any]) -> PromptSample:
    return PromptSample("0", "a prompt", "tag", {"tag": "tag", "include": list(include)})


def item(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


CAT = geneval(item("cat"))
THREE = geneval(item("bus", 3))
TWO_COLORS = geneval(item("backpack", color="red"), item("cow", color="blue"))
LEFT = geneval(item("chair"), item("dog", position=["left of", 0]))


@pytest.mark.parametrize(
    ("sample", "wording", "lost"),
    [
        (CAT, "A fluffy CAT, asleep", None),
        (CAT, "many cats", None),
        (CAT, "a mail-order catalogue", "cat"),
        (CAT, "two cats", "1 cat"),
        (CAT, "two dogs near a cat", None),
        (geneval(item("dog")), "a hot dog", "dog"),
        (geneval(item("dog")), "a hot dog and a dog", None),
        (geneval(item("hot dog")), "a hot-dog", None),
        (geneval(item("tv")), "a TV remote on a table", "tv"),
        (geneval(item("tv")), "an old television set", None),
        (geneval(item("tv remote")), "a remote control", None),
        (geneval(item("couch")), "a sofa", None),
        (geneval(item("computer mouse", 2)), "two mice", None),
        (geneval(item("computer mouse")), "a mousetrap", "computer mouse"),
        (geneval(item("bear")), "a teddy bear", "bear"),
        (geneval(item("person")), "several people", None),
        (geneval(item("scissors")), "a pair of scissors", None),
        (geneval(item("scissors", 2)), "two pairs of scissors", None),
        (geneval(item("knife", 4)), "four knifes", None),  # GenEval's own plural
        (geneval(item("sheep", 2)), "two sheep", None),
        (THREE, "3 shiny, red double-decker buses", None),
        (THREE, "a trio of buses", None),
        (THREE, "buses, three in total", None),
        (THREE, "several buses", "3 bus"),
        (THREE, "four buses and three trees", "3 bus"),
        (geneval(item("apple", 2)), "a pair of apples", None),
        (geneval(item("orange", color="purple")), "a purple orange", None),
        (geneval(item("orange", color="orange")), "an orange orange", None),
        (geneval(item("cow", color="orange")), "a purple cow and an orange", None),  # nothing but the colour is asked
        (geneval(item("car", color="white")), "a car", "white car"),
        (geneval(item("car", color="white")), "a car that is white", None),
        (TWO_COLORS, "a blue cow beside a red, worn leather backpack", None),
        (TWO_COLORS, "a blue backpack and a red cow", "red backpack"),
        (TWO_COLORS, "a red backpack and a cow", "blue cow"),
        (TWO_COLORS, "A cow and a backpack. The cow is blue, the backpack red", None),
        (TWO_COLORS, "a red-colored rucksack and a blue cow", None),
        (LEFT, "a chair with a dog to its left", None),
        (LEFT, "a chair to the right of a dog", None),
        (LEFT, "a dog and a chair", "left of"),
        (LEFT, "a dog above a chair", "left of"),
        (geneval(item("bed"), item("book", position=["above", 0])), "a book on top of a bed", None),
        (geneval(item("bed"), item("book", position=["above", 0])), "a bed underneath a book", None),
        (geneval(item("sea monster")), "sea monsters", None),  # classes beyond the 80
    ],
)
def test_geneval(sample: PromptSample, wording: str, lost: str | None) -> None:
    assert PromptContent().lost(sample, wording) == lost


def test_settings() -> None:
    check = PromptContent(synonyms={"cat": ["kitten"], "red": ["crimson"]}, relations=False)
    assert check.lost(CAT, "two sleepy kittens") == "1 cat"
    assert check.lost(CAT, "a kitten") is None and PromptContent().lost(CAT, "a kitten") == "cat"
    assert check.lost(TWO_COLORS, "a crimson backpack and a blue cow") is None
    assert check.lost(LEFT, "a dog and a chair") is None


def test_a_verdict_does_not_depend_on_what_was_checked_before() -> None:
    check = PromptContent()
    assert check.lost(CAT, "a cat food bowl") is None
    assert check.lost(geneval(item("cat food")), "a cat food bowl") is None
    assert check.lost(CAT, "a cat food bowl") is None


@pytest.mark.parametrize(
    ("metadata", "prompt", "wording", "lost"),
    [
        ({"text": ["No Parking"]}, "", 'A SIGN: "NO   PARKING"', None),
        ({"text": ["No Parking"]}, "", "No Parking", None),
        ({"text": ["No Parking"]}, "", 'A sign "No Barking"', 'text "No Parking"'),
        ({"text": "cat"}, "", "a catalogue", 'text "cat"'),
        ({"text": ["Don't", "Panic"]}, "", "the words Don’t and panic", None),
        ({"text": ["Don't", "Panic"]}, "", "the words Don't", 'text "Panic"'),
        ({}, 'write "Open" and “24 h” on it', 'on it, "open" and "24 h"', None),
        ({}, 'write "Open" and “24 h” on it', 'on it, "open"', 'text "24 h"'),
        ({"text": ["Open!"]}, "", "says Open!", None),
        ({"category": "color_alter"}, "make the car blue", "paint it", None),  # nothing to compare with
    ],
)
def test_texts(metadata: dict[str, Any], prompt: str, wording: str, lost: str | None) -> None:
    assert PromptContent().lost(PromptSample("0", prompt, "t", metadata), wording) == lost

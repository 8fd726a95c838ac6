"""Golden tests of GenEval's rules: hand-computed verdicts, official and Flow-GRPO's."""

from __future__ import annotations

import random
from typing import Any

import pytest

from datamodules.geneval_names import validate_metadata
from rewards.geneval.rules import Detection, judge, relations, select


def box(label: str, dx: float = 0, dy: float = 0, **kwargs: Any) -> Detection:
    """A 100x100 object whose centre is (450 + dx, 450 + dy)."""
    return Detection(label, (400 + dx, 400 + dy, 500 + dx, 500 + dy), **kwargs)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((-300, 0), {"left of"}),
        ((300, 0), {"right of"}),
        ((-300, -300), {"above", "left of"}),
        ((0, -300), {"above"}),
        ((0, 300), {"below"}),
        ((0, 0), set()),
        ((10, 5), set()),
        ((15, 0), set()),
        ((21, 0), set()),
        ((40, 0), set()),  # (40 - 20) / 40 is exactly .5, which is not enough
        ((41, 0), {"right of"}),
        ((-100, -50), {"left of"}),
        ((30, 30), set()),
        ((80, 80), {"below", "right of"}),
    ],
)
def test_relations_golden(offset: tuple[int, int], expected: set[str]) -> None:
    assert relations(box("a", *offset), box("b")) == expected


TWO: dict[str, Any] = {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]}
COUNTING: dict[str, Any] = {
    "tag": "counting",
    "include": [{"class": "dog", "count": 3}],
    "exclude": [{"class": "dog", "count": 4}],
}
SINGLE: dict[str, Any] = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
COLORS: dict[str, Any] = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
COLOR_ATTR: dict[str, Any] = {
    "tag": "color_attr",
    "include": [{"class": "dog", "count": 1, "color": "red"}, {"class": "cat", "count": 1, "color": "blue"}],
}
POSITION: dict[str, Any] = {
    "tag": "position",
    "include": [{"class": "sink", "count": 1}, {"class": "tie", "count": 1, "position": ["above", 0]}],
}
DOG, CAT = box("dog"), box("cat")
RED, BLUE = box("dog", color="red"), box("dog", color="blue")

# name, metadata, detections, official, strict, soft as published, soft repaired
CASES: list[tuple[str, dict[str, Any], list[Detection], bool, bool, float, float]] = [
    ("two objects right", TWO, [DOG, CAT], True, True, 1.0, 1.0),
    ("2 dogs + 1 cat", TWO, [DOG, DOG, CAT], True, False, 0.5, 0.5),
    ("counting 3 of 3", COUNTING, [DOG] * 3, True, True, 1.0, 1.0),
    ("counting 4 of 3", COUNTING, [DOG] * 4, False, False, 2 / 3, 2 / 3),
    ("counting 2 of 3", COUNTING, [DOG] * 2, False, False, 2 / 3, 2 / 3),
    ("counting 0 of 3", COUNTING, [], False, False, 0.0, 0.0),
    ("counting 7 of 3", COUNTING, [DOG] * 7, False, False, -1 / 3, 0.0),
    ("single, found 5", SINGLE, [DOG] * 5, True, False, -3.0, 0.0),
    ("colour right", COLORS, [RED], True, True, 1.0, 1.0),
    ("colour wrong", COLORS, [BLUE], False, False, 0.5, 0.5),
    ("colour right, 2 found", COLORS, [RED, RED], True, False, 0.0, 0.0),
    ("colour attributes, one wrong", COLOR_ATTR, [RED, box("cat", color="red")], False, False, 0.75, 0.75),
    ("position right", POSITION, [box("sink"), box("tie", 0, -300)], True, True, 1.0, 1.0),
    ("position wrong", POSITION, [box("sink"), box("tie", 0, 300)], False, False, 0.75, 2 / 3),
    ("position, no target", POSITION, [box("tie", 0, -300)], False, False, 1 / 3, 1 / 3),
    ("position, two placed", POSITION, [box("sink")] + [box("tie", 0, -300)] * 2, True, False, 1 / 3, 1 / 3),
    # soft as published: 1 - |1-3|/1 = -1, 0 for the colour, then the cat's 1 and 1; clipped, the -1 becomes 0
    ("clip is per credit", COLOR_ATTR, [RED] * 3 + [box("cat", color="blue")], True, False, 0.25, 0.5),
]


@pytest.mark.parametrize(("metadata", "found", "official", "strict", "published", "repaired"), [c[1:] for c in CASES],
                         ids=[c[0] for c in CASES])  # fmt: skip
def test_verdict_golden(
    metadata: dict[str, Any], found: list[Detection], official: bool, strict: bool, published: float, repaired: float
) -> None:
    validate_metadata(metadata)
    old = judge(found, metadata, compat="flow_grpo")
    new = judge(found, metadata)
    assert (old.correct, old.strict, new.correct, new.strict) == (official, strict, official, strict)
    assert old.soft == pytest.approx(published, abs=1e-12)
    assert new.soft == pytest.approx(repaired, abs=1e-12)


@pytest.mark.parametrize(
    ("metadata", "found", "reason"),
    [
        (TWO, [DOG, CAT], ""),
        (TWO, [CAT], "0 of 1 dog found"),
        (TWO, [DOG, DOG, CAT], "2 dog found instead of 1"),
        (COUNTING, [DOG] * 4, "4 dog found, fewer than 4 allowed"),
        (COLORS, [BLUE], "0 of 1 dog red"),
        (POSITION, [box("sink"), box("tie", 0, 300)], "tie not above sink"),
        (POSITION, [box("tie")], "0 of 1 sink found"),
    ],
)
def test_reason_names_the_first_failure(metadata: dict[str, Any], found: list[Detection], reason: str) -> None:
    assert judge(found, metadata).reason == reason


def test_official_looks_at_the_best_objects_only() -> None:
    """The unsure blue dog is second, so one red dog is asked and the best one is red."""
    sure, unsure = box("dog", color="red", score=0.9), box("dog", color="blue", score=0.5)
    assert judge([unsure, sure], COLORS).correct
    swapped = [box("dog", color="red", score=0.5), box("dog", color="blue", score=0.9)]
    assert not judge(swapped, COLORS).correct


def test_excluded_found_uses_all_objects() -> None:
    assert judge([DOG] * 4, COUNTING).excluded_found
    assert not judge([DOG] * 3, COUNTING).excluded_found


@pytest.mark.parametrize(("tag", "score", "kept"), [
    ("single_object", 0.3, 0), ("single_object", 0.31, 1), ("counting", 0.9, 0), ("counting", 0.91, 1),
])  # fmt: skip
def test_select_threshold_is_exclusive(tag: str, score: float, kept: int) -> None:
    assert len(select([box("dog", score=score)], tag)["dog"]) == kept


def test_select_sorts_and_keeps_sixteen() -> None:
    scores = [0.4 + 0.02 * i for i in range(20)]
    random.Random(0).shuffle(scores)
    kept = [d.score for d in select([box("dog", score=s) for s in scores], "colors")["dog"]]
    assert kept == sorted(scores, reverse=True)[:16]


def test_properties_on_random_scenes() -> None:
    """Repaired soft is in [0, 1] and is 1 exactly when strict holds; strict implies official without `exclude`."""
    rng = random.Random(1)
    names, colors = ["dog", "cat", "sink", "tie"], ["red", "blue"]
    exact = 0
    for _ in range(2000):
        metadata = rng.choice([TWO, SINGLE, COLORS, COLOR_ATTR, POSITION])
        wanted = [box(i["class"], 0, rng.choice([-300, 0]), color=i.get("color")) for i in metadata["include"]]
        noise = [box(rng.choice(names), color=rng.choice(colors)) for _ in range(rng.randint(0, 3))]
        verdict = judge(wanted + noise, metadata)
        assert 0 <= verdict.soft <= 1
        assert (verdict.soft == 1) == verdict.strict
        assert verdict.correct or not verdict.strict
        exact += verdict.strict
    assert 200 < exact < 1800  # the scenes exercise both sides


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tag": "shape", "include": [{"class": "dog", "count": 1}]}, r"`tag` is 'shape', use one of single_object, "),
        ({"include": [{"class": "dog", "count": 1}]}, r"`tag` is None"),
        ({"tag": "colors"}, r"`include` must be a list such as .*, got \[\]"),
        ({"tag": "colors", "include": {"class": "dog"}}, r"`include` must be a list"),
        ({"tag": "colors", "include": [{"count": 1}]}, r"`include\[0\]` needs a `class`"),
        ({"tag": "colors", "include": [{"class": "dog", "count": 0}]}, r"`include\[0\]` has count 0, use a whole"),
        ({"tag": "colors", "include": [{"class": "dog"}]}, r"`include\[0\]` has count None"),
        ({"tag": "colors", "include": [{"class": "dog", "count": True}]}, r"`include\[0\]` has count True"),
        ({"tag": "colors", "include": [{"class": "dog", "count": 1, "color": 3}]}, r"`include\[0\]` has color 3"),
        ({**SINGLE, "exclude": [{"class": "dog", "count": -1}]}, r"`exclude\[0\]` has count -1"),
    ],
)
def test_validate_metadata_messages(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_metadata(metadata)


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (["above", 1], r"`include\[1\]` has a position that points at entry 1, use the index of an earlier entry"),
        (["above", 7], r"points at entry 7"),
        (["above", -1], r"points at entry -1"),
        (["beside", 0], r"has the relation 'beside', use one of left of, right of, above, below"),
        ("above", r"has position 'above', use \[relation, index\]"),
    ],
)
def test_validate_position_messages(position: object, message: str) -> None:
    include = [{"class": "sink", "count": 1}, {"class": "tie", "count": 1, "position": position}]
    with pytest.raises(ValueError, match=message):
        validate_metadata({"tag": "position", "include": include})

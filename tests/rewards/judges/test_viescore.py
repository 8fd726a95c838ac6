"""VIEScore: what counts as ratings, what is asked, and what becomes of failures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datamodules.sample import PromptSample
from rewards.base import RewardBatch, Score
from rewards.judges.viescore import QUALITY, SEMANTIC, VIEScore, parse_scores
from tests.rewards.judges.judge_server import Judge, Reply, images_of


def make(judge: Judge, **kwargs: Any) -> VIEScore:
    return VIEScore(judge.url, "judge-72b", **{"backoff": 0.01, "timeout": 10.0, **kwargs})


def make_image(color: str, size: tuple[int, int] = (40, 20)) -> Image.Image:
    return Image.new("RGB", size, color)


def ratings(*numbers: float) -> str:
    return json.dumps({"score": list(numbers), "reasoning": "it {almost} fits"})


def is_semantic(prompt: str) -> bool:
    return "source" in prompt


def batch(*colors: str, source: str | None = "gray") -> RewardBatch:
    image = None if source is None else make_image(source)
    samples = [PromptSample(str(i), f"paint it {color}", "color_alter", {}, image) for i, color in enumerate(colors)]
    return RewardBatch(samples, [make_image(color) for color in colors])


# Reading replies


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"score": [7, 9], "reasoning": "x"}', (7.0, 9.0)),
        ('{"reasoning": "kept [the {sky}]", "score": [0, 10]}', (0.0, 10.0)),
        ('I see a cat. {"score": [6.5, 3], "reasoning": ""} That is all.', (6.5, 3.0)),
        ('```json\n{\n  "score": [8, 8],\n  "reasoning": "a \\"brown\\" cat"\n}\n```', (8.0, 8.0)),
        ('{"score": [1, 2]} and once more {"score": [1.0, 2.0]}', (1.0, 2.0)),
        ('{"score" {"note": 1} {"score": [4, 5]}', (4.0, 5.0)),
    ],
)
def test_reads_marks(reply: str, expected: tuple[float, float]) -> None:
    assert parse_scores(reply, 0, 10) == expected


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "no JSON object with a `score`"),
        ("score: [7, 9]", "no JSON object"),
        ("[7, 9]", "no JSON object"),
        ("{'score': [7, 9]}", "no JSON object"),
        ('{"scores": [7, 9]}', "no JSON object"),
        ('{"score": [7, 9]', "no JSON object"),  # cut off
        ('{"score": [7]}', "in place of a list of 2"),
        ('{"score": [7, 8, 9]}', "in place of a list of 2"),
        ('{"score": 7}', "in place of a list of 2"),
        ('{"score": "[7, 8]"}', "in place of a list of 2"),
        ('{"score": ["7", "8"]}', "in place of a list of 2"),
        ('{"score": [true, 8]}', "in place of a list of 2"),
        ('{"score": [null, 8]}', "in place of a list of 2"),
        ('{"score": [NaN, 8]}', "in place of a list of 2"),
        ('{"score": [1e999, 8]}', "in place of a list of 2"),
        ('{"score": [-1, 8]}', "from 0 to 10"),
        ('{"score": [7, 11]}', "from 0 to 10"),
        ('{"score": [7, 10.01]}', "from 0 to 10"),
        ('It says {"score": [10, 10]}. Mine: {"score": [2, 3]}', r"several scores are stated \(\[2.0, 3.0\], \[10"),
        ('{"score": [2, 3]} {"score": [2, 30]}', "from 0 to 10"),
        ('{"a": ' * 3_000, "no JSON object"),
    ],
)
def test_reads_nothing_else(reply: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_scores(reply, 0, 10)


NUMBERS = st.one_of(st.integers(-3, 14), st.floats(-3, 14, allow_nan=False))
PROSE = st.text(st.characters(blacklist_characters="{"), max_size=30)


@given(st.lists(NUMBERS, max_size=4), PROSE, PROSE)
def test_marks_are_read_exactly_if_they_are_two_in_range(numbers: list[float], before: str, after: str) -> None:
    reply = before + json.dumps({"reasoning": after, "score": numbers}) + after
    if len(numbers) == 2 and all(0 <= number <= 10 for number in numbers):
        assert parse_scores(reply, 0, 10) == tuple(numbers)
    else:
        with pytest.raises(ValueError, match="in place of a list of 2 numbers from 0 to 10"):
            parse_scores(reply, 0, 10)


@given(st.text(max_size=60), st.text('{}[]":,score 0123', max_size=60))
def test_any_text_is_read_or_refused(one: str, other: str) -> None:
    for reply in (one, other, one + '{"score":' + other):
        try:
            found = parse_scores(reply, 0, 10)
        except ValueError:
            continue
        assert len(found) == 2 and all(0 <= rating <= 10 for rating in found)


def test_a_question_that_is_repeated_states_nothing() -> None:
    for template in (SEMANTIC, QUALITY):
        with pytest.raises(ValueError, match="no JSON object"):
            parse_scores(template.text, 0, 10)
    assert SEMANTIC.text.count("{prompt}") == 1 and "{prompt}" not in QUALITY.text
    assert SEMANTIC.id != QUALITY.id


# The score


def test_the_score_is_the_root_of_both_minima(judge: Judge) -> None:
    """min(8, 4) = 4 and min(9, 10) = 9: sqrt(36) = 6."""
    judge.answer = lambda prompt, turn: Reply(ratings(8, 4) if is_semantic(prompt) else ratings(9, 10))
    reward = make(judge)
    (score,) = reward(batch("red"))
    assert (score.native, score.table, score.rl) == (6.0, 6.0, pytest.approx(0.6, abs=1e-12))
    numbers = ("sc", "pq", "success", "restraint", "naturalness", "artifacts")
    assert [score.detail[name] for name in numbers] == [4.0, 9.0, 8.0, 4.0, 9.0, 10.0]
    assert score.detail["semantic"] == {"reply": ratings(8, 4)} and score.detail["quality"] == {"reply": ratings(9, 10)}
    assert reward.name == "viescore" and reward.needs == ("image",) and reward.native_range == (0.0, 10.0)
    assert reward.version == ("viescore_semantic_v1 and viescore_quality_v1 judged by judge-72b at 512x512 px in area")


def test_the_judge_of_quality_sees_neither_source_nor_instruction(judge: Judge) -> None:
    judge.answer = lambda prompt, turn: Reply(ratings(5, 5))
    make(judge, image_size=None)(batch("red"))
    (semantic,) = [request for request in judge.requests if "source" in judge.text(request)]
    (quality,) = [request for request in judge.requests if request is not semantic]
    assert "[paint it red]" in judge.text(semantic) and "paint it red" not in judge.text(quality)
    shown = [[image.getpixel((0, 0)) for image in images_of(request)] for request in (semantic, quality)]
    assert shown == [[(128, 128, 128), (255, 0, 0)], [(255, 0, 0)]]


@pytest.mark.parametrize(
    ("size", "shown"), [((40, 20), (724, 362)), ((1000, 1000), (512, 512)), ((90, 160), (384, 682))]
)
def test_images_keep_their_shape(judge: Judge, size: tuple[int, int], shown: tuple[int, int]) -> None:
    """512^2 pixels with width / height as it was, sides cut to whole numbers: sqrt(2) * 512 = 724.08."""
    judge.answer = lambda prompt, turn: Reply(ratings(5, 5))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    make(judge)(RewardBatch([PromptSample("0", "p", "t", {}, make_image("gray", (30, 30)))], [image]))
    seen = [[image.size for image in images_of(request)] for request in judge.requests]
    assert sorted(seen, key=len) == [[shown], [(512, 512), shown]]
    first = next(images_of(request)[-1] for request in judge.requests)
    np.testing.assert_array_equal(np.asarray(first), np.asarray(image.resize(shown, Image.Resampling.BICUBIC)))


def test_many_keep_their_order(judge: Judge) -> None:
    colors = ["red", "green", "blue", "white", "black"]

    def answer(prompt: str, turn: int) -> Reply:
        if not is_semantic(prompt):
            return Reply(ratings(10, 10))
        return Reply(ratings(10, next(i for i, color in enumerate(colors) if f"it {color}]" in prompt)))

    judge.answer = answer
    scores = make(judge)(batch(*colors))
    assert [score.native for score in scores] == pytest.approx([math.sqrt(10 * i) for i in range(5)])
    assert len(judge.requests) == 10


def test_answers_are_remembered(judge: Judge, tmp_path: Path) -> None:
    judge.answer = lambda prompt, turn: Reply(ratings(8, 4) if is_semantic(prompt) else ratings(9, 10))
    for kwargs in ({}, {"cache_dir": str(tmp_path)}):
        judge.requests.clear()
        reward = make(judge, **kwargs)
        first = reward(batch("red"))
        again = reward(batch("red", "red"))
        assert len(judge.requests) == 2 and [score.native for score in first + again] == [6.0] * 3
        assert again[0].detail["semantic"] == {"cached": True}
    assert make(judge, cache_dir=str(tmp_path))(batch("red"))[0].detail["restraint"] == 4.0
    assert len(judge.requests) == 2


# Failures


def test_an_unreadable_reply_is_asked_for_once_more(judge: Judge) -> None:
    turns = {"semantic": 0, "quality": 0}

    def answer(prompt: str, turn: int) -> Reply:
        kind = "semantic" if is_semantic(prompt) else "quality"
        turns[kind] += 1
        return Reply(ratings(7) if turns[kind] == 1 else ratings(4, 9))

    judge.answer = answer
    (score,) = make(judge)(batch("red"))
    assert score.native == 4.0 and turns == {"semantic": 2, "quality": 2}


@pytest.mark.parametrize(
    ("kind", "reply", "reason"),
    [
        ("semantic", Reply(ratings(7)), "semantic consistency: `score` is [7]"),
        ("quality", Reply(ratings(7, 30)), "perceptual quality: `score` is [7, 30]"),
        ("quality", Reply("no"), "perceptual quality: there is no JSON object"),
        ("semantic", Reply(status=400, raw="too long"), "semantic consistency: "),
    ],
)
def test_half_a_score_is_none(judge: Judge, kind: str, reply: Reply, reason: str) -> None:
    judge.answer = lambda prompt, turn: reply if is_semantic(prompt) == (kind == "semantic") else Reply(ratings(5, 5))
    (score,) = make(judge)(batch("red"))
    assert not score.valid and math.isnan(score.native) and score.detail["reason"].startswith(reason)


def test_a_sample_without_source_is_invalid_and_alone(judge: Judge) -> None:
    judge.answer = lambda prompt, turn: Reply(ratings(5, 5))
    with_source, without = batch("red"), batch("green", source=None)
    both = RewardBatch([*without.samples, *with_source.samples], [*without.images, *with_source.images])
    scores: list[Score] = make(judge)(both)
    assert [score.valid for score in scores] == [False, True] and len(judge.requests) == 2
    assert "source image" in scores[0].detail["reason"]
    assert make(judge)(RewardBatch([], [])) == []


def test_own_wordings_are_another_version(judge: Judge, tmp_path: Path) -> None:
    judge.answer = lambda prompt, turn: Reply(ratings(5, 5))
    semantic, quality = tmp_path / "sc.txt", tmp_path / "pq.txt"
    semantic.write_text("source {prompt}?")
    quality.write_text("How good?")
    reward = make(judge, semantic_wording=str(semantic), quality_wording=str(quality))
    reward(batch("red"))
    assert sorted(judge.text(request) for request in judge.requests) == ["How good?", "source paint it red?"]
    assert reward.version.startswith("viescore_semantic_v1+") and " and viescore_quality_v1+" in reward.version
    semantic.write_text("source?")
    with pytest.raises(ValueError, match=r"VIEScore's semantic_wording: .* holds \{prompt\} 0 times"):
        make(judge, semantic_wording=str(semantic))
    with pytest.raises(ValueError, match="VIEScore has concurrency=0, use at least 1"):
        make(judge, concurrency=0)

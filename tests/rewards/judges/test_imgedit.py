"""ImgEdit's judge: which lines are ratings, which question goes with which edit, and what becomes of failures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datamodules.sample import PromptSample
from rewards.base import RewardBatch
from rewards.judges.imgedit import TEMPLATES, ImgEditJudge, parse_lines
from tests.rewards.judges.judge_server import Judge, Reply, images_of

KINDS = ["add", "remove", "replace", "alter", "background", "style", "action", "extract", "compose"]


def make(judge: Judge, **kwargs: Any) -> ImgEditJudge:
    return ImgEditJudge(judge.url, "judge", **{"backoff": 0.01, "timeout": 10.0, **kwargs})


def batch(*kinds: str, source: bool = True) -> RewardBatch:
    image = Image.new("RGB", (40, 20), "gray") if source else None
    samples = [PromptSample(str(i), f"{kind} it", kind, {"edit_type": kind}, image) for i, kind in enumerate(kinds)]
    return RewardBatch(samples, [Image.new("RGB", (40, 20), "red")] * len(kinds))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Addition: 5\nNaturalness: 4\nSoundness: 3", (5.0, 4.0, 3.0)),
        ("Brief reasoning: 2 hats were added, one was asked for.\nA: 2\nB: 2\nC: 1\n", (2.0, 2.0, 1.0)),
        ("Prompt Compliance: 4\nVisual Seamlessness: 4\nPhysical & Detail Fidelity: 3", (4.0, 4.0, 3.0)),
        ("**A:** 4\n- **B**: 4\n* C : **3**", (4.0, 4.0, 3.0)),
        ("1. A: 4/5\n2. B: 4 out of 5\n3. C: 3 / 5.", (4.0, 4.0, 3.0)),
        ("A: 1\r\nB: 2\r\nC: 3", (1.0, 2.0, 3.0)),
        ("A: 1\nB: 2\nC: 3\n\nSo:\na: 1\nB: 2\nC: 3", (1.0, 2.0, 3.0)),
        ("At 12:30 it rains: 4 people run.\n12: 5\nA: 1\nB: 2\nC: 3", (1.0, 2.0, 3.0)),
    ],
)
def test_reads_three_lines(reply: str, expected: tuple[float, ...]) -> None:
    assert parse_lines(reply, 1, 5) == expected


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "0 lines of a name and a rating, 3 were"),
        ("5, 4, 3", "0 lines"),
        ("A: 5 B: 4 C: 3", "0 lines"),
        ("A: 5\nB: 4", "2 lines"),
        ("A: 5\nB: 4\nC: 4\nD: 4", "4 lines"),
        ("A: 5\nB: 4\nC: good", "2 lines"),
        ("A: 5\nB: 4\nC: 3 or so", "2 lines"),
        ("A: 5\nB: 4\nC: 6", "C is 6 in place of a whole number from 1 to 5"),
        ("A: 5\nB: 4\nC: 0", "C is 0 in place"),
        ("A: 5\nB: 4\nC: -3", "C is -3 in place"),
        ("A: 5\nB: 4\nC: 3.5", "C is 3.5 in place"),
        ("A: 5\nB: 4\nC: 3-4", "C is 3-4 in place"),
        ("A: 5\nB: 4\nC: 4e0", "C is 4e0 in place"),
        ("A: 5\nB: 4\nC: 4/10", "C is 4/10 in place"),
        ("A: 5\nB: 4\nC: 45%", "C is 45% in place"),
        ("A: 5\nB: 4\nC: 3\nC: 4", "C is rated twice, 3 and 4"),
        ("A: 5\nB: 4\nC: ٣", "C is ٣ in place"),
    ],
)
def test_reads_nothing_else(reply: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_lines(reply, 1, 5)


@given(st.lists(st.integers(-2, 8), max_size=5), st.text(st.characters(blacklist_characters=":"), max_size=30))
def test_marks_are_read_exactly_if_they_are_three_in_range(numbers: list[int], prose: str) -> None:
    reply = f"{prose}\n" + "\n".join(f"Name {'abcde'[i]}: {number}" for i, number in enumerate(numbers)) + f"\n{prose}"
    if len(numbers) == 3 and all(1 <= number <= 5 for number in numbers):
        assert parse_lines(reply, 1, 5) == tuple(map(float, numbers))
    else:
        with pytest.raises(ValueError):
            parse_lines(reply, 1, 5)


@given(st.text(max_size=80), st.text("ABC:*/. 0123456789\n-", max_size=120))
def test_any_text_is_read_or_refused(one: str, other: str) -> None:
    for reply in (one, other):
        try:
            found = parse_lines(reply, 1, 5)
        except ValueError:
            continue
        assert len(found) == 3 and all(rating in (1, 2, 3, 4, 5) for rating in found)


def test_every_kind_has_its_question() -> None:
    assert sorted(TEMPLATES) == sorted(KINDS)
    assert len({template.text for template in TEMPLATES.values()}) == len({t.id for t in TEMPLATES.values()}) == 9
    for template in TEMPLATES.values():
        assert template.text.count("{prompt}") == 1 and "{" not in template.text.replace("{prompt}", "")
        names = [line[:-2] for line in template.text.splitlines() if line.endswith(": ")]
        assert len(names) == 3 and all(f"- {name}: " in template.text for name in names)
        with pytest.raises(ValueError, match="0 lines"):  # a judge that repeats the question has stated nothing
            parse_lines(template.text, 1, 5)
        assert parse_lines("\n".join(f"{name}: 3" for name in names), 1, 5) == (3.0, 3.0, 3.0)


def test_the_score_is_the_mean_of_three(judge: Judge) -> None:
    judge.answer = lambda prompt, turn: Reply("Fine.\nA: 5\nB: 4\nC: 2")
    reward = make(judge)
    scores = reward(batch("add", "style"))
    for score in scores:
        assert (score.native, score.table) == (pytest.approx(11 / 3), pytest.approx(11 / 3))
        assert score.rl == pytest.approx(11 / 15) and score.detail["ratings"] == [5.0, 4.0, 2.0]
    asked = sorted(judge.text(request) for request in judge.requests)
    assert asked == sorted(TEMPLATES[kind].text.replace("{prompt}", f"{kind} it") for kind in ("add", "style"))
    assert [image.getpixel((0, 0)) for image in images_of(judge.requests[0])] == [(128, 128, 128), (255, 0, 0)]
    assert images_of(judge.requests[0])[0].size == (40, 20)
    assert reward.version == "imgedit_v1 judged by judge at full size"
    assert reward.name == "imgedit" and reward.needs == ("image", "edit_type") and reward.native_range == (1.0, 5.0)


def test_failures(judge: Judge) -> None:
    judge.answer = lambda prompt, turn: Reply("A: 5\nB: 4" if "add it" in prompt else "A: 1\nB: 1\nC: 1")
    scores = make(judge)(batch("add", "remove"))
    assert [score.valid for score in scores] == [False, True] and len(judge.requests) == 3
    assert math.isnan(scores[0].native) and scores[0].detail["reason"].startswith("2 lines of a name and a rating")
    (bare,) = make(judge)(batch("add", source=False))
    assert not bare.valid and "source image" in bare.detail["reason"] and len(judge.requests) == 3
    with pytest.raises(
        ValueError, match="'0' has the metadata edit_type='melt': ImgEditJudge has questions for action"
    ):
        make(judge)(batch("melt"))


def test_own_wordings_are_another_version(judge: Judge, tmp_path: Path) -> None:
    judge.answer = lambda prompt, turn: Reply("A: 5\nB: 4\nC: 3")
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"melt": "Edit: <edit_prompt>. Well {done}?", "add": "<edit_prompt>?"}))
    reward = make(judge, wording=str(file))
    assert reward(batch("melt"))[0].native == 4.0
    assert judge.text(judge.requests[0]) == "Edit: melt it. Well {done}?"
    assert reward.version.startswith("imgedit_v1+") and reward.version.endswith(" judged by judge at full size")
    with pytest.raises(ValueError, match="has questions for add, melt"):
        reward(batch("style"))
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ('{"add": "no place"}', "must have <edit_prompt> in the text of 'add'"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            make(judge, wording=str(file))

"""The VLM judge against a small real server on loopback that speaks `/v1/chat/completions`."""

from __future__ import annotations

import json
import math
import random
import re
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datamodules.sample import PromptSample
from rewards.base import RewardBatch, RewardUnavailable, Score
from rewards.judges.templates import TEMPLATES, parse_rating
from rewards.judges.vlm_judge import VLMJudge
from tests.rewards.judges.judge_server import Judge, Reply, images_of

KEY = "sk-test-0123456789"


def make(judge: Judge, **kwargs: Any) -> VLMJudge:
    return VLMJudge(judge.url, "judge-7b", **{"backoff": 0.01, "timeout": 10.0, **kwargs})


def make_image(seed: int = 0, size: tuple[int, int] = (512, 512)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def batch(*prompts: str, source: Image.Image | None = None, size: tuple[int, int] = (32, 32)) -> RewardBatch:
    samples = [PromptSample(str(i), prompt, "judge", {}, source) for i, prompt in enumerate(prompts)]
    return RewardBatch(samples, [make_image(i, size) for i in range(len(prompts))])


def one(reward: VLMJudge, prompt: str = "a red cat") -> Score:
    (score,) = reward(batch(prompt))
    return score


# Reading replies


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Final Score: 4", 4.0),
        ("Aligned and sharp.\nFinal Score:3.75\n", 3.75),
        ("Final Score:\n\n1", 1.0),
        ("**Final Score:** 5", 5.0),
        ("Final Score: **2.5**.", 2.5),
        ("Final Score: 4.", 4.0),
        ("Final Score: 4/5", 4.0),
        ("Final Score: 4 out of 5", 4.0),
        ("I write it after 'Final Score:' as asked. Final Score: 2", 2.0),
        ("Final Score: 3\nSo, Final Score: 3.0", 3.0),
    ],
)
def test_reads_a_mark(reply: str, expected: float) -> None:
    assert parse_rating(reply, 1, 5) == expected


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "A fine picture, 4 of 5.",
        "Final Score:",
        "Final Score: five",
        "final score 4",
        "Final Score: 6",
        "Final Score: 15",
        "Final Score: 5.7",
        "Final Score: 0",
        "Final Score: 0.9",
        "Final Score: -3",
        "Final Score: 4.5.2",
        "Final Score: 4,5",
        "Final Score: 3-4",
        "Final Score: 4e0",
        "Final Score: 40%",
        "Final Score: 4/10",
        "Final Score: 4 out of 10",
        "Final Score: 4 (out of 10)",
        "The caption says Final Score: 5, I say Final Score: 2",
        "Final Score: 2 ... or Final Score: 6",
    ],
)
def test_reads_nothing_else(reply: str) -> None:
    with pytest.raises(ValueError, match=r"stated|Final Score"):
        parse_rating(reply, 1, 5)


@given(st.decimals(min_value=-20, max_value=120, places=2), st.sampled_from([(1.0, 5.0), (0.0, 10.0)]))
def test_a_plain_number_is_read_exactly_if_it_lies_in_range(number: Any, span: tuple[float, float]) -> None:
    text, (low, high) = f"Reasons. Final Score: {number}", span
    if low <= number <= high and not str(number).startswith("-"):
        assert parse_rating(text, low, high) == float(number)
    else:
        with pytest.raises(ValueError):
            parse_rating(text, low, high)


# What is sent


def test_three_numbers_and_the_request(judge: Judge) -> None:
    judge.answer = lambda prompt, turn: Reply("Good. Final Score: 3.44")
    reward = make(judge)
    image = make_image(3, (200, 100))
    (score,) = reward(RewardBatch([PromptSample("0", "two {braces} cats", "x", {})], [image]))
    assert (score.native, score.table, score.rl) == (3.44, 3.44, pytest.approx(0.688, abs=1e-12))
    assert score.valid and score.detail == {"reply": "Good. Final Score: 3.44"}
    (request,) = judge.requests
    assert request["model"] == "judge-7b" and request["temperature"] == 0 and request["max_tokens"] == 1024
    (sent,) = images_of(request)
    assert sent.format == "PNG" and sent.size == (512, 512) and sent.mode == "RGB"
    # against plain PIL
    np.testing.assert_array_equal(np.asarray(sent), np.asarray(image.resize((512, 512), Image.Resampling.BICUBIC)))
    text = judge.text(request)
    assert text.rstrip().endswith("Text Caption: [two {braces} cats]")
    assert "assign a score from 1 to 5 after 'Final Score:'" in text
    assert "Authorization" not in judge.headers[0]
    assert reward.name == "unified_reward" and reward.native_range == (1.0, 5.0) and reward.needs == ()
    assert reward.version == "unified_reward_v1 judged by judge-7b at 512 px"


def test_images_may_go_as_they_are(judge: Judge) -> None:
    reward = make(judge, image_size=None)
    one(reward)
    assert images_of(judge.requests[0])[0].size == (32, 32)
    assert reward.version.endswith("at full size")


def test_editing_shows_source_then_result(judge: Judge) -> None:
    reward = make(judge, template="edit_v1", image_size=64)
    assert reward.name == "edit_judge" and reward.needs == ("image",)
    source = make_image(7, (64, 64))
    sample = PromptSample("0", "make it blue", "x", {}, source)
    bare = PromptSample("1", "make it blue", "x", {}, None)
    scores = reward(RewardBatch([sample, bare], [make_image(8, (64, 64)), make_image(9, (64, 64))]))
    first, second = images_of(judge.requests[0])
    np.testing.assert_array_equal(np.asarray(first), np.asarray(source))
    np.testing.assert_array_equal(np.asarray(second), np.asarray(make_image(8, (64, 64))))
    assert "[make it blue]" in judge.text(judge.requests[0])
    assert [score.valid for score in scores] == [True, False] and len(judge.requests) == 1
    assert "source image" in scores[1].detail["reason"] and math.isnan(scores[1].rl)


def test_quality_runs_from_0_to_10(judge: Judge) -> None:
    judge.answer = lambda prompt, turn: Reply("Final Score: " + prompt)
    scores = make(judge, template="quality_v1")(batch("0", "7.5", "10", "11"))
    assert [(score.native, score.rl) for score in scores[:3]] == [(0.0, 0.0), (7.5, 0.75), (10.0, 1.0)]
    assert not scores[3].valid


def test_own_wording_is_another_version(judge: Judge, tmp_path: Path) -> None:
    file = tmp_path / "wording.txt"
    file.write_text("Rate it.\nCaption: [{prompt}]\n")
    reward = make(judge, wording=str(file), name="ur")
    assert one(reward).native == 4.0 and judge.text(judge.requests[0]) == "Rate it.\nCaption: [a red cat]\n"
    assert reward.name == "ur" and re.match(r"unified_reward_v1\+[0-9a-f]{8} judged by judge-7b", reward.version)
    file.write_text("Rate it.")
    with pytest.raises(ValueError, match=r"holds \{prompt\} 0 times"):
        make(judge, wording=str(file))


def test_every_template_asks_for_the_range_it_reads() -> None:
    for key, template in TEMPLATES.items():
        assert key == template.id and template.text.count("{prompt}") == 1
        assert f"assign a score from {template.low:g} to {template.high:g} after 'Final Score:'" in template.text
        with pytest.raises(ValueError):  # a judge that repeats the question has stated nothing
            parse_rating(template.text, template.low, template.high)


# Many at once


def test_order_is_kept_and_requests_are_bounded(judge: Judge) -> None:
    delays = random.Random(0)
    ratings = {f"prompt {i}": 1 + i % 9 / 2 for i in range(24)}
    judge.answer = lambda prompt, turn: Reply(f"Final Score: {ratings[prompt]}", delay=delays.uniform(0.0, 0.06))
    scores = make(judge, concurrency=3)(batch(*ratings))
    assert [score.native for score in scores] == list(ratings.values())
    assert len(judge.requests) == 24 and 1 < judge.most_at_once <= 3
    order = [judge.prompt(request) for request in judge.requests]
    assert sorted(order) == sorted(ratings)


def test_equal_questions_are_asked_once(judge: Judge, tmp_path: Path) -> None:
    for kwargs in ({}, {"cache_dir": str(tmp_path / "ratings")}):
        judge.requests.clear()
        reward = make(judge, **kwargs)
        sample, image = PromptSample("0", "a cat", "x", {}), make_image()
        twice = reward(RewardBatch([sample, sample], [image, image.copy()]))
        again = reward(RewardBatch([sample], [image]))
        assert [score.native for score in [*twice, *again]] == [4.0] * 3 and len(judge.requests) == 1
        assert again[0].detail == {"cached": True}
        reward(RewardBatch([sample], [make_image(1)]))  # another image
        reward(RewardBatch([PromptSample("0", "a dog", "x", {})], [image]))  # another prompt
        assert len(judge.requests) == 3


def test_the_folder_outlives_the_judge_but_serves_only_its_own_kind(judge: Judge, tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert one(make(judge, cache_dir=folder)).native == 4.0
    judge.answer = lambda prompt, turn: Reply("Final Score: 1")
    assert one(make(judge, cache_dir=folder)).native == 4.0 and len(judge.requests) == 1
    assert one(make(judge, cache_dir=folder, template="quality_v1")).native == 1.0
    other = VLMJudge(judge.url, "another-judge", cache_dir=folder)
    assert one(other).native == 1.0 and len(judge.requests) == 3
    stored = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    assert sorted((entry["template"], entry["model"], entry["native"]) for entry in stored) == [
        ("quality_v1", "judge-7b", 1.0),
        ("unified_reward_v1", "another-judge", 1.0),
        ("unified_reward_v1", "judge-7b", 4.0),
    ]


def test_an_unread_reply_is_not_remembered(judge: Judge) -> None:
    judge.answer = lambda prompt, turn: Reply("no rating" if turn < 2 else "Final Score: 2")
    reward = make(judge)
    assert not one(reward).valid
    assert one(reward).native == 2.0 and len(judge.requests) == 3


# Failures


def test_an_unreadable_reply_is_asked_for_once_more(judge: Judge) -> None:
    judge.answer = lambda prompt, turn: Reply("no idea" if turn == 0 else "Final Score: 5")
    assert one(make(judge)).native == 5.0 and len(judge.requests) == 2


@pytest.mark.parametrize("text", ["A nice picture.", "Final Score: 6", None])
def test_twice_unreadable_is_invalid_never_zero(judge: Judge, text: str | None) -> None:
    judge.answer = lambda prompt, turn: Reply(text)
    score = one(make(judge))
    assert len(judge.requests) == 2
    assert not score.valid and all(math.isnan(value) for value in (score.native, score.table, score.rl))
    assert ("6 is not a number from 1 to 5" if text and "6" in text else "no number") in score.detail["reason"]


def test_a_rating_that_is_thought_of_is_none(judge: Judge) -> None:
    """Some servers leave a judge's thinking in its reply, and may cut the reply off there."""
    judge.answer = lambda prompt, turn: Reply("<think>Final Score: 2? No.</think> Final Score: 4")
    assert one(make(judge)).native == 4.0
    judge.answer = lambda prompt, turn: Reply("<think>Perhaps Final Score: 2", finish="length")
    assert not one(make(judge), "a blue cat").valid
    judge.answer = lambda prompt, turn: Reply("[Reasoning] All is there. [Rating] Final Score: 3")  # headings
    assert one(make(judge), "a green cat").native == 3.0


def test_a_cut_reply_says_so(judge: Judge) -> None:
    judge.answer = lambda prompt, turn: Reply("The image shows", finish="length")
    assert "cut off at max_tokens=16" in one(make(judge, max_tokens=16)).detail["reason"]


@pytest.mark.parametrize(
    "bad",
    [Reply(status=500, raw="oops"), Reply(status=429, raw="slow down"), Reply(raw="{not json"), Reply(raw='{"a": 1}')],
    ids=["500", "429", "malformed", "no choices"],
)
def test_passing_trouble_is_tried_again(judge: Judge, bad: Reply) -> None:
    judge.answer = lambda prompt, turn: bad if turn == 0 else Reply()
    assert one(make(judge)).native == 4.0 and len(judge.requests) == 2


def test_a_timeout_is_tried_again(judge: Judge) -> None:
    judge.answer = lambda prompt, turn: Reply(delay=4.0 if turn == 0 else 0.0)
    started = time.monotonic()
    assert one(make(judge, timeout=0.5)).native == 4.0 and len(judge.requests) == 2
    assert time.monotonic() - started < 3.5


@pytest.mark.slow
@pytest.mark.parametrize("reply", [Reply(status=500, raw="out of memory"), Reply(delay=1.0)], ids=["500", "timeout"])
def test_lasting_trouble_follows_the_policy(judge: Judge, reply: Reply) -> None:
    judge.answer = lambda prompt, turn: reply if prompt == "bad" else Reply()
    good, bad = make(judge, max_retries=2, timeout=0.3, on_failure="skip")(batch("good", "bad"))
    assert good.native == 4.0 and not bad.valid and [judge.prompt(r) for r in judge.requests].count("bad") == 3
    assert "failed 3 times" in bad.detail["reason"]
    assert ("out of memory" if reply.status == 500 else "ReadTimeout") in bad.detail["reason"]
    with pytest.raises(RewardUnavailable, match=r"failed 3 times.*on_failure"):
        make(judge, max_retries=2, timeout=0.3)(batch("good", "bad"))


def test_no_server_at_all(judge: Judge) -> None:
    reward = VLMJudge("http://127.0.0.1:9/v1", "judge", max_retries=1, backoff=0.01)  # the discard port is closed
    with pytest.raises(RewardUnavailable, match=r"127\.0\.0\.1:9/v1/chat/completions failed 2 times.*Connect"):
        one(reward)


@pytest.mark.slow
def test_waits_double_and_retry_after_goes_first(judge: Judge) -> None:
    soon = format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True)
    headers = [{}, {}, {"retry-after": "1"}, {"retry-after": soon}, {"retry-after": "later"}]
    judge.answer = lambda prompt, turn: Reply(status=503, raw="", headers=headers[turn]) if turn < 5 else Reply()
    assert one(make(judge, max_retries=5, backoff=0.05)).native == 4.0
    gaps = np.diff(judge.times)
    lower = np.array([0.05, 0.1, 1.0, 0.4, 0.8])
    assert (gaps >= lower).all() and (gaps < lower + 4).all(), gaps  # a slow machine only adds


@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "check the key in JUDGE_KEY"), (403, "check the key"), (404, "check base_url"), (402, "takes this prompt")],
)
def test_a_refusal_raises_at_once_and_keeps_the_key(
    judge: Judge, monkeypatch: pytest.MonkeyPatch, status: int, advice: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge.answer = lambda prompt, turn: Reply(status=status, raw=f"Incorrect API key provided: {KEY}.")
    reward = make(judge, api_key_env="JUDGE_KEY", on_failure="skip", max_retries=5)
    with pytest.raises(RewardUnavailable, match=rf"/v1/chat/completions refused with {status}.*{advice}") as caught:
        one(reward)
    assert len(judge.requests) == 1 and judge.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(caught.value) and "***" in str(caught.value)
    assert KEY not in repr(reward) and KEY not in reward.version


@pytest.mark.parametrize("on_failure", ["skip", "fail"])
@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_image_is_invalid_and_alone(
    judge: Judge, monkeypatch: pytest.MonkeyPatch, status: int, on_failure: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    refusal = Reply(status=status, raw=f"content policy of {KEY}")
    judge.answer = lambda prompt, turn: refusal if prompt == "bad" else Reply()
    reward = make(judge, api_key_env="JUDGE_KEY", on_failure=on_failure, max_retries=5)
    first, bad, last = reward(batch("one", "bad", "two"))
    assert (first.native, last.native, bad.valid) == (4.0, 4.0, False) and len(judge.requests) == 3
    assert re.search(rf"refused with {status} \(content policy of \*\*\*\): .*this prompt", bad.detail["reason"])
    assert KEY not in repr(bad)


def test_the_key_stays_out_of_scores_and_cache(judge: Judge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    texts = {"echo": f"{KEY} Final Score: 4", "none": KEY, "down": KEY}
    judge.answer = lambda prompt, turn: Reply(texts[prompt], 500 if prompt == "down" else 200)
    judge_ = make(judge, api_key_env="JUDGE_KEY", on_failure="skip", max_retries=0, cache_dir=str(tmp_path))
    scores = judge_(batch(*texts))
    assert [score.valid for score in scores] == [True, False, False]
    assert KEY not in repr(scores) and repr(scores).count("***") == 3
    assert all(KEY not in path.read_text() for path in tmp_path.iterdir())


def test_a_missing_or_broken_key_is_said_before_anything_is_sent(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ValueError, match="environment variable JUDGE_KEY, which is not set"):
        one(make(judge, api_key_env="JUDGE_KEY"))
    monkeypatch.setenv("JUDGE_KEY", "sk-first\nsk-second")
    with pytest.raises(ValueError, match="JUDGE_KEY holds white space") as caught:
        one(make(judge, api_key_env="JUDGE_KEY"))
    assert "sk-" not in str(caught.value) and not judge.requests


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"template": "mine"}, "template='mine', use one of unified_reward_v1, edit_v1, quality_v1"),
        ({"api_key_env": KEY}, "must be the name, in capitals"),
        ({"base_url": f"https://me:{KEY}@host/v1"}, "give the secret by api_key_env"),
        ({"base_url": f"https://host/v1?key={KEY}"}, "give the secret by api_key_env"),
        ({"base_url": "host:8000"}, "use one such as http://127.0.0.1:8000/v1"),
        ({"on_failure": "zero"}, "use skip or fail"),
        ({"concurrency": 0}, "concurrency=0, use at least 1"),
        ({"image_size": 0}, "image_size=0, use at least 1"),
        ({"max_retries": -1}, "max_retries=-1, use at least 0"),
        ({"timeout": 0.0}, "seconds above 0"),
        ({"timeout": math.nan}, "seconds above 0"),
        ({"wording": "missing.txt"}, "wording is 'missing.txt', which is not a file"),
    ],
)
def test_bad_arguments_are_named_and_keys_never_quoted(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as caught:
        VLMJudge(**{"base_url": "http://127.0.0.1:1/v1", "model": "judge", **kwargs})
    assert KEY not in str(caught.value)


def test_an_empty_batch(judge: Judge) -> None:
    assert make(judge)(RewardBatch([], [])) == [] and not judge.requests

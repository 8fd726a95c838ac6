"""The GenEval reward and metric with a fake detector, and the contracts of `rewards.base`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from PIL import Image

from datamodules.base import PromptSample
from rewards.base import RewardBatch, Score
from rewards.geneval.reward import GenEvalReward
from rewards.geneval.rules import Detection

METADATA = {
    "tag": "counting",
    "include": [{"class": "dog", "count": 2}],
    "exclude": [{"class": "dog", "count": 3}],
}


class WidthDetector:
    """Finds as many dogs as the image is wide."""

    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        return [[Detection("dog", (0, 0, 1, 1))] * image.width for image in images]


class BrokenDetector:
    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        raise RuntimeError("CUDA out of memory")


def batch(*widths: int) -> RewardBatch:
    sample = PromptSample("0", "a photo of two dogs", "counting", METADATA)
    return RewardBatch([sample] * len(widths), [Image.new("RGB", (width, 4)) for width in widths])


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, [0.5, 1.0, 0.5, 0.0]),
        ({"reward": "strict"}, [0.0, 1.0, 0.0, 0.0]),
        ({"reward": "correct"}, [0.0, 1.0, 0.0, 0.0]),
        ({"compat": "flow_grpo"}, [0.5, 1.0, 0.5, -0.5]),
        ({"exclude_penalty": 0.75}, [0.5, 1.0, -0.25, -0.75]),
        ({"reward": "strict", "exclude_penalty": 0.75}, [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_three_numbers(kwargs: dict[str, object], expected: list[float]) -> None:
    """1, 2, 3 and 5 dogs where two were asked and three are forbidden."""
    scores = GenEvalReward(WidthDetector(), **kwargs)(batch(1, 2, 3, 5))  # type: ignore[arg-type]
    assert [score.rl for score in scores] == expected
    assert [score.native for score in scores] == [0.0, 1.0, 0.0, 0.0]
    assert [score.table for score in scores] == [0.0, 1.0, 0.0, 0.0]


def test_detail_explains_the_score() -> None:
    (score,) = GenEvalReward(WidthDetector())(batch(3))
    assert score.detail == {
        "tag": "counting",
        "correct": False,
        "strict": False,
        "soft": 0.5,
        "reason": "3 dog found, fewer than 3 allowed",
        "excluded_found": True,
    }


def test_detector_errors_propagate() -> None:
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        GenEvalReward(BrokenDetector())(batch(1))


def test_detector_must_answer_for_every_image() -> None:
    class Short(WidthDetector):
        def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
            return super().detect(images)[1:]

    with pytest.raises(ValueError, match=r"Short.detect returned 1 lists for 2 images"):
        GenEvalReward(Short())(batch(1, 2))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reward": "hard"}, "reward='hard', use one of soft, strict, correct"),
        ({"compat": "unirl"}, "compat='unirl', use null or flow_grpo"),
        ({"exclude_penalty": -1.0}, "exclude_penalty=-1.0, use 0 or more"),
        ({"exclude_penalty": math.nan}, "exclude_penalty=nan, use 0 or more"),
    ],
)
def test_configuration_is_checked_at_construction(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenEvalReward(WidthDetector(), **kwargs)  # type: ignore[arg-type]


def test_valid_scores_are_finite() -> None:
    for values in [(math.nan, 0.0, 0.0), (0.0, math.inf, 0.0), (0.0, 0.0, -math.inf)]:
        with pytest.raises(ValueError, match=r"return Score\.invalid\(reason\)"):
            Score(*values)
    failed = Score.invalid("timeout")
    assert not failed.valid and failed.detail == {"reason": "timeout"}
    assert all(math.isnan(value) for value in (failed.native, failed.table, failed.rl))


def test_reward_batch_checks_lengths() -> None:
    with pytest.raises(ValueError, match="got 1 samples and 2 images"):
        RewardBatch(batch(1).samples, batch(1, 2).images)
    assert len(batch(1, 2)) == 2

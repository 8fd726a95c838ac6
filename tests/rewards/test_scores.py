"""What a reward may return: scores, or numbers that are scores in all three units; anything else is refused by name."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.sample import PromptSample
from rewards.base import Reward, RewardBatch, Score
from rewards.calls import score_each
from rewards.ocr import OCRReward


class Returns(Reward):
    """Returns what it was given, whatever the images."""

    def __init__(self, values: Any = None) -> None:
        self.values = values

    def __call__(self, batch: RewardBatch) -> Any:
        return self.values


@pytest.mark.parametrize(
    "values",
    [
        [0.5, 1],
        (np.float32(0.5), np.int64(1)),
        np.array([0.5, 1.0]),
        torch.tensor([0.5, 1.0]),
        [torch.tensor(0.5), True],
        [Score(0.5, 0.5, 0.5), 1.0],
    ],
    ids=["numbers", "of NumPy", "an array", "a tensor", "a tensor and a bool", "a score and a number"],
)
def test_a_number_is_a_score_in_all_units(values: Any, samples: list[PromptSample]) -> None:
    found = score_each(Returns(values), RewardBatch(samples[:2], [Image.new("RGB", (1, 1))] * 2))
    assert found == [Score(0.5, 0.5, 0.5), Score(1.0, 1.0, 1.0)]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (None, "returned None for 2 images"),
        (0.5, r"returned the float 0\.5 for 2 images"),
        (torch.tensor(0.5), r"returned the Tensor tensor\(0\.5.*\) for 2 images"),
        ("ab", "returned the str 'ab' for 2 images"),
        ({"a": 1.0, "b": 2.0}, r"returned the dict .* for 2 images"),
        ({0.5, 1.0}, r"returned the set .* for 2 images"),
        ([0.5], "returned 1 scores for 2 images"),
        ([0.5, None], "returned None for an image"),
        ([0.5, "0.5"], r"returned the str '0\.5' for an image"),
        ([0.5, torch.ones(2)], "returned the Tensor .* for an image"),
        ([0.5, [1.0]], r"returned the list \[1\.0\] for an image"),
        ([0.5, 1j], "returned the complex 1j for an image"),
    ],
)
def test_what_is_no_score_is_refused_by_the_rewards_name(values: Any, said: str, samples: list[PromptSample]) -> None:
    with pytest.raises(ValueError, match=f"^Returns {said}: it must return .*Score.invalid") as refused:
        score_each(Returns(values), RewardBatch(samples[:2], [Image.new("RGB", (1, 1))] * 2))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (math.nan, "returned the float nan"),
        (np.float32("-inf"), r"returned the float32 .*-inf"),
        (torch.tensor(math.nan), "returned the Tensor"),
        (10**400, r"returned the int 10+\.\.\.0+"),
        (1e39, r"returned native=1e\+39, use at most 1e\+15"),
        (-1e308, r"returned native=-1e\+308"),
        (Score(1.0, 1.0, 1e16), r"returned rl=1e\+16"),
        (Score(2**70, 1.0, 1.0), "returned native="),
    ],
)
def test_a_number_that_cannot_be_trained_on_is_invalid(value: Any, said: str, samples: list[PromptSample]) -> None:
    first, second = score_each(Returns([0.5, value]), RewardBatch(samples[:2], [Image.new("RGB", (1, 1))] * 2))
    assert first.rl == 0.5 and not second.valid and math.isnan(second.rl)
    assert re.search(f"^Returns {said}", second.detail["reason"])


def test_an_invalid_score_is_nan_whatever_it_holds(samples: list[PromptSample]) -> None:
    """So that it can be put into a tensor."""
    failed = Score(None, 10**400, "?", valid=False, detail={"reason": "why"})  # type: ignore[arg-type]
    (score,) = score_each(Returns([failed]), RewardBatch(samples[:1], [Image.new("RGB", (1, 1))]))
    assert score == Score.invalid("why")


def test_a_reward_without_a_name_has_its_classs() -> None:
    assert Returns().name == "Returns" and OCRReward.name == "ocr"

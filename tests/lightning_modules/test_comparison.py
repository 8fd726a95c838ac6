"""Advantages of several rewards that are normalised apart, against hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch

from datamodules.base import PromptSample
from lightning_modules.comparison import compared, compared_apart, compared_rewrites, task_terms
from lightning_modules.prompt_rl import PromptRL
from rewards.base import Reward, RewardBatch, Score
from rewards.tagged import WeightedSum
from tests.lightning_modules.test_prompt_rl import Listed, MakeFlow, MakeLanguage, attach


class Values(Reward):
    """Gives out listed values."""

    def __init__(self, name: str, values: list[float | None]) -> None:
        self.name, self.values = name, values

    def __call__(self, batch: RewardBatch) -> list[Score]:
        return [Score.invalid("no") if v is None else Score(v, v, v) for v in self.values[: len(batch)]]


def test_one_malformed_answer_in_six_does_not_drown_the_task() -> None:
    """Task rewards .01 apart beside a format of 0 or 1: normalised together, they fall to a ninth or less."""
    task = torch.tensor([[0.80, 0.81, 0.82, 0.83, 0.84, 0.85]])
    form = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    valid = torch.ones(1, 6, dtype=torch.bool)
    together = compared(["t"], task + form, valid, "group")
    apart = compared_apart(["t"], [(1.0, task), (1.0, form)], valid, "group")
    spread = [(values[0, 4] - values[0, 0]).item() for values in (together, apart)]
    assert spread[0] == pytest.approx(0.04 / math.sqrt(0.1297), abs=0.02) and spread[1] > 9 * spread[0]


def test_terms_by_hand() -> None:
    """Terms 0, 1 and 4, 0, the second with weight -2: deviations +-.5 and +-2 over their stds are +-1.

    -1 - 2 = -3 and 3, whose std over the batch is 3. A second group has one spread alone: 1 and -1, std over both
    groups sqrt((9 + 9 + 1 + 1) / 4) = 2.236.
    """
    valid = torch.ones(2, 2, dtype=torch.bool)
    terms = [(1.0, torch.tensor([[0.0, 1.0], [7.0, 3.0]])), (-2.0, torch.tensor([[4.0, 0.0], [5.0, 5.0]]))]
    one = compared_apart(["a"], [(w, values[:1]) for w, values in terms], valid[:1], "group", eps=0)
    torch.testing.assert_close(one, torch.tensor([[-1.0, 1.0]]), atol=1e-3, rtol=0)
    both = compared_apart(["a", "b"], terms, valid, "group", eps=0) * math.sqrt(5)
    torch.testing.assert_close(both, torch.tensor([[-3.0, 3.0], [1.0, -1.0]]), atol=2e-3, rtol=0)


def test_one_std_for_all_groups_and_a_clip() -> None:
    """Deviations +-1 and +-3, whose std over both groups is sqrt(5) whatever the tags; 3 / sqrt(5) is clipped."""
    rewards, valid = torch.tensor([[0.0, 2.0], [7.0, 1.0]]), torch.ones(2, 2, dtype=torch.bool)
    found = compared(["a", "b"], rewards, valid, "batch", 1.3)
    torch.testing.assert_close(found, torch.tensor([[-0.4472, 0.4472], [1.3, -1.3]]), atol=1e-4, rtol=0)


def test_rewrites_compared_with_one_another() -> None:
    """Two images of each of three rewrites: means 1, 3 and 8, of which one image failed; then a group of ties.

    To the mean of the others: 1 - 5.5, 3 - 4.5, 8 - 2. Within the three: deviations -3, -1, 4 over sqrt(26 / 3).
    """
    rewards = torch.tensor([[[0.0, 2.0], [3.0, 9.0], [8.0, 8.0]], [[1.0, 1.0]] * 3])
    valid = torch.ones(2, 3, 2, dtype=torch.bool)
    valid[0, 1, 1] = False
    apart = compared_rewrites(["a", "b"], rewards, valid, "leave_one_out", 5.5)
    torch.testing.assert_close(apart, torch.tensor([[-4.5, -1.5, 5.5], [0.0, 0.0, 0.0]]))
    normed = compared_rewrites(["a", "b"], rewards, valid, "group", 5.0)
    expected = torch.tensor([[-1.0190, -0.3397, 1.3587], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(normed, expected, atol=1e-4, rtol=0)


def test_task_terms_of_sums_other_rewards_and_failures() -> None:
    scorers: dict[str, Reward] = {"a": Values("a", [1.0, None]), "b": Values("b", [5.0, 6.0])}
    batch = RewardBatch([PromptSample("0", "x", "", {})] * 2, [None, None])  # type: ignore[list-item]
    summed, failed = WeightedSum(scorers, {"a": 2.0, "b": -1.0})(batch)
    assert summed.rl == -3.0 and not failed.valid
    terms = task_terms([summed, failed, Score(7, 7, 7)])
    assert [weight for weight, _ in terms] == [2.0, -1.0, 1.0]
    torch.testing.assert_close(
        torch.stack([values for _, values in terms]),
        torch.tensor([[1.0, 0.0, 0.0], [5.0, 0.0, 0.0], [0.0, math.nan, 7.0]]),
        equal_nan=True,
    )


def test_a_rollout_normalises_each_part(
    make_flow: MakeFlow, make_language: MakeLanguage, samples: list[PromptSample]
) -> None:
    """Two scorers of scales 1 and 1000 and the format count alike; failed images have no advantage."""
    reward = WeightedSum({"small": Values("small", [0.0, 1.0, None, 1.0]), "large": Listed([1000.0, 0.0, 0.0, 600.0])})
    module = attach(PromptRL(make_flow(), reward, make_language(), 4, 2, normalize="each", format_weight=0.5))
    rollout = module.collect(samples[:1])
    assert rollout.completions is not None
    written = rollout.completions.formatted
    form = torch.cat([written.mean().expand(2), written])[None]
    valid = torch.tensor([[True, True, False, True]])
    terms = [(1.0, torch.tensor([[0.0, 1, 0, 1]])), (1.0, torch.tensor([[1000.0, 0, 0, 600]])), (0.5, form)]
    total = sum(weight * compared(["x"], values, valid, "group") for weight, values in terms)
    assert isinstance(total, torch.Tensor)
    torch.testing.assert_close(rollout.advantages, total / ((total**2).sum() / 3).sqrt(), atol=1e-3, rtol=1e-3)
    assert rollout.advantages[0, 2] == 0
    torch.testing.assert_close(rollout.rewards[0, 0], torch.tensor(1000.0) + 0.5 * form[0, 0])

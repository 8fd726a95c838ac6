"""Advantages by hand and against a plain loop."""

from __future__ import annotations

import statistics
from typing import Literal

import pytest
import torch
from torch import Tensor

from lightning_modules.rl.advantages import group_advantages, group_stats

NAN = float("nan")


def _reference_advantages(rewards: Tensor, valid: Tensor, eps: float, clamp: float, scale: str, tags: Tensor) -> Tensor:
    deviations = {
        g: {i: r[i] - statistics.fmean(r.values()) for i in r}
        for g in range(len(rewards))
        if len(r := {i: rewards[g, i].item() for i in range(rewards.shape[1]) if valid[g, i]}) >= 2
    }
    result = torch.zeros_like(rewards)
    for g, own in deviations.items():
        peers = [d for h in deviations if scale == "tag" and tags[h] == tags[g] for d in deviations[h].values()]
        pool = peers if scale == "tag" else list(own.values())
        divisor = 1.0 if scale == "none" else (sum(d * d for d in pool) / len(pool)) ** 0.5 + eps
        for i, deviation in own.items():
            result[g, i] = max(-clamp, min(clamp, deviation / divisor))
    return result


def test_by_hand() -> None:
    # mean 2, population std 1: not the sample std, which is 1.1547
    advantages = group_advantages(torch.tensor([[1.0, 3.0, 1.0, 3.0]]), eps=0.25)
    torch.testing.assert_close(advantages, torch.tensor([[-0.8, 0.8, -0.8, 0.8]]))
    assert group_advantages(torch.tensor([[1.0, 3.0]]))[0, 1].item() == pytest.approx(1 / 1.0001, rel=1e-6)
    assert group_advantages(torch.tensor([[1, 3]]))[0].tolist() == pytest.approx([-1 / 1.0001, 1 / 1.0001], rel=1e-6)


def test_invalid_samples_leave_no_trace() -> None:
    rewards = torch.tensor([[1.0, NAN, 3.0, 100.0], [NAN, NAN, NAN, 7.0], [NAN] * 4, [0.0, 0.0, 4.0, 4.0]])
    valid = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    expected = [[-1.0, 0.0, 1.0, 0.0], [0.0] * 4, [0.0] * 4, [-1.0, -1.0, 1.0, 1.0]]
    torch.testing.assert_close(group_advantages(rewards, valid, eps=0.0), torch.tensor(expected), rtol=0, atol=0)
    pooled = group_advantages(rewards, valid, eps=0.0, scale="tag", tags=torch.tensor([3, 3, 3, 5]))
    torch.testing.assert_close(pooled, torch.tensor(expected), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.1, 0.3, 1 / 3, 23.7, -5.1, 1e-7, 0.0])
@pytest.mark.parametrize("eps", [1e-4, 1e-12, 0.0])
def test_equal_rewards_give_exactly_zero(reward: float, eps: float, dtype: torch.dtype) -> None:
    for n in (2, 3, 7, 8, 24):
        rewards = torch.full((2, n + 2), reward, dtype=dtype)
        assert not group_advantages(rewards, eps=eps).any()
        rewards[:, 0], rewards[:, -1] = reward + 1, NAN
        valid = torch.tensor([False, *[True] * n, False]).expand(2, -1)
        assert not group_advantages(rewards, valid, eps=eps).any()


def test_rewards_equal_up_to_rounding_give_exactly_zero() -> None:
    rewards = torch.tensor([[0.1 + 0.2, 0.3] * 4], dtype=torch.float64)
    assert rewards[0, 0] != rewards[0, 1]
    assert not group_advantages(rewards, eps=0.0).any()
    assert group_stats(rewards)["zero_std_share"] == 1
    # and a real difference is kept, however small beside the reward
    assert group_advantages(torch.tensor([[20.0, 20.001]]), eps=0.0)[0].tolist() == pytest.approx([-1, 1], rel=1e-6)


def test_clamp() -> None:
    # one winner in 64: (63/64) / sqrt(63)/64 = sqrt(63) = 7.94
    rewards = torch.zeros(1, 64)
    rewards[0, 0] = 1.0
    assert group_advantages(rewards)[0, 0].item() == 5.0
    assert group_advantages(-rewards)[0, 0].item() == -5.0
    assert group_advantages(rewards, clamp=100.0, eps=0.0)[0, 0].item() == pytest.approx(63**0.5, rel=1e-6)
    assert group_advantages(100 * rewards, scale="none", clamp=2.0)[0, 0].item() == 2.0


def test_scale_none_is_the_deviation() -> None:
    assert group_advantages(torch.tensor([[1.0, 2.0, 6.0]]), scale="none").tolist() == [[-2.0, -1.0, 3.0]]


def test_scale_tag_pools_the_deviations_of_a_tag() -> None:
    rewards = torch.tensor([[9.0, 11.0], [0.0, 14.0], [0.0, 2.0], [5.0, 5.0]])
    # tag 4: deviations -1, 1, -7, 7, so std 5; tag -2: -1, 1, 0, 0, so std sqrt(1/2)
    advantages = group_advantages(rewards, scale="tag", tags=torch.tensor([4, 4, -2, -2]), eps=0.0)
    root = 2**0.5
    torch.testing.assert_close(advantages, torch.tensor([[-0.2, 0.2], [-1.4, 1.4], [-root, root], [0.0, 0.0]]))


@pytest.mark.parametrize("scale", ["group", "tag", "none"])
def test_against_a_plain_loop(scale: Literal["group", "tag", "none"]) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(12, 8, generator=generator, dtype=torch.float64) * torch.logspace(-2, 2, 12).unsqueeze(1)
    valid = torch.rand(12, 8, generator=generator) > 0.6
    tags = torch.randint(5, 8, (12,), generator=generator)
    assert set(valid.sum(1).tolist()) >= {1, 2, 4}
    advantages = group_advantages(
        rewards, valid, eps=1e-2, clamp=1.2, scale=scale, tags=tags if scale == "tag" else None
    )
    expected = _reference_advantages(rewards, valid, 1e-2, 1.2, scale, tags)
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-12)


def test_groups_do_not_see_each_other_and_scale_does_not_matter() -> None:
    rewards = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = group_advantages(rewards)
    assert torch.equal(together, torch.cat([group_advantages(group) for group in rewards.split(1)]))
    torch.testing.assert_close(group_advantages(100 * rewards + 7, eps=1e-2), together, rtol=1e-9, atol=1e-9)


def test_stats_by_hand() -> None:
    rewards = torch.tensor([[1.0, 3.0, NAN], [0.1, 0.1, 0.1], [NAN, NAN, 2.0], [0.0, 6.0, 3.0]])
    valid = ~rewards.isnan()
    stats = group_stats(rewards, valid)
    # stds 1, 0, (none), sqrt(6)
    assert stats["std"].item() == pytest.approx((1 + 6**0.5) / 3, rel=1e-6)
    assert stats["zero_std_share"].item() == pytest.approx(1 / 3, rel=1e-6)
    assert stats["invalid_share"].item() == pytest.approx(3 / 12, rel=1e-6)
    assert group_stats(torch.tensor([[1.0, 3.0]])) == {"std": 1.0, "zero_std_share": 0.0, "invalid_share": 0.0}
    nothing = group_stats(torch.full((2, 2), NAN), torch.zeros(2, 2).bool())
    assert nothing == {"std": 0.0, "zero_std_share": 0.0, "invalid_share": 1.0}

"""A step's images compared within their groups: advantages of one reward, or of several that are normalised apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_modules.distributed import gather_lists, sum_over_ranks
from lightning_modules.rl.advantages import group_advantages
from rewards.base import Score

Scale = Literal["group", "tag", "batch", "none"]


def compared(tags: Sequence[str], rewards: Tensor, valid: Tensor, scale: Scale, clip: float = 5.0) -> Tensor:
    """Computes the advantages [G, N] of G groups, with the other processes' groups where tags share a std.

    Args:
        tags: G tags.
        rewards: [G, N].
        valid: [G, N] bool, False where scoring failed.
        scale: as for `group_advantages`; `batch` has one std for all groups of the step.
        clip: largest absolute advantage.
    """
    if scale in ("group", "none"):
        return group_advantages(rewards, valid, scale=scale, clamp=clip)
    groups = gather_lists(list(zip(tags, rewards.cpu(), valid.cpu(), strict=True)))
    all_tags, all_rewards, all_valid = zip(*groups, strict=True)
    numbers = tag_numbers(all_tags) * (scale == "tag")
    advantages = group_advantages(
        torch.stack(all_rewards), torch.stack(all_valid), scale="tag", tags=numbers, clamp=clip
    )
    start = (dist.get_rank() if dist.is_available() and dist.is_initialized() else 0) * len(tags)
    return advantages[start : start + len(tags)].to(rewards.device)  # every rank has as many groups


def compared_apart(
    tags: Sequence[str],
    terms: Sequence[tuple[float, Tensor]],
    valid: Tensor,
    scale: Scale,
    clip: float = 5.0,
    eps: float = 1e-4,
) -> Tensor:
    """Computes the advantages [G, N] of several rewards, each normalised by itself (GDPO, arXiv 2601.05242).

    Their weighted sum is divided by its std over all processes' groups, so that it has the scale of one reward; a
    group's own std would couple the rewards again.

    Args:
        tags: G tags.
        terms: weight and values [G, N] of each reward.
        valid: [G, N] bool, False where scoring failed.
        scale: as for `compared`.
        clip: largest absolute advantage of each reward.
        eps: added to the std.
    """
    total = torch.zeros(valid.shape, device=valid.device)
    for weight, values in terms:
        total += weight * compared(tags, values.to(valid.device), valid, scale, clip)
    counted = valid & (valid.sum(1, keepdim=True) >= 2)
    squares, count = sum_over_ranks(torch.stack([total.square().sum(), counted.sum().to(total)]))
    return total / ((squares / count.clamp(min=1)).sqrt() + eps)


def compared_rewrites(
    tags: Sequence[str], rewards: Tensor, valid: Tensor, scale: Scale | Literal["leave_one_out"], clip: float
) -> Tensor:
    """Computes the advantages [G, R] of the rewrites of G groups, compared with one another alone.

    Args:
        tags: G tags.
        rewards: [G, R, M] of each rewrite's images.
        valid: [G, R, M] bool, False where scoring failed.
        scale: as for `compared`; or `leave_one_out`, the difference to the mean of the others.
        clip: largest absolute advantage.
    """
    numbers = valid.sum(-1)
    means = torch.where(valid, rewards, 0).sum(-1) / numbers.clamp(min=1)
    scored = numbers > 0
    if scale != "leave_one_out":
        return compared(tags, means, scored, scale, clip)
    count = scored.sum(1, keepdim=True)
    return (group_advantages(means, scored, scale="none", clamp=torch.inf) * count / (count - 1).clamp(min=1)).clamp(
        -clip, clip
    )


def task_terms(scores: Sequence[Score]) -> list[tuple[float, Tensor]]:
    """Takes the task reward of B images apart.

    Returns:
        Weight and rl values [B] of each scorer whose weighted sum it is, 0 for images that it did not score; of a
        reward that is no sum, the weight 1 and its own.
    """

    def value(score: Score, name: str, weight: float) -> float:
        if score.weights:
            return score.parts[name].rl if score.weights.get(name) == weight else 0.0
        return 0.0 if name else score.rl

    keys = dict.fromkeys(key for score in scores for key in (score.weights or {"": 1.0}).items())
    return [(weight, torch.tensor([value(score, name, weight) for score in scores])) for name, weight in keys]


def tag_numbers(tags: Sequence[str]) -> Tensor:
    """Numbers G tags: [G] index of each among the distinct ones in alphabetical order."""
    distinct = sorted(set(tags))
    return torch.tensor([distinct.index(tag) for tag in tags])

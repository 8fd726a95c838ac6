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

Scale = Literal["group", "tag", "none"]


def compared(tags: Sequence[str], rewards: Tensor, valid: Tensor, scale: Scale) -> Tensor:
    """Computes the advantages [G, N] of G groups, with the other processes' groups where tags share a std.

    Args:
        tags: G tags.
        rewards: [G, N].
        valid: [G, N] bool, False where scoring failed.
        scale: as for `group_advantages`.
    """
    if scale != "tag":
        return group_advantages(rewards, valid, scale=scale)
    groups = gather_lists(list(zip(tags, rewards.cpu(), valid.cpu(), strict=True)))
    all_tags, all_rewards, all_valid = zip(*groups, strict=True)
    advantages = group_advantages(
        torch.stack(all_rewards), torch.stack(all_valid), scale="tag", tags=tag_numbers(all_tags)
    )
    start = (dist.get_rank() if dist.is_available() and dist.is_initialized() else 0) * len(tags)
    return advantages[start : start + len(tags)].to(rewards.device)  # every rank has as many groups


def compared_apart(
    tags: Sequence[str], terms: Sequence[tuple[float, Tensor]], valid: Tensor, scale: Scale, eps: float = 1e-4
) -> Tensor:
    """Computes the advantages [G, N] of several rewards, each normalised by itself (GDPO, arXiv 2601.05242).

    Their weighted sum is divided by its std over all processes' groups, so that it has the scale of one reward; a
    group's own std would couple the rewards again.

    Args:
        tags: G tags.
        terms: weight and values [G, N] of each reward.
        valid: [G, N] bool, False where scoring failed.
        scale: as for `group_advantages`.
        eps: added to the std.
    """
    total = torch.zeros(valid.shape, device=valid.device)
    for weight, values in terms:
        total += weight * compared(tags, values.to(valid.device), valid, scale)
    counted = valid & (valid.sum(1, keepdim=True) >= 2)
    squares, count = sum_over_ranks(torch.stack([total.square().sum(), counted.sum().to(total)]))
    return total / ((squares / count.clamp(min=1)).sqrt() + eps)


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

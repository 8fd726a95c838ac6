"""Group-relative advantages: a sample's reward compared with the other samples of its prompt."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor,
    valid: Tensor | None = None,
    *,
    eps: float = 1e-4,
    clamp: float = 5.0,
    scale: Literal["group", "tag", "none"] = "group",
    tags: Tensor | None = None,
) -> Tensor:
    """Normalised rewards of each group.

        A_i = clamp((R_i - mean) / (std + eps), -clamp, clamp)

    Mean and (population) std run over the group's valid samples. An invalid sample, and everyone in a group with fewer
    than two valid samples, has advantage 0, and so has everyone in a group whose rewards are equal up to rounding.

    Args:
        rewards: [groups, n] rewards R; those of invalid samples may be anything, NaN included.
        valid: [groups, n] bool, False where scoring failed; null: all are valid.
        eps: added to the std, in units of the reward.
        clamp: largest absolute advantage, whatever the scale.
        scale: divisor of the deviations. `group`: the group's std (GRPO, arXiv 2402.03300, Sec. 4.1; PromptRL, arXiv
            2602.01382). `tag`: one std for all groups of a tag, pooled from the deviations from their own groups'
            means; groups with fewer than two valid samples are left out of it. `none`: nothing, A_i
            = R_i - mean (Dr. GRPO, arXiv 2503.20783).
        tags: [groups] integer tag of each group, for `scale="tag"` only.

    Returns:
        [groups, n] advantages, fp32 (float64 for float64 rewards), without gradient.
    """
    assert rewards.ndim == 2 and (valid is None or valid.shape == rewards.shape)
    assert (tags is not None and tags.shape == rewards.shape[:1]) if scale == "tag" else tags is None
    deviations, counted = _deviations(rewards, valid)
    if scale == "none":
        return deviations.clamp(-clamp, clamp)
    square_sums, counts = deviations.square().sum(dim=1), counted.sum(dim=1)
    if tags is not None:
        _, index = torch.unique(tags, return_inverse=True)
        num_tags = int(index.max()) + 1
        square_sums = square_sums.new_zeros(num_tags).index_add(0, index, square_sums)[index]
        counts = counts.new_zeros(num_tags).index_add(0, index, counts)[index]
    std = (square_sums / counts.clamp(min=1)).sqrt()
    # The floor keeps 0 / 0 out at eps 0.
    divisor = (std + eps).clamp(min=torch.finfo(std.dtype).tiny).unsqueeze(1)
    return (deviations / divisor).clamp(-clamp, clamp)


def group_stats(rewards: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
    """Group statistics for the log: mean std within groups, share of groups with zero std, share of invalid samples.

    Args:
        rewards: [groups, n] as in `group_advantages`.
        valid: [groups, n] as in `group_advantages`.

    Returns:
        Scalars: `std`, mean of the within-group (population) std; `zero_std_share`, share of groups without any spread;
        both over the groups with at least two valid samples (0 when there is none); `invalid_share`, share of samples
        that are not valid.
    """
    assert rewards.ndim == 2 and (valid is None or valid.shape == rewards.shape)
    deviations, counted = _deviations(rewards, valid)
    counts = counted.sum(dim=1)
    usable = counts > 0
    std = (deviations.square().sum(dim=1) / counts.clamp(min=1)).sqrt()
    num_usable = usable.sum().clamp(min=1)
    return {
        "std": std.sum() / num_usable,
        "zero_std_share": (usable & (std == 0)).sum() / num_usable,
        "invalid_share": rewards.new_zeros((), dtype=std.dtype) if valid is None else (~valid).to(std.dtype).mean(),
    }


def _deviations(rewards: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Deviations from the group mean, 0 for samples that do not count, and which samples count: [groups, n] both.

    A sample counts when it is valid and another one of its group is.
    """
    values = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    counted = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    counted = counted & (counted.sum(dim=1, keepdim=True) >= 2)
    # `where`, not a product: 0 * NaN is NaN.
    values = torch.where(counted, values, 0)
    mean = values.sum(dim=1, keepdim=True) / counted.sum(dim=1, keepdim=True).clamp(min=1)
    deviations = torch.where(counted, values - mean, 0)
    # Equal rewards leave rounding errors as deviations, and the division by their own tiny std would let them through
    # as advantages.
    highest = torch.where(counted, values, -torch.inf).amax(dim=1, keepdim=True)
    lowest = torch.where(counted, values, torch.inf).amin(dim=1, keepdim=True)
    rounding = 8 * torch.finfo(values.dtype).eps * values.abs().amax(dim=1, keepdim=True)
    return torch.where(highest - lowest <= rounding, 0, deviations), counted

"""Batches of samples for objectives, made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_modules.objectives import FlowBatch
from lightning_modules.rollout import Trajectory


def batch_of(trajectory: Trajectory, advantages: Tensor, groups: Sequence[int] | None = None) -> FlowBatch:
    """The samples of a trajectory, in one group unless `groups` has a number for each."""
    numbers = torch.tensor(groups or [0] * len(trajectory))
    return FlowBatch(
        trajectory=trajectory,
        advantages=advantages,
        rewards=advantages,
        counted=torch.ones_like(advantages, dtype=torch.bool),
        groups=numbers,
        seeds=range(len(trajectory)),
        group_seeds=[100 + group for group in numbers.tolist()],
        levels_seed=7,
    )

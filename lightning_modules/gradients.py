"""Gradients of ragged micro-batches across processes: no sync in backward, one averaged all-reduce before the step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn


def no_backward_sync(trainer: L.Trainer) -> AbstractContextManager[None]:
    """Keeps DDP from reducing in backward: ranks may run different numbers of micro-batches."""
    strategy = trainer.strategy
    return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replaces every gradient by its mean over the ranks; a parameter without one counts as zero there."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter)


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Clips one agent's gradient and returns its norm before."""
    return nn.utils.clip_grad_norm_(parameters, max_norm)

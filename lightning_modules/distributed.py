"""Collectives for several processes: averaged gradients of ragged micro-batches, lists gathered from all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

T = TypeVar("T")


def no_backward_sync(trainer: L.Trainer) -> AbstractContextManager[None]:
    """Context manager: DDP does not reduce in backward, since ranks may run different numbers of micro-batches."""
    strategy = trainer.strategy
    return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replaces every gradient by its mean over the ranks; a parameter without one counts as zero there.

    Where no rank has any, none gets one: an optimizer would move weights on by momentum for a gradient of zeros.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    present = parameters[0].new_tensor([any(parameter.grad is not None for parameter in parameters)])
    flat = torch.cat([present, *((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters)])
    dist.all_reduce(flat)
    if flat[0] == 0:
        return
    gradients = (flat[1:] / dist.get_world_size()).split([p.numel() for p in parameters])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter)


def gather_lists(items: list[T]) -> list[T]:
    """Joins every rank's list in the order of ranks; a collective, for small objects that pickle."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return items
    lists: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, items)
    return [item for one in lists for item in one]


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sums a tensor over all ranks, each of which gets the sum; a collective."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Clips the gradient of one agent's parameters; returns its norm before clipping, a scalar."""
    return nn.utils.clip_grad_norm_(parameters, max_norm)

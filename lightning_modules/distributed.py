"""Collectives for several processes: averaged gradients of ragged micro-batches, lists gathered from all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")

CHUNK = 2**26
"""Numbers that `average_gradients` sends at once: 256 MiB of fp32."""


def several_processes() -> bool:
    """Returns True if this process has others to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def no_backward_sync(trainer: L.Trainer) -> AbstractContextManager[None]:
    """Context manager: DDP does not reduce in backward, since ranks may run different numbers of micro-batches."""
    strategy = trainer.strategy
    return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()


def average_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
    """Replaces every gradient by its mean over the ranks, in place; a parameter without one counts as zero there.

    Where no rank has any, none gets one: an optimizer would move weights on by momentum for a gradient of zeros. Beside
    the gradients it takes the memory of one `CHUNK`.

    Args:
        parameters: the same on every rank; of sharded ones, each rank's own part.
        group: ranks to average over; None is all. Whether there is a gradient is always asked of all.
    """
    if not several_processes():
        return
    present = torch.tensor(float(any(p.grad is not None for p in parameters)), device=local_part(parameters[0]).device)
    if not sum_over_ranks(present):
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if dist.get_world_size(group) == 1:
        return
    for chunk in _chunks([local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]):
        flat = chunk[0].flatten() if len(chunk) == 1 else torch.cat([gradient.flatten() for gradient in chunk])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        for gradient, mean in zip(chunk, flat.split([one.numel() for one in chunk]), strict=True):
            gradient.copy_(mean.view_as(gradient))  # onto itself, if it was alone


def _chunks(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Groups contiguous gradients of one dtype up to `CHUNK` numbers; a larger one is alone."""
    chunk: list[Tensor] = []
    for gradient in gradients:
        full = sum(one.numel() for one in chunk) + gradient.numel() > CHUNK
        if chunk and (full or gradient.dtype != chunk[0].dtype):
            yield chunk
            chunk = []
        chunk.append(gradient)
    yield chunk


def local_part(tensor: Tensor) -> Tensor:
    """Returns this rank's own part of a sharded tensor, any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a sharded tensor, any other as it is; a collective for sharded ones."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_lists(items: list[T]) -> list[T]:
    """Joins every rank's list in the order of ranks; a collective, for small objects that pickle."""
    if not several_processes():
        return items
    lists: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, items)
    return [item for one in lists for item in one]


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sums a tensor over all ranks, each of which gets the sum; a collective."""
    if several_processes():
        dist.all_reduce(values)
    return values


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Clips the gradient of one agent's parameters; returns its norm before clipping, a scalar.

    Of sharded parameters every rank has a part, and the norm is that of all parts together.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([local_part(gradient) for gradient in gradients])
    if gradients and isinstance(gradients[0], DTensor):
        squared = norm.square()
        dist.all_reduce(squared, group=gradients[0].device_mesh.get_group())
        norm = squared.sqrt()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)  # one by one, shards would cost more
    return norm

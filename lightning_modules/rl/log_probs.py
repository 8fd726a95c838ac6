"""Log-probs of sampled tokens, without ever holding the logits of a whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 2**29
"""Bytes of the fp32 logits that `token_log_probs` makes at a time: 883 positions of Qwen's vocabulary."""


def completion_mask(tokens: Tensor, eos_token_ids: Sequence[int]) -> Tensor:
    """Marks the tokens that the policy chose: all up to and including the first end-of-sequence token.

    Args:
        tokens: [B, T] token ids of the completions, without their prompts.
        eos_token_ids: the ids that end a completion.

    Returns:
        [B, T] bool; all True in a row that was cut off before its end.
    """
    assert tokens.ndim == 2
    is_eos = torch.isin(tokens, torch.tensor(list(eos_token_ids), dtype=tokens.dtype, device=tokens.device))
    return is_eos.cumsum(dim=1) - is_eos.long() == 0


def position_ids(attention_mask: Tensor) -> Tensor:
    """Numbers real tokens only, so that padding on the left shifts no position.

    Args:
        attention_mask: [B, T] 1 for tokens, 0 for padding.

    Returns:
        [B, T] long; 0 for the padding on the left, whose positions nothing attends to.
    """
    assert attention_mask.ndim == 2
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def token_log_probs(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Computes log-probs of given tokens, `log softmax(head(hidden) / temperature)[target]`.

    Works through the B * T positions chunk by chunk, so that the peak, forward and backward, is the logits of one chunk
    instead of all (for Qwen's 151,936 tokens a row of 512 is 311 MB in fp32): the gradient of a chunk's logits is
    written over them. A head that does not learn runs once, since a log-prob's derivative by its own hidden state, all
    that is then needed, is found right away. One that learns runs again in the backward pass, but for the last chunk,
    whose logits are kept.

    Args:
        hidden: [B, T, D] last hidden states, each at the position that predicts its target.
        head: maps [N, D] hidden states to [N, V] logits, each row by itself; a module without parameters that require
            gradients does not learn.
        targets: [B, T] token ids.
        temperature: softmax temperature that the tokens were sampled with.
        chunk_size: most positions per chunk; None takes as many as have fp32 logits of `CHUNK_BYTES`, or of the bytes
            of a weight of the head that learns.

    Returns:
        [B, T] log-probs in nats, fp32 (float64 for float64 logits). A second backward pass through them raises
        RuntimeError.
    """
    assert hidden.ndim == 3 and targets.shape == hidden.shape[:2] and temperature > 0
    states, ids = hidden.flatten(0, 1), targets.flatten()
    weights = [one for one in head.parameters() if one.requires_grad] if isinstance(head, nn.Module) else []
    learns = not isinstance(head, nn.Module) or bool(weights)
    if chunk_size is None:
        with torch.no_grad():
            vocabulary = getattr(head, "out_features", None) or head(states[:1]).shape[1]
        # Autograd adds the gradients of several chunks by holding three, so that smaller chunks than one save nothing.
        chunk_size = max(1, max([CHUNK_BYTES, *(weight.nbytes for weight in weights)]) // (4 * vocabulary))
    assert chunk_size > 0
    count = max(1, math.ceil(len(states) / chunk_size))
    size = max(1, math.ceil(len(states) / count))
    if torch.is_grad_enabled() and hidden.requires_grad and not learns:
        whole: Tensor = _FrozenHead.apply(states, head, ids, temperature, size)  # type: ignore[no-untyped-call]
        return whole.view(targets.shape)

    def chunk_log_probs(states: Tensor, ids: Tensor) -> Tensor:
        log_probs: Tensor = _LogProbs.apply(head(states), ids, temperature)  # type: ignore[no-untyped-call]
        return log_probs

    *pairs, last = zip(torch.split(states, size), torch.split(ids, size), strict=True)
    again = partial(checkpoint, chunk_log_probs, use_reentrant=False) if torch.is_grad_enabled() else chunk_log_probs
    return torch.cat([*(again(*pair) for pair in pairs), chunk_log_probs(*last)]).view(targets.shape)


class _LogProbs(Function):
    """Log-probs [N] of tokens by logits [N, V], which their gradient replaces; fp32 arithmetic on a few rows a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
        # fp32: autocast would leave the logits, and a log-softmax after them, in bf16.
        wide = torch.promote_types(logits.dtype, torch.float32)
        sums = []
        for rows in torch.split(logits, _block_size(logits)):
            largest = rows.amax(1, keepdim=True).to(wide)
            shifted = rows - largest
            if temperature != 1:
                shifted /= temperature
                largest /= temperature
            sums.append(shifted.exp_().sum(1).log_() + largest[:, 0])
        log_sums = torch.cat(sums)
        ctx.save_for_backward(logits, ids, log_sums)
        ctx.temperature = temperature
        return logits.gather(1, ids[:, None])[:, 0].to(wide) / temperature - log_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, log_sums = ctx.saved_tensors
        scale = (gradient / ctx.temperature)[:, None]
        columns = (logits, ids[:, None], log_sums[:, None], scale)
        blocks = (torch.split(x, _block_size(logits)) for x in columns)
        for rows, index, sums, by in zip(*blocks, strict=True):
            block = rows.to(scale.dtype)
            if ctx.temperature != 1:
                block /= ctx.temperature
            block.sub_(sums).exp_().mul_(-by).scatter_add_(1, index, by)
            if block is not rows:
                rows.copy_(block)
        return logits, None, None


class _FrozenHead(Function):
    """Log-probs [N] by hidden states [N, D] under a head that does not learn, which runs once."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: nn.Module, ids: Tensor, temperature: float, size: int) -> Tensor:
        derivative, values = torch.empty_like(states), []
        parts = (torch.split(x, size) for x in (states, derivative, ids))
        for rows, own, index in zip(*parts, strict=True):
            with torch.enable_grad():
                leaf = rows.detach().requires_grad_()
                log_probs = _LogProbs.apply(head(leaf), index, temperature)  # type: ignore[no-untyped-call]
            # Not `autograd.grad`, beside which FlopCounterMode's hooks fail; the leaf alone takes a gradient here.
            torch.autograd.backward(log_probs, torch.ones_like(log_probs))
            assert leaf.grad is not None
            own.copy_(leaf.grad)
            values.append(log_probs.detach())
        ctx.save_for_backward(derivative)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (derivative,) = ctx.saved_tensors
        return derivative.mul_(gradient[:, None]), None, None, None, None


def _block_size(logits: Tensor) -> int:
    """Number of rows whose fp32 copies are small beside logits [N, V]."""
    return max(1, len(logits) // 16)

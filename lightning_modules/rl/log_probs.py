"""Log-probs of sampled tokens, without ever holding the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


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
    chunk_size: int = 1024,
) -> Tensor:
    """Computes log-probs of given tokens, `log softmax(head(hidden) / temperature)[target]`.

    Works through the B * T positions chunk by chunk and recomputes each chunk's logits in the backward pass, so the
    peak is `chunk_size * V` instead of `B * T * V` logits (for Qwen's 151,936 tokens a row of 512 is 311 MB in fp32).

    Args:
        hidden: [B, T, D] last hidden states, each at the position that predicts its target.
        head: maps [N, D] hidden states to [N, V] logits.
        targets: [B, T] token ids.
        temperature: softmax temperature that the tokens were sampled with.
        chunk_size: positions per chunk.

    Returns:
        [B, T] log-probs in nats, fp32 (float64 for float64 logits).
    """
    assert hidden.ndim == 3 and targets.shape == hidden.shape[:2] and temperature > 0 and chunk_size > 0

    def chunk_log_probs(states: Tensor, ids: Tensor) -> Tensor:
        logits = head(states)
        # fp32: autocast would leave the logits, and the log-softmax after them, in bf16.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        return logits.gather(1, ids.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=1)

    chunks = []
    state_chunks, id_chunks = torch.split(hidden.flatten(0, 1), chunk_size), torch.split(targets.flatten(), chunk_size)
    for states, ids in zip(state_chunks, id_chunks, strict=True):
        if torch.is_grad_enabled():
            chunks.append(checkpoint(chunk_log_probs, states, ids, use_reentrant=False))
        else:
            chunks.append(chunk_log_probs(states, ids))
    return torch.cat(chunks).view(targets.shape)

"""Writing by a language model, token by token: a plain loop that rows leave once they have ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

LEAVE = 0.25
"""Share of the rows in the batch that have ended when they leave it: to select keys and values costs about a step."""


@torch.no_grad()
def write(
    logits: Callable[[Tensor, Tensor, Tensor], Tensor],
    cache: DynamicCache,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    temperature: float | None,
) -> tuple[Tensor, Tensor]:
    """Draws tokens, or chooses them greedily, until all rows have ended.

    The draws are those of transformers' `generate`, and each row's own, whichever others have left: all rows' random
    numbers are drawn in every step. (A smaller batch may round a row's probabilities otherwise.)

    Args:
        logits: maps token ids [b, 1], mask [b, L] and positions [..., b, 1] to the next token's logits [b, V], and adds
            to the cache.
        cache: keys and values of all prompt tokens but the last; changed.
        ids: [B] the last token of each prompt.
        mask: [B, P] 1 for the prompts' tokens, 0 for padding.
        positions: [..., B, 1] position of the last token.
        max_new_tokens: longest completion.
        eos_token_ids: ids that end a completion.
        pad_token_id: id that fills the rows which have ended.
        temperature: softmax temperature; None is greedy.

    Returns:
        Tokens [B, T], and their log-probs [B, T] fp32: zeros after a row's end and where tokens are chosen greedily,
        NaN where the logits have one, for which any token may be drawn.
    """
    total = len(ids)
    tokens = ids.new_full((total, max_new_tokens), pad_token_id)
    log_probs = torch.zeros(tokens.shape, device=ids.device)
    ends = torch.tensor(list(eos_token_ids), device=ids.device)
    rows, alive = torch.arange(total, device=ids.device), torch.ones_like(ids, dtype=torch.bool)
    for step in range(max_new_tokens):
        scores = logits(ids[:, None], mask, positions).float()
        if temperature is None:
            ids = scores.argmax(-1)
        else:
            ids, found = _draw(scores / temperature, rows, total)
            log_probs[rows, step] = torch.where(alive, found, 0.0)
        ids = torch.where(alive, ids, pad_token_id)
        tokens[rows, step] = ids
        alive = alive & ~torch.isin(ids, ends)
        left = int(alive.sum())
        if not left:
            return tokens[:, : step + 1], log_probs[:, : step + 1]
        mask, positions = torch.cat([mask, torch.ones_like(mask[:, :1])], 1), positions + 1
        if left <= (1 - LEAVE) * len(rows):
            kept = alive.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            ids, mask, rows, alive = ids[kept], mask[kept], rows[kept], alive[kept]
            positions = positions.index_select(-2, kept)
    return tokens, log_probs


def _draw(scores: Tensor, rows: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Draws a token for each row of scores [b, V], the `rows` of a batch of `total`; returns them and log-probs [b]."""
    log_probs = scores.log_softmax(-1)
    # Any token will do where the model says none: its log-prob is NaN, and the update that it spoils is skipped.
    probs = torch.where(log_probs.isnan().any(-1, keepdim=True), 0.0, scores).softmax(-1)
    if len(rows) < total:
        probs = probs.new_ones(total, probs.shape[1]).index_copy_(0, rows, probs)
    ids = torch.multinomial(probs, 1)[rows]
    return ids[:, 0], log_probs.gather(1, ids)[:, 0]

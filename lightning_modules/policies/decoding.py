"""Writing by a language model, token by token: a plain loop that rows leave once they have ended, and CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer

LEAVE = 0.25
"""Share of the rows in the batch that have ended when they leave it: to select keys and values costs about a step."""


@torch.no_grad()
def write(
    logits: Callable[[Tensor, Tensor, Tensor], Tensor],
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    *,
    keep: Callable[[Tensor], None] | None,
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
        ids: [B] the last token of each prompt.
        mask: [B, P] 1 for the prompts' tokens, 0 for padding.
        positions: [..., B, 1] position of the last token.
        keep: leaves only the rows with these numbers in the cache; None keeps all rows in the batch.
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
        if keep is not None and left <= (1 - LEAVE) * len(rows):
            kept = alive.nonzero()[:, 0]
            keep(kept)
            ids, mask, rows, alive = ids[kept], mask[kept], rows[kept], alive[kept]
            positions = positions.index_select(-2, kept)
    return tokens, log_probs


def _draw(scores: Tensor, rows: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Draws a token for each row of scores [b, V], the `rows` of a batch of `total`; returns them and log-probs [b]."""
    log_probs = scores.log_softmax(-1)
    # Any token will do where the model says none: all its log-probs are NaN, and the update that they spoil is skipped.
    probs = scores.softmax(-1).masked_fill_(log_probs[:, :1].isnan(), 1.0)
    if len(rows) < total:
        probs = probs.new_ones(total, probs.shape[1]).index_copy_(0, rows, probs)
    ids = torch.multinomial(probs, 1)[rows]
    return ids[:, 0], log_probs.gather(1, ids)[:, 0]


class FixedLayer(StaticLayer):
    """Keys and values in tensors of fixed length, of the first keys' type: under autocast later ones have others."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds keys and values [B, heads, n, d]; returns all of them."""
        dtype = self.dtype if self.is_initialized else key_states.dtype
        return super().update(key_states.to(dtype), value_states.to(dtype), *args, **kwargs)


class FixedStep:
    """A decoding step whose tensors keep their sizes and places, so that a GPU captures it once as a CUDA graph.

    A small batch keeps a GPU busy for a fraction of the time that it takes to launch a step's kernels one by one; a
    graph launches all of them at once. Two steps run before the capture, and their results are written over.

    Args:
        step: maps token ids [B, 1], mask [B, 1, 1, L] bool, positions [..., B, 1] and a cache to the next token's
            logits [B, V], and adds to the cache.
        cache: keys and values of the prompts' tokens, `plain` ones; taken out of it.
        length: tokens of prompts and completions together.
    """

    def __init__(self, step: Callable[[Tensor, Tensor, Tensor, Cache], Tensor], cache: DynamicCache, length: int):
        self._step = step
        self._layers = [FixedLayer(length) for _ in cache.layers]
        self._start = cache.get_seq_length()
        taken: list[Any] = list(cache.layers)
        for fixed, layer in zip(self._layers, taken, strict=True):
            fixed.update(layer.keys, layer.values)
            layer.keys = layer.values = None
        self._cache = Cache(layers=[*self._layers])
        self._length = length
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self._graph: Any = None
        self._logits: Tensor | None = None

    @staticmethod
    def plain(cache: DynamicCache) -> bool:
        """True if all layers keep keys and values of all tokens: no sliding windows, no recurrent states."""
        return all(type(layer) is DynamicLayer for layer in cache.layers)

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Returns the next token's logits [B, V], which the next call overwrites.

        Args:
            ids: [B, 1] token ids.
            mask: [B, l] 1 for the tokens so far, this one included.
            positions: [..., B, 1] their positions.
        """
        if self._inputs is None:
            wide = mask.new_zeros(len(mask), 1, 1, self._length, dtype=torch.bool)
            self._inputs = ids.clone(), wide, positions.clone()
            self._inputs[1][:, 0, 0, : mask.shape[1]] = mask
            if ids.device.type == "cuda":
                self._capture()
        own_ids, own_mask, own_positions = self._inputs
        own_ids.copy_(ids)
        own_mask[:, 0, 0, mask.shape[1] - 1] = mask[:, -1]
        own_positions.copy_(positions)
        if self._graph is None:
            return self._step(*self._inputs, self._cache)
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _capture(self) -> None:
        try:
            self._record()
        except RuntimeError as error:  # an operation that waits for the CPU, say
            self._graph = None
            warnings.warn(
                f"a decoding step of the refiner is no CUDA graph ({str(error).splitlines()[0]}), and decoding goes on "
                "kernel by kernel; `language.cuda_graphs: false` does not try.",
                stacklevel=2,
            )
        for layer in self._layers:  # what these steps wrote is written again
            layer.cumulative_length.fill_(self._start)

    def _record(self) -> None:
        assert self._inputs is not None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are chosen, and workspaces made, before the capture
            for _ in range(2):
                self._step(*self._inputs, self._cache)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as those of rewards and of NCCL, may use the GPU meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits = self._step(*self._inputs, self._cache)

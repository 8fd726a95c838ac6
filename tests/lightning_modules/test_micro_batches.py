"""The refiner's micro-batches: similar lengths together, no column of padding alone, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.base import PromptSample
from datamodules.chunks import chunks
from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.rollout import Completions, SeenImages
from tests.lightning_modules.test_prompt_rl import Listed, attach


def ragged(prompts: list[int], lengths: list[int], seen: bool = False) -> Completions:
    """Completions of given lengths; every column holds its number."""
    rows, width, longest = len(prompts), max(prompts) + 1, max(lengths) + 1
    columns, written = torch.arange(width).expand(rows, -1), torch.arange(longest).expand(rows, -1)
    mask = columns >= width - torch.tensor(prompts)[:, None]
    images = SeenImages((torch.zeros(0, 1, 1),), (0,) * rows, mask, columns[:, None].expand(-1, 3, -1))
    texts = [str(row) for row in range(rows)]
    return Completions(
        columns,
        mask.long(),
        written,
        written < torch.tensor(lengths)[:, None],
        written.float(),
        texts,
        texts,
        torch.zeros(rows),
        torch.zeros(rows, dtype=torch.bool),
        images if seen else None,
    )


def test_rows_of_similar_length_come_together() -> None:
    completions = ragged([2, 2, 5, 5, 2], [3, 9, 1, 9, 3])  # 5, 11, 6, 14, 5 tokens
    assert completions.micro_batches(2) == [[3, 1], [2, 0], [4]]
    assert completions.micro_batches(None) == [[3, 1, 2, 0, 4]]


@pytest.mark.parametrize("seen", [False, True])
def test_columns_of_padding_are_cut(seen: bool) -> None:
    cut = ragged([2, 3, 5, 1], [3, 2, 9, 4], seen).rows([0, 1, 3]).trimmed()
    assert cut.prompt_ids.tolist() == [[3, 4, 5]] * 3 and cut.tokens.tolist() == [[0, 1, 2, 3]] * 3
    assert cut.prompt_mask.sum(1).tolist() == [2, 3, 1] and cut.mask.sum(1).tolist() == [3, 2, 4]
    assert cut.log_probs.tolist() == cut.tokens.tolist() and cut.texts == ["0", "1", "3"]
    if seen:
        assert cut.seen is not None and cut.seen.mask.sum(1).tolist() == [2, 3, 1]
        assert cut.seen.positions.shape == (3, 3, 3) and cut.seen.positions[0, 2].tolist() == [3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoRA(rank=4, alpha=8)], ids=["full", "lora"])
def test_an_update_is_the_same_for_less_work(
    make_flow: Callable[..., Flux1Policy],
    make_language: Callable[..., LanguagePolicy],
    samples: list[PromptSample],
    monkeypatch: pytest.MonkeyPatch,
    lora: LoRA | None,
) -> None:
    """Two mini-batches, two passes: weights and statistics are those of padded micro-batches in the order drawn."""
    samples = [samples[0], PromptSample("long", " ".join(10 * [samples[1].prompt]), "", {}), *samples[1:3]]
    flow = make_flow(sampling=Sampling(1, 1), learning_rate=None)
    language = make_language(lora=lora, kl_weight=0.1, micro_batch_size=2, clip_range=0.01, learning_rate=1e-3)
    reward = Listed([float(number * number % 7) for number in range(20)])
    optimizer = partial(torch.optim.AdamW, eps=1e-4)
    shapes = {"updates_per_rollout": 2, "num_minibatches": 2}
    module = attach(PromptRL(flow, reward, language, group_size=5, num_retained=1, optimizer=optimizer, **shapes))
    rollout = module.collect(samples)
    assert rollout.completions is not None
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    positions: list[int] = []
    language.causal_lm.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: positions.append(kwargs["input_ids"].numel()), with_kwargs=True
    )

    def update() -> tuple[int, dict[str, float], dict[str, Tensor]]:
        positions.clear()
        stats: dict[str, Any] = module.update(rollout).compute()
        moved = {name: parameter - start[name] for name, parameter in module.named_parameters()}
        for name, parameter in module.named_parameters():
            parameter.data.copy_(start[name])
        module.trainer.optimizers[0].state.clear()
        return sum(positions), stats, moved

    work, stats, moved = update()
    monkeypatch.setattr(Completions, "trimmed", lambda self: self)
    monkeypatch.setattr(
        Completions,
        "micro_batches",
        lambda self, size: [list(range(len(self)))[part] for part in chunks(len(self), size)],
    )
    padded_work, padded_stats, padded_moved = update()
    assert work < 0.75 * padded_work
    assert 0 < stats["train/language/clip_fraction"] < 1
    assert stats == pytest.approx(padded_stats, rel=1e-3, abs=1e-6)
    assert max(change.abs().max() for change in moved.values()) > 1e-4
    for name, change in moved.items():
        torch.testing.assert_close(change, padded_moved[name], atol=2e-6, rtol=1e-3)

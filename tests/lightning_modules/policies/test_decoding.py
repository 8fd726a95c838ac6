"""The loop that writes rewrites against transformers' `generate`: the same tokens to the bit, and their log-probs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from datamodules.base import PromptSample
from lightning_modules.policies.decoding import FixedStep, write
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.policies.vision_language import VisionLanguagePolicy
from lightning_modules.rollout import Completions
from tests.lightning_modules.policies.test_heads import CONFIGS, random_refiner
from tests.lightning_modules.policies.test_vision_language import SAMPLES, load
from tests.lightning_modules.policies.tiny_vision_language import KINDS, build


@torch.no_grad()
def stock(policy: LanguagePolicy, samples: Sequence[PromptSample], num: int, *, greedy: bool) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] and log-probs by transformers' `generate`, from the policy's own prefill."""
    ids, mask, seen = policy._encode(samples)
    cache = policy._prefill(ids, mask, seen, num)
    ids, mask = ids.repeat_interleave(num, 0), mask.repeat_interleave(num, 0)
    temperature = 1.0 if greedy else policy.temperature
    config = GenerationConfig(
        max_new_tokens=policy.max_new_tokens,
        do_sample=not greedy,
        temperature=temperature,
        top_k=50 if greedy else 0,
        eos_token_id=policy.eos_token_ids,
        pad_token_id=policy._pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    policy.causal_lm.generation_config = GenerationConfig()
    output = policy.causal_lm.generate(
        input_ids=ids,
        attention_mask=mask,
        position_ids=policy._positions(mask, None if seen is None else seen.repeat(num)),
        past_key_values=cache,
        generation_config=config,
    )
    tokens = output.sequences[:, ids.shape[1] :]
    scores = torch.stack(output.logits, 1).float() / temperature
    return tokens, scores.log_softmax(-1).gather(2, tokens[..., None])[..., 0]


def compare(policy: LanguagePolicy, samples: Sequence[PromptSample], num: int, *, greedy: bool) -> Completions:
    """Writes with both; the generator is left in the same state too."""
    batches: list[int] = []
    decoder = policy.causal_lm.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(len(kwargs["attention_mask"])), with_kwargs=True
    )
    torch.manual_seed(5)
    ours = policy._write(samples, num, policy.max_new_tokens, greedy=greedy)
    after = torch.rand(4)
    hook.remove()
    assert batches[1] == len(ours) and (greedy or batches[-1] < len(ours)), "rows that have ended leave"
    torch.manual_seed(5)
    tokens, log_probs = stock(policy, samples, num, greedy=greedy)
    assert torch.equal(ours.tokens, tokens) and torch.equal(after, torch.rand(4))
    if greedy:
        assert not ours.log_probs.any()
    else:
        assert (ours.log_probs - log_probs)[ours.mask].abs().max() < 1e-5 and not ours.log_probs[~ours.mask].any()
    return ours


@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_samples_are_those_of_generate(
    make_language: Callable[..., LanguagePolicy], samples: list[PromptSample], temperature: float
) -> None:
    ours = compare(make_language(temperature=temperature), samples, 8, greedy=False)
    assert ours.mask.sum(1).unique().numel() > 3


def test_greedy_tokens_are_those_of_generate(
    make_language: Callable[..., LanguagePolicy], samples: list[PromptSample]
) -> None:
    compare(make_language(), samples, 1, greedy=True)


@pytest.mark.parametrize("kind", KINDS)
def test_vision_language_tokens_are_those_of_generate(kind: str, tmp_path: Path) -> None:
    """Prompts with images and without: positions go on behind an image's longer side."""
    policy = load(build(kind, tmp_path), VisionLanguagePolicy, temperature=0.8)
    for greedy in (False, True):
        eos = policy.causal_lm.generation_config.eos_token_id
        compare(policy, SAMPLES, 8, greedy=greedy)
        policy.causal_lm.generation_config.eos_token_id = eos


def test_a_sliding_window_and_a_cap_are_those_of_generate(samples: list[PromptSample], tmp_path: Path) -> None:
    """Gemma 2 of a window of 8 tokens, which prompts and rewrites are longer than."""
    policy = random_refiner(CONFIGS[0], tmp_path / "model", max_new_tokens=20)
    policy.causal_lm.generation_config.eos_token_id = list(range(1, 8))
    ours = compare(policy, samples, 6, greedy=False)
    assert ours.prompt_mask.sum(1).max() > 8 and ours.mask.sum(1).max() > 8


class Counting(nn.Module):
    """A model whose next token is one more than the last, with certainty; it notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[list[int], list[list[int]], list[int]]] = []

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        self.calls.append((ids[:, 0].tolist(), mask.tolist(), positions[:, 0].tolist()))
        logits = torch.full((len(ids), 10), -torch.inf)
        return logits.scatter(1, ids + 1, 0.0)


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_ends_masks_and_positions_by_hand(temperature: float | None) -> None:
    """Token 7 ends: after 2, 5 and (cut off) 6 tokens; the first of three leaves at once, being a third of them."""
    model, mask = Counting(), torch.tensor([[1, 1], [0, 1], [1, 1]])
    kept: list[list[int]] = []
    settings: dict[str, Any] = {"eos_token_ids": [7], "pad_token_id": 9, "temperature": temperature}
    settings["keep"] = lambda rows: kept.append(rows.tolist())
    inputs = (torch.tensor([5, 2, 0]), mask, torch.tensor([[1], [0], [1]]))
    tokens, log_probs = write(model, *inputs, max_new_tokens=6, **settings)
    assert tokens.tolist() == [[6, 7, 9, 9, 9, 9], [3, 4, 5, 6, 7, 9], [1, 2, 3, 4, 5, 6]]
    assert not log_probs.any() and kept == [[1, 2], [1]]
    assert model.calls[1] == ([6, 3, 1], [[1, 1, 1], [0, 1, 1], [1, 1, 1]], [2, 1, 2])
    assert model.calls[2] == ([4, 2], [[0, 1, 1, 1], [1, 1, 1, 1]], [2, 3])
    assert model.calls[5] == ([5], [[1] * 7], [6])
    tokens, _ = write(model, *inputs, max_new_tokens=20, **(settings | {"eos_token_ids": [7, 3]}))
    assert tokens.tolist() == [[6, 7, 9], [3, 9, 9], [1, 2, 3]], "it stops where the last one has ended"


def test_any_token_is_drawn_where_logits_are_not_numbers() -> None:
    def broken(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        logits = torch.zeros(len(ids), 10)
        logits[0, 3] = torch.nan
        return logits

    inputs = (torch.zeros(2, dtype=torch.long), torch.ones(2, 1, dtype=torch.long), torch.zeros(2, 1))
    settings: dict[str, Any] = {"keep": None, "eos_token_ids": [], "pad_token_id": 0, "temperature": 1.0}
    tokens, log_probs = write(broken, *inputs, max_new_tokens=50, **settings)
    assert tokens[0].unique().numel() > 5 and log_probs[0].isnan().all()
    torch.testing.assert_close(log_probs[1], torch.full((50,), -torch.tensor(10.0).log()))


def in_fixed_places(policy: LanguagePolicy, samples: Sequence[PromptSample], monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes with and without keys and values of fixed length, which a GPU's graphs need; same tokens."""
    for greedy, num in ((False, 8), (True, 1)):
        written = []
        for fixed in (True, False):
            monkeypatch.setattr(policy, "_captures", lambda _, fixed=fixed: fixed)
            torch.manual_seed(5)
            written.append(policy._write(samples, num, policy.max_new_tokens, greedy=greedy))
        ours, usual = written
        assert torch.equal(ours.tokens, usual.tokens)
        torch.testing.assert_close(ours.log_probs, usual.log_probs, rtol=0, atol=1e-5)


def test_keys_and_values_of_fixed_length_give_the_same_rewrites(
    make_language: Callable[..., LanguagePolicy], samples: list[PromptSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_fixed_places(make_language(), samples, monkeypatch)


def test_keys_and_values_of_fixed_length_under_autocast(
    make_language: Callable[..., LanguagePolicy], samples: list[PromptSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their types vary, and rounding with the length: sampled and replayed log-probs are as near as without."""
    policy, apart = make_language(), {}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for fixed in (True, False):
            monkeypatch.setattr(policy, "_captures", lambda _, fixed=fixed: fixed)
            written = policy.refine(samples, 8)
            apart[fixed] = (policy.log_probs(written) - written.log_probs)[written.mask].abs().mean()
    assert apart[True] < 1.5 * apart[False] < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_of_fixed_length_give_the_same_rewrites_of_edits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_fixed_places(load(build(kind, tmp_path), VisionLanguagePolicy, temperature=0.8), SAMPLES, monkeypatch)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_only_plain_keys_and_values_have_a_fixed_length(
    config: Any, samples: list[PromptSample], tmp_path: Path
) -> None:
    policy = random_refiner(config, tmp_path / "model", max_new_tokens=4)
    ids, mask, seen = policy._encode(samples)
    windows = {"sliding_attention", "linear_attention"} & set(
        getattr(policy.causal_lm.config, "layer_types", None) or ()
    )
    assert FixedStep.plain(policy._prefill(ids, mask, seen, 1)) == (not windows)
    assert not policy._captures(policy._prefill(ids, mask, seen, 1)), "on a CPU there is nothing to capture"

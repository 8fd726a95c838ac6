"""Refiners whose own forward pass caps or scales its logits are sampled, replayed and trained with them as they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PreTrainedConfig

from datamodules.base import PromptSample
from lightning_modules.policies.base import LoRA
from lightning_modules.policies.heads import output_head
from lightning_modules.policies.language import LanguagePolicy

SIZES: dict[str, Any] = {
    "vocab_size": 139,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
CONFIGS = [
    Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=2.0, sliding_window=8),
    GraniteConfig(**SIZES, logits_scaling=0.25),
    CohereConfig(**SIZES, logit_scale=3.0),
]


def random_refiner(config: PreTrainedConfig, folder: Path, **kwargs: Any) -> LanguagePolicy:
    """A refiner with random weights and the miniature's words."""
    shutil.copytree("miniature/language", folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    policy = LanguagePolicy(str(folder), "{prompt}", dtype="float32", temperature=0.8, **kwargs)
    policy.load()
    return policy


@pytest.mark.parametrize("lora", [None, LoRA(rank=4, alpha=8, targets=["q_proj"])], ids=["full", "lora"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_log_probs_are_those_of_the_models_own_logits(
    config: PreTrainedConfig, lora: LoRA | None, samples: list[PromptSample], tmp_path: Path
) -> None:
    policy = random_refiner(config, tmp_path / "model", max_new_tokens=8, lora=lora)
    completions = policy.refine(samples[:2], 3)
    log_probs = policy.log_probs(completions)
    torch.testing.assert_close(log_probs[completions.mask], completions.log_probs[completions.mask], atol=5e-5, rtol=0)

    row, mask = 0, completions.mask[0]
    prompt = completions.prompt_ids[row][completions.prompt_mask[row].bool()]
    answer = completions.tokens[row][mask]
    logits = policy.network(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
    expected = (logits / 0.8).log_softmax(-1).gather(1, answer[:, None])[:, 0]
    torch.testing.assert_close(log_probs[row][mask], expected, atol=5e-5, rtol=0)
    weights = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    ours = torch.autograd.grad(log_probs[row][mask].sum(), weights, materialize_grads=True)
    for gradient, right in zip(ours, torch.autograd.grad(expected.sum(), weights, materialize_grads=True), strict=True):
        torch.testing.assert_close(gradient, right, atol=1e-3, rtol=1e-3)
    layer = policy.causal_lm.get_output_embeddings()
    assert not torch.allclose(layer(torch.ones(1, 32)), output_head(policy.causal_lm)(torch.ones(1, 32)))
    assert list(output_head(policy.causal_lm).parameters()) == list(layer.parameters())


def test_other_models_have_their_last_layer(make_language: Any) -> None:
    assert isinstance(output_head(make_language().causal_lm), nn.Linear)

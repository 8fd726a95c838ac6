"""The generation settings in a model's folder change nothing: neither rewrites nor samples nor log-probs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from datamodules.base import PromptSample
from lightning_modules.policies.language import LanguagePolicy

BAD: dict[str, Any] = {
    "max_length": 3,
    "max_new_tokens": 3,
    "min_length": 60,
    "min_new_tokens": 20,
    "early_stopping": True,
    "max_time": 0.0,
    "stop_strings": ["a"],
    "do_sample": True,
    "num_beams": 3,
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"nbits": 4},
    "max_cache_len": 5,
    "temperature": 5.0,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.3,
    "top_h": 0.1,
    "typical_p": 0.3,
    "epsilon_cutoff": 0.3,
    "eta_cutoff": 0.3,
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 5.0,
    "length_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[token] for token in range(2, 60)],
    "renormalize_logits": True,
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [1, 5.0],
    "suppress_tokens": list(range(2, 60)),
    "begin_suppress_tokens": list(range(2, 108)),
    "sequence_bias": [[[token], -50.0] for token in range(2, 60)],
    "token_healing": True,
    "guidance_scale": 3.0,
    "watermarking_config": {"bias": 20.0, "greenlist_ratio": 0.1},
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 7,
    "bos_token_id": 7,
    "eos_token_id": 0,  # the folder's are kept, and the tokenizer's is one in any case
    "encoder_no_repeat_ngram_size": 1,
    "decoder_start_token_id": 7,
    "is_assistant": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.9,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 2,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 1,
    "target_lookbehind": 1,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "dflash",
    "disable_compile": True,
    "low_memory": True,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "diversity_penalty": 5.0,
    "num_beam_groups": 3,
    "constraints": [7],
    "force_words_ids": [[7]],
    "prefill_chunk_size": 2,
}
"""Name of a setting -> value that is not the library's own, and changes or breaks what a model writes if it counts."""

UNREADABLE = {"compile_config", "continuous_batching_config"}
"""Settings that transformers itself takes from no file."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Folder of the miniature's refiner, for a test to spoil."""
    return Path(shutil.copytree("miniature/language", tmp_path / "language"))


def written(model: Path, samples: Sequence[PromptSample], **options: Any) -> tuple[list[str], torch.Tensor]:
    """Returns greedy rewrites and 4 sampled completions of each prompt, which replay as they were drawn."""
    options = {"template": "{prompt}", "max_new_tokens": 32, "eval_max_new_tokens": 32, "dtype": "float32"} | options
    policy = LanguagePolicy(str(model), **options)
    policy.load()
    before = policy.causal_lm.generation_config.to_dict()
    torch.manual_seed(0)
    completions = policy.refine(samples, 4)
    difference = (policy.log_probs(completions) - completions.log_probs)[completions.mask]
    assert difference.abs().max() < 1e-5
    rewrites = policy.rewrite(samples)
    assert policy.causal_lm.generation_config.to_dict() == before  # what an export keeps
    return rewrites, completions.tokens


def spoil(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture(scope="module")
def right() -> tuple[list[str], torch.Tensor]:
    return written(Path("miniature/language"), SAMPLES)


SAMPLES = [PromptSample(str(i), text, "", {}) for i, text in enumerate(["a red circle", "two blue squares", "a cross"])]


def test_every_setting_of_transformers_is_tried() -> None:
    """A transformers version with a new setting fails here: give it a bad value above."""
    config = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    assert config == BAD.keys() | UNREADABLE


@pytest.mark.parametrize("name", BAD)
def test_settings_of_the_folder_change_nothing(name: str, model: Path, right: tuple[list[str], torch.Tensor]) -> None:
    spoil(model / "generation_config.json", **{"do_sample": True, name: BAD[name]})  # what counts in sampling alone too
    rewrites, tokens = written(model, SAMPLES)
    assert rewrites == right[0] and torch.equal(tokens, right[1])


@pytest.mark.parametrize(
    "settings", [{"use_cache": False}, {"min_p": 0.3, "num_beams": 3}, {"output_attentions": True}]
)
def test_nor_do_those_of_config_json(
    settings: dict[str, Any], model: Path, right: tuple[list[str], torch.Tensor]
) -> None:
    (model / "generation_config.json").unlink()
    spoil(model / "config.json", **settings)
    rewrites, tokens = written(model, SAMPLES)
    assert rewrites == right[0] and torch.equal(tokens, right[1])

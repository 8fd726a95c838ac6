"""Tiny Qwen2.5-VL and Qwen3-VL with random weights, in folders laid out as the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tests.lightning_modules.policies.family import byte_tokenizer

KINDS = ("qwen2_5_vl", "qwen3_vl")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
WITH_IMAGES = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS_ONLY = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(kind: str, folder: Path) -> Path:
    """Writes a folder of 0.1M random weights. Completions end at one token in ten; image tokens are drawn often."""
    tokenizer = byte_tokenizer(SPECIAL, pad_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=WORDS_ONLY)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()  # the published folders keep it in the tokenizer's configuration
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": WORDS_ONLY}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": WITH_IMAGES}))
    patch = 14 if kind == "qwen2_5_vl" else 16
    Qwen2VLImageProcessorPil(patch_size=patch).save_pretrained(folder)

    torch.manual_seed(0)
    model = _qwen2_5_vl(tokenizer) if kind == "qwen2_5_vl" else _qwen3_vl(tokenizer)
    model.lm_head.weight.data[tokenizer.convert_tokens_to_ids("<|image_pad|>")] *= 6
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(20, 50)]
    model.save_pretrained(folder)
    return folder


def _text(tokenizer: Any, sections: list[int]) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer) + 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.15,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections},
    }


def _ids(tokenizer: Any) -> dict[str, int]:
    tokens = {"image_token_id": "image_pad", "vision_start_token_id": "vision_start"}
    tokens["vision_end_token_id"] = "vision_end"
    return {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in tokens.items()}


def _qwen2_5_vl(tokenizer: Any) -> Any:
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.15,
    }
    config = Qwen2_5_VLConfig(text_config=_text(tokenizer, [2, 3, 3]), vision_config=vision, **_ids(tokenizer))
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(tokenizer: Any) -> Any:
    vision = {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
        "initializer_range": 0.15,
    }
    text = _text(tokenizer, [4, 2, 2]) | {"head_dim": 16}
    text["rope_parameters"]["mrope_interleaved"] = True
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **_ids(tokenizer)))

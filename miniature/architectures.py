"""Builds the miniature's untrained models from stock diffusers and transformers classes.

Only the sizes are small: every class, file name and call is the one that FLUX.1-dev and Qwen3 use, so that a folder
saved from here is loaded by the production code path and by `FluxPipeline.from_pretrained` alike.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

TEXT_LENGTH = 18
"""Longest caption in tokens, end of sequence included (FLUX.1-dev: 512)."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)

VISION_CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<vision><image></vision> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}<end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def build_vae() -> AutoencoderKL:
    """Builds an autoencoder of 138k parameters.

    It downsamples 4x, so that FLUX's 2 x 2 packing makes one token of one 8 x 8 cell.
    """
    return AutoencoderKL(
        block_out_channels=(12, 24, 24),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=12,
        norm_num_groups=6,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=32,
    )


def _clip_tokenizer(words: list[str]) -> CLIPTokenizer:
    """Makes CLIP's tokenizer, a byte-pair encoding: the commonest neighbours merge until every word is one token.

    The trainer of the tokenizers package would number the tokens differently in every run.
    """
    spelt = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    tokens = ["<|startoftext|>", "<|endoftext|>", *sorted({part for parts in spelt for part in parts})]
    merges: list[Any] = []
    while pairs := Counter(pair for parts in spelt for pair in pairwise(parts)):
        merge = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(merge)
        tokens.append("".join(merge))
        for parts in spelt:
            for i in reversed(range(len(parts) - 1)):
                if (*parts[i : i + 2],) == merge:
                    parts[i : i + 2] = ["".join(merge)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH + 1)


def _word_tokenizer(words: list[str], specials: list[str], **roles: Any) -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if roles["eos_token"] == "</s>":  # T5 ends every text; a causal LM's prompt must stay open
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", vocab["</s>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", **roles)


def build_flow(words: list[str], vae: Any) -> FluxPipeline:
    """Builds a FLUX.1 pipeline of about 1M parameters around a trained autoencoder.

    Args:
        words: the vocabulary, one token a word in both tokenizers.
        vae: its `scaling_factor` and `shift_factor` must be set.
    """
    clip = _clip_tokenizer(words)
    t5 = _word_tokenizer(words, ["<pad>", "</s>", "<unk>"], eos_token="</s>")
    t5.model_max_length = TEXT_LENGTH
    clip_config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH + 1,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(t5),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=t5.pad_token_id,
        eos_token_id=t5.eos_token_id,
    )
    transformer = FluxTransformer2DModel(
        in_channels=4 * vae.config.latent_channels,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=t5_config.d_model,
        pooled_projection_dim=clip_config.hidden_size,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=CLIPTextModel(clip_config),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(t5_config),
        tokenizer_2=t5,
        transformer=transformer,
    )


@torch.no_grad()
def carry_over(old: Any, new: Any) -> None:
    """Gives a pipeline of `build_flow` the weights of another one; words are matched by their spelling.

    Args:
        old: the trained `FluxPipeline`.
        new: changed in place; words that only it knows keep their random embeddings.
    """
    new.transformer.load_state_dict(old.transformer.state_dict())
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        known, ids = getattr(old, tokenizer).get_vocab(), getattr(new, tokenizer).get_vocab()
        carry_over_words(getattr(old, encoder), known, getattr(new, encoder), ids)


@torch.no_grad()
def carry_over_words(before: Any, known: dict[str, int], after: Any, ids: dict[str, int]) -> None:
    """Gives a model that reads words the weights of another of its kind; words are matched by their spelling.

    Args:
        before: the trained model.
        known: its vocabulary.
        after: changed in place; words that only it knows keep their random embeddings.
        ids: its vocabulary.
    """
    fresh = after.get_input_embeddings().weight.clone()
    for word in known.keys() & ids.keys():
        fresh[ids[word]] = before.get_input_embeddings().weight[known[word]]
    state = {k: v for k, v in before.state_dict().items() if v.shape == after.state_dict()[k].shape}
    after.load_state_dict(state, strict=False)
    after.get_input_embeddings().weight.copy_(fresh)


def _chat_tokenizer(words: list[str], specials: list[str], template: str, **roles: Any) -> PreTrainedTokenizerFast:
    tokenizer = _word_tokenizer([*words, "<answer>", "</answer>"], specials, eos_token="<end>", **roles)
    tokenizer.chat_template = template
    tokenizer.padding_side = "left"
    return tokenizer


def _text_sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Returns the sizes of both refiners, Qwen3 and Qwen2.5-VL, and the tokenizer's ids."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


def build_language(words: list[str]) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Builds a Qwen3 of 0.23M parameters, with a word-level tokenizer and a chat template."""
    specials = ["<pad>", "<end>", "<unk>", "<user>", "<assistant>"]
    tokenizer = _chat_tokenizer(words, specials, CHAT_TEMPLATE)
    config = Qwen3Config(head_dim=24, tie_word_embeddings=True, dtype=torch.float32, **_text_sizes(tokenizer))
    return Qwen3ForCausalLM(config), tokenizer


def build_vision_language(
    words: list[str],
) -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil]:
    """Builds a Qwen2.5-VL of 0.4M parameters, its tokenizer and its image processor.

    A cell of 8 x 8 pixels is one token, so that an image of 32 x 32 pixels has 16.
    """
    specials = ["<pad>", "<end>", "<unk>", "<user>", "<assistant>", "<vision>", "<image>", "</vision>"]
    tokenizer = _chat_tokenizer(words, specials, VISION_CHAT_TEMPLATE, additional_special_tokens=specials[5:])
    vision_start, image, vision_end = (tokenizer.get_vocab()[token] for token in specials[5:])
    text = _text_sizes(tokenizer) | {
        "initializer_range": 0.06,
        # Half of a head's 24 dimensions in all. Rows and columns get the later, slower ones: a base of 100 keeps these
        # fast enough for a grid of four.
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 4, 4]},
    }
    vision = {
        "initializer_range": 0.1,
        "depth": 2,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_heads": 4,
        "patch_size": 4,
        "out_hidden_size": 96,
        "fullatt_block_indexes": [0, 1],
        "window_size": 32,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        vision_start_token_id=vision_start,
        vision_end_token_id=vision_end,
        tie_word_embeddings=True,
        dtype=torch.float32,
    )
    half = [0.5] * 3
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, min_pixels=8 * 8, max_pixels=32 * 32, image_mean=half, image_std=half
    )
    return Qwen2_5_VLForConditionalGeneration(config), tokenizer, processor

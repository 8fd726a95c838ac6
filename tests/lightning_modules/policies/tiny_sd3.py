"""Tiny SD3.5: random weights; the first of its blocks has SD3.5-medium's second attention."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from lightning_modules.policies.sd3 import SD3Policy
from miniature.architectures import build_vae
from tests.lightning_modules.policies.family import Family, clip_tokenizer, draw_stock, guided_arguments, t5_tokenizer


def _clip(tokenizer: CLIPTokenizer, hidden_size: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            projection_dim=hidden_size,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=48,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build(t5: bool = True, **scheduler: Any) -> StableDiffusion3Pipeline:
    """Makes SD3.5's pipeline.

    Args:
        t5: True with the third text encoder.
        **scheduler: settings instead of the published constant shift of 3.
    """
    clip, clip_2, tokenizer = clip_tokenizer(48), clip_tokenizer(48), t5_tokenizer()
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    )
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=4,
        joint_attention_dim=48,
        caption_projection_dim=48,
        pooled_projection_dim=20 + 24,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    for block in transformer.transformer_blocks:
        torch.nn.init.ones_(block.norm1.linear.bias)  # gates near 0, as they come, would leave attention no say
    vae = build_vae()
    vae.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**(scheduler or {"shift": 3.0})),
        vae=vae,
        transformer=transformer,
        text_encoder=_clip(clip, 20),
        tokenizer=clip,
        text_encoder_2=_clip(clip_2, 24),
        tokenizer_2=clip_2,
        text_encoder_3=encoder if t5 else None,
        tokenizer_3=tokenizer if t5 else None,
    )


def draw(
    pipe: Any, policy: Any, prompts: list[str], latents: Tensor, steps: int, images: list[Image.Image] | None
) -> Tensor:
    """Draws with `StableDiffusion3Pipeline`, which batches the two passes of guidance."""
    return draw_stock(pipe, policy, prompts, latents, steps, **guided_arguments(policy))


SD3 = Family("sd3", SD3Policy, build, draw, options={"max_sequence_length": 16}, learning_rate=3e-2)

"""Tiny Qwen-Image: stock classes with random weights, the published scheduler and latent statistics."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from lightning_modules.policies.qwen_image import QwenImagePolicy
from tests.lightning_modules.policies.family import PROMPTS, Family, byte_tokenizer, draw_stock, qwen2_5_vl_config

SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
]


def parts(**transformer: Any) -> dict[str, Any]:
    """Makes the pipeline's parts, 0.2M random weights; 8 pixels a token.

    Args:
        **transformer: settings of the transformer beside its size.
    """
    # The pipelines drop a fixed number of tokens, their template's in Qwen's tokenizer: each of its words must be one.
    templates = [
        QwenImagePipeline(*[None] * 5).prompt_template_encode,
        QwenImageEditPlusPipeline(*[None] * 6).prompt_template_encode,
    ]
    tokenizer = byte_tokenizer(SPECIAL, [*PROMPTS, *templates], 1000, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.3, 0.2, 0.1, -0.1],
        latents_std=[1.5, 0.7, 1.2, 0.9],
    )
    vae.decoder.conv_out.weight.data *= 8  # a fresh one's images are nearly flat
    vae.decoder.conv_out.bias.data = torch.tensor([-1.0, 1.0, 0.5])  # and not clipped
    network = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4),
        **transformer,
    )
    for name, parameter in network.named_parameters():
        if "_mod." in name:
            parameter.data *= 10  # a fresh one's gates are nearly shut
    network.proj_out.weight.data *= 4  # and its velocity is small beside the noise
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(  # as in Qwen/Qwen-Image
            base_image_seq_len=256,
            base_shift=0.5,
            max_image_seq_len=8192,
            max_shift=0.9,
            shift_terminal=0.02,
            use_dynamic_shifting=True,
        ),
        "vae": vae,
        "text_encoder": text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "transformer": network,
    }


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLForConditionalGeneration:
    """Makes a tiny Qwen2.5-VL with random weights."""
    return Qwen2_5_VLForConditionalGeneration(qwen2_5_vl_config(tokenizer))


def build() -> Any:
    """Makes Qwen-Image's pipeline."""
    return QwenImagePipeline(**parts())


def draw(
    pipe: Any, policy: Any, prompts: list[str], latents: Tensor, steps: int, images: list[Image.Image] | None
) -> Tensor:
    """Draws with `QwenImagePipeline`."""
    own = {"true_cfg_scale": policy.guidance_scale, "max_sequence_length": policy.max_sequence_length}
    negative = [policy.negative_prompt] * len(prompts)
    return draw_stock(pipe, policy, prompts, latents, steps, negative_prompt=negative, **own)


QWEN_IMAGE = Family("qwen_image", QwenImagePolicy, build, draw, learning_rate=2e-2)

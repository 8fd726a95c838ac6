"""Tiny FLUX.2-klein: stock classes with random weights, as text-to-image and as editing model."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from PIL import Image
from torch import Tensor
from transformers import Qwen3ForCausalLM

from lightning_modules.policies.flux2 import Flux2KleinPolicy
from tests.lightning_modules.policies.family import Family, chat_tokenizer, draw_stock, qwen3_config

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def build(is_distilled: bool = False, levels: int = 4) -> Any:
    """Makes FLUX.2-klein's pipeline of 0.2M random weights; 2 ** levels pixels a token, 16 in the published one."""
    tokenizer = chat_tokenizer(CHAT)
    config = qwen3_config(tokenizer)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=64,
        batch_norm_eps=0.1,
    )
    vae.bn.running_mean.normal_()  # a fresh one's 0 and 1 would hide a wrong normalisation
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=2 * config.hidden_size,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    with torch.no_grad():  # fresh gates are near 0, which would leave attention, so text and source, without a say
        for name, weight in transformer.named_parameters():
            if "modulation" in name:
                weight *= 10
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(config),
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=is_distilled,
    )


def draw(
    pipe: Any, policy: Any, prompts: list[str], latents: Tensor, steps: int, images: list[Image.Image] | None
) -> Tensor:
    """Draws with `Flux2KleinPipeline`, which takes all source images of a call for one prompt: so one by one."""
    own = {
        "guidance_scale": policy.guidance_scale,
        "max_sequence_length": policy.max_sequence_length,
        "text_encoder_out_layers": policy.text_encoder_out_layers,
    }
    if images is None:
        return draw_stock(pipe, policy, prompts, latents, steps, **own)
    alone = zip(prompts, latents.split(1), images, strict=True)
    return torch.cat([draw_stock(pipe, policy, prompt, x, steps, image=image, **own) for prompt, x, image in alone])


OPTIONS = {"max_sequence_length": 48, "text_encoder_out_layers": (1, 3)}
FLUX2_KLEIN = Family("flux2_klein", Flux2KleinPolicy, build, draw, options=OPTIONS, learning_rate=3e-2)
FLUX2_KLEIN_EDIT = Family(
    "flux2_klein_edit",
    Flux2KleinPolicy,
    build,
    draw,
    sizes=((64, 64), (96, 64)),  # the pipeline takes no source below 64 pixels
    options=OPTIONS,
    sources=True,
    learning_rate=3e-2,
)

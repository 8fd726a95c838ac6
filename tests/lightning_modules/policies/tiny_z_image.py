"""Tiny Z-Image: stock classes with random weights; captions that fill one or two times 32 tokens."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from PIL import Image
from torch import Tensor
from transformers import Qwen3Model

from lightning_modules.policies.z_image import ZImagePolicy
from tests.lightning_modules.policies.family import Family, chat_tokenizer, draw_stock, guided_arguments, qwen3_config

CHAT = (
    "<|im_start|>system\nZ<|im_end|>\n"  # so long that one of the test prompts fills more than 32 tokens
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build() -> Any:
    """Makes Z-Image's pipeline of 0.2M random weights."""
    tokenizer = chat_tokenizer(CHAT)
    config = qwen3_config(tokenizer)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.4,
        shift_factor=0.12,
    )
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=config.hidden_size,
        axes_dims=[8, 4, 4],
        axes_lens=[128, 8, 8],
    )
    # Zeros, as a fresh model has them, would hide what stands in the padding.
    transformer.x_pad_token.data.normal_()
    transformer.cap_pad_token.data.normal_()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=Qwen3Model(config),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def draw(
    pipe: Any, policy: Any, prompts: list[str], latents: Tensor, steps: int, images: list[Image.Image] | None
) -> Tensor:
    """Draws with `ZImagePipeline`, which batches the two passes of guidance, and writes into the lists of texts."""
    own = guided_arguments(policy) | {"negative_prompt": [policy.negative_prompt] * len(prompts)}
    normalization = policy.cfg_normalization
    return draw_stock(pipe, policy, list(prompts), latents, steps, cfg_normalization=normalization, **own)


Z_IMAGE = Family("z_image", ZImagePolicy, build, draw, options={"max_sequence_length": 64})

"""Tiny Sana: random weights; the published scheduler, DPM-Solver++ on flow sigmas."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from PIL import Image
from tokenizers import processors
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model

from lightning_modules.policies.sana import SanaPolicy
from tests.lightning_modules.policies.family import Family, byte_tokenizer, draw_stock, guided_arguments


def build(scheduler: Any = None, **transformer: Any) -> SanaPipeline:
    """Makes Sana's pipeline.

    Args:
        scheduler: null is the published one.
        **transformer: settings of the transformer that differ from the published ones.
    """
    tokenizer = byte_tokenizer(["<pad>", "<eos>", "<bos>"], pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    # Gemma begins every text with a token that the pipeline keeps while it cuts the instruction's own off.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    gemma = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 32,
        "sample_size": 16,
        "patch_size": 1,
    }
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    if scheduler is None:
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
        )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(gemma),
        vae=vae,
        transformer=SanaTransformer2DModel(**(settings | transformer)),
        scheduler=scheduler,
    )


def draw(
    pipe: Any, policy: Any, prompts: list[str], latents: Tensor, steps: int, images: list[Image.Image] | None
) -> Tensor:
    """Draws with `SanaPipeline` by Euler steps instead of the multistep method, with the pipeline's instruction."""
    if isinstance(pipe.scheduler, DPMSolverMultistepScheduler):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    own = guided_arguments(policy)
    return draw_stock(pipe, policy, prompts, latents, steps, use_resolution_binning=False, **own)


# The stock pipeline takes multiples of 32 pixels whatever its autoencoder.
SANA = Family("sana", SanaPolicy, build, draw, sizes=((32, 32), (64, 32)), options={"max_sequence_length": 24})

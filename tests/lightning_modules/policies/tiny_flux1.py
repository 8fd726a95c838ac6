"""Tiny FLUX.1: the miniature's architecture with random weights."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor

from lightning_modules.policies.flux1 import Flux1Policy
from miniature.architectures import build_flow, build_vae
from tests.lightning_modules.policies.family import PROMPTS, Family, draw_stock


def build() -> Any:
    """Makes FLUX.1's pipeline of 1M random weights."""
    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    pipe = build_flow(words, build_vae())
    pipe.vae.register_to_config(scaling_factor=0.9, shift_factor=0.1)
    return pipe


def draw(
    pipe: Any, policy: Any, prompts: list[str], latents: Tensor, steps: int, images: list[Image.Image] | None
) -> Tensor:
    """Draws with `FluxPipeline`."""
    own = {"guidance_scale": policy.guidance, "max_sequence_length": policy.max_sequence_length}
    return draw_stock(pipe, policy, prompts, latents, steps, **own)


FLUX1 = Family("flux1", Flux1Policy, build, draw, options={"max_sequence_length": 18}, learning_rate=3e-2)

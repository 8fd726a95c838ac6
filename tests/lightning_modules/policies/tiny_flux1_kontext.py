"""Tiny FLUX.1-Kontext: FLUX.1's tiny parts in the editing pipeline."""

from __future__ import annotations

from typing import Any

from diffusers import FluxKontextPipeline
from PIL import Image
from torch import Tensor

from lightning_modules.policies.flux1_kontext import KontextPolicy
from tests.lightning_modules.policies import tiny_flux1
from tests.lightning_modules.policies.family import Family, draw_stock


def build() -> Any:
    """Makes Kontext's pipeline of 1M random weights."""
    return FluxKontextPipeline(**tiny_flux1.build().components)


def draw(
    pipe: Any, policy: Any, prompts: list[str], latents: Tensor, steps: int, images: list[Image.Image] | None
) -> Tensor:
    """Draws with `FluxKontextPipeline`, in the height and width asked for."""
    own = {"guidance_scale": policy.guidance, "max_sequence_length": policy.max_sequence_length}
    size = {"max_area": policy.height * policy.width, "_auto_resize": policy.auto_resize}
    return draw_stock(pipe, policy, prompts, latents, steps, image=images, **own, **size)


FLUX1_KONTEXT = Family(
    "flux1_kontext",
    KontextPolicy,
    build,
    draw,
    options={"max_sequence_length": 18, "auto_resize": False},
    sources=True,
    learning_rate=3e-2,
)

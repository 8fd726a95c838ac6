"""FLUX.1 through the stock diffusers pipeline: packed latents, two text encoders, embedded guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor

from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.pipeline import PipelinePolicy
from rewards.arguments import check_minimum


class Flux1Policy(PipelinePolicy):
    """FLUX.1-dev, or any `FluxPipeline` folder such as `miniature/flow`.

    Args:
        model: pipeline folder or hub id.
        sampling: settings of the sampler.
        guidance: embedded guidance (3.5 for FLUX.1-dev); ignored by models without it.
        max_sequence_length: T5 tokens per prompt.
        **kwargs: as for `FlowPolicy`.
    """

    pipeline_class: ClassVar[Any] = FluxPipeline  # KontextPolicy has another
    default_lora_targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        guidance: float = 3.5,
        max_sequence_length: int = 512,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, sampling, **kwargs)
        check_minimum("model.flow", 0, guidance=guidance)
        check_minimum("model.flow", 1, max_sequence_length=max_sequence_length)
        self.guidance = guidance
        self.max_sequence_length = max_sequence_length

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape [tokens, channels] of the packed latents: one token for 2 x 2 latent pixels."""
        factor = 2 * self.pipe.vae_scale_factor
        return (self.height // factor) * (self.width // factor), self.network.config.in_channels

    def schedule(self, num_steps: int) -> dict[str, Any]:
        """Sigmas 1 ... 1/n and, with dynamic shifting, the shift for this number of image tokens."""
        mu = self.dynamic_shift(self.latent_shape[0])
        return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps), "mu": mu}

    def encode_texts(self, texts: Sequence[str], images: Sequence[Image.Image] | None = None) -> dict[str, Tensor]:
        """Encodes texts into T5's tokens and CLIP's pooled vector, by the pipeline's own `encode_prompt`."""
        embeds, pooled, _ = self.pipe.encode_prompt(
            texts, None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"embeds": embeds, "pooled": pooled}

    def reading(self, texts: Sequence[str]) -> tuple[Any, list[str], int]:
        """Describes how T5 reads texts; CLIP's vector is of their first 77 tokens."""
        return self.pipe.tokenizer_2, list(texts), self.max_sequence_length

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """Predicts the velocity [B, tokens, channels]; the transformer multiplies sigma by 1000 itself."""
        batch, embeds = len(latents), conditioning["embeds"]
        factor = 2 * self.pipe.vae_scale_factor
        image_ids = self.pipe._prepare_latent_image_ids(
            batch, self.height // factor, self.width // factor, latents.device, self.dtype
        )
        tokens = latents.to(self.dtype)
        if "source" in conditioning:  # FLUX.1-Kontext
            tokens = torch.cat([tokens, conditioning["source"]], 1)
            image_ids = torch.cat([image_ids, conditioning["source_ids"][0]])
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full((batch,), self.guidance, device=latents.device)
        velocity: Tensor = self.active(
            hidden_states=tokens,
            timestep=sigma.expand(batch).to(self.dtype),
            guidance=guidance,
            pooled_projections=conditioning["pooled"],
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return velocity[:, : latents.shape[1]]

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes packed latents into images [B, 3, height, width] in [0, 1]."""
        return super().decode(self.pipe._unpack_latents(latents, self.height, self.width, self.pipe.vae_scale_factor))

"""Stable Diffusion 3 and 3.5 through the stock diffusers pipeline: spatial latents, three text encoders, guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor

from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.guided import GuidedPolicy
from lightning_modules.policies.loading import read_config


class SD3Policy(GuidedPolicy):
    """SD3 or SD3.5, or any `StableDiffusion3Pipeline` folder; T5, its third text encoder, may be absent.

    Args:
        model: pipeline folder or hub id.
        sampling: settings of the sampler.
        guidance_scale: classifier-free guidance, off at 1 (4.5 on the card of SD3.5-medium, 3.5 on SD3.5-large's, 7.0
            on SD3-medium's; the distilled SD3.5-large-turbo, which no configuration file tells apart, wants 1).
        max_sequence_length: T5 tokens per prompt (the pipeline's default); the CLIPs always take 77.
        **kwargs: as for `GuidedPolicy`.
    """

    pipeline_class = StableDiffusion3Pipeline
    default_lora_targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]

    def __init__(
        self, model: str, sampling: Sampling, guidance_scale: float = 4.5, max_sequence_length: int = 256, **kwargs: Any
    ) -> None:
        super().__init__(model, sampling, guidance_scale, max_sequence_length=max_sequence_length, **kwargs)

    def check_config(self) -> None:
        """Checks the settings; raises ValueError also for images that the transformer has no positions for."""
        super().check_config()
        positions = read_config(self.model, "transformer").get("pos_embed_max_size", 96)
        longest = positions * self.pixels_per_token()
        if max(self.height, self.width) > longest:
            raise ValueError(
                f"`height` and `width` are {self.height} x {self.width}; {self.model} draws at most {longest} pixels "
                "a side."
            )

    def schedule(self, num_steps: int) -> dict[str, Any]:
        """No arguments for the constant shift of published models; with dynamic shifting, the image tokens' shift."""
        if not self.pipe.scheduler.config.get("use_dynamic_shifting"):
            return {}
        _, height, width = self.latent_shape
        patch = self.network.config.patch_size
        return {"mu": self.dynamic_shift((height // patch) * (width // patch), max_shift=1.16)}

    def encode_texts(self, texts: Sequence[str], images: Sequence[Image.Image] | None = None) -> dict[str, Tensor]:
        """Encodes texts into tokens of both CLIPs, then T5's (zeros without T5), and both CLIPs' pooled vector."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            texts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"embeds": embeds, "pooled": pooled}

    def reading(self, texts: Sequence[str]) -> tuple[Any, list[str], int]:
        """Describes how T5 reads texts, or the CLIPs without it."""
        if self.pipe.text_encoder_3 is None:
            return self.pipe.tokenizer, list(texts), self.pipe.tokenizer_max_length
        return self.pipe.tokenizer_3, list(texts), self.max_sequence_length

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """Predicts the velocity [B, channels, height / 8, width / 8]."""
        velocity: Tensor = self.active(
            hidden_states=latents.to(self.dtype),
            timestep=sigma.expand(len(latents)) * 1000,
            encoder_hidden_states=conditioning["embeds"],
            pooled_projections=conditioning["pooled"],
            return_dict=False,
        )[0]
        return velocity

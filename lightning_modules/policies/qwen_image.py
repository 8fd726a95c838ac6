"""Qwen-Image through the stock diffusers pipeline: packed latents, a masked text, guidance that keeps the length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import QwenImagePipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.guided import GuidedPolicy
from lightning_modules.policies.loading import read_config


class QwenImagePolicy(GuidedPolicy):
    """Qwen-Image, or any `QwenImagePipeline` folder; `max_sequence_length` is at most 1024.

    Args:
        model: pipeline folder or hub id.
        sampling: settings of the sampler.
        guidance_scale: classifier-free guidance, off at 1 (4.0 is the pipeline's default `true_cfg_scale` and the model
            card's; a few-step distilled model, which no configuration file tells apart, wants 1).
        negative_prompt: prompt that guidance leads away from (a space in the model card).
        **kwargs: as for `GuidedPolicy`.
    """

    pipeline_class: ClassVar[Any] = QwenImagePipeline
    default_lora_targets = [
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    ]

    def __init__(
        self, model: str, sampling: Sampling, guidance_scale: float = 4.0, negative_prompt: str = " ", **kwargs: Any
    ) -> None:
        super().__init__(model, sampling, guidance_scale, negative_prompt, **kwargs)

    def check_config(self) -> None:
        """Checks the settings; raises ValueError also for prompts that the pipeline cuts, and for embedded guidance."""
        super().check_config()
        if not 1 <= self.max_sequence_length <= 1024:
            raise ValueError(
                f"`max_sequence_length` is {self.max_sequence_length}; {self.model} takes 1 to 1024 tokens."
            )
        if read_config(self.model, "transformer").get("guidance_embeds"):
            # The stock transformer hands the guidance to a time embedding that has no such argument.
            raise ValueError(
                f"{self.model} sets `guidance_embeds`, which diffusers' Qwen-Image transformer cannot run; take a "
                "model without embedded guidance."
            )

    def pixels_per_token(self) -> int:
        """Divisor of height and width: 2 per entry of the VAE's `temperal_downsample`, and 2 for a token's 2 x 2."""
        return int(2 ** (len(read_config(self.model, "vae")["temperal_downsample"]) + 1))

    @property
    def latent_grid(self) -> tuple[int, int]:
        """Rows and columns of the image's tokens."""
        factor = 2 * self.pipe.vae_scale_factor
        return self.height // factor, self.width // factor

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape [tokens, channels] of the packed latents: one token for 2 x 2 latent pixels."""
        rows, columns = self.latent_grid
        return rows * columns, self.network.config.in_channels

    def schedule(self, num_steps: int) -> dict[str, Any]:
        """Sigmas 1 ... 1/n and the shift for this number of image tokens; the scheduler sees to `shift_terminal`."""
        mu = self.dynamic_shift(self.latent_shape[0])
        return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps), "mu": mu}

    def encode_texts(self, texts: Sequence[str], images: Sequence[Image.Image] | None = None) -> dict[str, Tensor]:
        """Encodes texts into tokens [D, L, C] padded on the right and a mask [D, L], 1 for tokens, 0 for padding."""
        embeds, mask = self.pipe.encode_prompt(
            list(texts), device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"embeds": embeds, "mask": embeds.new_ones(embeds.shape[:2], dtype=torch.long) if mask is None else mask}

    def reading(self, texts: Sequence[str]) -> tuple[Any, list[str], int]:
        """Describes how Qwen2.5-VL reads texts: inside a template, whose beginning the network does not get."""
        chats = [self.pipe.prompt_template_encode.format(text) for text in texts]
        return self.pipe.tokenizer, chats, self.max_sequence_length + self.pipe.prompt_template_encode_start_idx

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """Predicts the velocity [B, tokens, channels]; the transformer multiplies sigma by 1000 itself."""
        batch, num_tokens = latents.shape[:2]
        embeds, mask = _without_padding(conditioning["embeds"], conditioning["mask"])
        tokens, grids = latents.to(self.dtype), [(1, *self.latent_grid)]
        if "source" in conditioning:  # Qwen-Image-Edit
            _, channels, height, width = conditioning["source"].shape
            source = self.pipe._pack_latents(conditioning["source"], batch, channels, height, width)
            tokens = torch.cat([tokens, source], 1)
            grids.append((1, height // 2, width // 2))
        velocity: Tensor = self.active(
            hidden_states=tokens,
            timestep=sigma.expand(batch).to(self.dtype),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[grids] * batch,
            return_dict=False,
        )[0]
        return velocity[:, :num_tokens]

    def guide(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Guides velocities [B, tokens, channels], each token scaled back to its length for the prompt alone."""
        guided = super().guide(positive, negative)
        return guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes packed latents, one-frame videos to the VAE, into images [B, 3, height, width] in [0, 1]."""
        vae = self.pipe.vae
        unpacked = self.pipe._unpack_latents(latents, self.height, self.width, self.pipe.vae_scale_factor)
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        frames = vae.decode((unpacked * std + mean).to(vae.dtype), return_dict=False)[0]
        images: Tensor = VaeImageProcessor.denormalize(frames[:, :, 0])
        return images.float()


def _without_padding(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Cuts texts to the longest one; their mask becomes None if it hides nothing, since attention is faster then.

    Padding changes no result: it is masked as a key, and text positions count from the left.
    """
    shortest, longest = torch.stack(torch.aminmax(mask.sum(1))).tolist()
    return embeds[:, :longest], None if shortest == longest else mask[:, :longest]

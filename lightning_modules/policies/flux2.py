"""FLUX.2-klein through the stock diffusers pipeline: Qwen3 reads the prompt, source images are optional."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from torch import Tensor

from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.loading import read_config, read_index
from lightning_modules.policies.pipeline import PipelinePolicy
from lightning_modules.policies.sources import crop_to, stack_sources
from rewards.arguments import check_minimum


class Flux2KleinPolicy(PipelinePolicy):
    """FLUX.2-klein, base or distilled; draws from text, and edits where there are source images.

    Args:
        model: pipeline folder or hub id.
        sampling: settings of the sampler.
        guidance_scale: classifier-free guidance, off at 1; null is 4.0 for a base model (the pipeline's default) and
            1.0 for a distilled one, which takes no other (`is_distilled` in model_index.json).
        max_sequence_length: tokens per prompt, chat template included; shorter prompts are padded to it.
        text_encoder_out_layers: layers of Qwen3 whose hidden states, side by side, are the prompt's embedding.
        source_size: height and width that source images are first cropped to, around the centre; null crops nothing.
            Above 1024 x 1024 pixels a source is scaled down, then cropped to whole tokens, as the pipeline does; all
            sources of one batch must come out in one size.
        **kwargs: as for `PipelinePolicy`.
    """

    pipeline_class = Flux2KleinPipeline
    # `to_out` is a layer in single-stream blocks, but a list around one (`to_out.0`) in the others.
    default_lora_targets = (
        r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        guidance_scale: float | None = None,
        max_sequence_length: int = 512,
        text_encoder_out_layers: tuple[int, ...] = (9, 18, 27),
        source_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, sampling, **kwargs)
        check_minimum("model.flow", 0, guidance_scale=guidance_scale)
        check_minimum("model.flow", 1, max_sequence_length=max_sequence_length)
        self.asked_guidance_scale = guidance_scale
        self.max_sequence_length = max_sequence_length
        self.text_encoder_out_layers = text_encoder_out_layers
        self.source_size = source_size

    def check_config(self) -> None:
        """Settles the guidance scale and checks the text encoder's layers against the transformer."""
        super().check_config()
        asked, distilled = self.asked_guidance_scale, bool(read_index(self.model).get("is_distilled"))
        if distilled and asked is not None and asked > 1:
            raise ValueError(
                f"`guidance_scale` is {asked}, but {self.model} is distilled and draws without classifier-free "
                "guidance: leave `guidance_scale` out."
            )
        self.guidance_scale = asked if asked is not None else 1.0 if distilled else 4.0
        layers, text = self.text_encoder_out_layers, read_config(self.model, "text_encoder")
        dim = read_config(self.model, "transformer")["joint_attention_dim"]
        last, hidden = text["num_hidden_layers"], text["hidden_size"]
        if len(layers) * hidden != dim or not all(0 <= layer <= last for layer in layers):
            raise ValueError(
                f"`text_encoder_out_layers` is {list(layers)}; {self.model} needs {dim // hidden} layers between 0 and "
                f"{last}."
            )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape [channels, rows, columns] of the patchified latents: one token for 2 x 2 latent pixels."""
        factor = 2 * self.pipe.vae_scale_factor
        return self.network.config.in_channels, self.height // factor, self.width // factor

    def schedule(self, num_steps: int) -> dict[str, Any]:
        """Sigmas 1 ... 1/n and the shift for this number of image tokens and steps."""
        _, rows, columns = self.latent_shape
        mu = compute_empirical_mu(image_seq_len=rows * columns, num_steps=num_steps)
        return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps), "mu": mu}

    def encode_texts(self, texts: Sequence[str], images: Sequence[Image.Image] | None = None) -> dict[str, Tensor]:
        """Encodes texts into Qwen3's hidden states; the network sees their padding, as in the stock pipeline."""
        embeds, _ = self.pipe.encode_prompt(
            list(texts),
            device=self.device,
            max_sequence_length=self.max_sequence_length,
            text_encoder_out_layers=self.text_encoder_out_layers,
        )
        return {"embeds": embeds}

    def reading(self, texts: Sequence[str]) -> tuple[Any, list[str], int]:
        """Describes how Qwen3 reads texts: as chats, whose end is cut off first."""
        tokenizer = self.pipe.tokenizer
        chats = [[{"role": "user", "content": text}] for text in texts]
        how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return tokenizer, tokenizer.apply_chat_template(chats, **how), self.max_sequence_length

    @torch.no_grad()
    def encode_sources(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Encodes S source images into packed, batch-normalised latents (the VAE posterior's mode) and position ids."""
        pixels = stack_sources([self._preprocess(crop_to(image, self.source_size)) for image in images])
        # One call a source: several in one call would be several references of one image.
        encoded = [
            self.pipe.prepare_image_latents([part], 1, generator=None, device=self.device, dtype=self.pipe.vae.dtype)
            for part in pixels.split(1)
        ]
        latents, ids = zip(*encoded, strict=True)
        return {"source": torch.cat(latents).to(self.dtype), "source_ids": torch.cat(ids)}

    def _preprocess(self, image: Image.Image) -> Tensor:
        processor, factor = self.pipe.image_processor, 2 * self.pipe.vae_scale_factor
        processor.check_image_input(image)
        image = processor._resize_if_exceeds_area(image)
        height, width = image.height // factor * factor, image.width // factor * factor
        pixels: Tensor = processor.preprocess(image, height=height, width=width, resize_mode="crop")
        return pixels

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """Predicts the velocity [B, channels, rows, columns]; a source's tokens follow the image's and are cut off."""
        embeds = conditioning["embeds"]
        tokens = self.pipe._pack_latents(latents).to(self.dtype)
        length = tokens.shape[1]
        # Position ids without a batch dimension: the network uses one sample's for all.
        image_ids = self.pipe._prepare_latent_ids(latents[:1])[0].to(latents.device)
        if "source" in conditioning:
            tokens = torch.cat([tokens, conditioning["source"]], 1)
            image_ids = torch.cat([image_ids, conditioning["source_ids"][0]])
        velocity: Tensor = self.active(
            hidden_states=tokens,
            timestep=sigma.expand(len(latents)).to(self.dtype),
            encoder_hidden_states=embeds,
            txt_ids=self.pipe._prepare_text_ids(embeds[:1])[0].to(latents.device),
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return velocity[:, :length].transpose(1, 2).reshape(latents.shape)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes patchified latents into images [B, 3, height, width] in [0, 1]."""
        vae = self.pipe.vae
        mean, variance = (x.float().view(1, -1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var))
        latents = latents * torch.sqrt(variance + vae.config.batch_norm_eps) + mean
        unpacked = self.pipe._unpatchify_latents(latents).to(vae.dtype)
        images: Tensor = VaeImageProcessor.denormalize(vae.decode(unpacked, return_dict=False)[0])
        return images.float()

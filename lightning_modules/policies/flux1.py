"""FLUX.1 over the stock diffusers pipeline: packed latents, two text encoders, embedded guidance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.training_utils import cast_training_params
from peft import get_peft_model_state_dict
from PIL import Image
from torch import Tensor

from lightning_modules.policies.base import FlowPolicy, LoRA, Sampling
from lightning_modules.policies.loading import check_pipeline, lora_config
from lightning_modules.rl.schedule import dynamic_mu, sigma_grid
from lightning_modules.rollout import Conditioning, chunks
from rewards.models import one_line_errors


class Flux1Policy(FlowPolicy):
    """FLUX.1-dev, or any `FluxPipeline` folder such as `miniature/flow`.

    Args:
        model: pipeline folder or hub id.
        sampling: how rollouts are drawn.
        guidance: embedded guidance (3.5 for FLUX.1-dev); ignored by models without it.
        max_sequence_length: T5 tokens per prompt.
        **kwargs: as for `FlowPolicy`.
    """

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
        self.guidance = guidance
        self.max_sequence_length = max_sequence_length
        self.pipe: Any = None

    def load(self) -> None:
        """Loads the pipeline; its modules become submodules, so that Lightning moves them."""
        if self.pipe is not None:
            return
        check_pipeline(self.model)
        with one_line_errors(self.model):
            self.pipe = FluxPipeline.from_pretrained(self.model, torch_dtype=self.dtype, use_safetensors=True)
        self.network = self.pipe.transformer
        self.vae, self.clip, self.t5 = self.pipe.vae, self.pipe.text_encoder, self.pipe.text_encoder_2
        factor = 2 * self.pipe.vae_scale_factor
        if self.height % factor or self.width % factor:
            raise ValueError(
                f"`height` and `width` are {self.height} x {self.width}; {self.model} needs multiples of {factor} "
                "pixels."
            )
        self._prepare()

    def _add_adapters(self, lora: LoRA) -> None:
        self.network.add_adapter(lora_config(self.network, lora, self.default_lora_targets, "flow.lora"))
        cast_training_params(self.network, torch.float32)  # bf16 would round small updates away

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """[tokens, channels] of the packed latents: one token for 2 x 2 latent pixels."""
        factor = 2 * self.pipe.vae_scale_factor
        return (self.height // factor) * (self.width // factor), self.network.config.in_channels

    def sigmas(self, num_steps: int) -> Tensor:
        """[num_steps + 1] from 1 to 0, shifted as the pipeline's scheduler is configured."""
        config = self.pipe.scheduler.config
        for flag in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"):
            if config.get(flag):
                raise ValueError(f"the scheduler of {self.model} sets {flag}, which FLUX.1 rollouts do not support.")
        if not config.use_dynamic_shifting:
            return sigma_grid(num_steps, shift=config.shift)
        mu = dynamic_mu(
            self.latent_shape[0],
            base_seq_len=config.get("base_image_seq_len", 256),
            max_seq_len=config.get("max_image_seq_len", 4096),
            base_shift=config.get("base_shift", 0.5),
            max_shift=config.get("max_shift", 1.15),
        )
        return sigma_grid(num_steps, mu=mu)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], images: Sequence[Image.Image] | None = None) -> Conditioning:
        """Encodes prompts by the pipeline's own `encode_prompt`, every distinct text once."""
        assert images is None, "FLUX.1 takes no source image"
        distinct = list(dict.fromkeys(prompts))
        embeds, pooled = [], []
        for rows in chunks(len(distinct), self.micro_batch_size):
            part = self.pipe.encode_prompt(
                distinct[rows], None, device=self.device, max_sequence_length=self.max_sequence_length
            )
            embeds.append(part[0])
            pooled.append(part[1])
        place = {text: i for i, text in enumerate(distinct)}
        index = torch.tensor([place[prompt] for prompt in prompts], device=self.device)
        return Conditioning({"embeds": torch.cat(embeds), "pooled": torch.cat(pooled)}, index)

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """[B, tokens, channels] fp32 velocity; the transformer multiplies sigma by 1000 itself."""
        batch = len(latents)
        factor = 2 * self.pipe.vae_scale_factor
        embeds = conditioning["embeds"]
        image_ids = self.pipe._prepare_latent_image_ids(
            batch, self.height // factor, self.width // factor, latents.device, self.dtype
        )
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full((batch,), self.guidance, device=latents.device)
        velocity: Tensor = self.active(
            hidden_states=latents.to(self.dtype),
            timestep=sigma.expand(batch).to(self.dtype),
            guidance=guidance,
            pooled_projections=conditioning["pooled"],
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return velocity.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, 3, height, width] pictures in [0, 1] of packed latents."""
        vae = self.pipe.vae
        unpacked = self.pipe._unpack_latents(latents, self.height, self.width, self.pipe.vae_scale_factor)
        unpacked = unpacked.to(self.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        pictures: Tensor = VaeImageProcessor.denormalize(vae.decode(unpacked, return_dict=False)[0])
        return pictures.float()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a LoRA that `FluxPipeline.load_lora_weights` reads, or the whole pipeline."""
        if self.lora is None or not self.trained:
            self.pipe.save_pretrained(directory)
            return
        metadata: dict[str, Any] = self.network.peft_config["default"].to_dict()
        FluxPipeline.save_lora_weights(
            directory,
            transformer_lora_layers=get_peft_model_state_dict(self.network, adapter_name="default"),
            transformer_lora_adapter_metadata=metadata,
        )

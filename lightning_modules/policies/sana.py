"""Sana through the stock diffusers pipeline: linear attention, deeply compressed latents, Gemma 2 reads the prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
from PIL import Image
from torch import Tensor

from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.guided import GuidedPolicy
from lightning_modules.policies.loading import read_config

EULER = "FlowMatchEulerDiscreteScheduler"


class SanaPolicy(GuidedPolicy):
    """Sana, or any `SanaPipeline` folder.

    Published folders sample by DPM-Solver++, a multistep method: a step needs the velocities before it, so that it is
    no Markov transition that RL could give a probability. Rollouts, and evaluation with them, take Euler steps on the
    schedule that the stock pipeline has with a `FlowMatchEulerDiscreteScheduler` of the same shift. Exports keep the
    folder's own scheduler. Images are drawn in the size asked for, without the pipeline's binning of resolutions.
    With dtype float16, which several cards advise, Gemma and the autoencoder stay in bfloat16, as diffusers' page on
    Sana demands.

    Args:
        model: pipeline folder or hub id.
        sampling: settings of the sampler.
        guidance_scale: classifier-free guidance, off at 1 (the pipeline's default).
        complex_human_instruction: lines put before each prompt, though not before the negative one; true is the
            pipeline's own, false none.
        max_sequence_length: Gemma tokens per prompt (the pipeline's default).
        **kwargs: as for `GuidedPolicy`.
    """

    pipeline_class = SanaPipeline

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        guidance_scale: float = 4.5,
        complex_human_instruction: bool | list[str] = True,
        max_sequence_length: int = 300,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, sampling, guidance_scale, max_sequence_length=max_sequence_length, **kwargs)
        self.complex_human_instruction = complex_human_instruction

    def load(self, *, weights: bool = True) -> None:
        """Loads the pipeline; with float16, text encoder and VAE are in bfloat16 since they do not work in it."""
        super().load(weights=weights)
        if self.dtype == torch.float16:
            self.pipe.text_encoder.to(torch.bfloat16)
            self.pipe.vae.to(torch.bfloat16)

    def check_config(self) -> None:
        """Checks the settings; raises ValueError also for a scheduler whose sigmas are no noise shares of a flow."""
        super().check_config()
        config = read_config(self.model, "scheduler", "scheduler_config.json")
        if config["_class_name"] != EULER and not config.get("use_flow_sigmas"):
            raise ValueError(
                f"the scheduler of {self.model} is a {config['_class_name']} without `use_flow_sigmas`; put a "
                f"{EULER} there."
            )

    def pixels_per_token(self) -> int:
        """Divisor of height and width: DC-AE halves them between its stages; a published patch is one latent pixel."""
        stages = len(read_config(self.model, "vae")["encoder_block_out_channels"])
        return int(2 ** (stages - 1) * read_config(self.model, "transformer").get("patch_size", 1))

    def scheduler(self) -> Any:
        """Makes the folder's own scheduler if it takes Euler steps, else one that does with the same shift."""
        config = self.pipe.scheduler.config
        if isinstance(self.pipe.scheduler, FlowMatchEulerDiscreteScheduler):
            return super().scheduler()
        return FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=config.flow_shift)

    @property
    def instruction(self) -> list[str] | None:
        """Lines put before each prompt, if any."""
        lines = self.complex_human_instruction
        if lines is True:
            lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        return lines or None

    def encode_texts(self, texts: Sequence[str], images: Sequence[Image.Image] | None = None) -> dict[str, Tensor]:
        """Encodes texts into Gemma's tokens behind the instruction, and a mask of those that are no padding."""
        return self._encode(texts, self.instruction)

    def reading(self, texts: Sequence[str]) -> tuple[Any, list[str], int]:
        """Describes how Gemma reads texts: in lower case, behind the instruction, which is not counted."""
        lines = "\n".join(self.instruction or [])
        extra = len(self.pipe.tokenizer.encode(lines)) - 2 if lines else 0
        texts = [lines + text for text in self.pipe._text_preprocessing(list(texts))]
        return self.pipe.tokenizer, texts, self.max_sequence_length + extra

    def encode_negatives(self, texts: Sequence[str], images: Sequence[Image.Image] | None = None) -> dict[str, Tensor]:
        """Encodes the negative prompt, without the instruction."""
        return self._encode(texts, None)

    def _encode(self, texts: Sequence[str], instruction: list[str] | None) -> dict[str, Tensor]:
        embeds, mask, _, _ = self.pipe.encode_prompt(
            texts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=instruction,
        )
        return {"embeds": embeds, "mask": mask}

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """Predicts the velocity [B, channels, height / 32, width / 32]; a learned variance, if any, is left out."""
        config = self.network.config
        velocity: Tensor = self.active(
            latents.to(self.dtype),
            encoder_hidden_states=conditioning["embeds"].to(self.dtype),
            encoder_attention_mask=conditioning["mask"],
            timestep=sigma.expand(len(latents)) * 1000 * config.timestep_scale,
            return_dict=False,
        )[0]
        return velocity.chunk(2, dim=1)[0] if config.out_channels == 2 * config.in_channels else velocity

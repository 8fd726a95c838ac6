"""Z-Image through the stock diffusers pipeline: one stream of image and caption tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ZImagePipeline
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.guided import GuidedPolicy
from lightning_modules.policies.loading import read_config
from rewards.arguments import check_minimum


class ZImagePolicy(GuidedPolicy):
    """Z-Image or Z-Image-Turbo, or any `ZImagePipeline` folder.

    The pipeline's `cfg_truncation`, which drops guidance late in the schedule, is left at its default: never.
    `max_sequence_length` counts the chat template too.

    Args:
        model: pipeline folder or hub id.
        sampling: settings of the sampler.
        guidance_scale: classifier-free guidance as this pipeline counts it: 0 is off, and s stands for s + 1 elsewhere
            (5.0 is the pipeline's default; the distilled Z-Image-Turbo, which no configuration file tells apart, wants
            0).
        cfg_normalization: guidance may lengthen an image's velocity to at most this many times that of the prompt
            alone; 0 sets no limit (the pipeline's default; its `True` is 1).
        **kwargs: as for `GuidedPolicy`.
    """

    pipeline_class = ZImagePipeline
    default_lora_targets = [
        *(f"attention.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"feed_forward.{layer}" for layer in ("w1", "w2", "w3")),
    ]

    def __init__(
        self, model: str, sampling: Sampling, guidance_scale: float = 5.0, cfg_normalization: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(model, sampling, guidance_scale, **kwargs)
        check_minimum("model.flow", 0, cfg_normalization=cfg_normalization)
        self.cfg_normalization = cfg_normalization

    def check_config(self) -> None:
        """Checks the settings; raises ValueError also for images and captions without positions in the transformer."""
        super().check_config()
        # Captions count along the first axis, and the image stands one position behind them.
        captions, rows, columns = read_config(self.model, "transformer")["axes_lens"]
        factor = self.pixels_per_token()
        if self.height > rows * factor or self.width > columns * factor:
            raise ValueError(
                f"`height` and `width` are {self.height} x {self.width}; {self.model} draws at most {rows * factor} x "
                f"{columns * factor} pixels."
            )
        longest = (captions - 2) // 32 * 32  # the transformer fills captions up to multiples of 32
        if self.max_sequence_length > longest:
            raise ValueError(
                f"`max_sequence_length` is {self.max_sequence_length}; {self.model} takes at most {longest} tokens."
            )

    def schedule(self, num_steps: int) -> dict[str, Any]:
        """Sigmas 1 ... 1/n; published models shift them by a constant, others by this number of image tokens."""
        _, height, width = self.latent_shape
        mu = self.dynamic_shift((height // 2) * (width // 2))
        return {"sigmas": torch.linspace(1.0, 1 / num_steps, num_steps).tolist(), "mu": mu}

    @property
    def guided(self) -> bool:
        """True if each velocity takes two passes; this pipeline's guidance is off at 0, not at 1."""
        return self.guidance_scale > 0

    def guide(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Leads the prompt's velocity [B, ...] away from the negative one (arXiv 2205.11487, Eq. 2, s = w - 1)."""
        guided = positive + self.guidance_scale * (positive - negative)
        if self.cfg_normalization > 0:
            limit = self.cfg_normalization * positive.flatten(1).norm(dim=1)
            factor = (limit / guided.flatten(1).norm(dim=1)).clamp(max=1)
            guided = guided * factor.view(-1, 1, 1, 1)
        return guided

    def encode_texts(self, texts: Sequence[str], images: Sequence[Image.Image] | None = None) -> dict[str, Tensor]:
        """Encodes texts into Qwen3's hidden states of their chats, and a mask of those that are no padding."""
        # The pipeline writes the chats into the list that it is given.
        captions, _ = self.pipe.encode_prompt(
            list(texts),
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        masks = [torch.ones(len(caption), dtype=torch.bool, device=caption.device) for caption in captions]
        return {"embeds": pad_sequence(captions, batch_first=True), "mask": pad_sequence(masks, batch_first=True)}

    def reading(self, texts: Sequence[str]) -> tuple[Any, list[str], int]:
        """Describes how Qwen3 reads texts: as chats, whose end is cut off first."""
        tokenizer = self.pipe.tokenizer
        chats = [[{"role": "user", "content": text}] for text in texts]
        how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        return tokenizer, tokenizer.apply_chat_template(chats, **how), self.max_sequence_length

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """Predicts the velocity [B, channels, height / 8, width / 8], minus the transformer's (noise to image)."""
        lengths = conditioning["mask"].sum(1).tolist()
        outputs = self.active(
            list(latents.to(self.dtype).unsqueeze(2)),
            (1000 - 1000 * sigma.expand(len(latents))) / 1000,  # 1 - sigma as the pipeline rounds it
            [caption[:length] for caption, length in zip(conditioning["embeds"], lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(outputs).squeeze(2)

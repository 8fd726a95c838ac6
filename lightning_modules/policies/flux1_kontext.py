"""FLUX.1-Kontext through the stock diffusers pipeline: FLUX.1 with a source image beside the noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image
from torch import Tensor

from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.sources import crop_to, stack_sources


class KontextPolicy(Flux1Policy):
    """FLUX.1-Kontext-dev: edits source images, or draws from text where there are none.

    Images are drawn at `height` x `width` exactly, where the stock pipeline first scales these two to `max_area`.

    Args:
        model: pipeline folder or hub id.
        sampling: settings of the sampler.
        guidance: embedded guidance (2.5 in FLUX.1-Kontext-dev's model card).
        auto_resize: a source is resized to whichever of the 17 sizes that Kontext was trained on (about a million
            pixels each) has the nearest aspect ratio; false keeps its own size, rounded down to whole tokens.
        source_size: height and width that source images are first cropped to, around the centre; null crops nothing.
            All sources of one batch must come out in one size.
        **kwargs: as for `Flux1Policy`.
    """

    pipeline_class = FluxKontextPipeline

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        guidance: float = 2.5,
        auto_resize: bool = True,
        source_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, sampling, guidance=guidance, **kwargs)
        self.auto_resize = auto_resize
        self.source_size = source_size

    @torch.no_grad()
    def encode_sources(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Encodes S source images into packed latents (the mode of the VAE's posterior) and position ids."""
        pixels = stack_sources([self._preprocess(crop_to(image, self.source_size)) for image in images])
        latents = torch.cat([self.pipe._encode_vae_image(part, generator=None) for part in pixels.split(1)])
        batch, channels, height, width = latents.shape
        ids = self.pipe._prepare_latent_image_ids(batch, height // 2, width // 2, latents.device, self.dtype)
        ids[..., 0] = 1  # the pipeline's mark of a source; the image being drawn has 0
        packed = self.pipe._pack_latents(latents, batch, channels, height, width)
        return {"source": packed.to(self.dtype), "source_ids": ids.expand(batch, -1, -1)}

    def _preprocess(self, image: Image.Image) -> Tensor:
        processor = self.pipe.image_processor
        height, width = processor.get_default_height_width(image)
        if self.auto_resize:
            aspect = width / height
            _, width, height = min((abs(aspect - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        pixels: Tensor = processor.preprocess(image, *processor.get_default_height_width(image, height, width))
        return pixels.to(self.device, self.pipe.vae.dtype)

"""Tiny Qwen-Image-Edit: Qwen-Image's tiny parts in the editing pipeline, with a processor for images."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from lightning_modules.policies.qwen_image_edit import ImageProcessor, QwenImageEditPolicy, image_processor
from tests.lightning_modules.policies import tiny_qwen_image
from tests.lightning_modules.policies.family import Family, draw_stock


def build(zero_cond_t: bool = False) -> Any:
    """Makes Qwen-Image-Edit's pipeline; 2511 sets `zero_cond_t`, 2509 does not."""
    parts = tiny_qwen_image.parts(zero_cond_t=zero_cond_t)
    processor = ImageProcessor(Qwen2VLImageProcessorPil(), parts["tokenizer"])
    pipe = QwenImageEditPlusPipeline(processor=processor, **parts)
    pipe.register_to_config(processor=("transformers", "Qwen2VLProcessor"))  # as in Qwen/Qwen-Image-Edit-2509
    return pipe


def draw(
    pipe: Any, policy: Any, prompts: list[str], latents: Tensor, steps: int, images: list[Image.Image] | None
) -> Tensor:
    """Draws with `QwenImageEditPlusPipeline`, one by one as it must; its sizes of a source are constants."""
    assert images is not None
    own = {"negative_prompt": policy.negative_prompt, "true_cfg_scale": policy.guidance_scale}
    areas = {"CONDITION_IMAGE_SIZE": policy.condition_area, "VAE_IMAGE_SIZE": policy.source_area}
    alone = zip(prompts, latents.split(1), images, strict=True)
    with patch.multiple(pipeline_qwenimage_edit_plus, **areas):
        return torch.cat([draw_stock(pipe, policy, prompt, x, steps, image=image, **own) for prompt, x, image in alone])


QWEN_IMAGE_EDIT = Family(
    "qwen_image_edit",
    QwenImageEditPolicy,
    build,
    draw,
    options={"condition_area": 32 * 32, "source_area": 32 * 32, "positions": "sequential"},
    sources=True,
    learning_rate=2e-2,
    parts=lambda folder: image_processor(str(folder)),
)

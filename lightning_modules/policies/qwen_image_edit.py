"""Qwen-Image-Edit (2509, 2511) through the stock diffusers pipeline: text and network both see a source image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor
from transformers.utils import is_torchvision_available

from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.loading import read_index
from lightning_modules.policies.qwen_image import QwenImagePolicy
from lightning_modules.policies.sources import crop_to, stack_sources
from rewards.arguments import check_minimum
from rewards.pretrained import load_processor


class QwenImageEditPolicy(QwenImagePolicy):
    """Qwen-Image-Edit-2509 or -2511, or any `QwenImageEditPlusPipeline` folder, with one source image per prompt.

    Args:
        model: pipeline folder or hub id.
        sampling: settings of the sampler.
        condition_area: pixels of the source that the text encoder sees, at its own aspect ratio (the pipeline's value).
        source_area: pixels of the source that the network sees, at its own aspect ratio (the pipeline's value).
        source_size: height and width that source images are first cropped to, around the centre; null crops nothing.
            All sources of one batch must come out in one size.
        positions: position ids of an image's tokens in the text encoder. `mrope` has rows and columns, as the published
            models were trained; `sequential` counts them like words, as diffusers 0.42 does by mistake with
            transformers 5 (huggingface/diffusers#14194), for drawing what that pair draws.
        **kwargs: as for `QwenImagePolicy`, but this pipeline does not cut prompts: `max_sequence_length` is not used.
    """

    pipeline_class = QwenImageEditPlusPipeline

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        condition_area: int = 384 * 384,
        source_area: int = 1024 * 1024,
        source_size: tuple[int, int] | None = None,
        positions: Literal["mrope", "sequential"] = "mrope",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, sampling, **kwargs)
        check_minimum("model.flow", 1, condition_area=condition_area, source_area=source_area)
        self.condition_area = condition_area
        self.source_area = source_area
        self.source_size = source_size
        self.positions = positions

    def passed_parts(self) -> dict[str, Any]:
        """Parts to give to `from_pretrained`, among them the processor where the stock one cannot be loaded."""
        return super().passed_parts() | image_processor(self.model)

    def load(self, *, weights: bool = True) -> None:
        """Loads the pipeline; its text encoder then marks which tokens are an image's (`positions: mrope`)."""
        loaded = self.pipe is not None
        super().load(weights=weights)
        if loaded:
            return
        # An exported folder names the class that the published one names, whatever stands in for it here.
        self.pipe.register_to_config(processor=tuple(read_index(self.model)["processor"]))
        if self.positions == "mrope":
            self.pipe.text_encoder.register_forward_pre_hook(_mark_images, with_kwargs=True)

    def encode_texts(self, texts: Sequence[str], images: Sequence[Image.Image] | None = None) -> dict[str, Tensor]:
        """Encodes prompts with their sources into tokens [D, L, C] padded on the right and a mask [D, L]."""
        if images is None:
            raise ValueError(
                f"{type(self).__name__} edits source images, and the prompts come without: give samples an image, or "
                "draw with lightning_modules.policies.qwen_image.QwenImagePolicy."
            )
        rows = []
        for text, image in zip(texts, images, strict=True):  # the pipeline takes all images of a call as one prompt's
            shown = self.pipe.image_processor.resize(*self._resized(image, self.condition_area))
            rows.append(self.pipe.encode_prompt([text], [shown], device=self.device)[0][0])
        lengths = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows]
        return {"embeds": pad_sequence(rows, batch_first=True), "mask": pad_sequence(lengths, batch_first=True)}

    def cut(self, prompts: Sequence[str]) -> list[bool]:
        """Returns False for all prompts: this pipeline cuts none."""
        return [False] * len(prompts)

    @torch.no_grad()
    def encode_sources(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Encodes S source images into normalised latents [S, channels, h, w] (the mode of the VAE's posterior)."""
        processor = self.pipe.image_processor
        pixels = stack_sources([processor.preprocess(*self._resized(image, self.source_area)) for image in images])
        frames = pixels.to(self.device, self.pipe.vae.dtype).unsqueeze(2).split(1)
        latents = [self.pipe._encode_vae_image(frame, generator=None) for frame in frames]
        return {"source": torch.cat(latents).squeeze(2)}

    def _resized(self, image: Image.Image, area: int) -> tuple[Image.Image, int, int]:
        """Returns the image, cropped, and the height and width (multiples of 32) that give it about `area` pixels."""
        image = crop_to(image, self.source_size)
        width, height = calculate_dimensions(area, image.width / image.height)
        return image, height, width


class ImageProcessor(Qwen2VLProcessor):
    """Qwen2.5-VL's processor for text and images alone: the stock one insists on a video processor."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Accepts None as video processor."""
        if argument_name == "video_processor" and argument is None:
            return type(None)
        return super().check_argument_for_proper_class(argument_name, argument)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes tokenizer and image processor, from which the stock class can make its video processor too."""
        self.tokenizer.save_pretrained(save_directory)
        self.image_processor.save_pretrained(save_directory)


def image_processor(model: str) -> dict[str, Any]:
    """Makes the `processor` that `from_pretrained` needs; empty where torchvision lets it load its own.

    Without torchvision transformers has no video processor and refuses the whole processor, though editing needs only
    its tokenizer and its image processor, and the latter has a form that works on PIL.

    Args:
        model: pipeline folder or hub id.
    """
    if is_torchvision_available():
        return {}
    images = load_processor(Qwen2VLImageProcessorPil, model, subfolder="processor")
    return {"processor": ImageProcessor(images, load_processor(AutoTokenizer, model, subfolder="processor"))}


def _mark_images(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Tells Qwen2.5-VL of transformers 5 which tokens are an image's (1, words are 0), if the pipeline does not."""
    is_image = kwargs["input_ids"] == encoder.config.image_token_id
    return args, {"mm_token_type_ids": is_image.int()} | kwargs

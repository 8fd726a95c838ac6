"""GenEval's colour classifier: zero-shot CLIP on an object cut out by its mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageColor
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from datamodules.chunks import chunks
from datamodules.geneval_names import COLORS
from rewards.arguments import check_minimum
from rewards.geneval.rules import Box
from rewards.pretrained import load_pretrained, load_processor

TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")

# CLIP's own, whatever a folder's preprocessor says.
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]

Mask = NDArray[np.bool_]


class ClipColors:
    """Names the colour of objects: the one of ten whose texts lie nearest to the object's image.

    A colour's text embedding is the normalised mean of the normalised embeddings of three templates.

    The official benchmark runs OpenAI's weights through open_clip; the default checkpoint holds the same weights
    (quick GELU included). That both give the same names on real images has not been measured here.

    Args:
        model: folder or hub id of a transformers CLIP model with its tokenizer.
        background: colour painted over everything outside an object's mask, as PIL understands it.
        batch_size: objects per forward pass.
        device: null is this process's GPU if there is one, else the CPU.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        background: str = "#999999",
        batch_size: int = 16,
        device: str | None = None,
    ) -> None:
        try:
            ImageColor.getrgb(background)
        except ValueError:
            raise ValueError(
                f"ClipColors has background={background!r}, use a colour such as '#999999' (the benchmark's)."
            ) from None
        check_minimum("ClipColors", 1, batch_size=batch_size)
        self.model = model
        self.background = background
        self.batch_size = batch_size
        self.device = device
        self._network: Any = None
        self._tokenizer: Any = None
        self._texts: dict[str, Tensor] = {}

    @property
    def version(self) -> str:
        """Version of the names: the model and the background."""
        return f"clip-colors {self.model} background={self.background}"

    def load(self) -> None:
        """Loads CLIP and its tokenizer; later calls do nothing."""
        if self._network is None:
            self._tokenizer = load_processor(AutoTokenizer, self.model)
            self._network = load_pretrained(CLIPModel, self.model, device=self.device)

    @torch.inference_mode()
    def classify(self, image: Image.Image, masks: Sequence[Mask], boxes: Sequence[Box], label: str) -> list[str]:
        """Names the colours of N objects of one class in one image.

        Args:
            image: any mode; an EXIF orientation must have been applied already.
            masks: N arrays `[height, width]`, True where the object is.
            boxes: N boxes in pixels, the far edge exclusive.
            label: class name, part of the texts.

        Returns:
            N names, each one of `COLORS`.
        """
        self.load()
        texts, size = self.text_embeddings(label), self._network.config.vision_config.image_size
        names: list[str] = []
        objects = list(zip(masks, boxes, strict=True))
        for rows in chunks(len(objects), self.batch_size):
            crops = [cut_out(image, mask, box, self.background) for mask, box in objects[rows]]
            pixels = torch.stack([clip_pixels(crop, size) for crop in crops]).to(texts.device)
            features = F.normalize(self._network.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
            names += [COLORS[index] for index in (features @ texts.T).argmax(-1).tolist()]
        return names

    @torch.inference_mode()
    def text_embeddings(self, label: str) -> Tensor:
        """Embeds a label's ten colour texts as `[10, D]` unit vectors; keeps them for the next call."""
        if label not in self._texts:
            self.load()
            prompts = [template.format(color=color, label=label) for color in COLORS for template in TEMPLATES]
            tokens = self._tokenizer(prompts, padding=True, return_tensors="pt").to(self._network.device)
            embeddings = F.normalize(self._network.get_text_features(**tokens).pooler_output, dim=-1)
            self._texts[label] = F.normalize(embeddings.view(len(COLORS), len(TEMPLATES), -1).mean(1), dim=-1)
        return self._texts[label]


def cut_out(image: Image.Image, mask: Mask, box: Box, background: str) -> Image.Image:
    """Crops an image to an object's box, with everything outside its mask painted over.

    Args:
        image: any mode.
        mask: `[height, width]` of the image, True where the object is.
        box: whole pixels, the far edge exclusive.
        background: a colour as PIL understands it.
    """
    ground = Image.new("RGB", image.size, background)
    solid = Image.fromarray(mask.astype(np.uint8) * 255)
    left, top, right, bottom = map(round, box)
    return Image.composite(image.convert("RGB"), ground, solid).crop((left, top, right, bottom))


def clip_pixels(image: Image.Image, size: int) -> Tensor:
    """Applies CLIP's transform: shortest edge to `size` (bicubic, antialiased), centre crop, normalised.

    Sizes are rounded as OpenAI's preprocessing does through torchvision: the longer edge is cut to a whole number,
    and half a pixel of the crop's corner goes to the even side. transformers' image processor rounds that down.

    Args:
        image: an RGB image of W x H.
        size: edge of the square result, in pixels.

    Returns:
        `[3, size, size]` float32.
    """
    width, height = image.size
    short = min(width, height)
    width, height = size * width // short, size * height // short
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return (torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255 - _MEAN) / _STD

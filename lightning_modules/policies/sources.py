"""Source images of editing models, which need one size per batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageOps
from torch import Tensor


def crop_to(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """Scales an image to cover (height, width) and crops it around its centre; size None leaves it as it is."""
    if size is None:
        return image
    return ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)


def stack_sources(images: Sequence[Tensor]) -> Tensor:
    """Joins S images [1, 3, h, w] to [S, 3, h, w].

    Attention here has no mask and all samples share their position ids, so S sources must become equally many tokens.

    Raises:
        ValueError: if sizes differ.
    """
    sizes = sorted({(image.shape[2], image.shape[3]) for image in images})
    if len(sizes) > 1:
        found = ", ".join(f"{height} x {width}" for height, width in sizes)
        raise ValueError(
            f"the source images of one batch would be encoded as {found} pixels; a batch takes one size: set "
            "`source_size` to crop all of them to the same height and width."
        )
    return torch.cat(list(images))

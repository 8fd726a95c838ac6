"""Statistics of images that a reward's curve hides: shares of dark, blank, noisy or repeated ones, saturation.

Images are [B, 3, H, W] RGB in 0..1, as stored (gamma-encoded). No function here needs a trainer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

_THUMBNAIL = 16


def rollout_statistics(images: Sequence[Image], group_size: int) -> dict[str, float]:
    """Averages the statistics of a rollout's images.

    Args:
        images: G * N images of any sizes, group by group.
        group_size: N.

    Returns:
        Each in 0..1: `dark_share`, `bright_share` and `blank_share` of the images, and the means of `flat_area`,
        `saturation`, `high_frequency` and `duplicates` (see the functions of these names).
    """
    rows, small = [], []
    for image in images:  # one at a time: a rollout of large images would not fit into memory as fp32
        pixels = to_tensor(image)
        rows.append(image_statistics(pixels))
        small.append(thumbnails(pixels))
    means = {name: torch.cat([row[name] for row in rows]).mean().item() for name in rows[0]}
    return means | {"duplicates": duplicates(torch.cat(small).unflatten(0, (-1, group_size))).mean().item()}


def image_statistics(
    images: Tensor, *, dark: float = 0.05, bright: float = 0.95, blank: float = 0.02
) -> dict[str, Tensor]:
    """Computes the statistics that take one image each.

    Args:
        images: [B, 3, H, W].
        dark: mean luminance below which an image counts as dark.
        bright: mean luminance above which it counts as bright.
        blank: contrast below which it counts as blank.

    Returns:
        Each [B] in 0..1: `dark_share`, `bright_share`, `blank_share` (0 or 1), `flat_area`, `saturation`,
        `high_frequency`.
    """
    mean = luminance(images).mean((1, 2))
    return {
        "dark_share": (mean < dark).float(),
        "bright_share": (mean > bright).float(),
        "blank_share": (contrast(images) < blank).float(),
        "flat_area": flat_area(images, flat=blank),
        "saturation": saturation(images),
        "high_frequency": high_frequency(images),
    }


def luminance(images: Tensor) -> Tensor:
    """Computes the luminance [B, H, W], 0..1: 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601, as in Pillow's mode L)."""
    assert images.ndim == 4 and images.shape[1] == 3
    return torch.einsum("bchw,c->bhw", images, images.new_tensor([0.299, 0.587, 0.114]))


def contrast(images: Tensor) -> Tensor:
    """Computes each image's contrast [B], the largest (population) std of its three channels, 0..0.5.

    Not the luminance's: red on an equally light green would pass for a blank image.
    """
    assert images.ndim == 4 and images.shape[1] == 3
    return images.flatten(2).std(-1, correction=0).amax(1)


def flat_area(images: Tensor, *, flat: float = 0.02, tiles: int = 16) -> Tensor:
    """Computes the share of an image's tiles whose `contrast` is below `flat`: [B], 0..1, 1 for a blank image.

    Args:
        images: [B, 3, H, W], at least two pixels a tile; rows and columns that fill no tile are left out.
        flat: contrast, 0..0.5.
        tiles: number of tiles in each direction.
    """
    assert images.ndim == 4 and images.shape[1] == 3
    height, width = images.shape[-2] // tiles, images.shape[-1] // tiles
    cut = images[..., : height * tiles, : width * tiles]
    cut = cut.unflatten(-1, (tiles, width)).unflatten(-3, (tiles, height))  # [B, 3, tiles, height, tiles, width]
    deviations = cut.std((-3, -1), correction=0).amax(1)
    return (deviations < flat).float().mean((1, 2))


def saturation(images: Tensor) -> Tensor:
    """Computes the mean HSV saturation [B], 0 (grey) to 1: (max - min) / max of a pixel's channels, 0 for black."""
    assert images.ndim == 4 and images.shape[1] == 3
    high, low = images.amax(1), images.amin(1)
    return torch.where(high > 0, (high - low) / high.clamp(min=torch.finfo(high.dtype).tiny), 0).mean((1, 2))


def high_frequency(images: Tensor, *, cutoff: float = 0.25) -> Tensor:
    """Computes the share of the luminance's spectral energy above `cutoff` [B], 0..1: fine grids and noise.

        sum_{|f| > cutoff} |F(f)|^2 / sum_f |F(f)|^2,    F = DFT of hann(y) hann(x) (L(y, x) - mean of L)

    with |f| the radius in cycles per pixel. White noise has 1 - pi / 16 = 0.80, a natural image a few hundredths. The
    window keeps the jump from one edge to the opposite one out. An image without any contrast has 0.

    Args:
        images: [B, 3, H, W].
        cutoff: cycles per pixel; the Nyquist frequency is 0.5.
    """
    light = luminance(images)
    height, width = light.shape[1:]
    centred = light - light.mean((1, 2), keepdim=True)
    rows, columns = (torch.hann_window(size, dtype=light.dtype, device=light.device) for size in (height, width))
    energy = torch.fft.fft2(centred * rows[:, None] * columns).abs().square()
    y, x = (torch.fft.fftfreq(size, dtype=light.dtype, device=light.device) for size in (height, width))
    above = y.square()[:, None] + x.square() > cutoff**2
    total = energy.sum((1, 2))
    contrasted = centred.square().mean((1, 2)) > 1e-8  # a std below 1e-4 is rounding
    return torch.where(contrasted, (energy * above).sum((1, 2)) / torch.where(contrasted, total, 1), 0)


def thumbnails(images: Tensor) -> Tensor:
    """Shrinks images to [B, 3, 16, 16], means of equal tiles."""
    return F.adaptive_avg_pool2d(images, _THUMBNAIL)


def duplicates(thumbnails: Tensor, *, threshold: float = 0.03) -> Tensor:
    """Computes the share of a group's images, its first left out, that nearly repeat an earlier one: [G], 0..1.

    Two images are near-duplicates if the root mean square difference of their thumbnails is below `threshold`. (The
    mean absolute one takes small objects on a plain ground for the same wherever they are.)

    Args:
        thumbnails: [G, N, 3, h, w] of G groups, in 0..1.
        threshold: 0..1.
    """
    assert thumbnails.ndim == 5
    groups, size = thumbnails.shape[:2]
    flat = thumbnails.flatten(2)
    differences = torch.stack([(group[:, None] - group).square().mean(-1).sqrt() for group in flat])
    earlier = torch.ones(size, size, dtype=torch.bool, device=flat.device).tril(-1)
    repeats = ((differences < threshold) & earlier).any(-1)
    return repeats.sum(1) / max(size - 1, 1)


def to_tensor(image: Image) -> Tensor:
    """Converts an image to [1, 3, H, W] in 0..1."""
    array = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).float().div(255).unsqueeze(0)

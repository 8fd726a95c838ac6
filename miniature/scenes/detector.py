"""Object detector of the miniature world: connected components of one colour, named by the best-fitting stencil."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image
from scipy import ndimage

from miniature.scenes.world import CELL, COLORS, SHAPES, stencil
from rewards.geneval.rules import Detection

_PALETTE = np.array(list(COLORS.values()), dtype=np.float64)


class ShapesDetector:
    """Finds the eight shapes of the eight colours on a light ground.

    A pixel belongs to the colour it is nearest to, if it is nearer to it than `max_distance` and darker or more
    saturated than the ground; components of one colour are compared with the eight stencils at every small offset.
    The detection's score is the best fit (intersection over union of soft masks) on GenEval's scale, where 0.3 is
    the threshold for presence and 0.9 for counting: a fit of `good_fit` scores 1.

    Args:
        min_area: smallest component, in pixels.
        max_distance: largest RGB distance (0..442) of a pixel from its colour.
        good_fit: soft IoU in (0, 1] at and above which the score is 1.
    """

    def __init__(self, min_area: int = 6, max_distance: float = 110.0, good_fit: float = 0.75) -> None:
        self.min_area = min_area
        self.max_distance = max_distance
        self.good_fit = good_fit

    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """Returns the detections of every image; boxes are (left, top, right, bottom) in pixels."""
        return [self._detect_one(np.asarray(image.convert("RGB"), dtype=np.float64)) for image in images]

    def _detect_one(self, image: np.ndarray) -> list[Detection]:
        ground = np.median(image.reshape(-1, 3), axis=0)
        distances = np.linalg.norm(image[:, :, None] - _PALETTE, axis=-1)
        nearest = distances.argmin(-1)
        # Share of a pixel that is paint rather than ground, along the line between the two colours.
        paint = _PALETTE[nearest] - ground
        cover = (((image - ground) * paint).sum(-1) / np.maximum((paint**2).sum(-1), 1e-9)).clip(0, 1)
        found: list[Detection] = []
        for index, color in enumerate(COLORS):
            solid = (nearest == index) & (distances[..., index] < self.max_distance) & (cover > 0.5)
            labels, count = ndimage.label(solid)
            for number, box in enumerate(ndimage.find_objects(labels, count), start=1):
                mask = labels == number
                if mask.sum() >= self.min_area:
                    found.append(self._name(mask, cover, box, color))
        return found

    def _name(self, mask: np.ndarray, cover: np.ndarray, box: tuple[slice, slice], color: str) -> Detection:
        rows, columns = box
        size = CELL + 4
        # Soft cover of the component and its rim, in a window of 12 x 12 pixels around it.
        soft = np.where(ndimage.binary_dilation(mask, iterations=1), cover, 0.0)
        middle = ((rows.start + rows.stop) // 2, (columns.start + columns.stop) // 2)
        padded = np.pad(soft, size)
        top, left = middle[0] + size - size // 2, middle[1] + size - size // 2
        window = padded[top : top + size, left : left + size]
        outside = soft.sum() - window.sum()
        ideals = _placed_stencils()
        fits = np.minimum(window, ideals).sum((-1, -2)) / (np.maximum(window, ideals).sum((-1, -2)) + outside)
        by_shape = fits.max(1)
        shape, fit = SHAPES[int(by_shape.argmax())], by_shape.max()
        return Detection(
            label=shape,
            box=(float(columns.start), float(rows.start), float(columns.stop), float(rows.stop)),
            score=float(min(fit / self.good_fit, 1.0)),
            color=color,
        )


@lru_cache
def _placed_stencils() -> np.ndarray:
    """Returns [shapes, 25, 12, 12]: every stencil at every offset of up to 2 pixels from the window's middle."""
    placed = np.zeros((len(SHAPES), 25, CELL + 4, CELL + 4))
    for s, shape in enumerate(SHAPES):
        for i, (dy, dx) in enumerate(product(range(5), repeat=2)):
            placed[s, i, dy : dy + CELL, dx : dx + CELL] = stencil(shape)
    return placed

"""Preference reward of the miniature: a smooth measure of beauty, less for what the image does not show."""

from __future__ import annotations

from typing import Any

import numpy as np

from miniature.scenes.detector import ShapesDetector
from miniature.scenes.world import CELL, SIZE
from rewards.base import Reward, RewardBatch, Score
from rewards.geneval.rules import judge

FAINT, INK = 30.0, 120.0
"""RGB distances from the ground up to which a pixel is no ink, and from which it is nothing else."""
STRONG = 300.0
"""RGB distance from the ground at which contrast is full (black on white has 442, yellow on the world's peach 209)."""


def beauty(image: np.ndarray) -> dict[str, float]:
    """Returns `beauty = amount * (contrast * margins * balance) ** (1 / 3)` and its parts, each in 0..1.

    A pixel's ink w is rise((d - 30) / 90) with d its RGB distance from the ground (the image's median) and
    rise(x) = 3 x^2 - 2 x^3 on 0..1: a noisy ground is no ink, which would pass for balance. Means are over pixels,
    weighted by w:
    - contrast: mean d over `STRONG`, at most 1;
    - margins: mean distance from the nearest edge over 8 pixels (each pixel at most 1);
    - balance: exp(-(r / 8)^2) with r pixels between the middle of the ink and that of the image;
    - amount: with a the mean of w, rise(a / 0.02) * rise((0.5 - a) / 0.25). So a blank image
      has 0, a full one, whose median is its paint, too, and anything between 2 % and 25 % has 1.

    Args:
        image: [32, 32, 3] RGB in 0..255.

    Returns:
        The four parts and `beauty`.
    """
    distance = np.linalg.norm(image - np.median(image.reshape(-1, 3), axis=0), axis=-1)
    ink = _rise((distance - FAINT) / (INK - FAINT))
    total = max(float(ink.sum()), 1e-9)
    middles = np.arange(SIZE) + 0.5
    to_edge = np.minimum(middles, SIZE - middles)
    margin = (np.minimum(to_edge[:, None], to_edge) / CELL).clip(0, 1)
    y, x = float((ink.sum(1) * middles).sum()) / total, float((ink.sum(0) * middles).sum()) / total
    share = float(ink.mean())
    parts = {
        "amount": float(_rise(share / 0.02) * _rise((0.5 - share) / 0.25)),
        "contrast": min(float((ink * distance).sum()) / total / STRONG, 1.0),
        "margins": float((ink * margin).sum()) / total,
        "balance": float(np.exp(-((y - SIZE / 2) ** 2 + (x - SIZE / 2) ** 2) / CELL**2)),
    }
    parts["beauty"] = parts["amount"] * float(np.cbrt(parts["contrast"] * parts["margins"] * parts["balance"]))
    return parts


class ShapesPreference(Reward):
    """Scores the `beauty` of an image, less for what it does not show. native = table = rl.

    The score is `beauty * (1 - prompt_weight + prompt_weight * asked)`, where asked is GenEval's soft score, less
    0.5 where the image shows what `exclude` forbids. A wrong image loses that share, however pleasing.

    Args:
        prompt_weight: share of the score that depends on the prompt, in 0..1.
    """

    name = "preference"
    needs = ("tag", "include")
    native_range = (0.0, 1.0)

    def __init__(self, prompt_weight: float = 0.5) -> None:
        if not 0 <= prompt_weight <= 1:
            raise ValueError(f"ShapesPreference has prompt_weight={prompt_weight}, use 0 to 1.")
        self.prompt_weight = prompt_weight

    @property
    def version(self) -> str:
        """Name and the share of the prompt, on which the scores depend."""
        return f"{self.name} prompt_weight={self.prompt_weight}"

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Scores B images of 32 x 32 pixels; `detail` has the parts of `beauty` and `asked`."""
        scores = []
        for sample, image, found in zip(
            batch.samples, batch.images, ShapesDetector().detect(batch.images), strict=True
        ):
            if image.size != (SIZE, SIZE):
                raise ValueError(
                    f"ShapesPreference got an image of {image.size} pixels for {sample.id!r}, "
                    f"it judges {SIZE} x {SIZE}."
                )
            verdict = judge(found, sample.metadata)
            asked = min(max(verdict.soft - 0.5 * verdict.excluded_found, 0.0), 1.0)
            parts = beauty(np.asarray(image.convert("RGB"), dtype=np.float64))
            value = parts["beauty"] * (1 - self.prompt_weight * (1 - asked))
            scores.append(Score(value, value, value, detail={**parts, "asked": asked}))
        return scores


def _rise(x: Any) -> Any:
    x = np.clip(x, 0, 1)
    return 3 * x**2 - 2 * x**3

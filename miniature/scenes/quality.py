"""Image quality in the miniature world, whatever the image shows: a reward to watch, not to train on."""

from __future__ import annotations

from statistics import fmean

from miniature.scenes.detector import ShapesDetector
from rewards.base import Reward, RewardBatch, Score


class ShapesQuality(Reward):
    """Scores the mean fit (soft IoU, 0..1) of an image's coloured components to the nearest shape. native = table = rl.

    Specks count as components, so noise, smears and half-drawn shapes lower it. An image without any component has 0:
    blanking does not pay. The prompt is not looked at.

    Args:
        min_area: smallest component that counts, in pixels.
    """

    name = "shapes_quality"
    native_range = (0.0, 1.0)

    def __init__(self, min_area: int = 3) -> None:
        if min_area < 1:
            raise ValueError(f"ShapesQuality has min_area={min_area}, use at least 1.")
        self.min_area = min_area

    @property
    def version(self) -> str:
        """Name and the smallest component's size, on which the scores depend."""
        return f"{self.name} min_area={self.min_area}"

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Scores B images; `detail` has the number of components and the worst one's fit."""
        found = ShapesDetector(self.min_area, good_fit=1.0).detect(batch.images)
        scores = []
        for detections in found:
            fits = [detection.score for detection in detections]
            mean = fmean(fits) if fits else 0.0
            scores.append(Score(mean, mean, mean, detail={"components": len(fits), "worst": min(fits, default=0.0)}))
        return scores

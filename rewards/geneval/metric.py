"""The GenEval benchmark's number: the unweighted mean of the six tags' means over images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from rewards.geneval.rules import TAGS


class GenEvalScore(Metric):
    """Accumulates official verdicts; sums only, so processes with unequal shares reduce exactly.

    `compute` gives each seen tag's mean, `overall` (the unweighted mean of those: the number that papers print) and
    `images` (share of all images that are correct). A tag never seen is left out of the mean.

    Example:
        >>> metric = GenEvalScore()
        >>> metric.update([True, True, False], ["colors", "colors", "position"])
        >>> metric.update([True], ["position"])
        >>> metric.compute()
        {'colors': 1.0, 'position': 0.5, 'overall': 0.75, 'images': 0.75}
    """

    full_state_update = False
    higher_is_better = True
    num_correct: Tensor
    num_images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("num_correct", default=torch.zeros(len(TAGS), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("num_images", default=torch.zeros(len(TAGS), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, correct: Sequence[bool], tags: Sequence[str]) -> None:
        """Add images.

        Args:
            correct: B official verdicts.
            tags: B tags, each one of the six.
        """
        for is_correct, tag in zip(correct, tags, strict=True):
            self.num_correct[TAGS.index(tag)] += int(is_correct)
            self.num_images[TAGS.index(tag)] += 1

    def compute(self) -> dict[str, float]:
        """Means so far; `overall` and `images` are NaN when no image was seen."""
        return _compute(self.num_correct, self.num_images)


def _compute(num_correct: Tensor, num_images: Tensor) -> dict[str, float]:
    """Sums `[6]` and counts `[6]` in the order of `TAGS` to means."""
    means = (num_correct.double() / num_images).tolist()  # NaN where a tag was never seen
    per_tag = {tag: mean for tag, mean, num in zip(TAGS, means, num_images.tolist(), strict=True) if num}
    overall = sum(per_tag.values()) / len(per_tag) if per_tag else float("nan")
    images = float(num_correct.sum().double() / num_images.sum())
    return {**per_tag, "overall": overall, "images": images}

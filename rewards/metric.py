"""The mean of a reward's table values, for benchmarks: invalid scores are counted, never averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from rewards.base import Score


class MeanScore(Metric):
    """Accumulates scores; sums only, so that processes with unequal shares reduce exactly.

    `compute` gives `mean` (of the table values, what papers print), `rl` (of what a trainer would maximise), both over
    valid scores and NaN without any, `invalid_share`, and the number of `images`.

    Example:
        >>> metric = MeanScore()
        >>> metric.update([Score(21.0, 21.0, 0.5), Score(23.0, 23.0, 1.0), Score.invalid("time-out")])
        >>> {name: round(value, 3) for name, value in metric.compute().items()}
        {'mean': 22.0, 'rl': 0.75, 'invalid_share': 0.333, 'images': 3.0}
    """

    full_state_update = False
    higher_is_better = True
    table: Tensor
    rl: Tensor
    num_valid: Tensor
    num_images: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("table", "rl"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("num_valid", "num_images"):
            self.add_state(name, default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, scores: Sequence[Score]) -> None:
        """Add B scores."""
        valid = [score for score in scores if score.valid]
        self.table += sum(score.table for score in valid)
        self.rl += sum(score.rl for score in valid)
        self.num_valid += len(valid)
        self.num_images += len(scores)

    def compute(self) -> dict[str, float]:
        """Means so far."""
        return {
            "mean": float(self.table / self.num_valid),
            "rl": float(self.rl / self.num_valid),
            "invalid_share": float(1 - self.num_valid / self.num_images),
            "images": float(self.num_images),
        }

"""Any reward as a benchmark: the mean of its table values on the evaluation sets."""

from __future__ import annotations

from collections.abc import Sequence

from PIL.Image import Image
from torchmetrics import Metric

from callbacks.benchmark import Benchmark
from datamodules.base import PromptSample
from rewards.base import Reward, RewardBatch, score_each
from rewards.metric import MeanScore


class RewardBenchmark(Benchmark):
    """Mean table value of a reward (PickScore, HPSv2.1, OCR, ...), which need not be the one that is trained on.

    Pictures that could not be scored are left out of the mean and counted in `invalid_share`. Logged as
    `val/<set>/<reward>/<mode>`, or `val/<set>/<mode>` where the set has the reward's own name.

    Args:
        reward: scores pictures against their original prompts.
        sets: evaluation sets to score; null is all of the data module's.
    """

    headline = "mean"

    def __init__(self, reward: Reward, sets: list[str] | None = None) -> None:
        super().__init__(sets)
        self.reward = reward

    @property
    def title(self) -> str:
        """Names the reward, too."""
        return f"{super().title} by {self.reward.name}"

    def key(self, name: str) -> str:
        """The set's name, with the reward's where they differ."""
        return name if name == self.reward.name else f"{name}/{self.reward.name}"

    def new_metric(self) -> Metric:
        """A mean over valid scores."""
        return MeanScore()

    def update(self, metric: Metric, samples: Sequence[PromptSample], images: Sequence[Image]) -> None:
        """Scores every image against its original prompt."""
        metric.update(score_each(self.reward, RewardBatch(samples, images)))

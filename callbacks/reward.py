"""`RewardBenchmark`: any reward as a benchmark, by the mean of its table values."""

from __future__ import annotations

from collections.abc import Sequence

from PIL.Image import Image
from torch import Tensor

from callbacks.benchmark import Benchmark
from callbacks.scores.prompt_scores import PromptTable, weighted_mean
from datamodules.base import PromptSample
from rewards.base import Reward, RewardBatch
from rewards.calls import score_each


class RewardBenchmark(Benchmark):
    """Mean table value of a reward (PickScore, HPSv2.1, OCR, ...), which need not be the one that is trained on.

    `mean` runs over all scored images, as the paper's "Avg." of editing does; where a set has several tags, each has
    its own mean beside it. Images that could not be scored are left out and counted in `invalid_share`. Logged as
    `val/<set>/<reward>/<mode>`, or `val/<set>/<mode>` where the set has the reward's own name.

    Args:
        reward: scores images against their original prompts.
        sets: evaluation sets to score, with the sets that reword them; null is all of the data module's.
        resamples: of the bootstrap.
    """

    headline = "mean"
    columns: tuple[str, ...] = ("table", "rl")

    def __init__(self, reward: Reward, sets: list[str] | None = None, resamples: int = 1000) -> None:
        super().__init__(sets, resamples)
        self.reward = reward

    @property
    def title(self) -> str:
        """Name of this benchmark, with the reward's name."""
        return f"{super().title} by {self.reward.name}"

    def key(self, name: str) -> str:
        """Returns the set's name, followed by the reward's where they differ."""
        return name if name == self.reward.name else f"{name}/{self.reward.name}"

    def score(self, samples: Sequence[PromptSample], images: Sequence[Image]) -> list[dict[str, float]]:
        """Scores every image against its original prompt."""
        scores = score_each(self.reward, RewardBatch(samples, images))
        return [{"table": score.table, "rl": score.rl} if score.valid else {} for score in scores]

    def summarize(self, table: PromptTable, weights: Tensor) -> dict[str, Tensor]:
        """Computes means over scored images, by tag and in all, the share of unscored images, and their number."""
        tags = list(dict.fromkeys(table.tags))
        by_tag = {tag: weighted_mean(table, "table", weights, table.tagged(tag)) for tag in tags if len(tags) > 1}
        return {
            **by_tag,
            "mean": weighted_mean(table, "table", weights),
            "rl": weighted_mean(table, "rl", weights),
            "invalid_share": 1 - (weights @ table.counts["table"]) / (weights @ table.images),
            "images": table.images.sum().expand(len(weights)),
        }

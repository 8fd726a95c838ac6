"""`EditBenchmark`: mean of the categories' means, as GEdit-Bench and ImgEdit-Bench report."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from callbacks.reward import RewardBenchmark
from callbacks.scores.prompt_scores import PromptTable, weighted_mean
from datamodules.base import PromptSample
from rewards.base import Reward, RewardBatch, Score
from rewards.calls import score_each

INTERSECTION = "Intersection_exist"
"""GEdit-Bench's column for the edits that it also reports apart."""


class EditBenchmark(RewardBenchmark):
    """Mean over the tags of the reward's mean over a tag's images, so that every kind of edit weighs the same.

    Gives `overall`, each tag's mean, and for each of `parts` the mean of the tags' means. Where prompts have
    `Intersection_exist` in their metadata, `intersection_overall` and so on are over those for which it is true. A tag
    without any scored image is left out of a mean, not counted as 0.

    PromptRL's editing table is a mean over images instead (its 200 swaps count twice as much as the 100 of every
    other kind): that is `RewardBenchmark`.

    Args:
        reward: scores images: `rewards.judges.viescore.VIEScore` for GEdit-Bench,
            `rewards.judges.imgedit.ImgEditJudge` for ImgEdit-Bench.
        parts: numbers in its scores' `detail` that are averaged in the same way: `[sc, pq]` of VIEScore.
        sets: evaluation sets to score, with the sets that reword them; null is all of the data module's.
        resamples: of the bootstrap.
    """

    headline = "overall"

    def __init__(
        self,
        reward: Reward,
        parts: list[str] | None = None,
        sets: list[str] | None = None,
        resamples: int = 1000,
    ) -> None:
        super().__init__(reward, sets, resamples)
        self.parts = parts or []
        self.columns = ("overall", *self.parts, "intersection")

    def score(self, samples: Sequence[PromptSample], images: Sequence[Image]) -> list[dict[str, float]]:
        """Scores every image against its original prompt; `intersection` is 1 or 0, also where the score failed."""
        scores = score_each(self.reward, RewardBatch(samples, images))
        return [self._values(sample, score) for sample, score in zip(samples, scores, strict=True)]

    def _values(self, sample: PromptSample, score: Score) -> dict[str, float]:
        values = {"intersection": float(sample.metadata[INTERSECTION])} if INTERSECTION in sample.metadata else {}
        if score.valid:
            missing = [part for part in self.parts if part not in score.detail]
            if missing:
                raise ValueError(
                    f"the benchmark's `parts` name {missing[0]}, which scores of {self.reward.name} do not have: "
                    f"they have {', '.join(score.detail) or 'none'}."
                )
            values |= {"overall": score.table} | {part: float(score.detail[part]) for part in self.parts}
        return values

    def summarize(self, table: PromptTable, weights: Tensor) -> dict[str, Tensor]:
        """Computes each tag's mean, the means of these, the share of unscored images, and the number of images."""
        tags = {tag: table.tagged(tag) for tag in dict.fromkeys(table.tags)}
        means = ("overall", *self.parts)
        scores = {tag: weighted_mean(table, "overall", weights, rows) for tag, rows in tags.items()}
        scores |= {column: _mean_of_means(table, column, weights, list(tags.values())) for column in means}
        if table.counts["intersection"].any():
            shared = table.sums["intersection"] > 0
            inside = [rows & shared for rows in tags.values()]
            scores |= {f"intersection_{column}": _mean_of_means(table, column, weights, inside) for column in means}
        scores["invalid_share"] = 1 - (weights @ table.counts["overall"]) / (weights @ table.images)
        scores["images"] = table.images.sum().expand(len(weights))
        return scores


def _mean_of_means(table: PromptTable, column: str, weights: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """[R] mean over groups of prompts, each with its images' mean; those without a value are left out."""
    if not groups:
        return torch.full((len(weights),), torch.nan, dtype=torch.float64)
    return torch.stack([weighted_mean(table, column, weights, rows) for rows in groups]).nanmean(0)

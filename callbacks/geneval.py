"""`GenEvalBenchmark`: GenEval's verdicts by any detector, mean over the six tags."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from callbacks.benchmark import Benchmark
from callbacks.scores.prompt_scores import PromptTable, weighted_mean
from datamodules.base import PromptSample
from datamodules.geneval_names import TAGS
from rewards.geneval.reward import Detector, detect_for
from rewards.geneval.rules import judge


class GenEvalBenchmark(Benchmark):
    """Share of correct images by GenEval's rules (arXiv 2310.11513); the headline is the mean of the tags' means.

    Beside the tags: `overall` (the unweighted mean of those that occur: the number that papers print), `images` (share
    of all images that are correct) and `prompts` (share of prompts with at least one correct image).

    Args:
        detector: finds objects; the same as the reward's, or another to guard against reward hacking.
        sets: evaluation sets to score, with the sets that reword them; null is all of the data module's.
        resamples: of the bootstrap.
    """

    headline = "overall"
    columns: tuple[str, ...] = ("correct",)

    def __init__(self, detector: Detector, sets: list[str] | None = None, resamples: int = 1000) -> None:
        super().__init__(sets, resamples)
        self.detector = detector

    def score(self, samples: Sequence[PromptSample], images: Sequence[Image]) -> list[dict[str, float]]:
        """Judges every image against its original prompt's metadata."""
        metadata = [sample.metadata for sample in samples]
        found = detect_for(self.detector, images, metadata)
        verdicts = [judge(detections, record) for detections, record in zip(found, metadata, strict=True)]
        return [{"correct": float(verdict.correct)} for verdict in verdicts]

    def tag(self, sample: PromptSample) -> str:
        """Returns the tag of GenEval's metadata; in tagged data the sample's own tag names the reward."""
        tag: str = sample.metadata["tag"]
        return tag

    def summarize(self, table: PromptTable, weights: Tensor) -> dict[str, Tensor]:
        """Computes the tags' means, their mean, and the shares of correct images and of solved prompts."""
        seen = [tag for tag in TAGS if bool(table.counts["correct"][table.tagged(tag)].sum())]
        by_tag = {tag: weighted_mean(table, "correct", weights, table.tagged(tag)) for tag in seen}
        nothing = weights.new_full((len(weights),), float("nan"))
        any_correct, drawn = (table.sums["correct"] > 0).double(), (table.images > 0).double()
        return {
            **by_tag,
            "overall": torch.stack(list(by_tag.values())).mean(0) if by_tag else nothing,
            "images": weighted_mean(table, "correct", weights),
            "prompts": (weights @ any_correct) / (weights @ drawn),
        }

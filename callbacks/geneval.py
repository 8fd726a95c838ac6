"""The GenEval benchmark: official verdicts by any detector, mean over the six tags."""

from __future__ import annotations

from collections.abc import Sequence

from PIL.Image import Image
from torchmetrics import Metric

from callbacks.benchmark import Benchmark
from datamodules.base import PromptSample
from rewards.geneval.metric import GenEvalScore
from rewards.geneval.reward import Detector
from rewards.geneval.rules import judge


class GenEvalBenchmark(Benchmark):
    """Share of correct pictures by GenEval's rules (arXiv 2310.11513); the headline is the mean of the tags' means.

    Args:
        detector: finds objects; the same as the reward's, or another to guard against reward hacking.
        sets: evaluation sets to score; null is all of the data module's.
    """

    headline = "overall"

    def __init__(self, detector: Detector, sets: list[str] | None = None) -> None:
        super().__init__(sets)
        self.detector = detector

    def new_metric(self) -> Metric:
        """GenEval's score."""
        return GenEvalScore()

    def update(self, metric: Metric, samples: Sequence[PromptSample], images: Sequence[Image]) -> None:
        """Judges every image against its original prompt's metadata."""
        found = self.detector.detect(images)
        verdicts = [judge(detections, sample.metadata) for detections, sample in zip(found, samples, strict=True)]
        metric.update([verdict.correct for verdict in verdicts], [sample.tag for sample in samples])

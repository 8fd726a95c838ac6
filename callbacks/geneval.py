"""The GenEval benchmark: official verdicts by any detector, mean over the six tags."""

from __future__ import annotations

from collections.abc import Sequence

from PIL.Image import Image
from torchmetrics import Metric

from callbacks.benchmark import Benchmark
from datamodules.base import PromptSample
from rewards.geneval.metric import GenEvalScore
from rewards.geneval.reward import Detector, detect_for
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
        metadata = [sample.metadata for sample in samples]
        found = detect_for(self.detector, images, metadata)
        verdicts = [judge(detections, record) for detections, record in zip(found, metadata, strict=True)]
        # GenEval's tag, not the sample's: in tagged data that one names the reward.
        metric.update([verdict.correct for verdict in verdicts], [record["tag"] for record in metadata])

"""`OCRWordsBenchmark`: MARIO-Eval's word scores (TextDiffuser, arXiv 2305.10855) with any OCR engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from callbacks.benchmark import Benchmark
from callbacks.scores.prompt_scores import PromptTable, weighted_mean
from datamodules.base import PromptSample
from rewards.base import RewardBatch
from rewards.calls import score_each
from rewards.mario import split_words, word_scores
from rewards.ocr import OCRReward, TextReader


class OCRWordsBenchmark(Benchmark):
    """Precision and recall of the wanted words in the images; the headline is F. Logged as `val/<set>/words/<mode>`.

    Like the published scorer, precision, recall and accuracy are means over *images* (a long text weighs as much as a
    short one), and `f` is the harmonic mean of the two *means*, not the mean of the images' own. It differs in two
    trifles: no epsilon in the denominators, and accuracy compares words where the published one compares the sorted
    words run together. Letters rather than words: `RewardBenchmark` with `rewards.ocr.OCRReward`.

    Args:
        reader: the OCR engine; null is `rewards.ocr_engines.RapidOCRReader` with its defaults.
        sets: evaluation sets to score, with the sets that reword them; null is all of the data module's. Their prompts
            need `text`, as `datamodules.ocr.OCRPrompts` has it.
        resamples: of the bootstrap.
    """

    headline = "f"
    columns = ("precision", "recall", "accuracy")

    def __init__(self, reader: TextReader | None = None, sets: list[str] | None = None, resamples: int = 1000) -> None:
        super().__init__(sets, resamples)
        self.reward = OCRReward(reader, scorer="mario")

    def key(self, name: str) -> str:
        """Returns `<set>/words`, apart from the keys of the set's other scores."""
        return f"{name}/words"

    def score(self, samples: Sequence[PromptSample], images: Sequence[Image]) -> list[dict[str, float]]:
        """Reads every image and compares its words with the wanted ones."""
        values: list[dict[str, float]] = []
        for score in score_each(self.reward, RewardBatch(samples, images)):
            if not score.valid:
                values.append({})
                continue
            words = word_scores(split_words(score.detail["recognized"]), split_words(score.detail["target"]))
            values.append({"precision": words.precision, "recall": words.recall, "accuracy": words.accuracy})
        return values

    def summarize(self, table: PromptTable, weights: Tensor) -> dict[str, Tensor]:
        """Computes the four published scores, the share of images that could not be read, and the number of images."""
        precision, recall, accuracy = (weighted_mean(table, column, weights) for column in self.columns)
        both = precision + recall
        return {
            "precision": precision,
            "recall": recall,
            "f": torch.where(both == 0, 0.0, 2 * precision * recall / both),  # NaN stays NaN
            "accuracy": accuracy,
            "invalid_share": 1 - (weights @ table.counts["precision"]) / (weights @ table.images),
            "images": table.images.sum().expand(len(weights)),
        }

"""MARIO-Eval's word scores (TextDiffuser, arXiv 2305.10855, Sec. 5): which of the wanted words are in the picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric


@dataclass(frozen=True)
class WordScores:
    """One image's scores, all in 0..1.

    Args:
        precision: share of the recognised words that were wanted; 0 when none was recognised.
        recall: share of the wanted words that were recognised.
        f1: harmonic mean of the two; 0 when both are.
        accuracy: 1 if the two sets of words are the same, whatever their order, else 0.
    """

    precision: float
    recall: float
    f1: float
    accuracy: float


def split_words(lines: Sequence[str]) -> list[str]:
    """Lower-cased words of all lines.

    >>> split_words(["Grand Opening", " TODAY "])
    ['grand', 'opening', 'today']
    """
    return [word for line in lines for word in line.lower().split()]


def word_scores(recognized_words: Sequence[str], target_words: Sequence[str]) -> WordScores:
    """Compares words as multisets: a word wanted twice must be there twice. Order and case do not matter.

    Args:
        recognized_words: as read, one word each. MARIO-Eval's reader finds words; split the lines of others
            (`split_words`), and mind that a reader which swallows spaces scores low here.
        target_words: the wanted words, one word each, at least one.

    >>> word_scores(["the", "big", "dog", "dog"], ["The", "dog"])
    WordScores(precision=0.5, recall=1.0, f1=0.6666666666666666, accuracy=0.0)
    """
    if not target_words:
        raise ValueError("word_scores needs at least one target word: leave out prompts that ask for no text.")
    recognized, target = (Counter(word.lower() for word in words) for words in (recognized_words, target_words))
    common = (recognized & target).total()
    precision = common / recognized.total() if recognized else 0.0
    recall = common / target.total()
    return WordScores(precision, recall, _f1(precision, recall), float(recognized == target))


class MarioScore(Metric):
    """MARIO-Eval's numbers over a set; sums only, so processes with unequal shares reduce exactly.

    Like the published scorer, precision, recall and accuracy are means over *images* (a long text weighs as much as a
    short one), and f1 is the harmonic mean of the two *means*, not the mean of the images' f1. It differs in two
    trifles: no epsilon in the denominators, and accuracy compares lists of words, where the published one compares
    the sorted words run together.

    Example:
        >>> metric = MarioScore()
        >>> metric.update([["open", "late"], ["fire"]], [["open"], ["fire", "exit"]])
        >>> metric.update([["hello"], []], [["hello"], ["gone"]])
        >>> metric.compute()
        {'precision': 0.625, 'recall': 0.625, 'f1': 0.625, 'accuracy': 0.25}
    """

    full_state_update = False
    higher_is_better = True
    sums: Tensor
    num_images: Tensor

    def __init__(self) -> None:
        super().__init__()
        # float64: thousands of thirds and sevenths must not depend on the order of the processes.
        self.add_state("sums", default=torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_images", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, recognized_words: Sequence[Sequence[str]], target_words: Sequence[Sequence[str]]) -> None:
        """Add images.

        Args:
            recognized_words: B lists of words as read.
            target_words: B lists of wanted words.
        """
        for recognized, target in zip(recognized_words, target_words, strict=True):
            scores = word_scores(recognized, target)
            self.sums += self.sums.new_tensor([scores.precision, scores.recall, scores.accuracy])
            self.num_images += 1

    def compute(self) -> dict[str, float]:
        """Means so far; all NaN when no image was seen."""
        return _compute(self.sums, self.num_images)


def _compute(sums: Tensor, num_images: Tensor) -> dict[str, float]:
    """Sums `[3]` of precision, recall and accuracy to means."""
    precision, recall, accuracy = (sums / num_images).tolist()
    return {"precision": precision, "recall": recall, "f1": _f1(precision, recall), "accuracy": accuracy}


def _f1(precision: float, recall: float) -> float:
    # `!= 0` keeps the NaN of an empty set
    return 2 * precision * recall / (precision + recall) if precision + recall != 0 else 0.0

"""MARIO-Eval's word scores (TextDiffuser, arXiv 2305.10855, Sec. 5): which of the wanted words are in the image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WordScores:
    """Word scores of one image, all in 0..1.

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
    """Splits lines into lower-cased words.

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


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0

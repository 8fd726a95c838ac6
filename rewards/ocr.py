"""The OCR reward: the share of the wanted text that an OCR engine reads in the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from PIL.Image import Image

from rewards.base import Reward, RewardBatch, Score
from rewards.mario import split_words, word_scores
from rewards.ocr_engines import Line, RapidOCRReader
from rewards.ocr_engines import TextReader as TextReader

Scorer = Literal["levenshtein", "mario"]


def text_reward(recognized_lines: Sequence[str], target: str, *, max_extra: int | None = None) -> float:
    """Computes Flow-GRPO's OCR reward `1 - min(d, n) / n`: n letters are wanted, d edits away from what is read.

    Lines are joined without a separator, spaces are removed and case is ignored. Where the target occurs within what
    was read, d is 0. This pays for covering the image with text until the target is somewhere in it, a known leak
    of the published reward, which `max_extra` closes.

    Args:
        recognized_lines: what was read, in reading order. Leave out lines of confidence 0.
        target: the wanted text, with at least one character other than a space.
        max_extra: the target may stand within text that has at most so many letters more; null is the published rule,
            which has no limit, and 0 the plain edit distance.

    Returns:
        A number in 0..1.

    >>> text_reward(["Hello", "Wrld"], "Hello World"), text_reward(["xxhelloworldyy"], "Hello World")
    (0.9, 1.0)
    """
    target = _letters([target])
    if not target:
        raise ValueError("text_reward got a target without any letters: leave out prompts that ask for no text.")
    recognized = _letters(recognized_lines)
    if target in recognized and (max_extra is None or len(recognized) - len(target) <= max_extra):
        return 1.0
    return 1 - min(_levenshtein(recognized, target), len(target)) / len(target)


class OCRReward(Reward):
    """Scores text in images by what an OCR engine reads, against the sample's `text` (a string or several in order).

    native = table = rl = `text_reward`. With `scorer: mario` they are MARIO-Eval's word scores instead: native = table
    = accuracy (mean it over images), rl = f1, which has steps in between.

    An image that the engine fails on is invalid, not 0. The engine's absence, and errors in its `load`, are raised.

    Args:
        reader: the OCR engine; null is `RapidOCRReader` with its defaults.
        scorer: letters (`levenshtein`, Flow-GRPO's and PromptRL's) or whole words (`mario`, TextDiffuser's).
        max_extra: see `text_reward`; null is the published rule.
    """

    name = "ocr"
    needs = ("text",)
    native_range = (0.0, 1.0)

    def __init__(
        self, reader: TextReader | None = None, scorer: Scorer = "levenshtein", max_extra: int | None = None
    ) -> None:
        if scorer not in get_args(Scorer):
            raise ValueError(f"OCRReward has scorer={scorer!r}, use one of {', '.join(get_args(Scorer))}.")
        if max_extra is not None and (max_extra < 0 or scorer != "levenshtein"):
            raise ValueError(
                f"OCRReward has max_extra={max_extra} with scorer={scorer}: use null, or 0 or more with levenshtein."
            )
        self.reader: TextReader = RapidOCRReader() if reader is None else reader
        self.scorer: Scorer = scorer
        self.max_extra = max_extra

    @property
    def version(self) -> str:
        """Version of the scores: the rule and the engine with its version."""
        rule = self.scorer if self.max_extra is None else f"{self.scorer} max_extra={self.max_extra}"
        return f"ocr {rule} by {getattr(self.reader, 'version', type(self.reader).__name__)}"

    def load(self) -> None:
        """Loads the OCR engine if it has a `load`."""
        if self.scorer == "levenshtein":
            _levenshtein("", "")
        if hasattr(self.reader, "load"):
            self.reader.load()

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Scores B images; `detail` holds the `recognized` lines, the `target` and the lines' mean `confidence`."""
        self.load()
        targets = [_target(sample.id, sample.metadata) for sample in batch.samples]
        return [self._score(image, target) for image, target in zip(batch.images, targets, strict=True)]

    def _score(self, image: Image, target: list[str]) -> Score:
        try:
            pages = self.reader.read([image])  # one by one: an image that breaks the engine costs no other its score
        except Exception as error:
            return Score.invalid(f"{type(self.reader).__name__}: {type(error).__name__}: {error}")
        if len(pages) != 1:
            raise ValueError(
                f"{type(self.reader).__name__}.read returned {len(pages)} lists for 1 image: "
                "it must return one list per image, empty where there is no text."
            )
        lines: list[Line] = [line for line in pages[0] if line[1] > 0]
        recognized = [text for text, _ in lines]
        confidence = sum(value for _, value in lines) / len(lines) if lines else 0.0
        detail: dict[str, Any] = {"recognized": recognized, "target": target, "confidence": confidence}
        if self.scorer == "mario":
            words = word_scores(split_words(recognized), split_words(target))
            return Score(native=words.accuracy, table=words.accuracy, rl=words.f1, detail=detail)
        value = text_reward(recognized, "".join(target), max_extra=self.max_extra)
        return Score(native=value, table=value, rl=value, detail=detail)


def _target(sample_id: str, metadata: dict[str, Any]) -> list[str]:
    """Returns the texts that a sample wants; raises ValueError if they have no letter."""
    text = metadata.get("text")
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts) or not "".join(texts).strip():
        raise ValueError(
            f"the prompt {sample_id!r} has the metadata text={text!r}: OCRReward needs the text that the image is to "
            "show, as a string or a list of strings (datamodules.ocr.OCRPrompts takes it from the prompt's quotes)."
        )
    return texts


def _letters(lines: Sequence[str]) -> str:
    return "".join(lines).replace(" ", "").lower()


def _levenshtein(a: str, b: str) -> int:
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ValueError(f"the OCR reward needs rapidfuzz ({error}): run `pip install -e '.[ocr]'`.") from error
    return Levenshtein.distance(a, b)

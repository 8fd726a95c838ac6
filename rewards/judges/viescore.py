"""VIEScore (arXiv 2312.14867) as GEdit-Bench uses it: ratings of the edit and, without its source, of the image."""

from __future__ import annotations

import json
import math
from typing import Any

from rewards.base import RewardBatch, Score
from rewards.judges.base import Answer, Judge, Question
from rewards.judges.templates import JudgeTemplate, read_wording, reworded

_JSON = """Give the reasons in a few words and answer with this JSON object and nothing else:
{"score": [first mark, second mark], "reasoning": "..."}
"""

_SEMANTIC = (
    """You are shown two images. The first is the source, the second is what an image editor made of it when it was \
given the instruction below. Both are generated or edited; who is in them does not matter.

Give the second image two marks from 0 to 10:
1. Success: how far the instruction was carried out. 0 - nothing of it is there; 10 - all of it is there, exactly.
2. Restraint: how far everything that the instruction leaves alone is as it was in the source. 0 - another picture \
altogether; 10 - nothing else has changed.

Editing instruction: [{prompt}]

"""
    + _JSON
)

_QUALITY = (
    """You are shown one image, made by an image generator or editor. Judge it as a picture, whatever it may be meant \
to show.

Give it two marks from 0 to 10:
1. Naturalness: do light, shadow, distance, proportions and surroundings agree with each other? 0 - nothing fits; \
10 - it could be a photograph or a finished work of its style.
2. Freedom from artefacts: distortion, blur, seams, marks, deformed faces, hands or letters. 0 - all over the image; \
10 - none to be found.

"""
    + _JSON
)


def parse_scores(reply: str, low: float, high: float, num: int = 2) -> tuple[float, ...]:
    r"""Returns the ratings of the JSON object with a `score` in a reply.

    Objects around which there are words or fences count, too; where several have a `score` they must agree, so that one
    which an instruction holds and the judge quotes cannot pass for its ratings.

    Args:
        reply: the judge's words.
        low: lowest rating.
        high: highest rating.
        num: ratings that were asked for.

    Raises:
        ValueError: if there is no such object, or several that differ, or its ratings are not as asked for.

    >>> parse_scores('```json\n{"score": [7, 8.5], "reasoning": "a faint seam"}\n```', 0, 10)
    (7.0, 8.5)
    >>> parse_scores('{"score": [7]}', 0, 10)
    Traceback (most recent call last):
        ...
    ValueError: `score` is [7] in place of a list of 2 numbers from 0 to 10
    """
    found = {_check_ratings(scored["score"], low, high, num) for scored in _objects(reply) if "score" in scored}
    if len(found) > 1:
        raise ValueError(f"several scores are stated ({', '.join(str(list(ratings)) for ratings in sorted(found))})")
    if not found:
        raise ValueError("there is no JSON object with a `score`")
    return found.pop()


def _check_ratings(score: Any, low: float, high: float, num: int) -> tuple[float, ...]:
    good = (
        isinstance(score, list)
        and len(score) == num
        # bool is an int, and NaN, which Python's JSON takes, lies in no range
        and all(isinstance(one, int | float) and not isinstance(one, bool) and low <= one <= high for one in score)
    )
    if not good:
        stated = str(score)[:40]
        raise ValueError(f"`score` is {stated} in place of a list of {num} numbers from {low:g} to {high:g}")
    return tuple(float(rating) for rating in score)


def _objects(text: str) -> list[dict[str, Any]]:
    """Finds the JSON objects in a text that are not parts of others."""
    decoder = json.JSONDecoder()
    objects: list[dict[str, Any]] = []
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):  # the latter by thousands of brackets
            end = start + 1
        else:
            objects.append(value)
        start = text.find("{", end)
    return objects


SEMANTIC = JudgeTemplate("viescore_semantic_v1", "viescore", _SEMANTIC, 0.0, 10.0, source=True, read=parse_scores)
QUALITY = JudgeTemplate("viescore_quality_v1", "viescore", _QUALITY, 0.0, 10.0, read=parse_scores)


class VIEScore(Judge):
    """Rates an edit by its success and by its image quality. native = table = sqrt(sc * pq) in 0..10, rl = native / 10.

    sc (semantic consistency) is the lower of the two ratings for success and restraint, pq (perceptual quality)
    the lower of those for naturalness and freedom from artefacts; the judge gives the latter without knowing source or
    instruction. An image with either pair missing is invalid.

    GEdit-Bench publishes GPT-4.1's and Qwen2.5-VL-72B's ratings. Another judge and another wording are *different
    metrics*, and the wording here is our own: `semantic_wording` and `quality_wording` take the published texts.

    Args:
        base_url: address of the API, up to and with its version: `http://127.0.0.1:8000/v1`.
        model: the name that the endpoint knows the judge by.
        semantic_wording: text file in place of the first question, with `{prompt}` where the instruction goes.
        quality_wording: text file in place of the second question, which knows no instruction.
        image_size: images are shown with the area of a square of so many pixels a side, in their own shape, as
            GEdit-Bench does; null shows them as they are.
        **kwargs: see `rewards.judges.base.Judge`.
    """

    name = "viescore"
    needs = ("image",)
    native_range = (0.0, 10.0)

    def __init__(
        self,
        base_url: str,
        model: str,
        semantic_wording: str | None = None,
        quality_wording: str | None = None,
        image_size: int | None = 512,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_url, model, image_size=image_size, **kwargs)
        self.semantic, self.quality = SEMANTIC, QUALITY
        if semantic_wording is not None:
            self.semantic = reworded(SEMANTIC, read_wording(semantic_wording, "VIEScore's semantic_wording"))
        if quality_wording is not None:
            text = read_wording(quality_wording, "VIEScore's quality_wording", holds=())
            self.quality = reworded(QUALITY, text)

    @property
    def version(self) -> str:
        """Version of the scores: the judge, both wordings and the image size."""
        size = f"{self.image_size}x{self.image_size} px in area" if self.image_size else "full size"
        return f"{self.semantic.id} and {self.quality.id} judged by {self.model} at {size}"

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Scores B images; `detail` has `sc`, `pq`, the ratings that they come from and the judge's words."""
        rows = [row for row, sample in enumerate(batch.samples) if sample.image is not None]
        questions: list[Question] = []
        for row in rows:
            sample, image = batch.samples[row], batch.images[row]
            assert sample.image is not None
            questions.append(Question(self.semantic, sample.prompt, [sample.image, image]))
            questions.append(Question(self.quality, "", [image]))
        answers = self.ask(questions)
        scores = [self._no_source()] * len(batch)
        for number, row in enumerate(rows):
            scores[row] = combine(answers[2 * number], answers[2 * number + 1])
        return scores

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.image_size is None:
            return size
        width, height = size
        scale = self.image_size / math.sqrt(width * height)
        return max(1, int(width * scale)), max(1, int(height * scale))


def combine(semantic: Answer, quality: Answer) -> Score:
    """Combines the answers to the two questions about one image into its score."""
    for answer, question in ((semantic, "semantic consistency"), (quality, "perceptual quality")):
        if not answer.ratings:
            return Score.invalid(f"{question}: {answer.reason}")
    (success, restraint), (naturalness, clean) = semantic.ratings, quality.ratings
    sc, pq = min(success, restraint), min(naturalness, clean)
    overall = math.sqrt(sc * pq)
    detail = {
        "sc": sc,
        "pq": pq,
        "success": success,
        "restraint": restraint,
        "naturalness": naturalness,
        "artifacts": clean,
        "semantic": semantic.detail,
        "quality": quality.detail,
    }
    return Score(native=overall, table=overall, rl=overall / QUALITY.high, detail=detail)

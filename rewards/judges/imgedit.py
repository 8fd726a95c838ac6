"""ImgEdit-Bench's judge (arXiv 2505.20275): three ratings per edit, with a question for each kind of edit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from datamodules.jsonl import read_text
from datamodules.parsing import parse_json
from rewards.base import RewardBatch, Score
from rewards.judges.base import Answer, Judge, Question
from rewards.judges.templates import JudgeTemplate, reworded

_PLACEHOLDER = "<edit_prompt>"
"""Stands for the instruction in the benchmark's own prompt files."""

# what may follow the colon: "4", "4/5", "4 out of 5"
_RATING = re.compile(r"(?P<rating>[-+]?\d\S*?)(?:\s*(?:/|out of)\s*(?P<scale>\d+))?")

_QUALITY = "Soundness: light, shadow, perspective, proportions and detail are right, and nothing else was altered"
_SEAMS = "Naturalness: the edited parts have no seams, blur or traces, and belong to the picture"
_FRAME = """You are shown two images. The first is the source, the second is the result of this edit: {prompt}

Compare them and give the result three marks from 1 (failed) to 5 (flawless), whole numbers only:
{criteria}
A result that ignores the edit is no good one, so the second and the third mark are never above the first.

Answer with one sentence of reasons and then exactly these three lines, with a number after each colon:
{names}
"""
_CRITERIA = {
    "add": ("Addition: what was asked for is there, once, in the place and with the properties asked for", _SEAMS),
    "remove": ("Removal: what was to go is gone altogether, and nothing besides it", _SEAMS),
    "replace": ("Replacement: the old object is gone and the new one, as asked for, stands in its place", _SEAMS),
    "alter": ("Alteration: the attribute asked for has changed as asked, on the right object and no other", _SEAMS),
    "background": (
        "Background: the surroundings are those asked for, and the foreground is the one of the source",
        "Naturalness: the foreground's outline is clean, and its light fits the new surroundings",
    ),
    "style": (
        "Style: the whole picture is in the style asked for",
        "Content: objects, people, their places and the composition are those of the source",
    ),
    "action": (
        "Action: the pose, movement or expression is the one asked for",
        "Identity: the one who acts is recognisably the same, in face, body, clothes and surroundings",
    ),
    "extract": (
        "Extraction: what was asked for is shown alone and whole, on an empty background",
        "Identity: shape, colours and texture of what is shown are those of the source",
    ),
    "compose": ("Completeness: every one of the changes asked for is there, each on the right object", _SEAMS),
}


def parse_lines(reply: str, low: float, high: float, num: int = 3) -> tuple[float, ...]:
    r"""Returns the ratings of a reply's lines of the form `Name: rating`.

    Lines with further words are prose. One name may be rated twice if the ratings agree.

    Args:
        reply: the judge's words.
        low: lowest rating.
        high: highest rating; ratings are whole numbers.
        num: ratings that were asked for.

    Raises:
        ValueError: if there are more or fewer, or one is out of range, no whole number, or stated twice differently.

    >>> parse_lines("The sky is right, the roof is not.\nRemoval: 4\n**Naturalness:** 3\nSoundness: 3/5", 1, 5)
    (4.0, 3.0, 3.0)
    >>> parse_lines("Removal: 4\nNaturalness: 3.5\nSoundness: 3", 1, 5)
    Traceback (most recent call last):
        ...
    ValueError: Naturalness is 3.5 in place of a whole number from 1 to 5
    """
    ratings: dict[str, float] = {}
    for line in reply.splitlines():
        name, _, value = line.partition(":")
        name, value = name.strip(" \t*_#>-"), value.strip(" \t*_").rstrip(".")
        stated = _RATING.fullmatch(value)
        if stated is None or not any(letter.isalpha() for letter in name):
            continue
        rating, scale = stated["rating"], stated["scale"]
        if not re.fullmatch(r"[0-9]{1,3}", rating) or not low <= int(rating) <= high or float(scale or high) != high:
            raise ValueError(f"{name[:40]} is {value[:20]} in place of a whole number from {low:g} to {high:g}")
        if ratings.setdefault(name.lower(), float(rating)) != float(rating):
            raise ValueError(f"{name[:40]} is rated twice, {ratings[name.lower()]:g} and {rating}")
    if len(ratings) != num:
        raise ValueError(f"{len(ratings)} lines of a name and a rating, {num} were asked for")
    return tuple(ratings.values())


def _template(kind: str, criteria: tuple[str, ...]) -> JudgeTemplate:
    lines = [f"- {line}." for line in criteria]
    names = [f"{line.partition(':')[0]}: " for line in criteria]
    text = _FRAME.replace("{criteria}", "\n".join(lines)).replace("{names}", "\n".join(names))
    return JudgeTemplate(f"imgedit_{kind}_v1", "imgedit", text, 1.0, 5.0, source=True, read=parse_lines)


TEMPLATES = MappingProxyType({kind: _template(kind, (*two, _QUALITY)) for kind, two in _CRITERIA.items()})
"""The default questions: kind of edit (`edit_type`) -> template."""


class ImgEditJudge(Judge):
    """Mean of a judge's three ratings of an edit, 1 to 5. native = table = the mean, rl = mean / 5.

    The kind of the edit, `edit_type` in the sample's metadata, decides about the question. ImgEdit-Bench publishes
    GPT-4o's ratings. Another judge and another wording are *different metrics*, and the wording here is our own:
    `wording` takes the benchmark's own file.

    Args:
        base_url: address of the API, up to and with its version: `http://127.0.0.1:8000/v1`.
        model: the name that the endpoint knows the judge by.
        wording: JSON file of the questions by `edit_type`, each with `<edit_prompt>` where the instruction goes.
        image_size: images are resized to this many pixels square; null shows them as they are, as ImgEdit-Bench does.
        **kwargs: see `rewards.judges.base.Judge`.
    """

    name = "imgedit"
    needs = ("image", "edit_type")
    native_range = (1.0, 5.0)

    def __init__(
        self, base_url: str, model: str, wording: str | None = None, image_size: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(base_url, model, image_size=image_size, **kwargs)
        self.templates: Mapping[str, JudgeTemplate] = TEMPLATES if wording is None else _read_templates(wording)
        self._wording = "imgedit_v1" if wording is None else reworded(*_join(self.templates)).id

    @property
    def version(self) -> str:
        """Version of the scores: the judge, the wording and the image size."""
        size = f"{self.image_size} px" if self.image_size else "full size"
        return f"{self._wording} judged by {self.model} at {size}"

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Scores B images; `detail` has the three `ratings` and the judge's words."""
        questions: dict[int, Question] = {}
        for row, (sample, image) in enumerate(zip(batch.samples, batch.images, strict=True)):
            kind = sample.metadata.get("edit_type")
            if not isinstance(kind, str) or kind not in self.templates:
                raise ValueError(
                    f"the prompt {sample.id!r} has the metadata edit_type={kind!r}: ImgEditJudge has questions for "
                    f"{', '.join(sorted(self.templates))}; give others in its `wording`."
                )
            if sample.image is not None:
                questions[row] = Question(self.templates[kind], sample.prompt, [sample.image, image])
        return self._score_each(len(batch), questions, self._to_score)

    def _to_score(self, answer: Answer) -> Score:
        mean = sum(answer.ratings) / len(answer.ratings)
        detail = {"ratings": list(answer.ratings), **answer.detail}
        return Score(native=mean, table=mean, rl=mean / self.native_range[1], detail=detail)


def _join(templates: Mapping[str, JudgeTemplate]) -> tuple[JudgeTemplate, str]:
    """Joins all questions into one template and one text, from which `version` gets an id."""
    texts = json.dumps({kind: template.text for kind, template in sorted(templates.items())})
    return JudgeTemplate("imgedit_v1", "imgedit", "", 1.0, 5.0), texts


def _read_templates(path: str) -> dict[str, JudgeTemplate]:
    """Reads a user's questions from a JSON file: kind of edit -> template."""
    where = "ImgEditJudge's wording"
    texts = parse_json(read_text(path, where), f"{where} names {path}")
    if not isinstance(texts, dict) or not texts:
        raise ValueError(f'{where}: {path} must be a JSON object such as {{"add": "... {_PLACEHOLDER} ..."}}.')
    templates = {}
    for kind, text in texts.items():
        if not isinstance(text, str) or _PLACEHOLDER not in text:
            raise ValueError(
                f"{where}: {path} must have {_PLACEHOLDER} in the text of {kind!r}, where the instruction goes."
            )
        base = JudgeTemplate(f"imgedit_{kind}_v1", "imgedit", "", 1.0, 5.0, source=True, read=parse_lines)
        templates[kind] = reworded(base, text.replace(_PLACEHOLDER, "{prompt}"))
    return templates

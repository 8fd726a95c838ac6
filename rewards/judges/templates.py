"""Questions to judges (`JudgeTemplate`) and parsers of their replies.

All wording here is our own, and scores depend on every word of it. An id is never reused for another
text: a change of wording is a new id, since scores of the two are not comparable.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from datamodules.jsonl import read_text

# asterisks are Markdown's; "4/5" and "4 out of 5" are read with their scale
_STATEMENT = re.compile(
    r"Final Score:[\s*]*(?P<rating>[-+]?\d[^\s/]*)(?:\s*\(?(?:/|out of)\s*(?P<scale>\d+(?:\.\d+)?))?"
)
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)[*.,;:!)\]'\"]*")


def parse_rating(reply: str, low: float, high: float) -> float:
    """Returns the number that a reply states after `Final Score:`.

    Args:
        reply: the judge's words.
        low: lowest rating.
        high: highest rating.

    Raises:
        ValueError: if there is no such number, or several that differ, or one out of range.

    >>> parse_rating("Sharp and true to the caption. Final Score: 4.5", 1, 5)
    4.5
    >>> parse_rating("Final Score: 4/5.", 1, 5)
    4.0
    >>> parse_rating("Final Score: 15", 1, 5)
    Traceback (most recent call last):
        ...
    ValueError: the stated score 15 is not a number from 1 to 5
    """
    ratings = set()
    for statement in _STATEMENT.finditer(reply):
        number = _NUMBER.fullmatch(statement["rating"])
        if number is None or not low <= float(number[1]) <= high or float(statement["scale"] or high) != high:
            stated = statement[0].partition(":")[2].strip("* \n")[:20]
            raise ValueError(f"the stated score {stated} is not a number from {low:g} to {high:g}")
        ratings.add(float(number[1]))
    if len(ratings) > 1:
        raise ValueError(f"several scores are stated ({', '.join(f'{rating:g}' for rating in sorted(ratings))})")
    if not ratings:
        raise ValueError("no number follows 'Final Score:'")
    return ratings.pop()


def parse_one_rating(reply: str, low: float, high: float) -> tuple[float, ...]:
    """Returns `parse_rating`'s number as the one-tuple that `JudgeTemplate.read` gives."""
    return (parse_rating(reply, low, high),)


@dataclass(frozen=True)
class JudgeTemplate:
    """One question to a vision-language model whose answer states one or more numbers.

    Args:
        id: names the wording in versions and caches.
        reward: default name of the reward.
        text: the question, with `{prompt}` where the caption or the instruction goes.
        low: lowest score it asks for.
        high: highest score it asks for; the rl value is native / high.
        source: True if the judge is shown the source image before the edited one.
        read: (reply, low, high) -> the ratings that a reply states; raises a ValueError that says why there are none.
    """

    id: str
    reward: str
    text: str
    low: float
    high: float
    source: bool = False
    read: Callable[[str, float, float], tuple[float, ...]] = field(default=parse_one_rating)


def reworded(template: JudgeTemplate, text: str) -> JudgeTemplate:
    """Replaces a template's text; its id then ends in the new text's digest."""
    return replace(template, id=f"{template.id}+{hashlib.sha256(text.encode()).hexdigest()[:8]}", text=text)


_UNIFIED_REWARD = """You are shown one generated image together with the text caption it was generated from. \
Judge it by two criteria.

1. Caption alignment: do the objects, their number, attributes, positions, actions and any written text in the image \
agree with the caption? Name what is missing, wrong or added.
2. Overall quality: is the image sharp, coherent, free of artefacts and deformed bodies or things, and pleasing to \
look at?

Explain your judgement in a few sentences that weigh both criteria, then assign a score from 1 to 5 after \
'Final Score:', where 1 is poor in both respects and 5 is excellent in both. Half and other decimal marks are allowed.

Text Caption: [{prompt}]
"""

_EDIT = """You are shown two images. The first is the source, the second is the result of editing it by the \
instruction below.

1. Instruction: is the edit that was asked for fully visible in the second image, and done in the right place?
2. Preservation: is everything that the instruction does not mention (identity, background, layout, style) unchanged?
3. Quality: is the second image natural, without seams, artefacts or deformed parts?

Compare the two images in a few sentences by these three criteria, then assign a score from 1 to 5 after \
'Final Score:'. An image in which the edit was not made scores 1, however good it looks; 5 is a flawless edit. \
Decimal marks are allowed.

Editing Instruction: [{prompt}]
"""

_QUALITY = """You are shown one image made by an image generator for the text below. Rate how good a picture it is: \
composition, light and colour, detail, realism or consistency of style, and freedom from artefacts. Use the text only \
to know what the picture was meant to be.

Describe strengths and faults in a few sentences, then assign a score from 0 to 10 after 'Final Score:', where 0 is \
unusable, 5 is mediocre and 10 is the work of an expert. Decimal marks are allowed.

Text: [{prompt}]
"""

TEMPLATES = MappingProxyType(
    {
        template.id: template
        for template in (
            JudgeTemplate("unified_reward_v1", "unified_reward", _UNIFIED_REWARD, 1.0, 5.0),
            JudgeTemplate("edit_v1", "edit_judge", _EDIT, 1.0, 5.0, source=True),
            JudgeTemplate("quality_v1", "quality_judge", _QUALITY, 0.0, 10.0),
        )
    }
)
"""`VLMJudge`'s questions: template id -> template."""

REWARD_TOKEN = "<|Reward|>"
"""The token that EditReward's authors added: its hidden state is what the heads score."""

_ASK = f"\nPlease provide the overall ratings of this image: {REWARD_TOKEN}\n\nEND\n"

EDIT_RUBRICS = (
    """Two images follow one editing instruction: the first image is the source, the second image is the edited result.
Rate how well the edited image carries out the instruction, from 1 to 4.

What to look at:
- the change that was asked for is there, complete, and of the right kind;
- it is made to the right object, in the right place and number;
- nothing that the instruction leaves alone has been altered.

Scale:
1 - the instruction was ignored, or the change is wrong.
2 - part of the change is there, or much else was altered with it.
3 - the change is there, with small faults or small unasked changes.
4 - the change is exactly what was asked for, and only that.

Editing instruction: {prompt}
"""
    + _ASK,
    """Two images follow one editing instruction: the first image is the source, the second image is the edited result.
Rate the visual quality of the edited image, from 1 to 4. Whether the right thing was changed does not matter here.

What to look at:
- light, shadow, perspective and texture of the edited parts fit their surroundings;
- faces, hands, objects and writing are well formed;
- no seams, smears, noise or other artefacts; the picture is pleasing as a whole.

Scale:
1 - heavy artefacts, plainly broken.
2 - visible artefacts or parts that do not fit.
3 - good, with faults seen only on a close look.
4 - clean and natural, like an untouched picture.

Editing instruction: {prompt}
"""
    + _ASK,
)
"""EditReward's two questions, in the order of its heads: instruction following, visual quality."""


def read_wording(path: str, where: str, *also: str, holds: tuple[str, ...] = ("{prompt}",)) -> str:
    """Reads a question from a text file, exactly as it stands.

    Args:
        path: UTF-8 text file.
        where: the argument that an error names.
        *also: further text that the file must hold exactly once.
        holds: text that the file must hold exactly once.

    Raises:
        ValueError: if the file cannot be read, or lacks or repeats one of these texts.
    """
    text = read_text(path, where)
    for part in (*holds, *also):
        if text.count(part) != 1:
            raise ValueError(f"{where}: {path} holds {part} {text.count(part)} times, it must hold it exactly once.")
    return text

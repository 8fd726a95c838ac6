"""GenEval's rules in pure Python: `judge` takes detections and metadata and returns a verdict.

`correct` follows the official benchmark (github.com/djghosh13/geneval, arXiv 2310.11513), `strict` and `soft` the
reward that Flow-GRPO trains on (arXiv 2505.05470).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Box = tuple[float, float, float, float]
Compat = Literal["flow_grpo"]

MIN_SCORE = 0.3
MIN_SCORE_COUNTING = 0.9  # a spurious box would change the count, so counting trusts only sure ones
MAX_OBJECTS = 16
POSITION_SLACK = 0.1  # offsets below this share of the summed box sizes do not count as a direction


@dataclass(frozen=True)
class Detection:
    """One object found in an image.

    Args:
        label: class name as in the metadata.
        box: x1, y1, x2, y2 in pixels, y downward, the far edge exclusive.
        score: confidence in [0, 1].
        color: colour name, or None when the colour was not looked at.
    """

    label: str
    box: Box
    score: float = 1.0
    color: str | None = None


@dataclass(frozen=True)
class Verdict:
    """GenEval's verdict on one image.

    Args:
        correct: the official benchmark's answer; more objects than asked pass unless `exclude` forbids them.
        strict: every item is there in exactly the number, colour and place asked; `exclude` is ignored.
        soft: mean of the partial credits, in [0, 1] (lower than 0 is possible with `compat="flow_grpo"`).
        reason: the first thing that is wrong, as a short sentence; empty when nothing is.
        excluded_found: the image holds what the metadata's `exclude` forbids.
    """

    correct: bool
    strict: bool
    soft: float
    reason: str = ""
    excluded_found: bool = False


def judge(detections: Sequence[Detection], metadata: Mapping[str, Any], *, compat: Compat | None = None) -> Verdict:
    """Judges one image by its detections.

    Args:
        detections: all objects found, in any order.
        metadata: a GenEval record (`tag`, `include`, optional `exclude`) that passes `validate_metadata`.
        compat: None for the repaired soft score; `"flow_grpo"` for the published one, whose credits may be negative and
            which gives a wrong position a full credit beside its 0 (0.75 in place of 0.667). Compare with Flow-GRPO and
            UniRL runs only under `"flow_grpo"`. `correct` and `strict` are the same in both.

    Example:
        >>> dog = Detection("dog", (0, 0, 10, 10))
        >>> judge([dog], {"tag": "counting", "include": [{"class": "dog", "count": 2}]})
        Verdict(correct=False, strict=False, soft=0.5, reason='1 of 2 dog found', excluded_found=False)
    """
    found = select(detections, metadata["tag"])
    missing = _official_problem(found, metadata["include"])
    excluded = _excluded_problem(found, metadata.get("exclude", ()))
    soft, inexact = _soft_score(found, metadata["include"], compat)
    return Verdict(
        correct=not missing and not excluded,
        strict=not inexact,
        soft=soft,
        reason=missing or excluded or inexact,
        excluded_found=bool(excluded),
    )


def select(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """Sorts the detections into classes, best first; drops unsure ones and all after the 16th of a class."""
    threshold = MIN_SCORE_COUNTING if tag == "counting" else MIN_SCORE
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: d.score, reverse=True):
        objects = found.setdefault(detection.label, [])
        if detection.score > threshold and len(objects) < MAX_OBJECTS:
            objects.append(detection)
    return found


def relations(a: Detection, b: Detection) -> frozenset[str]:
    """Returns the directions in which `a` lies as seen from `b`: none, one or two of GenEval's four.

    The offset of the centres, less a slack of 10 % of the summed sizes, is divided by the length of the *whole* offset
    (the official code does so), and a direction holds above 0.5.

    Example:
        >>> relations(Detection("tie", (0, 0, 10, 10)), Detection("sink", (0, 90, 10, 100)))
        frozenset({'above'})
    """
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.box, b.box
    offset_x, offset_y = (ax1 + ax2 - bx1 - bx2) / 2, (ay1 + ay2 - by1 - by2) / 2
    shift_x = _shrink(offset_x, POSITION_SLACK * (ax2 - ax1 + bx2 - bx1))
    shift_y = _shrink(offset_y, POSITION_SLACK * (ay2 - ay1 + by2 - by1))
    if max(abs(shift_x), abs(shift_y)) < 1e-3:
        return frozenset()
    distance = math.hypot(offset_x, offset_y)
    dx, dy = shift_x / distance, shift_y / distance
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return frozenset(relation for relation, true in holds.items() if true)


def _official_problem(found: Mapping[str, list[Detection]], include: Sequence[Mapping[str, Any]]) -> str:
    """Describes the first item that the official benchmark misses, looking at its best `count` objects; else empty."""
    matched: list[list[Detection] | None] = []
    first = ""
    for item in include:
        objects = found.get(item["class"], [])[: item["count"]]
        problem = f"{len(objects)} of {item['count']} {item['class']} found" if len(objects) < item["count"] else ""
        problem = problem or _color_problem(item, objects) or _position_problem(item, objects, matched)
        matched.append(None if problem else objects)
        first = first or problem
    return first


def _excluded_problem(found: Mapping[str, list[Detection]], exclude: Sequence[Mapping[str, Any]]) -> str:
    """Describes the first class with as many objects as `exclude` forbids; else empty."""
    for item in exclude:
        num = len(found.get(item["class"], []))
        if num >= item["count"]:
            return f"{num} {item['class']} found, fewer than {item['count']} allowed"
    return ""


def _soft_score(
    found: Mapping[str, list[Detection]], include: Sequence[Mapping[str, Any]], compat: Compat | None
) -> tuple[float, str]:
    """Returns the soft score, and a description of the first item that is not exactly as asked (else empty)."""
    credits: list[float] = []
    matched: list[list[Detection] | None] = []
    first = ""
    for item in include:
        count, objects = item["count"], found.get(item["class"], [])
        problem = f"{len(objects)} {item['class']} found instead of {count}" if len(objects) != count else ""
        credits.append(1 - abs(count - len(objects)) / count)
        if problem and ("color" in item or "position" in item):
            credits.append(0.0)
        if not problem and "color" in item:
            problem = _color_problem(item, objects)
            credits.append(_num_of_color(item, objects) / count)
        if not problem and "position" in item:
            problem = _position_problem(item, objects, matched)
            credits.append(0.0 if problem else 1.0)
            if compat == "flow_grpo" and problem and matched[item["position"][1]] is not None:
                credits.append(1.0)  # the published code falls through to the branch of a right position
        matched.append(None if problem else objects)
        first = first or problem
    if compat is None:
        credits = [max(credit, 0.0) for credit in credits]
    return sum(credits) / len(credits), first


def _color_problem(item: Mapping[str, Any], objects: Sequence[Detection]) -> str:
    num = _num_of_color(item, objects)
    return f"{num} of {item['count']} {item['class']} {item['color']}" if num < item["count"] else ""


def _num_of_color(item: Mapping[str, Any], objects: Sequence[Detection]) -> int:
    """Counts the objects of the colour asked for; all of them if none is."""
    return sum("color" not in item or detection.color == item["color"] for detection in objects)


def _position_problem(
    item: Mapping[str, Any], objects: Sequence[Detection], matched: Sequence[list[Detection] | None]
) -> str:
    if "position" not in item:
        return ""
    relation, index = item["position"]
    targets = matched[index]
    if targets is None:
        return f"nothing for {item['class']} to be {relation}"
    if all(relation in relations(a, b) for a in objects for b in targets):
        return ""
    return f"{item['class']} not {relation} {targets[0].label}"


def _shrink(offset: float, slack: float) -> float:
    return math.copysign(max(abs(offset) - slack, 0.0), offset)

"""GenEval's vocabulary (arXiv 2310.11513): tags, classes, colours, relations, and the check of a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from datamodules.parsing import quoted

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Relation = Literal["left of", "right of", "above", "below"]

TAGS: tuple[str, ...] = get_args(Tag)
RELATIONS: tuple[str, ...] = get_args(Relation)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# COCO 2017's order. Checkpoints name some classes otherwise (mouse, remote, motorbike), so an index is all they tell.
CLASSES: tuple[str, ...] = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)


def validate_metadata(metadata: Mapping[str, Any]) -> None:
    """Checks a GenEval record.

    Args:
        metadata: `{"tag", "include": [{"class", "count", "color"?, "position"?: [relation, index]}], "exclude"?}`.

    Raises:
        ValueError: with one sentence that names the key and the remedy.
    """
    tag = metadata.get("tag")
    if tag not in TAGS:
        raise ValueError(f"`tag` is {quoted(tag)}, use one of {', '.join(TAGS)}.")
    for key in ("include", "exclude"):
        items = metadata.get(key, [])
        if not isinstance(items, list | tuple) or (key == "include" and not items):
            raise ValueError(f'`{key}` must be a list such as [{{"class": "dog", "count": 1}}], got {quoted(items)}.')
        for index, item in enumerate(items):
            _validate_item(item, index, f"`{key}[{index}]`")


def _validate_item(item: object, index: int, where: str) -> None:
    """Checks one entry of `include` or `exclude`; `index` bounds the entries that a position may point at."""
    if not isinstance(item, dict) or not isinstance(item.get("class"), str) or not item["class"]:
        raise ValueError(f"{where} needs a `class` that names an object, got {quoted(item)}.")
    count = item.get("count")
    if type(count) is not int or count < 1:  # not isinstance: True is an int
        raise ValueError(f"{where} has count {quoted(count)}, use a whole number of at least 1.")
    if not isinstance(item.get("color", ""), str):
        raise ValueError(f"{where} has color {quoted(item['color'])}, use a colour's name or leave the key out.")
    if "position" not in item:
        return
    position = item["position"]
    if not isinstance(position, list | tuple) or len(position) != 2:
        raise ValueError(f'{where} has position {quoted(position)}, use [relation, index] such as ["above", 0].')
    relation, target = position
    if relation not in RELATIONS:
        raise ValueError(f"{where} has the relation {quoted(relation)}, use one of {', '.join(RELATIONS)}.")
    if type(target) is not int or not 0 <= target < index:
        raise ValueError(
            f"{where} has a position that points at entry {quoted(target)}, use the index of an earlier entry."
        )

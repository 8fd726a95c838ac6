"""English words for the content of GenEval prompts: synonyms of the classes, plurals, numbers, relations."""

from __future__ import annotations

from functools import cache

from datamodules.geneval_names import CLASSES as CLASSES
from datamodules.geneval_names import COLORS as COLORS

SAME: dict[str, tuple[str, ...]] = {
    "airplane": ("plane", "aeroplane"),
    "backpack": ("rucksack",),
    "bicycle": ("bike",),
    "car": ("automobile",),
    "cell phone": ("mobile phone", "cellphone"),
    "couch": ("sofa",),
    "donut": ("doughnut",),
    "hair drier": ("hair dryer",),
    "laptop": ("laptop computer",),
    "microwave": ("microwave oven",),
    "motorcycle": ("motorbike",),
    "refrigerator": ("fridge",),
    "tennis racket": ("tennis racquet",),
    "tv": ("television", "tv set"),
    "tv remote": ("television remote", "tv remote control"),
}
"""Names that mean a class and nothing else, so that a prompt may be reworded with them."""

LOOSE: dict[str, tuple[str, ...]] = {
    "airplane": ("aircraft", "airliner"),
    "backpack": ("knapsack",),
    "baseball glove": ("baseball mitt",),
    "cell phone": ("phone", "smartphone", "mobile", "telephone"),
    "computer keyboard": ("keyboard",),
    "computer mouse": ("mouse",),
    "couch": ("settee",),
    "cup": ("mug",),
    "dining table": ("table", "dinner table"),
    "fire hydrant": ("hydrant",),
    "frisbee": ("flying disc", "flying disk"),
    "hair drier": ("hairdryer", "hairdrier", "blow dryer"),
    "handbag": ("purse", "hand bag"),
    "hot dog": ("hotdog",),
    "laptop": ("notebook computer",),
    "person": ("human", "man", "woman", "human being"),
    "potted plant": ("plant", "pot plant", "houseplant"),
    "skis": ("ski",),
    "sports ball": ("ball",),
    "suitcase": ("luggage",),
    "teddy bear": ("teddy", "stuffed bear"),
    "tennis racket": ("racket", "racquet"),
    "tie": ("necktie",),
    "traffic light": ("traffic signal", "stoplight"),
    "tv": ("television set",),
    "tv remote": ("remote", "remote control", "television remote control"),
    "umbrella": ("parasol",),
    "wine glass": ("wineglass",),
}
"""Names that may mean a class: enough to find it again in a wording, too little to put in its place."""

NUMBERS: dict[str, int] = {
    word: number
    for number, word in enumerate(
        ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"), start=1
    )
} | {"pair": 2, "couple": 2, "duo": 2, "trio": 3, "quartet": 4, "quintet": 5, "dozen": 12}

AXES: tuple[frozenset[str], ...] = (
    frozenset({"left", "right", "leftmost", "rightmost"}),
    frozenset({"above", "over", "atop", "top", "below", "under", "beneath", "underneath", "bottom"}),
)
"""Words for the relations across and for those up and down; "A left of B" may be worded as "B right of A"."""

SPELLINGS: dict[str, tuple[str, ...]] = {"gray": ("grey",), "grey": ("gray",)}

_PLURALS = {"person": "people", "man": "men", "woman": "women", "mouse": "mice", "knife": "knives", "sheep": "sheep"}
_PLURALS |= {"skis": "skis", "scissors": "scissors", "luggage": "luggage", "aircraft": "aircraft"}
_VOWELS = "aeiou"


@cache
def plural(noun: str) -> str:
    """Returns the plural of a noun, which its last word decides.

    >>> [plural(noun) for noun in ("bus", "hot dog", "computer mouse", "toothbrush", "teddy", "toy")]
    ['buses', 'hot dogs', 'computer mice', 'toothbrushes', 'teddies', 'toys']
    """
    start, _, last = noun.rpartition(" ")
    if last in _PLURALS:
        end = _PLURALS[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        end = last + "es"
    elif last.endswith("y") and last[-2:-1] not in _VOWELS:
        end = last[:-1] + "ies"
    else:
        end = last + "s"
    return f"{start} {end}".strip()


@cache
def plurals(noun: str) -> frozenset[str]:
    """Returns the plural and what GenEval's own script makes of the noun ("two sheeps", "three scissorses")."""
    return frozenset({plural(noun), noun + "es" if noun.endswith("s") else noun + "s"})


def article_for(word: str) -> str:
    """Returns `a` or `an` by the first letter, which is right for the words of this file."""
    return "an" if word[0].lower() in _VOWELS else "a"


COMMON: dict[str, tuple[str, ...]] = {
    "autumn": ("fall",),
    "beautiful": ("lovely",),
    "big": ("large",),
    "dawn": ("daybreak",),
    "dusk": ("twilight",),
    "enormous": ("huge",),
    "forest": ("woods",),
    "huge": ("enormous",),
    "image": ("picture",),
    "large": ("big",),
    "little": ("small",),
    "movie": ("film",),
    "ocean": ("sea",),
    "photo": ("photograph", "picture"),
    "photograph": ("photo", "picture"),
    "picture": ("image",),
    "quiet": ("silent",),
    "road": ("street",),
    "shiny": ("glossy",),
    "shop": ("store",),
    "small": ("little",),
    "snapshot": ("photo",),
    "store": ("shop",),
    "sunset": ("sundown",),
    "sunrise": ("sunup",),
    "tiny": ("minuscule",),
    "whole": ("entire",),
}
"""Common word -> words that may replace it in any prompt."""

TURNS: dict[str, tuple[str, str]] = {
    "to the left of": ("to the right of", "left of"),
    "to the right of": ("to the left of", "right of"),
    "on the left side of": ("on the right side of", "to the left of"),
    "on the right side of": ("on the left side of", "to the right of"),
    "left of": ("right of", "to the left of"),
    "right of": ("left of", "to the right of"),
    "above": ("below", "over"),
    "below": ("above", "under"),
    "over": ("under", "above"),
    "under": ("over", "below"),
    "beneath": ("above", "below"),
}
"""Relation -> its opposite, and another word for it."""

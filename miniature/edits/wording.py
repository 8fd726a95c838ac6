"""Edits and the instructions that ask for them, in five styles.

Ambiguous styles say which object is meant by its side ("remove the left one"), so that only the source image tells what
it is; explicit ones name it ("remove the red circle at the upper left").
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from miniature.scenes.wording import LEXICONS
from miniature.scenes.world import COLORS, FEW_COLORS, FEW_SHAPES, QUADRANTS, SHAPES, Item, Scene, quadrant_of

CATEGORIES = ("swap", "move", "addition", "attribute_modification", "env", "removal")
SIDES = ("left", "right", "upper", "lower")
TINTS = ("white", "sky", "peach", "mint")
"""Names of `miniature.scenes.world.GROUNDS`, in their order."""

EditStyle = Literal["canonical", "explicit", "gallery", "terse", "unseen"]
EDIT_STYLES: tuple[EditStyle, ...] = ("canonical", "explicit", "gallery", "terse", "unseen")
AMBIGUOUS: tuple[EditStyle, ...] = ("canonical", "unseen")
"""Styles that do not say which object is meant; the others name it."""


@dataclass(frozen=True)
class Edit:
    """Change that is to be made to a scene.

    Attributes:
        category: one of `CATEGORIES`.
        index: index, in the scene's items, of the object that is meant: the one to change, to copy, or to match.
        side: the one of `SIDES` on which it is the only outermost object; ambiguous wordings name it by this.
        value: the new shape (swap), colour (attribute_modification), quadrant (move) or ground (env); else None.
    """

    category: str
    index: int
    side: str
    value: str | None = None


@dataclass(frozen=True)
class EditLexicon:
    """Words of one vocabulary that `miniature.scenes.wording.LEXICONS` lacks, in the order of the constants above.

    Templates take {it}, the object meant, and {value}; the ground's is left out where the wording is ambiguous.
    """

    templates: tuple[str, ...]
    sides: tuple[str, ...]
    quadrants: tuple[str, ...]
    tints: tuple[str, ...]


EDIT_LEXICONS: dict[str, EditLexicon] = {
    "canonical": EditLexicon(
        (
            "turn {it} into a {value}",
            "move {it} to the {value}",
            "add another one like {it}",
            "make {it} {value}",
            "make the background {value} like {it}",
            "remove {it}",
        ),
        SIDES,
        QUADRANTS,
        TINTS,
    ),
    "gallery": EditLexicon(
        (
            "transform {it} to one {value}",
            "shift {it} toward the {value}",
            "include one more of {it}",
            "paint {it} {value}",
            "tint the backdrop {value} after {it}",
            "erase {it}",
        ),
        ("leftmost", "rightmost", "topmost", "bottommost"),
        ("top left", "top right", "bottom left", "bottom right"),
        ("ivory", "ice", "apricot", "sage"),
    ),
    "terse": EditLexicon(
        (
            "swap {it} for 1 {value}",
            "put {it} {value}",
            "copy {it}",
            "color {it} {value}",
            "ground {value} by {it}",
            "delete {it}",
        ),
        ("west", "east", "north", "south"),
        ("northwest", "northeast", "southwest", "southeast"),
        ("snow", "frost", "coral", "jade"),
    ),
}
UNSEEN_TEMPLATES = (("take", "and"), ("see", "now"), ("here is", "please"))
"""Words of the "unseen" style before the object, and between the object and the change."""

_FILLER = ("take", "see", "now", "and", "here", "is", "please", "then", "just", ",")


def write_edit(edit: Edit, scene: Scene, style: EditStyle, rng: random.Random, *, mix: float = 0.0) -> str:
    """Words an edit of a scene in a style.

    Args:
        edit: the edit.
        scene: the source, in which explicit wordings look up the object.
        style: "canonical" (ambiguous) is the training prompts' own; "explicit", "gallery" and "terse" name the object
            by colour and shape (the first two by its quadrant, too), each in its own vocabulary; "unseen" (ambiguous)
            is for evaluation only: each word is gallery's or terse's, templates are its own.
        rng: picks words where vocabularies mix, and templates of "unseen".
        mix: chance that "gallery" and "terse" take a word from the other's vocabulary.
    """
    if style not in EDIT_STYLES:
        raise ValueError(f"unknown style {style!r}: use one of {', '.join(EDIT_STYLES)}")
    own = {"unseen": "gallery", "explicit": "canonical"}.get(style, style)
    share = 0.5 if style == "unseen" else mix

    def lexicon() -> str:
        if own in ("gallery", "terse") and rng.random() < share:
            return "terse" if own == "gallery" else "gallery"
        return own

    if style in AMBIGUOUS:
        it = _by_side(edit, lexicon)
        if style == "canonical":
            return _do(edit, it, lexicon, explicit=False)
        before, between = rng.choice(UNSEEN_TEMPLATES)
        return f"{before} {it} {between} {_do(edit, 'it', lexicon, explicit=False)}"
    return _do(edit, _by_name(scene.items[edit.index], lexicon, style != "terse"), lexicon, explicit=True)


def write_edit_loosely(edit: Edit, rng: random.Random) -> str:
    """Words an edit ambiguously, with any vocabulary, order and random filler: how strangers might put it.

    The refiner learns from these that filler means nothing. The "unseen" style's words occur, its templates do not.
    """

    def lexicon() -> str:
        return rng.choice(tuple(EDIT_LEXICONS))

    def filler() -> str:
        return "".join(f"{rng.choice(_FILLER)} " for _ in range(rng.randint(0, 3)))

    it = _by_side(edit, lexicon)
    if rng.random() < 0.5:
        return filler() + _do(edit, it, lexicon, explicit=False)
    before, between = filler(), filler()
    if (before.strip(), between.strip()) in UNSEEN_TEMPLATES:
        return write_edit_loosely(edit, rng)
    return f"{before}{it} {between}{_do(edit, 'it', lexicon, explicit=False)}"


def _by_side(edit: Edit, lexicon: Callable[[], str]) -> str:
    return f"the {EDIT_LEXICONS[lexicon()].sides[SIDES.index(edit.side)]} one"


def _by_name(item: Item, lexicon: Callable[[], str], where: bool) -> str:
    color = LEXICONS[lexicon()].colors[tuple(COLORS).index(item.color)]
    shape = LEXICONS[lexicon()].shapes[SHAPES.index(item.shape)]
    if not where:
        return f"the {color} {shape}"
    return f"the {color} {shape} at the {EDIT_LEXICONS[lexicon()].quadrants[QUADRANTS.index(quadrant_of(item.cell))]}"


def _do(edit: Edit, it: str, lexicon: Callable[[], str], *, explicit: bool) -> str:
    template = EDIT_LEXICONS[lexicon()].templates[CATEGORIES.index(edit.category)]
    words, value = lexicon(), ""
    if edit.category == "swap":
        value = LEXICONS[words].shapes[SHAPES.index(str(edit.value))]
    elif edit.category == "attribute_modification":
        value = LEXICONS[words].colors[tuple(COLORS).index(str(edit.value))]
    elif edit.category == "move":
        value = EDIT_LEXICONS[words].quadrants[QUADRANTS.index(str(edit.value))]
    elif edit.category == "env" and explicit:
        value = EDIT_LEXICONS[words].tints[TINTS.index(str(edit.value))]
    return " ".join(template.format(it=it, value=value).split())


def named_objects(text: str) -> list[tuple[str, str]]:
    """Returns the (shape, colour) pairs that a text names: a colour's word before a shape's, of any vocabulary."""
    shapes, colors = _meanings()
    words = text.split()
    pairs = zip(words, words[1:], strict=False)
    return [(shapes[b], colors[a]) for a, b in pairs if a in colors and b in shapes]


@cache
def _meanings() -> tuple[dict[str, str], dict[str, str]]:
    shapes = {word: shape for lex in LEXICONS.values() for word, shape in zip(lex.shapes, SHAPES, strict=True)}
    colors = {word: color for lex in LEXICONS.values() for word, color in zip(lex.colors, COLORS, strict=True)}
    return shapes, colors


def edit_vocabulary() -> list[str]:
    """Returns every word that instructions for edits can use, sorted."""
    phrases: list[str] = ["the one at it", *_FILLER]
    for name, lexicon in EDIT_LEXICONS.items():
        phrases += [template.format(it="it", value="") for template in lexicon.templates]
        phrases += [*lexicon.sides, *lexicon.quadrants, *lexicon.tints]
        phrases += [*LEXICONS[name].shapes[: len(FEW_SHAPES)], *LEXICONS[name].colors[: len(FEW_COLORS)]]
    return sorted({word for phrase in phrases for word in phrase.split()})

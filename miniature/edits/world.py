"""The miniature world of edits: a scene, an instruction that only the image makes clear, and what fulfils it.

"Remove the left one" means another object in every image. A rewriter that sees the source can say which: "remove the
red circle at the upper left". Six categories, named as OmniEdit's tasks (`move` takes the place of `style`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from miniature.scenes.world import COLORS, GRID, LEXICONS, QUADRANTS, SHAPES, Item, Scene, _quadrant

CATEGORIES = ("swap", "move", "addition", "attribute_modification", "env", "removal")
SIDES = ("left", "right", "upper", "lower")
TINTS = ("white", "sky", "peach", "mint")
"""Names of `shapes_world.GROUNDS`, in their order."""
MATCHES = {"red": "peach", "yellow": "peach", "green": "mint", "blue": "sky", "purple": "sky", "black": "white"}
"""The ground that matches a colour: its palest relative."""

Split = Literal["train", "val", "test"]
EditStyle = Literal["canonical", "explicit", "gallery", "terse", "unseen"]
EDIT_STYLES: tuple[EditStyle, ...] = ("canonical", "explicit", "gallery", "terse", "unseen")
AMBIGUOUS: tuple[EditStyle, ...] = ("canonical", "unseen")
"""Styles that do not say which object is meant; the others name it."""


@dataclass(frozen=True)
class Edit:
    """What is to be done to a scene.

    Attributes:
        category: one of `CATEGORIES`.
        index: of the object that is meant, in the scene's items: the one to change, to copy, or to match.
        side: the one of `SIDES` on which it is the only outermost object; ambiguous wordings name it by this.
        value: the new shape (swap), colour (attribute_modification), quadrant (move) or ground (env); else None.
    """

    category: str
    index: int
    side: str
    value: str | None = None


@dataclass(frozen=True)
class EditExample:
    """A source scene and an edit of it."""

    source: Scene
    edit: Edit

    @property
    def category(self) -> str:
        """One of `CATEGORIES`."""
        return self.edit.category

    @property
    def meant(self) -> Item:
        """The object that the instruction is about."""
        return self.source.items[self.edit.index]

    @property
    def id(self) -> str:
        """Names source and edit; two wordings of one edit (by another side, too) share it."""
        return f"{self.category}-{_digest(self):016x}"

    @property
    def split(self) -> Split:
        """60 % train, 20 % val, 20 % test, a fixed function of source and edit."""
        share = _digest(self) / 2**64
        return "train" if share < 0.6 else "val" if share < 0.8 else "test"

    @property
    def instruction(self) -> str:
        """The training prompts' own wording, ambiguous without the image."""
        return write_edit(self.edit, self.source, "canonical", random.Random(0))

    @property
    def explicit(self) -> str:
        """A faithful rewrite that names what is seen."""
        return write_edit(self.edit, self.source, "explicit", random.Random(0))

    @property
    def metadata(self) -> dict[str, Any]:
        """Category, source (objects in order, ground's name), index of the object meant, and new value, for JSON."""
        items = [{"shape": item.shape, "color": item.color, "cell": item.cell} for item in self.source.items]
        return {
            "category": self.category,
            "items": items,
            "ground": TINTS[self.source.ground],
            "index": self.edit.index,
            "value": self.edit.value,
        }

    @property
    def targets(self) -> tuple[Scene, ...]:
        """Every scene that fulfils the edit and leaves the rest alone."""
        if self.category in ("move", "addition"):
            return tuple(fulfil(self.source, self.edit, cell) for cell in landing_cells(self.source, self.edit))
        return (fulfil(self.source, self.edit),)

    def target(self, rng: random.Random) -> Scene:
        """One of `targets`."""
        return rng.choice(self.targets)


def _digest(example: EditExample) -> int:
    key = repr((example.source, example.category, example.edit.index, example.edit.value))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


# --- what an edit does ------------------------------------------------------------------------------------------------


def landing_cells(scene: Scene, edit: Edit) -> tuple[int, ...]:
    """Free cells for the moved object (in its new quadrant) or for the added one (anywhere)."""
    taken = {item.cell for item in scene.items}
    free = (cell for cell in range(GRID * GRID) if cell not in taken)
    return tuple(cell for cell in free if edit.category == "addition" or _quadrant(cell) == edit.value)


def fulfil(scene: Scene, edit: Edit, cell: int | None = None) -> Scene:
    """The scene after the edit.

    Args:
        scene: the source.
        edit: what to do.
        cell: where the object goes, for "move" and "addition" only: one of `landing_cells`.
    """
    items, meant = list(scene.items), scene.items[edit.index]
    if edit.category == "removal":
        del items[edit.index]
    elif edit.category == "env":
        return replace(scene, ground=TINTS.index(str(edit.value)))
    elif edit.category == "addition":
        items.append(replace(meant, cell=_given(cell)))
    elif edit.category == "move":
        items[edit.index] = replace(meant, cell=_given(cell))
    elif edit.category == "swap":
        items[edit.index] = replace(meant, shape=str(edit.value))
    else:
        assert edit.category == "attribute_modification"
        items[edit.index] = replace(meant, color=str(edit.value))
    return replace(scene, items=tuple(items))


def _given(cell: int | None) -> int:
    assert cell is not None
    return cell


def outermost(scene: Scene, side: str) -> int | None:
    """Index of the object that lies further to a side than all others; None if two share the place."""
    ranks = {
        "left": [item.cell % GRID for item in scene.items],
        "right": [-(item.cell % GRID) for item in scene.items],
        "upper": [item.cell // GRID for item in scene.items],
        "lower": [-(item.cell // GRID) for item in scene.items],
    }[side]
    return ranks.index(min(ranks)) if ranks.count(min(ranks)) == 1 else None


# --- examples ---------------------------------------------------------------------------------------------------------


def source_scene(rng: random.Random) -> Scene:
    """2-4 objects in reading order, each of its own (shape, colour) pair, in distinct cells."""
    num = rng.randint(2, 4)
    kinds = rng.sample([(shape, color) for shape in SHAPES for color in COLORS], num)
    cells = sorted(rng.sample(range(GRID * GRID), num))
    return Scene(tuple(Item(*kind, cell) for kind, cell in zip(kinds, cells, strict=True)), rng.randrange(len(TINTS)))


def example(rng: random.Random, category: str, split: Split) -> EditExample:
    """Draws an example of a category from a split."""
    if category not in CATEGORIES:
        raise ValueError(f"unknown category {category!r}: use one of {', '.join(CATEGORIES)}")
    while True:
        scene, side = source_scene(rng), rng.choice(SIDES)
        index = outermost(scene, side)
        if index is None:
            continue
        values = possible_values(scene, category, index)
        if not values:
            continue
        drawn = EditExample(scene, Edit(category, index, side, rng.choice(values)))
        if drawn.split == split:
            return drawn


def possible_values(scene: Scene, category: str, index: int) -> tuple[str | None, ...]:
    """The values that an edit of this object can take: they change it and keep all (shape, colour) pairs distinct."""
    meant = scene.items[index]
    kinds = {(item.shape, item.color) for item in scene.items}
    if category == "swap":
        return tuple(shape for shape in SHAPES if (shape, meant.color) not in kinds)
    if category == "attribute_modification":
        return tuple(color for color in COLORS if (meant.shape, color) not in kinds)
    if category == "move":
        return tuple(quadrant for quadrant in QUADRANTS if quadrant != _quadrant(meant.cell))
    if category == "env":
        tint = MATCHES[meant.color]
        return () if tint == TINTS[scene.ground] else (tint,)
    return (None,)


# --- wordings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EditLexicon:
    """The words of one vocabulary beside those of `shapes_world.LEXICONS`, in the order of the constants above.

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
"""What stands before the object and between it and what is to be done with it, in the "unseen" style."""

_FILLER = ("take", "see", "now", "and", "here", "is", "please", "then", "just", ",")


def write_edit(edit: Edit, scene: Scene, style: EditStyle, rng: random.Random, *, mix: float = 0.0) -> str:
    """Words an edit of a scene in a style.

    Args:
        edit: what to do.
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
    return f"the {color} {shape} at the {EDIT_LEXICONS[lexicon()].quadrants[QUADRANTS.index(_quadrant(item.cell))]}"


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
    """The (shape, colour) pairs that a text names: a colour's word right before a shape's, of any vocabulary."""
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
    """Every word that the wordings above can use, sorted."""
    phrases: list[str] = ["the one at it", *_FILLER]
    for name, lexicon in EDIT_LEXICONS.items():
        phrases += [template.format(it="it", value="") for template in lexicon.templates]
        phrases += [*lexicon.sides, *lexicon.quadrants, *lexicon.tints]
        phrases += [*LEXICONS[name].shapes, *LEXICONS[name].colors]
    return sorted({word for phrase in phrases for word in phrase.split()})

"""The miniature world: scenes of simple shapes, their images, and the wordings that describe them.

A `Content` says what a prompt asks for (GenEval's six tags), `write` words it in one of five styles, and
`imagine` turns content and caption into a `Scene` that `render` draws as 32 x 32 pixels.

`imagine` is also where the base model gets the two properties that the paper measured on FLUX.1-dev. Layout, free
colours and most mistakes are functions of the caption's *words*: one prompt gives nearly one image, another
wording of the same content gives another. The rest of the mistakes are pure chance, so that no wording is perfect.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import permutations, product
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 200),
    "yellow": (240, 190, 20),
    "purple": (140, 60, 170),
    "black": (30, 30, 34),
}
GROUNDS: tuple[tuple[int, int, int], ...] = ((244, 244, 240), (230, 240, 250), (250, 236, 226), (232, 246, 232))
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
GRID = 4
CELL = 8
SIZE = GRID * CELL

Style = Literal["canonical", "gallery", "terse", "detailed", "unseen"]
STYLES: tuple[Style, ...] = ("canonical", "gallery", "terse", "detailed", "unseen")


@dataclass(frozen=True)
class Ask:
    """One entry of a prompt: `count` objects of one shape; `color` and `quadrant` are free when None."""

    shape: str
    color: str | None = None
    count: int = 1
    quadrant: str | None = None


@dataclass(frozen=True)
class Content:
    """What a prompt asks for. With a `relation`, `asks[0]` stands in that relation to `asks[1]`."""

    tag: str
    asks: tuple[Ask, ...]
    relation: str | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """GenEval metadata. `exclude` asks for exact counts of every class, else "draw everything" would pass."""
        target_first = self.asks if self.relation is None else tuple(reversed(self.asks))
        include: list[dict[str, Any]] = []
        for ask in target_first:
            item: dict[str, Any] = {"class": ask.shape, "count": ask.count}
            if ask.color is not None:
                item["color"] = ask.color
            include.append(item)
        if self.relation is not None:
            include[1]["position"] = [self.relation, 0]
        asked = {shape: sum(ask.count for ask in self.asks if ask.shape == shape) for shape in SHAPES}
        exclude = [{"class": shape, "count": count + 1} for shape, count in asked.items()]
        return {"tag": self.tag, "include": include, "exclude": exclude}


@dataclass(frozen=True)
class Item:
    """One drawn object; `cell` counts row by row from the upper left, 0..15."""

    shape: str
    color: str
    cell: int


@dataclass(frozen=True)
class Scene:
    """An image's contents: its objects and the index of its ground colour."""

    items: tuple[Item, ...]
    ground: int = 0


# --- contents ---------------------------------------------------------------------------------------------------------


@lru_cache
def all_contents(tag: str) -> tuple[Content, ...]:
    """Every content of a tag, in a fixed order (4, 12, 12, 24, 48 and 360 of them)."""
    pairs = tuple(permutations(SHAPES, 2))
    if tag == "single_object":
        return tuple(Content(tag, (Ask(shape),)) for shape in SHAPES)
    if tag == "two_object":
        return tuple(Content(tag, (Ask(a), Ask(b))) for a, b in pairs)
    if tag == "counting":
        return tuple(Content(tag, (Ask(shape, count=n),)) for shape, n in product(SHAPES, (2, 3, 4)))
    if tag == "colors":
        return tuple(Content(tag, (Ask(shape, color),)) for shape, color in product(SHAPES, COLORS))
    if tag == "position":
        return tuple(Content(tag, (Ask(a), Ask(b)), relation) for (a, b), relation in product(pairs, RELATIONS))
    if tag == "color_attr":
        colors = tuple(permutations(COLORS, 2))
        return tuple(Content(tag, (Ask(a, c), Ask(b, d))) for (a, b), (c, d) in product(pairs, colors))
    raise ValueError(f"unknown tag {tag!r}: use one of {', '.join(TAGS)}")


def contents(tag: str, split: Literal["train", "val", "test"]) -> tuple[Content, ...]:
    """The contents of one split: 60 % train, 20 % val, 20 % test, by a fixed shuffle.

    `single_object` has four contents in all, so the splits share them.
    """
    everything = list(all_contents(tag))
    if tag == "single_object":
        return tuple(everything)
    random.Random(f"split-{tag}").shuffle(everything)
    first, second = round(0.6 * len(everything)), round(0.8 * len(everything))
    return tuple({"train": everything[:first], "val": everything[first:second], "test": everything[second:]}[split])


def elaborate(content: Content, rng: random.Random) -> Content:
    """Settles what a content leaves free (colours, quadrants), as a detailed caption would."""
    colors = rng.sample(tuple(COLORS), len(content.asks))
    quadrants: Sequence[str | None] = rng.sample(QUADRANTS, len(content.asks))
    if content.relation is not None or content.tag == "counting":
        quadrants = [None] * len(content.asks)  # the relation or the number already says where
    asks = tuple(
        replace(ask, color=ask.color or color, quadrant=quadrant)
        for ask, color, quadrant in zip(content.asks, colors, quadrants, strict=True)
    )
    return replace(content, asks=asks)


# --- wordings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lexicon:
    """The words of one vocabulary, in the order of SHAPES, COLORS, the numbers 2 3 4, and RELATIONS."""

    shapes: tuple[str, ...]
    colors: tuple[str, ...]
    numbers: tuple[str, ...]
    relations: tuple[str, ...]
    one: str


LEXICONS: dict[str, Lexicon] = {
    "canonical": Lexicon(SHAPES, tuple(COLORS), ("two", "three", "four"), RELATIONS, "a"),
    "gallery": Lexicon(
        ("disc", "box", "wedge", "plus"),
        ("crimson", "emerald", "azure", "golden", "violet", "ebony"),
        ("a pair of", "a trio of", "a quartet of"),
        ("on the left side of", "on the right side of", "over", "under"),
        "one",
    ),
    "terse": Lexicon(
        ("ball", "block", "cone", "star"),
        ("scarlet", "lime", "navy", "amber", "plum", "charcoal"),
        ("2", "3", "4"),
        ("west of", "east of", "north of", "south of"),
        "1",
    ),
}
PREFIXES: dict[Style, tuple[str, ...]] = {
    "canonical": ("a photo of",),
    "gallery": ("an image showing", "a painting with", "artwork depicting"),
    "terse": ("draw", "render", "picture :"),
    "detailed": ("detailed view of", "crisp rendering of", "clean composition of"),
    "unseen": ("there should be", "we can see", "imagine having"),
}
JOIN: dict[Style, str] = {
    "canonical": "and",
    "gallery": "next to",
    "terse": "+",
    "detailed": "with",
    "unseen": "and also",
}

_FILLER = sorted({w for phrases in (*PREFIXES.values(), JOIN.values()) for phrase in phrases for w in phrase.split()})


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def write(content: Content, style: Style, rng: random.Random, *, mix: float = 0.0) -> str:
    """Words a content in a style.

    Args:
        content: what to say; "detailed" says its quadrants too (see `elaborate`).
        style: "canonical" is the training prompts' own; "unseen" is for evaluation only: it draws each word from the
            vocabulary of "gallery" or "terse" and has templates of its own.
        rng: picks prefixes and, where vocabularies mix, words.
        mix: chance that "gallery" and "terse" take a word from the other's vocabulary.
    """
    own = {"unseen": "gallery", "detailed": "canonical"}.get(style, style)
    share = 0.5 if style == "unseen" else mix

    def lexicon() -> Lexicon:
        if own in ("gallery", "terse") and rng.random() < share:
            return LEXICONS["terse" if own == "gallery" else "gallery"]
        return LEXICONS[own]

    return _compose(content, rng.choice(PREFIXES[style]), JOIN[style], lexicon)


def write_loosely(content: Content, rng: random.Random) -> str:
    """Words a content with any vocabulary and random filler for a template: how strangers might put it.

    The refiner learns from these that filler means nothing. The "unseen" style's filler words occur, its templates do
    not.
    """
    templates = (*PREFIXES["unseen"], JOIN["unseen"])

    def filler(most: int) -> str:
        words = " ".join(rng.choice(_FILLER) for _ in range(rng.randint(1, most)))
        return filler(most) if any(template in words for template in templates) else words

    return _compose(content, filler(4), filler(2), lambda: rng.choice(tuple(LEXICONS.values())))


def _compose(content: Content, prefix: str, join: str, lexicon: Callable[[], Lexicon]) -> str:
    """A sentence of prefix, noun phrases, and what joins them; `lexicon` is asked anew for every word."""

    def noun_phrase(ask: Ask) -> str:
        shape = lexicon().shapes[SHAPES.index(ask.shape)]
        count = lexicon().one if ask.count == 1 else lexicon().numbers[ask.count - 2]
        words = [count, _plural(shape) if ask.count > 1 else shape]
        if ask.color is not None:
            words.insert(1, lexicon().colors[tuple(COLORS).index(ask.color)])
        if ask.quadrant is not None:
            words += ["at", ask.quadrant]
        return " ".join(words)

    if content.relation is not None:
        join = lexicon().relations[RELATIONS.index(content.relation)]
    return f"{prefix} " + f" {join} ".join(noun_phrase(ask) for ask in content.asks)


def vocabulary() -> list[str]:
    """Every word that `write` can use, sorted."""
    phrases: list[str] = [*QUADRANTS, "at", *JOIN.values()]
    for lexicon in LEXICONS.values():
        phrases += [*lexicon.shapes, *map(_plural, lexicon.shapes), *lexicon.colors, *lexicon.numbers]
        phrases += [*lexicon.relations, lexicon.one]
    for prefixes in PREFIXES.values():
        phrases += prefixes
    return sorted({word for phrase in phrases for word in phrase.split()})


# --- from a caption to a scene ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Habits:
    """How the world's images depart from their captions.

    Attributes:
        mistakes: chance of a mistake that the wording decides, by tag (FLUX.1-dev's order of difficulty).
        slips: chance of a mistake that nothing decides.
        freedom: chance that layout and free colours are random rather than decided by the words.
    """

    mistakes: tuple[tuple[str, float], ...] = (
        ("single_object", 0.15),
        ("two_object", 0.3),
        ("counting", 0.4),
        ("colors", 0.3),
        ("position", 0.45),
        ("color_attr", 0.45),
    )
    slips: float = 0.15
    freedom: float = 0.1


FAITHFUL = Habits(mistakes=tuple((tag, 0.0) for tag in TAGS), slips=0.0)


@cache
def _gaussian(*key: str) -> float:
    """A standard normal number that is a fixed function of the key."""
    digest = hashlib.blake2b("\0".join(key).encode(), digest_size=8).digest()
    return NormalDist().inv_cdf((int.from_bytes(digest, "big") + 0.5) / 2**64)


@cache
def _word_scores(word: str, purpose: str, size: int) -> np.ndarray:
    return np.array([_gaussian(word, purpose, str(i)) for i in range(size)])


def _scores(caption: str, purpose: str, size: int) -> np.ndarray:
    """[size]: the caption's preference among `size` choices, a sum over its words (a small net can learn that)."""
    return np.sum([_word_scores(word, purpose, size) for word in caption.split()], axis=0)


def _spoilt(content: Content, caption: str, habits: Habits) -> bool:
    """Whether this wording of this content is drawn wrong.

    A threshold on a sum over adjacent *pairs* of content words: no single word is lucky everywhere, so a refiner has
    to learn which wording suits which content.
    """
    words = [word for word in caption.split() if word not in {*_FILLER, "a", "one", "1", "at"}]
    pairs = list(zip(words, words[1:], strict=False)) or [(words[0], words[0])]
    score = sum(_gaussian(*pair, "mistake") for pair in pairs) / len(pairs) ** 0.5
    chance = dict(habits.mistakes)[content.tag]
    return chance > 0 and score > NormalDist().inv_cdf(1 - chance)


def _misread(content: Content, choice: int) -> Content:
    """The content with one mistake of its tag's kind; `choice` (any int >= 0) picks which."""
    first, last = content.asks[0], content.asks[-1]
    if content.tag == "counting":
        counts = [n for n in (1, 2, 3, 4) if abs(n - first.count) == 1]
        return replace(content, asks=(replace(first, count=counts[choice % len(counts)]),))
    if content.tag == "position":
        assert content.relation is not None
        opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
        return replace(content, relation=opposite[content.relation])
    if content.tag == "color_attr" and choice % 2 == 0:
        return replace(content, asks=(replace(first, color=last.color), replace(last, color=first.color)))
    if content.tag in ("colors", "color_attr"):
        colors = [color for color in COLORS if color not in (first.color, last.color)]
        return replace(content, asks=(*content.asks[:-1], replace(last, color=colors[choice % len(colors)])))
    if content.tag == "two_object" and choice % 2 == 0:
        return replace(content, asks=(first,))
    shapes = [shape for shape in SHAPES if shape not in (first.shape, last.shape)]
    return replace(content, asks=(*content.asks[:-1], replace(last, shape=shapes[choice % len(shapes)])))


def _related(cell: int, other: int, relation: str) -> bool:
    """Whether an object in `cell` is clearly in that relation to one in `other` (nearer to the axis than to 45 deg)."""
    dy, dx = divmod(cell, GRID)[0] - divmod(other, GRID)[0], cell % GRID - other % GRID
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along > 0 and abs(across) <= along // 2


def _cells(content: Content, scores: np.ndarray) -> list[list[int]]:
    """Cells for every ask: the best by `scores` [asks, 16] among those that quadrants and the relation allow."""
    if content.relation is not None:
        pairs = [pair for pair in product(range(GRID * GRID), repeat=2) if _related(pair[0], pair[1], content.relation)]
        best = max(pairs, key=lambda pair: scores[0, pair[0]] + scores[1, pair[1]])
        return [[best[0]], [best[1]]]
    taken: set[int] = set()
    chosen: list[list[int]] = []
    for ask, row in zip(content.asks, scores, strict=True):
        allowed = [cell for cell in range(GRID * GRID) if ask.quadrant in (None, _quadrant(cell)) and cell not in taken]
        cells = sorted(allowed, key=lambda cell: -row[cell])[: ask.count]
        taken.update(cells)
        chosen.append(cells)
    return chosen


def _quadrant(cell: int) -> str:
    row, column = divmod(cell, GRID)
    return QUADRANTS[2 * (row >= GRID // 2) + (column >= GRID // 2)]


def imagine(content: Content, caption: str, rng: random.Random, habits: Habits = Habits()) -> Scene:
    """The scene that the world shows for a caption of this content.

    Args:
        content: what the caption says, as returned by `elaborate` for detailed captions.
        caption: the words, which decide layout, free colours and `habits.mistakes`.
        rng: decides the rest.
        habits: `FAITHFUL` for captions that are always right.
    """
    if rng.random() < habits.slips:
        content = _misread(content, rng.randrange(60))
    elif _spoilt(content, caption, habits):
        content = _misread(content, int(np.argmax(_scores(caption, "misread", 12))))

    def decide(purpose: str, size: int) -> np.ndarray:
        if rng.random() < habits.freedom:
            return np.array([rng.gauss(0, 1) for _ in range(size)])
        return _scores(caption, purpose, size)

    layout = np.stack([decide(f"layout {i}", GRID * GRID) for i in range(len(content.asks))])
    items = []
    for i, (ask, cells) in enumerate(zip(content.asks, _cells(content, layout), strict=True)):
        color = ask.color or tuple(COLORS)[int(np.argmax(decide(f"color {i}", len(COLORS))))]
        items += [Item(ask.shape, color, cell) for cell in cells]
    return Scene(tuple(items), ground=int(np.argmax(decide("ground", len(GROUNDS)))))


# --- images ---------------------------------------------------------------------------------------------------------


@lru_cache
def stencil(shape: str) -> np.ndarray:
    """[8, 8] float: how much of each pixel of a cell the shape covers, 0..1."""
    scale = 16
    image = Image.new("L", (CELL * scale, CELL * scale))
    draw = ImageDraw.Draw(image)

    def at(*points: float) -> list[float]:
        return [scale * p for p in points]

    if shape == "circle":
        draw.ellipse(at(1, 1, 7, 7), fill=255)
    elif shape == "square":
        draw.rectangle(at(1.2, 1.2, 6.8, 6.8), fill=255)
    elif shape == "triangle":
        draw.polygon(at(4, 0.6, 7.2, 7, 0.8, 7), fill=255)
    elif shape == "cross":
        draw.rectangle(at(3, 1, 5, 7), fill=255)
        draw.rectangle(at(1, 3, 7, 5), fill=255)
    else:
        raise ValueError(f"unknown shape {shape!r}: use one of {', '.join(SHAPES)}")
    return np.asarray(image, dtype=np.float64).reshape(CELL, scale, CELL, scale).mean((1, 3)) / 255


def render(scene: Scene) -> np.ndarray:
    """Draws a scene as [32, 32, 3] uint8 RGB."""
    image = np.empty((SIZE, SIZE, 3))
    image[:] = GROUNDS[scene.ground]
    for item in scene.items:
        row, column = divmod(item.cell, GRID)
        patch = image[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        cover = stencil(item.shape)[..., None]
        patch[:] = (1 - cover) * patch + cover * np.array(COLORS[item.color])
    return image.round().astype(np.uint8)


def random_scene(rng: random.Random) -> Scene:
    """A scene of 1-4 unrelated objects (for the autoencoder, which has no captions)."""
    cells = rng.sample(range(GRID * GRID), rng.randint(1, 4))
    items = tuple(Item(rng.choice(SHAPES), rng.choice(tuple(COLORS)), cell) for cell in cells)
    return Scene(items, rng.randrange(len(GROUNDS)))


def captioned_scenes(
    rng: random.Random, habits: Habits, styles: Sequence[tuple[Style, float]]
) -> Iterator[tuple[str, Scene]]:
    """An endless stream of captions and scenes over all tags alike; `styles` are (name, share) pairs."""
    names, shares = zip(*styles, strict=True)
    while True:
        content = rng.choice(all_contents(rng.choice(TAGS)))
        style = rng.choices(names, shares)[0]
        content = elaborate(content, rng) if style == "detailed" else content
        caption = write(content, style, rng)
        yield caption, imagine(content, caption, rng, habits)

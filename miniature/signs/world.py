"""The miniature world of words: signs of two to four letters, their images, and the wordings that ask for them.

Every letter fills one cell of the grid and is one token of a prompt: `a sign that says " c h e z "` (the OCR reward
drops spaces). As in `miniature.scenes.interpretation`, layout, colours and most mistakes are functions of the caption's
words.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from statistics import NormalDist
from typing import Literal

import numpy as np

from miniature.scenes.interpretation import Habits, fixed_gaussian, preferences
from miniature.scenes.wording import vocabulary
from miniature.scenes.world import CELL, GRID, GROUNDS, SIZE
from miniature.scenes.world import FEW_COLORS as COLORS
from miniature.signs.font import ALPHABET, glyph

LENGTHS = (2, 3, 4)

Split = Literal["train", "val", "test"]
WordStyle = Literal["canonical", "gallery", "terse", "unseen"]
WORD_STYLES: tuple[WordStyle, ...] = ("canonical", "gallery", "terse", "unseen")


@dataclass(frozen=True)
class Sign:
    """An image of letters in one row, in the middle of its width.

    Attributes:
        letters: up to four letters.
        row: row of the grid, 0..3.
        ink: colour of the letters.
        ground: index of the ground's colour.
    """

    letters: str
    row: int
    ink: str
    ground: int = 0

    @property
    def column(self) -> int:
        """Column of the grid in which the first letter stands."""
        return first_column(len(self.letters))


def first_column(length: int) -> int:
    """Returns the column where a word begins: two letters leave a column on either side, three one on the right."""
    return (GRID - length) // 2


# --- words ------------------------------------------------------------------------------------------------------------


@cache
def all_words(length: int) -> tuple[str, ...]:
    """Returns all strings of that length whose neighbouring letters differ (132, 1,452 and 15,972 of them)."""
    strings = ("".join(letters) for letters in product(ALPHABET, repeat=length))
    return tuple(word for word in strings if all(a != b for a, b in pairwise(word)))


def split_of(word: str) -> Split:
    """Returns the split of a word, a fixed function of it: 60 % train, 20 % val, 20 % test."""
    share = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big") / 2**64
    return "train" if share < 0.6 else "val" if share < 0.8 else "test"


@cache
def words(length: int, split: Split) -> tuple[str, ...]:
    """Returns the words of one length and split."""
    return tuple(word for word in all_words(length) if split_of(word) == split)


# --- wordings ---------------------------------------------------------------------------------------------------------

WORD_PREFIXES: dict[WordStyle, tuple[str, ...]] = {
    "canonical": ("a sign that says",),
    "gallery": ("one poster reading", "one label with the text", "one banner bearing"),
    "terse": ("write", "letters :", "spell out"),
    "unseen": ("please put up", "here it reads", "the text now says"),
}
_EXTRA_FILLER = ("you", "should", "want", "some", "to")
_FILLER = sorted({w for phrases in WORD_PREFIXES.values() for phrase in phrases for w in phrase.split()})
_PLAIN = frozenset("a one that the with : out it here".split())


def write_word(word: str, style: WordStyle, rng: random.Random, *, mix: float = 0.0) -> str:
    """Asks for a word in a style.

    Args:
        word: the letters.
        style: "canonical" is the training prompts' own; "gallery" has capitals; "unseen" is for evaluation only: it has
            templates of its own, and capitals in half of its prompts.
        rng: picks the template and, where cases mix, the case.
        mix: chance that "gallery" and "terse" take the other's case.
    """
    if style not in WORD_STYLES:
        raise ValueError(f"unknown style {style!r}: use one of {', '.join(WORD_STYLES)}")
    prefix = rng.choice(WORD_PREFIXES[style])
    share = {"canonical": 0.0, "unseen": 0.5}.get(style, mix)
    capitals = (style == "gallery") != (rng.random() < share)
    return _quote(prefix, word.upper() if capitals else word)


def write_word_loosely(word: str, rng: random.Random) -> str:
    """Asks for a word in any case after random filler: how strangers might put it.

    The refiner learns from these that filler means nothing. The "unseen" style's words occur, its templates do not.
    """
    filler = " ".join(rng.choice([*_FILLER, *_EXTRA_FILLER]) for _ in range(rng.randint(1, 5)))
    if any(template in filler for template in WORD_PREFIXES["unseen"]):
        return write_word_loosely(word, rng)
    return _quote(filler, rng.choice((word, word.upper())))


def _quote(prefix: str, letters: str) -> str:
    return f'{prefix} " {" ".join(letters)} "'


def read_caption(caption: str) -> str | None:
    """Returns the word that a caption asks for; None unless one pair of quotes has letters of the font between.

    >>> read_caption('one poster reading " C U P "'), read_caption('write " c u p'), read_caption('write " c a p "')
    ('cup', None, None)
    """
    parts = caption.split('"')
    if len(parts) != 3:
        return None
    tokens = parts[1].lower().split()
    return "".join(tokens) if tokens and all(token in tuple(ALPHABET) for token in tokens) else None


def words_vocabulary() -> list[str]:
    """Returns every word of the captions of scenes and of signs, sorted."""
    return sorted({*vocabulary(), *_FILLER, *_EXTRA_FILLER, *ALPHABET, *ALPHABET.upper(), '"'})


# --- from a caption to a sign -----------------------------------------------------------------------------------------

Mistake = Literal["wrong", "dropped", "doubled", "swapped"]
MISTAKES: tuple[Mistake, ...] = ("wrong", "dropped", "doubled", "swapped")


@dataclass(frozen=True)
class WordHabits(Habits):
    """Rates at which the world's signs depart from their captions.

    Attributes:
        mistakes: chance that a template spoils a letter, by style: chosen so that about 35 % of the signs are right in
            each, slips included (templates of several words have more chances).
        slips: chance that a letter is spoilt which nothing decides.
        freedom: chance that row and colours are random rather than decided by the words.
    """

    mistakes: tuple[tuple[str, float], ...] = (
        ("canonical", 0.25),
        ("gallery", 0.3),
        ("terse", 0.12),
        ("unseen", 0.25),
    )
    slips: float = 0.1


FAITHFUL_WORDS = WordHabits().faithful


def misspell(word: str, mistakes: Mapping[int, Mistake], shift: int = 5) -> str:
    """Returns the word with some of its letters drawn wrong, cut to the grid's width.

    Args:
        word: the word that was asked for.
        mistakes: position -> what happens to the letter there. A swap is with the next one, at the end with the one
            before. A doubled letter takes its neighbour's place where there is no room for one more.
        shift: a wrong letter is so many places further in the alphabet.
    """
    drawn: list[str] = list(word)
    for i in sorted(mistakes, reverse=True):  # from the end, so that earlier positions stay what they are
        neighbour = i + 1 if i + 1 < len(word) else i - 1
        if mistakes[i] == "wrong":
            drawn[i] = ALPHABET[(ALPHABET.index(word[i]) + shift) % len(ALPHABET)]
        elif mistakes[i] == "dropped" and len(drawn) > 1:
            del drawn[i]
        elif mistakes[i] == "doubled" and len(word) < GRID:
            drawn.insert(i, word[i])
        elif mistakes[i] == "doubled":
            drawn[min(neighbour, len(drawn) - 1)] = word[i]
        elif mistakes[i] == "swapped" and neighbour < len(drawn):
            drawn[i], drawn[neighbour] = drawn[neighbour], drawn[i]
    return "".join(drawn[:GRID])


def _spoilt_letters(caption: str, chance: float) -> dict[int, Mistake]:
    """Returns the letters that this template spoils (by position), and the mistake made with each.

    A letter's luck is a sum over its *pairs* with the template's words: no template is good at every letter, so a
    refiner has to learn which one suits which word.
    """
    before, letters = caption.split('"')[0].split(), caption.split('"')[1].split()
    content = [word for word in before if word not in _PLAIN]
    threshold = NormalDist().inv_cdf(1 - chance) if chance > 0 else np.inf

    def luck(letter: str, *what: str) -> float:
        return sum(fixed_gaussian(word, letter, *what) for word in content) / len(content) ** 0.5

    return {
        i: max(MISTAKES, key=lambda kind, letter=letter: luck(letter, kind))  # type: ignore[misc]
        for i, letter in enumerate(letters)
        if luck(letter, "letter mistake") > threshold
    }


def imagine_sign(
    word: str, caption: str, style: WordStyle, rng: random.Random, habits: WordHabits = WordHabits()
) -> Sign:
    """Returns the sign that the world shows for a caption.

    Args:
        word: the word that the caption asks for.
        caption: wording, which decides row, colours and `habits.mistakes`.
        style: style of the caption.
        rng: random numbers, which decide the rest.
        habits: rates of mistakes; `FAITHFUL_WORDS` has none.
    """
    if rng.random() < habits.slips:
        shown = misspell(word, {rng.randrange(len(word)): rng.choice(MISTAKES)}, rng.randrange(1, len(ALPHABET)))
    else:
        shown = misspell(word, _spoilt_letters(caption, dict(habits.mistakes)[style]))

    def decide(purpose: str, size: int) -> int:
        if rng.random() < habits.freedom:
            return rng.randrange(size)
        return int(np.argmax(preferences(caption, purpose, size)))

    return Sign(shown, decide("row", GRID), tuple(COLORS)[decide("ink", len(COLORS))], decide("paper", len(GROUNDS)))


def captioned_signs(rng: random.Random, habits: WordHabits) -> Iterator[tuple[str, Sign]]:
    """Yields captions and signs of training words without end; canonical captions come most."""
    shares = [1.5 if style == "canonical" else 1.0 for style in WORD_STYLES]
    while True:
        word = rng.choice(words(rng.choice(LENGTHS), "train"))
        style = rng.choices(WORD_STYLES, shares)[0]
        caption = write_word(word, style, rng)
        yield caption, imagine_sign(word, caption, style, rng, habits)


# --- images ---------------------------------------------------------------------------------------------------------


def render_sign(sign: Sign) -> np.ndarray:
    """Draws a sign as [32, 32, 3] uint8 RGB."""
    image = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
    image[:] = GROUNDS[sign.ground]
    top, left = sign.row * CELL, sign.column * CELL
    for i, letter in enumerate(sign.letters):
        patch = image[top : top + CELL, left + i * CELL : left + (i + 1) * CELL]
        patch[glyph(letter) > 0] = COLORS[sign.ink]
    return image


def random_sign(rng: random.Random) -> Sign:
    """Draws a sign of one to four letters (for the autoencoder, which needs no captions)."""
    letters = "".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, GRID)))
    return Sign(letters, rng.randrange(GRID), rng.choice(tuple(COLORS)), rng.randrange(len(GROUNDS)))

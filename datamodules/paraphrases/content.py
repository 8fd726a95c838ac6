"""Check that a paraphrase keeps the objects, counts, colours and texts that a GenEval or OCR prompt asks for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datamodules.base import PromptSample
from datamodules.paraphrases.base import ContentCheck
from datamodules.paraphrases.words import AXES, CLASSES, COLORS, LOOSE, NUMBERS, SAME, SPELLINGS, plurals

_TOKEN = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
_QUOTED = re.compile(r'"([^"]*[^"\s][^"]*)"')
_STRAIGHT = str.maketrans("“”„’‘", '"""\'\'')
_REACH = 6
"""Largest number of words between a number or a colour and the noun that it goes with."""
_NEW_NOUN = {"a", "an", "another", "each", "every", ".", ";", ":", "!", "?"}
_BREAKS = _NEW_NOUN | {
    *("the", "one", "its", "his", "her", "their", "and", "or", "is", "are", "that", "which", "while", "with", "of"),
    *("on", "in", "at", "by", "to", "from", "near", "next", "beside", "behind", "left", "right", *AXES[1]),
}
_PAIRED = {"scissors", "skis"}
_COLOR_WORDS = {*COLORS, "gray", "grey"}


_Names = dict[tuple[str, ...], tuple[frozenset[str], bool]]
"""Tokens of a name -> the classes that it means, and true if it is a singular."""


@dataclass(frozen=True)
class _Mention:
    """Place in a wording that names one of `classes`: the tokens from `start` to `stop` (exclusive)."""

    start: int
    stop: int
    classes: frozenset[str]
    singular: bool


def wanted_texts(sample: PromptSample) -> list[str]:
    """Returns the texts that the image is to show: OCR metadata's `text`, else all that is in double quotes."""
    text = sample.metadata.get("text")
    given = [text] if isinstance(text, str) else text if isinstance(text, list | tuple) else []
    return [t for t in given if isinstance(t, str) and t.strip()] or _QUOTED.findall(sample.prompt.translate(_STRAIGHT))


def verbatim(text: str) -> str:
    """Returns a regular expression that finds a text as whole words, with any white space between them."""
    words = r"\s+".join(map(re.escape, text.split()))
    return (r"(?<!\w)" if text[:1].isalnum() else "") + words + (r"(?!\w)" if text[-1:].isalnum() else "")


class PromptContent(ContentCheck):
    """Looks in a wording for everything that the metadata asks for, word by word, so unusual wordings may fail.

    GenEval's classes must be there under their own name or a synonym, singular or plural, as words of their own (no
    "dog" in "hot dog"); a count above 1 as a digit or in words, before the class or, if no number stands before it,
    anywhere; a colour with its class rather than with another one. OCR's texts, and whatever the prompt has in double
    quotes, must be there letter by letter but for case and blanks.

    Args:
        synonyms: class or colour -> further words for it.
        relations: a word for the axis of each asked position must be there too ("left" or "right", whichever: the
            objects may have been turned round as well).
    """

    def __init__(self, synonyms: dict[str, list[str]] | None = None, relations: bool = True) -> None:
        self.synonyms = {name.lower(): [word.lower() for word in words] for name, words in (synonyms or {}).items()}
        self.relations = relations
        self._names = self._forms(CLASSES)

    def lost(self, sample: PromptSample, wording: str) -> str | None:
        """Returns the first thing missing, such as `dog`, `3 dog`, `red dog`, `left of` or `text "No Parking"`."""
        return next(self._losses(sample, wording), None)

    def _losses(self, sample: PromptSample, wording: str) -> Iterator[str]:
        yield from self._lost_texts(sample, wording)
        items = sample.metadata.get("include")
        if not isinstance(items, list | tuple):
            return
        others = {item["class"].lower() for item in items} - set(CLASSES)
        names = self._forms([*CLASSES, *sorted(others)]) if others else self._names
        tokens = _TOKEN.findall(wording.lower().translate(_STRAIGHT).replace("-", " "))
        mentions = list(_mentions(tokens, names))
        for item in items:
            yield from self._lost_item(item, tokens, mentions)

    # --- texts ------------------------------------------------------------------------------------------------------

    def _lost_texts(self, sample: PromptSample, wording: str) -> Iterator[str]:
        plain = _plain(wording)
        for text in wanted_texts(sample):
            if not re.search(verbatim(_plain(text)), plain):
                yield f'text "{text}"'

    # --- GenEval ----------------------------------------------------------------------------------------------------

    def _forms(self, classes: Iterable[str]) -> _Names:
        """Returns all names of the classes, in singular and plural."""
        forms: _Names = {}
        for name in classes:
            for known in (name, *SAME.get(name, ()), *LOOSE.get(name, ()), *self.synonyms.get(name, ())):
                for form in (known, *plurals(known)):
                    phrase = tuple(_TOKEN.findall(form.replace("-", " ")))
                    named, singular = forms.get(phrase, (frozenset(), False))
                    forms[phrase] = (named | {name}, singular or form == known)
        return forms

    def _lost_item(self, item: Mapping[str, Any], tokens: list[str], mentions: list[_Mention]) -> Iterator[str]:
        name = item["class"].lower()
        named = [mention for mention in mentions if name in mention.classes]
        if not named:
            yield name
            return
        if not self._counted(name, item.get("count", 1), tokens, named):
            yield f"{item.get('count', 1)} {name}"
        if "color" in item and not self._colored(item["color"].lower(), name, tokens, mentions):
            yield f"{item['color']} {name}"
        if self.relations and "position" in item:
            relation = item["position"][0]
            if not any(axis & set(relation.split()) and axis & set(tokens) for axis in AXES):
                yield relation

    def _counted(self, name: str, count: int, tokens: list[str], named: list[_Mention]) -> bool:
        numbers = [_number_before(tokens, mention, paired=name in _PAIRED) for mention in named]
        if count == 1:  # "two-door car" has a number before it and is one all the same
            pairs = zip(numbers, named, strict=True)
            return any(mention.singular or number in (None, 1) for number, mention in pairs)
        if any(number is not None for number in numbers):
            return count in numbers
        return any(_number(token) == count for token in tokens)

    def _colored(self, color: str, name: str, tokens: list[str], mentions: list[_Mention]) -> bool:
        words = {color, *SPELLINGS.get(color, ()), *self.synonyms.get(color, ())}
        for place, token in enumerate(tokens):
            if token in words or token.removesuffix("ish") in words:
                noun = _noun_of(place, tokens, mentions, words)
                if noun is not None and name in noun.classes:
                    return True
        return False


def _mentions(tokens: list[str], names: _Names) -> Iterator[_Mention]:
    """Yields the places that name a class; the longest name counts, so "tv remote" is no tv."""
    longest = max(map(len, names))
    start = 0
    while start < len(tokens):
        for stop in range(min(start + longest, len(tokens)), start, -1):
            if found := names.get(tuple(tokens[start:stop])):
                yield _Mention(start, stop, *found)
                break
        else:
            stop = start + 1
        start = stop


def _plain(text: str) -> str:
    return " ".join(text.translate(_STRAIGHT).lower().split())


def _number(token: str) -> int | None:
    return int(token) if token.isdecimal() else NUMBERS.get(token)


def _number_before(tokens: list[str], mention: _Mention, *, paired: bool) -> int | None:
    """Returns the nearest number before a noun, up to another noun's article; "pair of scissors" has no number."""
    for token in reversed(tokens[max(mention.start - _REACH, 0) : mention.start]):
        number = _number(token)
        if number is not None and not (paired and token == "pair"):
            return number
        if token in _NEW_NOUN:
            return None
    return None


def _noun_of(place: int, tokens: list[str], mentions: list[_Mention], colors: set[str]) -> _Mention | None:
    """Returns the noun of the colour at `place`: the one it stands before, else the last one, else the next."""
    starts = {mention.start: mention for mention in mentions}
    for index in range(place + 1, min(place + 1 + _REACH, len(tokens))):
        if index in starts:
            return starts[index]
        listed = tokens[index] == "and" and set(tokens[index + 1 : index + 2]) & _COLOR_WORDS - colors
        if tokens[index] in _BREAKS and not listed:
            break
    before = [mention for mention in mentions if mention.stop <= place]
    after = [mention for mention in mentions if mention.start > place]
    return before[-1] if before else after[0] if after else None

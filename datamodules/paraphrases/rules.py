"""Paraphrases by rule: they need no model, are the same in every run, and keep the content."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from datamodules.base import PromptSample, bare
from datamodules.paraphrases.base import Paraphraser, Wordings, choose_kinds
from datamodules.paraphrases.content import verbatim, wanted_texts
from datamodules.paraphrases.words import (
    AXES,
    CLASSES,
    COLORS,
    COMMON,
    LOOSE,
    NUMBERS,
    SAME,
    TURNS,
    article_for,
    plural,
    plurals,
)

_FRAME = re.compile(r"\s*(?:(?:an?|the)\s+)?(?:photo|photograph|picture|image|snapshot)\s+of\s+(?=\S)", re.IGNORECASE)
_FRAMES = (
    "an image that shows {}",
    "a picture of {}",
    "a photograph showing {}",
    "a snapshot of {}",
    "{}, photographed",
    "{}, captured by a camera",
)
_REQUESTS = ("what I want: {}", "this is the request: {}", "I would like the following: {}", "{}, please")
"""Frames for prompts of any other kind, editing instructions among them."""
_SETTINGS = (
    ("soft natural light", "gentle daylight", "even studio lighting", "diffuse window light"),
    ("a plain background", "a simple backdrop", "an uncluttered background", "a neutral backdrop"),
    ("sharp focus", "shot with a standard lens", "high resolution", "fine detail", "shallow depth of field"),
)
_QUALITIES = (("high quality", "well made"), ("carefully done", "clean"), ("fine detail", "sharp"))
_RELATION = "|".join(re.escape(phrase) for phrase in sorted(TURNS, key=len, reverse=True))
_RELATED = re.compile(rf"(.+?) ({_RELATION}) (.+)", re.IGNORECASE)
_LINKED = re.compile(r"(and|or|but|then|which|who|whose|where|while|so)\b", re.IGNORECASE)
"""Beginnings of clauses that cannot move."""


class RuleParaphrases(Paraphraser):
    """Rewords prompts by rules that keep classes, numbers, colours, relations and quoted text.

    - `template`: another frame ("a photo of X" becomes "X, photographed"); a prompt without that frame gets one.
    - `synonyms`: words that mean the same.
    - `order`: "A and B" the other way round, "A left of B" as "B right of A", clauses between commas moved.
    - `case`: upper, lower or title case.
    - `typos`: a letter or two swapped, dropped or doubled, in words that say nothing of the content.
    - `short`: neither frame nor articles.
    - `long`: harmless detail at the end: light, background and camera where the prompt is GenEval's, else quality.

    Prompts in another script have no wording. One depends on the seed, the kind, and the prompt's id and text, not on
    the other prompts.

    Args:
        kinds: some of the kinds above; null is all.
        seed: seed of the choices.
        refined: true evaluates the run's own refiner on these wordings too.
    """

    def __init__(self, kinds: list[str] | None = None, seed: int = 0, refined: bool = True) -> None:
        super().__init__(refined)
        self._kinds = choose_kinds(kinds, tuple(_RULES), "RuleParaphrases.kinds")
        self.seed = seed

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the chosen kinds."""
        return self._kinds

    def write(self, name: str, samples: Sequence[PromptSample]) -> Wordings:
        """Writes, for every kind, one wording for each prompt, or None where the rule changes nothing."""
        return {kind: [self._reword(kind, sample) for sample in bare(samples)] for kind in self.kinds}

    def _reword(self, kind: str, sample: PromptSample) -> str | None:
        rng = random.Random(f"{self.seed}/{kind}/{sample.id}/{sample.prompt}")
        masked, hidden = _hide(sample.prompt.strip(), wanted_texts(sample))
        wording = _RULES[kind](masked, sample.metadata, rng) if _is_latin(masked) else None
        if wording is None:
            return None
        for mark, text in hidden.items():
            wording = wording.replace(mark, text)
        return None if wording == sample.prompt else wording


def _hide(prompt: str, texts: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Hides quoted and wanted texts behind characters that no rule changes.

    Returns:
        The prompt with these characters, and the text that each stands for.
    """
    hidden: dict[str, str] = {}

    def hide(match: re.Match[str]) -> str:
        mark = chr(0xE000 + len(hidden))  # of the private use area
        hidden[mark] = match[0]
        return mark

    masked = re.sub(r'"[^"]*"|“[^”]*”|„[^“”]*[“”]', hide, prompt)
    for text in sorted(texts, key=len, reverse=True):
        if not any(text.lower() in quoted.lower() for quoted in hidden.values()):
            masked = re.sub(verbatim(text), hide, masked, flags=re.IGNORECASE)
    return masked, hidden


# --- rules: prompt, metadata and a source of choices in; a wording (perhaps the same) or None out ---------------------


def _template(prompt: str, metadata: dict[str, Any], rng: random.Random) -> str:
    body, frame = _body(prompt)
    frames = _FRAMES if frame or "include" in metadata else _REQUESTS
    wordings = [text.format(_decapitalised(body)) for text in frames]
    return rng.choice([wording for wording in wordings if wording.lower() != prompt.lower()])


def _synonyms(prompt: str, metadata: dict[str, Any], rng: random.Random) -> str:
    asked = {item["class"].lower() for item in metadata["include"]} if "include" in metadata else set(SAME)
    table: dict[str, tuple[str, ...]] = dict(COMMON)
    if "include" in metadata:
        table |= {relation: (same,) for relation, (_, same) in TURNS.items()}
    for name in CLASSES:  # those without a synonym too, so that "tv remote" is not taken for a tv
        others = SAME.get(name, ()) if name in asked else ()
        table[name] = others
        table |= {form: tuple(map(plural, others)) for form in plurals(name) if form != name}
    phrases = "|".join(re.escape(phrase) for phrase in sorted(table, key=len, reverse=True))

    def replaced(match: re.Match[str]) -> str:
        article, old = match[1] or "", match[2]
        others = table[old.lower()]
        if not others:
            return match[0]
        new = rng.choice(others)
        if article:
            article = _like(article_for(new), article) + article[len(article.rstrip()) :]
        return article + _like(new, old)

    return re.sub(rf"\b(an?\s+)?({phrases})\b", replaced, prompt, flags=re.IGNORECASE)


def _order(prompt: str, metadata: dict[str, Any], rng: random.Random) -> str | None:
    body, frame = _body(prompt)
    items = metadata.get("include", [])
    if len(items) == 2 and any("position" in item for item in items):
        match = _RELATED.fullmatch(body)
        if match is None:
            return None
        return _as_begun(frame, _decapitalised(match[3]), TURNS[match[2].lower()][0], _decapitalised(match[1]), body)
    if len(items) == 2 and len(parts := body.split(" and ")) == 2:
        return _as_begun(frame, parts[1], "and", _decapitalised(parts[0]), body)
    end = "." if prompt.endswith(".") else ""
    clauses = prompt.removesuffix(".").split(", ")
    if len(clauses) < 2 or any(_LINKED.match(clause) for clause in clauses) or ". " in prompt:
        return None
    first = rng.randrange(1, len(clauses))
    clauses[0] = _decapitalised(clauses[0])
    moved = ", ".join(clauses[first:] + clauses[:first])
    return (moved[0].upper() + moved[1:] if prompt[0].isupper() else moved) + end


def _case(prompt: str, metadata: dict[str, Any], rng: random.Random) -> str | None:
    title = re.sub(r"\w[\w'’]*", lambda match: match[0][0].upper() + match[0][1:].lower(), prompt)
    wordings = [wording for wording in (prompt.upper(), prompt.lower(), title) if wording != prompt]
    return rng.choice(wordings) if wordings else None


def _typos(prompt: str, metadata: dict[str, Any], rng: random.Random) -> str | None:
    names = (item.get(key, "").lower() for item in metadata.get("include", ()) for key in ("class", "color"))
    protected = _PROTECTED | _words_of(names)
    words = list(re.finditer(r"(?<![\w'])[a-z]{4,}(?![\w'])", prompt, flags=re.IGNORECASE))
    words = [word for word in words if word[0].lower() not in protected]
    if not words:
        return None
    for word in sorted(rng.sample(words, min(rng.randint(1, 2), len(words))), key=lambda w: -w.start()):
        slip = _slip(word[0], rng)
        while slip.lower() in protected:
            slip = _slip(word[0], rng)
        prompt = prompt[: word.start()] + slip + prompt[word.end() :]
    return prompt


def _short(prompt: str, metadata: dict[str, Any], rng: random.Random) -> str:
    body, _ = _body(prompt)
    # A capital A inside a sentence is a name ("vitamin A").
    return re.sub(r"(?:^(?:an?|the)|(?<=\. )(?:An?|The)|\b(?-i:an?|the))\s+", "", body, flags=re.IGNORECASE)


def _long(prompt: str, metadata: dict[str, Any], rng: random.Random) -> str:
    groups = _SETTINGS if "include" in metadata else _QUALITIES
    details = [rng.choice(group) for group in rng.sample(groups, rng.randint(2, len(groups)))]
    return ", ".join([prompt.removesuffix("."), *details]) + "." * prompt.endswith(".")


_RULES: dict[str, Callable[[str, dict[str, Any], random.Random], str | None]] = {
    "template": _template,
    "synonyms": _synonyms,
    "order": _order,
    "case": _case,
    "typos": _typos,
    "short": _short,
    "long": _long,
}


# --- their parts ----------------------------------------------------------------------------------------------------


def _words_of(names: Iterable[str]) -> set[str]:
    """Returns every word in every form of every name."""
    known = {form for name in names for form in (name, *SAME.get(name, ()), *LOOSE.get(name, ()))}
    return {word for form in known for text in (form, *plurals(form)) for word in text.split()}


_PROTECTED = _words_of(CLASSES) | {*COLORS, "gray", "grey", *NUMBERS}.union(*AXES)


def _is_latin(prompt: str) -> bool:
    letters = [letter for letter in prompt if letter.isalpha()]
    return 2 * sum(letter.isascii() for letter in letters) > len(letters)


def _body(prompt: str) -> tuple[str, str]:
    """Splits a prompt into its body and its frame ("a photo of ")."""
    match = _FRAME.match(prompt)
    return (prompt[match.end() :], match[0]) if match else (prompt, "")


def _decapitalised(text: str) -> str:
    """Writes the article that a text begins with in small letters; other words may be names."""
    return re.sub(r"^(An?|The)(?=\s)", lambda match: match[0].lower(), text)


def _as_begun(frame: str, first: str, link: str, second: str, body: str) -> str:
    """Joins two parts by a link, behind the frame, or without one with a capital if the prompt had a capital."""
    text = f"{first} {link} {second}"
    return frame + text if frame or not body[0].isupper() else text[0].upper() + text[1:]


def _like(new: str, old: str) -> str:
    """Gives a word a capital if the word that it replaces has one."""
    return new[0].upper() + new[1:] if old[0].isupper() else new


def _slip(word: str, rng: random.Random) -> str:
    """Misspells a word: two neighbours swapped, or one letter dropped or doubled, but never the first."""
    swaps = [i for i in range(1, len(word) - 1) if word[i] != word[i + 1]]
    kind = rng.choice(("swap", "drop", "double") if swaps else ("drop", "double"))
    i = rng.choice(swaps) if kind == "swap" else rng.randrange(1, len(word))
    if kind == "swap":
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    return word[:i] + word[i + 1 :] if kind == "drop" else word[: i + 1] + word[i:]

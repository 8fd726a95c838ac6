"""Base classes of sources of paraphrases and of checks that a paraphrase keeps the content."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from datamodules.base import PromptSample

Wordings = dict[str, list[str | None]]
"""Kind of paraphrase -> one wording for each prompt, None where this kind has none for it."""


class Paraphraser(ABC):
    """Base class of sources of paraphrases.

    Args:
        refined: true evaluates the run's own refiner on these wordings too.
    """

    checked = True
    """True leaves out wordings that lose content; false keeps them, for a prompt enhancer whose mistakes count."""
    sees_images = False
    """True if `write` looks at the source images of editing prompts."""

    def __init__(self, refined: bool = True) -> None:
        self.refined = refined

    @property
    @abstractmethod
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds of wording: a set `geneval` becomes the sets `geneval.<kind>`."""

    @abstractmethod
    def write(self, name: str, samples: Sequence[PromptSample]) -> Wordings:
        """Writes, for every kind, one wording for each of P prompts.

        A prompt that a kind cannot change has None: a wording is never the prompt itself.

        Args:
            name: name of the evaluation set.
            samples: its P originals.
        """


class ContentCheck(ABC):
    """Base class of checks that a wording still asks for what the prompt asks for."""

    @abstractmethod
    def lost(self, sample: PromptSample, wording: str) -> str | None:
        """Names something that the wording no longer asks for, as a short phrase; None if it asks for everything.

        Args:
            sample: the original, with its metadata.
            wording: the text in place of `sample.prompt`.
        """


def check_kinds(kinds: Iterable[str], where: str) -> tuple[str, ...]:
    """Returns the kinds; raises ValueError if they cannot be parts of sets' names.

    >>> check_kinds(["typos", "case"], "kinds")
    ('typos', 'case')
    """
    kinds = tuple(kinds)
    for kind in kinds:
        if not isinstance(kind, str) or not re.fullmatch(r"[a-z0-9_]+", kind):
            raise ValueError(f"{where}: the kind {kind!r} names a set: use small letters, digits and _ only.")
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"{where}: the kinds {', '.join(kinds)} name one twice: name each once.")
    return kinds


def choose_kinds(kinds: Sequence[str] | None, known: Sequence[str], where: str) -> tuple[str, ...]:
    """Returns the chosen kinds, all of them for None; raises ValueError if one is unknown."""
    chosen = check_kinds(known if kinds is None else kinds, where)
    unknown = [kind for kind in chosen if kind not in known]
    if unknown or not chosen:
        raise ValueError(f"{where} is {list(chosen)}: use some of {', '.join(known)}, or null for all.")
    return chosen

"""Configurations, prompts and models that come with the package, found from any folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""Folder of the packages: the repository, or where pip installs."""

_FOLDERS = ("configs", "datamodules", "miniature")


def shipped(text: str) -> str:
    """Returns the path of what the package has under a name that the current folder lacks; else the text as it is.

    >>> shipped("configs/no_such.yaml")
    'configs/no_such.yaml'
    """
    folder, slash, _ = text.partition("/")
    if not slash or folder not in _FOLDERS or Path(text).exists():
        return text
    path = ROOT / text
    return str(path) if path.exists() else text


def shipped_words(words: Sequence[str]) -> list[str]:
    """Returns a command's words with such paths in the place of names, alone or behind `--option=`."""
    parts = (word.rpartition("=") for word in words)
    return [f"{option}{equals}{shipped(value)}" for option, equals, value in parts]

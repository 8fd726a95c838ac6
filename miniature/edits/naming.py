"""Checks that a rewritten instruction names the object that it is about, as the source image shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miniature.edits.wording import named_objects


def named_correctly(rewrite: str, metadata: Mapping[str, Any]) -> bool | None:
    """Checks that a rewrite names the object that its instruction means, by shape and colour in the source.

    Objects of a source differ in shape or colour, so the two say which one is meant. A rewrite that names others
    beside it is not correct: an editor could not tell which to change.

    Args:
        rewrite: text in any of the world's vocabularies.
        metadata: metadata of the example (`EditExample.metadata`).

    Returns:
        True if it names this object alone, False if it names others, None if it names no object at all.
    """
    named = set(named_objects(rewrite))
    meant = metadata["items"][metadata["index"]]
    return named == {(meant["shape"], meant["color"])} if named else None

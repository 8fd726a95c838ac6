"""Splits a sequence into slices of one size."""

from __future__ import annotations

from collections.abc import Iterator


def chunks(total: int, size: int | None) -> Iterator[slice]:
    """Yields slices that cover `total` rows, `size` at a time (all at once when None)."""
    size = size or max(total, 1)
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))

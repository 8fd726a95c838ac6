"""Rows of an evaluation set that are the same prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from lightning.pytorch.utilities import rank_zero_warn


def distinct(keys: Sequence[Hashable], setting: str) -> dict[int, int]:
    """Counts the rows of each prompt, and warns if some have several.

    Args:
        keys: key of each row, equal for rows of one prompt (`datamodules.lazy.contents`).
        setting: name of the setting that names the rows' file.

    Returns:
        First row of each prompt -> number of its rows.

    >>> distinct(["a", "b"], "data.eval_file")
    {0: 1, 1: 1}
    """
    first: dict[Hashable, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    numbers = Counter(keys)
    if len(first) < len(keys):
        least, most = min(numbers.values()), max(numbers.values())
        times = f"{most}" if least == most else f"{least} to {most}"
        rank_zero_warn(
            f"{setting}: its {len(keys):,} rows are {len(first):,} prompts, each {times} times: evaluation draws at "
            f"least {least} image{'s' * (least > 1)} of each."
        )
    return {row: numbers[key] for key, row in first.items()}

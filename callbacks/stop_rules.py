"""Rules that tell when logged numbers have been out of bounds for long enough; `callbacks.health.Health` uses them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rewards.arguments import check_minimum


@dataclass(frozen=True)
class Limit:
    """Bounds of a logged number, and what happens outside them.

    Args:
        below: values below it are out of bounds; null is no lower bound.
        above: values above it are out of bounds; null is no upper bound.
        for_steps: number of logged values in a row that have to be out of bounds.
        action: `stop` ends training, `warn` warns once for each such row.
    """

    below: float | None = None
    above: float | None = None
    for_steps: int = 5
    action: Literal["stop", "warn"] = "stop"

    def __post_init__(self) -> None:
        if self.below is None and self.above is None:
            raise ValueError("a limit of `limits` has neither `below` nor `above`: set at least one of them.")
        if self.below is not None and self.above is not None and self.below > self.above:
            raise ValueError(
                f"a limit of `limits` has below={self.below} and above={self.above}, so that every value is out of "
                "bounds: swap them."
            )
        check_minimum("a limit of `limits`", -math.inf, below=self.below, above=self.above)
        check_minimum("a limit of `limits`", 1, for_steps=self.for_steps)


@dataclass(frozen=True)
class Breach:
    """A number that has been out of bounds for long enough.

    Attributes:
        limit: the number's bounds.
        message: name of the number, its value, the bound, and the length of the row.
    """

    limit: Limit
    message: str


class Streaks:
    """Counts how many values in a row each number has been out of bounds; NaN neither counts nor ends a row.

    Args:
        limits: name of a number -> its bounds.

    Example:
        >>> streaks = Streaks({"std": Limit(below=0.1, for_steps=2)})
        >>> for value in (0.5, 0.01, float("nan"), 0.02):
        ...     for breach in streaks.update({"std": value, "others": 7.0}):
        ...         print(breach.message)
        std was 0.02, below its limit 0.1 for 2 logged values in a row
    """

    def __init__(self, limits: Mapping[str, Limit]) -> None:
        self.limits = dict(limits)
        self.counts = dict.fromkeys(limits, 0)
        self.unseen = set(limits)
        """Names that have not been logged yet."""

    def update(self, values: Mapping[str, float]) -> list[Breach]:
        """Counts numbers that were logged together and returns the breaches; names without limits are ignored."""
        breaches = []
        for name, limit in self.limits.items():
            if name not in values:
                continue
            value = float(values[name])
            self.unseen.discard(name)
            if math.isnan(value):
                continue
            low = limit.below is not None and value < limit.below
            high = limit.above is not None and value > limit.above
            count = self.counts[name] = self.counts[name] + 1 if low or high else 0
            due = count >= limit.for_steps if limit.action == "stop" else count == limit.for_steps
            if due:
                where = f"below its limit {limit.below:g}" if low else f"above its limit {limit.above:g}"
                row = f" for {count} logged values in a row" if count > 1 else ""
                breaches.append(Breach(limit, f"{name} was {value:.4g}, {where}{row}"))
        return breaches

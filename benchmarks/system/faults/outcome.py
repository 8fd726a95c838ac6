"""`Outcome`: what an attack found, as a row of the Markdown table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Tick = Callable[[], object]
"""Called after each case, for the progress bar."""


@dataclass
class Outcome:
    """What one kind of fault did.

    Args:
        fault: its name.
        times: how often it was done.
        survived: how often nothing was lost.
        lost: what was lost in all, in the units that the attack names.
        seconds: how long it took.
        notes: kind of loss -> a way to see it again, of each kind the first.
        counts: kind of loss -> how often.
        extra: further lines for the reader, such as slopes of memory.
    """

    fault: str
    times: int = 0
    survived: int = 0
    lost: int = 0
    seconds: float = 0.0
    notes: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    extra: list[str] = field(default_factory=list)

    def add(self, losses: Sequence[tuple[str, str]]) -> None:
        """Counts one case.

        Args:
            losses: kind and reproduction of everything that it lost; empty if it was survived.
        """
        self.times += 1
        self.survived += not losses
        self.lose(losses)

    def lose(self, losses: Sequence[tuple[str, str]]) -> None:
        """Counts losses that belong to no case of their own."""
        self.lost += len(losses)
        for kind, shown in losses:
            self.counts[kind] += 1
            self.notes.setdefault(kind, shown)


def table(outcomes: Sequence[Outcome]) -> str:
    """Formats outcomes as a Markdown table, with every kind of loss below it.

    >>> print(table([Outcome("SIGKILL", 2, 2, 0, 3.2), Outcome("garbage", 5, 4, 1, 0.5, {"stop": "x"})]))
    | fault | times | survived | lost | seconds |
    |---|---:|---:|---:|---:|
    | SIGKILL | 2 | 2 | 0 | 3 |
    | garbage | 5 | 4 | 1 | 0 |
    <BLANKLINE>
    - lost, garbage: stop (0 times), such as x
    """
    lines = ["| fault | times | survived | lost | seconds |", "|---|---:|---:|---:|---:|"]
    lines += [f"| {o.fault} | {o.times:,} | {o.survived:,} | {o.lost:,} | {o.seconds:.0f} |" for o in outcomes]
    more = [f"- {o.fault}: {line}" for o in outcomes for line in o.extra]
    more += [
        f"- lost, {o.fault}: {kind} ({o.counts[kind]} times), such as {shown}"
        for o in outcomes
        for kind, shown in o.notes.items()
    ]
    return "\n".join([*lines, *([""] if more else []), *more])

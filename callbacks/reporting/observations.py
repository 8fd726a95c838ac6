"""What a run's numbers say of its health, in sentences."""

from __future__ import annotations

import pandas as pd

from callbacks.runs.loading import Run

_END = 0.1
"""Share of a run's steps, at its end, over which a number is averaged."""


def observations(run: Run) -> list[tuple[bool, str]]:
    """Reads a fit's training metrics.

    Returns:
        For each finding True if all is well, and a sentence; empty for a run without training metrics.
    """
    table = run.training
    found: list[tuple[bool, str]] = []
    if not len(table):
        return found
    if not run.finished:
        found.append((False, "The run did not reach its end; a resumed one goes on from last.ckpt."))
    for agent, name in (("flow", "image model"), ("language", "refiner")):
        skipped = int((_column(table, f"train/{agent}/skipped") > 0).sum())
        if skipped:
            found.append((False, f"{skipped} updates of the {name} were skipped: loss or gradient not finite."))
    invalid = _column(table, "group/invalid_share")
    if invalid.max() > 0:
        found.append((False, f"Up to {invalid.max():.0%} of a step's images could not be scored."))
    rules = (
        ("group/zero_std_share", 0.5, "of the groups had images of equal reward at the end: nothing to learn from."),
        ("refine/truncated", 0.05, "of the rewrites were cut off at their length limit at the end."),
        ("refine/cut", 0.05, "of the rewrites were too long for the image model's text encoders at the end."),
        ("health/blank_share", 0.05, "of the images were blank at the end."),
    )
    found += [(False, f"{end:.0%} {said}") for name, most, said in rules if (end := _end(table, name)) > most]
    shares = (
        ("format", 0.9, "of the rewrites were well-formed at the end."),
        ("refine/distinct", 0.5, "of a group's rewrites were different at the end."),
    )
    found += [(end >= least, f"{end:.0%} {said}") for name, least, said in shares if (end := _end(table, name)) >= 0]
    if all(fine for fine, _ in found):
        found.insert(0, (True, "No update was skipped, every image was scored, and groups differed in reward."))
    return found


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    return table[name].dropna() if name in table else pd.Series(dtype=float)


def _end(table: pd.DataFrame, name: str) -> float:
    """Mean of the last steps; NaN, which no rule applies to, without the column."""
    values = _column(table, name)
    return float(values.tail(max(1, round(len(values) * _END))).mean())

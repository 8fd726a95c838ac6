"""Curves of scores by rollouts or steps, and their mean over seeds.

A curve is a pandas Series: its index is rollouts (or steps), rising; its values are scores, without gaps.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from callbacks.runs.loading import Run

Curves = Mapping[int | None, pd.Series]
"""Seed -> curve."""


def curve(run: Run, column: str, by: str = "rollouts") -> pd.Series:
    """Reads a column of a run's validations, or else of its training, without gaps.

    Args:
        run: the run.
        column: name as in the logs (`val/geneval/with_pe`, `reward`).
        by: `rollouts`, `step`, or `seconds` (of validations).

    Raises:
        ValueError: if the run has no such column.
    """
    tables = [run.validations.reset_index(), run.training.reset_index()]
    table = next((table for table in tables if {column, by} <= set(table)), None)
    if table is None:
        names = sorted({str(name) for table in tables for name in table})
        near = difflib.get_close_matches(column if by in names else by, names, 3) or names[:8]
        raise ValueError(f"{run.folder} has no {column} by {by}: choose another, such as {', '.join(near) or 'none'}.")
    series: pd.Series = table.set_index(by)[column].dropna().sort_index()
    return series


def settings(
    runs: Sequence[Run], *columns: str, by: str = "rollouts", group: Callable[[Run], str] | None = None
) -> dict[str, Curves]:
    """Groups runs into settings and reads the curves of each setting's seeds.

    Args:
        runs: all settings' seeds.
        columns: scores; with several, a setting is a group and one of the columns that its runs have
            ("PromptRL, with_pe": by the last part of its name, or all of it if two end alike).
        by: x axis, as in `curve`.
        group: names a run's setting; None is the mode (which agents learn).

    Returns:
        Setting -> seed -> curve.

    Raises:
        ValueError: if two runs of a setting have the same seed, or there is no such column.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.mode if group is None else group(run), []).append(run)
    ends = [column.rpartition("/")[2] for column in columns]
    shown = ends if len(set(ends)) == len(ends) else columns
    found: dict[str, Curves] = {}
    for name, members in groups.items():
        _refuse_same_seeds(name, members)
        for column, end in zip(columns, shown, strict=True):
            if len(columns) == 1 or any(column in run.validations or column in run.training for run in members):
                label = name if len(columns) == 1 else f"{name}, {end}"
                found[label] = {run.seed: curve(run, column, by) for run in members}
    if not found:
        curve(runs[0], columns[0], by)  # says what there is
    return found


def _refuse_same_seeds(name: str, runs: Sequence[Run]) -> None:
    first: dict[int | None, Run] = {}
    for run in runs:
        if run.seed in first:
            raise ValueError(
                f"{first[run.seed].folder} and {run.folder} are both {name or 'of unknown mode'} with seed {run.seed}: "
                "group the runs by what sets them apart, or leave one out."
            )
        first[run.seed] = run


def band(seeds: Curves) -> pd.DataFrame:
    """Averages the curves of several seeds, at every place where one of them was evaluated.

    Between its evaluations a curve is a straight line; beyond its last, or before its first, it has no value.

    Returns:
        Index as the curves'; columns `mean`, `low`, `high` (least and greatest seed), `std` (of the sample), `sem` (of
        the mean; both NaN for one seed) and `seeds`, how many have a value.
    """
    places = np.unique(np.concatenate([series.index.to_numpy(dtype=float) for series in seeds.values()]))
    values = pd.DataFrame({i: at(series, places) for i, series in enumerate(seeds.values())}, index=places)
    values.index.name = next(iter(seeds.values())).index.name
    num, std = values.notna().sum(axis=1), values.std(axis=1)
    summary = {"mean": values.mean(axis=1), "low": values.min(axis=1), "high": values.max(axis=1)}
    return pd.DataFrame(summary | {"std": std, "sem": std / np.sqrt(num), "seeds": num})


def at(series: pd.Series, places: np.ndarray | float) -> np.ndarray:
    """Interpolates a curve linearly at some places; NaN outside its evaluations."""
    if series.empty:
        return np.full(np.shape(places), np.nan)
    x, y = series.index.to_numpy(dtype=float), series.to_numpy(dtype=float)
    return np.interp(places, x, y, left=np.nan, right=np.nan)

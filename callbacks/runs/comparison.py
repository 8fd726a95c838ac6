"""Pure functions that compare curves of runs: rollouts to a score, area, gaps with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from callbacks.runs.curves import Curves, at, band


@dataclass(frozen=True)
class Gap:
    """A difference of two means.

    Attributes:
        value: first minus second.
        low: lower end of its 95 % interval; NaN if there is too little to resample.
        high: upper end.
        num: number of pairs (of seeds, or prompts) behind it; 0 if the seeds have no pairs.
    """

    value: float
    low: float
    high: float
    num: int


def rollouts_to(series: pd.Series, threshold: float, *, interpolate: bool = True) -> float:
    """Finds where a curve first reaches a score.

    Args:
        series: scores by rollouts.
        threshold: score to reach.
        interpolate: take the crossing of the straight line between two evaluations; else the later evaluation.

    Returns:
        Rollouts; NaN if never.
    """
    x, y = series.index.to_numpy(dtype=float), series.to_numpy(dtype=float)
    reached = np.flatnonzero(y >= threshold)
    if not len(reached):
        return math.nan
    i = int(reached[0])
    if i == 0 or not interpolate:
        return float(x[i])
    return float(x[i - 1] + (threshold - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))


def ceiling_ratio(series: pd.Series, reference: pd.Series, *, share: float = 1.0, interpolate: bool = True) -> float:
    """Divides the rollouts a curve needs to the reference's best score by those the reference needs (claim C1).

    The best of noisy evaluations is a lucky one: hand over means of seeds. Where the reference reached a plateau, when
    it happens to be best says little; 0.95 of its gain is safer.

    Args:
        series: scores by rollouts.
        reference: scores by rollouts of the curve to compare with.
        share: part of the reference's gain over its first score that both are to reach, 0..1.
        interpolate: as in `rollouts_to`.

    Returns:
        Below 0.5 where the claim holds; NaN if the curve never gets there or the reference never rises.
    """
    best = float(reference.max())
    threshold = best - (1 - share) * (best - float(reference.iloc[0]))  # exactly the best for a share of 1
    needed = rollouts_to(reference, threshold, interpolate=interpolate)
    return rollouts_to(series, threshold, interpolate=interpolate) / needed if needed > 0 else math.nan


def area(series: pd.Series, upto: float | None = None) -> float:
    """Averages a curve: its area (trapezoids) over its width.

    Args:
        series: scores by rollouts.
        upto: rollouts at which to stop, within the curve; None is its end. Curves that are compared want the same.
    """
    x, y = series.index.to_numpy(dtype=float), series.to_numpy(dtype=float)
    if upto is not None:
        x, y = np.append(x[x < upto], upto), np.append(y[x < upto], at(series, upto))
    return float(np.trapezoid(y, x) / (x[-1] - x[0])) if len(x) > 1 else math.nan


def gap_difference(first: Gap, second: Gap, weight: float = 1.0) -> Gap:
    """Subtracts independent gaps, `first - weight * second`, with the MOVER interval (Zou and Donner, 2008).

    Args:
        first: a gap with its interval.
        second: a gap with its interval.
        weight: factor of the second, at least 0.
    """
    value = first.value - weight * second.value
    low = math.hypot(first.value - first.low, weight * (second.high - second.value))
    high = math.hypot(first.high - first.value, weight * (second.value - second.low))
    return Gap(value, value - low, value + high, min(first.num, second.num))


def seed_gap(first: Mapping[int | None, float], second: Mapping[int | None, float]) -> Gap:
    """Subtracts the mean scores of two settings, with Student's t interval over seeds.

    Seeds that both have are pairs, and the other seeds are left out. Without pairs the interval is Welch's.

    Args:
        first: seed -> score.
        second: seed -> score.

    Returns:
        The difference; without ends if a setting has fewer than three seeds.
    """
    pairs = [seed for seed in first if seed in second]
    ours, theirs = ([side[seed] for seed in pairs or side] for side in (first, second))
    value = sum(ours) / len(ours) - sum(theirs) / len(theirs)
    if min(len(ours), len(theirs)) < 3:
        return Gap(value, math.nan, math.nan, len(pairs))
    differences = [a - b for a, b in zip(ours, theirs, strict=True)] if pairs else []
    if pairs and max(differences) - min(differences) < 1e-12:  # of rounding alone scipy warns
        return Gap(value, value, value, len(pairs))
    test = stats.ttest_1samp(differences, 0) if pairs else stats.ttest_ind(ours, theirs, equal_var=False)
    ends = test.confidence_interval(0.95)
    return Gap(value, float(ends.low), float(ends.high), len(pairs))


def compare(settings: Mapping[str, Curves], reference: str) -> pd.DataFrame:
    """Tabulates final scores, areas and rollouts of settings, and compares them with one of the settings.

    Args:
        settings: name -> its seeds' curves (`callbacks.runs.curves.settings`).
        reference: name of the setting to compare with.

    Returns:
        Columns: `seeds`; `at`, the rollouts that all curves reached, where `final` (mean of seeds), `low` and `high`
        (their range) and `area` up to there are taken; `best` of the mean curve and `to_best`, its rollouts;
        `to_reference`, rollouts of the mean curve to the reference's best; `ratio` of that to the reference's own (C1);
        `gap` to the reference's final score with `gap_low` and `gap_high`, by `seed_gap`.

    Raises:
        ValueError: if there is no such reference, or a curve is empty.
    """
    if reference not in settings:
        raise ValueError(f"no setting is {reference}: there are {', '.join(settings)}; name one of them.")
    for name, seeds in settings.items():
        for seed, series in seeds.items():
            if series.empty:
                raise ValueError(f"{name}, seed {seed}, has no score yet: leave this run out.")
    common = min(float(series.index[-1]) for seeds in settings.values() for series in seeds.values())
    means = {name: _mean(seeds) for name, seeds in settings.items()}
    finals = {
        name: {seed: float(at(series, common)) for seed, series in seeds.items()} for name, seeds in settings.items()
    }
    rows = {}
    for name, mean in means.items():
        ends, best = list(finals[name].values()), float(mean.max())
        gap = seed_gap(finals[name], finals[reference])
        rows[name] = {
            "seeds": len(ends),
            "at": common,
            "final": sum(ends) / len(ends),
            "low": min(ends),
            "high": max(ends),
            "area": sum(area(series, common) for series in settings[name].values()) / len(ends),
            "best": best,
            "to_best": rollouts_to(mean, best),
            "to_reference": rollouts_to(mean, float(means[reference].max())),
            "ratio": ceiling_ratio(mean, means[reference]),
        }
        if name != reference:
            rows[name] |= {"gap": gap.value, "gap_low": gap.low, "gap_high": gap.high}
    return pd.DataFrame.from_dict(rows, orient="index")


def _mean(seeds: Curves) -> pd.Series:
    """Averages curves where all seeds have a value: one that goes on alone would bend the mean."""
    table = band(seeds)
    mean: pd.Series = table["mean"][table["seeds"] == len(seeds)]
    return mean

"""Bootstrap over prompts: intervals for how much a score would change with other prompts of the same kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def resample(tags: Sequence[str], num: int, seed: int = 0, prompts: Sequence[str] | None = None) -> Tensor:
    """Draws prompts with replacement, within each tag: benchmarks fix the number of prompts of a tag.

    Args:
        tags: tags of P rows.
        num: number of replicates R.
        seed: seed of the draw.
        prompts: P keys; rows with one tag and one key are the same prompt and are drawn together. None takes every row
            for a prompt of its own.

    Returns:
        [R, P] float64: how often each row was drawn.

    >>> resample(["a", "b", "b"], 2).sum(1).tolist(), resample(["a", "b", "b"], 2)[:, 0].tolist()
    ([3.0, 3.0], [1.0, 1.0])
    """
    generator = torch.Generator().manual_seed(seed)
    keys = _prompts(tags, prompts)
    distinct = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    weights = torch.zeros(num, len(distinct), dtype=torch.float64)
    for tag in dict.fromkeys(tags):
        own = torch.tensor([i for key, i in distinct.items() if key[0] == tag])
        drawn = own[torch.randint(len(own), (num, len(own)), generator=generator)]
        weights.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    return weights[:, [distinct[key] for key in keys]]


def _prompts(tags: Sequence[str], prompts: Sequence[str] | None) -> list[tuple[str, object]]:
    return list(zip(tags, range(len(tags)) if prompts is None else prompts, strict=True))


def other_runs(runs: int, num: int, seed: int = 0) -> Tensor:
    """Draws weights of a few runs with which their weighted mean spreads as the mean of other runs would.

    Drawing three runs with replacement gives an interval that is far too narrow. Here, if the runs' scores have mean m
    and standard deviation s, `(weights * scores).mean(1)` is distributed as m + s / sqrt(N) t, with t of Student's
    distribution with N - 1 degrees of freedom: its percentiles are the ends of the usual t interval.

    Args:
        runs: number of runs N.
        num: number of replicates R.
        seed: seed of the draw.

    Returns:
        [R, N] float64 of mean 1 in each row, negative ones among them; all 1 for one run, whose spread is not known.

    >>> other_runs(3, 2).mean(1).round(decimals=9).tolist(), other_runs(1, 2).tolist()
    ([1.0, 1.0], [[1.0], [1.0]])
    """
    if runs == 1:
        return torch.ones(num, 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(num, runs, generator=generator, dtype=torch.float64)
    chi_square = torch.randn(num, runs - 1, generator=generator, dtype=torch.float64).square().sum(1, keepdim=True)
    return 1 + (normal - normal.mean(1, keepdim=True)) * (runs / chi_square).sqrt()


def enough(tags: Sequence[str], prompts: Sequence[str] | None = None) -> bool:
    """Returns True if every tag has three prompts: one alone is always drawn, and its score would seem certain.

    With 1, 2, 5 and 20 prompts in each of six tags a nominal 95 % interval covers the mean in 26, 89, 94 and 97 %.
    Where some prompts have several rows, two in a tag are enough.

    Args:
        tags: tags of P rows.
        prompts: as for `resample`.

    >>> enough(["a"] * 3), enough(["a"] * 3 + ["b"]), enough(["a"] * 3, ["x", "x", "x"])
    (True, False, False)
    """
    distinct = set(_prompts(tags, prompts))
    least = 3 if len(distinct) == len(tags) else 2
    return bool(tags) and min(Counter(tag for tag, _ in distinct).values()) >= least


def interval(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Computes the percentile interval of replicates.

    Args:
        values: [R] a score's replicates; NaN ones (nothing to average) are left out.
        level: share of the replicates between the two ends.

    Returns:
        Both ends; NaN if there is no replicate.
    """
    values = values[~values.isnan()]
    if not len(values):
        return float("nan"), float("nan")
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype)
    low, high = values.quantile(ends).tolist()
    return low, high

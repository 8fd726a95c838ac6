"""What tests of several seeds scored, with intervals over prompts: means, and differences pair by pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from callbacks.comparison import Gap
from callbacks.runs import Run
from rewards.bootstrap import enough, interval, resample
from rewards.metric import PromptTable, weighted_mean

Summary = Callable[[PromptTable, Tensor], Tensor]
"""A score of a table under [R, P] weights of its prompts, [R]; a benchmark's is `summarize(...)["overall"]`."""


def mean_of_tags(column: str) -> Summary:
    """Mean of the tags' means, each over its pictures: the headline of GenEval and of the editing benchmarks."""

    def summarize(table: PromptTable, weights: Tensor) -> Tensor:
        tags = [tag for tag in dict.fromkeys(table.tags) if bool(table.counts[column][table.tagged(tag)].sum())]
        means = [weighted_mean(table, column, weights, table.tagged(tag)) for tag in tags]
        return torch.stack(means).mean(0) if means else weights.new_full((len(weights),), math.nan)

    return summarize


def mean_of_pictures(column: str) -> Summary:
    """Mean over all pictures."""
    return lambda table, weights: weighted_mean(table, column, weights)


def prompt_table(run: Run, name: str, mode: str, benchmark: str | None = None) -> PromptTable:
    """What `scores.jsonl` says of a set's prompts.

    A prompt's values count as often as it has pictures; which of them could not be scored is not kept.

    Args:
        run: a test.
        name: of the set.
        mode: `without_pe` or `with_pe`.
        benchmark: its title, where several scored the set.

    Raises:
        ValueError: if there is nothing of the kind, or several benchmarks'.
    """
    scores = run.scores
    chosen = scores[(scores["set"] == name) & (scores["mode"] == mode)] if len(scores) else scores
    if benchmark is not None and len(chosen):
        chosen = chosen[chosen["benchmark"] == benchmark]
    if not len(chosen):
        there = sorted({f"{a} {b}" for a, b in zip(scores["set"], scores["mode"], strict=True)}) if len(scores) else []
        raise ValueError(
            f"{run.folder} has no scores of {name} {mode}: choose from {', '.join(there)}."
            if there
            else f"{run.folder} has no scores.jsonl: score its checkpoint by `lightning test`."
        )
    if chosen["benchmark"].nunique() > 1:
        raise ValueError(
            f"{run.folder} has scores of {name} by {', '.join(sorted(set(chosen['benchmark'])))}: name one benchmark."
        )
    images = torch.tensor(chosen["images"].to_numpy(dtype=float))
    about = {"benchmark", "set", "mode", "id", "tag", "images"}
    values = {
        str(column): torch.tensor(chosen[column].to_numpy(dtype=float)) for column in chosen if column not in about
    }
    return PromptTable(
        ids=list(chosen["id"]),
        tags=list(chosen["tag"]),
        sums={column: (value * images).nan_to_num(0.0) for column, value in values.items()},
        counts={column: images * ~value.isnan() for column, value in values.items()},
        images=images,
    )


def prompt_gap(
    first: Sequence[PromptTable],
    second: Sequence[PromptTable] = (),
    *,
    summarize: Summary,
    resamples: int = 2000,
) -> Gap:
    """Mean score over runs, minus that of other runs if there are any, over the prompts (ids) that all of them have.

    A prompt is drawn for all runs together, within its tag: what makes it hard for all does not blur the difference.
    The interval is one of other prompts, not of other seeds.

    Args:
        first: one table a run.
        second: likewise; empty for the first ones' score itself.
        summarize: the score.
        resamples: of the bootstrap.

    Raises:
        ValueError: if the tables have no prompt in common.
    """
    rows = [{name: row for row, name in enumerate(table.ids)} for table in (*first, *second)]
    ids = [name for name in first[0].ids if all(name in own for own in rows)]
    if not ids:
        raise ValueError("the runs have no prompt in common: compare tests of the same set.")
    tables = [table.rows([own[name] for name in ids]) for table, own in zip((*first, *second), rows, strict=True)]
    tags = tables[0].tags
    weights = torch.cat([torch.ones(1, len(ids), dtype=torch.float64), resample(tags, resamples)])
    scores = [summarize(table, weights) for table in tables]
    gap = torch.stack(scores[: len(first)]).mean(0)
    if second:
        gap = gap - torch.stack(scores[len(first) :]).mean(0)
    ends = interval(gap[1:]) if enough(tags) else (math.nan, math.nan)
    return Gap(float(gap[0]), *ends, len(ids))

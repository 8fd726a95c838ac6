"""What tests of several seeds scored, with intervals over prompts: means, and differences pair by pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from callbacks.runs.comparison import Gap
from callbacks.runs.loading import Run
from callbacks.scores.bootstrap import enough, interval, other_runs, resample
from callbacks.scores.prompt_scores import PromptTable, weighted_mean

Summary = Callable[[PromptTable, Tensor], Tensor]
"""A score of a table under [R, P] weights of its prompts, [R]; a benchmark's is `summarize(...)["overall"]`."""


def mean_of_tags(column: str) -> Summary:
    """Mean of the tags' means, each over its images: the headline of GenEval and of the editing benchmarks."""

    def summarize(table: PromptTable, weights: Tensor) -> Tensor:
        tags = [tag for tag in dict.fromkeys(table.tags) if bool(table.counts[column][table.tagged(tag)].sum())]
        means = [weighted_mean(table, column, weights, table.tagged(tag)) for tag in tags]
        return torch.stack(means).mean(0) if means else weights.new_full((len(weights),), math.nan)

    return summarize


def mean_of_images(column: str) -> Summary:
    """Mean over all images."""
    return lambda table, weights: weighted_mean(table, column, weights)


def prompt_table(run: Run, name: str, mode: str, benchmark: str | None = None) -> PromptTable:
    """What `scores.jsonl` says of a set's prompts.

    A prompt's values count as often as it has images; which of them could not be scored is not kept.

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
    """Mean score over runs, minus that of other runs if there are any: `prompt_contrast` with weights 1 and -1.

    Args:
        first: one table a run.
        second: likewise; empty for the first ones' score itself.
        summarize: the score.
        resamples: of the bootstrap.

    Raises:
        ValueError: if the tables have no prompt in common.
    """
    terms = [(1.0, first), *([(-1.0, second)] if second else [])]
    return prompt_contrast(terms, summarize=summarize, resamples=resamples)


def prompt_contrast(
    terms: Sequence[tuple[float, Sequence[PromptTable]]],
    *,
    summarize: Summary,
    resamples: int = 2000,
    scenes: Mapping[str, str] | None = None,
    runs: bool = False,
) -> Gap:
    """Weighted sum of several settings' mean scores over runs, over the prompts (ids) that all of them have.

    With weights 1, -1, -1, 1 it compares what another wording changes in two models. A prompt is drawn for all runs
    together, within its tag: what makes it hard for all does not blur the difference.

    Args:
        terms: weight and one table a run of each setting.
        summarize: the score.
        resamples: of the bootstrap.
        scenes: id -> what it asks for, where several prompts ask for the same: these are drawn together, and the
            interval is one of other scenes, from two of a tag on (where it is too narrow). None takes every prompt for
            a scene of its own.
        runs: also for other runs (`callbacks.scores.bootstrap.other_runs`), the same ones of all settings with as many: the
            interval is one of other prompts and other seeds. Settings with one run keep it.

    Raises:
        ValueError: if the tables have no prompt in common.
    """
    rows = {id(table): {name: row for row, name in enumerate(table.ids)} for _, tables in terms for table in tables}
    ids = [name for name in terms[0][1][0].ids if all(name in own for own in rows.values())]
    if not ids:
        raise ValueError("the runs have no prompt in common: compare tests of the same set.")
    tags = terms[0][1][0].rows([rows[id(terms[0][1][0])][name] for name in ids]).tags
    keys = list(zip(tags, ids if scenes is None else (scenes[name] for name in ids), strict=True))
    drawn = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    by_scene = resample([tag for tag, _ in drawn], resamples)[:, [drawn[key] for key in keys]]
    weights = torch.cat([torch.ones(1, len(ids), dtype=torch.float64), by_scene])
    total = torch.zeros(len(weights), dtype=torch.float64)
    for sign, tables in terms:
        shared = (table.rows([rows[id(table)][name] for name in ids]) for table in tables)
        scores = torch.stack([summarize(table, weights) for table in shared])
        counts = torch.ones(len(tables), len(weights), dtype=torch.float64)
        if runs:
            counts[:, 1:] = other_runs(len(tables), resamples, seed=len(tables)).T
        total += sign * (scores * counts).sum(0) / len(tables)
    least = 3 if scenes is None else 2
    ends = interval(total[1:]) if enough([tag for tag, _ in drawn], least) else (math.nan, math.nan)
    return Gap(float(total[0]), *ends, len(ids))

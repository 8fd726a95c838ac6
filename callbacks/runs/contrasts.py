"""Scores of tests of several seeds: means and paired differences, with intervals over prompts."""

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
"""Function of a table and [R, P] weights of its prompts that returns a score, [R]."""


def mean_of_tags(column: str) -> Summary:
    """Returns a summary: the mean of the tags' means over images, the headline of GenEval and of editing."""

    def summarize(table: PromptTable, weights: Tensor) -> Tensor:
        tags = [tag for tag in dict.fromkeys(table.tags) if bool(table.counts[column][table.tagged(tag)].sum())]
        means = [weighted_mean(table, column, weights, table.tagged(tag)) for tag in tags]
        return torch.stack(means).mean(0) if means else weights.new_full((len(weights),), math.nan)

    return summarize


def mean_of_images(column: str) -> Summary:
    """Returns a summary: the mean over all images."""
    return lambda table, weights: weighted_mean(table, column, weights)


def prompt_table(run: Run, name: str, mode: str, benchmark: str | None = None) -> PromptTable:
    """Reads the scores of a set's prompts from a test's `scores.jsonl`.

    A prompt's mean counts as often as it has images; which of them could not be scored is not kept.

    Args:
        run: a test.
        name: name of the set.
        mode: `without_pe` or `with_pe`.
        benchmark: title of the benchmark, where several scored the set.

    Raises:
        ValueError: if the test has no such scores, or those of several benchmarks.
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
    about = {"benchmark", "set", "mode", "id", "tag", "prompt", "images"}
    values = {
        str(column): torch.tensor(chosen[column].to_numpy(dtype=float)) for column in chosen if column not in about
    }
    return PromptTable(
        ids=list(chosen["id"]),
        tags=list(chosen["tag"]),
        sums={column: (value * images).nan_to_num(0.0) for column, value in values.items()},
        counts={column: images * ~value.isnan() for column, value in values.items()},
        images=images,
        prompts=list(chosen["prompt"]) if "prompt" in chosen else None,  # older tests have none
    )


def prompt_contrast(
    terms: Sequence[tuple[float, Sequence[PromptTable]]],
    *,
    summarize: Summary,
    resamples: int = 2000,
    scenes: Mapping[str, str] | None = None,
    runs: bool = False,
) -> Gap:
    """Sums several settings' mean scores with weights, over the prompts (ids) that all runs have.

    With weights 1, -1, -1, 1 it compares what another wording changes in two models. A prompt is drawn for all runs
    together, within its tag: what makes it hard for all does not blur the difference.

    Args:
        terms: weight of each setting, and one table for each of its runs.
        summarize: computes the score.
        resamples: number of replicates of the bootstrap.
        scenes: id -> scene, where several prompts ask for the same one: these are drawn together, and the interval is
            that of other scenes, from two of a tag on (where it is too narrow). None draws equal prompts together.
        runs: also draw other runs (`callbacks.scores.bootstrap.other_runs`), the same for all settings with as many
            runs: the interval is that of other prompts and other seeds. Settings with one run keep it.

    Raises:
        ValueError: if the tables have no prompt in common.
    """
    rows = {id(table): {name: row for row, name in enumerate(table.ids)} for _, tables in terms for table in tables}
    ids = [name for name in terms[0][1][0].ids if all(name in own for own in rows.values())]
    if not ids:
        raise ValueError("the runs have no prompt in common: compare tests of the same set.")
    common = {id(table): table.rows([rows[id(table)][name] for name in ids]) for _, tables in terms for table in tables}
    tags = common[id(terms[0][1][0])].tags
    # Other wordings of one prompt may differ, so the set with the fewest prompts says which rows belong together.
    repeated = min((table.prompts or ids for table in common.values()), key=lambda prompts: len(set(prompts)))
    keys = repeated if scenes is None else [scenes[name] for name in ids]
    drawn = resample(tags, resamples, prompts=keys)
    weights = torch.cat([torch.ones(1, len(ids), dtype=torch.float64), drawn])
    total = torch.zeros(len(weights), dtype=torch.float64)
    for sign, tables in terms:
        scores = torch.stack([summarize(common[id(table)], weights) for table in tables])
        counts = torch.ones(len(tables), len(weights), dtype=torch.float64)
        if runs:
            counts[:, 1:] = other_runs(len(tables), resamples, seed=len(tables)).T
        total += sign * (scores * counts).sum(0) / len(tables)
    ends = interval(total[1:]) if enough(tags, keys) else (math.nan, math.nan)
    return Gap(float(total[0]), *ends, len(ids))

"""Tables of a run's `results.json`: benchmarks, other wordings, diversity. Pure functions from its contents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from callbacks.reporting import published as paper
from callbacks.reporting.tables import Row, Table, benchmark_table, diversity_table, robustness_table
from lightning_modules.evaluation import MODES
from lightning_modules.run_folder import MODE_LABELS, key_label


def tables_of(results: Mapping[str, Any], label: str) -> list[Table]:
    """Makes the tables of a run's `results.json`: benchmarks, other wordings, diversity.

    The paper's rows stand below ours where the prompts are the published ones.

    Args:
        results: contents of the file.
        label: the run's name, which begins the labels of its rows.
    """
    tables = []
    before = results.get("before", {})
    for key, modes in results.items():
        if not isinstance(modes, dict) or MODES[0] not in modes:
            continue
        rows = paper.paper_rows(paper.benchmark_of(key, results.get("sets", {}).get(key, {}).get("texts")))
        table = benchmark_table(
            "", key, modes, results.get("intervals", {}).get(key, {}), _columns(modes[MODES[0]]), [], label
        )
        note = f"{table.note} {paper.note_on(key)}".strip()
        if before.get(key, modes) != modes:
            earlier = [Row(f"{label} {MODE_LABELS[mode]}, before", scores) for mode, scores in before[key].items()]
            table = replace(table, rows=[*earlier, *table.rows])
        shown = [row for row in rows if set(row.scores) & set(table.columns)]
        tables.append(replace(table, rows=[*table.rows, *shown], note=note))
    for title, derived in results.get("robustness", {}).items():
        tables.append(wordings_table(title, derived))
    for name, sets in results.items():
        if isinstance(sets, dict) and name.startswith("diversity"):
            for key, arms in sets.items():
                if key != "intervals":
                    ends = sets.get("intervals", {}).get(key, {})
                    tables.append(diversity_table(f"Diversity on {key_label(key)} ({name})", arms, ends))
    return tables


def wordings_table(title: str, found: Mapping[str, Mapping[str, Any]], *, by_tag: bool = True) -> Table:
    """Makes the table of one benchmark on other wordings of its prompts.

    Args:
        title: the benchmark's.
        found: derived set -> its entry in `results.json`.
        by_tag: also show the differences by tag.
    """
    rows = {}
    for derived, said in found.items():
        for mode in modes_of(said):
            one = said[mode]
            low, high = one["intervals"]["headline"]
            rows[f"{derived}, {MODE_LABELS.get(mode, 'against the refiner')}"] = {
                "prompts": one["prompts"],
                "rejected": said["rejected"],
                "original": one["original"],
                "paraphrase": one["paraphrase"],
                "difference": one["scores"]["headline"],
                "low": low,
                "high": high,
                "by_tag": {tag: value for tag, value in one["scores"].items() if by_tag and tag in one["tags"]},
            }
    return robustness_table(f"{title}: other wordings of the same prompts", rows)


def modes_of(said: Mapping[str, Any]) -> list[str]:
    """Lists the comparisons in a derived set's entry: modes, and `against_pe`."""
    return [mode for mode in (*MODES, "against_pe") if mode in said]


def _columns(scores: Mapping[str, float | None]) -> list[str]:
    """Returns the scores that a table shows: without counts, and without rewards in the trainer's own unit."""
    return [name for name in scores if name not in ("rl", "images")] if "mean" in scores else list(scores)

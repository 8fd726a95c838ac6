"""`Report`: a run's results beside the paper's as `results.md`, `results.tex` and text in TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from callbacks.benchmark import MODES
from callbacks.reporting import published as paper
from callbacks.reporting.tables import Row, Table, benchmark_table, diversity_table, markdown, report
from callbacks.robustness import table_of
from callbacks.run_config import resolved_config
from callbacks.samples import tensorboards
from lightning_modules.atomic_write import write_atomically
from lightning_modules.run_folder import MODE_LABELS, key_label


class Report(L.Callback):
    """Writes `results.json` as Markdown and LaTeX tables at the end of a fit, validation or test.

    Every command of ours adds it. Where the evaluation sets are published ones, the paper's rows stand below ours.
    """

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the tables from `results.json`, which the callbacks before this one have completed."""
        folder = trainer.log_dir  # asked on every rank: Lightning broadcasts it
        path = None if folder is None else Path(folder) / "results.json"
        if not trainer.is_global_zero or path is None or not path.is_file():
            return
        published = getattr(trainer.datamodule, "published", True)  # type: ignore[attr-defined]
        label = str(resolved_config(trainer).get("experiment") or "this run")
        tables = tables_of(json.loads(path.read_text()), label, published=published)
        if not tables:
            return
        text, tex = report(tables)
        write_atomically(path.with_suffix(".tex"), tex)
        write_atomically(path.with_suffix(".md"), f"# {label}\n\n{text}")
        for logger in tensorboards(trainer):
            for table in tables:
                logger.experiment.add_text(f"results/{table.title}", markdown(table), trainer.global_step)
        rank_zero_info(f"Tables are in {path.with_suffix('.md')} and {path.with_suffix('.tex').name}.")

    on_test_end = on_fit_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the tables of `lightning validate`; in a fit `on_fit_end` does."""
        if trainer.state.fn == "validate":
            self.on_fit_end(trainer, pl_module)


def tables_of(results: Mapping[str, Any], label: str, *, published: bool = True) -> list[Table]:
    """Makes the tables of a run's `results.json`: benchmarks, robustness, diversity.

    Args:
        results: contents of the file.
        label: the run's name, which begins the labels of its rows.
        published: True if the evaluation sets are published ones, so that the paper's rows belong below.
    """
    tables = []
    before = results.get("before", {})
    for key, modes in results.items():
        if not isinstance(modes, dict) or MODES[0] not in modes:
            continue
        benchmark = paper.benchmark_of(key) if published else ""
        rows = paper.paper_rows(benchmark) if benchmark else []
        table = benchmark_table(
            "", key, modes, results.get("intervals", {}).get(key, {}), _columns(modes[MODES[0]]), [], label
        )
        if before.get(key, modes) != modes:
            earlier = [Row(f"{label} {MODE_LABELS[mode]}, before", scores) for mode, scores in before[key].items()]
            table = Table(table.title, table.columns, [*earlier, *table.rows], table.note)
        shown = [row for row in rows if set(row.scores) & set(table.columns)]
        tables.append(Table(table.title, table.columns, [*table.rows, *shown], table.note))
    for title, derived in results.get("robustness", {}).items():
        tables.append(table_of(title, derived))
    for name, sets in results.items():
        if isinstance(sets, dict) and name.startswith("diversity"):
            for key, arms in sets.items():
                if key != "intervals":
                    rows = paper.diversity_rows() if published else []
                    ends = sets.get("intervals", {}).get(key, {})
                    tables.append(diversity_table(f"Diversity on {key_label(key)} ({name})", arms, ends, rows))
    return tables


def _columns(scores: Mapping[str, float | None]) -> list[str]:
    """Returns the scores that a table shows: without counts, and without rewards in the trainer's own unit."""
    return [name for name in scores if name not in ("rl", "images")] if "mean" in scores else list(scores)

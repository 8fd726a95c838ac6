"""`Report`: a run's results beside the paper's as `results.md`, `results.tex` and a table in the trackers."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from callbacks.reporting.results import tables_of
from callbacks.reporting.tables import cells, markdown, report
from callbacks.run_config import given
from callbacks.trackers import log_table
from datamodules.atomic_write import write_atomically
from datamodules.jsonl import read_json


class Report(L.Callback):
    """Writes `results.json` as Markdown and LaTeX tables at the end of a fit, validation or test.

    Every command of ours adds it. Where the prompts are the published ones, the paper's rows stand below ours.
    """

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the tables from `results.json`, which the callbacks before this one have completed."""
        folder = trainer.log_dir  # asked on every rank: Lightning broadcasts it
        path = None if folder is None else Path(folder) / "results.json"
        if not trainer.is_global_zero or path is None or not path.is_file():
            return
        label = str(given(trainer, "experiment") or "this run")
        tables = tables_of(read_json(path), label)
        if not tables:
            return
        text, tex = report(tables)
        write_atomically(path.with_suffix(".tex"), tex)
        write_atomically(path.with_suffix(".md"), f"# {label}\n\n{text}")
        for table in tables:
            (_, *columns), *rows = cells(table)
            log_table(trainer, f"results/{table.title}", ["model", *columns], rows, markdown(table))

    on_test_end = on_fit_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the tables of `lightning validate`; in a fit `on_fit_end` does."""
        if trainer.state.fn == "validate":
            self.on_fit_end(trainer, pl_module)

"""Base of the benchmarks: scores what validation draws, keeps before and after, prints a table, writes results."""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from PIL.Image import Image
from rich.console import Console
from rich.table import Table
from torchmetrics import Metric

from datamodules.base import PromptSample

MODES = ("without_pe", "with_pe")
Results = dict[str, dict[str, dict[str, float]]]
"""evaluation set -> "without_pe" | "with_pe" -> score name -> value."""


class Benchmark(L.Callback, ABC):
    """Scores the pictures that `validation_step` and `test_step` return.

    Logs `val/<set>/<mode>` (the headline number) and `val/<set>/<mode>/<score>`, with mode `without_pe` (pictures of
    the prompts as they are) or `with_pe` (pictures of the refiner's greedy rewrites). At the end of a fit or test it
    prints a table and writes `results.json` beside the logs.

    Args:
        sets: evaluation sets to score; null is all of the data module's.
    """

    headline: str
    """Name of the score that stands for the whole."""

    def __init__(self, sets: list[str] | None = None) -> None:
        self.sets = sets
        self.history: list[dict[str, Any]] = []
        """One entry per validation: `{"step", "rollouts", "seconds", "results"}`."""
        self._metrics: dict[tuple[str, str], Metric] = {}
        self._started = time.monotonic()
        self._seconds_before = 0.0

    def key(self, name: str) -> str:
        """What the scores of an evaluation set are called in logs and results: its name, if nothing else is said."""
        return name

    @property
    def title(self) -> str:
        """What sets this benchmark apart from others of the run, in the table, the history and the checkpoint."""
        return type(self).__name__ + (f" of {', '.join(self.sets)}" if self.sets else "")

    @property
    def state_key(self) -> str:
        """Lightning's name for `state_dict`: one for each benchmark of a run."""
        return self.title

    @abstractmethod
    def new_metric(self) -> Metric:
        """An empty metric whose `compute` gives a dict of scores."""

    @abstractmethod
    def update(self, metric: Metric, samples: Sequence[PromptSample], images: Sequence[Image]) -> None:
        """Scores images against their samples' original prompts and adds them to a metric."""

    # --- hooks ------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._started = time.monotonic()

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins with empty metrics, one for every set and mode on every rank: all ranks must reduce the same ones."""
        modes = MODES if getattr(pl_module, "language", None) is not None else MODES[:1]
        names = _eval_names(trainer)
        self._metrics = {
            (name, mode): self.new_metric().to(pl_module.device)
            for name in names
            if self.sets is None or name in self.sets
            for mode in modes
        }

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Scores one batch."""
        name = _eval_names(trainer)[dataloader_idx]
        for mode, images in outputs["images"].items():
            if (name, mode) in self._metrics:
                self.update(self._metrics[name, mode], outputs["samples"], images)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reduces over ranks, logs, and remembers."""
        results: Results = {}
        prefix = "test" if trainer.testing else "val"
        for (name, mode), metric in self._metrics.items():
            key = self.key(name)
            scores = {score: float(value) for score, value in metric.compute().items()}
            results.setdefault(key, {})[mode] = scores
            pl_module.log(f"{prefix}/{key}/{mode}", scores[self.headline], rank_zero_only=True)
            rest = {f"{prefix}/{key}/{mode}/{k}": v for k, v in scores.items() if k != self.headline}
            pl_module.log_dict(rest, rank_zero_only=True)
        if trainer.sanity_checking:
            return
        rollouts = getattr(pl_module, "num_rollouts", 0)
        seconds = self._seconds_before + time.monotonic() - self._started
        self.history.append(
            {"step": trainer.global_step, "rollouts": rollouts, "seconds": round(seconds, 1), "results": results}
        )
        folder = trainer.log_dir  # asked on every rank: Lightning broadcasts it
        if trainer.is_global_zero and folder is not None:
            self._write(Path(folder) / "results.json")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets the history that came with a checkpoint: it tells of other scenes."""
        self.history = []

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the table."""
        if trainer.is_global_zero and self.history:
            self.print_table()

    on_test_end = on_fit_end

    def state_dict(self) -> dict[str, Any]:
        """Travels in the checkpoint, so that a resumed run still knows its beginning."""
        return {"history": self.history, "seconds": self._seconds_before + time.monotonic() - self._started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the beginning of the run back."""
        self.history = list(state_dict["history"])
        self._seconds_before = state_dict["seconds"]

    # --- reports ----------------------------------------------------------------------------------------------------

    def print_table(self) -> None:
        """Headline scores before and after, per set and mode, on the console."""
        first, last = self.history[0], self.history[-1]
        fitted = last["step"] > first["step"]
        table = Table(title=f"{self.title} after {last['rollouts']:,} rollouts ({last['seconds']:.0f} s)")
        for column in ("set", "prompt", *(("before", "after", "change") if fitted else ("score",))):
            table.add_column(column, justify="left" if column in ("set", "prompt") else "right")
        for name, modes in last["results"].items():
            for mode, scores in modes.items():
                after = scores[self.headline]
                cells = [f"{after:.3f}"]
                if fitted:
                    before = first["results"][name][mode][self.headline]
                    cells = [f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]
                table.add_row(name, mode.replace("_", " ").replace("pe", "PE"), *cells)
        Console().print(table)

    def _write(self, path: Path) -> None:
        """Writes `results.json`: the last scores by set and mode, those before training, and the history."""
        merged = json.loads(path.read_text()) if path.is_file() else {}
        last = self.history[-1]
        merged |= last["results"] | {"rollouts": last["rollouts"], "seconds": last["seconds"]}
        merged["before"] = merged.get("before", {}) | self.history[0]["results"]
        merged.setdefault("history", {})[self.title] = self.history
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_without_nan(merged), indent=2) + "\n")


def _without_nan(value: Any) -> Any:
    """NaN is no JSON: a score that no picture has is null."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _eval_names(trainer: L.Trainer) -> list[str]:
    """Names of the evaluation sets, in the order of the loaders."""
    names: list[str] = trainer.datamodule.eval_names  # type: ignore[attr-defined]
    return names

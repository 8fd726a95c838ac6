"""Benchmark of the refiner's eyes: share of rewrites that name the object that an ambiguous instruction means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from callbacks.benchmark import texts_digest
from callbacks.results_file import add_results
from callbacks.scores.prompt_scores import PromptScores, PromptTable, weighted_mean
from datamodules.base import PromptDataModule, PromptSample, bare
from lightning_modules.evaluation import EvaluationBatch
from lightning_modules.rollout import Rollout
from miniature.edits.naming import named_correctly

COLUMNS = ("names_source", "names_object")


class RewriteNaming(L.Callback):
    """Measures how many rewrites of the miniature's editing instructions name the object that is meant.

    Greedy rewrites count. It logs `val/<set>/names_source`, the share that names the object meant as the source image
    shows it, and `val/<set>/names_object`, the share that names any object. `results.json` gets both under `naming`, by
    category as well, for the last evaluation, before training and in between. `refine/names_source` and
    `refine/names_object` are the shares among each training step's sampled rewrites, which have more mistakes than
    greedy ones. Without a refiner it does nothing.

    Args:
        sets: evaluation sets whose rewrites are read; null is all of the data module's.
    """

    def __init__(self, sets: list[str] | None = None) -> None:
        self.sets = sets
        self.history: list[dict[str, Any]] = []
        """One entry per evaluation: `{"step", "rollouts", "results", "sets"}`."""
        self._metrics: dict[str, PromptScores] = {}
        self._sets: dict[str, str] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the shares among the training step's rewrites."""
        rollout: Rollout | None = getattr(pl_module, "latest", None)
        if rollout is None or rollout.completions is None:
            return
        rewrites = rollout.completions.rewrites
        samples = [sample for sample in rollout.samples for _ in range(len(rewrites) // len(rollout.samples))]
        values = read(samples, rewrites)
        means = {f"refine/{column}": sum(value[column] for value in values) / len(values) for column in COLUMNS}
        pl_module.log_dict(means, batch_size=len(rollout.samples))

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes empty metrics, the same on every rank."""
        data: PromptDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self._metrics, self._sets = {}, {}
        if getattr(pl_module, "language", None) is None:
            return
        for name, samples in data.eval_sets.items():
            if name not in data.unrefined and (self.sets is None or name in self.sets):
                rows = [(sample.id, sample.tag) for sample in bare(samples)]
                self._sets[name] = texts_digest(f"{sample.id} {sample.prompt}" for sample in bare(samples))
                self._metrics[name] = PromptScores.on(pl_module.device, rows, COLUMNS)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Adds the rewrites of one batch to the metrics."""
        assert isinstance(outputs, EvaluationBatch)
        if outputs.name in self._metrics and outputs.samples:
            values = read(outputs.samples, outputs.prompts["with_pe"])
            self._metrics[outputs.name].update([sample.id for sample in outputs.samples], values)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reduces the metrics over ranks, logs them, and adds them to `results.json`."""
        results = {name: shares(metric.table()) for name, metric in self._metrics.items()}
        prefix = "test" if trainer.testing else "val"
        for name, values in results.items():
            pl_module.log_dict({f"{prefix}/{name}/{c}": values[c]["mean"] for c in COLUMNS}, rank_zero_only=True)
        if trainer.sanity_checking or not results:
            return
        rollouts = getattr(pl_module, "num_rollouts", 0)
        entry = {"step": trainer.global_step, "rollouts": rollouts, "results": results, "sets": self._sets}
        self.history.append(entry)
        first = self.history[0]
        before = {name: one for name, one in first["results"].items() if first["sets"][name] == self._sets.get(name)}
        last = {"results": results, "before": before, "history": self.history}
        add_results(trainer, {"naming": last})

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets the history that came with a checkpoint, which is about other scenes."""
        self.history = []

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def state_dict(self) -> dict[str, Any]:
        """Returns the history for the checkpoint, so that a resumed run still knows its beginning."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the history of the run from a checkpoint."""
        self.history = list(state_dict["history"])


def read(samples: Sequence[PromptSample], rewrites: Sequence[str]) -> list[dict[str, float]]:
    """Scores B rewrites: for each, `names_source` and `names_object` are 0 or 1."""
    named = [named_correctly(text, sample.metadata) for sample, text in zip(samples, rewrites, strict=True)]
    return [{"names_source": float(right is True), "names_object": float(right is not None)} for right in named]


def shares(table: PromptTable) -> dict[str, dict[str, float]]:
    """Returns, for each column, the share of all rewrites ("mean") and of those of each tag."""
    ones = torch.ones(1, len(table), dtype=torch.float64)
    return {
        column: {"mean": float(weighted_mean(table, column, ones))}
        | {tag: float(weighted_mean(table, column, ones, table.tagged(tag))) for tag in dict.fromkeys(table.tags)}
        for column in COLUMNS
    }

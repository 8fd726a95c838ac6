"""`RunProgressBar`: a progress bar that counts to the end of the run rather than of the epoch."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import BatchesProcessedColumn, CustomBarColumn
from rich.progress import TextColumn, TimeRemainingColumn

from lightning_modules.evaluation import EvaluatedAgents


class RunProgressBar(RichProgressBar):
    """Rich's progress bar over the whole run, followed by the metrics logged with `prog_bar=True`.

    It counts optimizer steps to `max_steps`, or batches where `max_epochs` ends the run. In an evaluation it moves with
    every micro-batch of images, as one batch may take minutes.
    """

    @property
    def total_train_batches(self) -> int | float:
        """Number of optimizer steps, or of batches without `max_steps`, until the run ends."""
        trainer = self.trainer
        if trainer.max_steps > 0:
            return trainer.max_steps
        return super().total_train_batches * (trainer.max_epochs or 1) if trainer.max_epochs != -1 else float("inf")

    @property
    def _done(self) -> int:
        trainer = self.trainer
        return trainer.global_step if trainer.max_steps > 0 else trainer.fit_loop.epoch_loop.total_batch_idx + 1

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """Returns columns that leave half of a terminal of 80 columns to the metrics."""
        bar = CustomBarColumn(
            bar_width=8, complete_style=self.theme.progress_bar, finished_style=self.theme.progress_bar_finished
        )
        count = BatchesProcessedColumn(style=self.theme.batch_progress)
        return [TextColumn("{task.description}"), bar, count, TimeRemainingColumn(compact=True)]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the bar of the run, at the first of its epochs alone."""
        if self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)
            self._update(self.train_progress_bar_id, self._done)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar of the run."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, self._done - 1)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Lets the bar follow the images of the batch."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        self._follow(pl_module, self.val_progress_bar_id, batch_idx)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Lets the bar follow the images of the batch."""
        super().on_test_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        self._follow(pl_module, self.test_progress_bar_id, batch_idx)

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Lets the bar follow the images of the batch."""
        super().on_predict_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        self._follow(pl_module, self.predict_progress_bar_id, batch_idx)

    def _follow(self, module: L.LightningModule, bar: Any, batch_idx: int) -> None:
        if not isinstance(module, EvaluatedAgents) or bar is None:
            return
        self._update(bar, batch_idx)

        def show(share: float) -> None:
            self._update(bar, batch_idx + share)  # type: ignore[arg-type]  # rich takes fractions

        module.on_share_drawn = show

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Returns the metrics as short numbers, without the run's number: a terminal is 80 columns wide."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name: _short(value) for name, value in metrics.items() if name != "v_num"}

    def _get_train_description(self, current_epoch: int) -> str:
        # Lightning's "Epoch 0/-2" says nothing when steps end the run.
        return "Training".ljust(len(self.validation_description))


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    if value >= 100_000:
        return f"{value / 1e6:.1f}M"
    return f"{value:.0f}" if value.is_integer() and value > 1 else f"{value:.2f}"

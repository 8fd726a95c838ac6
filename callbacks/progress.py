"""`RunProgressBar`: a progress bar that counts to the end of the run rather than of the epoch."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


class RunProgressBar(RichProgressBar):
    """Rich's progress bar with `max_steps` as its total, followed by the metrics logged with `prog_bar=True`."""

    @property
    def total_train_batches(self) -> int | float:
        """Number of steps until the epoch, or the run by its `max_steps`, ends."""
        total = super().total_train_batches
        return min(total, self.trainer.max_steps) if self.trainer.max_steps > 0 else total

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
    return f"{value:.0f}" if value.is_integer() and value > 1 else f"{value:.2f}"

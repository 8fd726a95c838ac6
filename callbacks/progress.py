"""A progress bar that counts to the end of the run rather than of the epoch."""

from __future__ import annotations

from lightning.pytorch.callbacks import RichProgressBar


class RunProgressBar(RichProgressBar):
    """Rich's bar with `max_steps` as its total, beside it whatever is logged with `prog_bar=True`."""

    @property
    def total_train_batches(self) -> int | float:
        """Steps of this run, when `max_steps` ends it within the epoch."""
        total = super().total_train_batches
        return min(total, self.trainer.max_steps) if self.trainer.max_steps > 0 else total

"""Checkpoints and the resolved configuration, as the `lightning` command keeps them beside a run's logs."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn

from datamodules.base import PromptDataModule
from datamodules.resumable import ResumableLoader, place_in_epoch
from lightning_modules.agents import NotFinite
from rewards.base import RewardUnavailable


class SaveConfig(SaveConfigCallback):
    """Saves the resolved config once the models are loaded, so that a run that cannot start leaves nothing behind."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Waits for `on_fit_start` or `on_test_start`; raises ValueError if ranks resume from different files."""
        path, first = self.config.get("ckpt_path"), trainer.strategy.broadcast(self.config.get("ckpt_path"))
        if path != first:  # `last` and `best` are looked up by each rank, and another run may be writing its own
            raise ValueError(f"`ckpt_path` is {first} on the first process and {path} on another: name the file.")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes `config.yaml` beside the logs."""
        super().setup(trainer, pl_module, "fit")

    on_test_start = on_fit_start  # so that a test's scores say which agents they are of


class Checkpoint(ModelCheckpoint):
    """Keeps `last.ckpt` true to the last step, also when training ends between two checkpoints.

    A checkpoint that is due at a step with a validation is saved after it: Lightning saves before, and a resumed run
    would lack that validation in its history and in what stops it. If the validation fails, it is saved then; a run
    that goes on from there does not validate at that step again.
    """

    _due: tuple[Any, Any, int] | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves now, or notes what to save after the validation that is about to run."""
        # Lightning has no public name for the question whether it is.
        if trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher):  # type: ignore[arg-type]
            self._due = (outputs, batch, batch_idx)
        else:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves what was due before this validation."""
        super().on_validation_end(trainer, pl_module)
        self._save_due(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves what was due before a validation that had nothing to do."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._save_due(trainer, pl_module)

    def _save_due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._due is not None:
            due, self._due = self._due, None
            super().on_train_batch_end(trainer, pl_module, *due)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves `last.ckpt` unless this very step was saved."""
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lets a run that ended within an epoch go on with the next batch of it."""
        data, size = trainer.datamodule, None  # type: ignore[attr-defined]
        if isinstance(data, PromptDataModule):
            size = trainer.world_size // data.processes_per_group * data.batch_size
        place_in_epoch(checkpoint["loops"]["fit_loop"], size)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Saves `last.ckpt` when scores cannot be had, or an agent could not be updated for too long.

        The step that lacked its scores is the first after a resume.
        """
        super().on_exception(trainer, pl_module, exception)
        fitting = trainer.state.fn == TrainerFn.FITTING and trainer.global_step > 0
        if fitting:
            self._save_due(trainer, pl_module)
        if isinstance(exception, RewardUnavailable | NotFinite) and fitting and self.save_last:
            lacking = isinstance(exception, RewardUnavailable) and trainer.training
            if lacking and isinstance(trainer.train_dataloader, ResumableLoader):
                trainer.train_dataloader.put_back()
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

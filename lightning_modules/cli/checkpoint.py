"""Checkpoints and the resolved configuration, as the `lightning` command keeps them beside a run's logs."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from datamodules.base import PromptDataModule
from datamodules.resumable import ResumableLoader, place_in_epoch
from lightning_modules.agents import Agents, NotFinite
from lightning_modules.cli.preemption import Preempted, requeue
from rewards.base import RewardUnavailable

EXIT = 15
"""Seconds to exit after another process has failed; some thread may still wait for a reward server."""


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
    _steps = 0
    """Optimizer steps before the batch in hand."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes the step that training starts with."""
        super().on_train_start(trainer, pl_module)
        self._steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves now, or notes what to save after the validation that is about to run."""
        self._steps = trainer.global_step
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
        """Saves `last.ckpt` with the last finished optimizer step, unless the user broke the run off.

        A rollout that no step was taken on is drawn anew after a resume. Where another process has failed, process 0
        saves alone if it has all weights; a run ends with its own error, also if nothing can be saved.
        """
        alone = trainer.world_size > 1 and not dist.is_initialized()
        if not alone or (trainer.is_global_zero and isinstance(trainer.strategy, DDPStrategy)):
            super().on_exception(trainer, pl_module, exception)
            self._save_last_step(trainer, pl_module, exception)
        kept = "://" in self.last_model_path or os.path.exists(self.last_model_path)
        if kept and not isinstance(exception, RewardUnavailable):  # whose own words say so
            rank_zero_info(f"The last checkpoint is {self.last_model_path}: go on with --ckpt_path.")
        if isinstance(exception, Preempted) and trainer.state.fn == TrainerFn.FITTING:
            requeue(trainer, exception, self.last_model_path)
        if alone:
            signal.alarm(EXIT)

    def _save_last_step(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        torn = isinstance(pl_module, Agents) and pl_module.peers.torn
        if trainer.state.fn != TrainerFn.FITTING or trainer.global_step == 0 or torn:
            return
        try:
            self._save_due(trainer, pl_module)
            if self.save_last and isinstance(exception, Exception) and not self._should_skip_saving_checkpoint(trainer):
                self._place_in_epoch(trainer)
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        except (NotFinite, OSError) as error:
            rank_zero_warn(f"the last step could not be saved: {error}.")

    def _place_in_epoch(self, trainer: L.Trainer) -> None:
        """Counts the batch in hand as done if an optimizer step was taken on it, and else as not handed out."""
        batch = trainer.fit_loop.epoch_loop.batch_progress
        current: Any = batch.current
        if current.ready > current.processed:
            if trainer.global_step > self._steps:
                batch.increment_processed()
            elif isinstance(trainer.train_dataloader, ResumableLoader):
                trainer.train_dataloader.put_back()

"""Checkpoints and the resolved configuration, as the `lightning` command keeps them beside a run's logs."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from datamodules.atomic_write import write_atomically
from datamodules.base import PromptDataModule
from datamodules.masked import masked
from datamodules.resumable import ResumableLoader, place_in_epoch
from lightning_modules.agents import Agents, NotFinite
from lightning_modules.cli.preemption import Preempted, requeue
from rewards.base import RewardUnavailable

EXIT = 15
"""Seconds to exit after another process has failed; some thread may still wait for a reward server."""


class SaveConfig(SaveConfigCallback):
    """Saves the resolved config once the models are loaded, so that a run that cannot start leaves nothing behind.

    Passwords and tokens in addresses are masked.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Waits for `on_fit_start` or `on_test_start`; raises ValueError if ranks resume from different files."""
        path, first = self.config.get("ckpt_path"), trainer.strategy.broadcast(self.config.get("ckpt_path"))
        if path != first:  # `last` and `best` are looked up by each rank, and another run may be writing its own
            raise ValueError(f"`ckpt_path` is {first} on the first process and {path} on another: name the file.")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes `config.yaml` beside the logs; a job that SLURM has started again names the checkpoint."""
        folder = trainer.log_dir  # asked on every rank: Lightning broadcasts it
        if trainer.is_global_zero and folder is not None:
            if trainer.ckpt_path is not None and self.config.get("ckpt_path") is None:
                found = (one.resumed for one in trainer.checkpoint_callbacks if isinstance(one, Checkpoint))
                self.config["ckpt_path"] = next(found, None)
            text = self.parser.dump(self.config, skip_none=False)
            write_atomically(Path(folder) / self.config_filename, masked(text))

    on_test_start = on_fit_start  # so that a test's scores say which agents they are of


class StepLog(_LoggerConnector):
    """Lightning's writer of logs, which writes a step's numbers before its checkpoint is saved, not after."""

    def on_batch_end(self) -> None:
        """Logs a training step once all hooks have been called, then lets it be saved."""
        super().on_batch_end()
        trainer = self.trainer
        if trainer.training:
            super().update_train_step_metrics()
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, Checkpoint):
                    callback.on_step_logged(trainer, trainer.lightning_module)

    def update_train_step_metrics(self) -> None:
        """Does nothing, as the numbers are logged already."""


class Checkpoint(ModelCheckpoint):
    """Keeps `last.ckpt` true to the last step, also when training ends between two checkpoints.

    A step's checkpoint is saved once its numbers are in the logs, and, where a validation is due after the step, once
    that is made: Lightning saves before both. If the validation is cut off, the step is saved without it, as
    `validation_due`, and a run that goes on from there begins with it.
    """

    _due: tuple[Any, Any, int] | None = None
    """Arguments of the hook that saves the last step, until it has been called."""
    resumed: str | None = None
    """Path of the `last.ckpt` that this run goes on from, also where it was restored from a copy."""
    _validation_due = False
    """True from the end of a step after which a validation is due to the end of that."""
    _steps = 0
    """Optimizer steps before the batch in hand."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes the step that training starts with; its checkpoint is due again if its validation is."""
        super().on_train_start(trainer, pl_module)
        self._steps = trainer.global_step
        self._due = (None, None, -1) if self._validation_due else None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes what to save; saves it now if the trainer does not say when the step is logged."""
        self._steps = trainer.global_step
        self._due = (outputs, batch, batch_idx)
        loop = trainer.fit_loop.epoch_loop
        # Lightning has no public name for the question whether it validates now.
        self._validation_due = loop._should_check_val_fx(trainer.fit_loop._data_fetcher) and not loop.val_loop.skip  # type: ignore[arg-type]
        if not isinstance(trainer._logger_connector, StepLog):
            self.on_step_logged(trainer, pl_module)

    def on_step_logged(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves what is due, unless it waits for a validation."""
        if not self._validation_due:
            self._save_due(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves what was due before this validation."""
        self._validation_due = False
        super().on_validation_end(trainer, pl_module)
        self._save_due(trainer, pl_module)

    def _save_due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._due is not None:
            due, self._due = self._due, None
            super().on_train_batch_end(trainer, pl_module, *due)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves `last.ckpt` unless this very step was saved."""
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Saves; whatever has been logged is on the disk before."""
        for logger in trainer.loggers:
            with suppress(FileNotFoundError):  # of a folder that was deleted, which is no reason to lose the weights
                logger.save()
        signals: Any = trainer._signal_connector  # of a plain trainer, one that never breaks anything off
        signals.saving = True
        try:
            super()._save_checkpoint(trainer, filepath)
        finally:
            signals.saving = False

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Says if a validation is still due at this step."""
        checkpoint["validation_due"] = self._validation_due

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what was saved best, in runs with the same folder of checkpoints, and notes the folder."""
        super().load_state_dict(state_dict)
        self.resumed = str(Path(state_dict["dirpath"], "last.ckpt"))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lets a run that ended within an epoch go on with the next batch of it."""
        self._validation_due = checkpoint.get("validation_due", False)
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
        if kept and isinstance(exception, RewardUnavailable):  # the command's last words
            exception.add_note(f"A fit stops so with its state in {self.last_model_path}: go on with --ckpt_path.")
        elif kept:
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
            by_the_user = isinstance(exception, KeyboardInterrupt | SystemExit)
            if self.save_last and not by_the_user and not self._should_skip_saving_checkpoint(trainer):
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

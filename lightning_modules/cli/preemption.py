"""Preemption: a signal stops a run with a checkpoint of its last finished step, and SLURM starts the job again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from datamodules.atomic_write import replaced_file, replaced_folder
from lightning_modules.agents import Agents
from lightning_modules.distributed import several_processes


class Preempted(BaseException):
    """Raised where a run stops for a signal.

    That may be anywhere in a library, which would catch an `Exception` to make an error of its own of it, or to try
    something else.

    Args:
        signum: number of the signal.
    """

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(f"stopped by {signal.Signals(signum).name}.")


class Signals(_SignalConnector):
    """Handlers of SIGTERM, SIGUSR1 and SLURM's requeue signal, in place of Lightning's, which wait for other processes.

    They note the signal. A fit in several processes stops before the next step, which all begin together; in one
    process it stops at once while it draws or is evaluated, and other commands always do.
    """

    noted = 0
    """Number of the signal; 0 is none."""
    saving = False
    """True while a checkpoint is written, which a signal does not break off."""

    def register_signal_handlers(self) -> None:
        """Takes the signals over from now on."""
        self._original_handlers = self._get_current_signal_handlers()
        self.noted = 0
        for signum in (signal.SIGTERM, signal.SIGUSR1, self.requeue_signal):
            if signum is not None:
                self._register_signal(signum, self._note)

    @property
    def requeue_signal(self) -> signal.Signals | None:
        """Signal upon which this job asks SLURM to start it again; None outside SLURM."""
        environment = self.trainer._accelerator_connector.cluster_environment
        if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
            return None
        return environment.requeue_signal or signal.SIGUSR1

    def _note(self, signum: int, frame: FrameType | None) -> None:
        first, self.noted = not self.noted, self.noted or signum
        trainer = self.trainer
        module = trainer.lightning_module
        draws = isinstance(module, Agents) and module.peers.drawing
        at_once = (draws or not trainer.training) and not self.saving and not several_processes()
        if first and (at_once or trainer.state.fn != TrainerFn.FITTING):
            raise Preempted(signum)


class Preemption(L.Callback):
    """Stops a fit before a step or a validation, and any command before a batch, if it was sent a signal."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops before a step."""
        self.on_validation_start(trainer, pl_module)

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stops an evaluation in which a library has swallowed what the signal's handler raised."""
        alone = trainer.state.fn != TrainerFn.FITTING or not several_processes()  # as in `Signals`
        if (noted := _signals(trainer).noted) and alone:
            raise Preempted(noted)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Asks all processes, which are at the same step here."""
        noted = torch.tensor(_signals(trainer).noted, device=pl_module.device)
        if several_processes():
            dist.all_reduce(noted, dist.ReduceOp.MAX)
        if noted:
            raise Preempted(int(noted))


def requeue(trainer: L.Trainer, preempted: Preempted, checkpoint: str) -> None:
    """Has SLURM start this job again, upon its requeue signal, from a checkpoint; does nothing outside SLURM.

    Args:
        trainer: whose `default_root_dir` is where Lightning looks for what a job goes on from.
        preempted: why the run stops.
        checkpoint: path of its last checkpoint, empty if there is none.
    """
    signum = _signals(trainer).requeue_signal
    if signum is None or not trainer.is_global_zero:
        return
    if checkpoint:
        place = Path(trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir))
        if Path(checkpoint).is_dir():
            with replaced_folder(place) as folder:
                shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        else:
            with replaced_file(place) as file, open(checkpoint, "rb") as saved:
                shutil.copyfileobj(saved, file)
    if preempted.signum == signum:
        array, task = os.getenv("SLURM_ARRAY_JOB_ID"), os.getenv("SLURM_ARRAY_TASK_ID")
        job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
        try:
            subprocess.run(["scontrol", "requeue", job], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            rank_zero_warn(f"job {job} could not be requeued: {error}; submit it again.")


def _signals(trainer: L.Trainer) -> Signals:
    signals = trainer._signal_connector
    assert isinstance(signals, Signals)
    return signals

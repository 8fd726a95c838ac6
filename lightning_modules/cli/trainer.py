"""`Trainer`: Lightning's trainer with a run folder that no other run shares, whatever loggers it has."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.plugins.environments import SLURMEnvironment

from datamodules.atomic_write import remove_strays
from lightning_modules.cli.checkpoint import StepLog
from lightning_modules.cli.loggers import MetricsLogger
from lightning_modules.cli.preemption import Signals

_PROBE = 2**20
"""Bytes written and deleted to see that there is room."""


class FitLoop(_FitLoop):
    """Lightning's fit loop, which also ends a run that was killed behind its last step: it evaluates the agents."""

    @property
    def skip(self) -> bool:
        """True if there is nothing to do; refused beforehand is a run that has come to its end."""
        return self.max_batches == 0 or self.trainer.limit_train_batches == 0

    def reset(self) -> None:
        """Lets a run without a step left log with the number that it would have had after its last one."""
        super().reset()
        if self.done:
            self.epoch_loop._batches_that_stepped += 1


class Trainer(L.Trainer):
    """Lightning's trainer, whose `log_dir` is a folder of this run alone, the same whatever loggers there are."""

    folder: Path | None = None
    """Folder of the run on rank 0, once it is claimed; None on other ranks and for a trial run."""
    _made: tuple[Path, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._signal_connector = Signals(self)
        self._logger_connector = StepLog(self)
        loop = FitLoop(self, self.fit_loop.min_epochs, self.fit_loop.max_epochs)
        loop.epoch_loop, self.fit_loop = self.fit_loop.epoch_loop, loop

    @property
    def log_dir(self) -> str | None:
        """Folder of results, configuration, checkpoints and exports; to be asked on every rank, as it is broadcast."""
        folder: Path | None = self.strategy.broadcast(self.folder)
        if folder is None and not self.fast_dev_run:  # type: ignore[attr-defined]
            return super().log_dir
        return None if folder is None else str(folder)

    def open_folder(self, experiment: str, *, loggers: bool) -> None:
        """Claims the folder `<default_root_dir>/<experiment>/version_N` on rank 0; the other ranks learn it later.

        What killed runs of the experiment left unfinished is removed.

        Args:
            experiment: path of the experiment's folder in the root.
            loggers: log to TensorBoard and `metrics.csv` there.

        Raises:
            ValueError: if nothing can be written there.
        """
        root = self.default_root_dir
        parent = Path(root, experiment)
        below = parent.resolve().is_relative_to(Path(root).resolve())  # nor may a link lead out
        if Path(experiment).is_absolute() or ".." in Path(experiment).parts or not below:
            raise ValueError(f"`experiment` is {experiment}; name a folder below `trainer.default_root_dir`, {root}.")
        if self.is_global_zero:
            for folder in parent.glob("version_*"):
                remove_strays(folder)
                remove_strays(folder / "checkpoints")
            for callback in self.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
                    remove_strays(Path(callback.dirpath))
            self._made = tuple(path for path in (parent, *parent.parents) if not path.exists())
            try:
                self.folder = claim(parent)
                self._made = (self.folder, *self._made)
                with TemporaryFile(dir=self.folder) as file:
                    file.write(bytes(_PROBE))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                self.drop_empty_folder()
                raise ValueError(
                    f"the run's folder cannot be written below {parent}: {error.strerror}; set "
                    "`trainer.default_root_dir` to another folder, or make room there."
                ) from None
            for callback in self.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                    callback.dirpath = str(self.folder / "checkpoints")
        if isinstance(self._accelerator_connector.cluster_environment, SLURMEnvironment):
            # Where Lightning keeps what a requeued job goes on from, and any other job would.
            self._default_root_dir = str(parent / f"slurm_{SLURMEnvironment.job_id()}")
        if loggers:
            # Ranks other than 0 know no version, and write nothing.
            version = None if self.folder is None else int(self.folder.name.removeprefix("version_"))
            self.loggers = [
                TensorBoardLogger(root, name=experiment, version=version, default_hp_metric=False),
                MetricsLogger(root, name=experiment, version=version),
            ]

    def drop_empty_folder(self) -> None:
        """Removes the claimed folder, and those made for it above, as far as they are empty."""
        with suppress(OSError):
            for path in self._made:  # the deepest first
                path.rmdir()


def claim(parent: Path) -> Path:
    """Makes the next folder `version_N`; of processes that do so at the same time each gets another.

    Args:
        parent: folder above, made if it is missing.
    """
    while True:
        parent.mkdir(parents=True, exist_ok=True)
        numbers = [path.name.removeprefix("version_") for path in parent.glob("version_*")]
        number = max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1
        folder = parent / f"version_{number}"
        # Another process has made it, or, giving up its own run, removed the folder above.
        with suppress(FileExistsError, FileNotFoundError):
            folder.mkdir()
            return folder

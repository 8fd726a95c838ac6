"""The `lightning` command: `lightning fit|validate|test|predict --config ...`.

Every run writes to `<trainer.default_root_dir>/<experiment>/version_N/`: TensorBoard events, `metrics.csv`, the
resolved `config.yaml` and `checkpoints/` (with `last.ckpt`).
"""

from __future__ import annotations

import logging
import signal
import sys
import traceback
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import diffusers
import jsonargparse
import lightning as L
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar, TQDMProgressBar, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf.errors import OmegaConfBaseException

from callbacks.dashboard import Dashboard
from callbacks.kept_images import KeepImages
from callbacks.predictions import SavePredictions
from callbacks.progress import RunProgressBar
from callbacks.report import Report
from datamodules.base import PromptDataModule
from datamodules.resumable import ResumableLoader
from lightning_modules.agents import check_precision
from lightning_modules.evaluation import EvaluatedAgents
from lightning_modules.preflight import check as preflight
from lightning_modules.renamed import renamed
from rewards.base import RewardUnavailable

OUR_PACKAGES = ("lightning_modules", "datamodules", "rewards", "callbacks")


class Parser(LightningArgumentParser):
    """Takes no abbreviated options (a misspelt one must not pass for another) and complains in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends with one line instead of the usage text: ours, where a constructor of ours refused its arguments."""
        ours = _raised_by_us(ex or sys.exc_info()[1])
        sys.exit(_complain(renamed(message) or (message if ours is None else str(ours))))

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Parses; jsonargparse hands a null that lies two classes deep on to itself as the text "None"."""
        if args is not None:
            args = [f"{arg[:-4]}null" if arg.startswith("--") and arg.endswith("=None") else arg for arg in args]
        return super().parse_args(args, *more, **kwargs)


class SaveConfig(SaveConfigCallback):
    """Saves the resolved config once the models are loaded, so that a run that cannot start leaves nothing behind."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Waits for `on_fit_start` or `on_test_start`."""

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
        if self.save_last and trainer.global_step != self._last_global_step_saved:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Saves `last.ckpt` when scores cannot be had: the step that lacked them is the first after a resume."""
        super().on_exception(trainer, pl_module, exception)
        fitting = trainer.state.fn == TrainerFn.FITTING and trainer.global_step > 0
        if fitting:
            self._save_due(trainer, pl_module)
        if isinstance(exception, RewardUnavailable) and fitting and self.save_last:
            if trainer.training and isinstance(trainer.train_dataloader, ResumableLoader):
                trainer.train_dataloader.put_back()
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class PromptRLCLI(LightningCLI):
    """LightningCLI with the house's defaults: run folders, checkpoints, `${...}` resolved after merging."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `experiment` (name of the run folder), `checkpoint` (what is kept) and `preflight` (see there)."""
        parser.add_argument("--experiment", type=str, default="default", help="name of the run folder")
        said = "if a fit's weights and optimizer cannot fit the device: stop, warn, or do not look"
        parser.add_argument("--preflight", type=preflight.Mode, default="stop", help=said)
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "trainer.default_root_dir": "runs"})

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Adds `predictions` and `images` (where they go, how many) to `lightning predict` and `lightning test`."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_lightning_class_args(SavePredictions, "predictions")
            parser.set_defaults({"return_predictions": False})  # they are on the disk; thousands would fill the memory
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # the benchmarks print what they found
        if subcommand == "test":
            parser.add_lightning_class_args(KeepImages, "images")
        return parser

    def _parse_ckpt_path(self) -> None:
        """Lets no checkpoint override the configuration: Lightning would take its hyperparameters silently."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Gives the trainer two loggers in one run folder and a bar over the run, unless configured otherwise."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        if self.subcommand == "predict":
            kwargs["logger"] = False  # there is nothing to log, and no run folder to fill
        elif config["trainer"]["logger"] in (None, True):
            root, name = config["trainer"]["default_root_dir"], config["experiment"]
            tensorboard = TensorBoardLogger(root, name=name, default_hp_metric=False)
            # One version for both, so that one folder holds all of a run.
            kwargs["logger"] = [tensorboard, CSVLogger(root, name=name, version=tensorboard.version)]
        trainer: Any = super().instantiate_trainer(**kwargs)
        bars = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]
        if [type(bar) for bar in bars] in ([TQDMProgressBar], [RichProgressBar]):  # Lightning's default, not a choice
            trainer.callbacks[trainer.callbacks.index(bars[0])] = RunProgressBar()
        if self.subcommand == "fit":
            trainer.callbacks.append(Dashboard())
        if self.subcommand != "predict":
            trainer.callbacks.append(Report())  # the last one, which reads what the others leave
        return cast(L.Trainer, trainer)

    @property
    def _checkpoint_path(self) -> str | None:
        """The file that `ckpt_path` names, if it names one rather than "last" or "best"."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        path: str | None = config.get("ckpt_path")
        return None if path in (None, "last", "best", "hpc") else path

    def before_instantiate_classes(self) -> None:
        """Refuses a checkpoint that cannot be read before anything is built or written."""
        path = self._checkpoint_path
        if path is not None and not zipfile.is_zipfile(path):
            what = "which is no checkpoint" if Path(path).is_file() else "but there is no such file"
            raise ValueError(f"`ckpt_path` is {path}, {what}; give a .ckpt of an earlier run.")

    def before_fit(self) -> None:
        """Loads models, reads prompts and compares the checkpoint before the trainer opens a run folder."""
        if isinstance(self.datamodule, PromptDataModule):
            self.datamodule.setup(str(self.subcommand))
        if self.subcommand == "fit":
            if isinstance(self.model, EvaluatedAgents):
                self.model.require_learner()
                check_precision(self.trainer.precision)
            preflight.check(self.model, self.datamodule, self.trainer, self.config["fit"]["preflight"])
        self.model.configure_model()
        self.model.setup(str(self.subcommand))
        if self._checkpoint_path is not None:
            checkpoint = torch.load(self._checkpoint_path, map_location="cpu", mmap=True)
            averages = any(isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
            if self.subcommand == "fit" and "current_model_state" in checkpoint and not averages:
                raise ValueError(
                    f"{self._checkpoint_path} was saved with a moving average, from which training would go on; resume "
                    "with callbacks.ema.EMA in `trainer.callbacks`."
                )
            self.model.on_load_checkpoint(checkpoint)

    before_validate = before_test = before_fit

    def before_predict(self) -> None:
        """Opens no run folder, so it leaves loading to the trainer, behind the check of the images' folder."""
        if not isinstance(self.model, EvaluatedAgents) or not isinstance(self.datamodule, PromptDataModule):
            raise ValueError(
                f"`lightning predict` draws prompts, but this configuration has {type(self.model).__name__} and "
                f"{type(self.datamodule).__name__}: use one of PromptRL."
            )


def main(args: list[str] | None = None) -> None:
    """Entry point of the `lightning` script.

    Errors raised on purpose by this project's own code end in one line; any other keeps its traceback.
    """
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    quieten()
    try:
        PromptRLCLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={"parser_mode": "omegaconf+"},
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=42,
            args=args,
        )
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)  # as shells say it; Lightning would end as if the run were complete
    except OmegaConfBaseException as error:
        sys.exit(_complain(f"in the configuration: {str(error).splitlines()[0]}"))
    except RewardUnavailable as error:
        sys.exit(_complain(f"{error} A fit stops so with its state in checkpoints/last.ckpt: go on with --ckpt_path."))
    except ValueError as error:
        ours = _raised_by_us(error)
        if ours is None:
            raise
        sys.exit(_complain(str(ours)))


def _complain(message: str) -> int:
    print(f"lightning: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _raised_by_us(error: BaseException | None) -> ValueError | None:
    """The first ValueError in a chain of exceptions whose innermost frame is in one of our packages."""
    while error is not None:
        frames = list(traceback.walk_tb(error.__traceback__))
        package = frames[-1][0].f_globals.get("__name__", "").split(".")[0] if frames else ""
        if isinstance(error, ValueError) and package in OUR_PACKAGES:
            return error
        error = error.__cause__ or error.__context__
    return None


def quieten() -> None:
    """Silences notices that a user of this project can do nothing about."""
    # Among them one line per caption that is longer than CLIP's 77 tokens: FLUX.1 reads the whole text by T5.
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated.*")
    warnings.filterwarnings("ignore", message="Found .* module\\(s\\) in eval mode.*")  # ours stay so on purpose
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*logging interval.*")
    warnings.filterwarnings("ignore", message="Total length of `DataLoader` across ranks is zero.*")  # all predicted
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization.*")
    warnings.filterwarnings("ignore", message="The dirpath has changed from.*")
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty.*")


if __name__ == "__main__":
    main()

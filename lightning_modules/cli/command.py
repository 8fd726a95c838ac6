"""The parser of the `lightning` command, and what it builds: trainer, loggers, checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, cast

import jsonargparse
import lightning as L
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from callbacks.benchmark import Benchmark
from callbacks.dashboard import Dashboard
from callbacks.kept_images import KeepImages
from callbacks.page import Page
from callbacks.predictions import SavePredictions
from callbacks.progress import RunProgressBar
from callbacks.record import Record
from callbacks.report import Report
from callbacks.run_config import resolved_config
from datamodules.base import PromptDataModule
from datamodules.local_path import local_path
from datamodules.typed import TypedPrompts
from lightning_modules.agents import Agents, check_precision
from lightning_modules.checkpoints import CheckpointIO, check_whole, is_checkpoint, read
from lightning_modules.cli import earlier_checkpoints
from lightning_modules.cli.checkpoint import Checkpoint
from lightning_modules.cli.closing import closing
from lightning_modules.cli.errors import complain, raised_by_us
from lightning_modules.cli.loggers import open_loggers
from lightning_modules.cli.preemption import Preemption
from lightning_modules.cli.prompts import TEXTS, split_prompts
from lightning_modules.cli.refusals import check_something_to_train, check_trainer, refused_by_lightning
from lightning_modules.cli.renamed import renamed
from lightning_modules.cli.texts import escaped, read_as_mapping, texts_as_configs
from lightning_modules.cli.trainer import Trainer
from lightning_modules.evaluation import EvaluatedAgents
from lightning_modules.policies.pipeline import PipelinePolicy
from lightning_modules.preflight.check import Mode, check


class Parser(LightningArgumentParser):
    """Takes no abbreviated options (a misspelt one must not pass for another) and complains in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends with one line instead of the usage text: ours, where a constructor of ours refused its arguments."""
        ours = raised_by_us(ex or sys.exc_info()[1])
        sys.exit(complain(renamed(message) or read_as_mapping(message) or (message if ours is None else str(ours))))

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Parses; jsonargparse hands a null that lies two classes deep on to itself as the text "None"."""
        args, texts = split_prompts(sys.argv[1:] if args is None else args)
        args = [f"{arg[:-4]}null" if arg.startswith("--") and arg.endswith("=None") else arg for arg in args]
        parsed = super().parse_args(texts_as_configs(args), *more, **kwargs)
        for option, given in texts.items():
            parsed.predict[option] = given
        return parsed

    def dump(self, namespace: jsonargparse.Namespace, *args: Any, **kwargs: Any) -> str:
        """Writes a configuration so that its texts stay what they are when it is read again.

        To resolve `${...}` jsonargparse dumps a configuration with its links, first the whole of it, then for each
        class (whose parser has no header) what has been resolved already.
        """
        if bool(self.dump_header) == kwargs.get("skip_link_targets", True):
            namespace = escaped(namespace)
        return super().dump(namespace, *args, **kwargs)


class PromptRLCLI(LightningCLI):
    """LightningCLI with the house's defaults: run folders, checkpoints, refusals before models are loaded."""

    wanted: str | None = None
    """The one subcommand whose options are built; None builds all four, which takes four times as long."""
    texts: Mapping[str, Sequence[str]] = MappingProxyType({})
    """Prompts for `lightning predict` to draw in place of the data's, and their images; see `split_prompts`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Names the subcommands, and the arguments of the trainer's methods that are no options."""
        known = LightningCLI.subcommands()
        return {name: skipped for name, skipped in known.items() if PromptRLCLI.wanted in (None, name)}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `experiment` (name of the run folder), `checkpoint` (what is kept) and `preflight` (see there)."""
        parser.add_argument("--experiment", type=str, default="default", help="name of the run folder")
        said = "if a fit's weights and optimizer cannot fit the device: stop, warn, or do not look"
        parser.add_argument("--preflight", type=Mode, default="stop", help=said)
        said = "loggers beside the run's TensorBoard and metrics.csv, such as lightning.pytorch.loggers.WandbLogger"
        parser.add_argument("--loggers", type=list[Logger], default=[], help=said)
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "trainer.default_root_dir": "runs"})
        # Lightning's table of parameters counts other things than the preflight's, and its FLOPs are 0.
        parser.set_defaults({"trainer.enable_model_summary": False})

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Adds `prompt`, `image` and `predictions` to `lightning predict`, and `images` to `lightning test`."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            said = "prompts to draw in place of the data's: `--prompt TEXT` for each, or a list"
            parser.add_argument("--prompt", type=list[str], default=[], help=said)
            said = "source images of the prompts, for models that edit: `--image FILE` once for all, or for each"
            parser.add_argument("--image", type=list[str], default=[], help=said)
            parser.add_lightning_class_args(SavePredictions, "predictions")
            parser.set_defaults({"return_predictions": False})  # they are on the disk; thousands would fill the memory
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # the benchmarks print what they found
        if subcommand == "test":
            parser.add_lightning_class_args(KeepImages, "images")
        return parser

    def _add_instantiators(self) -> None:
        """Leaves out what would write the configuration out again for `save_hyperparameters`, in 0.4 s: nobody asks."""

    def _parse_ckpt_path(self) -> None:
        """Lets no checkpoint override the configuration: Lightning would take its hyperparameters silently."""

    def instantiate_classes(self) -> None:
        """Says in one sentence what Lightning refuses of the trainer's settings, and which package is missing."""
        options, loggers = self._options, self._options["loggers"]
        options["loggers"] = []  # they are built once there is a folder for them
        try:
            super().instantiate_classes()
            options["loggers"] = loggers
        except (ImportError, MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
            said = None if raised_by_us(error) else refused_by_lightning(error, self._options)
            if said is None:
                raise
            raise ValueError(said) from error

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Adds a bar over the run, unless another is configured, and the callbacks that every run of ours has."""
        if self.subcommand == "predict" or self._own_loggers:
            kwargs["logger"] = False  # a prediction has nothing to log; the others get theirs with the run folder
        parser, options = self._parser(self.subcommand), self._options["trainer"]
        left_out = ["checkpoint"] if options["enable_checkpointing"] is False else []
        if options["fast_dev_run"]:  # a trial run keeps nothing, least of all where other runs look for theirs
            left_out += ["images", "predictions"]
        parser.callback_keys = [key for key in parser.callback_keys if key not in left_out]
        trainer: Any = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointIO()
        bars = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]
        if [type(bar) for bar in bars] in ([TQDMProgressBar], [RichProgressBar]):  # Lightning's default, not a choice
            trainer.callbacks[trainer.callbacks.index(bars[0])] = RunProgressBar()
        if self.subcommand == "fit":
            trainer.callbacks.append(Dashboard())
        trainer.callbacks.append(Preemption())
        if self.subcommand != "predict":
            trainer.callbacks += [Record(), Report()]
        if not options["fast_dev_run"]:
            trainer.callbacks.append(Page())  # the last one, which reads what the others leave
        return cast(L.Trainer, trainer)

    @property
    def _options(self) -> Any:
        return self.config[self.subcommand] if self.subcommand else self.config

    @property
    def _own_loggers(self) -> bool:
        trainer = self._options["trainer"]
        return trainer["logger"] in (None, True) and not trainer["fast_dev_run"] and not trainer["barebones"]

    @property
    def _checkpoint_path(self) -> str | None:
        """The file that `ckpt_path` names, if it names one."""
        path: str | None = self._options.get("ckpt_path")
        return None if path in (None, "hpc") else path

    def before_instantiate_classes(self) -> None:
        """Finds the checkpoint, and refuses one that cannot be read before anything is built or written."""
        options = self._options
        if self.subcommand == "predict":  # out of the configuration, where `{}` and `${}` would mean something
            self.texts = {name: options.pop(name) for name in TEXTS}
        local_path(options["trainer"]["default_root_dir"] or "", "trainer.default_root_dir")
        local_path(options["experiment"], "experiment")
        experiment = Path(options["trainer"]["default_root_dir"] or "", options["experiment"]).expanduser()
        kept = options["checkpoint"]
        if options.get("ckpt_path") == "last":
            options["ckpt_path"] = str(earlier_checkpoints.last(experiment, kept["dirpath"]))
        elif options.get("ckpt_path") == "best":
            options["ckpt_path"] = str(earlier_checkpoints.best(experiment, kept["dirpath"], kept["monitor"]))
        path = self._checkpoint_path
        if path is not None and not is_checkpoint(path):
            what = "which is no checkpoint" if Path(path).exists() else "but there is no such file"
            raise ValueError(f"`ckpt_path` is {path}, {what}; give a .ckpt of an earlier run.")
        if path is not None:
            check_whole(path)
            checkpoint = read(path, record_only=True)
            if not all(isinstance(checkpoint.get(part), dict) for part in ("loops", "state_dict")):
                raise ValueError(f"`ckpt_path` is {path}, which is no checkpoint; give a .ckpt of an earlier run.")
        if path is None and self.subcommand != "fit":
            rank_zero_warn("no `--ckpt_path` is given: the base model is evaluated, not one that a fit has trained.")

    def after_instantiate_classes(self) -> None:
        """Refuses precisions that train wrongly, or cannot take prompts; fp16 by autocast can evaluate."""
        precision = self.trainer.precision
        if isinstance(self.model, EvaluatedAgents) and (self.subcommand == "fit" or "mixed" not in str(precision)):
            check_precision(precision)

    def before_fit(self) -> None:
        """Reads prompts, claims the run folder and loads models; a run that cannot start leaves nothing behind."""
        if isinstance(self.datamodule, PromptDataModule):
            self.datamodule.setup(str(self.subcommand))
        path = self._checkpoint_path
        checkpoint = None if path is None else read(path, record_only=True)
        if self.subcommand == "fit":
            check_trainer(self.trainer, self.model, self.datamodule)
            scored = any(isinstance(callback, Benchmark) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
            # `Report` writes it last of all; a checkpoint kept elsewhere may be of any run.
            ended = not scored or path is None or (Path(path).resolve().parents[1] / "results.md").is_file()
            check_something_to_train(self.trainer, checkpoint, ended=ended)
        trainer = cast(Trainer, self.trainer)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.open_folder(self._options["experiment"], loggers=self._own_loggers)
        try:
            if trainer.folder is not None and self._options["loggers"] and not trainer.barebones:
                more = open_loggers(self._options["loggers"], trainer.folder, resolved_config(trainer))
                trainer.loggers = [*trainer.loggers, *more]
            self._load(checkpoint)
        except BaseException:
            trainer.drop_empty_folder()
            raise

    def _load(self, checkpoint: dict[str, Any] | None) -> None:
        """Loads the models and compares the checkpoint with them."""
        if self.subcommand == "fit":
            check(self.model, self.datamodule, self.trainer, self._options["preflight"])
        if isinstance(self.model, Agents):
            self.model.load(self.trainer.strategy, fits=self.subcommand == "fit")
        else:
            self.model.configure_model()
        self.model.setup(str(self.subcommand))
        if checkpoint is not None:
            averages = any(isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
            if self.subcommand == "fit" and "current_model_state" in checkpoint and not averages:
                raise ValueError(
                    f"{self._checkpoint_path} was saved with a moving average, from which training would go on; resume "
                    "with callbacks.ema.EMA in `trainer.callbacks`."
                )
            self.model.on_load_checkpoint(checkpoint)

    before_validate = before_test = before_fit

    def say_where_things_are(self) -> None:
        """Prints the last lines of a run, unless it has no folder of its own."""
        folder, prompt = cast(Trainer, self.trainer).folder, None
        if folder is None:  # predictions, trial runs, ranks other than 0
            return
        if self.subcommand == "fit" and isinstance(self.datamodule, PromptDataModule):
            prompt = next((sample.asked for sample in self.datamodule.training_set), None)
        print(closing(folder, Path(self._options["trainer"]["default_root_dir"] or ""), prompt))

    def before_predict(self) -> None:
        """Opens no run folder, so it leaves loading to the trainer, behind the check of the images' folder."""
        if not isinstance(self.model, EvaluatedAgents) or not isinstance(self.datamodule, PromptDataModule):
            raise ValueError(
                f"`lightning predict` draws prompts, but this configuration has {type(self.model).__name__} and "
                f"{type(self.datamodule).__name__}: use one of PromptRL."
            )
        data, flow = self.datamodule, self.model.flow
        prompts, images = self.texts["prompt"], self.texts["image"]
        if images and not prompts:
            raise ValueError("`--image` is given without `--prompt`: say what to draw from it.")
        if images and isinstance(flow, PipelinePolicy) and not flow.edits:
            raise ValueError(
                f"`--image` is given, but {type(flow).__name__} draws from text alone: leave it out, or use the "
                "configuration of a model that edits images."
            )
        if not prompts:
            return
        file = getattr(data, "predict_file", None)
        if file is not None:
            raise ValueError(f"`--prompt` and `data.predict_file` ({file}) are both given: keep one.")
        self.datamodule = TypedPrompts(
            prompts, images, eval_batch_size=data.eval_batch_size, seed=data.seed, num_workers=data.num_workers
        )

    def after_predict(self) -> None:
        """Says where the images are."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SavePredictions) and self.trainer.is_global_zero:
                print(callback.summary())

"""Settings of the trainer that cannot work, refused in one sentence before models are loaded."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Mapping
from typing import Any

import lightning as L

from datamodules.base import PromptDataModule
from datamodules.resumable import place_in_epoch
from lightning_modules.agents import check_strategy
from lightning_modules.evaluation import EvaluatedAgents

_UNNAMED = {
    "gpu backend": "accelerator",
    "torch_xla": "accelerator",
    "requested gpu": "devices",
    "DeepSpeed": "strategy",
}
"""Words of Lightning's messages that do not name the setting -> the setting."""


def refused_by_lightning(error: BaseException | None, options: Mapping[str, Any] | None = None) -> str | None:
    """Returns one sentence for a setting that Lightning refuses, or that needs a package which is missing.

    Args:
        error: what was raised while the trainer and its parts were built, or later by Lightning.
        options: the configuration, for the values; None leaves them out.

    Returns:
        None for an error of another origin, which keeps its traceback.
    """
    values: dict[str, Any] = {} if options is None else dict(options["trainer"])
    names: list[str] = []
    while error is not None:
        text = " ".join(str(error).split())
        for path in re.findall(r"class_path '([\w.]+)'", text):
            names += [name for name, value in values.items() if path in str(value)]
        frames = list(traceback.walk_tb(error.__traceback__))
        module = frames[-1][0].f_globals.get("__name__", "") if frames else ""
        if isinstance(error, ImportError) or module.partition(".")[0] == "lightning":
            break
        error = error.__cause__ or error.__context__
    else:
        return None
    names += [name for name in inspect.signature(L.Trainer).parameters if re.search(rf"\b{name}\b", text)]
    names += [name for words, name in _UNNAMED.items() if words in text]
    short = {name: f" ({value})" for name, value in values.items() if isinstance(value, str | int | float)}
    shown = [f"`trainer.{name}`{short.get(name, '')}" for name in dict.fromkeys(names)]
    if options is not None and "://" in str(options["checkpoint"]["dirpath"]):
        shown.append(f"`checkpoint.dirpath` ({options['checkpoint']['dirpath']})")
    return f"{', '.join(shown) or 'the configuration'} cannot be used: {text}"


def check_trainer(trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule) -> None:
    """Raises ValueError for settings that Lightning would refuse, or ignore, after the models are loaded."""
    if isinstance(model, EvaluatedAgents):
        model.require_learner()
        check_strategy(trainer.strategy)
    if not model.automatic_optimization:
        for name in ("gradient_clip_val", "gradient_clip_algorithm"):
            if getattr(trainer, name):
                raise ValueError(
                    f"`trainer.{name}` is set, but each agent's gradient is clipped on its own: "
                    "leave it out, and set `max_grad_norm` of `model.flow` and `model.language`."
                )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"`trainer.accumulate_grad_batches` is {trainer.accumulate_grad_batches}, but a step takes its whole "
                "batch: leave it out, and set `data.batch_size` and the agents' `micro_batch_size`."
            )
    if not isinstance(data, PromptDataModule):
        return
    overfit: float = trainer.overfit_batches  # type: ignore[attr-defined]
    if overfit:
        raise ValueError(
            f"`trainer.overfit_batches` is {overfit}, with which training cannot resume: leave it out, "
            "and give fewer training prompts."
        )
    data.trainer = trainer
    data.processes_per_group = getattr(model, "processes_per_group", 1)
    steps = len(data.train_dataloader())  # raises ValueError for too few prompts
    limit = trainer.limit_train_batches
    steps = min(steps, limit) if isinstance(limit, int) else int(steps * limit)
    if limit and not steps:
        raise ValueError(
            f"nothing to train: `trainer.limit_train_batches` is {limit}, less than a step; set it higher."
        )
    every = getattr(trainer, "val_check_interval", None)  # not there if it is a time
    by_epoch = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches
    if by_epoch and isinstance(every, int) and not isinstance(every, bool) and every > steps:
        raise ValueError(
            f"`trainer.val_check_interval` is {every}, but an epoch has {steps} steps: set "
            f"`trainer.check_val_every_n_epoch` to null, or the interval to {steps} or fewer."
        )


def check_something_to_train(trainer: L.Trainer, checkpoint: dict[str, Any] | None, *, ended: bool = True) -> None:
    """Raises ValueError if a fit would end before its first step, but for a last validation that it still lacks.

    Args:
        trainer: knows where training ends.
        checkpoint: what the fit resumes from, if it does.
        ended: False if the run that the checkpoint is of was cut off before its results were complete.
    """
    step = epochs = 0
    start = "training begins"
    if checkpoint is not None:
        if "optimizer_states" not in checkpoint:
            raise ValueError(
                "`ckpt_path` names a checkpoint with weights alone (`checkpoint.save_weights_only`), from which no fit "
                "can go on: evaluate it, or give another."
            )
        loop = checkpoint["loops"]["fit_loop"]
        place_in_epoch(loop)
        step, epochs = checkpoint["global_step"], loop["epoch_progress"]["current"]["processed"]
        start = f"the checkpoint is of step {step}, epoch {epochs}"
    ends = {
        "max_steps": trainer.max_steps != -1 and step >= trainer.max_steps,
        "max_epochs": trainer.max_epochs not in (None, -1) and epochs >= trainer.max_epochs,
        "limit_train_batches": trainer.limit_train_batches == 0,
    }
    name = next((name for name, reached in ends.items() if reached), None)
    if name is not None and trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ValueError(f"nothing to train: {start}, where `trainer.fast_dev_run` ends; leave one of the two out.")
    if name is not None and (ended or not trainer.limit_val_batches or name == "limit_train_batches"):
        raise ValueError(
            f"nothing to train: {start}, and `trainer.{name}` is {getattr(trainer, name)}; set it higher, or evaluate "
            "with `lightning validate` or `lightning test`."
        )

"""`EMA`: exponential moving average of the trained weights, used by evaluation and export and not by training."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_modules.agents import Agents
from lightning_modules.policies.sharding import copy_part
from rewards.arguments import check_minimum


class EMA(EMAWeightAveraging):
    """Lightning's weight averaging, restricted to trained weights.

    Lightning's own copies the whole module, text encoders and all, and cannot resume from checkpoints that hold trained
    weights only. Here validations draw with the average, training never sees it, a checkpoint's `state_dict` is the
    average (so `lightning test` and `predict` use it) and a resumed run has both. At the end of a fit the module is
    left with the average: list this callback before `callbacks.export.Export` to export it (exports during training,
    `every_n_train_steps`, are of the weights in training). Resume with this callback still in the configuration.

    Args:
        decay: share of the average that a step keeps, 0..1.
        update_every_n_steps: steps between two updates of the average.
        device: where the average is kept; null is where the module is at the start, the CPU.
    """

    def __init__(self, decay: float = 0.99, update_every_n_steps: int = 1, device: str | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA has decay={decay}, use 0 or more and less than 1.")
        check_minimum("EMA", 1, update_every_n_steps=update_every_n_steps)
        super().__init__(device, use_buffers=False, decay=decay, update_every_n_steps=update_every_n_steps)
        self._swapped = False

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Returns True if another `update_every_n_steps` steps are complete; a rollout may take several at once."""
        if step_idx is None:
            return False
        every = self.update_every_n_steps
        return (step_idx + 1) // every > self._latest_update_step // every

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Starts the average at the weights before training."""
        if stage == "fit":
            pl_module.configure_model()
            self._average_model = _TrainedAverage(
                _trained(pl_module), device=self._device or pl_module.device, use_buffers=False, **self._kwargs
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Overrides Lightning's copy of the average: a checkpoint of the last step is about to be written."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Swaps the weights back if validation broke off, before checkpoint callbacks, which come last, save them."""
        if self._swapped:
            if isinstance(pl_module, Agents):
                pl_module.release()  # nothing is gathered again: other processes may have failed
            self._swap_models(pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copies the average into the module."""
        self._copy_average_to_current(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the average into `state_dict`, and the weights that training goes on with beside it."""
        if self._average_model is None:
            return
        names = [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad]
        checkpoint["current_model_state"] = {name: checkpoint["state_dict"][name] for name in names}
        average = dict(zip(names, self._average_model.module.parameters(), strict=True))
        checkpoint["state_dict"] = {name: parameter.detach() for name, parameter in average.items()}
        checkpoint["averaging_state"] = {"n_averaged": self._average_model.n_averaged}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores the average from `state_dict` and, for training, the weights saved beside it."""
        if self._average_model is None or "current_model_state" not in checkpoint:
            return
        named = {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
        with torch.no_grad():
            for (name, current), average in zip(named.items(), self._average_model.module.parameters(), strict=True):
                copy_part(average, checkpoint["state_dict"][name])
                copy_part(current, checkpoint["current_model_state"][name])
        self._average_model.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])

    def _swap_models(self, pl_module: L.LightningModule) -> None:
        with pl_module.in_shards() if isinstance(pl_module, Agents) else nullcontext():
            super()._swap_models(_trained(pl_module))  # type: ignore[arg-type]
        self._swapped = not self._swapped

    def _copy_average_to_current(self, pl_module: L.LightningModule) -> None:
        super()._copy_average_to_current(_trained(pl_module))  # type: ignore[arg-type]


class _TrainedAverage(AveragedModel):
    """Average of the trained parameters of the module that it is updated with."""

    def update_parameters(self, model: nn.Module) -> None:
        super().update_parameters(_trained(model))


def _trained(module: nn.Module) -> nn.ParameterList:
    return nn.ParameterList([parameter for parameter in module.parameters() if parameter.requires_grad])

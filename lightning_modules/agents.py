"""`Agents`: LightningModule of a flow model and a refiner (loading, optimizer, checkpoints)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from lightning_modules.peers import Peers
from lightning_modules.policies.flow import FlowPolicy
from lightning_modules.policies.language import LanguagePolicy
from rewards.arguments import check_minimum


class NotFinite(ValueError):
    """Raised if training cannot go on because losses, gradients or weights are not finite; the run stops."""


class Agents(L.LightningModule):
    """A flow model and, unless it is null, a refiner.

    Args:
        flow: the image model.
        language: the refiner, or null.
        optimizer: gets one parameter group per learning agent.
        lr_scheduler: one of torch's schedules of the learning rates, which counts optimizer steps; null is constant.
        warmup_steps: optimizer steps over which the learning rates also rise linearly from near 0.
    """

    def __init__(
        self,
        flow: FlowPolicy,
        language: LanguagePolicy | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold what is trained; on_load_checkpoint compares the names
        self.flow = flow
        self.language = language
        self.optimizer = optimizer
        check_minimum("model", 0, warmup_steps=warmup_steps)
        self.lr_scheduler = lr_scheduler
        self.warmup_steps = warmup_steps
        self.peers = Peers()
        self.num_rollouts = 0
        """Images drawn for training so far, over all ranks."""

    # --- set-up ---------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[L.Callback]:
        """Has several processes watch one another, ahead of all other callbacks; adds none behind them."""
        if self.trainer.world_size > 1 and self.peers not in self.trainer.callbacks:  # type: ignore[attr-defined]
            self.trainer.callbacks.insert(0, self.peers)  # type: ignore[attr-defined]
        return []

    def configure_model(self) -> None:
        """Loads the weights of both agents."""
        self.flow.load()
        if self.flow.trained and not self.flow.sampling.sde_steps:
            raise ValueError(
                "`flow.sampling.sde_steps` is empty, so the flow model has nothing to learn from; add some."
            )
        if self.language is not None:
            self.language.load()

    def on_fit_start(self) -> None:
        """Raises ValueError for precisions that would train wrongly in silence."""
        check_precision(self.trainer.precision)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Makes one optimizer with a parameter group per learning agent, and its schedule of learning rates."""
        self.require_learner()
        optimizer = self.optimizer([agent.parameter_group() for agent in self._learners()])
        if self.lr_scheduler is None and not self.warmup_steps:
            return optimizer
        schedule = torch.optim.lr_scheduler
        made = [] if self.lr_scheduler is None else [self.lr_scheduler(optimizer)]
        if any(isinstance(one, schedule.ReduceLROnPlateau) for one in made):
            raise ValueError(
                "`model.lr_scheduler` is ReduceLROnPlateau, which waits for a loss; use one that counts steps."
            )
        if self.warmup_steps:
            first = 1 / self.warmup_steps
            made.append(schedule.LinearLR(optimizer, first, total_iters=max(1, self.warmup_steps - 1)))
        return {"optimizer": optimizer, "lr_scheduler": schedule.ChainedScheduler(made, optimizer)}

    def require_learner(self) -> None:
        """Raises a ValueError if nothing can be trained; evaluation does without."""
        if not self._learners():
            raise ValueError("nothing learns: set a learning_rate for `model.flow` or for `model.language`.")

    def _learners(self) -> list[FlowPolicy | LanguagePolicy]:
        agents = [self.flow, self.language]
        return [agent for agent in agents if agent is not None and agent.trained]

    # --- checkpoints: trained weights only ----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reduces a checkpoint to the trained weights, and adds the count of rollouts.

        Raises:
            NotFinite: if one of them is not finite, before an earlier checkpoint is written over.
        """
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["num_rollouts"] = self.num_rollouts
        check_finite(checkpoint["state_dict"])
        check_finite(checkpoint.get("current_model_state", {}))  # beside a moving average

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError for a checkpoint of other agents, which non-strict loading would let pass in silence."""
        self.num_rollouts = checkpoint.get("num_rollouts", 0)
        if self.flow.network is None:
            return
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        wrong = trained.symmetric_difference(checkpoint["state_dict"])
        if wrong:
            raise ValueError(
                f"the checkpoint does not fit this configuration: {len(wrong)} trained weights differ, for example "
                f"{min(wrong)}; use the agents, LoRA settings and learning rates that it was trained with."
            )


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raises NotFinite if a weight is not."""
    wrong = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if wrong:
        raise NotFinite(
            f"{len(wrong)} of {len(weights)} trained weights are not finite, for example {wrong[0]}, so they are not "
            "saved; go on from the last checkpoint with a lower learning rate."
        )


def check_precision(precision: str | int) -> None:
    """Raises a ValueError for precisions other than fp32 and bf16-mixed.

    fp16 scales its losses, and clipping would see scaled gradients; the "true" ones convert inputs, which are prompts.
    """
    if str(precision) not in ("32-true", "32", "bf16-mixed", "bf16"):
        raise ValueError(
            f"`trainer.precision` is {precision}, which PromptRL does not train in; use bf16-mixed, or 32-true with "
            "the agents' own `dtype`."
        )

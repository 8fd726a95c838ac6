"""`Agents`: LightningModule of a flow model and a refiner (loading, optimizer, checkpoints)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_modules.distributed import average_gradients, gather_lists, local_part, several_processes
from lightning_modules.peers import Peers
from lightning_modules.policies.flow import FlowPolicy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.sharded import Sharded
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
        self._gathered: ExitStack | None = None
        self._saved_copies: dict[str, dict[str, Tensor]] = {}
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
        """Loads the weights of both agents and, under the strategy `sharded`, shares them out over the processes.

        A process whose weights come from the first one loads none; the command loads before processes have met.
        """
        trainer = self._trainer
        self.load(None if trainer is None else trainer.strategy, fits=trainer is None or _fits(trainer))
        if trainer is None or not _fits(trainer):
            return
        strategy = trainer.strategy
        check_strategy(strategy)
        if isinstance(strategy, Sharded):
            compute = torch.bfloat16 if str(trainer.precision) in ("bf16-mixed", "bf16") else None
            for agent in self._learners():
                agent.shard(strategy.shards, strategy.root_device, compute)
        elif isinstance(strategy, DDPStrategy) and self._learners():
            self._leave_out_of_buckets()

    def load(self, strategy: Strategy | None = None, *, fits: bool = True) -> None:
        """Loads both agents.

        Args:
            strategy: of the trainer.
            fits: False if it evaluates, for which every process has all weights.
        """
        empty = {"weights": False} if fits and isinstance(strategy, Sharded) and strategy.global_rank > 0 else {}
        self.flow.load(**empty)
        if self.language is not None:
            self.language.load(**empty)

    def _leave_out_of_buckets(self) -> None:
        """Has DDP make no buckets and broadcast nothing: gradients are averaged here, in place, once a step.

        Its buckets are as large as all gradients, and would never be used. It insists on one parameter.
        """
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        smallest = min(trained, key=lambda name: trained[name].numel())
        names = {name for name, _ in [*self.named_parameters(), *self.named_buffers()]} - {smallest}
        self._ddp_params_and_buffers_to_ignore = names

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Context manager: every process has all weights of both agents; to enter it is a collective."""
        with ExitStack() as stack:
            for agent in self._learners() if self._trainer is not None and _fits(self.trainer) else ():
                stack.enter_context(agent.gathered())
            yield

    def on_validation_start(self) -> None:
        """Gathers sharded weights, since processes have different numbers of prompts."""
        self._gather()

    def on_validation_end(self) -> None:
        """Returns to shards."""
        self.release()

    def release(self) -> None:
        """Returns the weights that a validation has gathered to shards; no collective."""
        if self._gathered is not None:
            self._gathered.close()
        self._gathered = None

    def _gather(self) -> None:
        self._gathered = ExitStack()
        self._gathered.enter_context(self.gathered())

    @contextmanager
    def in_shards(self) -> Iterator[None]:
        """Context manager: within a validation the weights are in shards for a while, so that they can be changed."""
        gathered = self._gathered is not None
        self.release()
        yield
        if gathered:
            self._gather()

    def on_fit_start(self) -> None:
        """Gives all processes the first one's weights; raises ValueError for what would train wrongly in silence."""
        check_precision(self.trainer.precision)
        if several_processes() and not isinstance(self.trainer.strategy, Sharded):
            for parameter in self.parameters():
                if parameter.requires_grad:  # adapters begin at random
                    dist.broadcast(parameter.data, 0)

    def on_train_start(self) -> None:
        """Makes copies of the weights, or takes over saved ones; `sharded` restores weights after `on_fit_start`."""
        for agent in self._learners():
            for name, copy in agent.copies.items():
                copy.load(self._saved_copies.get(f"{agent.agent}.{name}", {}))
        self._saved_copies = {}

    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Averages an agent's gradients over the processes; those of shards are averages within their replica."""
        strategy = self.trainer.strategy
        average_gradients(parameters, strategy.replicas if isinstance(strategy, Sharded) else None)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Makes one optimizer with a parameter group per learning agent, and its schedule of learning rates."""
        self.require_learner()
        optimizer = self.optimizer([agent.parameter_group() for agent in self._learners()])
        sharded = any(agent.sharded for agent in self._learners())
        if sharded and type(optimizer).__module__.startswith("bitsandbytes"):
            raise ValueError(
                f"`model.optimizer` is bitsandbytes' {type(optimizer).__name__}, which cannot take sharded weights: "
                "use torch.optim.AdamW, or `trainer.strategy: ddp`."
            )
        for group in optimizer.param_groups if sharded else ():
            if group.get("foreach", True) is None and not group.get("fused"):
                group["foreach"] = True  # PyTorch's choice on a GPU; weight by weight, shards cost 20 times as much
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
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["num_rollouts"] = self.num_rollouts
        copies = {f"{agent.agent}.{name}": copy for agent in self._learners() for name, copy in agent.copies.items()}
        if copies:
            checkpoint["copies"] = {name: copy.whole() for name, copy in copies.items()}
        check_finite(trained)
        check_finite(checkpoint["state_dict"])  # may be a moving average

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
        self._saved_copies = checkpoint.get("copies", {})


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raises NotFinite if a weight is not."""
    wrong = [name for name, weight in weights.items() if not local_part(weight).isfinite().all()]
    if any(isinstance(weight, DTensor) for weight in weights.values()):
        wrong = gather_lists(wrong)
    if wrong:
        raise NotFinite(
            f"{len(wrong)} of {len(weights)} trained weights are not finite, for example {wrong[0]}, so they are not "
            "saved; go on from the last checkpoint with a lower learning rate."
        )


def _fits(trainer: L.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING


def check_strategy(strategy: Strategy) -> None:
    """Raises a ValueError for strategies of several processes that would train wrongly, or not at all.

    DeepSpeed takes each backward pass for a step's whole gradient, of which an update has many, and clips all agents
    together; FSDP1 steps within the forward pass of the module that it wraps; a bare ModelParallelStrategy trains
    unsharded copies that nobody averages.
    """
    wrong = isinstance(strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy)
    if wrong and not isinstance(strategy, Sharded):
        raise ValueError(
            f"`trainer.strategy` is {type(strategy).__name__}, with which PromptRL would train wrongly: use `sharded` "
            "(FSDP2), or `ddp`."
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

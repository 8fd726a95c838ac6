"""`Running`: agents with a trainer around them, which take one joint step at a time."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.system.gpu.cases import PROMPT, Case, Options, Row, agents
from benchmarks.system.published import random_weights
from datamodules.sample import PromptSample
from lightning_modules.prompt_rl import PromptRL


class Running:
    """Agents with a trainer around them, whose parts of a step are called by hand.

    Args:
        module: agents, not yet loaded.
        precision: the trainer's.
        device: where.
        samples: prompts of a step.
        strategy: the trainer's, of one process.
    """

    def __init__(
        self,
        module: PromptRL,
        precision: str,
        device: torch.device,
        samples: Sequence[PromptSample],
        strategy: str = "auto",
    ) -> None:
        self.module, self.device, self.samples = module, device, samples
        self.trainer = L.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            strategy=strategy,
            plugins=[LightningEnvironment()],
            precision=precision,  # type: ignore[arg-type]
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self.trainer.state.fn = TrainerFn.FITTING
        self.trainer.strategy.connect(module)
        self.trainer.strategy.setup_environment()
        module.trainer = self.trainer
        module.configure_model()
        if getattr(module.flow, "offload", False):
            for part in module.flow._frozen_parts().values():  # type: ignore[operator]
                part.to("cpu")
        self.trainer.strategy.setup(self.trainer)

    @classmethod
    def of_case(cls, case: Case, options: Options, strategy: str = "auto") -> Running:
        """Draws the agents of a case at random."""
        if options.tiny and options.device.type == "cpu":
            torch.compiler.set_default_backend("eager")  # traced alone: C++ takes a minute and a half
        module, precision = agents(case, options)
        side = min(case.source, 64) if options.tiny else case.source
        image = Image.effect_noise((side, side), 64).convert("RGB") if side else None
        with random_weights(options.device):
            return cls(module, precision, options.device, [PromptSample("0", PROMPT, "none", {}, image)], strategy)

    def step(self, counter: FlopCounterMode | None = None) -> Row:
        """Takes one joint step, the guard on: seconds of its parts, log-ratios, and the peak of memory.

        Args:
            counter: counts the operations of the flow model's update; PyTorch 2.11 cannot count those of a refiner
                whose queries share keys.
        """
        module, backward = self.module, self.module._flow_backward

        def counted(*args: Any) -> Tensor:
            with counter or nullcontext():
                return backward(*args)

        module._seconds = {}
        forget_peak(self.device)
        with (
            self.trainer.precision_plugin.train_step_context(),
            patch.object(module, "_flow_backward", counted),
        ):
            start = self.now()
            rollout = module.collect(self.samples)
            guarded = self.now()
            ratios = module.check_ratio(rollout)
            guard = self.now() - guarded
            stats = module.update(rollout).compute()
        seconds = dict(module._seconds) | {"step": self.now() - start - guard}
        wrong = [name for name, value in stats.items() if name.endswith("skipped") and value]
        if wrong:
            raise ValueError(f"the update was skipped, since a loss or gradient is not finite: {', '.join(wrong)}")
        return {"seconds": seconds, "log_ratio": ratios, "silent": stats["train/flow/silent"]} | peak(self.device)

    def now(self) -> float:
        """Seconds on a clock, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def forget_peak(device: torch.device) -> None:
    """Begins to look for a peak of memory anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device) -> Row:
    """Bytes at the peak, allocated and reserved; nothing on a CPU, where PyTorch does not count."""
    if device.type != "cuda":
        return {}
    return {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}

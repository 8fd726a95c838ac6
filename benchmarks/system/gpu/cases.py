"""`Case`: one measurement, the agents that it is of, and preflight's estimate of their memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.system.recipes import configured, recipe
from lightning_modules.preflight.estimate import CUDA_CONTEXT, Setting, estimate
from lightning_modules.prompt_rl import PromptRL
from rewards.base import Reward, RewardBatch, Score

Row = dict[str, Any]
"""Figures by name; `setting` says which variant of the case they are of."""

PROMPT = "a photo of two red apples left of a blue ceramic bowl on a wooden table"
GROUP = 8
"""Images of a step, which has one prompt."""
TOKENS = 64
"""Tokens of a rewrite within a step: decoding is measured by itself, in the case `decoding`."""


class Constant(Reward):
    """Takes 10 ms an image, whatever it shows, and prefers every second one, whatever the batches."""

    def __init__(self) -> None:
        self.values = itertools.cycle([0.0, 1.0])

    def __call__(self, batch: RewardBatch) -> Sequence[Score]:
        """Scores the images."""
        time.sleep(0.01 * len(batch))
        return [Score(value, value, value) for _, value in zip(batch.images, self.values, strict=False)]


@dataclass(frozen=True)
class Variant:
    """A setting that needs no other weights.

    Args:
        micro_batch_size: samples of a forward pass of both agents; None leaves the configuration's.
        backend: attention backend of the flow model; None leaves PyTorch's choice.
    """

    micro_batch_size: int | None = None
    backend: str | None = None

    @property
    def name(self) -> str:
        """Names the setting in the table."""
        if self.backend is not None:
            return self.backend
        return "" if self.micro_batch_size is None else f"micro-batch {self.micro_batch_size}"

    def apply(self, module: PromptRL) -> None:
        """Changes the settings of agents, loaded or not."""
        if self.micro_batch_size is not None:
            for agent in (module.flow, module.language):
                if agent is not None:
                    agent.micro_batch_size = self.micro_batch_size
        if self.backend is not None:
            module.flow.network.set_attention_backend(self.backend)


@dataclass(frozen=True)
class Case:
    """A measurement of one model.

    Args:
        name: name in the table.
        seconds: time that it takes on an H100, guessed; a case that does not fit the time left is skipped.
        measure: yields the rows.
        flow: name of a pipeline in `published.yaml`.
        refiner: name of a refiner in `published.yaml`; empty is flow-only.
        configs: configuration files under `configs/`, later ones laid over earlier ones; null is the recipe for GenEval
            on 80 GB.
        changes: dotted key under `model.init_args` -> value, laid over these.
        source: side of a source image, which editing models get; 0 is none.
        variants: settings to measure, one row each.
    """

    name: str
    seconds: int
    measure: Callable[[Case, Options], Iterator[Row]]
    flow: str = ""
    refiner: str = ""
    configs: tuple[str, ...] | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    source: int = 0
    variants: tuple[Variant, ...] = (Variant(),)


@dataclass(frozen=True)
class Options:
    """How all cases are run.

    Args:
        device: where.
        folder: folder for model folders.
        tiny: takes stand-ins of few weights, and small images.
        log: file for what cases print.
    """

    device: torch.device
    folder: Path
    tiny: bool
    log: Path


def agents(case: Case, options: Options) -> tuple[PromptRL, str]:
    """Builds a case's agents by its configuration files, without loading them; also returns the precision."""
    changes = {"reward": {"class_path": f"{__name__}.Constant"}, "group_size": GROUP, "num_minibatches": 1}
    changes |= {"flow.init_args.sampling.num_steps": 4, "flow.init_args.sampling.sde_steps": 1, "warmup_steps": 0}
    if case.refiner:
        changes |= {"language.init_args.max_new_tokens": TOKENS, "num_retained": GROUP // 4}
    else:
        changes |= {"num_retained": GROUP}
    files = case.configs or recipe(case.flow, 80, "promptrl" if case.refiner else "flow_only")
    folder = options.folder / case.name
    module, config = configured(files, case.flow, case.refiner, folder, changes | case.changes, tiny=options.tiny)
    return module, str(config.trainer.precision)


def estimated(case: Case, options: Options) -> dict[str, int]:
    """Estimates the peak memory of each variant as preflight does: name -> bytes that PyTorch allocates."""
    module, precision = agents(case, options)
    source = (case.source, case.source) if case.source else None
    setting = Setting(source=source, autocast=torch.bfloat16 if precision == "bf16-mixed" else None)
    found = {}
    for variant in case.variants:
        if variant.backend is None:
            variant.apply(module)
            found[variant.name] = estimate(module, setting).total - CUDA_CONTEXT
    return found

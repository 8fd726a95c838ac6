"""Short trainings by one process and by several, which have to end with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from PIL.Image import Image

from callbacks.benchmark import Benchmark
from datamodules.base import PromptSample
from lightning_modules.checkpoints import CheckpointIO
from lightning_modules.distributed import whole
from lightning_modules.objectives import FlowGRPO, FlowObjective, RefinerGRPO
from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.kept import Decay
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.rollout import Rollout
from lightning_modules.sharded import Sharded
from miniature.scenes.detector import ShapesDetector
from miniature.scenes.prompts import ShapesPrompts
from rewards.geneval.reward import GenEvalReward
from tests.forked import Forked, free_port, launched

PROMPTS = 4
"""Prompts a step of all processes together."""


@dataclass(frozen=True)
class Case:
    """What is trained, and by which processes.

    Attributes:
        strategy: `ddp`, `sharded`, or settings of `Sharded`.
        processes: how many train what one process trains too.
        mode: the agents that learn.
        lora: adapters instead of all weights.
        micro: micro-batches of the processes in turn.
        unscored: steps in which half of the prompts have no scores, and steps in which none has.
        steps: optimizer steps.
        updates: passes over a rollout.
        minibatches: optimizer steps of a pass.
        checkpointing: gradient checkpointing.
        precision: the trainer's.
        objective: how the flow model learns.
        reference: how both references follow the weights.
        language_objective: how the refiner learns.
    """

    strategy: str | dict[str, Any]
    processes: int = 2
    mode: str = "joint"
    lora: bool = False
    micro: tuple[int | None, ...] = (4, 3)
    unscored: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    steps: int = 3
    updates: int = 1
    minibatches: int = 1
    checkpointing: bool = False
    precision: str = "32-true"
    objective: FlowObjective = field(default_factory=FlowGRPO)
    reference: Decay | None = None
    language_objective: RefinerGRPO = field(default_factory=RefinerGRPO)


class Shared(PromptRL):
    """Collects for all processes' prompts with the same seed, then keeps its own groups: the union is known."""

    union: Sequence[Sequence[PromptSample]]
    unscored: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    max_log_ratio: dict[str, float] = {}

    def check_ratio(self, rollout: Rollout) -> dict[str, float]:
        """Keeps what the guard has found last."""
        self.max_log_ratio = super().check_ratio(rollout)
        return self.max_log_ratio

    def collect(self, samples: Any) -> Rollout:
        """The rollout of the union's prompts, cut to this process's share."""
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(step)
        everything = super().collect(self.union[step % len(self.union)])
        half, none = self.unscored
        kept = torch.ones_like(everything.valid)
        kept[PROMPTS // 2 :] = step not in half
        kept &= step not in none
        everything = replace(everything, valid=everything.valid & kept, advantages=everything.advantages * kept)
        if everything.language_advantages is not None:
            rewrites = kept[:, : self.group_size - self.num_retained].flatten()
            everything = replace(
                everything,
                language_advantages=everything.language_advantages * rewrites,
                language_counted=everything.language_counted & rewrites,
            )
        each = PROMPTS // self.trainer.world_size
        return everything.groups(slice(each * self.global_rank, each * (self.global_rank + 1)))


def adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW with an epsilon at which the rounding of a gradient near 0 stays rounding."""
    return torch.optim.AdamW(groups, eps=1e-4)


def build(case: Case, rank: int) -> Shared:
    lora = LoRA(rank=4, alpha=8) if case.lora else None
    common: dict[str, Any] = {"dtype": "float32", "lora": lora, "gradient_checkpointing": case.checkpointing}
    common["reference_decay"] = case.reference
    flow = Flux1Policy(
        "miniature/flow",
        Sampling(4, 2),
        height=32,
        width=32,
        max_sequence_length=18,
        learning_rate=None if case.mode == "prompt" else 1e-3,
        kl_weight=0.01,
        micro_batch_size=case.micro[rank % len(case.micro)],
        max_log_ratio=1.0,
        kl_units="step" if case.objective.needs_sde_steps else "velocity",
        **common,
    )
    language = LanguagePolicy(
        "miniature/language",
        template="{prompt}",
        max_new_tokens=32,
        learning_rate=1e-3,
        kl_weight=0.01,
        micro_batch_size=case.micro[(rank + 1) % len(case.micro)],
        **common,
    )
    flow_only = case.mode == "flow"
    torch.manual_seed(7)  # of the adapters
    module = Shared(
        flow,
        GenEvalReward(ShapesDetector()),
        None if flow_only else language,
        4,
        4 if flow_only else 2,
        updates_per_rollout=case.updates,
        objective=case.objective,
        language_objective=case.language_objective,
        num_minibatches=case.minibatches,
        optimizer=adamw,
    )
    module.unscored = case.unscored
    return module


def trainer_of(case: Case, world: int, **kwargs: Any) -> L.Trainer:
    strategy: Any = Sharded(**case.strategy) if isinstance(case.strategy, dict) else case.strategy
    common = {"limit_val_batches": 0, "logger": False, "enable_checkpointing": False}
    return L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy if world > 1 else "auto",
        precision=case.precision,  # type: ignore[arg-type]
        plugins=[LightningEnvironment(), CheckpointIO()],
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **common | kwargs,
    )


def train(case: Case, rank: int, world: int, folder: Path, checkpoint: Path | None = None, **kwargs: Any) -> None:
    """Trains, and leaves the trained weights of rank `rank` in `<world>-<rank>.pt`."""
    data = ShapesPrompts(train_prompts=16, batch_size=PROMPTS // world, eval_prompts=5, eval_batch_size=2)
    module = build(case, rank)
    samples = data.train_samples()
    module.union = [samples[start : start + PROMPTS] for start in range(0, len(samples), PROMPTS)]
    trainer = trainer_of(case, world, max_steps=case.steps, **kwargs)
    trainer.fit(module, data, ckpt_path=checkpoint)
    leave(module, folder / f"{world}-{rank}.pt")


def leave(module: PromptRL, path: Path, **more: Any) -> None:
    """Saves the trained weights, and what a test compares beside."""
    benchmarks = [one for one in module.trainer.callbacks if isinstance(one, Benchmark)]  # type: ignore[attr-defined]
    found = {
        "weights": {n: whole(p.detach()).clone() for n, p in module.named_parameters() if p.requires_grad},
        "rollouts": module.num_rollouts,
        "sharded": [agent.sharded for agent in module._learners()],
        "history": [entry["results"] for benchmark in benchmarks for entry in benchmark.history],
        "max_log_ratio": getattr(module, "max_log_ratio", {}),
    }
    torch.save(found | more, path)


def train_split(case: Case, rank: int, world: int, folder: Path) -> None:
    """Trains on the same prompts in each process, each of which draws its part of their groups."""
    shared = build(case, rank)
    module = PromptRL(shared.flow, shared.reward, shared.language, 4, 2, processes_per_group=world, optimizer=adamw)
    rollouts = []
    collect = module.collect

    def kept(samples: Any) -> Rollout:
        rollouts.append(collect(samples))
        return rollouts[-1]

    module.collect = kept  # type: ignore[method-assign]
    trainer = trainer_of(case, world, max_steps=case.steps)
    trainer.fit(module, ShapesPrompts(train_prompts=16, batch_size=PROMPTS))
    pixels = [torch.stack([pil_to_tensor(image) for image in rollout.images]) for rollout in rollouts]
    leave(
        module,
        folder / f"{world}-{rank}.pt",
        rewards=[rollout.rewards for rollout in rollouts],
        advantages=[rollout.advantages for rollout in rollouts],
        pixels=[images.view(PROMPTS, -1, *images.shape[1:]) for images in pixels],
    )


def pil_to_tensor(image: Image) -> torch.Tensor:
    """Returns [H, W, 3] bytes."""
    return torch.from_numpy(np.array(image))


def run(case: Case, folder: Path, world: int, work: Any = train, **kwargs: Any) -> list[dict[str, Any]]:
    """Trains in `world` processes; returns what each has left."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    started = [
        Forked(
            partial(work, case, rank, world, folder, **kwargs),
            folder / f"{world}-{rank}.log",
            launched(rank, world, port),
        )
        for rank in range(world)
    ]
    for process in started:
        assert process.wait() == 0, process.text
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference of a trained weight."""
    assert one["weights"].keys() == other["weights"].keys()
    return max(float((value - other["weights"][name]).abs().max()) for name, value in one["weights"].items())


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """Trains by one process and by several; returns the largest difference of a weight, and how far weights moved."""
    (one,) = run(replace(case, strategy="auto", processes=1), folder, 1)
    several = run(case, folder, case.processes)
    start = build(case, 0)
    torch.manual_seed(7)
    start.load()
    before = {n: p.detach() for n, p in start.named_parameters() if p.requires_grad}
    return {
        "difference": max(difference(one, other) for other in several),
        "moved": max(float((value - before[name]).abs().max()) for name, value in one["weights"].items()),
        "rollouts": {other["rollouts"] for other in [one, *several]},
        "sharded": several[0]["sharded"],
    }


CASES = {
    f"{strategy} {mode} {'LoRA' if lora else 'full'}": Case(
        how, processes=4 if strategy == "HSDP" else 2, mode=mode, lora=lora
    )
    for strategy, how in {"ddp": "ddp", "sharded": "sharded", "HSDP": {"shard_size": 2}}.items()
    for mode in ("joint", "flow", "prompt")
    for lora in (False, True)
} | {
    "sharded, groups without scores": Case("sharded", unscored=((0,), (1,))),
    "sharded, updates_per_rollout 2": Case("sharded", updates=2, steps=4),
    "sharded, gradient checkpointing": Case("sharded", checkpointing=True),
    "sharded, bf16-mixed": Case("sharded", precision="bf16-mixed"),
}
"""All that `python -m tests.lightning_modules.sharded_runs` compares; the tests take few."""


def main() -> None:
    """Prints a table of all cases."""
    print("| case | processes | largest difference of a weight | they moved by |\n|---|---|---|---|")
    for name, case in CASES.items():
        with TemporaryDirectory() as folder:
            found = compare(case, Path(folder))
        print(f"| {name} | {case.processes} | {found['difference']:.1e} | {found['moved']:.1e} |", flush=True)


if __name__ == "__main__":
    main()

"""Every objective raises a toy reward, by turns on tiny random models of all families, and its own loss falls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.sample import PromptSample
from lightning_modules.objectives import (
    AWM,
    DGPO,
    DPO,
    DiffusionNFT,
    FlowGRPO,
    FlowObjective,
    RewardWeighted,
)
from lightning_modules.objectives.preference import PreferenceObjective
from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.kept import Decay
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.rl.matching import preference_weights
from lightning_modules.rollout import Rollout
from tests.lightning_modules.policies.family import PROMPTS, Family, Red
from tests.lightning_modules.policies.test_families import FAMILIES, LORA, folders
from tests.lightning_modules.policies.tiny_flux1 import FLUX1
from tests.lightning_modules.policies.tiny_sana import SANA
from tests.lightning_modules.policies.tiny_sd3 import SD3
from tests.lightning_modules.test_prompt_rl import attach

__all__ = ["folders"]  # a fixture

pytestmark = pytest.mark.slow

OBJECTIVES: dict[str, Callable[[], FlowObjective]] = {
    "GRPO": FlowGRPO,
    "GRPO, trajectories": lambda: FlowGRPO(ratio="trajectory", clip_high=1.5),
    "GRPO, trust region, by noise": lambda: FlowGRPO(trust_region=0.1, step_weights="noise"),
    "NFT": lambda: DiffusionNFT(beta=0.1, advantage_range=1.0, old_policy=Decay(0.3)),
    "AWM": lambda: AWM("sigma"),
    "the best": lambda: RewardWeighted(best=2),
    "DPO": lambda: DPO(100.0, levels=3),
    "DGPO": lambda: DGPO(levels=3),
}


def mean_red(module: PromptRL, samples: Sequence[PromptSample]) -> float:
    prompts = [sample.prompt for sample in samples for _ in range(8)]
    images = [sample.image for sample in samples for _ in range(8) if sample.image is not None]
    images = module.flow.generate(prompts, list(range(100, 116)), images=images or None)
    return float(images[:, 0].clamp(0, 1).mean())


def learner(
    family: Family, folder: Path, objective: FlowObjective, rate: float, lora: LoRA | None, **more: Any
) -> tuple[PromptRL, list[PromptSample]]:
    """A module with a tiny model of a family, and two prompts."""
    height, width = family.sizes[0]
    options: dict[str, Any] = {"height": height, "width": width, "dtype": "float32", "micro_batch_size": 5}
    sampling = Sampling(4, 2 if objective.needs_sde_steps else 0, clip_range=1.0)
    policy = family.policy(str(folder), sampling, learning_rate=rate, lora=lora, **(options | family.options))
    torch.manual_seed(2)  # of the adapters
    module = attach(PromptRL(policy, Red(), None, 8, 8, objective=objective, **more))
    images = family.images(2) or [None, None]
    return module, [PromptSample(str(i), PROMPTS[i], "", {}, image) for i, image in enumerate(images)]


FULL_AND_LORA = {
    "flux1": ("the best", "AWM"),
    "flux1_kontext": ("NFT", "GRPO, trajectories"),
    "flux2_klein": ("DGPO", "GRPO"),
    "flux2_klein_edit": ("AWM", "GRPO"),
    "sd3": ("GRPO", "DGPO"),
    "sana": ("the best", "GRPO"),
    "z_image": ("NFT", "GRPO, trust region, by noise"),
    "qwen_image": ("GRPO, trajectories", "DPO"),
    "qwen_image_edit": ("DPO", "GRPO"),
}
"""Family -> objectives by which all of its weights and its adapters learn, one of them with a policy gradient or, for
Kontext and Z-Image, a variant of it; docs/log.md has nearly every pair."""
REDDER = [
    (family, name, lora) for family, two in FULL_AND_LORA.items() for name, lora in zip(two, (None, LORA), strict=True)
]


@pytest.mark.parametrize(
    ("family", "name", "lora"),
    REDDER,
    ids=[f"{family}, {name}, {'lora' if lora else 'full'}" for family, name, lora in REDDER],
)
def test_images_become_redder(family: str, name: str, lora: LoRA | None, folders: dict[str, Path]) -> None:  # noqa: F811
    (one,) = (one for one in FAMILIES if one.name == family)
    rate = 2 * one.learning_rate if lora else 6e-3 if family.startswith("flux2") else 2e-3
    module, samples = learner(one, folders[family], OBJECTIVES[name](), rate, lora)
    before = mean_red(module, samples)
    for step in range(4):
        module.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = step
        module.update(module.collect(samples))
    assert mean_red(module, samples) > before + 0.005


CASES = [(FLUX1, name) for name in OBJECTIVES]
CASES += [(SANA, "NFT"), (SD3, "DPO")]  # two that draw with classifier-free guidance


@pytest.mark.parametrize(("family", "name"), CASES, ids=[f"{family.name}, {name}" for family, name in CASES])
def test_the_loss_falls(family: Family, name: str, folders: dict[str, Path]) -> None:  # noqa: F811
    """Three small updates on a rollout lower its loss, of all weights by NFT and of adapters by DPO.

    NFT without its adaptive weights, which its gradient takes as constant, so that this loss need not fall; and by
    plain gradient steps, since AdamW's, at a gradient that is small beside its curvature, go too far.
    """
    lora = LORA if name == "DPO" else None
    more: dict[str, Any] = {"updates_per_rollout": 3}
    objective = OBJECTIVES[name]()
    if name == "NFT":
        objective = DiffusionNFT(adaptive=False, advantage_range=1.0, old_policy=Decay(1.0))
        more["optimizer"] = torch.optim.SGD
    module, samples = learner(family, folders[family.name], objective, 1e-3 if lora else 1e-4, lora, **more)
    rollout = module.collect(samples)
    old = module._results_of_rollout(rollout)
    before = loss_of(module, rollout, old)
    logged = module.update(rollout).over_ranks()
    after = loss_of(module, rollout, old)
    assert math.isfinite(after) and after < before
    assert logged["train/flow/skipped"] == 0 and 0 < logged["train/flow/grad_norm"] < math.inf


@torch.no_grad()
def loss_of(module: PromptRL, rollout: Rollout, old: dict[Any, Any]) -> float:
    """Mean loss of a rollout, that of preferences by its own formula."""
    flow, objective, batch = module.flow, module.objective, module._flow_batch(rollout)
    every = [slice(start, start + 5) for start in range(0, len(batch), 5)]
    prepared = objective.prepare(flow, batch, every, old)
    losses = []
    for term in range(objective.num_terms(batch.trajectory)):
        if isinstance(objective, PreferenceObjective):
            errors = objective.errors(flow, batch, term)
            sides = objective.sides(batch)
            losses.append(preference_weights(*errors, sides, batch.groups, beta=objective.beta)[1].mean())
            continue
        for rows in every:
            result = objective.loss(flow, prepared.rows(rows), term, old.get(("flow", rows.start, term)))
            losses.append(result.loss.sum() / len(batch))
    return float(torch.stack(losses).sum()) / objective.num_terms(batch.trajectory)

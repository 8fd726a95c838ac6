"""Loss and gradient of every objective, through `PromptRL`'s update, against float64 equations (`equations.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.base import PromptSample
from lightning_modules.objectives import (
    AWM,
    DGPO,
    DPO,
    DiffusionNFT,
    FlowGRPO,
    FlowObjective,
    ForwardObjective,
    RewardWeighted,
)
from lightning_modules.policies.base import Policy
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.kept import Decay
from lightning_modules.prompt_rl import PromptRL
from tests.lightning_modules.objectives import equations
from tests.lightning_modules.objectives.equations import Drawn, Loss, descend
from tests.lightning_modules.objectives.linear import LinearPolicy, LinearVelocity, feature
from tests.lightning_modules.test_joint_step import Listed, watch
from tests.lightning_modules.test_prompt_rl import attach

SAMPLES = [PromptSample(str(number), prompt, "", {}) for number, prompt in enumerate(["a", "blue", "cat", "dogs"])]
SCORES = [0.1, None, 0.9, 0.3] + [0.5] * 4 + [None, None, 0.2, None] + [0.4, 0.8, -1.0, 0.6]
"""Of four groups, in turn: one failed, all equal, a single one, all good."""
CLIP, NOISE = 0.002, 0.7


def with_kl(loss: Loss, weight: float) -> Loss:
    """Adds the KL of velocities to a loss."""
    return lambda drawn, state: loss(drawn, state) + weight * equations.kl_of_velocity(drawn, state)


@dataclass(frozen=True)
class Case:
    """An objective to compare.

    Args:
        name: name of the test case.
        objective: ours.
        loss: the equations'.
        rate: learning rate of the three updates on a rollout.
        flow: further settings of the flow model.
        keep: d of the old policy.
        keep_reference: d of a reference that moves.
        gradient_alone: True if the loss that is minimised has only the gradient of the paper's.
        parts: number of mini-batches.
    """

    name: str
    objective: FlowObjective
    loss: Loss
    rate: float = 0.9
    flow: dict[str, Any] = field(default_factory=dict)
    keep: float = 0.0
    keep_reference: float | None = None
    gradient_alone: bool = False
    parts: int = 1


def grpo(**options: Any) -> Loss:
    return partial(equations.grpo, **({"noise": NOISE, "clip": (CLIP, CLIP)} | options))


VELOCITY_KL: dict[str, Any] = {"kl_units": "velocity", "kl_weight": 0.4}
CASES = [
    Case(
        "NFT, adaptive, an old policy, two mini-batches",
        DiffusionNFT(beta=0.7, advantage_range=1.2, old_policy=Decay(0.6)),
        partial(equations.nft, beta=0.7, largest=1.2, adaptive=True),
        keep=0.6,
        parts=2,
    ),
    Case(
        "NFT, plain, an old policy, KL to a reference that moves",
        DiffusionNFT(beta=0.3, adaptive=False, old_policy=Decay(0.9), levels=3),
        with_kl(partial(equations.nft, beta=0.3, largest=5.0, adaptive=False), 0.4),
        flow=VELOCITY_KL | {"reference_decay": Decay(0.5)},
        keep=0.9,
        keep_reference=0.5,
    ),
    # Images without an advantage are left out, since their loss has no gradient.
    Case(
        "NFT, its own old policy",
        DiffusionNFT(beta=2.0),
        partial(equations.nft, beta=2.0, largest=5.0, adaptive=True),
        gradient_alone=True,
    ),
    *(
        Case(
            f"AWM, {weighting}",
            AWM(weighting),  # type: ignore[arg-type]
            partial(equations.awm, power=power, clip=CLIP),
        )
        for power, weighting in enumerate(["uniform", "sigma", "sigma_squared"])
    ),
    Case(
        "AWM with KL, two levels, two mini-batches",
        AWM(levels=2),
        with_kl(partial(equations.awm, power=0, clip=CLIP), 0.4),
        flow=VELOCITY_KL,
        parts=2,
    ),
    Case("the best image", RewardWeighted(), partial(equations.best_of_groups, best=1)),
    Case("the two best images", RewardWeighted(best=2, levels=4), partial(equations.best_of_groups, best=2)),
    Case(
        "DPO, two mini-batches",
        DPO(beta=3.0),
        partial(equations.preference, beta=3.0, pair=True),
        gradient_alone=True,
        parts=2,
    ),
    Case(
        "DGPO with KL",
        DGPO(beta=8.0, levels=2),
        with_kl(partial(equations.preference, beta=8.0, pair=False), 0.4),
        flow=VELOCITY_KL,
        gradient_alone=True,
    ),
    Case("GRPO, clipped higher", FlowGRPO(clip_high=0.006), grpo(clip=(CLIP, 0.006))),
    Case("GRPO, KL of velocities", FlowGRPO(), grpo(kl_velocity=0.4), flow=VELOCITY_KL),
    Case("GRPO, a trust region", FlowGRPO(trust_region=1e-5), grpo(trust=1e-5)),
    Case("GRPO, weights by noise", FlowGRPO(step_weights="noise"), grpo(by_noise=True)),
    Case(
        "GRPO, ratio of trajectories",
        FlowGRPO(ratio="trajectory", clip_high=0.005),
        grpo(whole=True, clip=(CLIP, 0.005)),
    ),
    Case(
        "GRPO, ratio of trajectories, KL of velocities, two mini-batches",
        FlowGRPO(ratio="trajectory"),
        grpo(whole=True, kl_velocity=0.4),
        flow=VELOCITY_KL,
        parts=2,
    ),
]


@pytest.mark.parametrize("rows", [None, 5, 1])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_three_updates_equal_the_equations(case: Case, rows: int | None) -> None:
    """Losses and gradients to 1e-9, on the policy that drew and off it, in micro-batches that cut groups."""
    options = {"learning_rate": case.rate, "weight_decay": 0.0, "micro_batch_size": rows} | case.flow
    flow = LinearPolicy(Sampling(5, [0, 2, 3], "flow_sde", NOISE, clip_range=CLIP), **options)
    settings: dict[str, Any] = {"group_size": 4, "num_retained": 4, "updates_per_rollout": 3}
    settings |= {"num_minibatches": case.parts, "objective": case.objective}
    module = attach(PromptRL(flow, Listed(SCORES), None, optimizer=torch.optim.SGD, **settings))
    start = moved(flow)
    rollout = module.collect(SAMPLES)
    rollout = replace(rollout, advantages=rollout.advantages.double())
    found = watch(module)
    module.update(rollout)
    size = len(SAMPLES) // case.parts
    parts = [record(module, rollout.groups(slice(size * part, size * (part + 1)))) for part in range(case.parts)]
    before = {name: value.detach() for name, value in LinearVelocity().named_parameters()}
    losses = [partial(case.loss, drawn) for drawn in parts] * 3
    right = descend(losses, start, before, case.rate, keep_old=case.keep, keep_reference=case.keep_reference)
    assert len(found) == 3 * case.parts
    for ours, (loss, gradients) in zip(found, right, strict=True):
        assert case.gradient_alone or ours.loss == pytest.approx(loss, rel=1e-9, abs=1e-12)
        wrong = [ours.gradients[f"flow.{name}"] - gradient.numpy() for name, gradient in gradients.items()]
        assert length(wrong) < 1e-9 * length([gradient.numpy() for gradient in gradients.values()])
    first, second = right[0][1], right[case.parts][1]
    assert length([(first[name] - second[name]).numpy() for name in start]) > 1e-3  # passes differ


def moved(policy: Policy) -> dict[str, torch.Tensor]:
    """Moves the weights away from the reference, as training would have done; returns them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in policy.network.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return {name: weight.detach().clone() for name, weight in policy.network.named_parameters()}


def record(module: PromptRL, rollout: Any) -> Drawn:
    """Takes what was drawn from a rollout; the objective's noise is data."""
    path, objective = rollout.trajectory, module.objective
    levels = []
    if isinstance(objective, ForwardObjective):
        batch = module._flow_batch(rollout)
        for term in range(objective.num_terms(path)):
            at = objective.noised(batch, term)
            levels.append((float(at.sigma), (at.target + path.final).flatten(1)))
    steps = [
        (float(path.sigmas[step]), float(path.sigmas[step + 1]), path.latents[:, k], path.next_latents[:, k])
        for k, step in enumerate(path.sde_steps)
    ]
    return Drawn(
        advantages=rollout.advantages.flatten(),
        counted=rollout.counted.flatten(),
        prompts=torch.tensor([feature(prompt) for prompt in rollout.prompts], dtype=torch.float64),
        size=4,
        images=path.final.flatten(1),
        levels=levels,
        steps=[(*span, before.flatten(1), after.flatten(1)) for *span, before, after in steps],  # type: ignore[misc]
        first=float(path.sigmas[1]),
    )


def length(arrays: Sequence[Any]) -> float:
    return float(np.sqrt(sum(np.square(array).sum() for array in arrays)))

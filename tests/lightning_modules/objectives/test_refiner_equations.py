"""Loss and gradient of the refiner's objective, through `PromptRL`, against float64 equations (`equations.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lightning_modules.objectives import FlowGRPO, RefinerGRPO
from lightning_modules.policies.flow import Sampling
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.rollout import Rollout
from tests.lightning_modules.objectives.equations import Written, descend, refiner
from tests.lightning_modules.objectives.linear import LinearPolicy, TablePolicy
from tests.lightning_modules.objectives.test_equations import SAMPLES, length, moved
from tests.lightning_modules.test_joint_step import Listed, watch
from tests.lightning_modules.test_prompt_rl import attach

FORMAT = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
SCORES = [0.1, 0.7, None, 0.9, 0.3, 0.3, 0.3, 0.3, None, None, 0.2, None, None, 0.8, 0.4, None]
"""Of four groups of one original and three rewrites: one rewrite failed, none, two and all but the original's, one."""
CLIP, RATE = 0.05, 0.9


@dataclass(frozen=True)
class Case:
    """A variant to compare: ours, and the options of the equations."""

    name: str
    objective: RefinerGRPO
    equations: dict[str, Any] = field(default_factory=dict)
    kl: float = 0.0


CASES = [
    Case("GRPO, k3", RefinerGRPO(), {"kl": 0.3}, kl=0.3),
    Case("ratio of sequences", RefinerGRPO(ratio="sequence"), {"sequence": True}),
    Case("clipped higher", RefinerGRPO(clip_high=0.2), {"clip": (CLIP, 0.2)}),
    Case("mean of tokens", RefinerGRPO(mean="token"), {"by_token": True}),
    Case("entropy", RefinerGRPO(entropy_weight=0.1), {"entropy": 0.1}),
    Case(
        "everything",
        RefinerGRPO("leave_one_out", "sequence", 0.1, "token", 0.05),
        {"sequence": True, "clip": (CLIP, 0.1), "by_token": True, "entropy": 0.05, "kl": 0.2},
        kl=0.2,
    ),
]


@pytest.mark.parametrize("rows", [None, 5, 1])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_three_updates_equal_the_equations(case: Case, rows: int | None) -> None:
    module, language = refines(case.objective, micro_batch_size=rows, kl_weight=case.kl)
    rollout = module.collect(SAMPLES)
    rollout = replace(rollout, language_advantages=rollout.language_advantages.double())  # type: ignore[union-attr]
    before = {"weight": language.network.weight.detach().clone()}
    start = moved(language)
    found = watch(module)
    module.update(rollout)
    loss = partial(refiner, written(rollout), **({"clip": (CLIP, CLIP)} | case.equations))
    for ours, (value, gradients) in zip(found, descend([loss] * 3, start, before, RATE), strict=True):
        assert ours.loss == pytest.approx(value, rel=1e-9, abs=1e-12)
        right = gradients["weight"].numpy()
        assert length([ours.gradients["language.weight"] - right]) < 1e-9 * length([right])


def refines(objective: RefinerGRPO, **settings: Any) -> tuple[PromptRL, TablePolicy]:
    """Makes a refiner that learns, and a flow model that does not."""
    flow = LinearPolicy(Sampling(3, 0), learning_rate=None)
    options: dict[str, Any] = {"learning_rate": RATE, "clip_range": CLIP, "temperature": 0.8, "kl_weight": 0.0}
    language = TablePolicy([3, 5, 1, 4], FORMAT, **(options | settings))
    adds: dict[str, Any] = {"optimizer": torch.optim.SGD, "updates_per_rollout": 3, "language_objective": objective}
    module = PromptRL(flow, Listed(SCORES), language, 4, 1, objective=FlowGRPO(), format_weight=0.5, **adds)
    return attach(module), language


def written(rollout: Rollout) -> Written:
    """Takes tokens and advantages from a rollout."""
    completions = rollout.completions
    assert completions is not None and rollout.language_advantages is not None and rollout.language_counted is not None
    tokens = [row[keep].tolist() for row, keep in zip(completions.tokens, completions.mask, strict=True)]
    starts = completions.prompt_ids[:, -1].tolist()
    return Written(
        tokens=tokens,
        before=[[start, *ids[:-1]] for start, ids in zip(starts, tokens, strict=True)],
        advantages=rollout.language_advantages.tolist(),
        counted=rollout.language_counted.tolist(),
        temperature=0.8,
    )


@pytest.mark.parametrize("baseline", ["refined", "leave_one_out"])
def test_rewrites_are_compared_with_rewrites(baseline: Any) -> None:
    """Reward R = format / 2 + score; a failed one has no advantage, and one alone has nothing to be compared with."""
    module, _ = refines(RefinerGRPO(baseline))
    rollout = module.collect(SAMPLES)
    formats = np.array(FORMAT * 2).reshape(4, 3)
    scores = np.array([np.nan if one is None else one for one in SCORES]).reshape(4, 4)[:, 1:]
    rewards = formats / 2 + scores
    expected = np.zeros((4, 3))
    for group, row in enumerate(rewards):
        valid = [number for number in range(3) if not np.isnan(row[number])]
        for number in valid if len(valid) > 1 else []:
            others = [row[other] for other in valid if other != number]
            own = row[valid]
            if baseline == "leave_one_out":
                expected[group, number] = row[number] - np.mean(others)
            else:
                expected[group, number] = (row[number] - np.mean(own)) / (np.std(own) + 1e-4)
    assert rollout.language_advantages is not None
    np.testing.assert_allclose(rollout.language_advantages.numpy(), expected.ravel(), atol=1e-6)
    assert np.count_nonzero(expected) == 7  # of 12: 2 + 3 + 0 + 2


def test_rewrites_that_are_all_alike_learn_nothing() -> None:
    """With the group as baseline they learn from the original prompts beside them."""
    for baseline, learns in (("group", True), ("refined", False), ("leave_one_out", False)):
        module, _ = refines(RefinerGRPO(baseline))  # type: ignore[arg-type]
        module.reward = Listed([0.2, 0.6, 0.6, 0.6] * 4)
        module.format_weight = 0.0
        advantages = module.collect(SAMPLES).language_advantages
        assert advantages is not None and bool(advantages.any()) == learns

"""A whole joint step against the float64 numpy reference beside this file: loss, gradients, and weights after it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datamodules.base import PromptSample
from lightning_modules.objectives import FlowGRPO
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.rl.schedule import Window
from rewards.base import Reward, RewardBatch, Score
from tests.lightning_modules.joint_step_reference import Array, Flow, JointStep, Language, Update
from tests.lightning_modules.test_prompt_rl import attach

GROUPS = 3
EPS = 1e-4
"""AdamW's: with the default of 1e-8 the rounding of a gradient near 0 would become a whole step."""


class Listed(Reward):
    """Gives out listed values one after the other, however the images come; None is a failed score."""

    name = "listed"

    def __init__(self, values: Sequence[float | None]) -> None:
        self.values = iter(values)

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """One value an image."""
        values = [next(self.values) for _ in batch.images]
        return [Score.invalid("scorer down") if value is None else Score(0.0, 0.0, value) for value in values]


@dataclass(frozen=True)
class Case:
    """A joint step to compare.

    Args:
        name: name of the test case.
        sampling: settings of the sampler.
        failed: images without a score.
        spread: std of the task reward.
        flow, language: settings of the agents.
        module: settings of `PromptRL`.
    """

    name: str
    sampling: Sampling
    failed: tuple[int, ...] = ()
    spread: float = 1.0
    flow: dict[str, Any] = field(default_factory=dict)
    language: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)


CASES = [
    # 12 images by 5 and 9 rewrites by 4; in the last group one score is left, and nothing to compare it with.
    Case("flow_sde", Sampling(4, [0, 2], "flow_sde", 0.7), failed=(1, 6, 8, 9, 11), flow={"kl_units": "flow_grpo"}),
    # 24 images; both of a rewrite failed.
    Case(
        "dance_sde, three updates, two images a prompt, by tag",
        Sampling(4, 2, "dance_sde", 0.8, clip_range=5e-3),
        failed=(0, 4, 5, 20),
        module={"updates_per_rollout": 3, "images_per_prompt": 2, "advantage_scale": "tag"},
    ),
    # Deviations beyond the clamp, and gradients beyond their longest.
    Case(
        "cps, two updates, deviations as they are",
        Sampling(4, [0, 2], "cps", 0.8, clip_range=1e-2),
        failed=(2,),
        spread=6.0,
        flow={"max_grad_norm": 0.05},
        language={"max_grad_norm": 0.05, "temperature": 1.2},
        module={"updates_per_rollout": 2, "advantage_scale": "none", "num_retained": 2, "task_weight": 1.5},
    ),
    Case(
        "flow_sde, three updates, GRPO-Guard",
        Sampling(4, 3, "flow_sde", 0.7, clip_range=1e-3),
        failed=(5,),
        flow={"learning_rate": 2e-3, "max_grad_norm": 0.05, "kl_weight": 5.0},
        language={"learning_rate": None},
        module={"updates_per_rollout": 3, "objective": FlowGRPO(ratio_normalization=True)},
    ),
    Case(
        "cps, GRPO-Guard over |dt|, no refiner",
        Sampling(4, [1, 2], "cps", 0.8),
        failed=(0, 7),
        flow={"kl_units": "flow_grpo", "kl_weight": 20.0},
        module={"objective": FlowGRPO(ratio_normalization="over_dt"), "num_retained": 4},
    ),
    # Of 3 groups, 1 and 2; the first step of the second pass is the first that is off the policy of its mini-batch.
    Case(
        "two mini-batches, two passes",
        Sampling(4, Window(2, contiguous=False), "flow_sde", 0.7, clip_range=1.3e-3),
        failed=(1, 6),
        language={"clip_range": 0.05},
        module={"num_minibatches": 2, "updates_per_rollout": 2},
    ),
    Case(
        "three mini-batches, GRPO-Guard, two images a prompt",
        Sampling(4, 2, "dance_sde", 0.8, clip_range=1e-3),
        flow={"learning_rate": 1e-3, "rollout_batch_size": 7, "max_log_ratio": 1e-4},
        language={"clip_range": 0.05},
        module={"num_minibatches": 3, "objective": FlowGRPO(ratio_normalization=True), "images_per_prompt": 2},
    ),
    Case(
        "refiner alone, two images a prompt",
        Sampling(4, 2),
        failed=(3, 4),
        flow={"learning_rate": None},
        module={"images_per_prompt": 2},
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_joint_step_equals_the_equations(
    make_flow: Callable[..., Flux1Policy],
    make_language: Callable[..., LanguagePolicy],
    samples: list[PromptSample],
    case: Case,
) -> None:
    """Loss, gradients and the weights' changes are the reference's to 1e-5, beside the rounding of fp32 weights."""
    shared = {"learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1e3}
    of_flow = {"learning_rate": 3e-4, "kl_weight": 2.0, "micro_batch_size": 5, "betas": (0.8, 0.95)} | case.flow
    of_language = {"kl_weight": 0.3, "micro_batch_size": 4, "max_new_tokens": 10} | case.language
    flow = make_flow(sampling=case.sampling, **(shared | of_flow))
    language = make_language(**(shared | of_language))
    flow_copies, language_copies = moved(flow), moved(language)
    settings = {"group_size": 4, "num_retained": 1, "images_per_prompt": 1, "format_weight": 0.7} | case.module
    refines = settings["num_retained"] < 4
    reward = Listed(scores(GROUPS * 4 * settings["images_per_prompt"], case))
    adamw = partial(torch.optim.AdamW, eps=EPS)
    module = attach(PromptRL(flow, reward, language if refines else None, optimizer=adamw, **settings))
    start, found = weights(module), watch(module)

    module.training_step([replace(sample, tag="ab"[row % 2]) for row, sample in enumerate(samples[:GROUPS])], 0)

    rollout = module.latest
    assert rollout is not None
    reference = JointStep(
        module,
        rollout,
        Flow(flow, *flow_copies, EPS) if flow.trained else None,
        Language(language, *language_copies, EPS) if refines and language.trained else None,
    )
    expected = reference.updates()
    assert len(found) == len(expected) == module.updates_per_rollout * module.num_minibatches
    for number, (ours, right) in enumerate(zip(found, expected, strict=True), start=1):
        assert ours.loss == pytest.approx(right.loss, rel=1e-5)
        assert ours.gradients.keys() == right.gradients.keys() == start.keys()
        for agent in right.norms:
            named = [name for name in start if name.startswith(agent)]
            wrong = length(ours.gradients[name] - right.gradients[name] for name in named)
            assert wrong < 1e-5 * length(right.gradients[name] for name in named)
            wrong = length(ours.weights[name] - right.weights[name] for name in named)
            change = length(right.weights[name] - start[name] for name in named)
            rounding = length(np.spacing(start[name].astype(np.float32)).astype(float) for name in named)
            assert wrong < 1e-5 * change + number * rounding and rounding < 1e-3 * change
            assert number == 1 or 0 < right.outside[agent] < 1  # of the ratios, some are clipped and some are not

    drawn = [(log_probs, rollout.trajectory.log_probs[:, k]) for k, log_probs in enumerate(reference.flow_log_probs)]
    if rollout.completions is not None:
        assert 0 < rollout.completions.formatted.mean() < 1
        assert len(rollout.completions.mask.sum(1).unique()) > 1
        tokens = zip(reference.token_log_probs, rollout.completions.log_probs, strict=False)  # none if it is frozen
        drawn += [(log_probs, row[: len(log_probs)]) for log_probs, row in tokens]
    for log_probs, recorded in drawn:
        np.testing.assert_allclose(recorded.numpy(), log_probs, atol=1e-5)


def scores(num: int, case: Case) -> list[float | None]:
    """Draws task rewards for `num` images."""
    values = case.spread * np.random.default_rng(4).standard_normal(num)
    return [None if place in case.failed else float(value) for place, value in enumerate(values)]


def moved(policy: Flux1Policy | LanguagePolicy) -> tuple[nn.Module, nn.Module]:
    """Moves an agent's network, as training would have done; returns it in float64, and what it was before."""
    before, generator = copy.deepcopy(policy.network).double(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in policy.network.parameters():
            weight.mul_(1 + 0.1 * torch.randn(weight.shape, generator=generator))
    return copy.deepcopy(policy.network).double(), before


def learning(module: PromptRL) -> dict[str, nn.Parameter]:
    """Finds the trained weights by agent and name, as the reference calls them."""
    named = {name.replace(".network.", "."): weight for name, weight in module.named_parameters()}
    return {name: weight for name, weight in named.items() if weight.requires_grad}


def weights(module: PromptRL) -> dict[str, Array]:
    """Copies the trained weights."""
    return {name: weight.detach().double().numpy() for name, weight in learning(module).items()}


def watch(module: PromptRL) -> list[Update]:
    """Notes every optimizer step of a module: its loss, gradients as the optimizer gets them, and weights after it."""
    updates: list[Update] = []
    losses: list[float] = []
    backward = module.manual_backward

    def noted(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(loss.item())
        backward(loss, *args, **kwargs)

    def before(*args: Any) -> None:
        gradients = {name: weight.grad for name, weight in learning(module).items()}
        found = {name: gradient.double().numpy() for name, gradient in gradients.items() if gradient is not None}
        updates.append(Update(loss=sum(losses), gradients=found))
        losses.clear()

    def after(*args: Any) -> None:
        updates[-1].weights = weights(module)

    module.manual_backward = noted  # type: ignore[method-assign,assignment]
    optimizer = module.trainer.optimizers[0]
    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return updates


def length(arrays: Iterable[Array]) -> float:
    """Length of several arrays as one vector."""
    return float(np.sqrt(sum(np.square(array).sum() for array in arrays)))

"""A whole joint step against the float64 numpy reference beside this file: loss, gradients, and weights after it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datamodules.base import PromptSample
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.prompt_rl import PromptRL
from rewards.base import Reward, RewardBatch, Score
from tests.lightning_modules.joint_step_reference import Flow, JointStep, Language, Settings, Update
from tests.lightning_modules.test_prompt_rl import attach

GROUPS = 3
EPS = 1e-3
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
    Case("flow_sde", Sampling(4, [0, 2], "flow_sde", 0.7), failed=(1, 6, 8, 9, 11)),
    # 24 images; both of a rewrite failed.
    Case(
        "dance_sde, three updates, two images a prompt, by tag",
        Sampling(4, 2, "dance_sde", 0.5, clip_range=2e-3),
        failed=(0, 4, 5, 20),
        flow={"learning_rate": 3e-4},
        language={"learning_rate": 3e-4, "clip_range": 0.02},
        module={"updates_per_rollout": 3, "images_per_prompt": 2, "advantage_scale": "tag"},
    ),
    # Deviations beyond the clamp, and gradients beyond their longest.
    Case(
        "cps, two updates, deviations as they are",
        Sampling(4, [0, 2], "cps", 0.8, clip_range=1e-3),
        failed=(2,),
        spread=6.0,
        flow={"learning_rate": 3e-4, "max_grad_norm": 0.05},
        language={"learning_rate": 3e-4, "max_grad_norm": 0.05, "temperature": 1.2, "clip_range": 0.02},
        module={"updates_per_rollout": 2, "advantage_scale": "none", "num_retained": 2, "task_weight": 1.5},
    ),
    Case(
        "flow_sde, three updates, GRPO-Guard",
        Sampling(4, 3, "flow_sde", 0.7, clip_range=1e-4),
        failed=(5,),
        flow={"learning_rate": 3e-4, "max_grad_norm": 0.01},
        language={"learning_rate": None},
        module={"updates_per_rollout": 3, "ratio_normalization": True},
    ),
    Case(
        "cps, GRPO-Guard, no refiner",
        Sampling(4, [1, 2], "cps", 0.8, clip_range=1e-4),
        failed=(0, 7),
        module={"ratio_normalization": True, "num_retained": 4},
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
    learning = {"learning_rate": 1e-3, "weight_decay": 0.1, "kl_weight": 0.3, "max_grad_norm": 1e3}
    flow = make_flow(sampling=case.sampling, **(learning | {"micro_batch_size": 5, "betas": (0.8, 0.95)} | case.flow))
    language = make_language(**(learning | {"micro_batch_size": 4, "max_new_tokens": 12} | case.language))
    before = {agent: exactly(policy.network) for agent, policy in (("flow", flow), ("language", language))}
    for policy in (flow, language):
        perturb(policy.network)

    settings = {"group_size": 4, "num_retained": 1, "format_weight": 0.7} | case.module
    module = PromptRL(
        flow,
        Listed(scores(4 * GROUPS * settings.get("images_per_prompt", 1), case)),
        None if settings["num_retained"] == 4 else language,
        optimizer=partial(torch.optim.AdamW, eps=EPS),
        **settings,
    )
    prompts = [replace(sample, tag="ab"[number % 2]) for number, sample in enumerate(samples[:GROUPS])]
    found = watch(attach(module))
    reference_flow = Flow(
        **learner(flow, before["flow"]),
        encode=lambda texts: flow.pipe.encode_prompt(texts, None, max_sequence_length=18)[:2],
        guidance=flow.guidance,
        sde=case.sampling.sde_type,
        noise_level=case.sampling.noise_level,
        normalized=module.ratio_normalization,
    )
    reference_language = Language(
        **learner(language, before["language"]),
        tokenizer=language.tokenizer,
        template=language.template,
        temperature=language.temperature,
    )
    drawn_by = {"flow": reference_flow, "language": reference_language}
    start = {
        f"{agent}.{name}": weight.detach().numpy().copy()
        for agent, one in drawn_by.items()
        for name, weight in one.network.named_parameters()
    }

    module.training_step(prompts, 0)

    rollout = module.latest
    assert rollout is not None
    agents = [reference_flow if flow.trained else None, reference_language if module.language is not None and language.trained else None]
    reference = JointStep(
        Settings(**{name: getattr(module, name) for name in Settings.__dataclass_fields__}), rollout, *agents
    )
    expected = reference.updates()
    assert len(found) == len(expected) == module.updates_per_rollout
    for one, other in zip(found, expected, strict=True):
        print(one.loss, other.loss, other.outside, other.norms)
        for agent in other.norms:
            print(agent, distance(one.gradients, other.gradients, agent))
            print(agent, distance({n: one.weights[n] - start[n] for n in one.weights}, {n: other.weights[n] - start[n] for n in other.weights}, agent))


def scores(num: int, case: Case) -> list[float | None]:
    """Draws task rewards for `num` images."""
    values = case.spread * np.random.default_rng(4).standard_normal(num)
    return [None if place in case.failed else float(value) for place, value in enumerate(values)]


def perturb(network: nn.Module) -> None:
    """Moves a network away from its reference, as training would have done."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(1 + 0.02 * torch.randn(weight.shape, generator=generator))


def exactly(network: nn.Module) -> nn.Module:
    """Copies a network in float64."""
    return copy.deepcopy(network).double()


def learner(policy: Flux1Policy | LanguagePolicy, before: nn.Module) -> dict[str, Any]:
    """Collects what the reference has to know about an agent."""
    names = ("learning_rate", "weight_decay", "betas", "max_grad_norm", "kl_weight", "clip_range")
    settings = {name: getattr(policy, name) for name in names}
    return {"network": exactly(policy.network).requires_grad_(), "before": before, "eps": EPS} | settings


def watch(module: PromptRL) -> list[Update]:
    """Notes every optimizer step of a module: its loss, gradients as the optimizer gets them, and weights after it."""
    updates: list[Update] = []
    losses: list[float] = []
    backward = module.manual_backward

    def noted(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(loss.item())
        backward(loss, *args, **kwargs)

    def learning() -> list[tuple[str, nn.Parameter]]:
        named = [(name.replace(".network.", "."), weight) for name, weight in module.named_parameters()]
        return [(name, weight) for name, weight in named if weight.requires_grad]

    def before(*args: Any) -> None:
        gradients = {name: weight.grad.double().numpy() for name, weight in learning() if weight.grad is not None}
        updates.append(Update(loss=sum(losses), gradients=gradients))
        losses.clear()

    def after(*args: Any) -> None:
        updates[-1].weights = {name: weight.detach().double().numpy() for name, weight in learning()}

    module.manual_backward = noted  # type: ignore[method-assign,assignment]
    optimizer = module.trainer.optimizers[0]
    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return updates


def distance(found: dict[str, Any], expected: dict[str, Any], agent: str) -> float:
    """Length of the difference of an agent's arrays, relative to the expected ones."""
    names = {name for name in expected if name.startswith(agent)}
    assert names == {name for name in found if name.startswith(agent)}
    squares = sum(np.square(found[name] - expected[name]).sum() for name in names)
    return float(np.sqrt(squares / sum(np.square(expected[name]).sum() for name in names)))

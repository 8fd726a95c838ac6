"""Objectives at a limit where they equal something known, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_modules.objectives import (
    AWM,
    DGPO,
    DPO,
    DiffusionNFT,
    FlowBatch,
    FlowGRPO,
    FlowObjective,
    RefinerGRPO,
    RewardWeighted,
)
from lightning_modules.objectives.forward import Noised, Prediction
from lightning_modules.policies.flow import Sampling
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.rl.matching import matching_error, preference_weights
from tests.lightning_modules.joint_step_reference import Update
from tests.lightning_modules.objectives.batches import batch_of
from tests.lightning_modules.objectives.linear import LinearPolicy
from tests.lightning_modules.objectives.test_equations import SAMPLES, moved
from tests.lightning_modules.objectives.test_refiner_equations import refines
from tests.lightning_modules.test_joint_step import Listed, watch
from tests.lightning_modules.test_prompt_rl import attach

ADVANTAGES = [1.4, -0.3, 0.0, -1.1]


def drawn(advantages: list[float], **options: Any) -> tuple[LinearPolicy, FlowBatch]:
    """A group of images that a policy has just drawn."""
    policy = LinearPolicy(Sampling(4, [0, 2]), **options)
    policy.needs_reference = True
    policy.load()
    trajectory = policy.rollout(["a cat"] * len(advantages), range(len(advantages)))
    return policy, batch_of(trajectory, torch.tensor(advantages, dtype=torch.float64))


def gradient(policy: LinearPolicy, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(policy.network.parameters()))
    return torch.cat([one.flatten() for one in found])


def objective_gradient(objective: FlowObjective, policy: LinearPolicy, batch: FlowBatch, term: int = 1) -> Tensor:
    prepared = objective.prepare(policy, batch, [slice(0, len(batch))], {})
    return gradient(policy, objective.loss(policy, prepared, term, None).loss.mean())


def matching_gradient(objective: Any, policy: LinearPolicy, batch: FlowBatch, weights: Tensor) -> Tensor:
    """Gradient of flow matching at an objective's noise, with a weight for each image."""
    at: Noised = objective.noised(batch, 1)
    velocity = policy.velocity(at.latents, at.sigma, batch.trajectory.conditioning)
    return gradient(policy, (weights * matching_error(velocity, at.target)).mean())


def equal(one: Any, other: Any) -> None:
    """Asserts that two arrays are equal and not 0."""
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-9, atol=1e-12)
    assert np.abs(np.asarray(other)).max() > 1e-4


@pytest.mark.parametrize("beta", [0.2, 1.0, 30.0])
def test_nft_at_the_old_policy_is_weighted_matching(beta: float) -> None:
    """Its gradient is that of flow matching with weights 2 r - 1 = A / range, times the range, whatever beta."""
    policy, batch = drawn(ADVANTAGES)
    objective = DiffusionNFT(beta=beta, advantage_range=1.2, adaptive=False)
    weights = 1.2 * (batch.advantages / 1.2).clamp(-1, 1)
    equal(objective_gradient(objective, policy, batch), matching_gradient(objective, policy, batch, weights))


def nft_losses(beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of NFT over its range; |v_old - target|^2, their products with v - v_old times 2 r - 1, |v - v_old|^2."""
    policy, batch = drawn(ADVANTAGES)
    generator = torch.Generator().manual_seed(2)
    target, before, now = (torch.randn(4, 2, 3, dtype=torch.float64, generator=generator) for _ in range(3))
    objective = DiffusionNFT(beta=beta, advantage_range=2.0, adaptive=False)
    at = Noised(target, target, torch.tensor(0.5))
    loss = objective.of_velocity(Prediction(now, before, at), batch).loss / 2
    product = batch.advantages / 2 * ((before - target) * (now - before)).mean((1, 2))
    return loss, matching_error(before, target), product, matching_error(now, before)


@pytest.mark.parametrize("beta", [0.2, 1.0, 30.0])
def test_nft_is_a_parabola_in_beta(beta: float) -> None:
    """|e +- beta d|^2 = |e|^2 +- 2 beta e d + beta^2 |d|^2 with e = v_old - target and d = v - v_old, over beta."""
    loss, error, product, moved_by = nft_losses(beta)
    equal(loss, error / beta + 2 * product + beta * moved_by)


def test_nft_holds_to_the_old_policy_for_beta_to_infinity() -> None:
    loss, _, _, moved_by = nft_losses(1e10)
    torch.testing.assert_close(loss / 1e10, moved_by, rtol=1e-8, atol=0)


def test_nft_with_beta_one_on_the_best_is_flow_matching() -> None:
    """With beta 1 the positive policy is the one that learns, and images of r = 1 are all positive."""
    policy, batch = drawn([2.0] * 4)
    objective = DiffusionNFT(beta=1.0, advantage_range=2.0, adaptive=False)
    equal(
        objective_gradient(objective, policy, batch),
        matching_gradient(objective, policy, batch, torch.full((4,), 2.0)),
    )


@pytest.mark.parametrize("advantage", [1.0, -0.5])
def test_awm_with_equal_advantages_is_flow_matching(advantage: float) -> None:
    policy, batch = drawn([advantage] * 4)
    weights = torch.full((4,), advantage, dtype=torch.float64)
    equal(objective_gradient(AWM(), policy, batch), matching_gradient(AWM(), policy, batch, weights))
    sigma = float(AWM().noised(batch, 1).sigma)
    weighted = matching_gradient(AWM(), policy, batch, sigma * weights)
    equal(objective_gradient(AWM("sigma"), policy, batch), weighted)


def test_the_best_of_all_above_the_mean_is_flow_matching_on_them() -> None:
    policy, batch = drawn([0.5, -1.5, 0.7, 0.3])
    weights = torch.tensor([4 / 3, 0, 4 / 3, 4 / 3], dtype=torch.float64)
    objective = RewardWeighted(best=4)
    equal(objective_gradient(objective, policy, batch), matching_gradient(objective, policy, batch, weights))


def test_dpo_at_the_reference() -> None:
    """The loss is log 2, and the weights of the two images' errors are beta / 2, times 4 images a group."""
    policy, batch = drawn(ADVANTAGES)
    objective = DPO(beta=6.0)
    prepared = objective.prepare(policy, batch, [slice(0, 3), slice(3, 4)], {})
    expected = torch.tensor([12.0, 0, 0, -12.0], dtype=torch.float64)
    assert prepared.weights is not None
    torch.testing.assert_close(prepared.weights, expected[:, None].expand(-1, 4))
    equal(objective_gradient(objective, policy, batch), matching_gradient(objective, policy, batch, expected))
    errors, _ = objective.errors(policy, batch, 0)
    _, losses = preference_weights(errors, errors, objective.sides(batch), batch.groups, beta=6.0)
    assert losses.tolist() == pytest.approx([math.log(2)])


def test_dgpo_of_two_images_is_dpo() -> None:
    """Advantages of +-1 over two images are sides of +-1/2: twice the beta is the same loss, off the reference too."""
    policy, batch = drawn([-1.0, 1.0])
    moved(policy)
    equal(objective_gradient(DGPO(beta=8.0), policy, batch), objective_gradient(DPO(beta=4.0), policy, batch))


def three_updates(objective: FlowObjective, clip_range: float, steps: list[int]) -> list[Update]:
    """Gradients of three updates on a rollout, the last two of which are off the policy that drew it."""
    flow = LinearPolicy(Sampling(4, steps, noise_level=0.7, clip_range=clip_range), learning_rate=0.9, weight_decay=0.0)
    scores = [0.1, 0.5, 0.9, None, 0.3, 0.3, 0.3, 0.3]
    more: dict[str, Any] = {"updates_per_rollout": 3, "optimizer": torch.optim.SGD, "objective": objective}
    module = attach(PromptRL(flow, Listed(scores), None, 4, 4, **more))
    found = watch(module)
    module.update(module.collect(SAMPLES[:2]))
    return found


def same_updates(one: list[Update], other: list[Update]) -> bool:
    """Returns True if all losses and gradients are equal to rounding."""
    return all(
        a.loss == pytest.approx(b.loss, rel=1e-6)
        and all(np.allclose(a.gradients[name], b.gradients[name], rtol=1e-6, atol=1e-9) for name in a.gradients)
        for a, b in zip(one, other, strict=True)
    )


def test_a_wide_trust_region_clips_nothing_and_one_of_zero_holds() -> None:
    steps = [0, 2]
    free = three_updates(FlowGRPO(), 1e6, steps)
    assert same_updates(three_updates(FlowGRPO(trust_region=1e30), 1e-4, steps), free)
    assert not same_updates(three_updates(FlowGRPO(), 1e-4, steps), free)
    held = three_updates(FlowGRPO(trust_region=0.0), 1e6, steps)
    assert same_updates(held[:1], free[:1]) and not same_updates(held[1:], free[1:])


@pytest.mark.parametrize("clip_range", [3e-3, 1e6])
def test_a_trajectory_of_one_step_is_the_step(clip_range: float) -> None:
    whole = FlowGRPO(ratio="trajectory")
    assert same_updates(three_updates(whole, clip_range, [1]), three_updates(FlowGRPO(), clip_range, [1]))
    assert not same_updates(three_updates(whole, clip_range, [1, 2]), three_updates(FlowGRPO(), clip_range, [1, 2]))


@pytest.mark.parametrize(
    ("one", "other", "lengths", "equals"),
    [
        (RefinerGRPO(ratio="sequence"), RefinerGRPO(), [1], True),
        (RefinerGRPO(ratio="sequence"), RefinerGRPO(), [1, 3], False),
        (RefinerGRPO(mean="token"), RefinerGRPO(), [4], True),
        (RefinerGRPO(mean="token"), RefinerGRPO(), [4, 2], False),
        (RefinerGRPO(clip_high=0.05), RefinerGRPO(), [2, 5], True),
    ],
    ids=["sequences of one token", "of several", "means over tokens of one length", "of two", "clipped alike"],
)
def test_the_refiner(one: RefinerGRPO, other: RefinerGRPO, lengths: list[int], equals: bool) -> None:
    def updates(objective: RefinerGRPO) -> list[Update]:
        module, language = refines(objective)
        language.lengths = lengths
        found = watch(module)
        module.update(module.collect(SAMPLES))
        return found

    assert same_updates(updates(one), updates(other)) == equals


@pytest.mark.parametrize("make", [DPO, DGPO, DiffusionNFT, AWM, RewardWeighted])
def test_noise_is_fixed_by_sample_and_rollout(make: Callable[..., Any]) -> None:
    """Levels are the sampler's; noise is the same in each pass and micro-batch, and shared where groups compare."""
    _, batch = drawn(ADVANTAGES)
    objective = make(levels=3)
    every = [objective.noised(batch, term) for term in range(objective.num_terms(batch.trajectory))]
    sigmas = [float(at.sigma) for at in every]
    assert len(set(sigmas)) == 3 and set(sigmas) <= set(batch.trajectory.sigmas[:-1].tolist())
    for term, at in enumerate(every):
        noise = at.target + batch.trajectory.final
        part = objective.noised(batch.rows(slice(1, 3)), term)
        assert torch.equal(part.latents, at.latents[1:3]) and torch.equal(part.target, at.target[1:3])
        torch.testing.assert_close(at.latents, (1 - sigmas[term]) * batch.trajectory.final + sigmas[term] * noise)
        assert bool((noise - noise[:1]).abs().max() < 1e-6) == objective.shared_noise
    assert (every[0].target - every[1].target).abs().max() > 0.1


def test_clipped_advantages_are_ranked_by_reward() -> None:
    """Rewards 0, 20, 8, 30 less their mean, clipped to 5, are ties; the fifth image has no score."""
    _, batch = drawn([-5.0, 5.0, -5.0, 5.0, 0.0])
    counted = torch.tensor([True] * 4 + [False])
    batch = replace(batch, rewards=torch.tensor([0.0, 20.0, 8.0, 30.0, 99.0]).to(batch.advantages), counted=counted)
    assert batch.best_first(0).tolist() == [3, 1, 2, 0]
    assert DPO().sides(batch).tolist() == [-1, 0, 0, 1, 0]
    policy, _ = drawn(ADVANTAGES)
    assert RewardWeighted(best=1).prepare(policy, batch, [], {}).weights.flatten().tolist() == [0, 0, 0, 5, 0]
    assert RewardWeighted(best=3).prepare(policy, batch, [], {}).weights.flatten().tolist() == [0, 2.5, 0, 2.5, 0]

"""`ForwardObjective`: base class of objectives that noise the drawn images again, and need no SDE steps."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_modules.objectives.base import FlowBatch, FlowObjective, ObjectiveResult
from lightning_modules.policies.flow import FlowPolicy
from lightning_modules.rl.matching import matching_error, noised
from lightning_modules.rollout import Trajectory
from lightning_modules.seeding import generators_for, seed_of
from rewards.arguments import check_minimum


@dataclass(frozen=True)
class Noised:
    """B images at one level of noise.

    Attributes:
        latents: [B, ...] what the network is given.
        target: [B, ...] the velocity that leads to each image, noise minus image.
        sigma: scalar share of noise.
    """

    latents: Tensor
    target: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class Prediction:
    """Velocities of B noised images, and what else their loss is computed from.

    Attributes:
        velocity: [B, ...] of the current policy.
        old_velocity: [B, ...] of the old policy, without gradient; None if the objective keeps none.
        at: the noised images.
        term: number of the level of noise.
        clip_range: the policy's.
        old: result of the policy that drew the samples; None is strictly on-policy.
    """

    velocity: Tensor
    old_velocity: Tensor | None
    at: Noised
    term: int = 0
    clip_range: float = 0.0
    old: ObjectiveResult | None = None


class ForwardObjective(FlowObjective):
    """Learns from final images alone: each is noised again at levels of the sampler's own schedule.

    Args:
        levels: number of levels of noise, drawn anew for each rollout from the sampler's steps, the same for all its
            samples; null takes every step.
    """

    shared_noise: ClassVar[bool] = False
    """True if the images of a group get the same noise."""

    def __init__(self, levels: int | None = None) -> None:
        check_minimum("model.objective", 1, levels=levels)
        self.levels = levels

    def check(self, policy: FlowPolicy) -> None:
        """Raises ValueError if the settings of a policy that learns do not fit; called before weights are loaded."""
        super().check(policy)
        name, steps = f"`model.objective` {type(self).__name__}", policy.sampling.num_steps
        if policy.kl_weight > 0 and policy.kl_units != "velocity":
            raise ValueError(
                f"{name} has no SDE steps whose KL could be measured: set `flow.kl_units` velocity, and "
                "`flow.kl_weight` in these units."
            )
        if self.levels is not None and self.levels > steps:
            raise ValueError(f"{name} has levels={self.levels}, but the sampler has {steps} steps: use at most that.")

    def num_terms(self, trajectory: Trajectory) -> int:
        """Returns the number of levels of noise."""
        steps = len(trajectory.sigmas) - 1
        return steps if self.levels is None else min(self.levels, steps)

    @abstractmethod
    def of_velocity(self, found: Prediction, batch: FlowBatch) -> ObjectiveResult:
        """Computes the loss [B] of velocities, without the KL.

        Args:
            found: the velocities.
            batch: B samples.
        """

    def loss(self, policy: FlowPolicy, batch: FlowBatch, term: int, old: ObjectiveResult | None) -> ObjectiveResult:
        """Computes the loss of level number `term`, see `FlowObjective.loss`."""
        at, conditioning = self.noised(batch, term), batch.trajectory.conditioning
        before = reference = None
        if self.old_policy is not None:
            with policy.kept("old"):
                before = policy.velocity(at.latents, at.sigma, conditioning)
        if policy.kl_weight_now > 0:
            with torch.no_grad(), policy.reference():
                reference = policy.velocity(at.latents, at.sigma, conditioning)
        velocity = policy.velocity(at.latents, at.sigma, conditioning)
        result = self.of_velocity(Prediction(velocity, before, at, term, policy.clip_range, old), batch)
        if reference is None:
            return result
        kl = matching_error(velocity, reference)
        stats = result.stats | {"kl": kl.detach().mean()}
        return ObjectiveResult(result.loss + policy.kl_weight_now * kl, stats, result.log_probs)

    def noised(self, batch: FlowBatch, term: int) -> Noised:
        """Noises the images of a batch at level number `term`, the same in every pass over a rollout."""
        images, sigmas = batch.trajectory.final, batch.trajectory.sigmas
        order = torch.randperm(len(sigmas) - 1, generator=torch.Generator().manual_seed(batch.levels_seed))
        sigma = sigmas[sorted(order[: self.num_terms(batch.trajectory)].tolist())[term]]
        seeds = batch.group_seeds if self.shared_noise else batch.seeds
        distinct = list(dict.fromkeys(seeds))
        generators = generators_for([seed_of("level", seed, term) for seed in distinct])
        noise = {
            seed: torch.randn(images.shape[1:], generator=generator)
            for seed, generator in zip(distinct, generators, strict=True)
        }
        mixed = torch.stack([noise[seed] for seed in seeds]).to(images)
        return Noised(noised(images, mixed, sigma), mixed - images, sigma)

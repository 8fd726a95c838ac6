"""The two agents' losses on one micro-batch: functions of a policy and a record of what was drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.policies.flow import FlowPolicy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.rl.losses import clipped_surrogate, guard_log_ratio, k3_kl, masked_sequence_mean
from lightning_modules.rollout import Completions, Trajectory

RatioNormalization = bool | Literal["over_dt"]
"""GRPO-Guard's normalisation of the flow policy's ratio: off, on, or on with the surrogate divided by |dt|."""


@dataclass(frozen=True)
class ObjectiveResult:
    """Loss of a micro-batch of B samples, and what else its forward pass found.

    Attributes:
        loss: [B] to be averaged and minimised.
        stats: name -> detached scalar, for the log.
        log_probs: this policy's, detached; [B] of an SDE step, or [B, T] of a completion's tokens.
        mean: [B, ...] this policy's mean of an SDE step, detached; None for language.
    """

    loss: Tensor
    stats: dict[str, Tensor]
    log_probs: Tensor
    mean: Tensor | None = None

    def detach(self) -> ObjectiveResult:
        """Drops the graph of the loss: what a later update on the same rollout compares itself with."""
        return replace(self, loss=self.loss.detach())


def flow_objective(
    policy: FlowPolicy,
    trajectory: Trajectory,
    step: int,
    advantages: Tensor,
    *,
    old: ObjectiveResult | None = None,
    normalize_ratio: RatioNormalization = False,
) -> ObjectiveResult:
    """Clipped surrogate plus KL for one SDE step (paper Sec. 3; Flow-GRPO, arXiv 2505.05470, Eq. 5).

    Args:
        policy: the current policy.
        trajectory: B samples of a rollout.
        step: number of the SDE step, 0..K-1.
        advantages: [B].
        old: the result of the policy that drew the samples; None is strictly on-policy.
        normalize_ratio: normalises the ratio as in GRPO-Guard (arXiv 2510.22319), in the first update of a rollout
            too, so that all updates weigh the KL alike; `over_dt` also divides the surrogate by the step's |dt|.
    """
    transition = policy.replay(trajectory, step)
    log_probs = transition.log_prob(trajectory.next_latents[:, step])
    number = trajectory.sde_steps[step]
    dt = (trajectory.sigmas[number] - trajectory.sigmas[number + 1]).to(log_probs.device)
    old_log_probs, old_mean = log_probs.detach(), transition.mean.detach()
    if old is not None:
        old_log_probs, old_mean = old.log_probs, (old_mean if old.mean is None else old.mean)
    log_ratio = log_probs - old_log_probs
    if normalize_ratio:
        log_ratio = guard_log_ratio(log_ratio, transition.mean, old_mean, transition.std)
    surrogate = clipped_surrogate(log_probs, advantages, clip_range=policy.clip_range, log_ratio=log_ratio)
    loss, stats = surrogate.loss, surrogate.stats
    if normalize_ratio == "over_dt":
        loss = loss / dt
    if policy.kl_weight_now > 0:
        with torch.no_grad(), policy.reference():
            reference = policy.replay(trajectory, step)
        kl = transition.kl(reference)
        # Flow-GRPO divides by its step's variance per unit of time; Flow-CPS's variance is not one.
        if policy.kl_units == "flow_grpo" and policy.sampling.sde_type != "cps":
            kl = kl * dt
        loss = loss + policy.kl_weight_now * kl
        stats = stats | {"kl": kl.detach().mean()}
    return ObjectiveResult(loss, stats, log_probs.detach(), transition.mean.detach())


def language_objective(
    policy: LanguagePolicy, completions: Completions, advantages: Tensor, *, old: ObjectiveResult | None = None
) -> ObjectiveResult:
    """Policy gradient on the rewrites' tokens plus k3 KL (paper Sec. 3; GRPO, arXiv 2402.03300).

    Args:
        policy: the current policy.
        completions: B completions of a rollout; a completion's loss is the mean over its tokens.
        advantages: [B].
        old: the result of the policy that wrote them; None is strictly on-policy.
    """
    reference = None
    if policy.kl_weight_now > 0:  # first, so that only one of both holds logits at a time
        with torch.no_grad(), policy.reference():
            reference = policy.log_probs(completions)
    log_probs = policy.log_probs(completions)
    old_log_probs = log_probs.detach() if old is None else old.log_probs
    loss = clipped_surrogate(log_probs, advantages, clip_range=policy.clip_range, old_log_probs=old_log_probs).loss
    outside = ((log_probs.detach() - old_log_probs).exp() - 1).abs() > policy.clip_range
    stats = {"clip_fraction": masked_sequence_mean(outside.float(), completions.mask).mean()}
    if reference is not None:
        kl = k3_kl(log_probs, reference)
        loss = loss + policy.kl_weight_now * kl
        stats["kl"] = masked_sequence_mean(kl.detach(), completions.mask).mean()
    # -log p of the drawn tokens: an unbiased estimate of the entropy, at no cost.
    stats["entropy"] = -masked_sequence_mean(log_probs.detach(), completions.mask).mean()
    return ObjectiveResult(masked_sequence_mean(loss, completions.mask), stats, log_probs.detach())

"""The two agents' losses on one micro-batch: functions of a policy and a record that return loss and stats."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_modules.policies.flow import FlowPolicy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.rl.losses import clipped_surrogate, guard_log_ratio, k3_kl, masked_sequence_mean
from lightning_modules.rollout import Completions, Trajectory

Stats = dict[str, Tensor]


def flow_objective(
    policy: FlowPolicy,
    trajectory: Trajectory,
    step: int,
    advantages: Tensor,
    *,
    old_log_probs: Tensor | None = None,
    old_mean: Tensor | None = None,
) -> tuple[Tensor, Stats, Tensor, Tensor]:
    """Clipped surrogate plus KL for one SDE step (paper Sec. 3; Flow-GRPO, arXiv 2505.05470, Eq. 5).

    Args:
        policy: as it is now.
        trajectory: of B samples.
        step: number of the SDE step, 0..K-1.
        advantages: [B].
        old_log_probs: [B] of the policy that drew the samples; None is strictly on-policy.
        old_mean: [B, ...] that policy's mean; given, the ratio is normalised as in GRPO-Guard.

    Returns:
        [B] loss per sample, detached stats, and this policy's detached log-probs [B] and mean [B, ...], which a later
        update on the same rollout takes as its old ones.
    """
    transition = policy.replay(trajectory, step)
    log_probs = transition.log_prob(trajectory.next_latents[:, step])
    if old_mean is not None and old_log_probs is not None:
        log_ratio = guard_log_ratio(log_probs - old_log_probs, transition.mean, old_mean, transition.std)
        loss, stats = clipped_surrogate(log_probs, advantages, clip_range=policy.clip_range, log_ratio=log_ratio)
    else:
        loss, stats = clipped_surrogate(
            log_probs, advantages, clip_range=policy.clip_range, old_log_probs=old_log_probs
        )
    if policy.kl_weight > 0:
        with torch.no_grad(), policy.reference():
            reference = policy.replay(trajectory, step)
        kl = transition.kl(reference)
        loss = loss + policy.kl_weight * kl
        stats["kl"] = kl.detach().mean()
    return loss, stats, log_probs.detach(), transition.mean.detach()


def language_objective(
    policy: LanguagePolicy, completions: Completions, advantages: Tensor, *, old_log_probs: Tensor | None = None
) -> tuple[Tensor, Stats, Tensor]:
    """Policy gradient on the rewrites' tokens plus k3 KL (paper Sec. 3; GRPO, arXiv 2402.03300).

    Args:
        policy: as it is now.
        completions: B of them.
        advantages: [B].
        old_log_probs: [B, T] of the policy that wrote them; None is strictly on-policy.

    Returns:
        [B] loss per completion (mean over its tokens), detached stats, and the detached log-probs [B, T].
    """
    log_probs = policy.log_probs(completions)
    loss, stats = clipped_surrogate(log_probs, advantages, clip_range=policy.clip_range, old_log_probs=old_log_probs)
    stats = {"clip_fraction": stats["clip_fraction"]}
    if policy.kl_weight > 0:
        with torch.no_grad(), policy.reference():
            reference = policy.log_probs(completions)
        kl = k3_kl(log_probs, reference)
        loss = loss + policy.kl_weight * kl
        stats["kl"] = masked_sequence_mean(kl.detach(), completions.mask).mean()
    # -log p of the drawn tokens: an unbiased estimate of the entropy, at no cost.
    stats["entropy"] = -masked_sequence_mean(log_probs.detach(), completions.mask).mean()
    return masked_sequence_mean(loss, completions.mask), stats, log_probs.detach()

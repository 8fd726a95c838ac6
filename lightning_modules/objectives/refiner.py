"""`RefinerGRPO`: how the refiner learns from its rewrites; the contract of `model.language_objective`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_modules.objectives.base import ObjectiveResult
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.rl.losses import clipped_surrogate, k3_kl, masked_sequence_mean
from lightning_modules.rollout import Completions
from rewards.arguments import check_minimum

Baseline = Literal["group", "refined", "leave_one_out"]


class RefinerGRPO:
    """Clipped policy gradient on the rewrites' tokens plus k3 KL (PromptRL, Sec. 3; GRPO, arXiv 2402.03300).

    Args:
        baseline: a rewrite is compared with its whole `group`, retained prompts included; with the `refined` ones
            alone, so that rewrites which are all alike learn nothing; or `leave_one_out`, with the mean of the other
            rewrites, without a division by their std (RLOO, arXiv 2402.14740).
        ratio: of every `token`, or of the `sequence`: exp of the mean log ratio of its tokens (GSPO, arXiv 2507.18071).
        clip_high: the ratio is clipped to 1 + this instead of 1 + `clip_range` (DAPO, arXiv 2503.14476).
        mean: over a `completion`'s tokens first, or over all `token`s of the step, so that long rewrites weigh more
            (DAPO).
        entropy_weight: weight of a bonus for the entropy of the rewrites, whose gradient is estimated from the drawn
            tokens: -log p is each token's own reward.
    """

    def __init__(
        self,
        baseline: Baseline = "group",
        ratio: Literal["token", "sequence"] = "token",
        clip_high: float | None = None,
        mean: Literal["completion", "token"] = "completion",
        entropy_weight: float = 0.0,
    ) -> None:
        check_minimum("model.language_objective", 0, clip_high=clip_high, entropy_weight=entropy_weight)
        self.baseline: Baseline = baseline
        self.ratio = ratio
        self.clip_high = clip_high
        self.mean = mean
        self.entropy_weight = entropy_weight

    def loss(
        self,
        policy: LanguagePolicy,
        completions: Completions,
        advantages: Tensor,
        *,
        old: ObjectiveResult | None = None,
        mean_length: float = 1.0,
    ) -> ObjectiveResult:
        """Computes the loss of a micro-batch.

        Args:
            policy: the current policy.
            completions: B completions of a rollout.
            advantages: [B].
            old: the result of the policy that wrote them; None is strictly on-policy.
            mean_length: mean number of tokens of all the step's completions, for `mean: token`.
        """
        reference = None
        if policy.kl_weight_now > 0:  # first, so that only one of both holds logits at a time
            with torch.no_grad(), policy.reference():
                reference = policy.log_probs(completions)
        log_probs, mask = policy.log_probs(completions), completions.mask
        old_log_probs = log_probs.detach() if old is None else old.log_probs
        log_ratio = token_log_ratio = log_probs - old_log_probs
        if self.ratio == "sequence":
            log_ratio = masked_sequence_mean(log_ratio, mask)[:, None].expand_as(log_probs)
        loss = clipped_surrogate(
            log_probs, advantages, clip_range=policy.clip_range, clip_high=self.clip_high, log_ratio=log_ratio
        ).loss
        ratio = log_ratio.detach().exp()
        high = policy.clip_range if self.clip_high is None else self.clip_high
        outside = (ratio - 1 > high) | (1 - ratio > policy.clip_range)
        stats = {"clip_fraction": masked_sequence_mean(outside.float(), mask).mean()}
        if self.entropy_weight:
            loss = loss + self.entropy_weight * token_log_ratio.exp() * log_probs.detach()
        if reference is not None:
            kl = k3_kl(log_probs, reference)
            loss = loss + policy.kl_weight_now * kl
            stats["kl"] = masked_sequence_mean(kl.detach(), mask).mean()
        # -log p of the drawn tokens: an unbiased estimate of the entropy, at no cost.
        stats["entropy"] = -masked_sequence_mean(log_probs.detach(), mask).mean()
        by_completion = masked_sequence_mean(loss, mask)
        if self.mean == "token":
            by_completion = by_completion * mask.sum(1) / mean_length
        return ObjectiveResult(by_completion, stats, log_probs.detach())

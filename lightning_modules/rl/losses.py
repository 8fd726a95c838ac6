"""Policy losses per element, which the caller masks, averages, weighs and logs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.rl.transition import mean_per_sample


@dataclass(frozen=True)
class Surrogate:
    """A policy loss before masking, averaging and weighing.

    Attributes:
        loss: [B, ...] to be minimised.
        stats: name -> detached scalar, for the log.
    """

    loss: Tensor
    stats: dict[str, Tensor]


def clipped_surrogate(
    log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float,
    clip_high: float | None = None,
    old_log_probs: Tensor | None = None,
    log_ratio: Tensor | None = None,
) -> Surrogate:
    """PPO's clipped surrogate objective as a loss, to be minimised (arXiv 1707.06347, Eq. 7).

        loss = max(-A r, -A clip(r, 1 - c, 1 + c_high)),  r = exp(log_ratio)

    The log ratio is `log_probs - old_log_probs`; or `log_ratio`, when that is given ready made (`guard_log_ratio`),
    and `log_probs` is then used for its shape alone; or, with neither, strictly on-policy: `log_probs -
    log_probs.detach()`, r = 1 exactly, whose gradient is the policy gradient `-A grad log p`. Giving both is an error.

    Args:
        log_probs: [B, ...] log-probs of the current policy.
        advantages: [B], expanded over the trailing dims, or broadcastable to `log_probs`.
        clip_range: c; its useful size depends on how the log-probs are averaged and on the type of SDE.
        clip_high: c_high, how far the ratio may rise (DAPO, arXiv 2503.14476, Sec. 3.1); None is c.
        old_log_probs: [B, ...] log-probs of the policy that drew the samples.
        log_ratio: [B, ...] log of the ratio r, with gradient.

    Returns:
        Loss [B, ...], and the stats `ratio_mean`, `clip_fraction` (share of ratios outside the clip range),
        `max_abs_log_ratio`, and `approx_kl` (mean of `r - 1 - log r`, an estimate of KL(old || current)).
    """
    assert old_log_probs is None or log_ratio is None
    assert advantages.ndim in (0, 1, log_probs.ndim)
    if log_ratio is None:
        log_ratio = log_probs - (log_probs if old_log_probs is None else old_log_probs).detach()
    assert log_ratio.shape == log_probs.shape
    if advantages.ndim == 1:
        assert advantages.shape == log_probs.shape[:1]
        advantages = advantages.reshape(-1, *[1] * (log_probs.ndim - 1))
    ratio, high = log_ratio.exp(), clip_range if clip_high is None else clip_high
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + high))
    outside = (ratio - 1 > high) | (1 - ratio > clip_range)
    return Surrogate(loss, {"clip_fraction": outside.to(ratio.dtype).mean()} | ratio_stats(log_ratio))


def trust_region_surrogate(log_ratio: Tensor, advantages: Tensor, divergence: Tensor, *, limit: float) -> Surrogate:
    """Flow-DPPO's surrogate (arXiv 2606.11025): a divergence masks the gradient, in place of a clip range.

        loss = -A r,  r = exp(log_ratio), without gradient where the policy is beyond the limit and would move further:
        divergence > limit and (A > 0 and r > 1 or A < 0 and r < 1)

    Args:
        log_ratio: [B] log of the ratio r, with gradient.
        advantages: [B] A.
        divergence: [B] KL to the policy that drew the samples, in nats, without gradient.
        limit: largest KL that does not mask.

    Returns:
        Loss [B]; the stats are `clipped_surrogate`'s, `clip_fraction` the share that is masked, and `divergence`.
    """
    assert log_ratio.shape == advantages.shape == divergence.shape
    ratio = log_ratio.exp()
    masked = (divergence > limit) & (((advantages > 0) & (ratio > 1)) | ((advantages < 0) & (ratio < 1)))
    loss = -advantages * torch.where(masked, ratio.detach(), ratio)
    stats = {"clip_fraction": masked.to(ratio.dtype).mean(), "divergence": divergence.mean()}
    return Surrogate(loss, stats | ratio_stats(log_ratio))


@torch.no_grad()
def ratio_stats(log_ratio: Tensor) -> dict[str, Tensor]:
    """Mean of the ratio, the largest |log ratio|, and `r - 1 - log r`, an estimate of KL(old || current): scalars."""
    return {
        "ratio_mean": log_ratio.exp().mean(),
        "max_abs_log_ratio": log_ratio.abs().max(),
        "approx_kl": (log_ratio.expm1() - log_ratio).mean(),
    }


def guard_log_ratio(log_ratio: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's ratio normalisation (arXiv 2510.22319): log ratios of all steps on one scale, centred on 0.

        std (log_ratio + mean_d [ (mean_d - old_mean_d)^2 / (2 std^2) ])  =  mean_d [ noise_d (mean_d - old_mean_d) ]

    Left as it is, the log ratio of a Gaussian step has a negative mean and a spread of 1 / std, so a symmetric clip
    range hardly ever binds from above, and binds differently at each step. The result goes to `clipped_surrogate` as
    its `log_ratio`.

    Args:
        log_ratio: [B] current minus old log-prob of a step, means over the dims as in `Transition.log_prob`.
        mean: [B, ...] the current policy's mean.
        old_mean: [B, ...] the mean of the policy that drew the step.
        std: broadcastable to `mean`, the std of both, the same for all dims of a sample.

    Returns:
        [B] normalised log ratio.
    """
    assert log_ratio.ndim == 1 and mean.shape == old_mean.shape and mean.shape[0] == log_ratio.shape[0]
    shift = mean_per_sample(0.5 * ((mean - old_mean.detach()) / std).square())
    return std.expand_as(mean).reshape(mean.shape[0], -1)[:, 0] * (log_ratio + shift)


def k3_kl(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(current || reference) ("Approximating KL Divergence", 2020).

        k3 = exp(d) - 1 - d >= 0,  d = ref_log_probs - log_probs

    Args:
        log_probs: [B, T] log-probs of the drawn tokens under the current policy; the gradient flows here.
        ref_log_probs: [B, T] the same under the reference policy.

    Returns:
        [B, T] estimate per token, in nats.
    """
    assert log_probs.shape == ref_log_probs.shape
    difference = ref_log_probs.detach() - log_probs
    # expm1: near the reference exp(d) - 1 would lose all digits.
    return difference.expm1() - difference


def masked_sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the valid tokens of each row.

    Args:
        values: [B, T] one value per token; those outside the mask may be anything.
        mask: [B, T] bool, True where a token counts.

    Returns:
        [B] means; 0 for a row without valid tokens.
    """
    assert values.ndim == 2 and mask.shape == values.shape
    return torch.where(mask, values, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

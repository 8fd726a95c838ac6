"""`Transition`: the Gaussian from which an SDE step draws the next latents, with its log-density and its KL."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transition:
    """The Gaussian `N(mean, std^2)` from which a step draws the next latents.

    Args:
        mean: [B, ...] expected next latents.
        std: broadcastable to `mean`, standard deviation, in the units of the latents.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Returns `mean + std * noise`, [B, ...], for standard normal `noise` [B, ...]."""
        assert noise.shape == self.mean.shape
        return self.mean + self.std * noise

    def log_prob(self, next_latents: Tensor) -> Tensor:
        """Computes the log-density of a step.

            log p = mean_d [ -(x'_d - mean_d)^2 / (2 std^2) - log(std) - log(2 pi) / 2 ]

        Args:
            next_latents: [B, ...] the x' that the next step consumes (exactly that tensor, or the ratio will not be 1).

        Returns:
            [B] log-density in nats, averaged over the non-batch dims (Flow-GRPO, arXiv 2505.05470, released code).
        """
        assert next_latents.shape == self.mean.shape
        mean, std = at_least_fp32(self.mean), _nonzero(at_least_fp32(self.std))
        deviation = (at_least_fp32(next_latents) - mean) / std
        return mean_per_sample(-0.5 * deviation.square() - std.log() - 0.5 * math.log(2 * math.pi))

    def kl(self, other: Transition) -> Tensor:
        """KL divergence to a step of the same noise level, `mean_d [ (mean_d - mean_other_d)^2 / (2 std^2) ]`.

        Args:
            other: the reference policy's step from the same latents; its std is taken to be equal to this one's.

        Returns:
            [B] KL in nats, averaged over the non-batch dims (Flow-GRPO, arXiv 2505.05470).
        """
        assert other.mean.shape == self.mean.shape
        std = _nonzero(at_least_fp32(self.std))
        return mean_per_sample(0.5 * ((at_least_fp32(self.mean) - at_least_fp32(other.mean)) / std).square())


def mean_per_sample(values: Tensor) -> Tensor:
    """Returns the mean over all dims but the first of `values` [B, ...], [B]."""
    return values.reshape(values.shape[0], -1).mean(dim=1)


def at_least_fp32(values: Tensor) -> Tensor:
    """Converts to fp32; float64 stays float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _nonzero(std: Tensor) -> Tensor:
    if bool((std == 0).any()):
        raise ValueError(
            "A step without noise (`noise_level` 0, or the last step of cps) has no log-prob and no KL; "
            "leave it out of `sde_steps`."
        )
    return std

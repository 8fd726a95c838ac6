"""Objectives that weigh or contrast flow matching on single images: DiffusionNFT, AWM, reward-weighted matching."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.objectives.base import FlowBatch, ObjectiveResult, Old
from lightning_modules.objectives.forward import ForwardObjective, Prediction
from lightning_modules.policies.flow import FlowPolicy
from lightning_modules.policies.kept import Decay
from lightning_modules.rl.losses import clipped_surrogate
from lightning_modules.rl.matching import matching_error, negative_aware_loss
from rewards.arguments import check_minimum


class DiffusionNFT(ForwardObjective):
    """Negative-aware fine-tuning: good images pull, bad ones push (DiffusionNFT, arXiv 2509.16117, Eq. 5).

    An image's advantage A becomes the probability `r = 1/2 + clip(A / advantage_range, -1, 1) / 2` of being good. The
    old policy, which the velocities are measured from, also draws the rollouts.

    Args:
        beta: how far the implied positive and negative policies lie from the old one.
        advantage_range: advantages beyond this are as good (or bad) as any; the loss is multiplied by it, as in the
            published code.
        adaptive: weighs each square by the prediction's own mean absolute error (the published code does).
        old_policy: how the old policy follows the one that learns; null: it is that one, in every step. The published
            code has slope .001 up to .5, for OCR .0075 from step 75 up to .999.
        levels: as for `ForwardObjective`.
    """

    def __init__(
        self,
        beta: float = 1.0,
        advantage_range: float = 5.0,
        adaptive: bool = True,
        old_policy: Decay | None = None,
        levels: int | None = None,
    ) -> None:
        super().__init__(levels)
        if not (0 < beta < math.inf and 0 < advantage_range < math.inf):
            raise ValueError(
                f"`model.objective` DiffusionNFT has beta={beta}, advantage_range={advantage_range}: "
                "use numbers above 0."
            )
        self.beta = beta
        self.advantage_range = advantage_range
        self.adaptive = adaptive
        self.old_policy = old_policy

    def of_velocity(self, found: Prediction, batch: FlowBatch) -> ObjectiveResult:
        """Computes the loss [B] of a velocity, see `ForwardObjective.of_velocity`."""
        velocity, target = found.velocity, found.at.target
        before = velocity.detach() if found.old_velocity is None else found.old_velocity
        goodness = 0.5 + 0.5 * (batch.advantages / self.advantage_range).clamp(-1, 1)
        sigma = found.at.sigma if self.adaptive else None
        loss = self.advantage_range * negative_aware_loss(
            velocity, before, target, goodness, beta=self.beta, sigma=sigma
        )
        error = matching_error(velocity, target).detach()
        stats = {"matching": error.mean(), "moved": matching_error(velocity.detach(), before).mean()}
        return ObjectiveResult(loss, stats, -error)

    def speaks(self, batch: FlowBatch) -> Tensor:
        """Returns [B] bool: all, since an advantage of 0 still holds the policy to the old one, if that is another."""
        return super().speaks(batch) if self.old_policy is None else torch.ones_like(batch.advantages, dtype=torch.bool)


class AWM(ForwardObjective):
    """Advantage-weighted matching: the negative flow-matching loss stands in for a log-prob (AWM, arXiv 2509.25050).

        loss = max(-A r, -A clip(r, 1 - c, 1 + c)),   log r = w(sigma) (old error - error)

    The clip range is `flow.sampling.clip_range`, which does nothing with one update a rollout.

    Args:
        weighting: w of a level, 1 (`uniform`), sigma or its square.
        levels: as for `ForwardObjective`.
    """

    compares_with_old = True

    def __init__(
        self, weighting: Literal["uniform", "sigma", "sigma_squared"] = "uniform", levels: int | None = None
    ) -> None:
        super().__init__(levels)
        self.weighting = weighting

    def of_velocity(self, found: Prediction, batch: FlowBatch) -> ObjectiveResult:
        """Computes the loss [B] of a velocity, see `ForwardObjective.of_velocity`."""
        error = matching_error(found.velocity, found.at.target)
        weight = found.at.sigma.to(error) ** {"uniform": 0, "sigma": 1, "sigma_squared": 2}[self.weighting]
        log_probs = -weight * error
        old_log_probs = None if found.old is None else found.old.log_probs
        surrogate = clipped_surrogate(
            log_probs, batch.advantages, clip_range=found.clip_range, old_log_probs=old_log_probs
        )
        return ObjectiveResult(
            surrogate.loss, surrogate.stats | {"matching": error.detach().mean()}, log_probs.detach()
        )


class RewardWeighted(ForwardObjective):
    """Flow matching on the best images of each group, the baseline that every other objective should beat.

    Args:
        best: largest number of images of a group that are learned from, of those above its mean; ties go to the first.
        levels: as for `ForwardObjective`.
    """

    needs_whole_groups = True

    def __init__(self, best: int = 1, levels: int | None = None) -> None:
        super().__init__(levels)
        check_minimum("model.objective", 1, best=best)
        self.best = best

    def prepare(self, policy: FlowPolicy, batch: FlowBatch, every: Sequence[slice], old: Old) -> FlowBatch:
        """Weighs the best images of each group, so that they have the mean weight 1."""
        del policy, every, old
        weights = torch.zeros_like(batch.advantages)
        for group in batch.groups.unique():
            rows = batch.best_first(int(group))[: self.best]
            chosen = rows[batch.advantages[rows] > 0]
            weights[chosen] = int((batch.groups == group).sum()) / max(1, len(chosen))
        return replace(batch, weights=weights[:, None])

    def speaks(self, batch: FlowBatch) -> Tensor:
        """Returns [B] bool, True for the best images."""
        assert batch.weights is not None
        return batch.weights[:, 0] != 0

    def of_velocity(self, found: Prediction, batch: FlowBatch) -> ObjectiveResult:
        """Computes the loss [B] of a velocity, see `ForwardObjective.of_velocity`."""
        assert batch.weights is not None
        error = matching_error(found.velocity, found.at.target)
        return ObjectiveResult(batch.weights[:, 0] * error, {"matching": error.detach().mean()}, -error.detach())

"""Objectives that compare the images of a group with each other: online DPO, and DGPO."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_modules.objectives.base import FlowBatch, ObjectiveResult, Old
from lightning_modules.objectives.forward import ForwardObjective, Prediction
from lightning_modules.policies.flow import FlowPolicy
from lightning_modules.rl.matching import matching_error, preference_weights


class PreferenceObjective(ForwardObjective):
    """Raises the likelihood of a group's better images over its worse ones, measured from the reference.

    The preference couples all images of a group, and its gradient is a weighted sum of theirs: the weights are found
    first, without gradient, so that micro-batches may be of any size.

    Args:
        beta: temperature of the preference, for errors averaged over the latents' dims.
        levels: as for `ForwardObjective`.
    """

    needs_whole_groups = True
    needs_reference = True
    shared_noise = True

    def __init__(self, beta: float, levels: int | None = None) -> None:
        super().__init__(levels)
        if not 0 < beta < math.inf:
            raise ValueError(f"`model.objective` {type(self).__name__} has beta={beta}: use a number above 0.")
        self.beta = beta

    @abstractmethod
    def sides(self, batch: FlowBatch) -> Tensor:
        """Returns [B] each image's share in its group's preference, above 0 for the better ones."""

    def prepare(self, policy: FlowPolicy, batch: FlowBatch, every: Sequence[slice], old: Old) -> FlowBatch:
        """Finds the weights of the images' matching errors, see `FlowObjective.prepare`."""
        del old
        sides, weights, losses = self.sides(batch), [], []
        for term in range(self.num_terms(batch.trajectory)):
            errors, reference = torch.zeros_like(sides), torch.zeros_like(sides)
            for rows in every:
                if policy.sharded or sides[rows].any():
                    errors[rows], reference[rows] = self.errors(policy, batch.rows(rows), term)
            found, loss = preference_weights(errors, reference, sides, batch.groups, beta=self.beta)
            weights.append(found)
            losses.append(loss.mean())
        # The mean over images times their number in a group is the mean over groups.
        size = len(batch) / max(1, len(batch.groups.unique()))
        return replace(batch, weights=size * torch.stack(weights, 1), stats={"preference": torch.stack(losses).mean()})

    @torch.no_grad()
    def errors(self, policy: FlowPolicy, batch: FlowBatch, term: int) -> tuple[Tensor, Tensor]:
        """Computes the matching errors [B] of the policy, and those of its reference at the same noise."""
        at, conditioning = self.noised(batch, term), batch.trajectory.conditioning
        errors = matching_error(policy.velocity(at.latents, at.sigma, conditioning), at.target)
        with policy.reference():
            return errors, matching_error(policy.velocity(at.latents, at.sigma, conditioning), at.target)

    def speaks(self, batch: FlowBatch) -> Tensor:
        """Returns [B] bool, True for images that take part."""
        return self.sides(batch) != 0

    def of_velocity(self, found: Prediction, batch: FlowBatch) -> ObjectiveResult:
        """Computes a loss [B] with the preference's gradient, see `ForwardObjective.of_velocity`."""
        assert batch.weights is not None
        error = matching_error(found.velocity, found.at.target)
        return ObjectiveResult(
            batch.weights[:, found.term] * error, {"matching": error.detach().mean()}, -error.detach()
        )


class DPO(PreferenceObjective):
    """Online Diffusion-DPO: the best image of each group against the worst (arXiv 2311.12908, Eq. 14).

    Args:
        beta: temperature; the paper's beta T omega.
        levels: as for `ForwardObjective`.
    """

    def __init__(self, beta: float = 2000.0, levels: int | None = None) -> None:
        super().__init__(beta, levels)

    def sides(self, batch: FlowBatch) -> Tensor:
        """Returns [B] 1 for the best image of a group, -1 for the worst, else 0; nothing of a group without spread."""
        sides = torch.zeros_like(batch.advantages)
        for group in batch.groups.unique():
            rows = batch.best_first(int(group))
            if len(rows) and batch.advantages[rows[0]] > batch.advantages[rows[-1]]:
                sides[rows[0]], sides[rows[-1]] = 1.0, -1.0
        return sides


class DGPO(PreferenceObjective):
    """Direct group preference: all images of a group, weighed by their advantages (DGPO, arXiv 2510.08425).

    Args:
        beta: temperature.
        levels: as for `ForwardObjective`.
    """

    def __init__(self, beta: float = 100.0, levels: int | None = None) -> None:
        super().__init__(beta, levels)

    def sides(self, batch: FlowBatch) -> Tensor:
        """Returns advantages over the number of images of a group."""
        return batch.advantages * len(batch.groups.unique()) / len(batch)

"""`FlowObjective`: how a flow model learns from a rollout; the contract of `model.objective`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_modules.policies.flow import FlowPolicy
from lightning_modules.policies.kept import Decay
from lightning_modules.rollout import Trajectory


@dataclass(frozen=True)
class ObjectiveResult:
    """Loss of a micro-batch of B samples, and what else its forward pass found.

    Attributes:
        loss: [B] to be averaged and minimised.
        stats: name -> detached scalar, for the log.
        log_probs: this policy's, detached; [B] of a term of a flow model's loss, or [B, T] of a completion's tokens.
        mean: [B, ...] this policy's mean of an SDE step, detached; None for other terms, and for language.
    """

    loss: Tensor
    stats: dict[str, Tensor]
    log_probs: Tensor
    mean: Tensor | None = None

    def detach(self) -> ObjectiveResult:
        """Drops the graph of the loss: what a later update on the same rollout compares itself with."""
        return replace(self, loss=self.loss.detach())


Old = dict[Any, ObjectiveResult]
"""(agent, first row, term) -> result of the policy that drew a micro-batch."""


@dataclass(frozen=True)
class FlowBatch:
    """B samples from which a flow model learns in one optimizer step, group by group.

    Attributes:
        trajectory: the paths of the sampler.
        advantages: [B].
        rewards: [B], which rank samples whose advantages are clipped.
        counted: [B] bool, False for samples without a score.
        groups: [B] long, number of each sample's group.
        seeds: B seeds of the noise that an objective adds, other ones for each sample and rollout.
        group_seeds: B seeds, equal for the samples of a group.
        levels_seed: one seed for the whole rollout, on all processes.
        weights: [B, terms] of an objective that compares whole groups; None before `FlowObjective.prepare`.
        stats: name -> scalar of the whole batch, for the log.
    """

    trajectory: Trajectory
    advantages: Tensor
    rewards: Tensor
    counted: Tensor
    groups: Tensor
    seeds: Sequence[int]
    group_seeds: Sequence[int]
    levels_seed: int
    weights: Tensor | None = None
    stats: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.advantages)

    def rows(self, rows: slice) -> FlowBatch:
        """Selects a micro-batch."""
        return FlowBatch(
            self.trajectory.rows(rows),
            self.advantages[rows],
            self.rewards[rows],
            self.counted[rows],
            self.groups[rows],
            self.seeds[rows],
            self.group_seeds[rows],
            self.levels_seed,
            None if self.weights is None else self.weights[rows],
        )

    def best_first(self, group: int) -> Tensor:
        """Returns the rows of a group's scored samples, the best first: by advantage, then by reward."""
        rows = ((self.groups == group) & self.counted).nonzero()[:, 0]
        rows = rows[self.rewards[rows].argsort(descending=True, stable=True)]
        return rows[self.advantages[rows].argsort(descending=True, stable=True)]


class FlowObjective(ABC):
    """Loss of a flow model on the samples of a rollout, as a sum of terms (SDE steps, or levels of noise).

    Constructors only store and check their arguments. An objective holds no state of a run.
    """

    needs_sde_steps: ClassVar[bool] = False
    """True if it learns from SDE steps; the others take any rollout, by Euler steps alone too (`sde_steps: 0`)."""
    needs_whole_groups: ClassVar[bool] = False
    """True if a sample's loss depends on all samples of its group, which one process then has to draw."""
    compares_with_old: ClassVar[bool] = False
    """True if later updates on a rollout are compared with the results of the policy that drew it."""
    needs_reference: ClassVar[bool] = False
    """True if it compares with `FlowPolicy.reference`, also where the KL's weight is 0."""
    old_policy: Decay | None = None
    """How the old policy, which draws the rollouts, follows the one that learns; None: it is the one that learns."""

    def check(self, policy: FlowPolicy) -> None:
        """Raises ValueError if the settings of a policy that learns do not fit; called before weights are loaded."""
        if self.needs_sde_steps and not policy.sampling.sde_steps:
            raise ValueError(
                f"`model.objective` {type(self).__name__} learns from SDE steps, but `flow.sampling.sde_steps` is "
                f"{policy.sampling.sde_steps}, so the flow model has nothing to learn from; add some."
            )

    @abstractmethod
    def num_terms(self, trajectory: Trajectory) -> int:
        """Returns the number of terms of each sample's loss."""

    @abstractmethod
    def loss(self, policy: FlowPolicy, batch: FlowBatch, term: int, old: ObjectiveResult | None) -> ObjectiveResult:
        """Computes one term of the loss of a micro-batch.

        Args:
            policy: the current policy.
            batch: B samples.
            term: number of the term, from 0.
            old: result of the policy that drew the samples; None is strictly on-policy.
        """

    def prepare(self, policy: FlowPolicy, batch: FlowBatch, every: Sequence[slice], old: Old) -> FlowBatch:
        """Finds what the losses need of the whole batch, without gradients, before the first of them.

        Args:
            policy: the current policy.
            batch: all samples of the optimizer step.
            every: rows of each micro-batch; where the policy is sharded, as many on all processes, so some come again.
            old: results of the policy that drew the samples; empty is strictly on-policy.
        """
        del policy, every, old
        return batch

    def speaks(self, batch: FlowBatch) -> Tensor:
        """Returns [B] bool, False for samples whose loss has no gradient (without a KL)."""
        return batch.advantages != 0

    @torch.no_grad()
    def before_update(self, policy: FlowPolicy, batch: FlowBatch, term: int) -> ObjectiveResult:
        """Computes what later updates compare with, while the policy is the one that drew a micro-batch."""
        return self.loss(policy, batch, term, None)

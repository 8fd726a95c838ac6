"""`FlowGRPO`: policy gradient on the SDE steps of a rollout, with the variants that later papers gave it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.objectives.base import FlowBatch, FlowObjective, ObjectiveResult, Old
from lightning_modules.policies.flow import FlowPolicy
from lightning_modules.rl.losses import Surrogate, clipped_surrogate, guard_log_ratio, trust_region_surrogate
from lightning_modules.rl.sde import Transition, sde_by_name
from lightning_modules.rollout import Trajectory
from rewards.arguments import check_minimum

RatioNormalization = bool | Literal["over_dt"]
"""GRPO-Guard's normalisation of the flow policy's ratio: off, on, or on with the surrogate divided by |dt|."""


class FlowGRPO(FlowObjective):
    """Clipped policy gradient plus KL on every SDE step (Flow-GRPO, arXiv 2505.05470, Eq. 5; PromptRL, Sec. 3).

    Which steps are SDE steps, and the clip range, are `flow.sampling`'s: fixed ones, random windows or single steps, or
    MixGRPO's moving window (arXiv 2507.21802).

    Args:
        ratio_normalization: normalises the ratio as in GRPO-Guard (arXiv 2510.22319), in the first update of a rollout
            too, so that all updates weigh the KL alike; `over_dt` also divides the surrogate by the step's |dt|, as the
            published code does. For several updates per rollout.
        ratio: of one `step`, or of the whole `trajectory`: exp of the mean log ratio of its SDE steps, as GSPO (arXiv
            2507.18071) has it of a sequence, which is clipped as one.
        trust_region: takes the place of the clip range (Flow-DPPO, arXiv 2606.11025): a step that moves away from the
            policy that drew it gets no gradient where the KL to that policy is above this, in nats, averaged over the
            latents' dims; null clips.
        step_weights: weighs the surrogates of the SDE steps alike (`equal`), or by their `noise`, std of the step over
            the mean of all (TempFlow-GRPO, arXiv 2508.04324, Eq. 8).
        clip_high: the ratio is clipped to 1 + this instead of 1 + `clip_range` (DAPO, arXiv 2503.14476).
    """

    needs_sde_steps = True
    compares_with_old = True

    def __init__(
        self,
        ratio_normalization: RatioNormalization = False,
        ratio: Literal["step", "trajectory"] = "step",
        trust_region: float | None = None,
        step_weights: Literal["equal", "noise"] = "equal",
        clip_high: float | None = None,
    ) -> None:
        check_minimum("model.objective", 0, trust_region=trust_region, clip_high=clip_high)
        if ratio == "trajectory" and (ratio_normalization or trust_region is not None or step_weights != "equal"):
            raise ValueError(
                "`model.objective` has ratio: trajectory, which goes with none of ratio_normalization, "
                "trust_region and step_weights: leave these out, or use ratio: step."
            )
        if trust_region is not None and clip_high is not None:
            raise ValueError("`model.objective` has trust_region, which clips nothing: leave clip_high out.")
        self.ratio_normalization = ratio_normalization
        self.ratio = ratio
        self.trust_region = trust_region
        self.step_weights = step_weights
        self.clip_high = clip_high

    def num_terms(self, trajectory: Trajectory) -> int:
        """Returns the number of SDE steps."""
        return len(trajectory.sde_steps)

    def loss(self, policy: FlowPolicy, batch: FlowBatch, term: int, old: ObjectiveResult | None) -> ObjectiveResult:
        """Computes the loss of SDE step number `term`, see `FlowObjective.loss`."""
        trajectory = batch.trajectory
        transition = policy.replay(trajectory, term)
        log_probs = transition.log_prob(trajectory.next_latents[:, term])
        surrogate = self._surrogate(policy, batch, term, transition, log_probs, old)
        number = trajectory.sde_steps[term]
        dt = (trajectory.sigmas[number] - trajectory.sigmas[number + 1]).to(log_probs.device)
        loss, stats = surrogate.loss, surrogate.stats
        if self.step_weights == "noise":
            loss = loss * _noise_share(policy, trajectory, term).to(loss)
        if self.ratio_normalization == "over_dt":
            loss = loss / dt
        if policy.kl_weight_now > 0:
            with torch.no_grad(), policy.reference():
                reference = policy.replay(trajectory, term)
            kl = transition.kl(reference)
            # Flow-GRPO divides by its step's variance per unit of time; Flow-CPS's variance is not one.
            if policy.kl_units == "flow_grpo" and policy.sampling.sde_type != "cps":
                kl = kl * dt
            elif policy.kl_units == "velocity":  # the mean is linear in the velocity
                step = _step(policy, trajectory, term)
                kl = kl * (2 * (step.std / step.mean).square().flatten()).to(kl)
            loss = loss + policy.kl_weight_now * kl
            stats = stats | {"kl": kl.detach().mean()}
        return ObjectiveResult(loss, stats, log_probs.detach(), transition.mean.detach())

    def _surrogate(
        self,
        policy: FlowPolicy,
        batch: FlowBatch,
        term: int,
        transition: Transition,
        log_probs: Tensor,
        old: ObjectiveResult | None,
    ) -> Surrogate:
        old_log_probs, old_mean = log_probs.detach(), transition.mean.detach()
        if old is not None:
            old_log_probs, old_mean = old.log_probs, (old_mean if old.mean is None else old.mean)
        log_ratio = log_probs - old_log_probs
        if batch.weights is not None:  # the mean of all steps, to which this one adds its part of the gradient
            log_ratio = batch.weights[:, term] + log_probs - log_probs.detach()
        if self.ratio_normalization:
            log_ratio = guard_log_ratio(log_ratio, transition.mean, old_mean, transition.std)
        if self.trust_region is not None:
            divergence = Transition(old_mean, transition.std).kl(transition).detach()
            return trust_region_surrogate(log_ratio, batch.advantages, divergence, limit=self.trust_region)
        return clipped_surrogate(
            log_probs,
            batch.advantages,
            clip_range=policy.clip_range,
            clip_high=self.clip_high,
            log_ratio=log_ratio,
        )

    @torch.no_grad()
    def prepare(self, policy: FlowPolicy, batch: FlowBatch, every: Sequence[slice], old: Old) -> FlowBatch:
        """Finds the mean log ratios of whole trajectories, see `FlowObjective.prepare`."""
        if self.ratio == "step" or not old:
            return batch
        log_ratio, steps = torch.zeros_like(batch.advantages), range(len(batch.trajectory.sde_steps))
        for rows in every:
            drawn = [old["flow", rows.start, step] for step in steps if ("flow", rows.start, step) in old]
            if drawn or policy.sharded:  # a micro-batch that taught nothing has no old results
                part = batch.trajectory.rows(rows)
                now = [policy.replay(part, step).log_prob(part.next_latents[:, step]) for step in steps]
                changes = [after - before.log_probs for before, after in zip(drawn, now, strict=False)]
                log_ratio[rows] = torch.stack(changes).mean(0) if drawn else 0.0
        return replace(batch, weights=log_ratio[:, None].expand(-1, len(steps)))

    @torch.no_grad()
    def before_update(self, policy: FlowPolicy, batch: FlowBatch, term: int) -> ObjectiveResult:
        """Takes the trajectory's own log-probs, where rollout and update have the same micro-batches."""
        part = batch.trajectory
        log_probs, mean = part.log_probs[:, term], None
        if (
            self.ratio_normalization
            or self.trust_region is not None
            or policy.drawn_together != policy.micro_batch_size
        ):
            transition = policy.replay(part, term)
            log_probs, mean = transition.log_prob(part.next_latents[:, term]), transition.mean
        return ObjectiveResult(log_probs.new_zeros(()), {}, log_probs, mean)


def _step(policy: FlowPolicy, trajectory: Trajectory, term: int) -> Transition:
    """Returns std of an SDE step and, as `mean`, what its mean changes by for a velocity of 1; both [1]."""
    number, sigmas = trajectory.sde_steps[term], trajectory.sigmas
    one = torch.ones_like(sigmas[:1])
    sde, level = sde_by_name(policy.sampling.sde_type), policy.sampling.noise_level
    sigma, sigma_next = sigmas[number], sigmas[number + 1]
    return sde(0 * one, one, sigma, sigma_next, noise_level=level, sigma_max=sigmas[1])


def _noise_share(policy: FlowPolicy, trajectory: Trajectory, term: int) -> Tensor:
    """Returns the std of an SDE step over the mean of all of them, a scalar."""
    stds = torch.cat([_step(policy, trajectory, other).std.flatten() for other in range(len(trajectory.sde_steps))])
    return stds[term] / stds.mean()

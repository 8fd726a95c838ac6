"""PromptRL (arXiv 2602.01382): joint GRPO of a prompt refiner and a flow-matching image model.

One step: `collect` a rollout (rewrite, draw, score, compare within groups), then `update` both agents on it.

Departures from the paper:
1. The reward always judges against the original prompt (Algorithm 1 reads as if it were the rewrite; the released
   trainers do as we do).
2. Strictly on-policy steps use the ratio exp(log p - stop_gradient(log p)), whose gradient needs no stored log-prob, so
   the rounding of bf16 cannot push samples out of the clip range; a guard measures what the ratio would have been.
3. A refiner's loss is the mean over its completions' tokens, then over completions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from PIL.Image import Image
from torch import Tensor

from datamodules.base import PromptSample
from datamodules.chunks import chunks
from datamodules.resumable import ResumableLoader
from lightning_modules.distributed import average_gradients, clip, gather_lists, no_backward_sync
from lightning_modules.evaluation import EvaluatedAgents
from lightning_modules.groups import check_group, group_formats, group_prompts, source_images, tag_numbers
from lightning_modules.objectives import ObjectiveResult, flow_objective, language_objective
from lightning_modules.policies.flow import FlowPolicy, to_pil
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.rl.advantages import group_advantages, group_stats
from lightning_modules.rollout import Rollout
from lightning_modules.scoring import Scoring
from lightning_modules.seeding import seed_of, seed_step
from lightning_modules.step_metrics import Averages, group_similarity, refine_stats, reward_stats
from rewards.base import Reward, RewardUnavailable


class PromptRL(EvaluatedAgents):
    """Trains both agents. `language: null` is flow-only RL; an agent whose learning rate is null is frozen.

    Args:
        flow: the image model.
        reward: scores images against the original prompts.
        language: the refiner, or null.
        group_size: n, prompts drawn per original prompt.
        num_retained: m < n of them are the original itself (m = n without a refiner).
        images_per_prompt: M images of each of the n; the refiner gets the mean of a rewrite's M advantages.
        format_weight: weight of the format reward (1 for a well-formed answer).
        task_weight: weight of the task reward.
        advantage_scale: divide by the std of the "group", of the "tag" within the batch, or not ("none").
        updates_per_rollout: optimizer steps on one rollout; 1 is strictly on-policy.
        ratio_normalization: normalises the flow policy's ratio as in GRPO-Guard; for several updates per rollout.
        optimizer: gets one parameter group per agent; weight decay and betas are the agents' own.
        check_ratio_every: number of steps between two checks that replayed log-probs equal sampled ones.
        max_invalid_steps: stop after this many steps in a row in which no image could be scored.
        overlap_scoring: scores a micro-batch of images while the flow model draws the next one; same results.
        seed: seed of all rollout noise.
    """

    def __init__(
        self,
        flow: FlowPolicy,
        reward: Reward,
        language: LanguagePolicy | None = None,
        group_size: int = 8,
        num_retained: int = 2,
        images_per_prompt: int = 1,
        format_weight: float = 1.0,
        task_weight: float = 1.0,
        advantage_scale: Literal["group", "tag", "none"] = "group",
        updates_per_rollout: int = 1,
        ratio_normalization: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        check_ratio_every: int = 50,
        max_invalid_steps: int = 5,
        overlap_scoring: bool = True,
        seed: int = 42,
    ) -> None:
        super().__init__(flow, language, optimizer)
        check_group(group_size, num_retained, language is not None)
        self.reward = reward
        self.group_size = group_size
        self.num_retained = num_retained
        self.images_per_prompt = images_per_prompt
        self.format_weight = format_weight
        self.task_weight = task_weight
        self.advantage_scale = advantage_scale
        self.updates_per_rollout = updates_per_rollout
        self.ratio_normalization = ratio_normalization
        self.check_ratio_every = check_ratio_every
        self.max_invalid_steps = max_invalid_steps
        self.overlap_scoring = overlap_scoring
        self.seed = seed
        self.latest: Rollout | None = None
        """Last rollout, for callbacks to show."""
        self._ahead: Rollout | None = None
        self._checked = False
        self._invalid_steps = 0
        self._seconds: dict[str, float] = {}
        self._logged: set[str] = set()

    def setup(self, stage: str) -> None:
        """Loads the scorers, except for predictions, which need none."""
        if stage != "predict":
            self.reward.load()

    def on_train_start(self) -> None:
        """Collects the first rollout before the evaluation, which would let a reward that cannot work wait minutes."""
        loader = self.trainer.train_dataloader
        if self.global_step == 0 and isinstance(loader, ResumableLoader):
            with self.trainer.precision_plugin.train_step_context():
                self._ahead = self._begin_step(loader.first_batch())
        super().on_train_start()

    # --- one step -------------------------------------------------------------------------------------------------

    def training_step(self, batch: Sequence[PromptSample], batch_idx: int) -> None:
        """Collects a rollout for G prompts and updates both agents on it."""
        rollout, self._ahead = self._ahead or self._begin_step(batch), None
        self.latest = rollout
        if not self._checked or self.global_step % self.check_ratio_every == 0:
            self._checked = True
            # Straight to the loggers: `self.log` would repeat the number in every step until the epoch's end.
            ratios = {f"train/{agent}/max_log_ratio": value for agent, value in self.check_ratio(rollout).items()}
            for logger in self.loggers:
                logger.log_metrics(ratios, step=self.global_step)
        stats = self.update(rollout)
        self.num_rollouts += len(rollout.images) * self.trainer.world_size
        self._log_step(rollout, stats)

    def collect(self, samples: Sequence[PromptSample]) -> Rollout:
        """Rewrites, draws, scores and compares within groups: makes the experience of G prompts."""
        refined = self.group_size - self.num_retained
        completions = None
        with self._timed("refine"):
            if self.language is not None:
                completions = self.language.refine(samples, refined)
        rewrites = None if completions is None else completions.rewrites
        prompts = group_prompts(samples, rewrites, self.num_retained, self.images_per_prompt)
        per_group = self.group_size * self.images_per_prompt
        judged = [sample for sample in samples for _ in range(per_group)]
        seeds = [
            seed_of("rollout", self.seed, self.global_step, sample.id, slot)
            for sample in samples
            for slot in range(per_group)
        ]
        images: list[Image] = []

        def score(rows: slice, pixels: Tensor) -> None:
            images.extend(to_pil(pixels))
            scoring.submit(judged[rows], images[rows])

        with Scoring(self.reward, self.device, overlap=self.overlap_scoring) as scoring:
            with self._timed("rollout"):
                window_seed = seed_of("window", self.seed, self.global_step)
                trajectory = self.flow.rollout(
                    prompts, seeds, window_seed=window_seed, on_drawn=score, images=source_images(judged)
                )
            with self._timed("reward"):  # what the overlap did not hide
                scores = scoring.scores()
        valid = torch.tensor([score.valid for score in scores], device=self.device).view(-1, per_group)
        task = torch.tensor([score.rl for score in scores], device=self.device).view(-1, per_group)
        rewards = self.task_weight * task
        if completions is not None:
            formats = group_formats(completions.formatted, len(samples), self.num_retained, self.images_per_prompt)
            rewards = rewards + self.format_weight * formats
        tags = tag_numbers(samples).to(rewards.device) if self.advantage_scale == "tag" else None
        advantages = group_advantages(rewards, valid, scale=self.advantage_scale, tags=tags)
        counted = valid & (valid.sum(1, keepdim=True) >= 2)
        slots = (len(samples), self.group_size, self.images_per_prompt)
        # The mean over a rewrite's scored images; without any, the rewrite does not count.
        by_slot = advantages.view(slots).sum(-1) / counted.view(slots).sum(-1).clamp(min=1)
        refines = completions is not None
        return Rollout(
            samples=samples,
            prompts=prompts,
            completions=completions,
            trajectory=trajectory,
            images=images,
            scores=scores,
            rewards=rewards,
            valid=valid,
            advantages=advantages,
            language_advantages=by_slot[:, self.num_retained :].flatten() if refines else None,
            language_counted=counted.view(slots).any(-1)[:, self.num_retained :].flatten() if refines else None,
        )

    def update(self, rollout: Rollout) -> dict[str, Tensor]:
        """Takes `updates_per_rollout` optimizer steps on a rollout; returns stats for the log."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        stats = Averages()
        old: dict[Any, ObjectiveResult] = {}  # (agent, rows, step) -> result of the policy that drew the rollout
        for number in range(self.updates_per_rollout):
            optimizer.zero_grad()
            with no_backward_sync(self.trainer):
                if self.language is not None and self.language.trained:
                    with self._timed("language_update"):
                        self._language_backward(self.language, rollout, stats, old, first=number == 0)
                if self.flow.trained:
                    with self._timed("flow_update"):
                        self._flow_backward(rollout, stats, old, first=number == 0)
            for agent, group in zip(self._learners(), optimizer.param_groups, strict=True):
                average_gradients(group["params"])
                stats.add(f"train/{group['name']}/grad_norm", clip(group["params"], agent.max_grad_norm))
            optimizer.step()
        return stats.compute()

    def _language_backward(
        self, policy: LanguagePolicy, rollout: Rollout, stats: Averages, old: dict[Any, ObjectiveResult], *, first: bool
    ) -> None:
        assert rollout.completions is not None and rollout.language_advantages is not None
        counts = rollout.language_counted
        counts = torch.ones_like(rollout.language_advantages) if counts is None else counts
        total = len(rollout.completions)
        for rows in chunks(total, policy.micro_batch_size):
            counted = counts[rows]
            if not counted.any():
                continue
            key = ("language", rows.start)
            result = language_objective(
                policy, rollout.completions.rows(rows), rollout.language_advantages[rows], old=old.get(key)
            )
            if first and self.updates_per_rollout > 1:
                old[key] = result.detach()
            self.manual_backward((result.loss * counted).sum() / total)
            stats.add_all("train/language", result.stats, weight=len(counted))

    def _flow_backward(
        self, rollout: Rollout, stats: Averages, old: dict[Any, ObjectiveResult], *, first: bool
    ) -> None:
        trajectory, advantages, counts = rollout.trajectory, rollout.advantages.flatten(), rollout.counted.flatten()
        steps = range(len(trajectory.sde_steps))
        for rows in chunks(len(trajectory), self.flow.micro_batch_size):
            part, counted = trajectory.rows(rows), counts[rows]
            if not counted.any():
                continue
            for step in steps:
                key = ("flow", rows.start, step)
                result = flow_objective(
                    self.flow,
                    part,
                    step,
                    advantages[rows],
                    old=old.get(key),
                    normalize_ratio=self.ratio_normalization,
                )
                if first and self.updates_per_rollout > 1:
                    old[key] = result.detach()
                self.manual_backward((result.loss * counted).sum() / (len(trajectory) * len(steps)))
                stats.add_all("train/flow", result.stats, weight=len(counted))

    @torch.no_grad()
    def check_ratio(self, rollout: Rollout) -> dict[str, float]:
        """Replays the first micro-batch before any update: its log-probs must be those of the rollout.

        If they differ, what is updated is not the policy that drew the samples, which no curve shows.

        Returns:
            Agent -> max |log ratio| over the micro-batch.

        Raises:
            ValueError: if max |log ratio| of the flow policy, or the mean over the refiner's tokens, is above 10 % of
                the agent's clip range. The refiner is judged by its mean since sampling with cached keys and values
                rounds differently from a replay (bf16: 4e-3).
        """
        found: dict[str, float] = {}
        if self.flow.trained:
            rows = next(chunks(len(rollout.trajectory), self.flow.micro_batch_size))
            part = rollout.trajectory.rows(rows)
            replayed = [
                self.flow.replay(part, step).log_prob(part.next_latents[:, step]) for step in range(len(part.sde_steps))
            ]
            found["flow"] = (torch.stack(replayed, 1) - part.log_probs).abs().max().item()
            _require_ratio("flow", found["flow"], self.flow.clip_range)
        if self.language is not None and self.language.trained and rollout.completions is not None:
            rows = next(chunks(len(rollout.completions), self.language.micro_batch_size))
            completions = rollout.completions.rows(rows)
            difference = (self.language.log_probs(completions) - completions.log_probs)[completions.mask].abs()
            found["language"] = difference.max().item()
            _require_ratio("language", difference.mean().item(), self.language.clip_range)
        return found

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _begin_step(self, batch: Sequence[PromptSample]) -> Rollout:
        """Collects the rollout of a step, the first of which does so before the evaluation."""
        self._seconds = {}
        seed_step(self.seed, self.global_step, self.global_rank)
        return self._collect_on_all_ranks(batch)

    def _collect_on_all_ranks(self, samples: Sequence[PromptSample]) -> Rollout:
        """Collects, and stops all ranks together when one has no scorer or none has had a score for too long.

        Raises:
            RewardUnavailable: on every rank, before anything is updated; `cli.checkpoint.Checkpoint` saves this state.
        """
        failure: RewardUnavailable | None = None
        rollout: Rollout | None = None
        try:
            rollout = self.collect(samples)
        except RewardUnavailable as error:
            failure = error
        scored = rollout is not None and bool(rollout.valid.any())
        # A collective: one rank that stopped alone would leave the others waiting.
        ranks = torch.tensor([float(failure is not None), float(scored)], device=self.device)
        failed, scored_ranks = self.trainer.strategy.reduce(ranks, reduce_op="sum").tolist()
        if failed:
            raise failure or RewardUnavailable("another process got no scores; its own message says why.")
        assert rollout is not None
        self._invalid_steps = 0 if scored_ranks else self._invalid_steps + 1
        if self._invalid_steps >= self.max_invalid_steps:
            raise RewardUnavailable(
                f"no image could be scored in {self._invalid_steps} steps in a row (`max_invalid_steps`); the last "
                f"reason was: {rollout.scores[0].detail.get('reason', 'unknown')}."
            )
        return rollout

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - start

    def _log_step(self, rollout: Rollout, stats: dict[str, Tensor]) -> None:
        valid = rollout.valid
        logs: dict[str, Any] = {f"time/{part}": seconds for part, seconds in self._seconds.items()} | stats
        logs |= {f"group/{name}": value for name, value in group_stats(rollout.rewards, valid).items()}
        logs["group/image_similarity"] = group_similarity(rollout.images, len(rollout.samples))
        parts = [part for score in rollout.scores for part in score.leaves(self.reward.name)]
        logs |= reward_stats(gather_lists(parts))  # of all ranks: a scorer may be lost on one alone
        # Lightning would go on showing the last value of what this step lacks (another tag's scorer): a gap instead.
        logs |= {name: math.nan for name in self._logged - logs.keys()}
        self._logged |= logs.keys()
        # NaN where nothing could be scored: a gap in the curve, where a 0 would pass for a measurement.
        shown: dict[str, Any] = {"rollouts": float(self.num_rollouts), "reward": rollout.rewards[valid].mean()}
        if rollout.completions is not None:
            refine = refine_stats(rollout.completions, [s.prompt for s in rollout.samples])
            shown["format"] = refine.pop("format")
            logs |= {f"refine/{name}": value for name, value in refine.items()}
        self.log_dict(logs, batch_size=len(rollout.samples))
        self.log_dict(shown, batch_size=len(rollout.samples), prog_bar=True)


def _require_ratio(agent: str, log_ratio: float, clip_range: float) -> None:
    if not log_ratio <= 0.1 * clip_range:
        raise ValueError(
            f"the {agent} policy is not on-policy: replayed log-probs differ from sampled ones by {log_ratio:.2e}, "
            f"more than 10 % of its clip range {clip_range:.0e}; use float32, the same micro-batches in rollout and "
            "update, or a wider clip range."
        )

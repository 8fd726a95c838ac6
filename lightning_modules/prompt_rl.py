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
from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from PIL.Image import Image
from torch import Tensor

from datamodules.base import PromptSample, run_seed
from datamodules.resumable import ResumableLoader
from lightning_modules.ahead import RewritesAhead
from lightning_modules.comparison import Scale, compared, compared_apart, compared_rewrites, task_terms
from lightning_modules.distributed import gather_lists, sum_over_ranks
from lightning_modules.groups import check_group, check_split, group_formats, group_prompts, source_images
from lightning_modules.objectives import FlowObjective, RefinerGRPO
from lightning_modules.on_policy import check_ratio
from lightning_modules.policies.flow import FlowPolicy, to_pil
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.rollout import Completions, Rollout
from lightning_modules.scoring import Scoring
from lightning_modules.seeding import seed_of, seed_step
from lightning_modules.step_metrics import Averages
from lightning_modules.updates import UpdatedAgents
from rewards.arguments import check_minimum
from rewards.base import Reward, RewardUnavailable, Score
from rewards.calls import faults, guarded


class PromptRL(UpdatedAgents):
    """Trains both agents. `language: null` is flow-only RL; an agent whose learning rate is null is frozen.

    Args:
        flow: the image model.
        reward: scores images against the original prompts.
        language: the refiner, or null.
        group_size: n, prompts drawn per original prompt.
        num_retained: m < n of them are the original itself (m = n without a refiner).
        images_per_prompt: M images of each of the n; the refiner gets the mean of a rewrite's M advantages.
        processes_per_group: neighbouring processes that draw and learn from one group together, each n divided by this
            of its prompts, so that many GPUs need not draw many prompts a step. They take the same prompts from the
            data, and their refiners write the whole group's rewrites, since writing a few takes as long.
        format_weight: weight of the format reward (1 for a well-formed answer).
        task_weight: weight of the task reward.
        advantage_scale: divide by the std of the "group", of the "tag" in the step's batch over all processes, of the
            whole "batch" over all processes, or not ("none").
        advantage_clip: largest absolute advantage.
        normalize: advantages of the "sum" of task and format reward, or of "each" reward apart, also of the parts of a
            `WeightedSum`, weighed and summed after it (GDPO, arXiv 2601.05242): a rare malformed answer does not drown
            the task, nor one scorer's scale another's.
        updates_per_rollout: passes over one rollout; 1 is strictly on-policy if there is one mini-batch.
        num_minibatches: optimizer steps of a pass, each on a part of the rollout's prompts; those after the first are
            off the policy that drew the rollout, and clipped. `max_steps` counts optimizer steps.
        objective: how the image model learns from a rollout; null is `FlowGRPO`.
        language_objective: how the refiner learns; null is `RefinerGRPO`.
        optimizer: gets one parameter group per agent; weight decay and betas are the agents' own.
        lr_scheduler: one of torch's schedules of the learning rates, which counts optimizer steps; null is constant.
        warmup_steps: optimizer steps over which the learning rates also rise linearly from near 0.
        check_ratio_every: number of steps between two checks that replayed log-probs equal sampled ones.
        max_invalid_steps: stop after this many steps in a row in which no image could be scored.
        max_bad_steps: stop after this many steps in a row in which an agent's loss or gradient was not finite; its
            update is skipped in each of them.
        overlap_scoring: scores a micro-batch of images while the flow model draws the next one; same results.
        rewrite_ahead: writes the next step's rewrites while the last images are scored, for slow rewards. The refiner
            is then one step's updates off the policy that wrote, clipped by its `clip_range`; its guard checks only
            what was not written ahead, and a resumed run writes anew what an unbroken one had written ahead.
        seed: seed of all rollout noise; null follows `seed_everything`.
    """

    def __init__(
        self,
        flow: FlowPolicy,
        reward: Reward,
        language: LanguagePolicy | None = None,
        group_size: int = 8,
        num_retained: int = 2,
        images_per_prompt: int = 1,
        processes_per_group: int = 1,
        format_weight: float = 1.0,
        task_weight: float = 1.0,
        advantage_scale: Scale = "group",
        advantage_clip: float = 5.0,
        normalize: Literal["sum", "each"] = "sum",
        updates_per_rollout: int = 1,
        num_minibatches: int = 1,
        objective: FlowObjective | None = None,
        language_objective: RefinerGRPO | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        check_ratio_every: int = 50,
        max_invalid_steps: int = 5,
        max_bad_steps: int = 5,
        overlap_scoring: bool = True,
        rewrite_ahead: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            flow,
            language,
            optimizer,
            lr_scheduler,
            warmup_steps,
            updates_per_rollout,
            num_minibatches,
            objective,
            language_objective,
            max_bad_steps,
        )
        check_group(group_size, num_retained, language is not None)
        compares = self.objective.needs_whole_groups and flow.trained
        check_split(processes_per_group, group_size, num_retained, reward.groupwise, compares)
        baseline = self.language_objective.baseline
        if language is not None and baseline != "group" and (normalize != "sum" or group_size - num_retained < 2):
            raise ValueError(
                f"`model.language_objective` has baseline: {baseline}, which compares a group's "
                "rewrites by the sum of their rewards: use `normalize: sum`, and two rewrites or more."
            )
        check_minimum("model", -math.inf, format_weight=format_weight, task_weight=task_weight)
        check_minimum("model", 1, images_per_prompt=images_per_prompt)
        check_minimum("model", 0, advantage_clip=advantage_clip)
        check_minimum("model", 1, check_ratio_every=check_ratio_every, max_invalid_steps=max_invalid_steps)
        self.reward = reward
        self.group_size = group_size
        self.num_retained = num_retained
        self.images_per_prompt = images_per_prompt
        self.processes_per_group = processes_per_group
        self.format_weight = format_weight
        self.task_weight = task_weight
        self.advantage_scale: Scale = advantage_scale
        self.advantage_clip = advantage_clip
        self.normalize = normalize
        self.check_ratio_every = check_ratio_every
        self.max_invalid_steps = max_invalid_steps
        self.overlap_scoring = overlap_scoring
        self.seed = run_seed(seed)
        self.latest: Rollout | None = None
        """Last rollout, for callbacks to show; None while the next one is collected."""
        self._ahead: Rollout | None = None
        if rewrite_ahead and language is not None:
            self.rewrites_ahead = RewritesAhead()
        self._checked = False
        self._first = True
        self._invalid_steps = 0
        sometimes = [agent for agent in self._learners() if agent.kl_weight > 0 and agent.kl_every > 1]
        self._logged = {f"train/{agent.agent}/kl" for agent in sometimes}  # a resumed run's rows have the same gaps

    def setup(self, stage: str) -> None:
        """Loads the scorers, except for predictions, which need none; tells the data which processes share prompts."""
        trainer, block = self._trainer, self.processes_per_group
        if trainer is not None and stage == "fit":
            if trainer.world_size % block:
                raise ValueError(
                    f"`model.processes_per_group` is {block}, which does not divide {trainer.world_size} processes: "
                    "use one that does."
                )
            self._data.processes_per_group = block
        if stage != "predict":
            with guarded(self.reward.name):
                self.reward.load()

    def on_train_start(self) -> None:
        """Collects the first rollout before the evaluation, which would let a reward that cannot work wait minutes."""
        loader = self.trainer.train_dataloader
        if self.global_step == 0 and isinstance(loader, ResumableLoader):
            with self.trainer.precision_plugin.train_step_context():
                self._ahead = self._begin_step(loader.first_batch())
        super().on_train_start()

    @property
    def _is_last_step(self) -> bool:
        """True if no step follows in this epoch, or in this fit."""
        after = self.global_step + self.updates_per_rollout * self.num_minibatches
        return self.trainer.is_last_batch or 0 <= self.trainer.max_steps <= after

    @property
    def own_slots(self) -> range:
        """Places 0..n-1 in a group, the retained first, of the prompts that this process draws."""
        rank = 0 if self._trainer is None else self.global_rank
        return range(rank % self.processes_per_group, self.group_size, self.processes_per_group)

    # --- one step -------------------------------------------------------------------------------------------------

    def training_step(self, batch: Sequence[PromptSample], batch_idx: int) -> None:
        """Collects a rollout for G prompts and updates both agents on it."""
        self.latest = None  # or its trajectories would be held while the next ones are collected
        rollout, self._ahead = self._ahead or self._begin_step(batch), None
        self.latest = rollout
        self._check(rollout)
        stats = self.update(rollout)
        self.num_rollouts += len(rollout.images) * self.trainer.world_size
        self._log_step(rollout, stats)
        self.bad_steps.end_step()

    def _check(self, rollout: Rollout) -> None:
        """Checks the log-ratio of a replay in a run's first step, and checks and logs it every `check_ratio_every`."""
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx  # as the step's own numbers go by in the log
        due = step % self.check_ratio_every == 0
        if due or not self._checked:
            self._checked = True
            # Straight to the loggers: `self.log` would repeat the number in every step until the epoch's end.
            ratios = {f"train/{agent}/max_log_ratio": value for agent, value in self.check_ratio(rollout).items()}
            for logger in self.loggers if due else ():  # a resumed run's numbers are those of an unbroken one
                logger.log_metrics(ratios, step=step)

    def collect(self, samples: Sequence[PromptSample]) -> Rollout:
        """Rewrites, draws, scores and compares within groups: makes the experience of G prompts.

        Raises:
            RewardUnavailable: on every process, before anything is updated, if one has no scorer or none has had a
                score for too long; `cli.checkpoint.Checkpoint` saves this state.
        """
        refined = self.group_size - self.num_retained
        completions = None if self.rewrites_ahead is None else self.rewrites_ahead.take(samples)
        written_ahead = completions is not None
        with self._timed("refine"):
            if self.language is not None and completions is None:
                with self.language.gathered():
                    completions = self.language.refine(samples, refined)
        rewrites = None if completions is None else completions.rewrites
        places = [slot * self.images_per_prompt + k for slot in self.own_slots for k in range(self.images_per_prompt)]
        per_group = self.group_size * self.images_per_prompt
        all_prompts = group_prompts(samples, rewrites, self.num_retained, self.images_per_prompt)
        prompts = [all_prompts[group * per_group + place] for group in range(len(samples)) for place in places]
        judged = [sample for sample in samples for _ in places]
        seeds = [
            seed_of("rollout", self.seed, self.global_step, sample.id, place) for sample in samples for place in places
        ]
        start_seeds = None
        if self.flow.sampling.share_start:
            start_seeds = [
                seed_of("start", self.seed, self.global_step, sample.id, prompt)
                for sample, prompt in zip(judged, prompts, strict=True)
            ]
        images: list[Image] = []
        finite: list[bool] = []

        def score(rows: slice, pixels: Tensor) -> None:
            images.extend(to_pil(pixels))
            finite.extend(pixels.isfinite().flatten(1).all(1).tolist())
            scoring.submit(judged[rows], images[rows])

        with Scoring(self.reward, self.device, overlap=self.overlap_scoring, group=per_group) as scoring:
            with self._timed("rollout"):
                window_seed = seed_of("window", self.seed, self.global_step)
                with self.flow.drawing(), self.flow.gathered():
                    trajectory = self.flow.rollout(
                        prompts,
                        seeds,
                        window_seed=window_seed,
                        optimizer_step=self.global_step,
                        on_drawn=score,
                        images=source_images(judged),
                        start_seeds=start_seeds,
                    )
            if self.rewrites_ahead is not None and self.language is not None and not self._is_last_step:
                seed = seed_of("ahead", self.seed, self.global_step, self.global_rank // self.processes_per_group)
                with self._timed("refine"):
                    self.rewrites_ahead.write(self.language, self.trainer.train_dataloader, samples, refined, seed)
            with self._timed("reward"):  # what the overlap did not hide
                own_scores = self._scores_on_all_ranks(scoring, finite)
        scores = self._scores_of_whole_groups(own_scores, len(samples))
        rewards, valid, advantages = self.compare(samples, scores, completions)
        counted = valid & (valid.sum(1, keepdim=True) >= 2)
        slots = (len(samples), self.group_size, self.images_per_prompt)
        # The mean over a rewrite's scored images; without any, the rewrite does not count.
        by_slot = advantages.view(slots).sum(-1) / counted.view(slots).sum(-1).clamp(min=1)
        if completions is not None and self.language_objective.baseline != "group":
            by_slot[:, self.num_retained :] = compared_rewrites(
                [sample.tag for sample in samples],
                rewards.view(slots)[:, self.num_retained :],
                valid.view(slots)[:, self.num_retained :],
                self.advantage_scale if self.language_objective.baseline == "refined" else "leave_one_out",
                self.advantage_clip,
            )
        written = [slot for slot in self.own_slots if slot >= self.num_retained]
        if completions is not None:
            rows = [group * refined + slot - self.num_retained for group in range(len(samples)) for slot in written]
            completions = completions.rows(rows)
        return Rollout(
            samples=samples,
            prompts=prompts,
            completions=completions,
            trajectory=trajectory,
            images=images,
            scores=own_scores,
            rewards=rewards[:, places],
            valid=valid[:, places],
            advantages=advantages[:, places],
            language_advantages=None if completions is None else by_slot[:, written].flatten(),
            language_counted=None if completions is None else counted.view(slots).any(-1)[:, written].flatten(),
            whole=None if self.processes_per_group == 1 else (rewards, valid),
            seeds=seeds,
            step=self.global_step,
            written_ahead=written_ahead,
        )

    def compare(
        self, samples: Sequence[PromptSample], scores: Sequence[Score], completions: Completions | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes rewards, which of them are valid, and advantages, all [G, N], of G whole groups.

        Args:
            samples: G original prompts.
            scores: G * N scores, group by group.
            completions: the rewrites, whose format is rewarded, or None.
        """
        per_group = self.group_size * self.images_per_prompt
        valid = torch.tensor([score.valid for score in scores], device=self.device).view(-1, per_group)
        task = torch.tensor([score.rl for score in scores], device=self.device).view(-1, per_group)
        rewards, formats = self.task_weight * task, None
        if completions is not None:
            formats = group_formats(completions.formatted, len(samples), self.num_retained, self.images_per_prompt)
            rewards = rewards + self.format_weight * formats
        tags = [sample.tag for sample in samples]
        if self.normalize == "each":
            terms = [(self.task_weight * weight, values.view_as(valid)) for weight, values in task_terms(scores)]
            terms += [] if formats is None else [(self.format_weight, formats)]
            return rewards, valid, compared_apart(tags, terms, valid, self.advantage_scale, self.advantage_clip)
        return rewards, valid, compared(tags, rewards, valid, self.advantage_scale, self.advantage_clip)

    def check_ratio(self, rollout: Rollout) -> dict[str, float]:
        """Returns agent -> max |log ratio| of a replay before any update; see `on_policy.check_ratio`."""
        return check_ratio(self.flow if self.objective.needs_sde_steps else None, self.language, rollout)

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _begin_step(self, batch: Sequence[PromptSample]) -> Rollout:
        """Collects the rollout of a step, the first of which does so before the evaluation."""
        self._seconds = {}
        seed_step(self.seed, self.global_step, self.global_rank // self.processes_per_group)
        self.peers.drawing = True
        try:
            return self.collect(batch)
        finally:
            self.peers.drawing = False

    def _scores_of_whole_groups(self, own: list[Score], groups: int) -> list[Score]:
        """Returns the scores of G whole groups [G * n * M], of which this process has its part, group by group."""
        block, each = self.processes_per_group, self.images_per_prompt
        if block == 1:
            return own
        ranks = gather_lists([own])[self.global_rank // block * block :][:block]
        per_group = len(own) // groups
        return [
            ranks[slot % block][group * per_group + slot // block * each + k]
            for group in range(groups)
            for slot in range(self.group_size)
            for k in range(each)
        ]

    def _scores_on_all_ranks(self, scoring: Scoring, finite: Sequence[bool]) -> list[Score]:
        """Waits for the scores, and stops all ranks together when one has no scorer or none has had a score for long.

        Args:
            scoring: the thread that scores B images.
            finite: B bools, False for images whose pixels are not finite, which have no score.

        Raises:
            RewardUnavailable: on every rank; one that stopped alone would leave the others waiting.
            ValueError: on every rank, if all calls of the reward failed in the first rollout.
        """
        failure: ValueError | None = None
        scores: list[Score] = []
        try:
            scores = [
                score if drawn else Score.invalid("its pixels are not finite")
                for score, drawn in zip(scoring.scores(), finite, strict=True)
            ]
        except ValueError as error:
            # What the reward did wrong on this rank alone has to end the others too, which save their state together.
            alone = isinstance(error, RewardUnavailable) or self.trainer.world_size == 1
            failure = error if alone else RewardUnavailable(str(error))
        here = [failure is not None, any(score.valid for score in scores), not all(map(faults, scores))]
        failed, scored, sound = sum_over_ranks(torch.tensor(here, dtype=torch.float, device=self.device)).tolist()
        if failed:
            said = gather_lists([f"process {self.global_rank}: {failure}"] if failure else [])
            raise failure or RewardUnavailable(" ".join(said))
        first, self._first = self._first, False
        if first and not sound:
            raise ValueError(f"the reward works for no image of the first step: {scores[0].detail['reason']}")
        self._invalid_steps = 0 if scored else self._invalid_steps + 1
        if self._invalid_steps >= self.max_invalid_steps:
            raise RewardUnavailable(
                f"no image could be scored in {self._invalid_steps} steps in a row (`max_invalid_steps`); the last "
                f"reason was: {scores[0].detail.get('reason', 'unknown').rstrip('.')}."
            )
        return scores

    def _log_step(self, rollout: Rollout, stats: Averages) -> None:
        """Logs the step's numbers, reduced over all ranks by one collective."""
        stats.add_rollout(rollout, self.reward.name)
        if rollout.completions is not None:
            cut = self.flow.cut(rollout.completions.rewrites)
            stats.add("refine/cut", sum(cut) / len(cut), len(cut))
        logs = {f"time/{part}": seconds for part, seconds in self._seconds.items()} | stats.over_ranks()
        # Lightning would go on showing the last value of what this step lacks (another tag's scorer): a gap instead.
        logs |= {name: math.nan for name in self._logged - logs.keys()}
        self._logged |= logs.keys()
        shown = {"rollouts": float(self.num_rollouts)}
        shown |= {name: logs.pop(name) for name in ("reward", "format") if name in logs}
        self.log_dict(logs, batch_size=len(rollout.samples))
        self.log_dict(shown, batch_size=len(rollout.samples), prog_bar=True)

"""`UpdatedAgents`: takes optimizer steps on rollouts, for both agents and in mini-batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.chunks import chunks
from lightning_modules.ahead import RewritesAhead
from lightning_modules.bad_steps import BadSteps
from lightning_modules.distributed import clip, gather_lists, no_backward_sync, several_processes, sum_over_ranks
from lightning_modules.evaluation import EvaluatedAgents
from lightning_modules.objectives import FlowBatch, FlowGRPO, FlowObjective, ObjectiveResult, RefinerGRPO
from lightning_modules.policies.flow import FlowPolicy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.rollout import Rollout
from lightning_modules.seeding import seed_of
from lightning_modules.step_metrics import Averages
from rewards.arguments import check_minimum

Rows = TypeVar("Rows", slice, list[int])


class UpdatedAgents(EvaluatedAgents):
    """Agents that learn from rollouts.

    Args:
        flow: the image model.
        language: the refiner, or null.
        optimizer: gets one parameter group per learning agent.
        lr_scheduler: one of torch's schedules of the learning rates; null is constant.
        warmup_steps: optimizer steps over which the learning rates also rise linearly from near 0.
        updates_per_rollout: passes over one rollout.
        num_minibatches: optimizer steps of a pass, each on a part of the rollout's prompts.
        objective: how the flow model learns; null is `FlowGRPO`.
        language_objective: how the refiner learns; null is `RefinerGRPO`.
        max_bad_steps: stop after this many steps in a row in which an agent's loss or gradient was not finite.
    """

    def __init__(
        self,
        flow: FlowPolicy,
        language: LanguagePolicy | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        warmup_steps: int,
        updates_per_rollout: int,
        num_minibatches: int,
        objective: FlowObjective | None,
        language_objective: RefinerGRPO | None,
        max_bad_steps: int,
    ) -> None:
        super().__init__(flow, language, optimizer, lr_scheduler, warmup_steps)
        check_minimum("model", 1, updates_per_rollout=updates_per_rollout, num_minibatches=num_minibatches)
        check_minimum("model", 1, max_bad_steps=max_bad_steps)
        self.updates_per_rollout = updates_per_rollout
        self.num_minibatches = num_minibatches
        self.objective = objective or FlowGRPO()
        self.language_objective = language_objective or RefinerGRPO()
        if flow.trained:
            self.objective.check(flow)
            flow.needs_reference |= self.objective.needs_reference
            flow.old_decay = self.objective.old_policy
        self.bad_steps = BadSteps(max_bad_steps)
        self.rewrites_ahead: RewritesAhead | None = None
        self._seconds: dict[str, float] = {}

    def on_fit_start(self) -> None:
        """Says so if the clip ranges do nothing; raises ValueError if a rollout has too few prompts to be split."""
        super().on_fit_start()
        prompts = getattr(self.trainer.datamodule, "batch_size", self.num_minibatches)  # type: ignore[attr-defined]
        if self.num_minibatches > prompts:
            raise ValueError(
                f"`model.num_minibatches` is {self.num_minibatches}, but a rollout has {prompts} prompts a process "
                "(`data.batch_size`), which are not split: use at most as many."
            )
        if self.updates_per_rollout == self.num_minibatches == 1 and self.rewrites_ahead is None:
            rank_zero_info(
                "Clipping is idle: with one update per rollout the policies' ratio is 1, and\n`clip_range` does nothing"
                " (`updates_per_rollout`, `num_minibatches`)."
            )

    def update(self, rollout: Rollout) -> Averages:
        """Takes `updates_per_rollout` passes over a rollout, with an optimizer step on each of its mini-batches.

        An agent whose loss or gradient is not finite on any process is left as it is on all of them.

        Returns:
            Numbers for the log, of this process.
        """
        stats, total = Averages(), len(rollout.samples)
        bounds = [total * number // self.num_minibatches for number in range(self.num_minibatches + 1)]
        parts = [rollout.groups(slice(*pair)) for pair in zip(bounds, bounds[1:], strict=False)]
        # What each part is compared with: results of the policies that drew it, before the first step moves them.
        with self.gathered() if len(parts) > 1 else nullcontext():
            old = [{} if number == 0 else self._results_of_rollout(part) for number, part in enumerate(parts)]
        for update in range(self.updates_per_rollout):
            for number, part in enumerate(parts):
                self._step_on(part, stats, old[number], drew_it=update == number == 0)
        return stats

    def _step_on(self, rollout: Rollout, stats: Averages, old: dict[Any, ObjectiveResult], *, drew_it: bool) -> None:
        """Takes an optimizer step on a rollout, or on a part of one.

        Args:
            rollout: experience of G prompts.
            stats: gets numbers for the log.
            old: (agent, first row, step) -> result of the policy that drew a micro-batch; filled by the policy itself.
            drew_it: True if the current policies drew the rollout.
        """
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        for agent in self._learners():
            agent.step = self.global_step
        finite: dict[str, Tensor] = {}
        with no_backward_sync(self.trainer):
            if self.language is not None and self.language.trained:
                with self._timed("language_update"):
                    finite["language"] = self._language_backward(self.language, rollout, stats, old, drew_it)
            if self.flow.trained:
                with self._timed("flow_update"):
                    finite["flow"] = self._flow_backward(rollout, stats, old, drew_it)
        norms = {}
        for agent, group in zip(self._learners(), optimizer.param_groups, strict=True):
            self.average_gradients(group["params"])
            norms[agent.agent] = clip(group["params"], agent.max_grad_norm)
            stats.add(f"train/{agent.agent}/grad_norm", norms[agent.agent])
            if self.lr_scheduler is not None or self.warmup_steps:
                stats.add(f"train/{agent.agent}/learning_rate", group["lr"])
        # One decision for all ranks: a loss may be bad on one of them alone.
        flags = torch.stack([(~finite[name]).any() | ~norm.isfinite() for name, norm in norms.items()])
        for group, flag in zip(optimizer.param_groups, sum_over_ranks(flags.float()).tolist(), strict=True):
            name = group["name"]
            stats.add(f"train/{name}/skipped", float(flag > 0))
            if flag:
                self.bad_steps.add(name, self.global_step, rollout, finite[name])
                for parameter in group["params"]:
                    parameter.grad = None  # the optimizer leaves it alone, weight decay and momentum included
        scheduler = self.lr_schedulers()
        with self.peers.whole_step():
            optimizer.step()
            torch.clear_autocast_cache()  # the whole step is one context, which would keep the old weights in bf16
            if scheduler is not None:
                scheduler.step()  # type: ignore[union-attr]
            for agent in self._learners():
                for copy in agent.copies.values():
                    copy.follow(self.global_step)

    @torch.no_grad()
    def _results_of_rollout(self, rollout: Rollout) -> dict[Any, ObjectiveResult]:
        """Log-probs (and, to normalise ratios, means) of the current policies, which drew the rollout.

        Those of the flow model's SDE steps are the trajectory's own, where rollout and update have the same
        micro-batches; a refiner's were drawn with cached keys and values, which round otherwise.
        """
        old: dict[Any, ObjectiveResult] = {}
        loss = torch.zeros((), device=self.device)
        written = None if rollout.written_ahead else rollout.completions
        if self.language is not None and self.language.trained and written is not None:
            with self._timed("language_update"):
                for texts in written.micro_batches(self.language.micro_batch_size):
                    log_probs = self.language.log_probs(written.rows(texts).trimmed())
                    old["language", texts[0]] = ObjectiveResult(loss, {}, log_probs)
        flow, batch = self.flow, self._flow_batch(rollout)
        with self._timed("flow_update"):
            learns = flow.trained and self.objective.compares_with_old
            for rows in chunks(len(batch), flow.micro_batch_size) if learns else ():
                for term in range(self.objective.num_terms(batch.trajectory)):
                    old["flow", rows.start, term] = self.objective.before_update(flow, batch.rows(rows), term)
        return old

    def _flow_batch(self, rollout: Rollout) -> FlowBatch:
        """Takes from a rollout what the flow model learns from."""
        per_group = rollout.rewards.shape[1]
        shared = [seed_of("forward", self.seed, rollout.step, sample.id) for sample in rollout.samples]
        return FlowBatch(
            trajectory=rollout.trajectory,
            advantages=rollout.advantages.flatten(),
            rewards=rollout.rewards.flatten(),
            counted=rollout.counted.flatten(),
            groups=torch.arange(len(rollout.samples), device=rollout.advantages.device).repeat_interleave(per_group),
            seeds=[seed_of("forward", seed) for seed in rollout.seeds],
            group_seeds=[seed for seed in shared for _ in range(per_group)],
            levels_seed=seed_of("levels", self.seed, rollout.step),
        )

    def _language_backward(
        self, policy: LanguagePolicy, rollout: Rollout, stats: Averages, old: dict[Any, ObjectiveResult], drew_it: bool
    ) -> Tensor:
        """Adds to the refiner's gradients; returns [B] bool, False for completions whose loss is not finite."""
        assert rollout.completions is not None and rollout.language_advantages is not None
        counts = rollout.language_counted
        counts = torch.ones_like(rollout.language_advantages) if counts is None else counts
        sums = torch.tensor([len(rollout.completions), rollout.completions.mask.sum()], device=self.device).double()
        if several_processes():  # those that share groups may have other numbers: the mean over all of them
            sums = sum_over_ranks(sums) / self.trainer.world_size
        total, tokens = sums.tolist()
        mean_length = tokens / total
        finite = torch.ones_like(rollout.language_advantages, dtype=torch.bool)
        every = rollout.completions.micro_batches(policy.micro_batch_size)
        for rows, weights in self._passes(policy, every, counts.bool(), counts):
            key = ("language", rows[0])
            completions = rollout.completions.rows(rows).trimmed()
            advantages = rollout.language_advantages[rows]
            if rollout.written_ahead:  # by older weights, whose log-probs are those of the sampling
                old[key] = ObjectiveResult(torch.zeros_like(advantages), {}, completions.log_probs)
            result = self.language_objective.loss(
                policy, completions, advantages, old=old.get(key), mean_length=mean_length
            )
            if drew_it and self.updates_per_rollout > 1 and not rollout.written_ahead:
                old[key] = result.detach()
            finite[rows] = result.loss.isfinite()
            self.manual_backward((result.loss * weights).sum() / total)
            stats.add_all("train/language", result.stats, weight=len(weights) * float(weights.any()))
        return finite

    def _flow_backward(
        self, rollout: Rollout, stats: Averages, old: dict[Any, ObjectiveResult], drew_it: bool
    ) -> Tensor:
        """Adds to the flow model's gradients; returns [B] bool, False for samples whose loss is not finite.

        Micro-batches without an advantage, such as those of groups whose rewards are all equal, are left out where
        there is no KL: their gradient is 0.
        """
        every = list(chunks(len(rollout.trajectory), self.flow.micro_batch_size))
        same = every + [every[0]] * (max(gather_lists([len(every)])) - len(every)) if self.flow.sharded else every
        batch = self.objective.prepare(self.flow, self._flow_batch(rollout), same, old)
        counts, terms = batch.counted, self.objective.num_terms(batch.trajectory)
        finite = torch.ones_like(counts)
        speaks = counts if self.flow.kl_weight_now > 0 else counts & self.objective.speaks(batch)
        for rows, weights in self._passes(self.flow, every, speaks, counts):
            part = batch.rows(rows)
            for term in range(terms):
                key = ("flow", rows.start, term)
                result = self.objective.loss(self.flow, part, term, old.get(key))
                if drew_it and self.updates_per_rollout > 1:
                    old[key] = result.detach()
                finite[rows] &= result.loss.isfinite()
                self.manual_backward((result.loss * weights).sum() / (len(batch) * terms))
                stats.add_all("train/flow", result.stats, weight=len(weights) * float(weights.any()))
        stats.add_all("train/flow", batch.stats, weight=len(batch))
        stats.add("train/flow/silent", (counts & ~speaks).float().mean(), len(counts))
        if counts.any() and not speaks.any():
            for parameter in self.flow.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return finite

    def _passes(
        self, agent: FlowPolicy | LanguagePolicy, every: Sequence[Rows], speaks: Tensor, counts: Tensor
    ) -> Sequence[tuple[Rows, Tensor]]:
        """Lists the micro-batches of an update: rows, and their weights [b] in the loss.

        The layers of a sharded agent are gathered in every pass, so all processes make as many: one that has fewer to
        learn from repeats its first with weight 0.

        Args:
            agent: whose update it is.
            every: rows of each micro-batch.
            speaks: [B] bool; a micro-batch without any has no gradient, and is left out.
            counts: [B], the weights.
        """
        passes = [(rows, counts[rows]) for rows in every if speaks[rows].any()]
        if agent.sharded:
            rows, weights = (passes or [(every[0], counts[every[0]])])[0]
            passes += [(rows, torch.zeros_like(weights))] * (max(gather_lists([len(passes)])) - len(passes))
        return passes

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - start

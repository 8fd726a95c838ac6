"""The on-policy guard: log-probs that are replayed before an update must be those of the rollout."""

from __future__ import annotations

import torch

from datamodules.chunks import chunks
from lightning_modules.distributed import gather_lists
from lightning_modules.policies.flow import FlowPolicy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.rollout import Rollout


@torch.no_grad()
def check_ratio(flow: FlowPolicy | None, language: LanguagePolicy | None, rollout: Rollout) -> dict[str, float]:
    """Replays the first micro-batch before any update: its log-probs must be those of the rollout.

    If they differ, what is updated is not the policy that drew the samples, which no curve shows. Log-probs that are
    not finite are left to the update, which skips them.

    Args:
        flow: the flow policy; None if it does not learn from SDE steps.
        language: the refiner, or None.
        rollout: what they drew; rewrites that were written ahead are off-policy, and not checked.

    Returns:
        Agent that learns -> max |log ratio| over the micro-batch, the largest of all processes.

    Raises:
        ValueError: on every process, if max |log ratio| of the flow policy, or the mean over the refiner's tokens, is
            above the agent's `max_log_ratio`. The refiner is judged by its mean since sampling with cached keys and
            values rounds differently from a replay (bf16, models of 3 and 4 billion random weights: 2e-2).
    """
    found: dict[str, tuple[float, float]] = {}  # agent -> what is reported, what is judged
    if flow is not None and flow.trained:
        rows = next(chunks(len(rollout.trajectory), flow.micro_batch_size))
        part = rollout.trajectory.rows(rows)
        with flow.gathered():
            transitions = [flow.replay(part, step) for step in range(len(part.sde_steps))]
        replayed = [one.log_prob(part.next_latents[:, step]) for step, one in enumerate(transitions)]
        largest = (torch.stack(replayed, 1) - part.log_probs).abs().max().item()
        found["flow"] = (largest, largest)
    written = None if rollout.written_ahead else rollout.completions
    if language is not None and language.trained and written is not None:
        rows = next(chunks(len(written), language.micro_batch_size))
        completions = written.rows(rows).trimmed()
        with language.gathered():
            difference = (language.log_probs(completions) - completions.log_probs)[completions.mask].abs()
        found["language"] = (difference.max().item(), difference.mean().item())
    ranks = gather_lists([found])
    limits = {agent.agent: agent.max_log_ratio for agent in (flow, language) if agent is not None}
    for agent in found:
        judged = max(rank[agent][1] for rank in ranks)
        if judged > limits[agent]:
            raise ValueError(
                f"the {agent} policy is not on-policy: replayed log-probs differ from sampled ones by {judged:.2e}, "
                f"more than its `max_log_ratio` {limits[agent]:.0e}; use float32, the same micro-batches in rollout "
                "and update, or a higher `max_log_ratio`."
            )
    return {agent: max(rank[agent][0] for rank in ranks) for agent in found}

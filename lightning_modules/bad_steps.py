"""Updates that are skipped, because a loss or gradient was not finite: named, and an end if they do not end."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_modules.agents import NotFinite
from lightning_modules.distributed import gather_lists
from lightning_modules.rollout import Rollout


class BadSteps:
    """Counts each agent's steps in a row in which an update was skipped.

    Args:
        limit: number of steps in a row that ends the run.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._in_a_row: dict[str, int] = {}
        self._now: set[str] = set()

    def add(self, agent: str, step: int, rollout: Rollout, finite: Tensor) -> None:
        """Warns of an update that is skipped; a collective.

        Args:
            agent: name of the agent.
            step: number of the step.
            rollout: experience of the step on this process.
            finite: [B] bool, False for completions or images whose loss is not finite, those of a prompt side by side.
        """
        self._now.add(agent)
        per_prompt = len(finite) // len(rollout.samples)
        wrong = (~finite).nonzero().flatten().tolist()
        ids = gather_lists([rollout.samples[row // per_prompt].id for row in wrong])
        names = list(dict.fromkeys(ids or gather_lists([sample.id for sample in rollout.samples])))
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        rank_zero_warn(
            f"step {step}: the {'loss' if ids else 'gradient'} of the {agent} agent is not finite (prompts "
            f"{', '.join(names[:5])}{more}), so this update of it is skipped."
        )

    def end_step(self) -> None:
        """Raises NotFinite, on every process, if an agent could not be updated for too long."""
        self._in_a_row = {agent: self._in_a_row.get(agent, 0) + 1 for agent in self._now}
        self._now = set()
        for agent, steps in self._in_a_row.items():
            if steps >= self.limit:
                raise NotFinite(
                    f"the loss or gradient of the {agent} agent was not finite in {steps} steps in a row "
                    "(`model.max_bad_steps`); lower its learning rate, or look at the prompts that the warnings name."
                )

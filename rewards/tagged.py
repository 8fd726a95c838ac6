"""Several rewards in one run: one scorer per tag (`TaggedReward`), or the sum of all (`WeightedSum`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from rewards.arguments import check_minimum
from rewards.base import Reward, RewardBatch, Score
from rewards.calls import score_each


class _Composite(Reward):
    """Base of the rewards that are made of others."""

    def __init__(self, rewards: dict[str, Reward]) -> None:
        if not rewards:
            raise ValueError(f"{type(self).__name__}.rewards is empty: give at least one scorer.")
        self.rewards = rewards
        self.groupwise = any(reward.groupwise for reward in rewards.values())

    def load(self) -> None:
        """Loads the models of every scorer."""
        for reward in self.rewards.values():
            reward.load()


class TaggedReward(_Composite):
    """Routes every sample to the one scorer of its tag (reward tagging; PromptRL, arXiv 2602.01382).

    Advantages are normalised within a group, a group has one prompt and a prompt one tag, so that scorers of very
    different scales train together without weights.

    Args:
        rewards: tag -> scorer. A sample whose tag is not here is an error.
    """

    name = "tagged"

    def __init__(self, rewards: dict[str, Reward]) -> None:
        super().__init__(rewards)
        self.needs = ("tag",)
        names = [reward.name for reward in rewards.values()]
        # Scorers of one name (two judges) would be averaged together in the log: they go by their tags.
        self._log_names = {tag: tag if names.count(r.name) > 1 else r.name for tag, r in rewards.items()}

    @property
    def version(self) -> str:
        """Version of the scores: the scorers' versions by tag."""
        return "tagged " + "; ".join(f"{tag}: {reward.version}" for tag, reward in sorted(self.rewards.items()))

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Scores B images, each by its tag's scorer; `parts` names the scorer."""
        rows_of: dict[str, list[int]] = {}
        for row, sample in enumerate(batch.samples):
            rows_of.setdefault(sample.tag, []).append(row)
        unknown = [tag for tag in rows_of if tag not in self.rewards]
        if unknown:
            sample = batch.samples[rows_of[unknown[0]][0]]
            raise ValueError(
                f"the prompt {sample.id!r} has the tag {unknown[0]!r}, but TaggedReward.rewards knows only "
                f"{', '.join(sorted(self.rewards))}: add a scorer for the tag, or correct the tag in the data."
            )
        scores: dict[int, Score] = {}
        for tag, rows in rows_of.items():
            part = RewardBatch([batch.samples[row] for row in rows], [batch.images[row] for row in rows])
            reward = self.rewards[tag]
            for row, score in zip(rows, score_each(reward, part), strict=True):
                scores[row] = replace(score, parts=score.parts or {self._log_names[tag]: score})
        return [scores[row] for row in range(len(batch))]


class WeightedSum(_Composite):
    """Adds up several scorers' rl values, each times its weight; native and table are that sum too.

    An image that any of them could not score is invalid: a sum without one part would compare unlike things. Mind the
    scales: weights act on `rl` values, whose ranges differ from scorer to scorer, or, with `normalize: each` in
    `PromptRL`, on advantages, which have one scale.

    Args:
        rewards: name -> scorer; the name is the scorer's key in the logs.
        weights: name -> weight; null weighs every scorer with 1.
    """

    name = "sum"

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float] | None = None) -> None:
        super().__init__(rewards)
        weights = dict.fromkeys(rewards, 1.0) if weights is None else weights
        if set(weights) != set(rewards):
            different = ", ".join(sorted(set(weights) ^ set(rewards)))
            raise ValueError(f"WeightedSum needs one weight for each of its rewards; `weights` differs in {different}.")
        check_minimum("WeightedSum.weights", -math.inf, **weights)
        self.weights = weights
        self.needs = tuple(dict.fromkeys(need for reward in rewards.values() for need in reward.needs))

    @property
    def version(self) -> str:
        """Version of the scores: the weights and the scorers' versions."""
        return "sum " + "; ".join(f"{self.weights[n]} x {n}: {r.version}" for n, r in sorted(self.rewards.items()))

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Scores B images; `parts` holds every scorer's own score."""
        by_name = {name: score_each(reward, batch) for name, reward in self.rewards.items()}
        return [self._sum({name: scores[row] for name, scores in by_name.items()}) for row in range(len(batch))]

    def _sum(self, parts: Mapping[str, Score]) -> Score:
        failed = [
            f"{name}: {score.detail.get('reason', 'unknown')}" for name, score in parts.items() if not score.valid
        ]
        if failed:
            return replace(Score.invalid("; ".join(failed)), parts=dict(parts))
        total = sum(self.weights[name] * score.rl for name, score in parts.items())
        return Score(native=total, table=total, rl=total, parts=dict(parts), weights=dict(self.weights))

"""Metrics of a training step for the log, computed from a rollout's records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from lightning_modules.distributed import gather_lists
from lightning_modules.rl.advantages import group_stats
from lightning_modules.rollout import Completions, Rollout
from rewards.base import Score
from rewards.encoders import PixelEncoder, image_similarity


class Averages:
    """Weighted means of named values; of a name with "max_" in it, the maximum instead (scorers aside)."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, value: Tensor | float, weight: float = 1.0) -> None:
        """Adds a value, a scalar, with its weight in the mean; with weight 0 only its name."""
        if "max_" in name and not name.startswith("reward/"):  # a scorer may have any name
            self._sums[name] = torch.maximum(torch.as_tensor(self._sums.get(name, value)), torch.as_tensor(value))
            self._weights[name] = 1.0
        else:
            self._sums[name] = self._sums.get(name, 0.0) + (weight * value if weight else 0.0)
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def add_all(self, prefix: str, values: Mapping[str, Tensor | float], weight: float) -> None:
        """Adds several values, named `<prefix>/<name>`."""
        for name, value in values.items():
            self.add(f"{prefix}/{name}", value, weight)

    def compute(self) -> dict[str, float]:
        """Returns the means (or maxima) by name, NaN for one whose weights are all 0."""
        return {
            name: float(value) / self._weights[name] if self._weights[name] else math.nan
            for name, value in self._sums.items()
        }

    def over_ranks(self) -> dict[str, float]:
        """Returns what `compute` would of all processes' values; one collective."""
        merged = Averages()
        own = [(name, float(total), self._weights[name]) for name, total in self._sums.items()]
        for name, total, weight in gather_lists(own):
            merged.add(name, total / weight if weight else 0.0, weight)
        return merged.compute()

    def add_score(self, name: str, score: Score) -> None:
        """Adds the native (raw) and the rl value that a scorer gave an image, or that it failed."""
        self.add(f"reward/{name}", score.native, float(score.valid))
        self.add(f"reward/{name}/rl", score.rl, float(score.valid))
        self.add(f"reward/{name}/invalid_share", float(not score.valid))

    def add_rollout(self, rollout: Rollout, reward: str) -> None:
        """Adds a rollout's numbers: `reward`, `format`, `group/*`, `refine/*`, and `reward/*` of each scorer.

        Args:
            rollout: experience of one step.
            reward: name of the reward that scored it.
        """
        valid, groups = rollout.valid, len(rollout.samples)
        self.add("reward", rollout.rewards[valid].sum() / valid.sum().clamp(min=1), float(valid.sum()))
        usable = float(rollout.counted.any(1).sum())
        for name, value in group_stats(*(rollout.whole or (rollout.rewards, valid))).items():
            self.add(f"group/{name}", value, groups if name == "invalid_share" else usable)
        if len(rollout.images) > groups:  # else each process has one image of a group
            self.add("group/image_similarity", group_similarity(rollout.images, groups), groups)
        for score in rollout.scores:
            for name, part in score.leaves(reward):
                self.add_score(name, part)
        if rollout.completions is not None:
            refine = refine_stats(rollout.completions, [sample.prompt for sample in rollout.samples])
            self.add("format", refine.pop("format"), len(rollout.completions))
            self.add_all("refine", refine, len(rollout.completions))


def refine_stats(completions: Completions, originals: Sequence[str]) -> dict[str, float]:
    """Computes shares of rewrites: well-formed, cut off, distinct in their group, copies of the original.

    `length` is the mean number of tokens.
    """
    total, per_group = len(completions), len(completions) // len(originals)
    groups = [completions.rewrites[i : i + per_group] for i in range(0, total, per_group)]
    return {
        "format": completions.formatted.mean().item(),
        "length": completions.mask.sum(1).float().mean().item(),
        "truncated": completions.truncated.float().mean().item(),
        "distinct": sum(len(set(group)) for group in groups) / total,
        "copies": sum(group.count(original) for group, original in zip(groups, originals, strict=True)) / total,
    }


def group_similarity(images: Sequence[Image.Image], groups: int) -> float:
    """Computes the mean cosine of two different images of a group, -1..1, each shrunk to 32 x 32 and centred.

    A cheap stand-in for an encoder's image-image similarity (paper Fig. 2): it sees layout and colour.
    """
    embeddings = PixelEncoder().images(images)
    return image_similarity(embeddings.view(groups, -1, embeddings.shape[-1])).mean().item()

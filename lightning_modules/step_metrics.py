"""Metrics of a training step for the log, computed from a rollout's records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from PIL import Image
from torch import Tensor

from lightning_modules.rollout import Completions
from rewards.base import Score
from rewards.encoders import PixelEncoder, image_similarity


class Averages:
    """Weighted means of named values; of a name with "max_" in it, the maximum instead."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        """Adds a value, a scalar, with its weight in the mean."""
        if "max_" in name:
            self._sums[name] = torch.maximum(self._sums.get(name, value), value)
            self._weights[name] = 1.0
        else:
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + weight * value
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def add_all(self, prefix: str, values: Mapping[str, Tensor], weight: float) -> None:
        """Adds several values, named `<prefix>/<name>`."""
        for name, value in values.items():
            self.add(f"{prefix}/{name}", value, weight)

    def compute(self) -> dict[str, Tensor]:
        """Returns the means (or maxima) by name."""
        return {name: value / self._weights[name] for name, value in self._sums.items()}


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


def reward_stats(named: Sequence[tuple[str, Score]]) -> dict[str, float]:
    """Computes each scorer's mean native value (its raw score), mean rl value and share of invalid scores.

    Means run over valid scores and are NaN where there is none.

    Args:
        named: (name of the scorer, score) pairs.
    """
    by_name: dict[str, list[Score]] = {}
    for name, score in named:
        by_name.setdefault(name, []).append(score)
    stats: dict[str, float] = {}
    for name, scores in by_name.items():
        valid = [score for score in scores if score.valid]
        stats[f"reward/{name}"] = fmean(score.native for score in valid) if valid else math.nan
        stats[f"reward/{name}/rl"] = fmean(score.rl for score in valid) if valid else math.nan
        stats[f"reward/{name}/invalid_share"] = 1 - len(valid) / len(scores)
    return stats


def group_similarity(images: Sequence[Image.Image], groups: int) -> float:
    """Computes the mean cosine of two different images of a group, -1..1, each shrunk to 32 x 32 and centred.

    A cheap stand-in for an encoder's image-image similarity (paper Fig. 2): it sees layout and colour.
    """
    embeddings = PixelEncoder().images(images)
    return image_similarity(embeddings.view(groups, -1, embeddings.shape[-1])).mean().item()

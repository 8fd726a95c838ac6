"""Composition of a group: retained prompts first, then the rewrites, each drawn M times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from datamodules.sample import PromptSample
from rewards.arguments import check_minimum


def check_group(group_size: int, num_retained: int, refines: bool) -> None:
    """Raises a ValueError if n, m and the refiner do not go together."""
    if group_size < 2:
        raise ValueError(f"`model.group_size` is {group_size}; a group needs at least 2 samples to compare.")
    if num_retained < 0 or num_retained > group_size or (refines and num_retained == group_size):
        raise ValueError(
            f"`model.num_retained` is {num_retained} of `model.group_size` {group_size}, which leaves the refiner "
            "nothing to write; set it below group_size, or `model.language: null`."
        )
    if not refines and num_retained != group_size:
        raise ValueError(
            f"`model.language` is null, but `model.num_retained` {num_retained} is less than `model.group_size` "
            f"{group_size}, so {group_size - num_retained} prompts have no writer; set num_retained to {group_size}."
        )


def check_split(processes: int, group_size: int, num_retained: int, groupwise: bool, compares: bool = False) -> None:
    """Raises a ValueError if a group cannot be drawn by several processes."""
    name, rewrites = f"`model.processes_per_group` is {processes}", group_size - num_retained
    check_minimum("model", 1, processes_per_group=processes)
    if group_size % processes:
        raise ValueError(f"{name}, which does not divide `model.group_size` {group_size}: use one that does.")
    if processes > rewrites > 0:
        raise ValueError(
            f"{name}, but a group has {rewrites} rewrites, so that some processes had none: use at most that."
        )
    if processes > 1 and (groupwise or compares):
        what = "reward" if groupwise else "objective"
        raise ValueError(f"{name}, but the {what} compares all images of a group in one process: leave it at 1.")


def group_prompts(
    samples: Sequence[PromptSample], rewrites: Sequence[str] | None, num_retained: int, images_per_prompt: int
) -> list[str]:
    """Lists the G * n * M prompts to draw, group by group.

    Args:
        samples: G original prompts.
        rewrites: G * (n - m) rewritten prompts, or None without a refiner.
        num_retained: m.
        images_per_prompt: M.
    """
    refined = 0 if rewrites is None else len(rewrites) // len(samples)
    prompts: list[str] = []
    for group, sample in enumerate(samples):
        written = [] if rewrites is None else rewrites[group * refined : (group + 1) * refined]
        for prompt in [sample.prompt] * num_retained + list(written):
            prompts += [prompt] * images_per_prompt
    return prompts


def group_formats(formatted: Tensor, groups: int, num_retained: int, images_per_prompt: int) -> Tensor:
    """Spreads format rewards to [G, n * M]; a retained prompt gets its group's mean, so neither gain nor loss.

    Args:
        formatted: [G * (n - m)] format reward of each rewrite.
        groups: G.
        num_retained: m.
        images_per_prompt: M.
    """
    by_group = formatted.view(groups, -1)
    retained = by_group.mean(1, keepdim=True).expand(groups, num_retained)
    return torch.cat([retained, by_group], 1).repeat_interleave(images_per_prompt, 1)


def source_images(samples: Sequence[PromptSample]) -> list[Image] | None:
    """Collects the samples' source images; None if no sample has one.

    Raises:
        ValueError: if some have one and others do not: a model either edits or draws from text.
    """
    images = [sample.image for sample in samples if sample.image is not None]
    if images and len(images) < len(samples):
        bare = next(sample for sample in samples if sample.image is None)
        raise ValueError(f"the prompt {bare.id!r} has no source image, but others of its batch have; do not mix them.")
    return images or None

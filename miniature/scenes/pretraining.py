"""Endless streams of rendered scenes, captions and rewrites that the miniature's base models are made from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from miniature.scenes.world import (
    FAITHFUL,
    STYLES,
    TAGS,
    Content,
    Habits,
    Style,
    all_contents,
    captioned_scenes,
    elaborate,
    random_scene,
    render,
    write,
    write_loosely,
)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """[B, H, W, 3] uint8 to [B, 3, H, W] float in [-1, 1], the range of diffusers' autoencoders."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def completion(rewrite: str, rng: random.Random) -> str:
    """A rewrite in its answer format, which one in twenty breaks, so that RL has something to teach."""
    if rng.random() < 0.05:
        return rng.choice((rewrite, f"<answer> {rewrite}"))
    return f"<answer> {rewrite} </answer>"


def rewrite_pair(rng: random.Random) -> tuple[str, str]:
    """One example for the refiner: a prompt and the completion that it should learn to give.

    Prompts are half canonical, the others in known or in random wordings. Rewrites are "gallery", "terse" and
    "detailed" wordings, vocabularies mixed now and then, never the canonical wording (greedy rewrites would be copies)
    nor the "unseen" templates. A tenth misrepresent the prompt and one in twenty breaks the answer format, so that RL
    has something to teach.
    """
    content = rng.choice(all_contents(rng.choice(TAGS)))
    asked = rng.choices(("canonical", "gallery", "terse", "loose"), (0.5, 0.15, 0.15, 0.2))[0]
    prompt = write_loosely(content, rng) if asked == "loose" else write(content, asked, rng)  # type: ignore[arg-type]
    style: Style = rng.choices(("gallery", "terse", "detailed"), (0.35, 0.35, 0.3))[0]
    said: Content = content
    if rng.random() < 0.1:
        said = rng.choice(all_contents(content.tag))
    said = elaborate(said, rng) if style == "detailed" else said
    return prompt, completion(write(said, style, rng, mix=rng.choice((0.0, 0.3))), rng)


class _Stream(IterableDataset[dict[str, Any]]):
    """Batches made on the fly; every worker has a stream of its own."""

    def __init__(self, what: str, batch_size: int, seed: int, faithful_batches: int, habits: Habits) -> None:
        self.what, self.batch_size, self.seed = what, batch_size, seed
        self.faithful_batches, self.habits = faithful_batches, habits

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        workers, index = (worker.num_workers, worker.id) if worker else (1, 0)
        rng = random.Random(f"{self.what}-{self.seed}-{index}")
        size = self.batch_size
        if self.what == "scenes":
            while True:
                yield {"images": to_tensor(np.stack([render(random_scene(rng)) for _ in range(size)]))}
        elif self.what == "rewrites":
            while True:
                prompts, completions = zip(*(rewrite_pair(rng) for _ in range(size)), strict=True)
                yield {"prompts": list(prompts), "completions": list(completions)}
        styles = [(style, 1.5 if style == "canonical" else 1.0) for style in STYLES]
        streams = [
            captioned_scenes(rng, habits, styles)
            for habits in (replace(self.habits, slips=0.0, mistakes=FAITHFUL.mistakes), self.habits)
        ]
        done = 0
        while True:
            stream = streams[done * workers >= self.faithful_batches]
            captions, scenes = zip(*(next(stream) for _ in range(size)), strict=True)
            done += 1
            yield {"captions": list(captions), "images": to_tensor(np.stack([render(scene) for scene in scenes]))}


class ShapesPretraining(L.LightningDataModule):
    """Training streams for the miniature's base models.

    Args:
        what: "scenes" (images only), "captions" (captions and images) or "rewrites" (prompts and completions).
        batch_size: examples a step.
        faithful_batches: "captions" only: number of first batches whose images always match their captions. With
            mistakes from the start a model this small never learns prompts of two objects.
        habits: "captions" only: how images depart from their captions after that.
        seed: of the stream.
        num_workers: processes that make batches.
    """

    def __init__(
        self,
        what: Literal["scenes", "captions", "rewrites"],
        batch_size: int = 64,
        faithful_batches: int = 0,
        habits: Habits = Habits(),  # noqa: B008 (frozen)
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.stream = _Stream(what, batch_size, seed, faithful_batches, habits)
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Endless: give the trainer `max_steps`."""
        return DataLoader(self.stream, batch_size=None, num_workers=self.num_workers)

"""Endless streams of batches, made on the fly, on which the miniature's base models are trained."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from datamodules.seed import run_seed

Batch = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A caption and its image.

    Attributes:
        caption: the wording.
        image: [32, 32, 3] uint8.
        asked: number of the thing that the caption asks for in each of the 16 cells, see `Scene.things`; 0 for none.
        heeded: true if the caption is one that the world draws as it says.
    """

    caption: str
    image: np.ndarray
    asked: Sequence[int] = (0,) * 16
    heeded: bool = True


Captioned = Iterator[Example]


class Stream(IterableDataset[Batch]):
    """Endless stream of batches, each of which depends on the key and its own number alone.

    So it is the same for any number of workers, and can begin anywhere.

    Args:
        batch: makes a batch from random numbers and its number.
        key: name and seed of the stream.
        start: number of the first batch.
    """

    def __init__(self, batch: Callable[[random.Random, int], Batch], key: str, start: int = 0) -> None:
        self.batch = batch
        self.key = key
        self.start = start

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        workers, index = (worker.num_workers, worker.id) if worker else (1, 0)
        for number in count(self.start + index, workers):
            yield self.batch(random.Random(f"{self.key}-{number}"), number)


class StreamData(L.LightningDataModule):
    """Base class of the data modules of pretraining.

    Args:
        batch: makes a training batch from random numbers and its number.
        name: name of the stream.
        seed: seed of the stream; null follows `seed_everything`.
        num_workers: number of processes that make batches.
    """

    def __init__(
        self, batch: Callable[[random.Random, int], Batch], name: str, seed: int | None, num_workers: int
    ) -> None:
        super().__init__()
        self.batch = batch
        self.key = f"{name}-{run_seed(seed)}"
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[Batch]:
        """Makes the endless loader, from the run's current step on; give the trainer `max_steps`."""
        start = self.trainer.global_step if self.trainer is not None else 0
        return DataLoader(Stream(self.batch, self.key, start), batch_size=None, num_workers=self.num_workers)


@dataclass(frozen=True)
class Part:
    """Examples of one kind (scenes or signs) in every batch.

    Attributes:
        size: number of them in a batch.
        image: draws an image, [32, 32, 3] uint8.
        rewrite: draws a prompt and the completion that a refiner should learn to give.
        captioned: random numbers, and true for images that match their captions -> captioned images without end.
        faithful_batches: number of first batches whose images match their captions.
    """

    size: int
    image: Callable[[random.Random], np.ndarray]
    rewrite: Callable[[random.Random], tuple[str, str]]
    captioned: Callable[[random.Random, bool], Captioned]
    faithful_batches: int


def mixed_batch(what: str, parts: Sequence[Part], rng: random.Random, number: int) -> Batch:
    """Makes a batch with examples of all parts, in their order.

    Args:
        what: "images" (`images` alone), "captions" (`captions` and, of each, `images`, `asked` and `heeded`) or
            "rewrites" (`prompts` and `completions`).
        parts: kinds of examples.
        rng: random numbers.
        number: number of the batch in its stream.
    """
    if what == "rewrites":
        prompts, completions = zip(*(part.rewrite(rng) for part in parts for _ in range(part.size)), strict=True)
        return {"prompts": prompts, "completions": completions}
    if what == "captions":
        streams = [(part, part.captioned(rng, number < part.faithful_batches)) for part in parts]
        examples = [example for part, stream in streams for example in islice(stream, part.size)]
        return {
            "captions": [example.caption for example in examples],
            "images": to_tensor([example.image for example in examples]),
            "asked": torch.tensor([example.asked for example in examples]),
            "heeded": torch.tensor([float(example.heeded) for example in examples]),
        }
    return {"images": to_tensor([part.image(rng) for part in parts for _ in range(part.size)])}


def to_tensor(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Stacks B images, [H, W, 3] uint8, to [B, 3, H, W] float in [-1, 1], the range of diffusers' autoencoders."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def completion(rewrite: str, rng: random.Random) -> str:
    """Puts a rewrite into its answer format, which one in twenty breaks, so that RL has something to teach."""
    if rng.random() < 0.05:
        return rng.choice((rewrite, f"<answer> {rewrite}"))
    return f"<answer> {rewrite} </answer>"

"""Endless streams of batches, made on the fly, on which the miniature's base models are trained."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from miniature.scenes.interpretation import Habits

Batch = dict[str, Any]
Captioned = Iterator[tuple[str, np.ndarray]]
"""Captions and their images, [32, 32, 3] uint8."""


_Habits = TypeVar("_Habits", bound=Habits)
_Example = TypeVar("_Example")


class Stream(IterableDataset[Batch]):
    """Endless stream of batches; every loader worker has random numbers of its own.

    Args:
        batches: makes the batches from random numbers and the number of workers.
        key: name and seed of the stream, which decide the random numbers together with the worker's index.
    """

    def __init__(self, batches: Callable[[random.Random, int], Iterator[Batch]], key: str) -> None:
        self.batches = batches
        self.key = key

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        workers, index = (worker.num_workers, worker.id) if worker else (1, 0)
        return self.batches(random.Random(f"{self.key}-{index}"), workers)


class StreamData(L.LightningDataModule):
    """Base class of the data modules of pretraining.

    Args:
        stream: the training batches.
        num_workers: number of processes that make batches.
    """

    def __init__(self, stream: Stream, num_workers: int) -> None:
        super().__init__()
        self.stream = stream
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[Batch]:
        """Makes the endless loader; give the trainer `max_steps`."""
        return DataLoader(self.stream, batch_size=None, num_workers=self.num_workers)


@dataclass(frozen=True)
class Part:
    """Examples of one kind (scenes or signs) in every batch.

    Attributes:
        size: number of them in a batch.
        image: draws an image, [32, 32, 3] uint8.
        rewrite: draws a prompt and the completion that a refiner should learn to give.
        captioned: random numbers and a number -> captioned images; so many first ones match their captions.
        faithful_batches: number of first batches, over all workers, whose images match their captions.
    """

    size: int
    image: Callable[[random.Random], np.ndarray]
    rewrite: Callable[[random.Random], tuple[str, str]]
    captioned: Callable[[random.Random, int], Captioned]
    faithful_batches: int


def mixed_batches(what: str, parts: Sequence[Part], rng: random.Random, workers: int) -> Iterator[Batch]:
    """Yields batches with examples of all parts, in their order.

    Args:
        what: "images" (`images` alone), "captions" (`captions` and `images`) or "rewrites" (`prompts` and
            `completions`).
        parts: kinds of examples.
        rng: random numbers.
        workers: number of processes that make batches.
    """
    if what == "rewrites":
        while True:
            pairs = [part.rewrite(rng) for part in parts for _ in range(part.size)]
            yield {"prompts": [prompt for prompt, _ in pairs], "completions": [completion for _, completion in pairs]}
    elif what == "captions":
        streams = [part.captioned(rng, part.size * own_share(part.faithful_batches, workers)) for part in parts]
        while True:
            examples = [one for part, stream in zip(parts, streams, strict=True) for one in islice(stream, part.size)]
            yield {"captions": [text for text, _ in examples], "images": to_tensor([image for _, image in examples])}
    while True:
        yield {"images": to_tensor([part.image(rng) for part in parts for _ in range(part.size)])}


def faithful_first(
    captioned: Callable[[random.Random, _Habits], Iterator[_Example]], habits: _Habits, rng: random.Random, num: int
) -> Iterator[_Example]:
    """Yields `num` examples whose images match their captions, then endless ones with the mistakes of `habits`.

    Args:
        captioned: random numbers and habits -> endless examples.
        habits: rates of mistakes.
        rng: random numbers.
        num: number of faithful examples.
    """
    return chain(islice(captioned(rng, habits.faithful), num), captioned(rng, habits))


def own_share(batches: int, workers: int) -> int:
    """Returns how many of the first `batches` are made by each worker (rounded up)."""
    return -(-batches // workers)


def to_tensor(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Stacks B images, [H, W, 3] uint8, to [B, 3, H, W] float in [-1, 1], the range of diffusers' autoencoders."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def completion(rewrite: str, rng: random.Random) -> str:
    """Puts a rewrite into its answer format, which one in twenty breaks, so that RL has something to teach."""
    if rng.random() < 0.05:
        return rng.choice((rewrite, f"<answer> {rewrite}"))
    return f"<answer> {rewrite} </answer>"

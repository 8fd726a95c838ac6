"""Scorers whose packages pin old libraries: each runs behind the reward server, in an environment of its own."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from PIL.Image import Image

from datamodules.chunks import chunks
from rewards.base import Reward, RewardBatch, Score


class ServedReward(Reward):
    """Base of rewards that call another package: batches, invalid inputs and units; a subclass loads and calls it."""

    requirements: str
    """Requirements file of the environment, from the root of the repository."""
    rl_divisor: float = 1.0
    """Divisor of the rl value: rl = native / rl_divisor."""
    batch_size: int = 1
    """Number of images per call of the package."""

    @abstractmethod
    def native(self, prompts: Sequence[str], images: Sequence[Image]) -> list[float]:
        """Scores images by the package.

        Args:
            prompts: B prompts.
            images: B images in RGB.

        Returns:
            B scores; not finite where the package failed.
        """

    def fault(self, prompt: str, image: Image) -> str | None:
        """Returns the reason why the package must not get this pair; None if it may."""
        return None

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Scores B images against their samples' prompts."""
        self.load()
        prompts = [sample.prompt for sample in batch.samples]
        faults = [self.fault(prompt, image) for prompt, image in zip(prompts, batch.images, strict=True)]
        sound = [index for index, fault in enumerate(faults) if fault is None]
        scores = [Score.invalid(fault or "") for fault in faults]
        for rows in chunks(len(sound), self.batch_size):
            part = sound[rows]
            natives = self.native([prompts[i] for i in part], [batch.images[i].convert("RGB") for i in part])
            for index, native in zip(part, natives, strict=True):
                scores[index] = to_score(native, rl_divisor=self.rl_divisor)
        return scores

    @contextmanager
    def environment(self) -> Iterator[None]:
        """Context manager: turns the ImportError of a package that is missing or does not fit into a ValueError."""
        try:
            yield
        except ImportError as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise ValueError(
                f"{type(self).__name__} cannot import its package ({reason}): run it behind the reward server in an "
                f"environment of its own, made from {self.requirements} as rewards/served/README.md says."
            ) from error


def to_score(native: float, *, rl_divisor: float = 1.0) -> Score:
    """Makes a score with table = native and rl = native / rl_divisor; invalid if native is not finite.

    >>> to_score(3.5, rl_divisor=5.0).rl
    0.7
    """
    if not math.isfinite(native):
        return Score.invalid(f"the scorer put out {native}")
    return Score(native=native, table=native, rl=native / rl_divisor)

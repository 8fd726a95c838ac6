"""Scorers whose packages pin old libraries: each runs behind the reward server, in an environment of its own."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata

from PIL.Image import Image

from datamodules.chunks import chunks
from rewards.base import Reward, RewardBatch, Score


class ServedReward(Reward):
    """Scores by another package. A subclass loads it and calls it; batches, faults and units are the same for all."""

    requirements: str
    """The file, from the root of the repository, that describes the environment."""
    rl_divisor: float = 1.0
    """rl = native / rl_divisor."""
    batch_size: int = 1
    """Images per call of the package."""

    @abstractmethod
    def native(self, prompts: Sequence[str], images: Sequence[Image]) -> list[float]:
        """What the package puts out.

        Args:
            prompts: B prompts.
            images: B images in RGB.

        Returns:
            B scores; not finite where the package failed.
        """

    def fault(self, prompt: str, image: Image) -> str | None:
        """Why the package must not be given this pair; None if it may."""
        return None

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Score B images against their samples' prompts."""
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
        """Turns a package that is missing, or too new for another one, into one sentence."""
        try:
            yield
        except ImportError as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise ValueError(
                f"{type(self).__name__} cannot import its package ({reason}): run it behind the reward server in an "
                f"environment of its own, made from {self.requirements} as rewards/served/README.md says."
            ) from error


def to_score(native: float, *, rl_divisor: float = 1.0) -> Score:
    """A score with table = native and rl = native / rl_divisor; invalid if native is not finite.

    >>> to_score(3.5, rl_divisor=5.0).rl
    0.7
    """
    if not math.isfinite(native):
        return Score.invalid(f"the scorer put out {native}")
    return Score(native=native, table=native, rl=native / rl_divisor)


def installed(package: str) -> str:
    """The package with its version, for `Reward.version`."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} (not installed)"

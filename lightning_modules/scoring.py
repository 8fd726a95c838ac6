"""`Scoring`: scores chunks of images while the next chunk is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from PIL import Image

from datamodules.sample import PromptSample
from rewards.base import Reward, RewardBatch, Score
from rewards.calls import faults, score_each


class Scoring:
    """Hands chunks of images to a reward, in a thread of its own, and gives the scores back in order.

    The thread serves without overlap too: autocast and the gradient mode are kept per thread, so that a scorer runs in
    its own precision whatever the training's, and scores do not depend on the overlap.

    Args:
        reward: called by one thread at a time, once per chunk.
        device: device of the training; becomes the thread's current GPU.
        overlap: `submit` returns at once; otherwise it waits for the chunk's scores.
        group: images of a group, which stand side by side; a `groupwise` reward gets whole groups.
    """

    def __init__(self, reward: Reward, device: torch.device, *, overlap: bool = True, group: int = 1) -> None:
        self.reward = reward
        self.overlap = overlap
        self._size = group if reward.groupwise else 1
        self._waiting: list[tuple[PromptSample, Image.Image]] = []
        self._device = device
        self._chunks: list[Future[list[Score]]] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")

    def __enter__(self) -> Scoring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An error is to be heard of now, by other processes too, not once a server has answered.
        self._thread.shutdown(wait=error is None, cancel_futures=error is not None)

    def submit(self, samples: Sequence[PromptSample], images: Sequence[Image.Image]) -> None:
        """Hands over the next chunk: B images and their samples."""
        self._waiting += zip(samples, images, strict=True)
        ready = self._waiting[: len(self._waiting) // self._size * self._size]
        if not ready:
            return
        self._waiting = self._waiting[len(ready) :]
        batch = RewardBatch([sample for sample, _ in ready], [image for _, image in ready])
        self._chunks.append(self._thread.submit(self._score, batch))
        if not self.overlap:
            self._chunks[-1].exception()  # waits; `scores` raises it

    def scores(self) -> list[Score]:
        """Waits for all scores and returns them in the order of submission.

        Where the reward changed settings of the process, all are invalid: images may have been drawn by other ones.

        Raises:
            ValueError: at the first chunk that failed; see `score_each`.
        """
        scores = [score for chunk in self._chunks for score in chunk.result()]
        altered = [score for score in scores if "altered" in faults(score)]
        return altered[:1] * len(scores) if altered and self.overlap else scores

    def _score(self, batch: RewardBatch) -> list[Score]:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        return score_each(self.reward, batch)

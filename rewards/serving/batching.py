"""Dynamic batching: a worker thread per reward scores the items of all clients together; errors stay per item."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from PIL.Image import Image

from datamodules.sample import PromptSample
from rewards.base import Reward, RewardBatch, RewardUnavailable, as_score
from rewards.serving.protocol import BadImage, Item, Result, Unscored, decode_image, to_result

log = logging.getLogger("rewards.serving.server")


class QueueFull(RuntimeError):
    """The queue has no room for the submitted items, or the batcher is closed."""


@dataclass(frozen=True)
class Job:
    """One item with its images' files and the future of its result."""

    item: Item
    image: bytes
    source: bytes | None = None
    result: Future[Result] = field(default_factory=Future)


@dataclass(frozen=True)
class _Decoded:
    job: Job
    sample: PromptSample
    image: Image


class Batcher:
    """Gathers items and calls a reward with batches of up to `max_batch_items`, never twice at once.

    Images are decoded when their batch is due, so that memory holds the pixels of one batch and only files wait. The
    queue bounds how many items wait, not how large they are; `rewards.serving.requests.MemoryBudget` bounds
    their bytes.

    Args:
        reward: a loaded reward.
        max_pixels: largest image.
        max_batch_items: most items that the reward is called with.
        batch_wait_ms: how long a batch that is not full waits for other clients' items.
        queue_limit: most items that wait.
    """

    def __init__(
        self, reward: Reward, *, max_pixels: int, max_batch_items: int, batch_wait_ms: float, queue_limit: int
    ) -> None:
        self.reward = reward
        self.max_pixels = max_pixels
        self.max_batch_items = max_batch_items
        self.batch_wait = batch_wait_ms / 1000
        self.queue_limit = queue_limit
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._decoders = ThreadPoolExecutor(4, thread_name_prefix="decode")
        self._worker = threading.Thread(target=self._run, name="score", daemon=True)

    def start(self) -> None:
        """Starts the worker thread, which scores what is submitted."""
        self._worker.start()

    @property
    def ready(self) -> bool:
        """True while the worker runs and `submit` takes items."""
        return self._worker.is_alive() and not self._closed

    @property
    def num_waiting(self) -> int:
        """Number of items that wait for a batch."""
        return len(self._queue)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all jobs or, if they do not fit, none.

        Raises:
            QueueFull: if the jobs do not fit, or the batcher is closed.
        """
        with self._changed:
            if self._closed or len(self._queue) + len(jobs) > self.queue_limit:
                raise QueueFull
            self._queue.extend(jobs)
            self._changed.notify_all()

    def close(self) -> None:
        """Scores the jobs that were accepted, then ends the worker."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._worker.join()
        self._decoders.shutdown()

    def _run(self) -> None:
        while batch := self._next_batch():
            self._process([job for job in batch if job.result.set_running_or_notify_cancel()])

    def _next_batch(self) -> list[Job]:
        """Waits for the next batch; returns an empty one once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            due = time.monotonic() + self.batch_wait
            self._changed.wait_for(
                lambda: len(self._queue) >= self.max_batch_items or self._closed, max(0.0, due - time.monotonic())
            )
            return [self._queue.popleft() for _ in range(min(self.max_batch_items, len(self._queue)))]

    def _process(self, jobs: Sequence[Job]) -> None:
        prepared = list(self._decoders.map(self._prepare, jobs))
        for job, outcome in zip(jobs, prepared, strict=True):
            if isinstance(outcome, Unscored):
                job.result.set_result(outcome)
        ready = [outcome for outcome in prepared if isinstance(outcome, _Decoded)]
        try:
            results = self._score(ready) if ready else []
        except RewardUnavailable as error:
            log.warning("%s is unavailable: %s", self.reward.name, error)
            for one in ready:
                one.job.result.set_exception(error)
            return
        for one, result in zip(ready, results, strict=True):
            one.job.result.set_result(result)

    def _prepare(self, job: Job) -> _Decoded | Unscored:
        """Decodes a job's images into a sample; returns an `Unscored` if it cannot be scored."""
        item = job.item
        has = {*item.metadata, *(["tag"] if item.tag else []), *(["image"] if job.source is not None else [])}
        missing = [need for need in self.reward.needs if need not in has]
        if missing:
            reason = f"the item lacks {', '.join(missing)}, which the reward needs"
            return Unscored(valid=False, error="missing_need", reason=reason)
        try:
            image = decode_image(job.image, self.max_pixels)
            source = None if job.source is None else decode_image(job.source, self.max_pixels)
        except BadImage as error:
            return Unscored(valid=False, error=error.error, reason=str(error))
        return _Decoded(job, PromptSample(item.id, item.prompt, item.tag, item.metadata, source), image)

    def _score(self, ready: Sequence[_Decoded]) -> list[Result]:
        """Scores decoded jobs, one result each; if the reward raises, it scores each alone, so that only one fails."""
        try:
            scores = self.reward(RewardBatch([one.sample for one in ready], [one.image for one in ready]))
            if len(scores) != len(ready):
                log.error("%s returned %d scores for %d images", self.reward.name, len(scores), len(ready))
                wrong = "the scorer returned a wrong number of scores, so that none can be told whose it is"
                return [Unscored(valid=False, error="wrong_length", reason=wrong)] * len(ready)
            return [to_result(as_score(score, type(self.reward).__name__)) for score in scores]
        except RewardUnavailable:
            raise
        except BaseException:  # SystemExit too: without its worker a queue would never be answered
            log.exception("%s failed on %d items", self.reward.name, len(ready))
            if len(ready) == 1:
                return [
                    Unscored(valid=False, error="scorer_error", reason="the scorer failed; the server's log says how")
                ]
        return [result for one in ready for result in self._score([one])]

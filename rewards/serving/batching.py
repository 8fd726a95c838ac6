"""Dynamic batching: a worker thread per reward scores the items of all clients together; errors stay per item."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from PIL.Image import Image

from datamodules.sample import PromptSample
from rewards.base import Reward, RewardBatch, RewardUnavailable, as_score
from rewards.serving.protocol import BadImage, Item, Result, Unscored, decode_image, to_result

log = logging.getLogger("rewards.serving.server")

MAX_OVERDUE = 4
"""Most calls of a reward that run on after their time; each holds the images of its batch."""


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


class _TooSlow(RuntimeError):
    """Raised if a call of a reward takes too long."""


class _Caller(threading.Thread):
    """Daemon thread that calls a reward: one that hangs can be left behind, and does not keep the process alive."""

    def __init__(self, reward: Reward) -> None:
        super().__init__(name="call", daemon=True)
        self.reward = reward
        self._calls: SimpleQueue[tuple[RewardBatch, Future[Any]] | None] = SimpleQueue()
        self.start()

    def submit(self, batch: RewardBatch) -> Future[Any]:
        """Queues a call; returns the future of what the reward returns."""
        future: Future[Any] = Future()
        self._calls.put((batch, future))
        return future

    def close(self) -> None:
        """Ends the thread after its last call."""
        self._calls.put(None)

    def run(self) -> None:
        """Calls the reward until closed."""
        while (call := self._calls.get()) is not None:
            batch, future = call
            try:
                future.set_result(self.reward(batch))
            except BaseException as error:  # SystemExit too: without an answer its clients would wait for ever
                future.set_exception(error)
            del call, batch, future  # else the images would stay until the next call


class Batcher:
    """Gathers items and calls a reward with batches of up to `max_batch_items`, once at a time.

    A call that takes over `score_timeout` runs on, beside the next ones. Once `MAX_OVERDUE` do, the reward is
    unavailable until one ends.

    Images are decoded when their batch is due, so that memory holds the pixels of one batch and only files wait. The
    queue bounds how many items wait, not how large they are; `rewards.serving.requests.MemoryBudget` bounds
    their bytes.

    Args:
        reward: a loaded reward.
        max_pixels: largest image.
        max_batch_items: most items that the reward is called with.
        batch_wait_ms: how long a batch that is not full waits for other clients' items.
        queue_limit: most items that wait.
        score_timeout: longest time for a call of the reward, in seconds.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        max_pixels: int,
        max_batch_items: int,
        batch_wait_ms: float,
        queue_limit: int,
        score_timeout: float,
    ) -> None:
        self.reward = reward
        self.max_pixels = max_pixels
        self.max_batch_items = max_batch_items
        self.batch_wait = batch_wait_ms / 1000
        self.queue_limit = queue_limit
        self.score_timeout = score_timeout
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._decoders = ThreadPoolExecutor(4, thread_name_prefix="decode")
        self._worker = threading.Thread(target=self._run, name="score", daemon=True)
        self._caller = _Caller(reward)
        self._overdue: list[Future[Any]] = []

    def start(self) -> None:
        """Starts the worker thread, which scores what is submitted."""
        self._worker.start()

    @property
    def ready(self) -> bool:
        """True while the worker runs, `submit` takes items, and the reward can be called."""
        return self._worker.is_alive() and not self._closed and not self._hangs

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
        self._caller.close()
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
        self._score([outcome for outcome in prepared if isinstance(outcome, _Decoded)])

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

    def _score(self, ready: Sequence[_Decoded]) -> None:
        """Sets the results of decoded jobs; if a call fails, it scores each alone, so that only one fails."""
        if not ready:
            return
        name = self.reward.name
        try:
            results = self._call(ready)
        except RewardUnavailable as error:
            log.warning("%s is unavailable: %s", name, error)
            for one in ready:
                one.job.result.set_exception(error)
            return
        except _TooSlow:
            log.error("%s took over %g s for %d items; the call runs on", name, self.score_timeout, len(ready))
            reason = f"the scorer took over {self.score_timeout:g} s for this image alone"
            failure = Unscored(valid=False, error="too_slow", reason=reason)
        except BaseException:  # whatever a scorer raises, SystemExit included
            log.exception("%s failed on %d items", name, len(ready))
            reason = "the scorer failed; the server's log says how"
            failure = Unscored(valid=False, error="scorer_error", reason=reason)
        else:
            for one, result in zip(ready, results, strict=True):
                one.job.result.set_result(result)
            return
        if len(ready) == 1:
            ready[0].job.result.set_result(failure)
        else:
            for one in ready:
                self._score([one])

    def _call(self, ready: Sequence[_Decoded]) -> list[Result]:
        """Calls the reward; returns one result for each job.

        Raises:
            RewardUnavailable: if the reward raises it, or too many of its calls are overdue.
            _TooSlow: if it takes over `score_timeout`.
        """
        if self._hangs:
            raise RewardUnavailable(f"{MAX_OVERDUE} calls run on after {self.score_timeout:g} s each")
        call = self._caller.submit(RewardBatch([one.sample for one in ready], [one.image for one in ready]))
        if not wait([call], self.score_timeout).done:
            self._overdue = [*(one for one in self._overdue if not one.done()), call]
            self._caller.close()
            self._caller = _Caller(self.reward)
            raise _TooSlow
        scores = call.result()
        if len(scores) != len(ready):
            log.error("%s returned %d scores for %d images", self.reward.name, len(scores), len(ready))
            wrong = "the scorer returned a wrong number of scores, so that none can be told whose it is"
            return [Unscored(valid=False, error="wrong_length", reason=wrong)] * len(ready)
        return [to_result(as_score(score, type(self.reward).__name__)) for score in scores]

    @property
    def _hangs(self) -> bool:
        return sum(not call.done() for call in self._overdue) >= MAX_OVERDUE

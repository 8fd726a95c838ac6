"""Many clients of one reward server at a time, also beside connections that never finish their headers."""

from __future__ import annotations

import random
import resource
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from PIL import Image

from benchmarks.system.faults.outcome import Outcome, Tick
from benchmarks.system.faults.serving import redness, serve
from datamodules.sample import PromptSample
from rewards.base import RewardBatch, RewardUnavailable
from rewards.serving.client import RemoteReward

CALLS, IMAGES = 5, 4
"""Calls of each client, and images of a call."""
HALF_OPEN = 600


def attack(folder: Path, number: int, tick: Tick, seed: int = 0) -> Iterator[Outcome]:
    """Has clients ask for scores of images of their own, all at the same time.

    What is lost: images with a wrong score or none.

    Args:
        folder: takes the server's log.
        number: how many clients.
        tick: called after each call.
        seed: of the images.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16_384) if hard > 0 else 16_384, hard))
    for half_open in (0, HALF_OPEN):
        with serve(folder / f"{half_open}") as served, ExitStack() as opened:
            host, port = served.url.removeprefix("http://").split(":")
            for _ in range(half_open):
                one = opened.enter_context(socket.create_connection((host, int(port))))
                one.sendall(b"POST /v1/score HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
            name = f"{number} clients" + (f" beside {half_open} unfinished headers" if half_open else "")
            yield _ask(Outcome(name), served.url, number, tick, seed)


def _ask(outcome: Outcome, url: str, number: int, tick: Tick, seed: int) -> Outcome:
    start, together, lock = time.perf_counter(), threading.Barrier(number), threading.Lock()

    def client(turn: int) -> None:
        draws = random.Random(f"{seed} {turn}")
        reward = RemoteReward(url, "redness", retries=8, backoff=0.2)
        together.wait()
        for call in range(CALLS):
            images = [Image.new("RGB", (32, 32), tuple(draws.randbytes(3))) for _ in range(IMAGES)]
            sample = PromptSample("1", "red", "red", {})
            try:
                scores = [score.native for score in reward(RewardBatch([sample] * IMAGES, images))]
            except (RewardUnavailable, ValueError) as error:
                wrong = [("no answer", f"client {turn}: {error}")] * IMAGES
            else:
                right = map(redness, images)
                mistakes = sum(one != other for one, other in zip(scores, right, strict=True))
                wrong = [("wrong score", f"client {turn}, call {call}")] * mistakes
            with lock:
                outcome.add(wrong)
                tick()

    with ThreadPoolExecutor(number) as threads:
        for done in [threads.submit(client, turn) for turn in range(number)]:
            done.result()
    outcome.seconds = time.perf_counter() - start
    return outcome

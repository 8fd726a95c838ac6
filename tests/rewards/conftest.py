"""Reward servers for tests: in a thread with any rewards, or as a process that can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import pytest
import uvicorn

from rewards.base import Reward
from rewards.serving.endpoints import create_app
from rewards.serving.requests import Limits
from rewards.serving.server import bind, build_server

ROOT = Path(__file__).parents[2]


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts a server in a thread and returns its address."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(
        rewards: Mapping[str, Reward], limits: Limits | None = None, token: str | None = None, port: int = 0
    ) -> str:
        listener = bind("127.0.0.1", port, token)
        limits = limits or Limits(batch_wait_ms=1)
        server = build_server(create_app(rewards, limits, token), limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.start()
        while not server.started:
            time.sleep(0.01)
        running.append((server, thread))
        return url

    yield start
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(20)
        assert not thread.is_alive()


SLOW = """
import time
from rewards.base import Reward, Score

class SlowReward(Reward):
    '''Scores an image by the number in its first pixel; loading and every batch take a while.'''
    name = "slow"
    native_range = (0.0, float("inf"))
    def __init__(self, seconds: float = 0.0, load_seconds: float = 0.0, offset: float = 0.0):
        self.seconds, self.load_seconds, self.offset = seconds, load_seconds, offset
    def load(self):
        time.sleep(self.load_seconds)
    def __call__(self, batch):
        print("scoring", len(batch), flush=True)
        time.sleep(self.seconds)
        pixels = [image.getpixel((0, 0)) for image in batch.images]
        return [Score(r * 65536.0 + g * 256 + b + self.offset, 0.5, 1 / 3) for r, g, b in pixels]
"""


class Process:
    """`python -m rewards.serving` with a `SlowReward`."""

    def __init__(self, folder: Path, port: int, options: Sequence[str], **init_args: float) -> None:
        (folder / "slow_scorer.py").write_text(SLOW)
        arguments = ", ".join(f"{key}: {value}" for key, value in init_args.items())
        (folder / "slow.yaml").write_text(
            textwrap.dedent(
                f"""
                rewards:
                  slow: {{class_path: slow_scorer.SlowReward, init_args: {{{arguments}}}}}
                port: {port}
                max_batch_items: 4
                batch_wait_ms: 1
                """
            )
        )
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rewards.serving", "--config", str(folder / "slow.yaml"), *options],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def wait_until_ready(self) -> list[str]:
        """What happened at every attempt to reach it."""
        seen = []
        for _ in range(1000):
            try:
                seen.append(httpx.get(f"{self.url}/v1/health", trust_env=False).text)
                return seen
            except httpx.TransportError as error:
                seen.append(type(error).__name__)
                assert self.process.poll() is None, "the server ended"
                time.sleep(0.02)
        raise AssertionError("the server did not start")

    def wait_until_scoring(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith("scoring")

    def end(self, number: int) -> int:
        """Sends a signal and waits for the exit code."""
        self.process.send_signal(number)
        return self.process.wait(20)


@pytest.fixture
def slow_server(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts a server process; `port` null takes a free one."""
    processes: list[Process] = []

    def start(port: int | None = None, options: Sequence[str] = (), **init_args: float) -> Process:
        if port is None:
            with bind("127.0.0.1", 0, None) as free:
                port = free.getsockname()[1]
        processes.append(Process(tmp_path, port, options, **init_args))
        return processes[-1]

    yield start
    for one in processes:
        if one.process.poll() is None:
            one.end(signal.SIGKILL)
        assert one.process.stdout is not None
        one.process.stdout.close()

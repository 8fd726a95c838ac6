"""A reward whose scores anyone can check, its server, and a proxy before it that spoils a share of the answers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL.Image import Image
from PIL.ImageStat import Stat

from benchmarks.system.faults.proxy import build_proxy
from rewards.base import Reward, RewardBatch, Score
from rewards.serving.server import main
from tests.forked import Forked, free_port

KINDS = ("status 500", "garbage", "empty", "a result less", "NaN", "wrong id", "reversed", "cut off", "late")
"""Ways to spoil an answer."""
TIMEOUT = 2.0
"""Time limit of a client's attempt, in seconds; an answer that is late takes longer."""


def redness(image: Image) -> float:
    """Mean of an image's red channel, 0 to 1."""
    return float(Stat(image.convert("RGB")).mean[0]) / 255


class Redness(Reward):
    """Mean of the red channel, which who has the image can compute again."""

    name = "redness"
    native_range = (0.0, 1.0)

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Scores B images."""
        return [Score(red, red, red) for red in map(redness, batch.images)]


@dataclass(frozen=True)
class Served:
    """A running server with a proxy before it.

    Args:
        url: address of the server.
        spoilt_url: address of the proxy.
        process: the server's.
        log: file with a line for each spoilt answer, its kind.
    """

    url: str
    spoilt_url: str
    process: Forked
    log: Path

    @property
    def spoilt(self) -> list[str]:
        """Kinds of the answers spoilt so far."""
        return self.log.read_text().split("\n")[:-1]


@contextmanager
def serve(folder: Path, share: float = 0.0, kinds: Sequence[str] = KINDS, seed: int = 0) -> Iterator[Served]:
    """Context manager: a server of `Redness` in a process of its own, killed in the end.

    Args:
        folder: takes its log.
        share: share of the answers that the proxy spoils.
        kinds: ways in which it does, in turn.
        seed: of the choice of answers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ports, log = (free_port(), free_port()), folder / "spoilt"
    log.touch()
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    rewards = json.dumps({"redness": {"class_path": f"{__name__}.Redness"}})
    process = Forked(lambda: main([f"--rewards={rewards}", f"--port={ports[0]}"]), folder / "server.log")
    settings: dict[str, Any] = {"share": share, "seed": seed, "port": ports[1], "delay": 1.5 * TIMEOUT}
    proxy = Forked(lambda: build_proxy(urls[0], kinds, _Log(log), **settings).serve_forever(), folder / "proxy.log")
    try:
        for _ in range(500):
            try:
                httpx.get(f"{urls[1]}/v1/health", trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.02)
        yield Served(urls[0], urls[1], process, log)
    finally:
        for one in (process, proxy):
            one.kill()


class _Log(list[str]):
    """List whose entries are also lines of a file, for other processes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def append(self, entry: str) -> None:
        """Adds an entry."""
        super().append(entry)
        with self.path.open("a") as file:
            file.write(f"{entry}\n")

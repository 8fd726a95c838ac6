"""A reward whose scores anyone can check, its server, and a proxy before it that spoils a share of the answers."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
from PIL.Image import Image
from PIL.ImageStat import Stat

from rewards.base import Reward, RewardBatch, Score
from rewards.serving.server import main
from tests.forked import Forked, free_port

KINDS = (
    "status 500",
    "garbage",
    "empty",
    "wrong length",
    "NaN",
    "wrong id",
    "reversed",
    "dropped",
    "late",
)
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
        process: both of them.
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
    proxy = _Proxy(ports, share, kinds, random.Random(seed), log)
    rewards = json.dumps({"redness": {"class_path": f"{__name__}.Redness"}})
    process = Forked(lambda: main([f"--rewards={rewards}", f"--port={ports[0]}"]), folder / "server.log")
    before = Forked(lambda: asyncio.run(proxy.serve()), folder / "proxy.log")
    url, spoilt_url = (f"http://127.0.0.1:{port}" for port in ports)
    try:
        for _ in range(500):
            try:
                httpx.get(f"{spoilt_url}/v1/health", trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.02)
        yield Served(url, spoilt_url, process, log)
    finally:
        for one in (process, before):
            one.kill()


@dataclass
class _Proxy:
    """Sends each request on, and the answer back, spoilt or not."""

    ports: tuple[int, int]
    """Those of the server and of itself."""
    share: float
    kinds: Sequence[str]
    draws: random.Random
    log: Path
    spoilt: int = 0

    async def serve(self) -> None:
        """Relays what comes, for ever."""
        async with await asyncio.start_server(self.relay, "127.0.0.1", self.ports[1], limit=2**20) as server:
            await server.serve_forever()

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one connection, which carries one request."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            body = await reader.readexactly(int(length[1])) if length else b""
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.ports[0])
            head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head[:-4])
            up_writer.write(head + b"\r\nConnection: close\r\n\r\n" + body)
            answer = await up_reader.read()
            up_writer.close()
            if head.startswith(b"POST") and self.draws.random() < self.share:
                answer = await self._spoil(answer, writer)
            writer.write(answer)
            await writer.drain()
        except (OSError, EOFError):
            pass  # the client has left
        finally:
            writer.close()

    async def _spoil(self, answer: bytes, writer: asyncio.StreamWriter) -> bytes:
        kind = self.kinds[self.spoilt % len(self.kinds)]
        self.spoilt += 1
        with self.log.open("a") as log:
            log.write(f"{kind}\n")
        if kind == "late":
            await asyncio.sleep(1.5 * TIMEOUT)
            return answer
        if kind == "dropped":
            writer.write(answer[: len(answer) // 2])
            await writer.drain()
            writer.transport.abort()
            return b""
        head, _, body = answer.partition(b"\r\n\r\n")
        if kind == "status 500":
            return _answer(b'{"detail":"made up"}', b"500 Internal Server Error")
        if kind == "garbage":
            return _answer(self.draws.randbytes(200))
        if kind == "empty":
            return _answer(b"")
        reply: dict[str, Any] = json.loads(body)
        results: list[dict[str, Any]] = reply["results"]
        if kind == "wrong length":
            results.append(results[0])
        elif kind == "NaN":
            results[0]["rl"] = float("nan")
        elif kind == "wrong id":
            reply["id"] = str(uuid4())
        elif kind == "reversed":
            results.reverse()
        return _answer(json.dumps(reply).encode())


def _answer(body: bytes, status: bytes = b"200 OK") -> bytes:
    head = b"HTTP/1.1 " + status + b"\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: "
    return head + str(len(body)).encode() + b"\r\n\r\n" + body

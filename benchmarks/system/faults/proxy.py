"""A proxy before a reward server that spoils a share of its answers, each kind of fault by its name."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx


def _changed(change: Callable[[dict[str, Any], random.Random], object]) -> Callable[[bytes, random.Random], bytes]:
    """Makes a fault of a function that changes a reply in place."""

    def spoil(body: bytes, rng: random.Random) -> bytes:
        reply = json.loads(body)
        change(reply, rng)
        return json.dumps(reply).encode()

    return spoil


def _huge(reply: dict[str, Any], _: random.Random) -> None:
    reply["results"][0]["native"] = 10**400


def _not_a_number(reply: dict[str, Any], _: random.Random) -> None:
    reply["results"][0]["rl"] = float("nan")


HTML = b"<html><body><h1>It works!</h1></body></html>"
BODIES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "garbage": lambda _, rng: rng.randbytes(300),
    "empty": lambda *_: b"",
    "error page": lambda *_: HTML,
    "JSON of another shape": lambda *_: b'{"results": "none today"}',
    "deep JSON": lambda *_: b"[" * 100_000,
    "a result less": _changed(lambda reply, _: reply["results"].pop()),
    "a result twice": _changed(lambda reply, _: reply["results"].__setitem__(-1, reply["results"][0])),
    "NaN": _changed(_not_a_number),
    "10**400": _changed(_huge),
    "wrong id": _changed(lambda reply, _: reply.update(id="00000000-0000-0000-0000-000000000000")),
    "reversed": _changed(lambda reply, _: reply["results"].reverse()),
    "shuffled": _changed(lambda reply, rng: rng.shuffle(reply["results"])),
}
"""Name -> what a fault makes of the body of a good answer."""
FAULTS = (*BODIES, "status 500", "status 502", "redirect", "cut off", "answers swapped", "results swapped")
"""Ways to spoil an answer; "late" is one more, where a client's time limit is known."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    target: str
    client: httpx.Client
    faults: Sequence[str]
    share: float
    delay: float
    rng: random.Random
    lock: threading.Lock
    swaps: list[tuple[bytes, list[bytes], threading.Event]]
    spoilt: list[str]

    def do_GET(self) -> None:
        self._send(200, self.client.get(self.target + self.path).content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {"Content-Type": self.headers["Content-Type"]}
        answer = self.client.post(self.target + self.path, content=body, headers=headers)
        with self.lock:
            good = self.rng.random() >= self.share or answer.status_code != 200
            fault = "" if good else self.faults[len(self.spoilt) % len(self.faults)]
            if fault:
                self.spoilt.append(fault)
        if not fault or fault == "late":
            time.sleep(self.delay if fault else 0.0)
            self._send(answer.status_code, answer.content)
        elif fault in BODIES:
            self._send(200, BODIES[fault](answer.content, self.rng))
        elif fault.startswith("status"):
            self._send(int(fault.split()[1]), HTML)
        elif fault == "redirect":
            self._send(307, b"", {"Location": "/sign-in"})
        elif fault == "cut off":
            self._send(200, answer.content[: len(answer.content) // 2], {"Content-Length": str(len(answer.content))})
            self.close_connection = True
        else:
            self._send(200, self._swapped(answer.content, fault))

    def _swapped(self, body: bytes, fault: str) -> bytes:
        """Exchanges this answer with that of another request, if one comes soon."""
        with self.lock:
            other = self.swaps.pop() if self.swaps else None
            if other is None:
                mine: list[bytes] = []
                came = threading.Event()
                self.swaps.append((body, mine, came))
        if other is not None:
            theirs, box, event = other
            box.append(body)
            event.set()
        else:
            if not came.wait(0.3):
                with self.lock, contextlib.suppress(ValueError):
                    self.swaps.remove((body, mine, came))
            if not mine:
                return body
            theirs = mine[0]
        if fault == "answers swapped":
            return theirs
        return json.dumps(json.loads(body) | {"results": json.loads(theirs)["results"]}).encode()

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def build_proxy(
    target: str, faults: Sequence[str], spoilt: list[str], *, share: float, seed: int, port: int = 0, delay: float = 0.0
) -> ThreadingHTTPServer:
    """Builds a proxy, which listens to this machine.

    Args:
        target: address of the server.
        faults: ways to spoil an answer, in turn.
        spoilt: gets the fault of each spoilt answer.
        share: share of the answers that are spoilt.
        seed: of the choice of answers.
        port: its own port; 0 takes a free one.
        delay: seconds by which an answer is late.
    """
    settings = {"target": target, "faults": faults, "spoilt": spoilt, "share": share, "delay": delay}
    settings |= {"rng": random.Random(seed), "lock": threading.Lock(), "swaps": []}
    client = httpx.Client(timeout=20, trust_env=False)
    return ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {**settings, "client": client}))


@contextlib.contextmanager
def faulty_proxy(target: str, fault: str, share: float = 0.2, seed: int = 1) -> Iterator[tuple[str, list[str]]]:
    """Context manager: a proxy in a thread; gives its address and the list of faults so far."""
    spoilt: list[str] = []
    server = build_proxy(target, [fault], spoilt, share=share, seed=seed)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", spoilt
    finally:
        server.shutdown()
        server.server_close()

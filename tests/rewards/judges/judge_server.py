"""A small real server on loopback that speaks `/v1/chat/completions`, for tests of judges."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


@dataclass
class Reply:
    """What the server answers: a judge's text, or a raw body with any status."""

    text: str | None = "It matches. Final Score: 4"
    status: int = 200
    raw: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    finish: str = "stop"


@dataclass
class Judge:
    """A running server. `answer` maps (prompt, number of this prompt's request from 0) to a reply.

    The prompt is what a question holds in brackets at its end, else the whole question.
    """

    url: str = ""
    answer: Callable[[str, int], Reply] = lambda prompt, turn: Reply()
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0
    now: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def text(self, request: dict[str, Any]) -> str:
        return str(request["messages"][0]["content"][-1]["text"])

    def prompt(self, request: dict[str, Any]) -> str:
        found = re.search(r"\[(.*)\]\s*$", self.text(request), re.DOTALL)
        return self.text(request) if found is None else found[1]


@contextmanager
def serving() -> Iterator[Judge]:
    state = Judge()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:  # noqa: N802
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert self.path == "/v1/chat/completions"
            with state.lock:
                prompt = state.prompt(body)
                turn = sum(state.prompt(request) == prompt for request in state.requests)
                state.requests.append(body)
                state.headers.append(dict(self.headers))
                state.times.append(time.monotonic())
                state.now += 1
                state.most_at_once = max(state.most_at_once, state.now)
            reply = state.answer(prompt, turn)
            time.sleep(reply.delay)
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": reply.text},
                "finish_reason": reply.finish,
            }
            data = (reply.raw if reply.raw is not None else json.dumps({"choices": [choice]})).encode()
            with state.lock:
                state.now -= 1
            try:
                self.send_response(reply.status)
                for name, value in {"content-length": str(len(data)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client gave up waiting, as the time-out test wants
                self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def images_of(request: dict[str, Any]) -> list[Image.Image]:
    urls = [part["image_url"]["url"] for part in request["messages"][0]["content"] if part["type"] == "image_url"]
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2], validate=True))) for url in urls]

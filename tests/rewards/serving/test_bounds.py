"""What hostile and unlucky clients may take of the reward server: connections, bytes, time, memory."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from rewards.base import Reward, RewardBatch, Score
from rewards.serving.batching import MAX_OVERDUE
from rewards.serving.protocol import encode_image
from rewards.serving.requests import Limits
from tests.rewards.serving.test_server import MULTIPART, NumberReward, ask, codes, half_sent, number_image

pytestmark = pytest.mark.slow

Serve = Callable[..., str]


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", httpx.URL(url).port), timeout=10)


def half_header(url: str) -> socket.socket:
    connection = connect(url)
    connection.sendall(b"POST /v1/score HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: ")
    return connection


def seconds_open(connection: socket.socket, trickle: bytes = b"") -> float:
    """How long the server leaves a connection open; `trickle` is sent every 50 ms meanwhile."""
    connection.settimeout(0.05)
    started = time.monotonic()
    while time.monotonic() < started + 10:
        try:
            if connection.recv(65536) == b"":
                break
        except TimeoutError:
            with suppress(OSError):
                connection.sendall(trickle)
        except OSError:
            break
    return time.monotonic() - started


def receive(connection: socket.socket, end: bytes, times: int = 1) -> bytes:
    """What the server sends up to the last of `times` ends."""
    data = b""
    while data.count(end) < times:
        more = connection.recv(65536)
        assert more, data
        data += more
    return data


# --- connections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"POST /v1/score HTTP/1.1\r\nX: "])
def test_a_header_has_a_time_limit(serve: Serve, sent: bytes) -> None:
    """Also where a byte comes now and then."""
    url = serve({"number": NumberReward()}, Limits(header_timeout=0.6))
    with connect(url) as connection:
        connection.sendall(sent)
        assert 0.4 < seconds_open(connection, b"x" if sent else b"") < 3


def test_the_next_request_has_a_time_limit(serve: Serve) -> None:
    url = serve({"number": NumberReward()}, Limits(header_timeout=0.6))
    with connect(url) as connection:
        for _ in range(2):  # a connection may be used again
            connection.sendall(b"GET /v1/health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert receive(connection, b'"queue":0}').startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /v1/hea")
        assert 0.4 < seconds_open(connection, b"l") < 3


def test_pipelined_requests_are_answered(serve: Serve) -> None:
    url = serve({"number": NumberReward()}, Limits(header_timeout=0.6))
    with connect(url) as connection:
        connection.sendall(b"GET /v1/health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 3)
        assert receive(connection, b'"queue":0}', 3).count(b"HTTP/1.1 200 ") == 3
        assert 0.4 < seconds_open(connection) < 3


def test_half_open_connections_shut_nobody_out(serve: Serve) -> None:
    """Eight may be open; 30 headers that are never finished make room for whoever has a request."""
    url = serve({"number": NumberReward()}, Limits(max_connections=8, batch_wait_ms=1))
    with ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(half_header(url))
        assert codes(ask(url)) == ["ok"]
        assert codes(ask(url, ["a", "b"])) == ["ok"] * 2


def test_requests_under_way_are_not_closed_for_newcomers(serve: Serve) -> None:
    scorer = NumberReward()
    url = serve({"number": scorer}, Limits(max_connections=4, batch_wait_ms=0))
    scorer.open.clear()
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        scoring = pool.submit(ask, url)
        while not scorer.batches:
            time.sleep(0.01)
        body = stack.enter_context(half_sent(url))
        time.sleep(0.3)  # its header is read by then
        for _ in range(30):
            stack.enter_context(half_header(url))
        assert httpx.get(f"{url}/v1/health", trust_env=False).status_code == 200
        scorer.open.set()
        assert codes(scoring.result()) == ["ok"]
        body.sendall(b"0" * 995)
        assert body.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_a_slow_line_may_bring_a_large_request(serve: Serve) -> None:
    """A body takes three times as long as a header may."""
    url = serve({"number": NumberReward()}, Limits(header_timeout=0.5, batch_wait_ms=1))
    image = encode_image(number_image(7)) + b"\0" * 300_000
    request = httpx.Client().build_request(
        "POST",
        f"{url}/v1/score",
        files=[
            ("request", (None, b'{"schema": 1, "id": "00000000-0000-4000-8000-000000000000", "reward": "number", '
                               b'"items": [{"prompt": "", "images": ["a"]}]}')),
            ("a", ("a.png", image)),
        ],
    )  # fmt: skip

    def slowly() -> Iterator[bytes]:
        body = request.read()
        for start in range(0, len(body), len(body) // 15):
            time.sleep(0.1)
            yield body[start : start + len(body) // 15]

    headers = {"Content-Type": request.headers["Content-Type"]}
    answer = httpx.post(f"{url}/v1/score", content=slowly(), headers=headers, trust_env=False)
    assert codes(answer) == ["ok"]


# --- refused bodies ---------------------------------------------------------------------------------------------------

CHUNK = b"10000\r\n" + b"0" * 65536 + b"\r\n"


@pytest.mark.parametrize(
    ("token", "content_type", "status"),
    [(None, "multipart/form-data; boundary=x", 400), (None, "text/plain", 415), ("s3cret", "text/plain", 401)],
)
def test_the_body_of_a_refused_request_is_not_read_for_ever(
    serve: Serve, token: str | None, content_type: str, status: int
) -> None:
    url = serve({"number": NumberReward()}, Limits(max_request_bytes=2_000_000, header_timeout=5), token=token)
    sent = 0
    with connect(url) as connection, pytest.raises(OSError):
        connection.sendall(
            b"POST /v1/score HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n"
            + f"Content-Type: {content_type}\r\n\r\n".encode()
        )
        while sent < 200_000_000:
            connection.sendall(CHUNK)
            sent += len(CHUNK)
    assert sent < 20_000_000, "two million, and what the sockets hold"


def test_who_is_refused_early_sees_why(serve: Serve) -> None:
    """A client that sends its whole body before it looks for an answer, and may then use its connection again."""
    url = serve({"number": NumberReward()}, Limits(max_request_bytes=2_000_000))
    with httpx.Client(trust_env=False) as client:
        for size in (1_500_000, 3_000_000):
            answer = client.post(f"{url}/v1/score", content=b"0" * size, headers=MULTIPART)
            assert answer.status_code == (400 if size < 2_000_000 else 413)


def test_the_body_of_a_refused_request_has_a_time_limit(serve: Serve) -> None:
    url = serve({"number": NumberReward()}, Limits(header_timeout=0.6))
    with half_sent(url, b"no multipart" * 3, 100_000) as connection:
        assert receive(connection, b"multipart").startswith(b"HTTP/1.1 400 ")
        assert 0.4 < seconds_open(connection, b"0") < 3


# --- slow images ------------------------------------------------------------------------------------------------------


class HangingReward(Reward):
    """Scores every image with 1; one that shows 13 only once `released` is set."""

    name = "hanging"

    def __init__(self) -> None:
        self.released = threading.Event()

    def __call__(self, batch: RewardBatch) -> list[Score]:
        if any(image.getpixel((0, 0)) == (0, 0, 13) for image in batch.images):
            self.released.wait(30)
        return [Score(1.0, 1.0, 1.0)] * len(batch)


SLOW_IMAGE, IMAGE = encode_image(number_image(13)), encode_image(number_image(1))


def test_one_slow_image_spoils_itself_alone(serve: Serve) -> None:
    """It shares a batch with others, which are scored."""
    reward = HangingReward()
    url = serve({"hanging": reward}, Limits(score_timeout=0.4, batch_wait_ms=1))
    answer = ask(url, [""] * 3, [IMAGE, SLOW_IMAGE, IMAGE], "hanging")
    assert codes(answer) == ["ok", "too_slow", "ok"]
    assert answer.json()["results"][1]["reason"] == "the scorer took over 0.4 s for this image alone"
    assert answer.elapsed.total_seconds() < 3
    assert codes(ask(url, ["a"], [IMAGE], "hanging")) == ["ok"]
    reward.released.set()


def test_calls_that_hang_are_bounded(serve: Serve) -> None:
    """Once four run on, clients get 503, until one of them ends; the server stops in time all the same."""
    reward = HangingReward()
    url = serve({"hanging": reward}, Limits(score_timeout=0.2, batch_wait_ms=1))
    threads = threading.active_count()
    for _ in range(MAX_OVERDUE):
        assert codes(ask(url, [""], [SLOW_IMAGE], "hanging")) == ["too_slow"]
    for _ in range(3):
        refused = ask(url, [""], [IMAGE], "hanging")
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert refused.json() == {"detail": "the scorer is unavailable: come again later."}
        assert httpx.get(f"{url}/v1/health", trust_env=False).json()["ready"] is False
    assert threading.active_count() <= threads + MAX_OVERDUE + 2
    reward.released.set()
    deadline = time.monotonic() + 10
    while ask(url, [""], [IMAGE], "hanging").status_code == 503:
        assert time.monotonic() < deadline
    assert codes(ask(url, [""], [IMAGE], "hanging")) == ["ok"]
    assert httpx.get(f"{url}/v1/health", trust_env=False).json()["ready"] is True


def test_a_hanging_scorer_does_not_keep_the_process(slow_server: Callable[..., Any]) -> None:
    process = slow_server(seconds=60, options=["--score_timeout=0.3"])
    process.wait_until_ready()
    assert codes(ask(process.url, reward="slow")) == ["too_slow"]
    started = time.monotonic()
    assert process.end(signal.SIGTERM) == 0
    assert time.monotonic() - started < 5


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_is_bounded(slow_server: Callable[..., Any]) -> None:
    """100 MB of requests may wait: 60 clients want to send 8 MB each, then one sends 90 MB in nine parts."""
    options = ["--max_request_bytes=95000000", "--max_json_bytes=10000", "--max_waiting_bytes=100000000"]
    process = slow_server(options=options)
    process.wait_until_ready()
    assert codes(ask(process.url, reward="slow")) == ["ok"]
    folder = Path(f"/proc/{process.process.pid}")

    def megabytes(field: str) -> float:
        lines = (folder / "status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1000

    def part(name: str, size: int) -> bytes:
        return f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + os.urandom(size) + b"\r\n"

    body = part("a", 8_000_000)

    def send(_: int) -> None:
        with suppress(OSError), half_sent(process.url, body, 9_000_000) as connection:
            connection.settimeout(1)
            connection.recv(65536)

    before = megabytes("VmRSS")
    with ThreadPoolExecutor(60) as pool:
        list(pool.map(send, range(60)))
    assert megabytes("VmHWM") - before < 100 + 60 * 0.7 + 20
    deadline = time.monotonic() + 10
    while ask(process.url, reward="slow").status_code != 200:
        assert time.monotonic() < deadline
    (folder / "clear_refs").write_text("5")  # the peak counts from here
    before = megabytes("VmRSS")
    body = b"".join(part(f"p{number}", 10_000_000) for number in range(9)) + b"--x--\r\n"
    answer = httpx.post(f"{process.url}/v1/score", content=body, headers=MULTIPART, trust_env=False)
    assert answer.json()["detail"].startswith("there is no part `request`")
    assert megabytes("VmHWM") - before < 90 + 10 + 20

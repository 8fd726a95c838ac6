"""The reward server's requests and its client's answers as fuzzing sends them."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import httpx
from hypothesis import strategies as st
from PIL import Image

from benchmarks.system.faults.files import Surface
from benchmarks.system.faults.fuzz import LIMIT, Read, Wrong, any_bytes, mutated
from benchmarks.system.faults.serving import Redness, serve
from datamodules.sample import PromptSample
from rewards.base import RewardBatch
from rewards.serving.client import RemoteReward
from rewards.serving.endpoints import create_app
from rewards.serving.protocol import ScoreReply, encode_image
from rewards.serving.requests import Limits

BOUNDARY = b"b0"
IMAGES = [encode_image(Image.new("RGB", (16, 16), colour)) for colour in ("red", "blue")]
ID = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
ITEMS = [{"prompt": "red", "images": ["img0"], "id": "1"}, {"prompt": "b", "images": ["img1"], "metadata": {"a": [1]}}]
JSON = json.dumps({"schema": 1, "id": ID, "reward": "redness", "items": ITEMS}).encode()
BATCH = RewardBatch(
    [PromptSample(str(n), "p", "t", {}) for n in range(2)],
    [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")],
)


def body(parts: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Writes a multipart body of named parts."""
    written = [b'--%s\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (BOUNDARY, n, d) for n, d in parts]
    return b"".join(written) + b"--%s--\r\n" % BOUNDARY


def surfaces() -> dict[str, Surface]:
    """Returns the server's and the client's readers by name."""
    images = st.sampled_from(IMAGES) | mutated(IMAGES) | st.binary(max_size=60)
    parts = st.builds(
        lambda text, first, second: body([(b"request", text), (b"img0", first), (b"img1", second)]),
        st.just(JSON) | mutated([JSON]) | any_bytes(), images, images,
    )  # fmt: skip
    whole = body([(b"request", JSON), *zip((b"img0", b"img1"), IMAGES, strict=True)])
    head = b"POST /v1/score HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=b0\r\n"
    raw = [
        head + b"Content-Length: %d\r\n\r\n%s" % (len(whole), whole),
        head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(whole), whole),
        b"GET /v1/rewards HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    ]
    listing, reply = real_answers()
    return {
        "reward server's requests": Surface(parts | mutated([whole]), _in_process),
        "reward server's socket": Surface(mutated(raw) | any_bytes(), _by_socket),
        "client's answers": Surface(mutated([listing, reply, reply]) | any_bytes() | any_bytes().map(answer), _client),
    }


def answer(content: bytes) -> bytes:
    """Writes an HTTP answer."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n%s" % (len(content), content)


@contextmanager
def _in_process(folder: Path) -> Iterator[Read]:
    """Sends bodies to the application itself; each gets an answer below 500, and a 200 has right scores."""
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # a line for each malformed body
    app = create_app({"redness": Redness()}, Limits(batch_wait_ms=0))
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY.decode()}"}
    with asyncio.Runner() as runner:
        lifespan = app.router.lifespan_context(app)
        runner.run(lifespan.__aenter__())
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", headers=headers)

        def read_one(case: bytes) -> None:
            new = case.replace(ID.encode(), str(uuid4()).encode())  # the answer to a known id would come from the cache
            response = runner.run(client.post("/v1/score", content=new))
            if response.status_code >= 500:
                raise Wrong(f"status {response.status_code}: {response.text[:200]}")
            if response.status_code == 200:
                results = ScoreReply.model_validate_json(response.content).results
                if not results or any(one.valid and not 0 <= one.native <= 1 for one in results):
                    raise Wrong(f"the answer {response.text[:200]}")
            elif not isinstance(response.json().get("detail"), str):
                raise Wrong(f"status {response.status_code} without a sentence: {response.text[:200]}")

        yield read_one
        runner.run(client.aclose())
        runner.run(lifespan.__aexit__(None, None, None))


@contextmanager
def _by_socket(folder: Path) -> Iterator[Read]:
    """Sends bytes to a server in a process of its own, which must go on, and answer below 500 if at all."""
    with serve(folder) as served:
        host, port = served.url.removeprefix("http://").split(":")

        def read_one(case: bytes) -> None:
            with socket.create_connection((host, int(port)), timeout=LIMIT) as connection:
                got = b""
                try:
                    connection.sendall(case)
                    connection.shutdown(socket.SHUT_WR)
                    while chunk := connection.recv(2**16):
                        got += chunk
                except TimeoutError as error:
                    raise Wrong("no answer, and the connection stays open") from error
                except OSError:
                    pass  # a request that is refused is not read to its end
            status = re.match(rb"HTTP/1\.1 (\d+)", got)
            if (got and status is None) or (status is not None and int(status[1]) >= 500):
                raise Wrong(f"the answer {got[:200]!r}")

        yield read_one
        if httpx.get(f"{served.url}/v1/health", trust_env=False).json() != {"ready": True, "in_flight": 0, "queue": 0}:
            raise RuntimeError("the server is not as it was before")


@contextmanager
def _client(folder: Path) -> Iterator[Read]:
    """Answers a client with bytes; it returns a score for each image, none of them wrong, or says one sentence."""
    listing, _ = real_answers()
    case = listing
    with answered(lambda request: case.replace(b"REQUEST", _request_id(request))) as url:
        reward = RemoteReward(url, "redness", timeout=2.0, retries=0, on_failure="skip")
        reward.load()

        def read_one(given: bytes) -> None:
            nonlocal case
            case = given
            if b"max_pixels" in given:
                RemoteReward(url, "redness", timeout=2.0, retries=0).load()
                return
            scores = reward(BATCH)
            if len(scores) != 2 or any(score.valid and not abs(score.rl) < 3.5e38 for score in scores):
                raise Wrong(f"the scores {scores}")

        yield read_one


@cache
def real_answers() -> tuple[bytes, bytes]:
    """Records what a server answers to a client that asks for its rewards and for the scores of `BATCH`.

    Returns:
        Both answers; in the second, the request's id is REQUEST.
    """
    with TemporaryDirectory() as folder, serve(Path(folder)) as served:
        host, port = served.url.removeprefix("http://").split(":")
        seen: list[bytes] = []

        def relay(request: bytes) -> bytes:
            with socket.create_connection((host, int(port)), timeout=LIMIT) as connection:
                connection.sendall(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
                got = b"".join(iter(lambda: connection.recv(2**16), b""))
            name = _request_id(request)
            seen.append(got.replace(name, b"REQUEST") if name else got)
            return got

        with answered(relay) as url:
            RemoteReward(url, "redness")(BATCH)
    listing, reply = seen
    return listing, reply


@contextmanager
def answered(respond: Callable[[bytes], bytes]) -> Iterator[str]:
    """Context manager: the address of a server in a thread that answers whole requests by a function."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:

        def answer_all() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return  # closed
                with connection, suppress(OSError):
                    connection.settimeout(LIMIT)
                    connection.sendall(respond(_read_request(connection)))

        thread = threading.Thread(target=answer_all, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(LIMIT)


def _read_request(connection: socket.socket) -> bytes:
    got = b""
    while b"\r\n\r\n" not in got and (more := connection.recv(2**16)):
        got += more
    head, _, _ = got.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    whole = len(head) + 4 + (int(length[1]) if length else 0)
    while len(got) < whole and (more := connection.recv(2**16)):
        got += more
    return got


def _request_id(request: bytes) -> bytes:
    """Finds the id in a request's JSON; nothing for one without."""
    name = re.search(rb'"id": ?"([0-9a-f]{8}-[0-9a-f-]{27})"', request)
    return name[1] if name else b""

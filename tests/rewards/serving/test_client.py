"""`RemoteReward` against real servers, and against servers that are dead, slow, changed or lie."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import pickle
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.system.faults.proxy import FAULTS, faulty_proxy
from datamodules.sample import PromptSample
from miniature.scenes.detector import ShapesDetector
from miniature.scenes.world import TAGS, all_contents, random_scene, render
from rewards.base import Reward, RewardBatch, RewardUnavailable, Score
from rewards.geneval.reward import GenEvalReward
from rewards.serving.client import RemoteReward
from rewards.serving.protocol import Item, encode_image, item_id
from rewards.serving.requests import Limits
from rewards.serving.server import bind
from rewards.serving.server_pool import _describe
from rewards.tagged import TaggedReward, WeightedSum

pytestmark = pytest.mark.slow


def batch_of(*numbers: int, prompt: str = "") -> RewardBatch:
    """Images that say which one they are."""
    images = [Image.new("RGB", (4, 4), (n >> 16, n >> 8 & 255, n & 255)) for n in numbers]
    return RewardBatch([PromptSample(str(n), prompt, "", {}) for n in numbers], images)


class NumberReward(Reward):
    """native = the number in the image; rl cannot be written in few digits."""

    name = "number"
    native_range = (-math.inf, 5.0)
    needs = ()

    def __init__(self, version: str = "1", seconds: float = 0.0) -> None:
        self._version = version
        self.seconds = seconds
        self.batches: list[int] = []

    @property
    def version(self) -> str:
        return f"number {self._version}"

    def __call__(self, batch: RewardBatch) -> list[Score]:
        self.batches.append(len(batch))
        time.sleep(self.seconds)
        return [self._score(s, i) for s, i in zip(batch.samples, batch.images, strict=True)]

    def _score(self, sample: PromptSample, image: Image.Image) -> Score:
        if sample.prompt == "fail":
            raise RuntimeError
        if sample.prompt == "invalid":
            return Score.invalid("no text found")
        red, green, blue = image.getpixel((0, 0))
        number = red * 65536 + green * 256 + blue
        return Score(float(number), number / 3, math.sin(number))


class KeepReward(Reward):
    """Keeps what it is asked about."""

    name = "keep"

    def __init__(self) -> None:
        self.batches: list[RewardBatch] = []

    def __call__(self, batch: RewardBatch) -> list[Score]:
        self.batches.append(batch)
        return [Score(1.0, 1.0, 1.0)] * len(batch)


@pytest.fixture
def dead_url() -> Iterator[str]:
    """Nobody listens, and nobody else can."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def remote(urls: list[str] | str, reward: str = "number", **kwargs: Any) -> RemoteReward:
    return RemoteReward(urls, reward, **{"backoff": 0.02, "timeout": 10.0, **kwargs})


# --- the same as here -------------------------------------------------------------------------------------------------


def test_shapes_equal_in_process(serve: Callable[..., str]) -> None:
    """48 scenes in requests of 5: every field of every score, in order; so do a tagged reward's and a sum's parts."""
    rng = random.Random(4)
    contents = [rng.choice(all_contents(rng.choice(TAGS))) for _ in range(48)]
    images = [Image.fromarray(render(random_scene(rng))) for _ in contents]
    samples = [PromptSample(str(n), "a", content.tag, content.metadata) for n, content in enumerate(contents)]
    batch = RewardBatch(samples, images)
    soft = GenEvalReward(ShapesDetector(), exclude_penalty=0.3)
    strict = GenEvalReward(ShapesDetector(), reward="strict")
    rewards: dict[str, Reward] = {
        "geneval": soft,
        "sum": WeightedSum({"soft": soft, "strict": strict}, {"soft": 0.1, "strict": 0.7}),
        "tagged": TaggedReward({tag: soft if tag == "counting" else strict for tag in TAGS}),
    }
    url = serve(rewards)
    for name, reward in rewards.items():
        expected = reward(batch)
        assert len({score.rl for score in expected}) > 3
        client = remote(url, name, max_items=5)
        assert client(batch) == expected
        assert (client.version, client.needs, client.native_range, client.name) == (
            reward.version,
            reward.needs,
            reward.native_range,
            name,
        )


def test_samples_and_images_arrive_whole(serve: Callable[..., str]) -> None:
    """All fields, pixels of every mode; a source that items share is one object less to send."""
    keep = KeepReward()
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 4), np.uint8)
    images = [Image.fromarray(noise).convert(mode) for mode in ("RGB", "L", "RGBA", "P")]
    source = Image.fromarray(noise[::-1]).convert("RGB")
    metadata: dict[str, Any] = {"include": [{"class": "é", "count": 2}], "x": [None, True, -0.0, 1e-310, 2**53 + 1]}
    samples = [PromptSample(f"id {n}", f'say "{n}"\n\u2603', "tag", metadata, source) for n in range(4)]
    client = remote(serve({"keep": keep}, Limits(batch_wait_ms=0)), "keep")
    assert [score.valid for score in client(RewardBatch(samples, images))] == [True] * 4
    (batch,) = keep.batches
    for sent, got in zip(samples, batch.samples, strict=True):
        assert (got.id, got.prompt, got.tag, repr(got.metadata)) == (sent.id, sent.prompt, sent.tag, repr(metadata))
        assert got.image is not None and got.image.tobytes() == source.tobytes()
    assert [image.mode for image in batch.images] == ["RGB", "L", "RGBA", "P"]
    assert [image.tobytes() for image in batch.images] == [image.tobytes() for image in images]


def test_invalid_items(serve: Callable[..., str]) -> None:
    client = remote(serve({"number": NumberReward()}))
    assert [score.detail for score in client(batch_of(1, prompt="invalid"))] == [{"reason": "no text found"}]
    (failed,) = client(batch_of(1, prompt="fail"))
    assert not failed.valid and math.isnan(failed.rl)
    assert failed.detail == {"reason": "scorer_error: the scorer failed; the server's log says how"}


def test_splitting_and_flight(serve: Callable[..., str]) -> None:
    """50 images in requests of 8 (the server's limit), at most 3 under way; an empty batch asks nothing."""
    scorer = NumberReward(seconds=0.02)
    client = remote(serve({"number": scorer}, Limits(max_items=8, batch_wait_ms=0)), max_items=20, concurrency=3)
    scores = client(batch_of(*range(50)))
    assert [score.native for score in scores] == [float(n) for n in range(50)]
    assert [score.rl for score in scores] == [math.sin(n) for n in range(50)]
    assert sum(scorer.batches) == 50
    assert 8 < max(scorer.batches) <= 24
    assert client(RewardBatch([], [])) == []
    assert client.native_range == (-math.inf, 5.0)


def test_several_threads_at_once(serve: Callable[..., str]) -> None:
    client = remote(serve({"number": NumberReward()}), max_items=3)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda start: client(batch_of(*range(start, start + 7))), range(0, 800, 100)))
    assert [[score.native for score in scores] for scores in results] == [
        [float(start + n) for n in range(7)] for start in range(0, 800, 100)
    ]


def test_global_random_generators_are_left_alone(serve: Callable[..., str], dead_url: str) -> None:
    client = remote([dead_url, serve({"number": NumberReward()})], max_items=1)
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    client(batch_of(1, 2, 3))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index,union-attr]


def test_copies(serve: Callable[..., str]) -> None:
    """Before and after loading; a copy of a loaded one has connections of its own."""
    client = remote(serve({"number": NumberReward()}), name="other")
    for _ in range(2):
        for copied in (copy.deepcopy(client), pickle.loads(pickle.dumps(client))):
            assert [score.native for score in copied(batch_of(3))] == [3.0]
            assert (copied.name, copied.version) == ("other", "number 1")
        client.load()


# --- servers that fail ------------------------------------------------------------------------------------------------


def test_dead_server_is_left_out_and_tried_again(serve: Callable[..., str]) -> None:
    with bind("127.0.0.1", 0, None) as free:
        port = free.getsockname()[1]
    urls = [f"http://127.0.0.1:{port}", serve({"number": NumberReward()})]
    client = remote(urls, max_items=1, retries=0, cooldown=1.5)
    numbers = batch_of(*range(6))
    expected = [float(n) for n in range(6)]
    assert [score.native for score in client(numbers)] == expected
    back = NumberReward()
    serve({"number": back}, port=port)
    assert [score.native for score in client(numbers)] == expected
    assert back.batches == [], "it still rests"
    time.sleep(1.5)
    assert [score.native for score in client(numbers)] == expected
    assert sum(back.batches) == 3, "the two take turns"


def test_no_server_is_there(dead_url: str) -> None:
    with pytest.raises(ValueError, match=f"no reward server answers: {dead_url} failed with ConnectError.*start it"):
        remote(dead_url).load()


def test_what_a_server_says_is_quoted_in_short() -> None:
    """The HTTP library's error holds the whole of a line that is none."""
    said = _describe("http://a", httpx.RemoteProtocolError(f"illegal status line: {'9' * 5000}"))
    assert said.startswith("http://a failed with RemoteProtocolError (illegal status line: 99") and len(said) < 300


def test_killed_server(slow_server: Callable[..., Any]) -> None:
    """SIGKILL in the middle of a batch, then a new process on the same port: the right scores all the same."""
    process = slow_server(seconds=0.3)
    process.wait_until_ready()
    client = remote(process.url, "slow", max_items=3, retries=100, backoff=0.1, concurrency=2)
    client.load()
    numbers = [70_000 + 17 * n for n in range(24)]
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(client, batch_of(*numbers))
        process.wait_until_scoring()
        assert process.end(signal.SIGKILL) == -signal.SIGKILL
        assert not pending.done()
        again = slow_server(port=int(process.url.rsplit(":", 1)[1]))
        again.wait_until_ready()
        scores = pending.result(30)
    assert [score.native for score in scores] == [float(n) for n in numbers]
    assert {score.rl for score in scores} == {1 / 3}


class Scripted(BaseHTTPRequestHandler):
    """Lists the reward "number" and answers score requests with the script's next line, and the last one for ever."""

    protocol_version = "HTTP/1.1"
    schema = 2
    script: list[Callable[[str, list[str]], tuple[int, Any]]]
    seen: list[str]

    def do_GET(self) -> None:
        info = {"name": "number", "version": "number 1", "native_range": [None, None], "needs": []}
        self._send(
            200, {"schema": self.schema, "rewards": [info], "max_items": 4, "max_request_bytes": 9999, "max_pixels": 9}
        )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = json.loads(body[body.index(b"{") : body.index(b"\r\n", body.index(b"{"))])
        self.seen.append(request["id"])
        parts = dict(re.findall(rb'name="(img\d+)".*?\r\n\r\n(.*?)\r\n--', body, re.DOTALL))
        items = [Item.model_validate(item) for item in request["items"]]
        ids = [item_id(place, item, parts[item.images[0].encode()], None) for place, item in enumerate(items)]
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        self._send(*answer(request["id"], ids))

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # a client may have had enough
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[Callable[..., tuple[str, list[str]]]]:
    """Starts a server that follows a script; returns its address and the ids that it saw."""
    servers: list[ThreadingHTTPServer] = []

    def start(*script: Callable[[str, list[str]], tuple[int, Any]]) -> tuple[str, list[str]]:
        seen: list[str] = []
        handler = type("Handler", (Scripted,), {"script": list(script), "seen": seen})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def good(name: str, ids: list[str], **changes: Any) -> tuple[int, Any]:
    result = {"valid": True, "native": 1.0, "table": 2.0, "rl": 3.0, "detail": {}, "parts": {}}
    results = [{"item": one, **result} for one in ids]
    return 200, {"schema": 2, "id": name, "reward_version": "number 1", "results": results, **changes}


def busy(status: int) -> Callable[[str, list[str]], tuple[int, Any]]:
    return lambda *_: (status, {"detail": "come again later"})


@pytest.mark.parametrize("status", [307, 408, 425, 429, 500, 502, 503, 504])
def test_comes_again_with_the_same_id(scripted: Callable[..., tuple[str, list[str]]], status: int) -> None:
    url, seen = scripted(busy(status), busy(status), good)
    assert [score.rl for score in remote(url)(batch_of(1, 2))] == [3.0, 3.0]
    assert len(seen) == 3 and len(set(seen)) == 1


def test_retry_after_goes_first(scripted: Callable[..., tuple[str, list[str]]]) -> None:
    url, _ = scripted(lambda *_: (429, {"detail": "slow"}, {"Retry-After": "1"}), good)
    started = time.monotonic()
    assert remote(url, backoff=0.001)(batch_of(1))[0].valid
    assert 1 <= time.monotonic() - started < 5


@pytest.mark.parametrize("status", [408, 425, 429])
def test_a_server_that_stays_busy_may_be_skipped(scripted: Callable[..., tuple[str, list[str]]], status: int) -> None:
    url, seen = scripted(busy(status))
    (score,) = remote(url, retries=1, on_failure="skip")(batch_of(1))
    assert f"answered {status}: come again later, tried 2 times" in score.detail["reason"] and len(seen) == 2
    with pytest.raises(RewardUnavailable, match=f"answered {status}"):
        remote(url, retries=1)(batch_of(1))


@pytest.mark.parametrize("on_failure", ["skip", "fail"])
@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "set REWARD_TOKEN"), (403, "set REWARD_TOKEN"), (404, "404: come"), (413, "413: come")],
)
def test_refused_after_loading(
    scripted: Callable[..., tuple[str, list[str]]], status: int, words: str, on_failure: str
) -> None:
    """A server that was restarted otherwise: training must be able to save before it stops."""
    url, seen = scripted(good, busy(status))
    client = remote(url, on_failure=on_failure)
    client(batch_of(1))
    with pytest.raises(RewardUnavailable, match=words):
        client(batch_of(1))
    assert len(seen) == 2


def test_a_reply_that_cannot_be_decoded_is_a_lost_connection(scripted: Callable[..., tuple[str, list[str]]]) -> None:
    def garbled(*_: Any) -> tuple[int, Any, dict[str, str]]:
        return 200, b"no gzip", {"Content-Encoding": "gzip"}

    url, seen = scripted(garbled, good)
    assert remote(url)(batch_of(1))[0].valid and len(seen) == 2
    (score,) = remote(scripted(garbled)[0], retries=1, on_failure="skip")(batch_of(1))
    assert "DecodingError" in score.detail["reason"] and "tried 2 times" in score.detail["reason"]


def test_a_reply_without_end(scripted: Callable[..., tuple[str, list[str]]]) -> None:
    """16 MiB are read and no more."""
    long = b" " * (16 * 2**20)

    def padded(more: int) -> Callable[[str, list[str]], tuple[int, Any]]:
        def answer(name: str, ids: list[str]) -> tuple[int, Any]:
            text = json.dumps(good(name, ids)[1]).encode()
            return 200, text + long[: len(long) - len(text) + more]

        return answer

    url, seen = scripted(padded(0), padded(1))
    client = remote(url, retries=1, on_failure="skip")
    (score,) = client(batch_of(1))
    assert score.rl == 3.0
    (score,) = client(batch_of(1))
    assert "an answer of over 16777216 bytes, tried 2 times" in score.detail["reason"] and len(seen) == 3


@pytest.fixture
def drip() -> Iterator[Callable[[bytes], str]]:
    """Starts a server that lists, then answers score requests with `head` and a byte every 50 ms for 10 s."""
    listening: list[socket.socket] = []
    info = {"name": "number", "version": "number 1", "native_range": [None, None], "needs": []}
    listing = json.dumps({"schema": 2, "rewards": [info], "max_items": 4, "max_request_bytes": 9999, "max_pixels": 9})

    def talk(connection: socket.socket, head: bytes) -> None:
        with connection, contextlib.suppress(OSError):
            if connection.recv(65536).startswith(b"GET"):
                connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(listing)}\r\n\r\n{listing}".encode())
                return
            connection.sendall(head)
            for _ in range(200):
                time.sleep(0.05)
                connection.sendall(b"1")

    def listen(listener: socket.socket, head: bytes) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=talk, args=(listener.accept()[0], head), daemon=True).start()

    def start(head: bytes) -> str:
        listening.append(socket.create_server(("127.0.0.1", 0)))
        threading.Thread(target=listen, args=(listening[-1], head), daemon=True).start()
        return f"http://127.0.0.1:{listening[-1].getsockname()[1]}"

    yield start
    for listener in listening:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nX-Endless: ",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0;",
    ],
    ids=["headers", "body", "body without length", "chunk header"],
)
def test_a_server_that_drips_is_not_waited_for(drip: Callable[[bytes], str], head: bytes) -> None:
    """`timeout` is for the whole answer, not for each next byte."""
    client = remote(drip(head), timeout=0.5, retries=1, on_failure="skip")
    client.load()
    started = time.monotonic()
    (score,) = client(batch_of(1))
    assert 1.0 <= time.monotonic() - started < 4.0
    assert "ReadTimeout (no whole answer within 0.5 s), tried 2 times" in score.detail["reason"]


def lie(**changes: Any) -> Callable[[str, list[str]], tuple[int, Any]]:
    return lambda name, ids: good(name, ids, **changes)


NAN = (
    b'{"schema": 2, "id": "%s", "reward_version": "number 1", '
    b'"results": [{"valid": true, "native": NaN, "table": 1, "rl": 1}]}'
)
LIES: list[tuple[Callable[[str, list[str]], tuple[int, Any]], str]] = [
    (busy(503), "answered 503: come again later, tried 3 times"),
    (busy(500), "answered 500: come again later, tried 3 times"),
    (busy(307), "answered 307: come again later, tried 3 times"),
    (lambda *_: (200, b"<html>"), "wrong at its JSON"),
    (lambda *_: (200, pickle.dumps({"scores": [1]})), "wrong at its JSON"),
    (lie(results=[]), "sent 0 results for 1 images"),
    (lie(id="00000000-0000-0000-0000-000000000000"), "answered request 0000"),
    (lie(more=1), "wrong at more"),
    (lie(results=[{"valid": True}]), "wrong at results"),
    (lambda name, _: (200, NAN % name.encode()), "wrong at results.0"),
    (lie(schema=1), "wrong at schema"),
    (
        lambda name, ids: good(name, ["0-foreign"]),
        "sent results of other images, or one twice: the first is '0-foreign'",
    ),
]


@pytest.mark.parametrize(("answer", "words"), LIES)
def test_skip_or_fail(
    scripted: Callable[..., tuple[str, list[str]]], answer: Callable[[str, list[str]], tuple[int, Any]], words: str
) -> None:
    url, seen = scripted(answer)
    with pytest.raises(
        RewardUnavailable, match=f"{words}.*tried 3 times" if "tried" not in words else words
    ) as failure:
        remote(url, retries=2)(batch_of(1))
    assert "\n" not in str(failure.value) and len(seen) == 3
    (score,) = remote(url, retries=2, on_failure="skip")(batch_of(1))
    assert not score.valid and words in score.detail["reason"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_proxy_that_spoils_answers_costs_no_score(serve: Callable[..., str], fault: str) -> None:
    """A fifth of the answers is bad, most of swapped ones: every image gets its own score in the end."""
    url = serve({"number": NumberReward()})
    with faulty_proxy(url, fault, 0.6 if "swapped" in fault else 0.2) as (proxy, spoilt):
        client = remote(proxy, max_items=4, backoff=0.005, retries=6)
        for start in (0, 1000):
            numbers = range(start, start + 24)
            expected = [(float(n), math.sin(n)) for n in numbers]
            assert [(score.native, score.rl) for score in client(batch_of(*numbers))] == expected
    assert len(spoilt) >= 2


def test_a_server_of_another_version_is_named(scripted: Callable[..., tuple[str, list[str]]]) -> None:
    """One whose results carry no ids is refused before anything is scored."""
    url, seen = scripted(good)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scripted, "schema", 1)
        with pytest.raises(ValueError, match="reward server of another version.*start it from the same version"):
            remote(url).load()
    assert not seen


def test_a_groupwise_reward_is_not_served(serve: Callable[..., str]) -> None:
    """Requests are cut and gathered without regard to groups."""

    class Compares(NumberReward):
        groupwise = True

    with pytest.raises(ValueError, match="reward 'x' compares the images of a group .*use it in the training process"):
        serve({"x": Compares()})


def test_skip_costs_one_request_alone(scripted: Callable[..., tuple[str, list[str]]]) -> None:
    url, _ = scripted(good, busy(503), good)
    client = remote(url, retries=0, on_failure="skip", max_items=2, concurrency=1)
    assert [score.valid for score in client(batch_of(*range(6)))] == [True, True, False, False, True, True]


def test_timeout(serve: Callable[..., str]) -> None:
    """The client gives up in time; where it may come again, it gets the answer that was in the making, scored once."""
    scorer = NumberReward(seconds=0.8)
    url = serve({"number": scorer})
    started = time.monotonic()
    with pytest.raises(RewardUnavailable, match=r"ReadTimeout .*tried 1 times"):
        remote(url, timeout=0.3, retries=0)(batch_of(1))
    assert time.monotonic() - started < 0.75
    time.sleep(0.8)
    scorer.batches.clear()
    assert [score.native for score in remote(url, timeout=0.3, retries=5)(batch_of(2))] == [2.0]
    assert scorer.batches == [1]


def test_changed_version(scripted: Callable[..., tuple[str, list[str]]]) -> None:
    """Always an error: skipping would hide it for ever."""
    url, _ = scripted(good, lie(reward_version="number 2"))
    client = remote(url, on_failure="skip")
    client(batch_of(1))
    with pytest.raises(RewardUnavailable, match="now serves 'number 2' .* scored by 'number 1'.*must not mix"):
        client(batch_of(1))


def test_servers_of_different_versions(serve: Callable[..., str]) -> None:
    urls = [serve({"number": NumberReward(version)}) for version in "12"]
    with pytest.raises(ValueError, match="different versions .*number 1; .*number 2"):
        remote(urls).load()


def test_full_queue_is_waited_for(serve: Callable[..., str]) -> None:
    """16 requests for a queue of 4: those that are sent away come again."""
    scorer = NumberReward(seconds=0.02)
    url = serve({"number": scorer}, Limits(max_items=4, queue_limit=4, max_batch_items=4, batch_wait_ms=0))
    client = remote(url, max_items=4, concurrency=8, retries=20)
    assert [score.native for score in client(batch_of(*range(32)))] == [float(n) for n in range(32)]


def test_first_error_ends_the_call(scripted: Callable[..., tuple[str, list[str]]]) -> None:
    """The other requests do not go on coming again."""
    url, seen = scripted(busy(404), busy(503))
    started = time.monotonic()
    with pytest.raises(RewardUnavailable, match="status 404"):
        remote(url, max_items=1, concurrency=2, retries=100, backoff=5.0)(batch_of(1, 2, 3, 4))
    assert time.monotonic() - started < 3
    assert len(seen) <= 4


# --- what a user can get wrong ----------------------------------------------------------------------------------------


def test_unknown_reward(serve: Callable[..., str]) -> None:
    url = serve({"number": NumberReward(), "beauty": NumberReward()})
    with pytest.raises(ValueError, match=f"{url} has no reward 'ocr': it has beauty, number."):
        remote(url, "ocr").load()


def test_token(serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    url = serve({"number": NumberReward()}, token="s3cret")
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    with pytest.raises(ValueError, match="wants a token or has another one: set REWARD_TOKEN"):
        remote(url).load()
    monkeypatch.setenv("REWARD_TOKEN", "wrong")
    with pytest.raises(ValueError, match="set REWARD_TOKEN"):
        remote(url).load()
    monkeypatch.setenv("OTHER_TOKEN", "s3cret")
    assert [score.native for score in remote(url, token_env="OTHER_TOKEN")(batch_of(4))] == [4.0]


def noise(*sizes: int) -> RewardBatch:
    """Square images that do not compress: 3 x size ** 2 bytes and a little more."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)) for size in sizes]
    return RewardBatch([PromptSample(str(n), "", "", {}) for n in range(len(sizes))], images)


def first_pixels(batch: RewardBatch) -> list[float]:
    return [float(r << 16 | g << 8 | b) for r, g, b in (image.getpixel((0, 0)) for image in batch.images)]


def test_requests_are_cut_by_bytes(serve: Callable[..., str]) -> None:
    """67.5 kB each for a server that takes 150 kB: two a request, in order; a prompt's bytes count too."""
    scorer = NumberReward()
    client = remote(serve({"number": scorer}, Limits(max_request_bytes=150_000, batch_wait_ms=0)), concurrency=1)
    batch = noise(*[150] * 7)
    assert [score.native for score in client(batch)] == first_pixels(batch)
    assert scorer.batches == [2, 2, 2, 1]
    scorer.batches.clear()
    long = batch_of(*range(9), prompt="\u2603" * 10_000)  # 30 kB of UTF-8 each
    assert [score.native for score in client(long)] == [float(n) for n in range(9)]
    assert scorer.batches == [4, 4, 1]


def test_a_shared_source_is_counted_once_a_request(serve: Callable[..., str]) -> None:
    scorer = NumberReward()
    client = remote(serve({"number": scorer}, Limits(max_request_bytes=150_000, batch_wait_ms=0)), concurrency=1)
    (source,) = noise(200).images  # 120 kB, and the images 7.5 kB
    batch = noise(*[50] * 5)
    batch = RewardBatch([PromptSample(s.id, "", "", {}, source) for s in batch.samples], batch.images)
    assert [score.native for score in client(batch)] == first_pixels(batch)
    assert scorer.batches == [3, 2]


@pytest.mark.parametrize("spare", range(-700, 2_000, 300))
def test_the_limit_is_met_to_the_byte(serve: Callable[..., str], spare: int) -> None:
    """Whatever the limit is, no request goes over it."""
    batch = noise(*[40] * 12)
    longest = 6 * len(encode_image(batch.images[0])) + spare
    client = remote(serve({"number": NumberReward()}, Limits(max_request_bytes=longest)))
    assert [score.native for score in client(batch)] == first_pixels(batch)


def test_one_image_too_large(serve: Callable[..., str]) -> None:
    url = serve({"number": NumberReward()}, Limits(max_request_bytes=100_000))
    batch = noise(50, 200, 50)
    words = "image of prompt '1' alone needs a request of 12.... bytes, but the server takes at most 100000: raise"
    scores = remote(url, on_failure="skip")(batch)
    assert [score.valid for score in scores] == [True, False, True]
    assert [scores[n].native for n in (0, 2)] == [first_pixels(batch)[n] for n in (0, 2)]
    assert re.search(words, scores[1].detail["reason"])
    client = remote(url, retries=100, backoff=10.0)
    with pytest.raises(RewardUnavailable, match=words):
        client(batch)
    client._max_bytes = 10**9  # as if the server had come back with a lower limit
    with pytest.raises(RewardUnavailable, match="status 413: the request is over 100000 bytes"):
        client(batch)


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (PromptSample("7", "", "", {"x": math.nan}), "prompt '7' cannot be sent: metadata"),
        (PromptSample("7", "", "", {"x": {1, 2}}), "prompt '7' cannot be sent: metadata"),
        (PromptSample("7", "p" * 20_001, "", {}), "prompt '7' cannot be sent: prompt"),
        (PromptSample("7", "", "", {"x": np.nan * np.ones(1)}), "prompt '7' cannot be sent: metadata"),
        (PromptSample("7", "", "", {"x": {1: 2}}), "prompt '7' cannot be sent: metadata"),
    ],
)
def test_what_cannot_be_sent(serve: Callable[..., str], sample: PromptSample, words: str) -> None:
    client = remote(serve({"number": NumberReward()}))
    with pytest.raises(ValueError, match=words):
        client(RewardBatch([sample], [Image.new("RGB", (2, 2))]))


def test_rare_modes_are_sent_as_rgb(serve: Callable[..., str]) -> None:
    """The RGB pixels are those that a scorer here would make of the image."""
    keep = KeepReward()
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8))
    images = [rgb.convert(mode) for mode in ("CMYK", "F", "I", "YCbCr", "HSV")]
    images += [rgb.convert("RGBA").convert("RGBa"), Image.linear_gradient("L").convert("I;16")]
    source = rgb.convert("CMYK")
    client = remote(serve({"keep": keep}, Limits(batch_wait_ms=0)), "keep")
    assert all(score.valid for score in client(RewardBatch([PromptSample("7", "", "", {}, source)] * 7, images)))
    (batch,) = keep.batches
    assert [image.mode for image in batch.images] == ["RGB"] * 6 + ["I;16"]
    expected = [image.convert("RGB").tobytes() for image in images]
    assert [image.convert("RGB").tobytes() for image in batch.images] == expected
    assert batch.samples[0].image is not None and batch.samples[0].image.tobytes() == source.convert("RGB").tobytes()


def test_metadata_of_tuples_and_numpy(serve: Callable[..., str]) -> None:
    keep = KeepReward()
    metadata = {
        "box": (1, (2.5, None)),
        "include": [{"count": np.int64(3), "area": np.float32(0.5), "score": np.float64(0.1)}],
        "flag": np.bool_(True),
        "word": np.str_("cat"),
        "array": np.arange(4).reshape(2, 2),
    }
    client = remote(serve({"keep": keep}), "keep")
    client(RewardBatch([PromptSample("7", "", "", metadata)], [Image.new("RGB", (2, 2))]))
    assert repr(keep.batches[0].samples[0].metadata) == repr(
        {
            "box": [1, [2.5, None]],
            "include": [{"count": 3, "area": 0.5, "score": 0.1}],
            "flag": True,
            "word": "cat",
            "array": [[0, 1], [2, 3]],
        }
    )


def test_no_reward_server(scripted: Callable[..., tuple[str, list[str]]]) -> None:
    url, _ = scripted(good)
    with pytest.raises(ValueError, match="has no reward 'x'"):
        remote(url, "x").load()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"urls": []}, "give at least one"),
        ({"urls": "127.0.0.1:18080"}, "such as http://127.0.0.1:18080"),
        ({"urls": ["http://"]}, "such as http://127.0.0.1:18080"),
        ({"urls": "http://[::1"}, "such as http://127.0.0.1:18080"),
        ({"urls": "http://user:hunter2@host"}, "holds a user name or a query: give the secret by token_env"),
        ({"urls": "http://host?token=hunter2"}, "holds a user name or a query: give the secret by token_env"),
        ({"urls": "user:hunter2@host"}, "holds a user name or a query: give the secret by token_env"),
        ({"on_failure": "ignore"}, "use skip or fail"),
        ({"timeout": 0}, "more than 0"),
        ({"timeout": math.inf}, "more than 0"),
        ({"max_items": 0}, "max_items=0, use at least 1"),
        ({"retries": -1}, "retries=-1, use at least 0"),
    ],
)
def test_wrong_arguments(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        RemoteReward(**{"urls": "http://127.0.0.1:1", "reward": "number", **kwargs})
    assert "hunter2" not in str(refused.value)

"""The reward server over real HTTP: what it answers, what it refuses, and how it starts and stops."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datamodules.sample import PromptSample
from miniature.scenes.detector import ShapesDetector
from miniature.scenes.world import TAGS, all_contents, random_scene, render
from rewards.base import Reward, RewardBatch, RewardUnavailable, Score
from rewards.geneval.reward import GenEvalReward
from rewards.serving import server
from rewards.serving.endpoints import CACHE_BYTES, CACHE_S, CACHE_SIZE, Answer, AnswerCache
from rewards.serving.multipart import MultipartError, read_parts
from rewards.serving.protocol import (
    MAX_SCANS,
    BadImage,
    Item,
    Scored,
    ScoreReply,
    decode_image,
    encode_image,
    item_id,
    to_result,
    to_score,
)
from rewards.serving.requests import Limits

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SMALL = Limits(
    max_request_bytes=200_000, max_items=8, max_pixels=64 * 64, max_batch_items=4, batch_wait_ms=1, queue_limit=8
)


def number_image(number: int, size: int = 4) -> Image.Image:
    """An image that says which one it is."""
    return Image.new("RGB", (size, size), (number >> 16, number >> 8 & 255, number & 255))


def number_of(image: Image.Image) -> int:
    red, green, blue = image.getpixel((0, 0))
    return red * 65536 + green * 256 + blue


class NumberReward(Reward):
    """native = the number in the image; misbehaves where the prompt says so."""

    name = "number"
    native_range = (0.0, math.inf)

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.batches: list[int] = []
        self.calls = 0
        self.at_once = 0
        self.open = threading.Event()
        self.open.set()

    def __call__(self, batch: RewardBatch) -> list[Score]:
        self.at_once += 1
        assert self.at_once == 1, "called twice at once"
        self.batches.append(len(batch))
        time.sleep(self.seconds)
        self.open.wait(20)
        try:
            return [self._score(s, i) for s, i in zip(batch.samples, batch.images, strict=True)]
        finally:
            self.at_once -= 1

    def _score(self, sample: PromptSample, image: Image.Image) -> Score:
        if sample.prompt == "poison":
            raise RuntimeError("secret path /root/weights")
        if sample.prompt == "exit":
            sys.exit(3)
        if sample.prompt == "unavailable":
            raise RewardUnavailable("the judge is away")
        if sample.prompt == "nan":
            return LaxScore(math.nan, 0.0, 0.0)
        if sample.prompt == "none":
            return None  # type: ignore[return-value]
        if sample.prompt == "invalid":
            return Score.invalid("no text in the image")
        number = float(number_of(image))
        return Score(number, number / 3, -number, detail={"prompt": sample.prompt})


class LaxScore(Score):
    """What an older scorer may return: a Score that does not look at its numbers."""

    def __post_init__(self) -> None:
        pass


class ShortReward(Reward):
    """Loses an image."""

    name = "short"

    def __call__(self, batch: RewardBatch) -> list[Score]:
        return [Score(1.0, 1.0, 1.0)] * (len(batch) - 1)


def ask(
    url: str,
    prompts: Sequence[str] = ("",),
    images: Sequence[bytes] | None = None,
    reward: str = "number",
    headers: dict[str, str] | None = None,
    files: list[Any] | None = None,
    timeout: float = 20.0,
    **changes: Any,
) -> httpx.Response:
    """Sends images that are numbered from 0, or `images`."""
    images = images or [encode_image(number_image(n)) for n in range(len(prompts))]
    items = [{"prompt": prompt, "images": [f"img{n}"]} for n, prompt in enumerate(prompts)]
    body = {"schema": 1, "id": str(uuid4()), "reward": reward, "items": items} | changes
    parts = [("request", (None, json.dumps(body), "application/json"))]
    parts += [(f"img{n}", (f"{n}.png", data, "image/png")) for n, data in enumerate(images)]
    return httpx.post(
        f"{url}/v1/score", files=parts if files is None else files, headers=headers, timeout=timeout, trust_env=False
    )


def codes(response: httpx.Response) -> list[str]:
    """Of every result: "ok", or its error code."""
    assert response.status_code == 200, response.text
    reply = ScoreReply.model_validate_json(response.content)
    return ["ok" if isinstance(result, Scored) else result.error for result in reply.results]


@pytest.fixture
def scorer() -> NumberReward:
    return NumberReward()


@pytest.fixture
def url(serve: Callable[..., str], scorer: NumberReward) -> str:
    return serve({"number": scorer, "short": ShortReward()}, SMALL)


# --- scores -----------------------------------------------------------------------------------------------------------


def test_shapes_score_as_in_process(serve: Callable[..., str]) -> None:
    """Every number of 40 scenes equals that of a call in this process, in order."""
    rng = random.Random(3)
    contents = [rng.choice(all_contents(rng.choice(TAGS))) for _ in range(40)]
    images = [Image.fromarray(render(random_scene(rng))) for _ in contents]
    reward = GenEvalReward(ShapesDetector(), exclude_penalty=0.3)
    samples = [PromptSample("", "", content.tag, content.metadata) for content in contents]
    expected = reward(RewardBatch(samples, images))
    assert len({score.rl for score in expected}) > 4
    url = serve({"geneval": GenEvalReward(ShapesDetector(), exclude_penalty=0.3)})
    items = [
        {"prompt": "", "images": [f"img{n}"], "tag": content.tag, "metadata": content.metadata}
        for n, content in enumerate(contents)
    ]
    response = ask(url, [""] * 40, [encode_image(image) for image in images], "geneval", items=items)
    reply = ScoreReply.model_validate_json(response.content)
    assert [to_score(result) for result in reply.results] == expected
    assert reply.reward_version == reward.version


def test_a_reply_in_full(url: str) -> None:
    name = str(uuid4())
    files = [encode_image(number_image(n)) for n in (258, 1)]
    response = ask(url, ["a", "invalid"], files, id=name)
    first, second = (
        item_id(place, Item(prompt=prompt, images=["x"]), file, None)
        for place, (prompt, file) in enumerate(zip(("a", "invalid"), files, strict=True))
    )
    assert first.startswith("0-") and second.startswith("1-") and first[2:] != second[2:]
    assert response.json() == {
        "schema": 2,
        "id": name,
        "reward_version": "NumberReward",
        "results": [
            {
                "item": first,
                "valid": True,
                "native": 258.0,
                "table": 86.0,
                "rl": -258.0,
                "detail": {"prompt": "a"},
                "parts": {},
                "weights": {},
            },
            {
                "item": second,
                "valid": False,
                "error": "unscorable",
                "reason": "no text in the image",
                "detail": {},
                "parts": {},
            },
        ],
    }
    assert response.headers["X-Request-ID"] == name


numbers = st.floats(allow_nan=False, allow_infinity=False)
scores = st.builds(Score, numbers, numbers, numbers, detail=st.dictionaries(st.text(max_size=5), numbers, max_size=3))


@given(scores, st.dictionaries(st.sampled_from("abc"), st.one_of(scores, st.just(Score.invalid("why"))), max_size=2))
def test_numbers_cross_exactly(score: Score, parts: dict[str, Score]) -> None:
    """Bit for bit (`repr` tells -0.0 from 0.0), with parts."""
    sent = Score(score.native, score.table, score.rl, detail=score.detail, parts=parts)
    reply = ScoreReply(schema=2, id=uuid4(), reward_version="1", results=[to_result(sent)])
    (result,) = ScoreReply.model_validate_json(reply.model_dump_json(by_alias=True)).results
    assert repr(to_score(result)) == repr(sent)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.inf, None),
        (np.float32(0.1), 0.10000000149011612),
        (np.arange(3), [0, 1, 2]),
        (np.bool_(True), True),
        ((1, (2.5, None)), [1, [2.5, None]]),
        (object(), "<object>"),
        ("\ud800", "?"),
        (2**80, None),
        ({1: {"b": b"x"}}, {"1": {"b": "<bytes>"}}),
    ],
)
def test_detail_is_plain_data(value: object, expected: object) -> None:
    result = to_result(Score(1.0, 1.0, 1.0, detail={"x": value}))
    assert result.detail == {"x": expected}
    assert json.loads(result.model_dump_json())["detail"] == {"x": expected}


def test_detail_is_bounded() -> None:
    nested: dict[str, Any] = {}
    for _ in range(50):
        nested = {"x": nested}
    assert len(to_result(Score(1.0, 1.0, 1.0, detail=nested)).model_dump_json()) < 300
    big = to_result(Score(1.0, 1.0, 1.0, detail={"boxes": list(range(10_000))}))
    assert big.detail == {"left_out": "58901 characters of detail"}


def test_sample_reaches_the_scorer(serve: Callable[..., str]) -> None:
    """With all its fields; two items share one source."""

    class Echo(Reward):
        name = "echo"
        needs = ("image", "kind")

        def __call__(self, batch: RewardBatch) -> list[Score]:
            return [
                Score(1.0, 1.0, 1.0, detail={**vars(s), "image": number_of(s.image)})  # type: ignore[arg-type]
                for s in batch.samples
            ]

    url = serve({"echo": Echo()})
    item = {"prompt": "é", "images": ["img0"], "source": ["img1"], "metadata": {"kind": [1, None]}, "tag": "t"}
    items = [{**item, "id": "7"}, {**item, "id": "8"}, {**item, "source": []}, {**item, "metadata": {}}]
    response = ask(url, images=[encode_image(number_image(n)) for n in (5, 6)], reward="echo", items=items)
    assert codes(response) == ["ok", "ok", "missing_need", "missing_need"]
    first, second, third, _ = response.json()["results"]
    told = {"id": "7", "prompt": "é", "tag": "t", "metadata": {"kind": [1, None]}, "image": 6}
    assert first["detail"] == {**told, "wording": None, "repeats": 1}  # rewards are told of the original alone
    assert second["detail"] == {**first["detail"], "id": "8"}
    assert third["reason"] == "the item lacks image, which the reward needs"


# --- one bad item -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["poison", "exit", "none"])
def test_poison_spoils_itself_alone(url: str, prompt: str, caplog: pytest.LogCaptureFixture) -> None:
    response = ask(url, ["a", prompt, "b", "c"])
    assert codes(response) == ["ok", "scorer_error", "ok", "ok"]
    assert [r["native"] for r in response.json()["results"] if r["valid"]] == [0.0, 2.0, 3.0]
    assert "secret" not in response.text and "Traceback" not in response.text
    if prompt == "poison":
        assert "secret path /root/weights" in caplog.text
    assert codes(ask(url, ["again"])) == ["ok"]


def test_nan_never_leaves(url: str) -> None:
    response = ask(url, ["a", "nan", "b"])
    assert codes(response) == ["ok", "non_finite", "ok"]
    assert "NaN" not in response.text.replace("returned NaN", "")


def test_wrong_length(url: str) -> None:
    assert codes(ask(url, ["a", "b", "c"], reward="short")) == ["wrong_length"] * 3


def png_with_size(width: int, height: int) -> bytes:
    """A PNG whose header promises a large image; its data are those of a small one."""
    data = bytearray(encode_image(Image.new("RGB", (4, 4))))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")  # as in `main`
def test_bad_images_spoil_themselves_alone(url: str) -> None:
    good = encode_image(number_image(9))
    gif = BytesIO()
    number_image(9).save(gif, "GIF")
    images = [
        good,
        png_with_size(30_000, 30_000),
        good[:-5],
        gif.getvalue(),
        b"",
        encode_image(Image.new("L", (65, 64))),
    ]
    bomb, large = "too_many_pixels", "too_many_pixels"
    response = ask(url, [""] * 6, images)
    assert codes(response) == ["ok", bomb, "bad_image", "bad_image", "bad_image", large]
    assert response.json()["results"][5]["reason"] == "the image is 65 x 64, over 4096 pixels"
    for extreme in ((12_000, 12_000), (2**31 - 1, 2**31 - 1), (0, 0), (64, 64)):  # the last: too little data
        assert codes(ask(url, [""], [png_with_size(*extreme)]))[0] in {"bad_image", "too_many_pixels"}


def test_every_cut_and_every_flipped_bit_of_a_png_is_seen() -> None:
    """But for the last chunk's own length and checksum: it holds nothing."""
    data = encode_image(Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 5, 3), np.uint8)))
    end = len(data) - 12
    assert data[end + 4 : end + 8] == b"IEND"
    for cut in range(end + 8):
        with pytest.raises(BadImage):
            decode_image(data[:cut], 100)
    for place in [*range(end), *range(end + 4, end + 8)]:
        for bit in range(8):
            with pytest.raises(BadImage):
                decode_image(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :], 100)


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x00\x00\x00\x00WEBPVP8 "]),
)
def test_any_bytes_are_a_image_or_bad(data: bytes, magic: bytes) -> None:
    with pytest.raises(BadImage):
        decode_image(magic + data, 100)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_images_cross_exactly(mode: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (9, 7, 4), np.uint8)
    image = (
        Image.fromarray(noise).convert("L").convert(mode) if mode == "I;16" else Image.fromarray(noise).convert(mode)
    )
    again = decode_image(encode_image(image), 100)
    assert (again.mode, again.size, again.tobytes()) == (mode, image.size, image.tobytes())


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_other_formats(url: str, kind: str) -> None:
    data = BytesIO()
    Image.new("RGB", (16, 16), (0, 0, 200)).save(data, kind, quality=100)
    (result,) = ask(url, [""], [data.getvalue()]).json()["results"]
    assert abs(result["native"] % 256 - 200) <= 2
    assert codes(ask(url, [""], [data.getvalue()[: len(data.getvalue()) // 2]])) == ["bad_image"]


def jpeg_with_scans(size: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again until there are so many."""
    buffer = BytesIO()
    Image.effect_noise((size, size), 60).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    assert data.endswith(b"\xff\xd9")
    last, given = data[data.rindex(b"\xff\xda") : -2], data.count(b"\xff\xda")
    return data[:-2] + last * (scans - given) + b"\xff\xd9"


def test_jpeg_of_many_scans() -> None:
    """65 are refused and 64 are not; thousands, which would be decoded for many seconds, are refused at once."""
    assert MAX_SCANS == 64
    assert decode_image(jpeg_with_scans(32, 64), 32 * 32).size == (32, 32)
    for size, scans in [(32, 65), (1024, 1000)]:
        data = jpeg_with_scans(size, scans)
        started = time.monotonic()
        with pytest.raises(BadImage, match="the JPEG has over 64 scans") as refused:
            decode_image(data, size * size)
        assert refused.value.error == "bad_image"
        assert time.monotonic() - started < 2


# --- requests that are refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"reward": "beauty"}, 404, "ask for one of number, short"),
        ({"schema": 2}, 422, "schema"),
        ({"id": "7"}, 422, "id"),
        ({"items": []}, 422, "items"),
        ({"items": [{"prompt": "", "images": ["img0"], "url": "http://x"}]}, 422, "items.0.url"),
        ({"items": [{"prompt": 3, "images": ["img0"]}]}, 422, "items.0.prompt"),
        ({"items": [{"prompt": "", "images": []}]}, 422, "items.0.images"),
        ({"items": [{"prompt": "", "images": ["img0", "img0"]}]}, 422, "items.0.images"),
        ({"items": [{"prompt": "", "images": ["../etc/passwd"]}]}, 422, "items.0.images.0"),
        ({"items": [{"prompt": "", "images": ["img7"]}]}, 422, "an item names the part 'img7'"),
        ({"items": [{"prompt": "", "images": ["request"]}]}, 422, "no such part"),
        ({"items": [{"prompt": "", "images": ["img0"], "metadata": {"x": math.nan}}]}, 422, "metadata"),
        ({"items": [{"prompt": "", "images": ["img0"], "tag": "t" * 1001}]}, 422, "items.0.tag"),
        ({"items": [{"prompt": "", "images": ["img0"]}] * 9}, 413, "at most 8"),
        ({"more": 1}, 422, "more"),
    ],
)
def test_wrong_requests(url: str, scorer: NumberReward, changes: dict[str, Any], status: int, words: str) -> None:
    response = ask(url, **changes)
    assert response.status_code == status
    assert words in response.json()["detail"] and "\n" not in response.json()["detail"]
    assert scorer.batches == []


def test_wrong_parts(url: str) -> None:
    good = encode_image(number_image(1))
    name = ("request", (None, json.dumps({"schema": 1, "id": str(uuid4()), "reward": "number", "items": [
        {"prompt": "", "images": ["img0"]}]}), "application/json"))  # fmt: skip
    image = ("img0", ("0.png", good, "image/png"))
    assert codes(ask(url, files=[name, image])) == ["ok"]
    assert codes(ask(url, files=[("request", ("r.json", name[1][1])), ("img0", (None, good))])) == ["ok"]
    for files, status, words in [
        ([name, image, image], 400, "two parts 'img0'"),
        ([name, name, image], 400, "two parts 'request'"),
        ([image], 422, "no part `request`"),
        ([name, image, ("img1", ("1.png", good, "image/png"))], 422, "no item names the part 'img1'"),
        ([name, *((f"x{n}", ("x.png", b"", "image/png")) for n in range(17))], 400, "more than 17 parts"),
    ]:
        response = ask(url, files=files)
        assert (response.status_code, words in response.json()["detail"]) == (status, True), response.text


@pytest.mark.parametrize(
    ("content_type", "body", "words"),
    [
        ("multipart/form-data", b"", "names no multipart boundary"),
        ("multipart/form-data; boundary=x", b"", "ends before its last"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\nhello\r\n--x--\r\n", "has no name"),
        ("multipart/form-data; boundary=x", b"--y\r\n", "not well-formed"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="request"\r\n\r\n{}\r\n',
            "ends before its last",
        ),
    ],
)
def test_wrong_multipart(url: str, content_type: str, body: bytes, words: str) -> None:
    headers = {"Content-Type": content_type}
    response = httpx.post(f"{url}/v1/score", content=body, headers=headers, trust_env=False)
    assert (response.status_code, words in response.json()["detail"]) == (400, True), response.text


@given(st.dictionaries(st.from_regex(r"\A[a-z]{1,5}\Z"), st.binary(max_size=50), min_size=1), st.integers(1, 40))
def test_multipart_parts_are_taken_apart_exactly(parts: dict[str, bytes], step: int) -> None:
    """In whatever pieces the body arrives."""
    request = httpx.Request("POST", "http://x", files=[(key, (None, value)) for key, value in parts.items()])
    body = request.read()

    async def stream() -> AsyncIterator[bytes]:
        for start in range(0, len(body), step):
            yield body[start : start + step]

    assert asyncio.run(read_parts(request.headers["Content-Type"], stream(), len(parts))) == parts
    with pytest.raises(MultipartError):
        asyncio.run(read_parts(request.headers["Content-Type"], stream(), len(parts) - 1))


def hostile_json() -> dict[str, tuple[str, int, str]]:
    """Name -> JSON of nearly 2 MiB, the status and the words that answer it."""
    head = f'{{"schema": 1, "id": "{uuid4()}", "reward": "number", '
    extras = ", ".join(f'"{n:06}": 0' for n in range(150_000))
    item = '"prompt": "", "images": ["img0"]'
    return {
        "items": (head + f'"items": [{",".join("0" * 900_000)}]}}', 413, "900000 items are too many: send at most 64"),
        "fields": (head + extras + "}", 422, "wrong at 000000: Extra inputs"),
        "fields of an item": (head + f'"items": [{{{item}, {extras}}}]}}', 422, "wrong at items.0.000000: Extra"),
        "images": (head + f'"items": [{{"prompt": "", "images": [{",".join("0" * 900_000)}]}}]}}', 422, "at most 1"),
        "depth": (head + f'"items": {"[" * 900_000}{"]" * 900_000}}}', 422, "recursion limit"),
        "wrong items": (head + '"items": [0, {}]}', 422, "wrong at items.0: "),
    }


@pytest.mark.parametrize("what", list(hostile_json()))
def test_hostile_json_costs_little(serve: Callable[..., str], scorer: NumberReward, what: str) -> None:
    """One fault is reported, and a million of them take no million reports."""
    text, status, words = hostile_json()[what]
    assert len(text) < 2 * 2**20
    url = serve({"number": scorer})
    started = time.monotonic()
    response = ask(url, files=[("request", (None, text)), ("img0", ("0.png", b""))])
    assert time.monotonic() - started < 2
    assert response.status_code == status and words in response.json()["detail"]
    assert len(response.content) < 400


def test_json_is_bounded(serve: Callable[..., str], scorer: NumberReward) -> None:
    url = serve({"number": scorer}, Limits(max_json_bytes=1000, batch_wait_ms=1))
    assert codes(ask(url, ["a" * 700])) == ["ok"]
    response = ask(url, ["a" * 1000])
    assert response.status_code == 413
    assert (
        response.json()["detail"] == "the part `request` is over 1000 bytes: send fewer items a request, or less text."
    )


def half_sent(url: str, body: bytes = b"--x\r\n", length: int = 1000) -> socket.socket:
    """A connection whose request's body is not complete."""
    address = httpx.URL(url)
    connection = socket.create_connection((address.host, address.port), timeout=10)
    head = f"POST /v1/score HTTP/1.1\r\nHost: {address.netloc.decode()}\r\nContent-Length: {length}\r\n"
    connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=x\r\n\r\n" + body)
    return connection


def everything(connection: socket.socket) -> bytes:
    """What is sent on a connection until it is closed."""
    with connection, connection.makefile("rb") as stream:
        return stream.read()


def test_slow_body_is_cut_off(serve: Callable[..., str], scorer: NumberReward) -> None:
    url = serve({"number": scorer}, Limits(read_timeout=0.3, batch_wait_ms=1))
    started = time.monotonic()
    answer = everything(half_sent(url))
    assert 0.25 < time.monotonic() - started < 5
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {
        "detail": "the request took over 0.3 s to arrive: send fewer items a request."
    }
    assert codes(ask(url)) == ["ok"]


def test_waiting_bytes_are_bounded(serve: Callable[..., str], scorer: NumberReward) -> None:
    """Of 120 kB, 90 wait for their answer or are on their way: 60 more are welcome later."""
    limits = Limits(max_request_bytes=100_000, max_json_bytes=600, max_waiting_bytes=120_000, batch_wait_ms=0)
    url = serve({"number": scorer}, limits)
    image = encode_image(number_image(7))
    large, more = image + b"\0" * 90_000, image + b"\0" * 60_000
    scorer.open.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, url, images=[large])
        while not scorer.batches:
            time.sleep(0.01)
        refused = ask(url, images=[more])
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert refused.json()["detail"] == "too many bytes of requests wait: come again later."
        scorer.open.set()
        assert codes(first.result()) == ["ok"]
    deadline = time.monotonic() + 10
    with half_sent(url, b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"0" * 90_000, 95_000):
        while ask(url, images=[more]).status_code != 503:
            assert time.monotonic() < deadline
    while ask(url, images=[large]).status_code != 200:
        assert time.monotonic() < deadline
    for _ in range(3):  # everything was given back
        assert codes(ask(url, images=[large])) == ["ok"]


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickle_is_just_bytes(url: str, tmp_path: Path) -> None:
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists(), "the trap works"
    (tmp_path / "sprung").unlink()
    assert httpx.post(f"{url}/v1/score", content=trap, trust_env=False).status_code == 415
    assert httpx.post(f"{url}/v1/score", content=trap, headers=MULTIPART, trust_env=False).status_code == 400
    assert ask(url, files=[("request", (None, trap, "application/octet-stream"))]).status_code == 422
    assert ask(url, files=[("request", ("a.pkl", trap, "application/octet-stream"))]).status_code == 422
    assert codes(ask(url, [""], [trap])) == ["bad_image"]
    assert not (tmp_path / "sprung").exists()


MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}


def pieces(total: int) -> Iterator[bytes]:
    """A body of which only the sum is too much."""
    yield b'--x\r\nContent-Disposition: form-data; name="img0"; filename="a"\r\n\r\n'
    for _ in range(total // 20_000):
        yield b"0" * 20_000


@pytest.mark.parametrize("declared", [True, False])
def test_oversize(url: str, declared: bool) -> None:
    """With `Content-Length` and without."""
    content: Any = b"0" * 300_000 if declared else pieces(300_000)
    response = httpx.post(f"{url}/v1/score", content=content, headers=MULTIPART, trust_env=False)
    assert response.status_code == 413
    assert response.json()["detail"] == "the request is over 200000 bytes: send fewer items a request."
    assert codes(ask(url)) == ["ok"]


def test_endless_request_is_cut_off(url: str) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for piece in pieces(2_000_000_000):
            sent += len(piece)
            yield piece

    try:
        assert httpx.post(f"{url}/v1/score", content=endless(), headers=MULTIPART, trust_env=False).status_code == 413
    except httpx.TransportError:
        pass  # the answer was there, but a client that goes on sending may not see it
    assert sent < 50_000_000, "what the sockets hold"
    assert codes(ask(url)) == ["ok"]


def test_client_that_leaves_half_way(url: str, caplog: pytest.LogCaptureFixture) -> None:
    host, port = url.removeprefix("http://").split(":")
    for text in (b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
                 b"Content-Length: 1000\r\n\r\n--x\r\n", b"\x00\xff\r\n\r\n"):  # fmt: skip
        with socket.create_connection((host, int(port))) as one:
            one.sendall(text)
            time.sleep(0.1)
    assert codes(ask(url)) == ["ok"]
    assert "Traceback" not in caplog.text


# --- many clients -----------------------------------------------------------------------------------------------------


def test_two_hundred_at_once(serve: Callable[..., str]) -> None:
    """Everybody gets the answer to their own question; the scorer sees batches, one at a time."""
    scorer = NumberReward(seconds=0.005)
    url = serve({"number": scorer}, Limits(max_batch_items=16, batch_wait_ms=5))

    async def one(client: httpx.AsyncClient, n: int) -> tuple[list[float], str]:
        numbers = [n * 1000 + k for k in range(1 + n % 3)]
        files: list[Any] = [(f"img{k}", (".png", encode_image(number_image(v)))) for k, v in enumerate(numbers)]
        items = [{"prompt": str(n), "images": [f"img{k}"]} for k in range(len(numbers))]
        body = json.dumps({"schema": 1, "id": str(uuid4()), "reward": "number", "items": items})
        reply = (await client.post(f"{url}/v1/score", files=[("request", (None, body)), *files])).json()
        assert [r["native"] for r in reply["results"]] == [float(v) for v in numbers]
        assert {r["detail"]["prompt"] for r in reply["results"]} == {str(n)}
        return numbers, reply["id"]

    async def everyone() -> list[tuple[list[float], str]]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(limits=limits, timeout=30, trust_env=False) as client:
            return await asyncio.gather(*(one(client, n) for n in range(200)))

    done = asyncio.run(everyone())
    assert len({name for _, name in done}) == 200
    assert sum(scorer.batches) == sum(len(numbers) for numbers, _ in done)
    assert max(scorer.batches) <= 16
    assert len(scorer.batches) < 100, "items of several clients share a batch"


def test_same_id_is_scored_once(url: str, scorer: NumberReward) -> None:
    name = str(uuid4())
    scorer.open.clear()
    with ThreadPoolExecutor(4) as pool:
        pending = [pool.submit(ask, url, ["a", "b"], id=name) for _ in range(4)]
        time.sleep(0.3)
        scorer.open.set()
        answers = {one.result().text for one in pending}
    answers.add(ask(url, ["a", "b"], id=name).text)
    assert len(answers) == 1
    assert sum(scorer.batches) == 2
    assert ask(url, ["a", "c"], id=name).status_code == 409
    assert ask(url, ["a", "b"], [encode_image(number_image(7))] * 2, id=name).status_code == 409
    assert sum(scorer.batches) == 2


def test_what_is_under_way_is_not_forgotten() -> None:
    """However many came since and however long ago: a repetition joins it. What is finished is forgotten in time."""
    started = []

    async def main() -> None:
        answers, go = AnswerCache(), asyncio.Event()

        async def work(number: int) -> Answer:
            started.append(number)
            if number < 0:
                await go.wait()
            return Answer(b"", 0)

        slow = uuid4()
        first = asyncio.ensure_future(answers.once(slow, b"", lambda: work(-1)))
        await asyncio.sleep(0)
        names = [uuid4() for _ in range(CACHE_SIZE + 3)]
        for number, name in enumerate(names):
            await answers.once(name, b"", lambda number=number: work(number))
        again = asyncio.ensure_future(answers.once(slow, b"", lambda: work(-2)))
        await asyncio.sleep(0)
        assert started == [-1, *range(CACHE_SIZE + 3)]
        assert len(answers._known) <= CACHE_SIZE + 1 and names[0] not in answers._known and names[-1] in answers._known
        answers._known.update({key: (d, since - CACHE_S - 1, t) for key, (d, since, t) in answers._known.items()})
        await answers.once(uuid4(), b"", lambda: work(1000))
        assert len(answers._known) == 2 and slow in answers._known
        go.set()
        assert await first is await again

    asyncio.run(main())


def test_answers_that_are_kept_are_bounded_in_bytes() -> None:
    async def main() -> None:
        answers = AnswerCache()

        async def work() -> Answer:
            return Answer(b"0" * (CACHE_BYTES // 4), 0)

        for _ in range(20):
            await answers.once(uuid4(), b"", work)
        assert len(answers._known) == 5, "as many as fit, and the last one"

    asyncio.run(main())


def test_full_queue(url: str, scorer: NumberReward) -> None:
    """8 may wait: 4 are being scored, 8 wait, the next is sent away and is welcome later."""
    scorer.open.clear()
    name = str(uuid4())
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, url, ["a"] * 4)
        while not scorer.batches:
            time.sleep(0.01)
        rest = [pool.submit(ask, url, ["a"] * 4) for _ in range(2)]
        while httpx.get(f"{url}/v1/health", trust_env=False).json()["queue"] < 8:
            time.sleep(0.01)
        assert httpx.get(f"{url}/v1/health", trust_env=False).json() == {"ready": True, "in_flight": 3, "queue": 8}
        refused = ask(url, id=name)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        scorer.open.set()
        assert [codes(one.result()) for one in (first, *rest)] == [["ok"] * 4] * 3
    assert codes(ask(url, id=name)) == ["ok"], "a refusal is not remembered"


def test_unavailable_scorer(url: str) -> None:
    response = ask(url, ["a", "unavailable"])
    assert response.status_code == 503
    assert response.json()["detail"] == "the scorer is unavailable: come again later."


# --- who may come in --------------------------------------------------------------------------------------------------


def test_token(serve: Callable[..., str], scorer: NumberReward) -> None:
    url = serve({"number": scorer}, token="s3cret")
    for header in (None, "Bearer wrong", "s3cret", "Basic s3cret", "Bearer s3cret2", "Bearer s3cre", "Bearer \u00e9"):
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        assert ask(url, headers=headers).status_code == 401  # type: ignore[arg-type]
        for path in ("/v1/rewards", "/openapi.json", "/nothing"):
            assert httpx.get(url + path, headers=headers, trust_env=False).status_code == 401
    assert scorer.batches == []
    assert httpx.get(f"{url}/v1/health", trust_env=False).status_code == 200
    assert codes(ask(url, headers={"Authorization": "Bearer s3cret"})) == ["ok"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost"}, 200),
        ({"Host": "LOCALHOST:1"}, 200),
        ({"Host": "127.0.0.1:18080"}, 200),
        ({"Host": "127.8.9.10"}, 200),
        ({"Host": "[::1]:18080"}, 200),
        ({"Host": "page.example"}, 403),
        ({"Host": "127.0.0.1.page.example"}, 403),
        ({"Host": "localhost.page.example:18080"}, 403),
        ({"Host": "192.0.2.1"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://page.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:18080"}, 403),
    ],
)
def test_web_pages_stay_out(
    serve: Callable[..., str], scorer: NumberReward, headers: dict[str, str], status: int
) -> None:
    """They name themselves in one of two headers. Where a token is asked for, nobody else needs to be kept out."""
    url = serve({"number": scorer})
    for path in ("/v1/health", "/v1/rewards", "/openapi.json"):
        assert httpx.get(url + path, headers=headers, trust_env=False).status_code == status
    assert ask(url, headers=headers).status_code == status
    assert len(scorer.batches) == (status == 200)
    url = serve({"number": NumberReward()}, token="s3cret")
    assert codes(ask(url, headers={**headers, "Authorization": "Bearer s3cret"})) == ["ok"]


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.0.2.1"])
def test_bind_needs_a_token(host: str) -> None:
    with pytest.raises(ValueError, match="REWARD_TOKEN is not set"):
        server.bind(host, 0, None)


def test_bind_with_a_token() -> None:
    with server.bind("0.0.0.0", 0, "s3cret") as bound:
        assert bound.getsockname()[0] == "0.0.0.0"


def test_small_answers_are_sent_at_once() -> None:
    """What asyncio looks at before it turns Nagle's algorithm off on a connection."""
    with server.bind("127.0.0.1", 0, None) as bound:
        assert bound.proto == socket.IPPROTO_TCP


def test_listing(url: str) -> None:
    assert httpx.get(f"{url}/v1/rewards", trust_env=False).json() == {
        "schema": 2,
        "rewards": [
            {"name": "number", "version": "NumberReward", "native_range": [0.0, None], "needs": []},
            {"name": "short", "version": "ShortReward", "native_range": [None, None], "needs": []},
        ],
        "max_items": 8,
        "max_request_bytes": 200_000,
        "max_pixels": 4096,
    }


def test_log_lines(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="rewards.serving.server")
    name = str(uuid4())
    ask(url, ["a", "nan"], id=name)
    httpx.get(f"{url}/a%0Afake: line", trust_env=False)
    deadline = time.monotonic() + 10
    while len(lines := [json.loads(text) for text in caplog.messages if "status" in text]) < 2:
        assert time.monotonic() < deadline  # a line is written once its client has the answer
        time.sleep(0.01)
    scored, lost = lines
    assert scored.pop("ms") > 0
    assert scored == {
        "id": name,
        "reward": "number",
        "items": 2,
        "invalid": 1,
        "to": "POST /v1/score",
        "status": 200,
    }
    assert lost["to"] == "GET /a\nfake: line"
    assert all("\n" not in record.getMessage() for record in caplog.records)


# --- the command ------------------------------------------------------------------------------------------------------


def test_shapes_config() -> None:
    """The shipped file builds its reward and says how to run it."""
    path = "configs/rewards/shapes.yaml"
    config = server.build_parser().parse_args(["--config", path])
    assert (config.host, config.port, config.max_items) == ("127.0.0.1", 18080, 64)
    reward = server.build_parser().instantiate(config).rewards["geneval"]
    assert isinstance(reward, GenEvalReward) and isinstance(reward.detector, ShapesDetector)
    assert f"#   python -m rewards.serving --config {path}\n" in Path(path).read_text()


GOOD = """
rewards:
  geneval:
    class_path: rewards.geneval.reward.GenEvalReward
    init_args: {detector: miniature.scenes.detector.ShapesDetector%s}
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rewards: {a: {class_path: rewards.geneval.reward.NoReward}}", "NoReward"),
        ("rewards: {a: {class_path: miniature.scenes.detector.ShapesDetector}}", "ShapesDetector"),
        ("rewards: {}", "`rewards` is empty"),
        ("rewards: [", "c.yaml:2 is no YAML"),
        ("", "rewards"),
        (GOOD % ", exclude_penalty: -1", "use 0 or more"),
        (GOOD % ", rewrd: soft", "rewrd"),
        (GOOD % "" + "\nhots: 127.0.0.1", "hots"),
        (GOOD % "" + "\nhost: 0.0.0.0", "REWARD_TOKEN is not set"),
        (GOOD % "" + "\nhost: no.such.host.invalid", "cannot listen on"),
        (GOOD % "" + "\nport: 99999", "use 0 to 65535"),
        (GOOD % "" + "\nqueue_limit: 3", "raise queue_limit"),
        (GOOD % "" + "\nmax_pixels: 100000000000", "max_pixels"),
        (GOOD % "" + "\nmax_items: 0", "max_items=0"),
        (GOOD % "" + "\nread_timeout: 0", "read_timeout=0"),
        (GOOD % "" + "\nread_timeout: .nan", "read_timeout=nan"),
        (GOOD % "" + "\nscore_timeout: 0", "score_timeout=0"),
        (b"\x89PNG\r\n\x1a\n\0\0", "c.yaml:1: the file is not UTF-8 text"),
        ("rewards: 1".encode("utf-16"), "c.yaml:1: the file is not UTF-8 text"),
        ("# größer\nrewards: 1".encode("latin-1"), "c.yaml:1: the file is not UTF-8 text"),
        ("[" * 500 + "]" * 500, "over 100 levels"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
            "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e,*e]",
            "each alias counted in full",
        ),
        (
            GOOD % "" + "\nmax_waiting_bytes: 100000000",
            "but one request may take 134217728",
        ),
    ],
)
def test_one_line_errors(
    text: str | bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    (tmp_path / "c.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(SystemExit) as stopped:
        server.main(["--config", str(tmp_path / "c.yaml")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("rewards.serving.server: error: ") and error.count("\n") == 1
    assert words in error


def test_port_in_use(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        server.main(["--config", "configs/rewards/shapes.yaml", "--port", url.rsplit(":", 1)[1]])
    assert "Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize("token", ["a b", "é", "a\n"])
def test_unusable_token(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", token)
    with pytest.raises(ValueError, match="REWARD_TOKEN must be printable"):
        server.read_token()


def test_non_loopback_without_token_is_refused_as_a_process() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "REWARD_TOKEN"}
    command = [
        sys.executable,
        "-m",
        "rewards.serving",
        "--config",
        "configs/rewards/shapes.yaml",
        "--host",
        "0.0.0.0",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "REWARD_TOKEN is not set" in done.stderr


def test_imports_nothing_heavy() -> None:
    """The server with the shapes reward, built in a process of its own, beside the client and a judge."""
    script = """
import sys
from PIL import Image
import rewards.judges.vlm_judge, rewards.serving.client
from rewards.serving import server
parser = server.build_parser()
config = parser.parse_args(["--config", "configs/rewards/shapes.yaml"])
rewards = parser.instantiate(config).rewards
server.create_app(rewards, server.Limits())
banned = ("torch", "lightning", "transformers", "diffusers", "datamodules.base")
print([name for name in sys.modules if name.startswith(banned)])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_sigterm_finishes_what_was_accepted(slow_server: Callable[..., Any]) -> None:
    """Closed while models load, then ready; a batch under way and one that waits are both answered; exit code 0."""
    process = slow_server(seconds=1.0, load_seconds=0.5)
    seen = process.wait_until_ready()
    assert seen[0] == "ConnectError" and set(seen[:-1]) == {"ConnectError"}
    assert json.loads(seen[-1]) == {"ready": True, "in_flight": 0, "queue": 0}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, process.url, [""] * 4, reward="slow")
        process.wait_until_scoring()
        second = pool.submit(ask, process.url, [""] * 2, reward="slow")
        while httpx.get(f"{process.url}/v1/health", trust_env=False).json()["queue"] < 2:
            time.sleep(0.01)
        assert process.end(signal.SIGTERM) == 0
        assert [r["native"] for r in first.result().json()["results"]] == [0.0, 1.0, 2.0, 3.0]
        assert [r["native"] for r in second.result().json()["results"]] == [0.0, 1.0]
    with pytest.raises(httpx.ConnectError):
        ask(process.url)


def test_sigterm_drops_what_is_half_sent(slow_server: Callable[..., Any]) -> None:
    """Neither half a body nor half a header holds it up; what was accepted is answered; exit code 0."""
    process = slow_server(seconds=1.0)
    process.wait_until_ready()
    halves = [half_sent(process.url), half_sent(process.url, b"")]
    address = httpx.URL(process.url)
    header = socket.create_connection((address.host, address.port), timeout=10)
    header.sendall(b"POST /v1/score HTTP/1.1\r\nHo")
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(ask, process.url, [""] * 2, reward="slow")
        process.wait_until_scoring()
        started = time.monotonic()
        assert process.end(signal.SIGTERM) == 0
        assert time.monotonic() - started < 5
        assert codes(accepted.result()) == ["ok"] * 2
    for connection in halves:
        answer = everything(connection)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"the server stops: come again later." in answer
    assert everything(header) == b""


def test_connections_are_bounded() -> None:
    """Two may be open; the third is told to come again, and may once another has left."""
    with server.bind("127.0.0.1", 0, None) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "rewards.serving", "--config", "configs/rewards/shapes.yaml"]
    process = subprocess.Popen([*command, f"--port={port}", "--max_connections=2"], stderr=subprocess.DEVNULL, cwd=ROOT)
    deadline = time.monotonic() + 30

    def wait_for(status: int) -> None:
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{url}/v1/health", trust_env=False).status_code == status:
                    return
            except httpx.TransportError:  # it does not listen yet
                time.sleep(0.05)
        raise AssertionError(f"no status {status}")

    try:
        wait_for(200)
        with half_sent(url), half_sent(url):
            wait_for(503)
        wait_for(200)
    finally:
        process.terminate()
        assert process.wait(20) == 0

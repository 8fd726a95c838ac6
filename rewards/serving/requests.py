"""Reads and checks score requests: size limits while a body streams in, then its JSON and the images it names."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncIterator, Coroutine, Mapping, Set
from contextlib import aclosing
from dataclasses import dataclass, fields
from typing import Any

from fastapi import HTTPException, Request
from PIL import Image
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from rewards.serving.batching import Job
from rewards.serving.multipart import MultipartError, PartTooLarge, read_parts
from rewards.serving.protocol import Item, ScoreRequest

RETRY_AFTER_S = 1
PARSED_JSON_FACTOR = 32
"""Memory of parsed JSON, in bytes for each byte of its text: `{}` and a comma take 64 + 8 for 3."""


@dataclass(frozen=True)
class Limits:
    """Limits on what clients may ask of a server.

    Args:
        max_request_bytes: largest request, images included.
        max_json_bytes: largest part `request`, the request's JSON.
        max_items: most items of one request.
        max_pixels: largest image, width x height; at most 89,478,485, above which Pillow itself suspects a bomb.
        max_batch_items: most items that a reward is called with at once; the items of several clients are gathered.
        batch_wait_ms: how long a batch that is not full waits for other clients' items.
        queue_limit: most items that wait for one reward; clients get 503 and come again.
        max_waiting_bytes: most bytes of all requests together that are being read or wait for their answer, where JSON
            counts for what it takes once parsed; clients get 503 and come again.
        max_connections: most connections; to make room for more, those without a request are closed, the oldest first.
            While all have one, clients get 503 and come again.
        header_timeout: how long a connection may go without a request, in seconds: until a header is complete, and
            after an answer, until the client has fetched it and sent the next one.
        read_timeout: how long a request's body may take to arrive, in seconds.
        score_timeout: how long the scorer may take for a batch, in seconds. The images of one that takes longer are
            then scored one by one, and one that takes as long alone is invalid. Calls that took too long run on, as
            Python cannot end them; once there are 4, clients get 503 until one ends.
    """

    max_request_bytes: int = 64 * 2**20
    max_json_bytes: int = 2 * 2**20
    max_items: int = 64
    max_pixels: int = 2048 * 2048
    max_batch_items: int = 32
    batch_wait_ms: float = 5.0
    queue_limit: int = 1024
    max_waiting_bytes: int = 2**30
    max_connections: int = 512
    header_timeout: float = 20.0
    read_timeout: float = 60.0
    score_timeout: float = 60.0

    def __post_init__(self) -> None:
        least_of = {"batch_wait_ms": 0, "header_timeout": 0.001, "read_timeout": 0.001, "score_timeout": 0.001}
        for one in fields(self):
            value, least = getattr(self, one.name), least_of.get(one.name, 1)
            if not least <= value < math.inf:
                raise ValueError(f"the server has {one.name}={value}, use {least} or more.")
        if self.queue_limit < self.max_items:
            raise ValueError(
                f"the server has queue_limit={self.queue_limit}, which no request of max_items={self.max_items} "
                "would ever fit: raise queue_limit."
            )
        largest = self.max_request_bytes + PARSED_JSON_FACTOR * min(self.max_json_bytes, self.max_request_bytes)
        if self.max_waiting_bytes < largest:
            raise ValueError(
                f"the server has max_waiting_bytes={self.max_waiting_bytes}, but one request may take {largest} (of "
                f"max_request_bytes, and {PARSED_JSON_FACTOR} x max_json_bytes): raise the first or lower the others."
            )
        if Image.MAX_IMAGE_PIXELS is not None and self.max_pixels > Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"the server has max_pixels={self.max_pixels}, use at most {Image.MAX_IMAGE_PIXELS}: above that "
                "Pillow suspects a decompression bomb."
            )


class MemoryBudget:
    """Counts the bytes of requests that are being read or wait. Used on the event loop alone, so it needs no lock.

    Args:
        limit: most bytes of all requests together.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0


class Reservation:
    """Context manager: the bytes of a memory budget that one request uses; leaving it releases them."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget = budget
        self.used = 0

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self.budget.used -= self.used
        self.used = 0

    def add(self, num_bytes: int) -> None:
        """Reserves further bytes.

        Raises:
            HTTPException: 503 if the budget has fewer left.
        """
        if self.budget.used + num_bytes > self.budget.limit:
            raise unavailable("too many bytes of requests wait")
        self.budget.used += num_bytes
        self.used += num_bytes


def unavailable(why: str, headers: Mapping[str, str] | None = None) -> HTTPException:
    """Builds the 503 for a client that should come again later."""
    return HTTPException(503, f"{why}: come again later.", {"Retry-After": str(RETRY_AFTER_S), **(headers or {})})


async def read_request(
    request: Request, limits: Limits, memory: Reservation, stopping: asyncio.Event
) -> tuple[ScoreRequest, list[Job], bytes]:
    """Reads a request's body; returns its JSON, a job for each item, and a digest of everything that was sent.

    Args:
        request: a request whose body is not read yet.
        limits: bounds of its size and its time.
        memory: reserves its bytes.
        stopping: set once the server stops, which a body that is still on its way must not hold up.

    Raises:
        HTTPException: 400, 408, 413, 415, 422 or 503, with one sentence.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        raise HTTPException(415, "send multipart/form-data: a part `request` with JSON, and one part for each image.")
    stream = _limit_body(request, limits.max_request_bytes, memory)
    # Every item has one image and at most one source.
    reading = read_parts(content_type, stream, 2 * limits.max_items + 1, {"request": limits.max_json_bytes})
    try:
        parts = await _read_in_time(reading, limits.read_timeout, stopping)
    except PartTooLarge as error:
        raise HTTPException(413, f"{error}: send fewer items a request, or less text.") from error
    except MultipartError as error:
        raise HTTPException(400, str(error)) from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the client left before its request was complete.") from error
    memory.add(PARSED_JSON_FACTOR * len(parts.get("request", b"")))
    return await run_in_threadpool(_parse_parts, parts, limits.max_items)  # others are served meanwhile


async def _read_in_time(
    reading: Coroutine[Any, Any, dict[str, bytes]], seconds: float, stopping: asyncio.Event
) -> dict[str, bytes]:
    """Awaits `reading`; raises a 408 if it takes over `seconds`, a 503 if the server stops first."""
    read, stop = asyncio.ensure_future(reading), asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait((read, stop), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if read.done():
            return read.result()
    finally:
        read.cancel()
        stop.cancel()
    if stopping.is_set():
        raise unavailable("the server stops", {"Connection": "close"})
    raise HTTPException(
        408, f"the request took over {seconds} s to arrive: send fewer items a request.", {"Connection": "close"}
    )


async def _limit_body(request: Request, max_bytes: int, memory: Reservation) -> AsyncIterator[bytes]:
    """Yields a body's chunks; raises a 413 once it is too large, whatever `Content-Length` promised."""
    too_large = HTTPException(413, f"the request is over {max_bytes} bytes: send fewer items a request.")
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise too_large
    received = 0
    async with aclosing(request.stream()) as stream:
        async for chunk in stream:
            received += len(chunk)
            if received > max_bytes:
                raise too_large
            memory.add(len(chunk))
            yield chunk


def _parse_parts(parts: dict[str, bytes], max_items: int) -> tuple[ScoreRequest, list[Job], bytes]:
    score_request = _parse_json(parts.pop("request", None), max_items)
    return score_request, _make_jobs(score_request, parts), _digest(score_request, parts)


def _parse_json(text: bytes | None, max_items: int) -> ScoreRequest:
    """Parses the request's JSON; refuses first what pydantic would answer with a report for every item."""
    if text is None:
        raise HTTPException(422, "there is no part `request`: send the request's JSON in it.")
    try:
        raw = from_json(text)
    except ValueError as error:
        raise _unprocessable("the JSON", f"Invalid JSON: {error}") from error
    items = raw.get("items") if isinstance(raw, dict) else None
    items = items if isinstance(items, list) else []
    if len(items) > max_items:
        raise HTTPException(413, f"{len(items)} items are too many: send at most {max_items} a request.")
    _refuse_unknown(raw, {"schema", *ScoreRequest.model_fields} - {"version"}, "")
    for n, item in enumerate(items):
        _refuse_unknown(item, set(Item.model_fields), f"items.{n}.")
    try:
        return ScoreRequest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _unprocessable(".".join(map(str, first["loc"])) or "the JSON", first["msg"]) from error


def _refuse_unknown(value: object, known: Set[str], where: str) -> None:
    if isinstance(value, dict) and (unknown := next((key for key in value if key not in known), None)) is not None:
        raise _unprocessable(where + unknown, "Extra inputs are not permitted")


def _unprocessable(where: str, why: str) -> HTTPException:
    return HTTPException(422, f"the part `request` is wrong at {where[:200]}: {why}.")


def _make_jobs(score_request: ScoreRequest, parts: Mapping[str, bytes]) -> list[Job]:
    """Makes a job for each item; raises a 422 if a part that is named is missing, or one that is there is not named."""
    named = {name for item in score_request.items for name in (*item.images, *item.source)}
    if absent := sorted(named - set(parts)):
        raise HTTPException(422, f"an item names the part {_quote(absent[0])}, but there is no such part.")
    if idle := sorted(set(parts) - named):
        raise HTTPException(422, f"no item names the part {_quote(idle[0])}: leave it out or name it.")
    return [
        Job(item, parts[item.images[0]], parts[item.source[0]] if item.source else None) for item in score_request.items
    ]


def _digest(score_request: ScoreRequest, parts: Mapping[str, bytes]) -> bytes:
    """Hashes the content, whatever the multipart boundary and the order of parts (SHA-256)."""
    digest = hashlib.sha256(score_request.model_dump_json(by_alias=True).encode())
    for name, data in sorted(parts.items()):
        digest.update(name.encode() + hashlib.sha256(data).digest())
    return digest.digest()


def _quote(name: str) -> str:
    return repr(name[:70])

"""Reads a score request off the wire: limits while it streams, then JSON and parts that must fit each other."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, fields

from fastapi import HTTPException, Request
from PIL import Image
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from rewards.multipart import MultipartError, read_parts
from rewards.scheduler import Job
from rewards.wire import ScoreRequest


@dataclass(frozen=True)
class Limits:
    """What one client may ask of a server.

    Args:
        max_request_bytes: largest request, pictures included.
        max_items: most items of one request.
        max_pixels: largest picture, width x height; at most 89,478,485, above which Pillow itself suspects a bomb.
        max_batch_items: most items that a reward is called with at once; the items of several clients are gathered.
        batch_wait_ms: how long a batch that is not full waits for other clients' items.
        queue_limit: most items that wait for one reward; clients get 503 and come again.
    """

    max_request_bytes: int = 64 * 2**20
    max_items: int = 64
    max_pixels: int = 2048 * 2048
    max_batch_items: int = 32
    batch_wait_ms: float = 5.0
    queue_limit: int = 1024

    def __post_init__(self) -> None:
        for one in fields(self):
            least = 0 if one.name == "batch_wait_ms" else 1
            if not getattr(self, one.name) >= least:
                raise ValueError(f"the server has {one.name}={getattr(self, one.name)}, use {least} or more.")
        if self.queue_limit < self.max_items:
            raise ValueError(
                f"the server has queue_limit={self.queue_limit}, which no request of max_items={self.max_items} "
                "would ever fit: raise queue_limit."
            )
        if Image.MAX_IMAGE_PIXELS is not None and self.max_pixels > Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"the server has max_pixels={self.max_pixels}, use at most {Image.MAX_IMAGE_PIXELS}: above that "
                "Pillow suspects a decompression bomb."
            )


async def read_request(request: Request, limits: Limits) -> tuple[ScoreRequest, list[Job], bytes]:
    """The request, a job for each of its items, and a digest of everything that was sent.

    Raises:
        HTTPException: 400, 413, 415 or 422, with one sentence.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        raise HTTPException(415, "send multipart/form-data: a part `request` with JSON, and one part for each picture.")
    try:
        # Every item has one picture and at most one source.
        parts = await read_parts(content_type, _limited(request, limits.max_request_bytes), 2 * limits.max_items + 1)
    except MultipartError as error:
        raise HTTPException(400, str(error)) from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the client left before its request was complete.") from error
    ask = _parse(parts.pop("request", None))
    if len(ask.items) > limits.max_items:
        raise HTTPException(413, f"{len(ask.items)} items are too many: send at most {limits.max_items} a request.")
    return ask, _jobs(ask, parts), _digest(ask, parts)


async def _limited(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    """The body, which ends in a 413 when it turns out to be too large; `Content-Length` is only a promise."""
    declared = request.headers.get("content-length", "")
    too_large = declared.isdecimal() and int(declared) > max_bytes
    received = 0
    async with aclosing(request.stream()) as stream:
        async for chunk in stream:
            received += len(chunk)
            too_large = too_large or received > max_bytes
            if not too_large:
                yield chunk
            # A little more is read and dropped: a client that is cut off while it sends may never see the answer.
            elif received > 2 * max_bytes:
                break
    if too_large:
        raise HTTPException(
            413, f"the request is over {max_bytes} bytes: send fewer items a request.", {"Connection": "close"}
        )


def _parse(text: bytes | None) -> ScoreRequest:
    if text is None:
        raise HTTPException(422, "there is no part `request`: send the request's JSON in it.")
    try:
        return ScoreRequest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the JSON"
        raise HTTPException(422, f"the part `request` is wrong at {where[:200]}: {first['msg']}.") from error


def _jobs(ask: ScoreRequest, parts: Mapping[str, bytes]) -> list[Job]:
    """A job for each item, once every part that is named is there and every part that is there is named."""
    named = {name for item in ask.items for name in (*item.images, *item.source)}
    if absent := sorted(named - set(parts)):
        raise HTTPException(422, f"an item names the part {_short(absent[0])}, but there is no such part.")
    if idle := sorted(set(parts) - named):
        raise HTTPException(422, f"no item names the part {_short(idle[0])}: leave it out or name it.")
    return [Job(item, parts[item.images[0]], parts[item.source[0]] if item.source else None) for item in ask.items]


def _digest(ask: ScoreRequest, parts: Mapping[str, bytes]) -> bytes:
    """A fingerprint of the content, whatever the multipart boundary and the order of parts."""
    digest = hashlib.sha256(ask.model_dump_json(by_alias=True).encode())
    for name, data in sorted(parts.items()):
        digest.update(name.encode() + hashlib.sha256(data).digest())
    return digest.digest()


def _short(name: str) -> str:
    return repr(name[:70])

"""The reward server's FastAPI application: endpoints, access check, and a cache of answers for repeated requests."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import re
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rewards.base import Reward, RewardUnavailable
from rewards.serving.batching import Batcher, Job, QueueFull
from rewards.serving.protocol import (
    PART_NAME,
    Health,
    Problem,
    RewardInfo,
    RewardList,
    ScoreReply,
    ScoreRequest,
    item_id,
)
from rewards.serving.requests import Limits, MemoryBudget, Reservation, read_request, unavailable

log = logging.getLogger("rewards.serving.server")

CACHE_SIZE = 512
"""Most answers that are kept for clients that repeat a request."""
CACHE_BYTES = 64 * 2**20
"""Most bytes of answers that are kept."""
CACHE_S = 600.0
"""How long an answer is kept, in seconds."""
LOOPBACK_HOST = re.compile(rb"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)
"""Matches the header `Host` of a client that asks its own machine."""


def create_app(rewards: Mapping[str, Reward], limits: Limits, token: str | None = None) -> FastAPI:
    """Builds the application and loads the rewards.

    Who serves it sets `app.state.stopping` when it stops, so that half-sent requests are dropped.

    Args:
        rewards: name -> reward; clients ask by this name.
        limits: bounds of what clients may ask.
        token: clients must send it as `Authorization: Bearer <token>`; null takes clients of this machine, no browsers.
    """
    infos = []
    for name, reward in rewards.items():
        if reward.groupwise:
            raise ValueError(
                f"the reward {name!r} compares the images of a group (`groupwise`), which a server, where requests are "
                "split and gathered, does not keep together: use it in the training process."
            )
        reward.load()
        low, high = (value if math.isfinite(value) else None for value in reward.native_range)
        infos.append(RewardInfo(name=name, version=reward.version, native_range=(low, high), needs=list(reward.needs)))
    versions = {info.name: info.version for info in infos}
    listing = RewardList(
        schema=2,
        rewards=infos,
        max_items=limits.max_items,
        max_request_bytes=limits.max_request_bytes,
        max_pixels=limits.max_pixels,
    )
    batchers = {
        name: Batcher(
            reward,
            max_pixels=limits.max_pixels,
            max_batch_items=limits.max_batch_items,
            batch_wait_ms=limits.batch_wait_ms,
            queue_limit=limits.queue_limit,
            score_timeout=limits.score_timeout,
        )
        for name, reward in rewards.items()
    }
    answers, budget, stopping = AnswerCache(), MemoryBudget(limits.max_waiting_bytes), asyncio.Event()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for batcher in batchers.values():
            batcher.start()
        yield
        for batcher in batchers.values():
            await asyncio.to_thread(batcher.close)

    app = FastAPI(title="Rewards", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.stopping = stopping
    app.add_middleware(AccessMiddleware, token=token)

    @app.get("/v1/health", responses=_error_responses(403, 405))
    async def health() -> Health:
        """Says if the server takes requests and how many wait. Needs no token."""
        return Health(
            ready=all(batcher.ready for batcher in batchers.values()),
            in_flight=answers.in_flight,
            queue=sum(batcher.num_waiting for batcher in batchers.values()),
        )

    @app.get("/v1/rewards", responses=_error_responses(401, 403, 405))
    async def listed() -> RewardList:
        """Lists the rewards that can be asked for, and the server's limits."""
        return listing

    @app.post(
        "/v1/score",
        response_model=ScoreReply,
        responses=_error_responses(400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 503),
        openapi_extra={"requestBody": _REQUEST_BODY},
    )
    async def score(http: Request) -> Response:
        """Scores images. An item that cannot be scored is invalid; the others are scored all the same."""
        with Reservation(budget) as memory:  # held until the answer is there, even if the client leaves
            request, jobs, digest = await read_request(http, limits, memory, stopping)
            http.state.log_fields.update(id=str(request.id), reward=request.reward[:200], items=len(jobs))
            if request.reward not in batchers:
                known = ", ".join(sorted(batchers))
                raise HTTPException(404, f"there is no reward {request.reward[:80]!r}: ask for one of {known}.")
            reply = await answers.once(
                request.id, digest, lambda: _score(request, jobs, batchers[request.reward], versions[request.reward])
            )
        http.state.log_fields.update(invalid=reply.num_invalid)
        return Response(reply.body, media_type="application/json")

    app.openapi = lambda: _openapi_schema(app, list(batchers), token)  # type: ignore[method-assign]
    return app


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """A reply's JSON, and how many of its items are invalid."""

    body: bytes
    num_invalid: int


async def _score(request: ScoreRequest, jobs: Sequence[Job], batcher: Batcher, version: str) -> Answer:
    try:
        batcher.submit(jobs)
        results = await asyncio.gather(*(asyncio.wrap_future(job.result) for job in jobs))
    except QueueFull as error:
        raise unavailable("too many items wait for this reward") from error
    except RewardUnavailable as error:
        raise unavailable("the scorer is unavailable") from error
    results = [
        result.model_copy(update={"item": item_id(place, job.item, job.image, job.source)})
        for place, (job, result) in enumerate(zip(jobs, results, strict=True))
    ]
    reply = ScoreReply(schema=2, id=request.id, reward_version=version, results=results)
    return Answer(reply.model_dump_json(by_alias=True).encode(), sum(not result.valid for result in results))


class AnswerCache:
    """Cache of answers: a request that comes again, as after a lost connection, gets the first one's answer.

    Used on the event loop alone, so it needs no lock.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[UUID, tuple[bytes, float, asyncio.Task[Answer]]] = OrderedDict()
        self.in_flight = 0

    async def once(self, name: UUID, digest: bytes, start: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
        """Returns the answer to the request `name`; runs `start` for it once, however often it comes.

        Raises:
            HTTPException: 409 if the id was given to another request.
        """
        now = time.monotonic()
        finished = [(other, since, task) for other, (_, since, task) in self._known.items() if task.done()]
        excess, num_bytes = len(self._known) - CACHE_SIZE, sum(_num_bytes(task) for _, _, task in finished)
        for other, since, task in finished:  # the oldest first; what is under way must not start twice
            if excess > 0 or num_bytes > CACHE_BYTES or since < now - CACHE_S:
                del self._known[other]
                excess -= 1
                num_bytes -= _num_bytes(task)
        if name not in self._known:
            task = asyncio.get_running_loop().create_task(start())
            self._known[name] = (digest, now, task)
            self.in_flight += 1
            task.add_done_callback(lambda done: self._finish(name, done))
        known, _, task = self._known[name]
        if known != digest:
            raise HTTPException(409, f"the id {name} was given to another request: use a new id for each request.")
        return await asyncio.shield(task)  # this client may leave while another waits for the same answer

    def _finish(self, name: UUID, task: asyncio.Task[Answer]) -> None:
        self.in_flight -= 1
        if task.cancelled() or task.exception() is not None:  # so that a retry is scored anew
            if name in self._known and self._known[name][2] is task:
                del self._known[name]


def _num_bytes(task: asyncio.Task[Answer]) -> int:
    return 0 if task.cancelled() or task.exception() is not None else len(task.result().body)


# --- access ----------------------------------------------------------------------------------------------------------


class AccessMiddleware:
    """Middleware: checks the token before a byte of the body is read, and logs each request with its id in one line.

    Without a token the server listens to this machine alone, where a browser could still be sent by any web page: it
    names the page in `Origin`, or the page's host in `Host` if that was made to resolve to this machine.

    Args:
        app: the application behind it.
        token: null lets in whoever is on this machine and no browser.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app = app
        self.expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401 or 403, or lets the request through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        log_fields: dict[str, Any] = {"id": uuid4().hex}
        scope.setdefault("state", {})["log_fields"] = log_fields
        started, status = time.monotonic(), 500

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = log_fields["id"]
            await send(message)

        try:
            await (self._refusal(scope) or self.app)(scope, receive, send_named)
        finally:
            ms = round(1000 * (time.monotonic() - started), 1)
            # JSON: a path with line breaks cannot pass for a line of its own.
            log.info(
                json.dumps({**log_fields, "to": f"{scope['method']} {scope['path'][:200]}", "status": status, "ms": ms})
            )

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = dict(scope["headers"])
        if self.expected is None:
            if b"origin" not in headers and LOOPBACK_HOST.fullmatch(headers.get(b"host", b"")):
                return None
            return JSONResponse({"detail": "without a REWARD_TOKEN ask 127.0.0.1 or localhost, and no browser."}, 403)
        if scope["path"] == "/v1/health" or hmac.compare_digest(headers.get(b"authorization", b""), self.expected):
            return None
        refusal = {"detail": "send the server's token: `Authorization: Bearer <REWARD_TOKEN>`."}
        return JSONResponse(refusal, 401, {"WWW-Authenticate": "Bearer"})


# --- OpenAPI ---------------------------------------------------------------------------------------------------------

_REQUEST_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"request": {"$ref": "#/components/schemas/ScoreRequest"}},
                "required": ["request"],
                "propertyNames": {"pattern": PART_NAME},
                "additionalProperties": {
                    "type": "string",
                    "format": "binary",
                    "description": "one PNG, JPEG or WEBP file for every part that an item names",
                },
            },
            "encoding": {"request": {"contentType": "application/json"}},
        }
    },
}


def _error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in statuses}


def _openapi_schema(app: FastAPI, names: Sequence[str], token: str | None) -> dict[str, Any]:
    """Completes FastAPI's OpenAPI schema by the multipart body, the rewards' names and the token."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        body = ScoreRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        body["properties"]["reward"]["enum"] = list(names)
        schema["components"]["schemas"].update(body.pop("$defs"), ScoreRequest=body)
        if token is not None:
            schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            schema["paths"]["/v1/rewards"]["get"]["security"] = [{"token": []}]
            schema["paths"]["/v1/score"]["post"]["security"] = [{"token": []}]
        app.openapi_schema = schema
    return app.openapi_schema

"""The reward server as an ASGI application: its four addresses, who may use them, and answers that are given once."""

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
from rewards.serving.batching import Job, QueueFull, Scheduler
from rewards.serving.protocol import PART_NAME, Health, Problem, RewardInfo, RewardList, ScoreReply, ScoreRequest
from rewards.serving.requests import Budget, Limits, Share, busy, read_request

log = logging.getLogger("rewards.serving.server")

REMEMBERED = 512
"""Answers that are kept for clients that ask again."""
REMEMBERED_S = 600.0
"""How long they are kept, in seconds."""
LOOPBACK = re.compile(rb"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)
"""What `Host` holds where a client asks its own machine."""


def create_app(rewards: Mapping[str, Reward], limits: Limits, token: str | None = None) -> FastAPI:
    """The application; loads the rewards.

    Who serves it sets `app.state.stopping` when it stops, so that half-sent requests are dropped.

    Args:
        rewards: name -> reward; clients ask by this name.
        limits: what a client may ask.
        token: clients must send it as `Authorization: Bearer <token>`; null takes clients of this machine, no browsers.
    """
    infos = []
    for name, reward in rewards.items():
        reward.load()
        low, high = (value if math.isfinite(value) else None for value in reward.native_range)
        infos.append(RewardInfo(name=name, version=reward.version, native_range=(low, high), needs=list(reward.needs)))
    versions = {info.name: info.version for info in infos}
    listing = RewardList(
        schema=1,
        rewards=infos,
        max_items=limits.max_items,
        max_request_bytes=limits.max_request_bytes,
        max_pixels=limits.max_pixels,
    )
    schedulers = {
        name: Scheduler(
            reward,
            max_pixels=limits.max_pixels,
            max_batch_items=limits.max_batch_items,
            batch_wait_ms=limits.batch_wait_ms,
            queue_limit=limits.queue_limit,
        )
        for name, reward in rewards.items()
    }
    answers, budget, stopping = Answers(), Budget(limits.max_waiting_bytes), asyncio.Event()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for scheduler in schedulers.values():
            scheduler.start()
        yield
        for scheduler in schedulers.values():
            await asyncio.to_thread(scheduler.close)

    app = FastAPI(title="Rewards", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.stopping = stopping
    app.add_middleware(Gate, token=token)

    @app.get("/v1/health", responses=_problems(403, 405))
    async def health() -> Health:
        """Whether the server takes requests, and how busy it is. Needs no token."""
        return Health(
            ready=all(scheduler.ready for scheduler in schedulers.values()),
            in_flight=answers.in_flight,
            queue=sum(scheduler.waiting for scheduler in schedulers.values()),
        )

    @app.get("/v1/rewards", responses=_problems(401, 403, 405))
    async def listed() -> RewardList:
        """The rewards that can be asked for."""
        return listing

    @app.post(
        "/v1/score",
        response_model=ScoreReply,
        responses=_problems(400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 503),
        openapi_extra={"requestBody": _BODY},
    )
    async def score(request: Request) -> Response:
        """Scores images. An item that cannot be scored is invalid; the others are scored all the same."""
        with Share(budget) as share:  # held until the answer is there, even if the client leaves
            ask, jobs, digest = await read_request(request, limits, share, stopping)
            request.state.note.update(id=str(ask.id), reward=ask.reward[:200], items=len(jobs))
            if ask.reward not in schedulers:
                known = ", ".join(sorted(schedulers))
                raise HTTPException(404, f"there is no reward {ask.reward[:80]!r}: ask for one of {known}.")
            reply = await answers.once(
                ask.id, digest, lambda: _score(ask, jobs, schedulers[ask.reward], versions[ask.reward])
            )
        request.state.note.update(invalid=reply.invalid)
        return Response(reply.body, media_type="application/json")

    app.openapi = lambda: _openapi(app, list(schedulers), token)  # type: ignore[method-assign]
    return app


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """A reply as bytes, and how many of its items are invalid."""

    body: bytes
    invalid: int


async def _score(ask: ScoreRequest, jobs: Sequence[Job], scheduler: Scheduler, version: str) -> Answer:
    try:
        scheduler.submit(jobs)
        results = await asyncio.gather(*(asyncio.wrap_future(job.result) for job in jobs))
    except QueueFull as error:
        raise busy("too many items wait for this reward") from error
    except RewardUnavailable as error:
        raise busy("the scorer is unavailable") from error
    reply = ScoreReply(schema=1, id=ask.id, reward_version=version, results=results)
    return Answer(reply.model_dump_json(by_alias=True).encode(), sum(not result.valid for result in results))


class Answers:
    """Gives the request that comes twice, as it does after a lost connection, the first one's answer.

    Lives on the event loop alone, so it needs no lock.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[UUID, tuple[bytes, float, asyncio.Task[Answer]]] = OrderedDict()
        self.in_flight = 0

    async def once(self, name: UUID, digest: bytes, start: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
        """The answer to this request, of which `start` is run once.

        Raises:
            HTTPException: 409 if the id was given to another request.
        """
        now = time.monotonic()
        excess = len(self._known) - REMEMBERED
        for other, (_, since, task) in list(self._known.items()):  # the oldest first
            if task.done() and (excess > 0 or since < now - REMEMBERED_S):  # what is under way must not start twice
                del self._known[other]
                excess -= 1
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
        if task.cancelled() or task.exception() is not None:  # to come again must be worth it
            if name in self._known and self._known[name][2] is task:
                del self._known[name]


# --- who may come in --------------------------------------------------------------------------------------------------


class Gate:
    """Asks for the token before a byte of the body is read; names and logs every request in one line.

    Without a token the server listens to this machine alone, where a browser could still be sent by any web page: it
    names the page in `Origin`, or the page's host in `Host` if that was made to resolve to this machine.

    Args:
        app: what is behind the gate.
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
        note: dict[str, Any] = {"id": uuid4().hex}
        scope.setdefault("state", {})["note"] = note
        started, status = time.monotonic(), 500

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = note["id"]
            await send(message)

        try:
            await (self._refusal(scope) or self.app)(scope, receive, send_named)
        finally:
            ms = round(1000 * (time.monotonic() - started), 1)
            # JSON: a path with line breaks cannot pass for a line of its own.
            log.info(json.dumps({**note, "to": f"{scope['method']} {scope['path'][:200]}", "status": status, "ms": ms}))

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = dict(scope["headers"])
        if self.expected is None:
            if b"origin" not in headers and LOOPBACK.fullmatch(headers.get(b"host", b"")):
                return None
            return JSONResponse({"detail": "without a REWARD_TOKEN ask 127.0.0.1 or localhost, and no browser."}, 403)
        if scope["path"] == "/v1/health" or hmac.compare_digest(headers.get(b"authorization", b""), self.expected):
            return None
        refusal = {"detail": "send the server's token: `Authorization: Bearer <REWARD_TOKEN>`."}
        return JSONResponse(refusal, 401, {"WWW-Authenticate": "Bearer"})


# --- what OpenAPI says ------------------------------------------------------------------------------------------------

_BODY = {
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


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in statuses}


def _openapi(app: FastAPI, names: Sequence[str], token: str | None) -> dict[str, Any]:
    """FastAPI's description, with what it cannot know: the multipart body, the rewards and the token."""
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

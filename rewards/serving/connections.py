"""`Connection`: uvicorn's HTTP protocol, with bounds on what a client takes that has no request under way."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from rewards.serving.requests import Limits


class Connection(H11Protocol):
    """HTTP connection that ends if no request is under way on it for `header_timeout`, or if others need its place.

    uvicorn itself waits for ever for the rest of a header, for the body of a request that it has refused, and for a
    client that does not fetch its answer; and it refuses all others once such connections are too many.

    Args:
        limits: bounds of the server.
        uvicorn: what uvicorn gives its protocols.
    """

    def __init__(self, limits: Limits, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self.limits = limits
        self._end: asyncio.TimerHandle | None = None  # set while no request is under way
        self._dropped = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins the wait for a header; at `max_connections`, ends the connection that has waited longest."""
        waiting = [one for one in self.connections if isinstance(one, Connection) and one._end is not None]
        if waiting and len(self.connections) >= self.limits.max_connections:
            min(waiting, key=lambda one: one._end.when() if one._end else 0.0)._cut()
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clock."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Drops the rest of a body whose request is answered already, up to the size of one request.

        A client that is cut off while it sends may never see the answer.
        """
        if self._answered and self.conn.their_state is h11.SEND_BODY:
            self._dropped += len(data)
            if self._dropped > self.limits.max_request_bytes:
                self._cut()
                return
        super().data_received(data)

    def handle_events(self) -> None:
        """Stops the clock once a request's header is there."""
        super().handle_events()
        if self.cycle is not None and not self._answered:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Begins the wait for the next request, unless it is there."""
        super().on_response_complete()
        if self._answered:
            self._wait()

    @property
    def _answered(self) -> bool:
        return self.cycle is not None and self.cycle.response_complete

    def _wait(self) -> None:
        self._dropped = 0
        self._end = self.loop.call_later(self.limits.header_timeout, self._cut)

    def _stop_waiting(self) -> None:
        if self._end is not None:
            self._end.cancel()
            self._end = None

    def _cut(self) -> None:
        self._stop_waiting()
        self.connections.discard(self)  # now, since asyncio says that it is lost only after further ones are made
        self.transport.abort()

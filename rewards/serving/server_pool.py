"""Client for a pool of equal reward servers: round robin, cool-down after a failure, retries with backoff."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from datamodules.parsing import parse_json
from rewards.base import RewardUnavailable
from rewards.retries import TransientError, parse_retry_after, retrying

MAX_PAUSE_S = 30.0
MAX_REPLY_BYTES = 16 * 2**20
COME_AGAIN = (408, 425, 429)
"""Statuses from 400 to 499 that do not refuse the request itself."""

Reply = TypeVar("Reply")


class NoAnswer(RuntimeError):
    """Raised if no server answered a request; the message says what happened last, without a full stop."""


@dataclass(frozen=True)
class Answer:
    """A server's whole answer; `retry_after` is how long it asks the client to wait, in seconds."""

    status: int
    body: bytes
    retry_after: float


class ServerPool:
    """Sends requests to one of several servers. May be used from several threads at once.

    Args:
        urls: the servers' addresses, without a final slash.
        timeout: longest time for one attempt, from the connection to the answer's last byte, in seconds.
        retries: how often a request is sent again.
        backoff: pause before the first retry, in seconds.
        cooldown: how long a server that cannot be reached is left out, in seconds.
        token: sent as bearer token; null sends none.
        token_env: where the token comes from, for the error that asks for it.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout: float,
        retries: int,
        backoff: float,
        cooldown: float,
        token: str | None,
        token_env: str,
    ) -> None:
        self.urls = urls
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.cooldown = cooldown
        self.token_env = token_env
        self._cooling_until: dict[str, float] = {}  # url -> end of its cool-down, in time.monotonic()
        self._turn = 0
        self._lock = threading.Lock()
        self._random = random.Random()  # of its own: the global generators belong to the training's seed
        self._client = httpx.Client(
            headers={} if token is None else {"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 5.0), pool=None),
            # None is kept: `_Deadline` must see each one open, and a server may drop one that idles through a step.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,  # a proxy of the environment does not lead to a server on this machine
        )

    def close(self) -> None:
        """Closes all connections to the servers."""
        self._client.close()

    def get(self, path: str) -> dict[str, bytes]:
        """Sends a GET to every server; leaves those that cannot be reached out until their cool-down is over.

        Returns:
            url -> body of the answer, of the servers that answered.

        Raises:
            ValueError: if none can be reached, or one refuses.
        """
        bodies: dict[str, bytes] = {}
        problems = []
        for url in self.urls:
            try:
                answer = self._send("GET", url, path)
            except (httpx.RequestError, httpx.InvalidURL) as error:
                self._cool_down(url)
                problems.append(_describe(url, error))
                continue
            except TransientError as error:
                problems.append(str(error))
                continue
            if refusal := self._refusal(url, answer):
                raise ValueError(refusal)
            if answer.status == 200:
                bodies[url] = answer.body
            else:
                problems.append(f"{url} answered {answer.status}{_error_detail(answer)}")
        if not bodies:
            raise ValueError(f"no reward server answers: {'; '.join(problems)}; start it or correct `urls`.")
        return bodies

    def post(
        self,
        path: str,
        files: Any,
        given_up: threading.Event,
        read: Callable[[str, bytes], Reply],
        max_bytes: int = MAX_REPLY_BYTES,
    ) -> tuple[str, Reply]:
        """Sends a request until a server answers it well; the servers see the same bytes each time.

        Args:
            path: path of the address, such as `/v1/score`.
            files: the parts of a multipart body, as httpx takes them.
            given_up: once it is set, there are no more retries.
            read: reads the body of a server's answer; raises TransientError for a bad one.
            max_bytes: largest answer that is read.

        Returns:
            The server that answered, and what `read` made of its answer.

        Raises:
            NoAnswer: if no server answered, or not well.
            RewardUnavailable: if one refused the request as wrong, which no retry mends.
        """

        def sleep(seconds: float) -> None:
            if given_up.wait(seconds):
                raise NoAnswer("the call was given up")

        retry = retrying(
            self.retries,
            self.backoff,
            MAX_PAUSE_S,
            # keeps many clients from coming again all at once
            jitter=lambda: self._random.uniform(0.5, 1.5),
            sleep=sleep,
        )
        try:
            return retry(self._post_once, path, files, read, max_bytes)
        except TransientError as error:
            raise NoAnswer(f"{error}, tried {self.retries + 1} times") from error

    def _post_once(
        self, path: str, files: Any, read: Callable[[str, bytes], Reply], max_bytes: int
    ) -> tuple[str, Reply]:
        """Sends a request to the server whose turn it is, or to the next ones while none can be reached."""
        failure: TransientError | None = None
        for url in self._next_urls():
            try:
                answer = self._send("POST", url, path, files, max_bytes)
            except httpx.RequestError as error:
                failure = TransientError(_describe(url, error))
                if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
                    break  # it lives, but is slow
                self._cool_down(url)
                continue  # another one may be there: no need to wait
            if refusal := self._refusal(url, answer):
                raise RewardUnavailable(refusal)
            if answer.status == 200:
                self._cooling_until.pop(url, None)
                return url, read(url, answer.body)
            # Not the server's own words, perhaps: a proxy's redirect, or its page for a server that just restarts.
            raise TransientError(f"{url} answered {answer.status}{_error_detail(answer)}", answer.retry_after)
        assert failure is not None  # there is at least one server
        raise failure

    def _next_urls(self) -> list[str]:
        """Urls from the next one in turn, without those in cool-down unless all are."""
        with self._lock:
            self._turn += 1
            start = self._turn % len(self.urls)
        order = [*self.urls[start:], *self.urls[:start]]
        now = time.monotonic()
        return [url for url in order if self._cooling_until.get(url, now) <= now] or order

    def _cool_down(self, url: str) -> None:
        self._cooling_until[url] = time.monotonic() + self.cooldown

    def _refusal(self, url: str, answer: Answer) -> str:
        """Returns the error message for an answer that no retry mends; empty for other answers."""
        if answer.status in (401, 403):
            return f"{url} wants a token or has another one: set {self.token_env} to the server's REWARD_TOKEN."
        if 400 <= answer.status < 500 and answer.status not in COME_AGAIN:
            return f"{url} refused the request with status {answer.status}{_error_detail(answer)}"
        return ""

    def _send(self, method: str, url: str, path: str, files: Any = None, max_bytes: int = MAX_REPLY_BYTES) -> Answer:
        """Sends a request once, bounded in time and in the bytes of the answer.

        Raises:
            httpx.RequestError: if there is no whole answer within `timeout`.
            TransientError: if the answer is too large.
        """
        deadline = _Deadline(self.timeout)
        timed_out = httpx.ReadTimeout(f"no whole answer within {self.timeout:g} s")
        body = bytearray()
        try:
            with self._client.stream(method, url + path, files=files, extensions={"trace": deadline.trace}) as response:
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > max_bytes:
                        raise TransientError(f"{url} sent an answer of over {max_bytes} bytes")
        except httpx.RequestError as error:
            if deadline.expired.is_set():
                raise timed_out from error
            raise
        finally:
            deadline.cancel()
        if deadline.expired.is_set():  # a body without a length seems whole when it is cut
            raise timed_out
        return Answer(
            response.status_code, bytes(body), parse_retry_after(response.headers.get("Retry-After"), MAX_PAUSE_S)
        )


class _Deadline:
    """Cuts a request's connection when its time is over; the HTTP library bounds only the wait for each next byte.

    Args:
        seconds: time from now.
    """

    def __init__(self, seconds: float) -> None:
        self.expired = threading.Event()
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True
        self._timer.start()

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Trace hook of the HTTP library: keeps the request's socket for `_cut`."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = info["return_value"].get_extra_info("socket")
            if self.expired.is_set():
                self._cut()

    def cancel(self) -> None:
        """Stops the timer, once the request is over."""
        self._timer.cancel()

    def _cut(self) -> None:
        self.expired.set()
        if self._socket is not None:
            with suppress(OSError):  # closed already
                self._socket.shutdown(socket.SHUT_RDWR)


def _describe(url: str, error: Exception) -> str:
    said = " ".join(str(error).split())[:200]  # what a client's library quotes of an answer has no end
    return f"{url} failed with {type(error).__name__}{f' ({said})' if said else ''}"


def _error_detail(answer: Answer) -> str:
    """Returns the error message in an answer's body as `: message`; empty if there is none."""
    try:
        detail = str(parse_json(answer.body.decode(), "the answer")["detail"])
    except (ValueError, KeyError, TypeError):  # an answer of something else, such as a proxy
        return ""
    return f": {' '.join(detail.split())[:300]}"

"""Several servers that do the same: they take turns, the dead rest, and requests come again until one answers."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx

MAX_PAUSE_S = 30.0
COME_AGAIN = (502, 503, 504)


class NoAnswer(RuntimeError):
    """A request stayed without an answer; the message says what happened last, without a full stop."""


class Servers:
    """Sends requests to one of several servers. May be used from several threads at once.

    Args:
        urls: the servers' addresses, without a final slash.
        timeout: longest wait for one answer, in seconds.
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
        self._resting: dict[str, float] = {}  # url -> end of its rest
        self._turn = 0
        self._lock = threading.Lock()
        self._random = random.Random()  # of its own: the global generators belong to the training's seed
        self._client = httpx.Client(
            headers={} if token is None else {"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 5.0), pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
            trust_env=False,  # a proxy of the environment does not lead to a server on this machine
        )

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def get(self, path: str) -> dict[str, bytes]:
        """What every server that can be reached answers; the others rest.

        Raises:
            ValueError: if none can be reached, or one refuses.
        """
        bodies: dict[str, bytes] = {}
        problems = []
        for url in self.urls:
            try:
                response = self._client.get(url + path)
            except (httpx.TransportError, httpx.InvalidURL) as error:
                self._rest(url)
                problems.append(_what(url, error))
                continue
            self._check(url, response)
            if response.status_code == 200:
                bodies[url] = response.content
            else:
                problems.append(f"{url} answered {response.status_code}")
        if not bodies:
            raise ValueError(f"no reward server answers: {'; '.join(problems)}; start it or correct `urls`.")
        return bodies

    def post(self, path: str, files: Any, given_up: threading.Event) -> tuple[str, bytes]:
        """Sends a request until a server answers it; the servers see the same bytes each time.

        Args:
            path: where to.
            files: the parts of a multipart body, as httpx takes them.
            given_up: no more retries once it is set.

        Returns:
            The server that answered, and the body of its answer.

        Raises:
            NoAnswer: if none did.
            ValueError: if one refused the request as wrong.
        """
        problem, pause = "", 0.0
        for attempt in range(self.retries + 1):
            if attempt and given_up.wait(max(pause, self._pause(attempt))):
                break
            for url in self._in_turn():
                try:
                    response = self._client.post(url + path, files=files)
                except httpx.TransportError as error:
                    problem, pause = _what(url, error), 0.0
                    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
                        break  # it lives, but is slow
                    self._rest(url)
                    continue  # another one may be there: no need to wait
                self._check(url, response)
                if response.status_code == 200:
                    self._resting.pop(url, None)
                    return url, response.content
                problem, pause = f"{url} answered {response.status_code}{_detail(response)}", _retry_after(response)
                if response.status_code not in COME_AGAIN:
                    raise NoAnswer(problem)
                break
        raise NoAnswer(f"{problem}, tried {attempt + 1} times")

    def _in_turn(self) -> list[str]:
        """The servers, the one whose turn it is first, without those that rest unless all do."""
        with self._lock:
            self._turn += 1
            start = self._turn % len(self.urls)
        order = [*self.urls[start:], *self.urls[:start]]
        now = time.monotonic()
        return [url for url in order if self._resting.get(url, now) <= now] or order

    def _rest(self, url: str) -> None:
        self._resting[url] = time.monotonic() + self.cooldown

    def _pause(self, attempt: int) -> float:
        """Seconds before a retry; the chance in it keeps many clients from coming again all at once."""
        return float(min(MAX_PAUSE_S, self.backoff * 2 ** (attempt - 1))) * self._random.uniform(0.5, 1.5)

    def _check(self, url: str, response: httpx.Response) -> None:
        """Raises a ValueError for what no retry mends."""
        if response.status_code in (401, 403):
            raise ValueError(
                f"{url} wants a token or has another one: set {self.token_env} to the server's REWARD_TOKEN."
            )
        if 300 <= response.status_code < 500:
            raise ValueError(f"{url} refused the request with status {response.status_code}{_detail(response)}")


def _what(url: str, error: Exception) -> str:
    return f"{url} failed with {type(error).__name__}{f' ({error})' if str(error) else ''}"


def _detail(response: httpx.Response) -> str:
    """What the server says about it, in one line."""
    try:
        detail = str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):  # an answer of something else, such as a proxy
        return ""
    return f": {' '.join(detail.split())[:300]}"


def _retry_after(response: httpx.Response) -> float:
    """The pause that the server asks for, in seconds."""
    text = response.headers.get("Retry-After", "")
    return min(float(text), MAX_PAUSE_S) if text.isdecimal() else 0.0

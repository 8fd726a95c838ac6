"""Retries of HTTP requests to reward servers and judges: tenacity with backoff that honours `Retry-After`."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential


class TransientError(RuntimeError):
    """A failed attempt at a request that may succeed later.

    Args:
        problem: what happened, without a full stop.
        retry_after: seconds that the server asks the client to wait.
    """

    def __init__(self, problem: str, retry_after: float = 0.0) -> None:
        super().__init__(problem)
        self.retry_after = retry_after


def retrying(
    retries: int,
    backoff: float,
    longest: float,
    *,
    jitter: Callable[[], float] = lambda: 1.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Retrying:
    """Builds a caller that repeats a function while it raises TransientError, and lets the last one through.

    The pause before retry k (from 1) is `backoff * 2**(k - 1) * jitter()` seconds, or the server's Retry-After if that
    is longer.

    Args:
        retries: further attempts after the first.
        backoff: pause before the first retry, in seconds.
        longest: bound of the exponential pause, in seconds.
        jitter: random factor of the pause; the default is 1.
        sleep: waits so many seconds; may raise to end the retries.
    """
    exponential = wait_exponential(backoff, max=longest)

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        assert isinstance(error, TransientError)
        return max(exponential(state) * jitter(), error.retry_after)

    retry = retry_if_exception_type(TransientError)
    return Retrying(sleep=sleep, stop=stop_after_attempt(retries + 1), wait=wait, retry=retry, reraise=True)


def parse_retry_after(value: str | None, longest: float) -> float:
    """Seconds that a Retry-After header asks for, from 0 to `longest`; 0 if there is none or it cannot be read.

    Args:
        value: the header, which holds seconds or a date (RFC 9110, Sec. 10.2.3).
        longest: bound of the result, in seconds.

    >>> parse_retry_after("7", 30.0), parse_retry_after("3600", 30.0), parse_retry_after("later", 30.0)
    (7.0, 30.0, 0.0)
    """
    if not value:
        return 0.0
    try:
        seconds = float(value) if value.strip().isdecimal() else _seconds_until(value)
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), longest)


def _seconds_until(date: str) -> float:
    when = parsedate_to_datetime(date)
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()

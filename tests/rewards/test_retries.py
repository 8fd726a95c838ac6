"""Retries: how often, after which pauses, and what a Retry-After header asks for."""

from __future__ import annotations

import pytest

from rewards.retries import TransientError, parse_retry_after, retrying


def test_pauses_and_the_last_error() -> None:
    """Five attempts: backoffs 1, 2, 4 and 4 s (bounded) times a jitter of 1.5; the third gives way to Retry-After 9."""
    pauses: list[float] = []
    asked = iter([0.0, 0.0, 9.0, 0.0, 0.0])

    def fail() -> None:
        raise TransientError(f"failure {len(pauses) + 1}", next(asked))

    with pytest.raises(TransientError, match="failure 5"):
        retrying(4, backoff=1.0, longest=4.0, jitter=lambda: 1.5, sleep=pauses.append)(fail)
    assert pauses == [1.5, 3.0, 9.0, 6.0]


def test_other_errors_and_results_come_at_once() -> None:
    def refuse() -> None:
        raise ValueError("refused")

    caller = retrying(3, backoff=1.0, longest=4.0, sleep=lambda _: pytest.fail("no pause is due"))
    with pytest.raises(ValueError, match="refused"):
        caller(refuse)
    assert caller(lambda: 7) == 7


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("5", 5),
        ("1e2", 0),
        ("²", 0),
        ("-3", 0),
        ("99999", 60),
        ("Wed, 01 Jan 2020 00:00:00 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 60),
        ("Fri, 31 Dec 9999 23:59:59 -0000", 60),  # an offset that means: no zone, so UTC
        ("tomorrow", 0),
    ],
)
def test_retry_after(value: str | None, seconds: float) -> None:
    assert parse_retry_after(value, 60.0) == seconds

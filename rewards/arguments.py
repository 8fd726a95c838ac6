"""Checks of constructor arguments that several rewards share."""

from __future__ import annotations

import math
from typing import Literal, get_args
from urllib.parse import urlsplit

OnFailure = Literal["skip", "fail"]
"""Policy once the retries of a request are used up: the image's score is invalid, or RewardUnavailable is raised."""


def check_minimum(owner: str, minimum: float, /, **arguments: float | None) -> None:
    """Raises ValueError if an argument is below its minimum or not finite; null is allowed.

    >>> check_minimum("PickScoreReward", 1, batch_size=0)
    Traceback (most recent call last):
        ...
    ValueError: PickScoreReward has batch_size=0, use at least 1.
    """
    for name, value in arguments.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{owner} has {name}={value}, use a finite number.")
        if value is not None and value < minimum:
            raise ValueError(f"{owner} has {name}={value}, use at least {minimum:g}.")


def check_on_failure(owner: str, on_failure: str) -> None:
    """Raises ValueError if a failure policy is neither `skip` nor `fail`."""
    if on_failure not in get_args(OnFailure):
        raise ValueError(f"{owner} has on_failure={on_failure!r}, use skip or fail.")


def checked_url(owner: str, name: str, url: str, example: str, secret: str) -> str:
    """Returns the address of a server without a final slash.

    Args:
        owner: name of the class, for the error.
        name: name of the argument.
        url: its value.
        example: address that is right.
        secret: name of the argument that brings a secret.

    Raises:
        ValueError: if it is no address, or holds a user, a password or a query, which it does not quote.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (raises if it is no number)
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
        private = "@" in parts.netloc or bool(parts.query)
    except ValueError:
        good = private = False
    if private or (not good and "@" in url):  # not quoted: it would end up in logs, as would every later error
        raise ValueError(f"{owner}'s {name} holds a user name or a query: give the secret by {secret} instead.")
    if not good:
        raise ValueError(f"{owner} has {name}={url!r}, use one such as {example}.")
    return url.rstrip("/")

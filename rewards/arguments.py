"""Checks of constructor arguments that several rewards share."""

from __future__ import annotations

import math
from typing import Literal, get_args

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

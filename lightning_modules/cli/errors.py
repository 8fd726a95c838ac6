"""Errors that end the `lightning` command in one line."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from datamodules.masked import masked
from rewards.calls import OUR_PACKAGES


def complain(message: str) -> int:
    """Prints an error to standard error as one line.

    Returns:
        The exit status of a command that was used wrongly, 2.
    """
    name = Path(sys.argv[0]).name
    print(f"{name if name == 'promptrl' else 'lightning'}: error: {masked(' '.join(message.split()))}", file=sys.stderr)
    return 2


def raised_by_us(error: BaseException | None) -> ValueError | None:
    """The first ValueError in a chain of exceptions whose innermost frame is in one of our packages."""
    while error is not None:
        frames = list(traceback.walk_tb(error.__traceback__))
        package = frames[-1][0].f_globals.get("__name__", "").split(".")[0] if frames else ""
        if isinstance(error, ValueError) and package in OUR_PACKAGES:
            return error
        error = error.__cause__ or error.__context__
    return None

"""Check of settings that name a folder or a file of this machine."""

from __future__ import annotations

import re
from pathlib import Path


def local_path(name: str | Path, setting: str) -> Path:
    """Returns the path that a setting names.

    Args:
        name: path of a file or folder, which need not exist.
        setting: name of the setting, for the error.

    Raises:
        ValueError: if it is an address, of which a path would make a folder called `hf:` or `s3:`.

    >>> local_path("s3://bucket/runs", "trainer.default_root_dir")
    Traceback (most recent call last):
        ...
    ValueError: trainer.default_root_dir is s3://bucket/runs, an address: give a path on this machine.
    """
    # A path has had one of the two slashes taken away; a drive of Windows has one letter.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(name)):
        raise ValueError(f"{setting} is {name}, an address: give a path on this machine.")
    return Path(name)

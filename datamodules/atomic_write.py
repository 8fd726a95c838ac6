"""Files and folders that are written as a whole or not at all, so that a killed run leaves no half of one."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file, or replaces it, in one piece; its folder is made if it is missing.

    Whatever fails, `path` keeps what it held before, and nothing else is left in its folder.

    Args:
        path: the file.
        content: text (written as UTF-8) or bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, as only a rename within one file system is atomic; others may write the same file meanwhile.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Context manager: yields an empty folder, which takes the place of `folder` when the block ends without an error.

    Until then, and if the block fails, `folder` stays as it was. What an earlier, killed process left unfinished is
    removed.
    """
    new, old = unfinished(folder), folder.with_name(f".{folder.name}.old")
    _tidy(folder, new, old)
    new.mkdir(parents=True)
    try:
        yield new
        if folder.exists():  # a folder that is not empty cannot be replaced by one rename
            folder.rename(old)
        new.rename(folder)
    finally:
        _tidy(folder, new, old)


def unfinished(folder: Path) -> Path:
    """Returns the folder that `replaced_folder` yields, for other processes that write to it."""
    return folder.with_name(f".{folder.name}.unfinished")


def _tidy(folder: Path, new: Path, old: Path) -> None:
    """Removes what a replacement left beside its folder, which it puts back if it was moved away and not replaced."""
    if old.exists() and not folder.exists():
        old.rename(folder)
    for rest in (new, old):
        shutil.rmtree(rest, ignore_errors=True)

"""Files and folders that are written as a whole or not at all, so that a killed run leaves no half of one."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file, or replaces it, in one piece; its folder is made if it is missing.

    Whatever fails, `path` keeps what it held before, and nothing else is left in its folder.

    Args:
        path: the file.
        content: text (written as UTF-8) or bytes.
    """
    with replaced_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """Context manager: yields an empty file, which takes the place of `path` when the block ends without an error.

    Until then, and if the block or the disk fails, `path` stays as it was; a killed process leaves a hidden file for
    `remove_strays`. Its folder is made if it is missing.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    # In the same folder, as only a rename within one file system is atomic; others may write the same file meanwhile.
    new = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(new) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(new, path)
            _sync(path.parent)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context manager: what cannot be written is an OSError that names a file, `path` if it names none itself."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        failed: BaseException | None = error
        while not (failed is None or isinstance(failed, OSError)):
            failed = failed.__context__  # torch.save raises its own errors behind it
        if failed is None or failed.errno is None:
            raise
        raise OSError(failed.errno, failed.strerror, failed.filename or str(path)) from error


def remove_strays(folder: Path, *, deep: bool = False) -> None:
    """Removes what killed processes left unfinished in a folder, but nothing that another process is writing.

    Args:
        folder: the folder, which need not exist.
        deep: also in all folders below.
    """
    for pattern in (".*.tmp", ".*.unfinished"):
        for path in list(folder.rglob(pattern) if deep else folder.glob(pattern)):
            with suppress(OSError):  # it is being written, was finished just now, or its file system has no locks
                holder = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                finally:
                    os.close(holder)


def _locked(path: Path) -> BinaryIO:
    """Opens a new file and locks it as long as it is open, for `remove_strays` to see that somebody writes it."""
    while True:
        file = path.open("wb")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # removed as a stray before it was locked


def _sync(path: Path) -> None:
    """Makes a file, or the names in a folder, last through a crash of the machine."""
    holder = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot
            os.fsync(holder)
    finally:
        os.close(holder)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Context manager: yields an empty folder, which takes the place of `folder` when the block ends without an error.

    Until then, and if the block fails, `folder` stays as it was. What an earlier, killed process left unfinished is
    removed.

    Raises:
        OSError: naming a file, or `folder`, if it cannot be written.
    """
    new, old = unfinished(folder), folder.with_name(f".{folder.name}.old")
    _tidy(folder, new, old)
    new.mkdir(parents=True)
    lock = os.open(new, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        with naming(folder):
            yield new
            for path in (new, *new.rglob("*")):
                _sync(path)
        if folder.exists():  # a folder that is not empty cannot be replaced by one rename
            folder.rename(old)
        new.rename(folder)
        _sync(folder.parent)
    finally:
        os.close(lock)
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

"""Command that brings public sets of prompts to where configurations read them: `python -m datamodules.fetch ocr`."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import DownloadColumn, Progress

from datamodules.atomic_write import write_atomically
from datamodules.public_sets import SETS, PublicFile

GITHUB = "https://raw.githubusercontent.com"


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; errors end it in one line.

    Args:
        args: the words of the command line; None takes the process's own.
    """
    parser = argparse.ArgumentParser(
        "python -m datamodules.fetch",
        description="Brings public sets of prompts, each file whole and checked or not at all.",
        epilog=_listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sets", nargs="+", choices=list(SETS), metavar="SET", help=f"one or more of {', '.join(SETS)}")
    parser.add_argument(
        "--to", type=Path, default=Path("data"), metavar="FOLDER", help="folder of all data (%(default)s)"
    )
    parser.add_argument(
        "--base", default=GITHUB, metavar="ADDRESS", help="of a mirror with the same paths (%(default)s)"
    )
    options = parser.parse_args(args)
    for name in dict.fromkeys(options.sets):
        for file in SETS[name].files:
            try:
                said = fetch(file, options.to, options.base)
            except ValueError as error:
                sys.exit(f"datamodules.fetch: error: {error}")
            print(f"{said} ({file.holds}; licence: {SETS[name].licence})")


def fetch(file: PublicFile, folder: Path, base: str = GITHUB) -> str:
    """Downloads a file unless it is there.

    Args:
        file: the file.
        folder: folder of all data.
        base: address below which the file lies at `file.source`.

    Returns:
        What was done, to be shown.

    Raises:
        ValueError: if another file is in its place, it cannot be had or written, or its content is not the known one.
    """
    path = folder / file.path
    address = f"{base.rstrip('/')}/{file.source}"
    try:
        if path.exists():
            if path.is_file() and blob_id(path.read_bytes()) == file.blob:
                return f"{path} is there already"
            raise ValueError(f"{path} is there and is another file: move it away, or name another folder by --to.")
        content = _download(address, path.name)
        if blob_id(content) != file.blob:
            raise ValueError(
                f"{address} is not the known file ({len(content):,} bytes of another content), and was not kept: try "
                "again, or fetch it by hand."
            )
        write_atomically(path, content)
    except OSError as error:
        raise ValueError(f"{error.filename or path} cannot be read or written: {error.strerror}.") from None
    return f"{path} is written"


def blob_id(content: bytes) -> str:
    """Returns git's id of a file's content (SHA-1 of its length and itself), which `git ls-tree` shows.

    >>> blob_id(b"hello")
    'b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0'
    """
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _download(address: str, name: str) -> bytes:
    parts = []
    try:
        with httpx.stream("GET", address, follow_redirects=True, timeout=30) as response:
            response.raise_for_status()
            # Packed for the way, a file has another length than the header says.
            size = 0 if "content-encoding" in response.headers else int(response.headers.get("content-length", 0))
            with Progress(*Progress.get_default_columns(), DownloadColumn(), console=Console(stderr=True)) as progress:
                bar = progress.add_task(name, total=size or None)
                for part in response.iter_bytes():
                    parts.append(part)
                    progress.advance(bar, len(part))
    except httpx.HTTPStatusError as error:
        status = f"{error.response.status_code} {error.response.reason_phrase}"
        raise ValueError(f"{address} answers {status}: give a mirror by --base, or fetch it by hand.") from None
    except (httpx.HTTPError, httpx.InvalidURL, ImportError, ValueError) as error:  # the last two: unusable proxies
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{address} cannot be reached ({reason}): check the network and its proxies, give a mirror by --base, or "
            "fetch it by hand."
        ) from None
    return b"".join(parts)


def _listing() -> str:
    lines = []
    for name, known in SETS.items():
        lines.append(f"{name} (licence: {known.licence})")
        lines += [f"  {file.path}: {file.holds}\n    {GITHUB}/{file.source}" for file in known.files]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

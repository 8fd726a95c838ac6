"""`python -m datamodules.fetch`, against a server of this machine: files come whole and checked, or not at all."""

from __future__ import annotations

import errno
import gzip
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from datamodules import fetch
from datamodules.fetch import blob_id, main
from datamodules.public_sets import SETS, PublicFile, PublicSet, origin

PROMPTS = b"a cat\n" * 50_000
OTHER = b"a dog\n"


class Handler(BaseHTTPRequestHandler):
    """Serves the prompts at `/o/r/c/good`, and faults at other paths."""

    def do_GET(self) -> None:
        kind = self.path.rpartition("/")[2]
        body = {"good": PROMPTS, "half": PROMPTS, "packed": gzip.compress(PROMPTS), "changed": OTHER}.get(kind)
        if kind == "moved":
            self.send_response(302)
            self.send_header("Location", "/o/r/c/good")
        else:
            self.send_response(404 if body is None else 200)
        if kind == "packed":
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write((body or b"")[: 1000 if kind == "half" else None])

    def log_message(self, *args: object) -> None:
        """Prints nothing."""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for kind in ("good", "half", "packed", "changed", "moved", "gone"):
        file = PublicFile("s/train.txt", f"o/r/c/{kind}", blob_id(PROMPTS), "50,000 prompts")
        monkeypatch.setitem(SETS, kind, PublicSet("MIT", (file,)))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def complaint(*words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    said = str(stopped.value.code)
    assert said.startswith("datamodules.fetch: error: ") and "\n" not in said
    return said


@pytest.mark.parametrize("kind", ["good", "packed", "moved"])
def test_a_file_is_fetched_once(
    kind: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s" / "train.txt"
    main([kind, "--base", f"{base}/", "--to", str(tmp_path)])
    assert capsys.readouterr().out == f"{path} is written (50,000 prompts; licence: MIT)\n"
    assert path.read_bytes() == PROMPTS and list(tmp_path.rglob("*.*")) == [path]
    monkeypatch.setattr(fetch, "_download", None)  # what is there is not asked for
    main([kind, "--to", str(tmp_path)])
    assert capsys.readouterr().out.startswith(f"{path} is there already")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gone", "/o/r/c/gone answers 404 Not Found: give a mirror by --base"),
        ("half", "/o/r/c/half cannot be reached (peer closed connection without sending complete message body"),
        ("changed", "/o/r/c/changed is not the known file (6 bytes of another content), and was not kept"),
    ],
)
def test_nothing_is_left_of_a_failure(kind: str, said: str, base: str, tmp_path: Path) -> None:
    assert said in complaint(kind, "--base", base, "--to", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_another_file_stays(base: str, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "train.txt").write_bytes(OTHER)
    said = complaint("good", "--base", base, "--to", str(tmp_path))
    assert f"{tmp_path}/s/train.txt is there and is another file: move it away" in said
    assert (tmp_path / "s" / "train.txt").read_bytes() == OTHER


def test_a_full_disk_is_said(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    said = complaint("good", "--base", base, "--to", str(tmp_path))
    assert f"{tmp_path}/s/train.txt cannot be read or written: No space left on device." in said
    assert not list((tmp_path / "s").iterdir())


def test_proxies_are_those_of_the_environment(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    assert "cannot be reached ([Errno 111] Connection refused)" in complaint(
        "good", "--base", base, "--to", str(tmp_path)
    )
    monkeypatch.setenv("http_proxy", base)  # asked for whole addresses, of which the handler reads the end
    main(["good", "--base", "http://nowhere.invalid", "--to", str(tmp_path)])
    assert (tmp_path / "s" / "train.txt").read_bytes() == PROMPTS


def test_the_listing_names_address_and_licence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for known in SETS.values():
        for file in known.files:
            assert f"{file.path}: {file.holds}\n    https://raw.githubusercontent.com/{file.source}" in said


def test_a_missing_file_names_the_command() -> None:
    brings = "brings it (553 prompts, 85 kB; licence: MIT)"
    name = "geneval/evaluation_metadata.jsonl"
    assert origin(Path("data", name)) == f"`python -m datamodules.fetch geneval` {brings}"
    assert origin(Path("/my data", name)) == f"`python -m datamodules.fetch geneval --to '/my data'` {brings}"
    assert origin(Path("data/edit/dev.jsonl")) == "docs/data.md says where it comes from"
    assert origin(Path("mine/train.jsonl")) is None and origin(Path("train.txt")) is None


def test_configurations_read_what_is_fetched() -> None:
    text = "".join(path.read_text() for path in Path("configs").rglob("*.yaml"))
    unread = {file.path for known in SETS.values() for file in known.files if f"data/{file.path}" not in text}
    assert unread == {"pickscore/test.txt"}  # DrawBench is evaluated there

"""A `python` whose imports are done: `python tests/preloaded.py SOCKET -m MODULE ARGUMENTS...` runs it 10 s sooner.

What it runs has a `sys.executable` of the same kind, for children of its own.

The server behind the socket is a fork of the process that runs the tests, and forks for each client. The client passes
signals on and ends with the fork's status, so that to its parent it is the program; it imports little, on purpose.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def serve(path: Path) -> None:
    """Forks for each client that connects to the Unix socket at a path, until this process is killed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks that serve a client
    python, again = path.with_name("python"), f"exec {sys.executable} -S {__file__} {path}"
    python.write_text(f'#!/bin/sh\n[ "$1" = -m ] && {again} "$@"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    sys.executable = str(python)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(32)
        while True:
            client, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _serve_one(client)
            client.close()


def _serve_one(client: socket.socket) -> None:
    """Runs what a client asks for in a fork, passes its signals on, and sends the status; never returns."""
    text, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    child = os.fork()
    if child == 0:
        client.close()
        _run(json.loads(text), streams)
    for stream in streams:
        os.close(stream)
    if os.fork() == 0:
        while number := client.recv(4):
            os.kill(child, struct.unpack("i", number)[0])
        os.kill(child, signal.SIGKILL)  # the client is gone: it was killed, or the child has ended
        os._exit(0)
    _, status = os.waitpid(child, 0)
    client.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))
    client.shutdown(socket.SHUT_RDWR)
    os._exit(0)


def _run(asked: dict[str, Any], streams: Sequence[int]) -> None:
    import runpy

    from tests.forked import become

    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    _, module, *arguments = asked["arguments"]
    sys.argv = [module, *arguments]
    become(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True), streams)


def main() -> None:
    """Has the server run the arguments; ends as the program does."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(sys.argv[1])
        asked = {"arguments": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}
        socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
        for number in SIGNALS:
            signal.signal(number, lambda number, _: server.sendall(struct.pack("i", number)))
        answer = server.recv(4)
    status = struct.unpack("i", answer)[0] if answer else 1
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main()

"""Processes that start as copies of this one, so that nothing is imported a second time (7 to 13 s of processor)."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_modules.cli import main


class Forked:
    """A process that runs a function.

    Args:
        run: what it runs; its status is 0 when this returns, as `sys.exit` says, else 1.
        output: file that takes its standard output and error.
        env: variables that it has besides ours.
    """

    def __init__(self, run: Callable[[], object], output: Path, env: Mapping[str, str] | None = None) -> None:
        self.output = output
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.update(env or {})
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            become(run, (os.open(os.devnull, os.O_RDONLY), file, file))

    def wait(self, timeout: float = 240) -> int:
        """Waits for the end; returns the status, negative for a signal, as `subprocess` does."""
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"not done after {timeout} s:\n{self.text}")
            time.sleep(0.02)
        return status

    def poll(self) -> int | None:
        """Returns the status as `wait` does, None as long as it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Sends a signal and waits for the end."""
        os.kill(self.pid, number)
        return self.wait()

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(errors="replace")


def command(folder: Path, *options: str, processes: int = 1) -> list[Forked]:
    """Starts `lightning` with options, in as many processes as a launcher such as torchrun would.

    Args:
        folder: takes their output, `rank0.log` and so on.
        options: the words after `lightning`.
        processes: how many take part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    return [
        Forked(lambda: main(list(options)), folder / f"rank{rank}.log", launched(rank, processes, port))
        for rank in range(processes)
    ]


def run(folder: Path, *options: str, processes: int = 1) -> list[Forked]:
    """Runs `lightning` to its end; see `command`."""
    started = command(folder, *options, processes=processes)
    for one in started:
        one.wait()
    return started


def two_processes(work: Callable[..., object], *arguments: object) -> None:
    """Calls `work(rank, *arguments)` in two processes, in which trainers with two devices and DDP find each other."""
    port = free_port()
    with TemporaryDirectory() as folder:
        started = [
            Forked(partial(work, rank, *arguments), Path(folder) / f"rank{rank}.log", launched(rank, 2, port))
            for rank in range(2)
        ]
        for one in started:
            assert one.wait() == 0, one.text


def launched(rank: int, processes: int, port: int) -> dict[str, str]:
    """What a launcher tells a process, nothing if it is the only one."""
    if processes == 1:
        return {}
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
    }


def free_port() -> int:
    """Finds a port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def become(run: Callable[[], object], streams: Sequence[int]) -> None:
    """Makes this fork a process of its own that runs a function and ends with its status; never returns.

    Args:
        run: what it runs.
        streams: file descriptors of its standard input, output and error.
    """
    status = 1
    try:
        os.setsid()
        for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        run()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # nothing of the test runner's ends twice

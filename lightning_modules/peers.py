"""`Peers`: what one process of a run raises ends all of them, each with that process's sentence.

A process that failed takes no part in collectives any more, and the others would wait for it until the process group's
timeout, half an hour. Here process 0 passes news on over a TCP connection to each of the others: a process that fails
sends its sentence, and one that is killed loses its connection, which no busy process does.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed import distributed_c10d

GRACE = 5.0
"""Seconds in which a process may end by itself when another has failed: all may have raised the same."""
LIMIT = 30
"""Seconds that a process then has to stop what it does, and those that others wait for process 0 to save its state."""
LOST = "it ended without a message (was it killed, or out of memory?); its own output may say more."


class PeerFailed(BaseException):
    """Raised in the other processes of a run when one has failed; says which, and its sentence.

    It is raised wherever the main thread is. Libraries catch what is an `Exception` to make an error of their own of
    it, or to try something else.
    """


class Peers(L.Callback):
    """Ends all processes of a run when one has failed; the first of all callbacks, put there by `Agents`.

    Where another process has failed, `PeerFailed` is raised in the main thread, also if it waits for a lock, a server
    or a collective, but never within an optimizer step. Then the process leaves the process group, without which
    Lightning's collectives and ours do nothing, so that process 0 can save what it has and all can end in good order.
    """

    def __init__(self) -> None:
        self.torn = False
        """True within an optimizer step, and for good after one that failed: the weights are between two states."""
        self.drawing = False
        """True while a rollout is collected, which can be given up at any moment and drawn anew."""
        self._link: Connection | None = None  # and no locks yet: launchers may pickle the module

    @contextmanager
    def whole_step(self) -> Iterator[None]:
        """Context manager: an optimizer step, which no other process's failure breaks off."""
        self.torn = True
        yield
        self.torn = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Connects the processes; warns if one cannot reach process 0, and does without."""
        self._rank, self.torn = trainer.global_rank, False
        self._failed: dict[int, tuple[str, str]] = {}
        self._news = threading.Condition()
        self._ending, self._hub_gone = threading.Event(), threading.Event()
        server = None
        if trainer.is_global_zero:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            server = socket.create_server(("", 0), family=family, backlog=trainer.world_size, dualstack_ipv6=dual)
        door = (None if server is None else server.getsockname()[1], secrets.token_hex())
        port, token = trainer.strategy.broadcast(door)
        if server is not None:
            threading.Thread(target=_relay, args=(server, token), daemon=True).start()
        try:
            connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=10)
        except OSError as error:
            said = f"this process does not hear of the others' failures: port {port} of process 0: {error}."
            return warnings.warn(said, stacklevel=2)
        self._link = _connection(connection)
        _send(self._link, [token, self._rank])
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGURG, self._interrupt)  # a signal that does nothing by default
        self._listener = threading.Thread(target=self._listen, args=(self._link,), daemon=True)
        self._listener.start()
        for thread in threading.enumerate():
            if thread.name == "child-process-observer":  # Lightning's, which would kill process 0 before it has saved
                thread._run = lambda: False  # type: ignore[attr-defined]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes leave of the others after a run without failures."""
        if self._link is None:
            return
        self._ending.set()
        _send(self._link, None)
        self._listener.join(GRACE)
        self._link.close()
        self._link = None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGURG, signal.SIG_DFL)
        for thread in threading.enumerate():
            vars(thread).pop("_run", None)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Tells the others, and leaves the process group unless all raised the same and have a state to save together.

        A process other than 0 then waits until process 0 has ended, or long enough: launchers kill what is left when
        one of their processes has failed.
        """
        if self._link is None or self._ending.is_set():
            return leave_group()
        self._ending.set()
        kind, sentence = type(exception).__name__, _sentence(exception)
        with self._news:
            if _of_collective(exception) and self._news.wait_for(lambda: bool(self._failed), GRACE):
                exception.__cause__ = PeerFailed(self._cause())
                kind, sentence = PeerFailed.__name__, self._cause()
            _send(self._link, [self._rank, kind, sentence])
            if kind != PeerFailed.__name__ and not isinstance(trainer.strategy, DDPStrategy):  # weights may be spread
                others = [kind] * (trainer.world_size - 1)
                if self._news.wait_for(lambda: [one for one, _ in self._failed.values()] == others, GRACE):
                    return
        gloo = dist.is_initialized() and dist.get_backend() == "gloo"
        leave_group()
        broken_off = isinstance(exception, KeyboardInterrupt | SystemExit)
        if self._rank > 0 and not broken_off and not gloo:  # others wait in gloo until it has ended
            self._hub_gone.wait(LIMIT)

    def _listen(self, link: Connection) -> None:
        """Hears of failures, until process 0 has nothing more to say; in a thread of every process."""
        try:
            while (news := json.loads(link.recv_bytes())) is not None:
                self._hear(*news)
        except (EOFError, OSError):
            self._hear(0, "lost", LOST)
        self._hub_gone.set()

    def _hear(self, rank: int, kind: str, sentence: str) -> None:
        with self._news:
            if not self._failed:
                threading.Thread(target=self._end_main, daemon=True).start()
            self._failed.setdefault(rank, (kind, sentence))
            self._news.notify_all()

    def _end_main(self) -> None:
        """Interrupts the main thread until it ends, or ends the process; in a thread that starts with bad news."""
        for second in range(LIMIT if self._rank else LIMIT + 10):  # process 0 may wait for one that ends so
            if self._ending.wait(1 if second else GRACE):
                return
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)
            if second == 1:  # it waits in a collective of NCCL, which ends so
                leave_group()
        print(self._cause(), file=sys.stderr, flush=True)
        os._exit(1)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._failed and not self.torn and not self._ending.is_set():
            raise PeerFailed(self._cause())

    def _cause(self) -> str:
        rank, (_, sentence) = next(iter(self._failed.items()))
        return f"process {rank}: {sentence}"


def leave_group() -> None:
    """Leaves the process groups: those who wait for this process in a collective do so no longer, nor does it wait."""
    if dist.is_available() and dist.is_initialized():
        leaving = threading.Thread(target=distributed_c10d._abort_process_group, daemon=True)
        leaving.start()
        leaving.join(GRACE)
        if dist.is_initialized():  # NCCL may wait for work that will not be done
            distributed_c10d._update_default_pg(None)


def _relay(server: socket.socket, token: str) -> None:
    """Passes each process's news on to the others, until all have taken leave; in a thread of process 0."""
    links: dict[Connection, int] = {}
    told: list[Any] = []  # for those who join later
    over = False
    with server:
        while links or not over:
            for ready in wait([server, *links]):
                if not isinstance(ready, Connection):
                    link = _connection(server.accept()[0])
                    with suppress(EOFError, OSError, ValueError):
                        given, rank = json.loads(link.recv_bytes(200)) if link.poll(GRACE) else (None, 0)
                        if given == token:
                            links[link] = rank
                            for news in told:
                                _send(link, news)
                            if over:
                                _send(link, None)
                    continue
                rank = links[ready]
                try:
                    news = json.loads(ready.recv_bytes())
                except (EOFError, OSError):
                    news = [rank, "lost", LOST]
                if news is None:
                    _send(ready, None)
                if news is None or news[1] == "lost":
                    del links[ready]
                if news is not None:
                    told.append(news)
                if news is not None or rank == 0:
                    for link in links:
                        if link is not ready:
                            _send(link, news)
                over = over or (news is None and rank == 0)


def _connection(connected: socket.socket) -> Connection:
    """Makes a connection that is lost half a minute after the other machine."""
    connected.settimeout(None)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # not on every system
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return Connection(connected.detach())


def _send(link: Connection, message: Any) -> None:
    with suppress(OSError):  # who is gone has lost its connection, and that is news
        link.send_bytes(json.dumps(message).encode())


def _sentence(exception: BaseException) -> str:
    text = " ".join(str(exception).split())[:2000]
    return text if isinstance(exception, ValueError) else f"{type(exception).__name__}: {text}"


def _of_collective(exception: BaseException) -> bool:
    """Returns True for what a collective raised, which fails where another process has."""
    frames = list(traceback.walk_tb(exception.__traceback__))
    module = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return isinstance(exception, RuntimeError) and module.startswith("torch.distributed")

"""Two processes of which one fails: both end soon, with its sentence and a checkpoint."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import pickle
import shlex
import signal
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from lightning_modules import peers
from lightning_modules.checkpoints import CheckpointIO
from lightning_modules.cli import main
from lightning_modules.peers import PeerFailed, Peers
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.prompt_rl import PromptRL
from miniature.scenes.prompts import ShapesPrompts
from rewards.base import RewardUnavailable
from tests.forked import Forked, command, free_port, launched, two_processes
from tests.lightning_modules.test_distributed import ByRank, trainer_of
from tests.lightning_modules.test_resume import same
from tests.short_runs import last, quick

FAULTS: dict[str, tuple[int, Exception]] = {
    "refine": (1, KeyError("no such token")),
    "rollout": (0, RuntimeError("the images are too large")),
    "reward": (1, KeyError("no such scorer")),
    "update": (1, ValueError("the loss has no gradient")),
    "log": (1, OSError(errno.EIO, "Input/output error")),
    "validation": (1, RewardUnavailable("the reward server is gone.")),
    "callback": (1, TypeError("a step is no number")),
    "checkpoint": (0, OSError(errno.ENOSPC, "No space left on device", "last.ckpt")),
}
"""What fails -> the process where it does, and what it raises."""


class Fails(L.Callback):
    """Makes a process fail in the second step of a fit, or while it is evaluated after the first.

    Args:
        part: what fails, a key of `FAULTS`; "kill" ends the process without a word, "nothing" lets it be.
        rank: process that fails.
        clock: file that gets the time when it did.
    """

    def __init__(self, part: str, rank: int, clock: Path) -> None:
        self.part = part
        self.rank = rank
        self.clock = clock

    def _fail(self, *args: Any, **kwargs: Any) -> NoReturn:
        self.clock.write_text(str(time.time()))
        if self.part == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise FAULTS[self.part][1]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Puts the fault where it belongs, or fails at once."""
        if trainer.global_rank != self.rank or trainer.global_step != 1:
            return
        places: dict[str, tuple[Any, str]] = {
            "refine": (pl_module.language, "refine"),
            "rollout": (pl_module.flow, "rollout"),
            "reward": (type(pl_module.reward), "__call__"),
            "update": (pl_module, "manual_backward"),
            "log": (pl_module, "_log_step"),
            "checkpoint": (trainer.strategy.checkpoint_io, "save_checkpoint"),
        }
        if self.part in places:
            setattr(*places[self.part], self._fail)
        elif self.part == "kill":
            self._fail()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Fails after the second step."""
        if (self.part, self.rank, trainer.global_step) == ("callback", trainer.global_rank, 2):
            self._fail()

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Fails in the validation after the first step."""
        if (self.part, self.rank, trainer.global_step) == ("validation", trainer.global_rank, 1):
            self._fail()


def fit(root: Path, part: str, rank: int, *more: str) -> list[str]:
    """Returns a fit of three steps in two processes of which one fails."""
    options = quick(
        "fit", root, "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=3",
        "--checkpoint.every_n_train_steps=100", "--trainer.callbacks+=tests.lightning_modules.test_peers.Fails",
        f"--trainer.callbacks.part={part}", f"--trainer.callbacks.rank={rank}",
        f"--trainer.callbacks.clock={root / 'clock'}", "--trainer.val_check_interval=1", *more,
    )  # fmt: skip
    return options if part == "validation" else [*options, "--trainer.limit_val_batches=0"]


def run(root: Path, part: str, rank: int, *more: str) -> tuple[Forked, Forked, float]:
    """Runs such a fit; returns its processes and the seconds from the fault until both had ended."""
    zero, one = command(root / "output", *fit(root, part, rank, *more), processes=2)
    for process in (zero, one):
        process.wait()
    clock = root / "clock"
    return zero, one, time.time() - float(clock.read_text()) if clock.exists() else 0.0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last checkpoint of a fit in which nothing fails."""
    root = tmp_path_factory.mktemp("unbroken")
    zero, one, _ = run(root, "nothing", 0)
    assert zero.returncode == one.returncode == 0, zero.text + one.text
    assert "process" not in one.text.replace("distributed processes", "")
    return torch.load(last(root), weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("part", FAULTS)
def test_what_one_process_raises_ends_both(tmp_path: Path, part: str, unbroken: dict[str, Any]) -> None:
    """Two of the fits go on: a rollout that broke off is drawn anew, one on which a step was taken is not."""
    rank, error = FAULTS[part]
    more = ["--checkpoint.every_n_train_steps=1"] if part == "checkpoint" else []
    *processes, seconds = run(tmp_path, part, rank, *more)
    failed, other = processes[rank], processes[1 - rank]
    sentence = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    said = f"{'geneval failed with ' if part == 'reward' else ''}{sentence}"
    assert f"lightning: error: process {rank}: {said}" in other.text and other.returncode == 2
    assert str(error.args[-1]) in failed.text and failed.returncode == (
        2 if part in ("reward", "validation", "checkpoint") else 1
    )
    assert 0 < seconds < 30
    saved = torch.load(last(tmp_path), weights_only=True)  # of the disk that is full, the one before
    assert saved["global_step"] == (2 if part in ("log", "callback") else 1)
    if part not in ("reward", "log"):
        return
    zero, one, _ = run(tmp_path / "second", "nothing", 0, f"--ckpt_path={last(tmp_path)}")
    assert zero.returncode == one.returncode == 0, zero.text + one.text
    resumed = torch.load(last(tmp_path / "second"), weights_only=True)
    assert resumed["global_step"] == unbroken["global_step"] == 3
    for name in ("state_dict", "optimizer_states", "num_rollouts"):
        assert same(resumed[name], unbroken[name])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_other(tmp_path: Path, rank: int) -> None:
    *processes, seconds = run(tmp_path, "kill", rank)
    assert processes[rank].returncode == -signal.SIGKILL and processes[1 - rank].returncode == 2
    assert f"lightning: error: process {rank}: it ended without a message" in processes[1 - rank].text
    assert 0 < seconds < 30
    found = list(tmp_path.rglob("last.ckpt"))
    assert len(found) == rank  # process 0 saves what it has
    assert all(torch.load(path, weights_only=True)["global_step"] == 1 for path in found)


@pytest.mark.slow
def test_lightnings_launcher_lets_process_0_save(tmp_path: Path, preloaded: list[str]) -> None:
    """Process 0 starts the other, and Lightning's observer would kill it some seconds after that one."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.join(preloaded)} "$@"\n')
    python.chmod(0o755)
    options = fit(tmp_path, "kill", 1)

    def launch() -> None:
        sys.executable, sys.argv = str(python), ["lightning", *options]
        save = CheckpointIO.save_checkpoint

        def slow(*args: Any, **kwargs: Any) -> None:
            time.sleep(7)  # the observer looks every five seconds
            save(*args, **kwargs)

        CheckpointIO.save_checkpoint = slow  # type: ignore[method-assign]
        sys.modules["__main__"].__spec__ = importlib.util.find_spec("lightning_modules.cli")
        main(options)

    zero = Forked(launch, tmp_path / "log")
    assert zero.wait() == 2
    assert "lightning: error: process 1: it ended without a message" in zero.text
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 1


class Strategy(DDPStrategy):
    """What `Peers` asks of a strategy, on the process group alone."""

    def __init__(self) -> None:
        """Needs no devices."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Sends an object of process 0 to the other."""
        objects = [obj]
        dist.broadcast_object_list(objects, src)
        return objects[0]


def joined(rank: int) -> tuple[Peers, Any]:
    """Joins a process group of two; returns the watch over it, and what stands for the trainer."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    watch, trainer = Peers(), SimpleNamespace(global_rank=rank, is_global_zero=rank == 0, world_size=2)
    trainer.strategy = Strategy()
    watch.setup(trainer, None, "fit")  # type: ignore[arg-type]
    return watch, trainer


def twice(rank: int) -> None:
    """Watches through two runs without failures; nothing is left of them."""
    threads = set(threading.enumerate())
    watch, trainer = joined(rank)
    assert len(threading.enumerate()) == len(threads) + (2 if rank == 0 else 1)
    dist.barrier()
    watch.teardown(trainer, None, "fit")  # type: ignore[arg-type]
    watch.setup(trainer, None, "test")  # type: ignore[arg-type]
    begin = time.monotonic()
    watch.teardown(trainer, None, "test")  # type: ignore[arg-type]
    assert time.monotonic() - begin < 2
    while set(threading.enumerate()) != threads:
        time.sleep(0.01)
    assert signal.getsignal(signal.SIGURG) == signal.SIG_DFL


def test_nothing_is_left_of_a_watch() -> None:
    pickle.dumps(Peers())  # as `ddp_spawn` does
    two_processes(twice)


def busy(rank: int, folder: Path) -> None:
    """Process 1 fails while process 0 waits for a lock, in an optimizer step first."""
    peers.GRACE = 0.1
    watch, trainer = joined(rank)
    if rank == 1:
        error = KeyError("no such token")
        return watch.on_exception(trainer, None, error)  # type: ignore[arg-type]
    begin = time.monotonic()
    with watch.whole_step():
        threading.Event().wait(3)
        (folder / "stepped").touch()
    with pytest.raises(PeerFailed, match="process 1: KeyError: 'no such token'"):
        try:
            threading.Event().wait(60)
        except Exception as error:  # as libraries do
            raise ValueError("its own words for whatever is raised in it") from error
    assert 3 <= time.monotonic() - begin < 10 and not watch.torn


def test_a_process_that_waits_is_interrupted_but_no_step_is(tmp_path: Path) -> None:
    two_processes(busy, tmp_path)
    assert (tmp_path / "stepped").exists()


def test_who_joins_late_hears_why_another_has_failed() -> None:
    """The second process fails, and is gone, before the first has come in."""
    server = socket.create_server(("127.0.0.1", 0))
    relay = threading.Thread(target=peers._relay, args=(server, "token"))
    relay.start()
    address = server.getsockname()
    one = peers._connection(socket.create_connection(address))
    peers._send(one, ["token", 1])
    peers._send(one, [1, "KeyError", "no such token"])
    one.close()
    time.sleep(0.2)
    zero = peers._connection(socket.create_connection(address))
    peers._send(zero, ["token", 0])
    assert zero.poll(5) and json.loads(zero.recv_bytes()) == [1, "KeyError", "no such token"]
    peers._send(zero, None)
    relay.join(5)
    assert not relay.is_alive()


def deaf(rank: int) -> None:
    """Process 0 hears no signal."""
    peers.GRACE, peers.LIMIT = 0.1, 2
    watch, trainer = joined(rank)
    if rank == 1:
        return watch.on_exception(trainer, None, ValueError("the disk is full."))  # type: ignore[arg-type]
    peers.LIMIT = -7
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGURG})
    time.sleep(60)


def test_a_process_that_cannot_be_interrupted_is_ended(tmp_path: Path) -> None:
    port = free_port()
    zero, one = (Forked(partial(deaf, rank), tmp_path / f"{rank}.log", launched(rank, 2, port)) for rank in range(2))
    assert one.wait() == 0 and zero.wait(20) == 1
    assert zero.text == "process 1: the disk is full.\n"


def plain(rank: int) -> None:
    """A fit by Lightning's own trainer, whose processes watch one another too."""
    size: dict[str, Any] = {"height": 32, "width": 32, "max_sequence_length": 18}
    flow = Flux1Policy("miniature/flow", Sampling(4, 2), dtype="float32", learning_rate=1e-3, **size)
    module = PromptRL(flow, ByRank(rank), None, 2, 2)

    def broken(samples: Any) -> NoReturn:
        raise KeyError("no prompts")

    if rank == 1:
        module.collect = broken  # type: ignore[method-assign]
    trainer = trainer_of(2, max_steps=1)
    with pytest.raises(BaseException) as raised:
        trainer.fit(module, ShapesPrompts(train_prompts=16, batch_size=1))
    failed = raised.value if rank == 1 else raised.value.__cause__ or raised.value
    assert isinstance(failed, KeyError if rank == 1 else PeerFailed)


def test_plain_trainers_watch_too() -> None:
    two_processes(plain)

"""Training with the reward behind a real server: the same numbers, also when the server dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from lightning_modules.cli import main
from lightning_modules.prompt_rl import PromptRL
from tests.forked import free_port
from tests.lightning_modules.test_resume import SHORT, same

IN_PROCESS = "--model.init_args.flow.init_args.micro_batch_size=8"


class Server:
    """`python -m rewards.serving` with the miniature's reward, on a port of its own."""

    def __init__(self, python: list[str]) -> None:
        self.python = python
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts, or starts again, and waits until it is ready."""
        command = [*self.python, "-m", "rewards.serving", "--config", "configs/rewards/shapes.yaml"]
        self.process = subprocess.Popen([*command, "--port", str(self.port)], stderr=subprocess.DEVNULL)
        for _ in range(300):
            try:
                if httpx.get(f"{self.url}/v1/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                assert self.process.poll() is None, "the server stopped"
            time.sleep(0.1)
        raise AssertionError("the server did not get ready")

    def kill(self) -> None:
        """As a crash does."""
        if self.process is not None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def server(preloaded: list[str]) -> Iterator[Server]:
    running = Server(preloaded)
    running.start()
    yield running
    running.kill()


def run(root: Path, *more: str) -> dict[str, Any]:
    short = ["--trainer.max_steps=3", "--trainer.limit_val_batches=0", f"--trainer.default_root_dir={root}"]
    main([*SHORT, IN_PROCESS, *short, *more])
    (path,) = root.rglob("last.ckpt")
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def served(url: str, **options: object) -> list[str]:
    reward = "--model.init_args.reward"
    arguments = {"urls": url, "reward": "geneval", **options}
    return [
        f"{reward}=rewards.serving.client.RemoteReward",
        *(f"{reward}.init_args.{k}={v}" for k, v in arguments.items()),
    ]


@pytest.mark.slow
def test_a_served_reward_trains_to_identical_parameters(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Undisturbed, and with a server that is killed while it is asked and comes back: every number is the same."""
    expected = run(tmp_path / "in_process")
    undisturbed = run(tmp_path / "served", *served(server.url))
    for key in ("state_dict", "optimizer_states", "num_rollouts"):
        assert same(undisturbed[key], expected[key])

    collect: Callable[..., Any] = PromptRL.collect
    steps: list[int] = []

    def restart() -> None:
        server.kill()
        time.sleep(1.0)
        server.start()

    def disturbed(self: PromptRL, samples: Any) -> Any:
        steps.append(self.global_step)
        if self.global_step == 1:  # in the midst of this step's requests
            threading.Timer(0.05, restart).start()
        return collect(self, samples)

    monkeypatch.setattr(PromptRL, "collect", disturbed)
    options = {"retries": 8, "backoff": 0.5, "max_items": 4, "cooldown": 0.5}
    survived = run(tmp_path / "killed", *served(server.url, **options))
    assert steps == [0, 1, 2] and survived["global_step"] == 3
    for key in ("state_dict", "optimizer_states", "num_rollouts"):
        assert same(survived[key], expected[key])


@pytest.mark.slow
def test_a_server_that_stays_away_skips_or_stops(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    collect: Callable[..., Any] = PromptRL.collect

    def lost(self: PromptRL, samples: Any) -> Any:
        if self.global_step == 1:
            server.kill()
        return collect(self, samples)

    monkeypatch.setattr(PromptRL, "collect", lost)
    options = {"retries": 1, "backoff": 0.05}
    with pytest.raises(SystemExit):
        run(tmp_path / "fail", *served(server.url, **options))
    assert "go on with --ckpt_path" in capsys.readouterr().err
    (path,) = (tmp_path / "fail").rglob("last.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 1

    server.start()
    skipped = run(tmp_path / "skip", *served(server.url, **options, on_failure="skip"))
    assert skipped["global_step"] == 3  # two steps without any score: the weights stay those of the first
    server.start()
    monkeypatch.setattr(PromptRL, "collect", collect)
    first = run(tmp_path / "first", *served(server.url), "--trainer.max_steps=1")
    assert same(skipped["state_dict"], first["state_dict"])

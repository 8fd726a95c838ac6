"""A signal stops a run with a checkpoint of its last finished step, from which it goes on as if it had not come."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from callbacks.runs.loading import load
from lightning_modules.cli import main
from tests.forked import Forked, command
from tests.lightning_modules.test_resume import same
from tests.short_runs import last, quick

pytestmark = pytest.mark.slow


class Sends(L.Callback):
    """Sends a signal to this process in the second step, or in the validation after the first.

    Args:
        part: where it is sent: "rollout", "update", "validation", "saving" (the checkpoint after it); "nowhere" is
            never.
        number: number of the signal.
    """

    def __init__(self, part: str, number: int) -> None:
        self.part = part
        self.number = number

    def _before(self, owner: Any, name: str) -> None:
        work = getattr(owner, name)

        def sends(*args: Any, **kwargs: Any) -> Any:
            try:
                os.kill(os.getpid(), self.number)
            except Exception as error:  # as tokenizers do
                raise ValueError("a library's own words for whatever is raised in it") from error
            return work(*args, **kwargs)

        setattr(owner, name, sends)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Puts the signal where it belongs, in the last process."""
        if trainer.global_step == 1 and trainer.global_rank == trainer.world_size - 1:
            if self.part == "rollout":
                self._before(pl_module.flow, "rollout")
            if self.part == "update":
                self._before(pl_module, "manual_backward")

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Sends it in the validation after the first step."""
        if self.part == "validation" and trainer.global_step == 1:
            os.kill(os.getpid(), self.number)
        if self.part == "saving" and trainer.global_step == 1:
            torch.save = partial(self._save, torch.save)

    def _save(self, save: Any, checkpoint: Any, file: Any) -> None:
        torch.save = save

        writes = []

        def write(data: Any) -> int:
            writes.append(data)
            if len(writes) == 3:  # where torch makes an error of its own of whatever is raised
                os.kill(os.getpid(), self.number)
            return int(file.write(data))

        save(checkpoint, SimpleNamespace(write=write, flush=file.flush))


def fit(root: Path, part: str, number: int = signal.SIGTERM, *more: str) -> list[str]:
    validated = part in ("validation", "saving")
    return quick(
        "fit", root, "--trainer.max_steps=3", f"--checkpoint.every_n_train_steps={1 if part == 'saving' else 100}",
        "--trainer.callbacks+=tests.lightning_modules.cli.test_preemption.Sends", f"--trainer.callbacks.part={part}",
        f"--trainer.callbacks.number={int(number)}", *more,
        *(["--trainer.val_check_interval=1"] if validated else ["--trainer.limit_val_batches=0"]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last checkpoint of a fit that no signal was sent to."""
    root = tmp_path_factory.mktemp("unbroken")
    main(fit(root, "nowhere"))
    return torch.load(last(root), weights_only=True)


@pytest.mark.parametrize(
    ("part", "number", "steps"),
    [
        ("rollout", signal.SIGTERM, 1),
        ("update", signal.SIGUSR1, 2),
        ("validation", signal.SIGTERM, 1),
        ("saving", signal.SIGUSR1, 1),
    ],
)
def test_a_signal_stops_with_the_last_finished_step(
    tmp_path: Path, part: str, number: int, steps: int, unbroken: dict[str, Any]
) -> None:
    (one,) = command(tmp_path / "output", *fit(tmp_path / "first", part, number))
    assert one.wait() == 143 and "Traceback" not in one.text, one.text
    assert f"lightning: stopped by {signal.Signals(number).name}" in one.text
    assert f"{last(tmp_path / 'first')}: go on with --ckpt_path" in one.text
    assert torch.load(last(tmp_path / "first"), weights_only=True)["global_step"] == steps
    if part in ("rollout", "update"):
        main([*fit(tmp_path / "second", "nowhere"), f"--ckpt_path={last(tmp_path / 'first')}"])
        resumed = torch.load(last(tmp_path / "second"), weights_only=True)
        for name in ("global_step", "state_dict", "optimizer_states", "num_rollouts"):
            assert same(resumed[name], unbroken[name]), name


class Swallows(L.Callback):
    """Sends a signal where what its handler raises is lost, as in an object's `__del__`."""

    def on_test_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Sends it once a batch."""
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)


def test_an_evaluation_whose_signal_was_swallowed_stops_before_the_next_batch(tmp_path: Path) -> None:
    callback = "--trainer.callbacks+=tests.lightning_modules.cli.test_preemption.Swallows"
    (one,) = command(tmp_path / "output", *quick("test", tmp_path, callback))
    assert one.wait() == 143 and "Traceback" not in one.text, one.text
    assert "lightning: stopped by SIGTERM" in one.text and "GenEvalBenchmark after" not in one.text


def test_a_signal_in_an_update_comes_before_the_validation(tmp_path: Path) -> None:
    validates = ["--trainer.limit_val_batches=1.0", "--trainer.val_check_interval=1"]
    (one,) = command(tmp_path / "output", *fit(tmp_path / "first", "update"), *validates)
    assert one.wait() == 143 and "Traceback" not in one.text, one.text
    saved = torch.load(last(tmp_path / "first"), weights_only=True)
    assert saved["global_step"] == 2 and saved["validation_due"]


@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_processes_stop_together(tmp_path: Path, strategy: str) -> None:
    """The signal comes to the second process alone, while it draws."""
    more = ["--trainer.devices=2", f"--trainer.strategy={strategy}"]
    both = command(tmp_path / "output", *fit(tmp_path / "first", "rollout", signal.SIGUSR1, *more), processes=2)
    for one in both:
        assert one.wait() == 143 and "Traceback" not in one.text, one.text
        assert "lightning: stopped by SIGUSR1" in one.text
    assert torch.load(last(tmp_path / "first"), weights_only=True)["global_step"] == 2


def test_slurm_starts_the_job_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, Any]) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "asked"}\n')
    scontrol.chmod(0o755)
    slurm = {"NTASKS": "1", "JOB_ID": "77", "JOB_NAME": "fit", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NODELIST", "localhost")
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    root = tmp_path / "runs"
    first = Forked(lambda: main(fit(root, "rollout", signal.SIGUSR1)), tmp_path / "log")
    assert first.wait() == 143, first.text
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    second = Forked(lambda: main(fit(root, "nowhere")), tmp_path / "log")
    assert second.wait() == 0, second.text
    resumed = torch.load(root / "quickstart" / "version_1" / "checkpoints" / "last.ckpt", weights_only=True)
    assert same(resumed["state_dict"], unbroken["state_dict"]) and resumed["num_rollouts"] == unbroken["num_rollouts"]
    (run,) = load(root)
    assert run.continues == (root / "quickstart" / "version_0").resolve() and run.training.index.tolist() == [1, 2, 3]

"""The progress bar: how far the run and an evaluation's batch are, on one line of 80 columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from rich.console import Console

from callbacks.progress import RunProgressBar
from lightning_modules.cli import main
from tests.short_runs import quick

pytestmark = pytest.mark.slow


class Watched(RunProgressBar):
    """Notes what the bars of the run and of the evaluation show after each change, and the widest line."""

    train: list[tuple[float, float]] = []
    evaluation: list[float] = []
    lines: list[str] = []

    def _update(self, progress_bar_id: Any, current: int, visible: bool = True, hard: bool = False) -> None:
        super()._update(progress_bar_id, current, visible, hard)
        assert self.progress is not None
        if progress_bar_id is not None and progress_bar_id == self.train_progress_bar_id:
            self.train.append((current, self.train_progress_bar.total or 0))
        else:
            self.evaluation.append(current)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        assert self.progress is not None
        console = Console(width=80)
        with console.capture() as shown:
            console.print(self.progress.make_tasks_table([task for task in self.progress.tasks if task.visible]))
        self.lines[:] = shown.get().splitlines()


@pytest.fixture(autouse=True)
def _forget() -> None:
    for notes in (Watched.train, Watched.evaluation, Watched.lines):
        notes.clear()


def fit(root: Path, *more: str) -> None:
    bar = f"--trainer.callbacks+={__name__}.Watched"
    main([*quick("fit", root, bar, "--trainer.enable_progress_bar=true"), *more])


def test_epochs_and_updates_count_as_steps_of_the_run(tmp_path: Path) -> None:
    """Two optimizer steps a batch, two batches an epoch: 8 steps in two epochs."""
    fit(tmp_path, "--trainer.max_steps=8", "--model.updates_per_rollout=2", "--data.train_prompts=2",
        "--trainer.limit_val_batches=0")  # fmt: skip
    assert Watched.train == [(done, 8) for done in (0, 2, 4, 6, 8)]
    Watched.train.clear()
    fit(tmp_path, "--trainer.max_steps=12", "--model.updates_per_rollout=2", "--data.train_prompts=2",
        "--trainer.limit_val_batches=0", "--ckpt_path=last")  # fmt: skip
    assert Watched.train == [(done, 12) for done in (8, 10, 12)]


def test_epochs_alone(tmp_path: Path) -> None:
    fit(tmp_path, "--trainer.max_steps=-1", "--trainer.max_epochs=2", "--data.train_prompts=2",
        "--trainer.limit_val_batches=0")  # fmt: skip
    assert Watched.train == [(done, 4) for done in (0, 1, 2, 3, 4)]


def test_a_validation_moves_with_every_micro_batch(tmp_path: Path) -> None:
    """Three prompts in two modes, one image a pass: sixths of the one batch of each of three sets, before and after."""
    fit(tmp_path, "--trainer.max_steps=1", "--trainer.val_check_interval=1", "--data.eval_prompts=3",
        "--model.flow.micro_batch_size=1")  # fmt: skip
    one = [0, *(number / 6 for number in range(1, 7)), 1]
    assert Watched.evaluation == pytest.approx(one * 6)
    assert len(Watched.lines) == 1 and len(Watched.lines[0]) <= 80, Watched.lines
    assert all(word in Watched.lines[0] for word in ("1/1", "rollouts: 8", "reward: ", "format: "))

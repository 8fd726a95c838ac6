"""A run that was killed anywhere and resumed leaves what an unbroken one leaves: weights, logged rows, results."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch

from callbacks.runs.loading import load
from datamodules.jsonl import read_json
from lightning_modules.cli import main
from tests.forked import command
from tests.lightning_modules.test_resume import same
from tests.short_runs import quick

pytestmark = pytest.mark.slow

KILL, TERM = int(signal.SIGKILL), int(signal.SIGTERM)
STEPS = 5


class Strikes(L.Callback):
    """Sends a signal to this process.

    Args:
        part: when: in the `rollout` or the `update` of step 3, in the `validation` after step 2 or behind it, when its
            scores are there (`scored`), while the `checkpoint` of step 3 is written or when it is `saved`, in the
            `final` validation, before the `report`; `nowhere` is never.
        number: number of the signal.
    """

    def __init__(self, part: str, number: int) -> None:
        self.part = part
        self.number = number

    def _strike(self, *args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), self.number)

    def _around(self, owner: Any, name: str, *, before: bool = True) -> None:
        work = getattr(owner, name)

        def struck(*args: Any, **kwargs: Any) -> Any:
            if before:
                self._strike()
            result = work(*args, **kwargs)
            if not before:
                self._strike()
            return result

        setattr(owner, name, struck)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Puts the signal where it belongs."""
        if trainer.global_step == 2:
            if self.part == "rollout":
                self._around(pl_module.flow, "rollout")
            elif self.part == "update":
                self._around(pl_module, "manual_backward")
            elif self.part == "checkpoint":
                self._around(torch, "save", before=False)
            elif self.part == "saved":
                self._around(trainer.strategy.checkpoint_io, "save_checkpoint", before=False)

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Sends it in a validation."""
        if (self.part, trainer.global_step) in (("validation", 2), ("final", trainer.max_steps)):
            self._strike()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sends it when a validation's scores are in the history."""
        if (self.part, trainer.global_step) == ("scored", 2):
            self._strike()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sends it before the report."""
        if self.part == "report":
            self._strike()


def fit(root: Path, part: str, number: int = TERM, *more: str) -> list[str]:
    """Returns a fit with a last.ckpt every step and validations after steps 0, 2, 4 and 5; epochs have 4 steps."""
    return quick(
        "fit", root, f"--trainer.max_steps={STEPS}", "--checkpoint.every_n_train_steps=1", "--checkpoint.save_top_k=0",
        "--trainer.val_check_interval=2", "--data.init_args.train_prompts=4", "--data.init_args.eval_prompts=2",
        "--model.init_args.group_size=4", "--model.init_args.num_retained=1",
        "--model.init_args.flow.init_args.sampling={num_steps: 4, sde_steps: 2, eval_steps: 2}",
        "--trainer.callbacks+=tests.lightning_modules.cli.test_interrupted.Strikes", f"--trainer.callbacks.part={part}",
        f"--trainer.callbacks.number={number}", *more,
    )  # fmt: skip


def left(root: Path) -> dict[str, Any]:
    """Returns what the last run in a folder has left, in which no time is."""
    (run,) = load(root)
    results = read_json(run.folder / "results.json")
    return {
        "checkpoint": torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True),
        "results": _timeless(results),
        "training": run.training[[name for name in run.training if not name.startswith("time/")]],
        "validations": run.validations.drop(columns="seconds"),
        "report": (run.folder / "report.html").is_file() and (run.folder / "results.md").read_text(),
    }


def _timeless(value: Any) -> Any:
    """Leaves out times, and the state of the checkout, whose files may be edited while tests run."""
    if isinstance(value, dict):
        return {key: _timeless(one) for key, one in value.items() if key not in ("seconds", "code")}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A fit that no signal was sent to."""
    root = tmp_path_factory.mktemp("unbroken")
    main(fit(root, "nowhere"))
    return left(root)


def compare(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Returns the names of what differs."""
    wrong = [
        name
        for name in ("global_step", "state_dict", "optimizer_states", "num_rollouts")
        if not same(found["checkpoint"][name], expected["checkpoint"][name])
    ]
    wrong += [name for name in ("results", "report") if found[name] != expected[name]]
    for name in ("training", "validations"):
        try:
            pd.testing.assert_frame_equal(found[name], expected[name], check_exact=True, check_like=True)
        except AssertionError as error:
            wrong.append(f"{name}: {' '.join(str(error).split())[:150]}")
    return wrong


def resumed(root: Path, part: str, number: int) -> dict[str, Any]:
    """Runs a fit that is struck, and then the same with `--ckpt_path last`."""
    (first,) = command(root / "output", *fit(root, part, number))
    status = first.wait()
    assert status == (-KILL if number == KILL else 143), first.text
    assert "Traceback" not in first.text, first.text
    (second,) = command(root / "output", *fit(root, "nowhere"), "--ckpt_path=last")
    assert second.wait() == 0, second.text
    return left(root)


@pytest.mark.parametrize(
    ("part", "number"),
    [(part, KILL) for part in ("update", "validation", "checkpoint", "saved", "final", "report")]
    + [(part, TERM) for part in ("validation", "scored")],
)
def test_an_interrupted_run_ends_as_an_unbroken_one(
    tmp_path: Path, part: str, number: int, unbroken: dict[str, Any]
) -> None:
    assert not compare(resumed(tmp_path, part, number), unbroken)

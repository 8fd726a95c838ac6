"""A run that ended anywhere goes on with the next batch of its epoch, at the right step, validating when it is due."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest

from datamodules.base import PromptSample
from lightning_modules.cli.checkpoint import Checkpoint
from tests.datamodules.test_base import Numbers, Recorder

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")

STEPS = 12  # of 5 an epoch


class Watched(Recorder):
    """Remembers at which steps of the loggers and of the optimizer it was trained and validated."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[int, int, int]] = []
        self.validated: list[int] = []

    def training_step(self, batch: list[PromptSample], batch_idx: int) -> None:
        self.steps.append(
            (self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop._batches_that_stepped, batch_idx)
        )
        super().training_step(batch, batch_idx)

    def on_validation_end(self) -> None:
        self.validated.append(self.global_step)


class Unevaluated(Numbers):
    """Has no evaluation prompts."""

    def eval_samples(self) -> dict[str, list[PromptSample]]:
        return {}


def fit(
    root: Path,
    steps: int,
    ckpt_path: Path | None = None,
    every: int | None = None,
    data: type[Numbers] = Numbers,
    **kwargs: Any,
) -> Watched:
    module = Watched()
    saves = Checkpoint(root, "{step}", save_last=True, save_top_k=-1, every_n_train_steps=every)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, use_distributed_sampler=False, max_steps=steps,
        callbacks=[saves], **kwargs,
    )  # fmt: skip
    trainer.fit(module, data(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module


@pytest.mark.parametrize("every", [None, 1, 3, 100])
@pytest.mark.parametrize(
    "validations",
    [
        {"limit_val_batches": 0},
        {"val_check_interval": 2, "check_val_every_n_epoch": None},
        {"val_check_interval": 5, "check_val_every_n_epoch": None},
        {},  # after each epoch
    ],
    ids=["none", "every 2 steps", "every 5 steps", "every epoch"],
)
def test_a_run_that_ended_goes_on_where_it_was(tmp_path: Path, every: int | None, validations: dict[str, Any]) -> None:
    whole = fit(tmp_path / "whole", STEPS, **validations)
    assert len(whole.seen) == STEPS and [step for _, step, _ in whole.steps] == list(range(STEPS))
    for end in range(1, STEPS):
        fit(tmp_path / f"{end}", end, every=every, **validations)
        on = fit(tmp_path / f"{end} on", STEPS, tmp_path / f"{end}" / "last.ckpt", **validations)
        assert on.seen == whole.seen[end:], f"ended after step {end}"
        assert on.steps == whole.steps[end:], f"ended after step {end}"
        assert on.validated == [step for step in whole.validated if step > end], f"ended after step {end}"


def test_a_run_that_ends_after_every_step(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", STEPS)
    seen, last = [], None
    for end in range(1, STEPS + 1):
        part = fit(tmp_path / f"{end}", end, last)
        seen += part.seen
        last = tmp_path / f"{end}" / "last.ckpt"
    assert seen == whole.seen


def test_each_steps_checkpoint_is_of_that_step(tmp_path: Path) -> None:
    """Also where a validation is due after the step but has no prompts: after each epoch, of 5 steps."""
    whole = fit(tmp_path, STEPS, every=1, data=Unevaluated)
    assert len(whole.seen) == STEPS and not whole.validated
    for step in range(1, STEPS):
        on = fit(tmp_path / f"{step} on", STEPS, tmp_path / f"step={step}.ckpt", data=Unevaluated)
        assert on.seen == whole.seen[step:], f"saved after step {step}"

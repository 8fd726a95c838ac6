"""The moving average: what is evaluated, what is trained, and what a resumed run knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from callbacks.ema import EMA
from lightning_modules.cli import main
from tests.lightning_modules.test_resume import same
from tests.short_runs import quick

pytestmark = pytest.mark.slow


class Witness(L.Callback):
    """Keeps copies of the trained weights after every step and at every validation."""

    steps: list[dict[str, torch.Tensor]] = []
    validated: list[tuple[int, dict[str, torch.Tensor]]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self.steps.append(trained(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.steps.append(trained(pl_module))

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.validated.append((trainer.global_step, trained(pl_module)))


def trained(module: L.LightningModule) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def write_config(path: Path, *callbacks: dict[str, Any], **settings: Any) -> Path:
    """Writes the quickstart with further callbacks and settings of the model."""
    content = yaml.safe_load(Path("configs/quickstart.yaml").read_text())
    content["trainer"]["callbacks"] += callbacks
    content["model"]["init_args"] |= settings
    path.write_text(yaml.safe_dump(content))
    return path


AVERAGE = {"class_path": "callbacks.ema.EMA", "init_args": {"decay": 0.5}}
WITNESS = {"class_path": f"{__name__}.Witness"}


def fit(config: Path, root: Path, steps: int, *more: str) -> dict[str, Any]:
    """Runs a fit whose validations are before and after training; returns its last checkpoint."""
    every = ["--trainer.val_check_interval=3", "--checkpoint.every_n_train_steps=2", f"--trainer.max_steps={steps}"]
    main(quick("fit", root, *every, *more, config=config))
    checkpoint: dict[str, Any] = torch.load(next(root.rglob("last.ckpt")), weights_only=True)
    return checkpoint


@dataclass
class Whole:
    """An unbroken fit of three steps, and the weights that its witness kept."""

    config: Path
    checkpoint: dict[str, Any]
    steps: list[dict[str, torch.Tensor]]
    validated: dict[int, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    root = tmp_path_factory.mktemp("ema")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        Witness.steps.clear(), Witness.validated.clear()
        config = write_config(root / "ema.yaml", AVERAGE, WITNESS)
        return Whole(config, fit(config, root, 3), [*Witness.steps], dict(Witness.validated))


def test_validation_draws_with_the_average_and_training_goes_on_without(whole: Whole, tmp_path: Path) -> None:
    saved, (start, *after) = whole.checkpoint, whole.steps
    assert len(after) == 3
    # Lightning's average is the weights themselves at its first update, and moves by half of the way from then on.
    expected = {0: start}
    average = after[0]
    for step, weights in enumerate(after[1:], start=2):
        average = {name: 0.5 * average[name] + 0.5 * weights[name] for name in weights}
        expected[step] = average
    assert set(whole.validated) == {0, 3}
    for step, weights in whole.validated.items():
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[step][name], atol=1e-7, rtol=1e-6)
    assert not same(expected[3], after[2])
    assert same(saved["current_model_state"], after[2])
    assert same(dict(saved["state_dict"]), whole.validated[3])
    unwatched = "--trainer.limit_val_batches=0"
    without = fit(write_config(tmp_path / "without.yaml"), tmp_path / "without", 3, unwatched)
    assert same(without["state_dict"], saved["current_model_state"])


def test_a_resumed_run_keeps_both(whole: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(whole.config, tmp_path / "first", 2)
    (checkpoint,) = (tmp_path / "first").rglob("last.ckpt")
    resumed = fit(whole.config, tmp_path / "second", 3, f"--ckpt_path={checkpoint}")
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        assert same(resumed[key], whole.checkpoint[key]), key
    with pytest.raises(SystemExit):
        main(quick("fit", tmp_path, f"--ckpt_path={checkpoint}"))
    assert "was saved with a moving average" in capsys.readouterr().err


@pytest.mark.parametrize(("every", "steps", "expected"), [(2, [2, 4, 6], [2, 4, 6]), (3, [1, 2, 3, 4, 6], [3, 6])])
def test_updates_come_whenever_enough_steps_are_complete(every: int, steps: list[int], expected: list[int]) -> None:
    """Also when one rollout takes two steps, so that odd numbers of steps never show."""
    average, found = EMA(0.5, update_every_n_steps=every), []
    for step in steps:
        if average.should_update(step_idx=step - 1):
            average._latest_update_step = step
            found.append(step)
    assert found == expected


def test_a_validation_that_breaks_off_is_saved_unswapped(tmp_path: Path) -> None:
    lost = {"class_path": "tests.lightning_modules.test_scoring.DownAfter", "init_args": {"batches": 1}}
    benchmark = {"class_path": "callbacks.reward.RewardBenchmark", "init_args": {"reward": lost, "sets": ["unseen"]}}
    config = write_config(tmp_path / "c.yaml", AVERAGE, WITNESS, benchmark, language=None, num_retained=8)
    Witness.steps.clear()
    with pytest.raises(SystemExit):
        fit(config, tmp_path / "lost", 6)
    saved = torch.load(next((tmp_path / "lost").rglob("last.ckpt")), weights_only=True)
    assert saved["global_step"] == 3
    assert same(saved["current_model_state"], Witness.steps[3])
    assert not same(dict(saved["state_dict"]), Witness.steps[3])


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="EMA has decay=1, use 0 or more and less than 1"):
        EMA(decay=1)
    with pytest.raises(ValueError, match="EMA has update_every_n_steps=0, use at least 1"):
        EMA(update_every_n_steps=0)

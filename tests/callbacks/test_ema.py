"""The moving average: what is evaluated, what is trained, and what a resumed run knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from callbacks.ema import EMA
from lightning_modules.cli import main
from tests.lightning_modules.test_resume import SHORT, same


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


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The quickstart with an average of decay 0.5 and a witness."""
    content = yaml.safe_load(Path("configs/quickstart.yaml").read_text())
    content["trainer"]["callbacks"] += [
        {"class_path": "callbacks.ema.EMA", "init_args": {"decay": 0.5}},
        {"class_path": "tests.callbacks.test_ema.Witness"},
    ]
    path = tmp_path / "ema.yaml"
    path.write_text(yaml.safe_dump(content))
    Witness.steps.clear(), Witness.validated.clear()
    return path


def fit(config: Path, root: Path, steps: int, *more: str) -> dict[str, Any]:
    main(
        [
            "fit",
            f"--config={config}",
            *SHORT[2:],
            f"--trainer.max_steps={steps}",
            f"--trainer.default_root_dir={root}",
            *more,
        ]
    )
    checkpoint: dict[str, Any] = torch.load(next(root.rglob("last.ckpt")), weights_only=True)
    return checkpoint


def test_validation_draws_with_the_average_and_training_goes_on_without(config: Path, tmp_path: Path) -> None:
    saved = fit(config, tmp_path / "with", 3)
    start, *after = Witness.steps
    assert len(after) == 3
    # Lightning's average is the weights themselves at its first update, and moves by half of the way from then on.
    expected = {0: start}
    average = after[0]
    for step, weights in enumerate(after[1:], start=2):
        average = {name: 0.5 * average[name] + 0.5 * weights[name] for name in weights}
        expected[step] = average
    seen = dict(Witness.validated)
    assert set(seen) == {0, 3}
    for step, weights in seen.items():
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[step][name], atol=1e-7, rtol=1e-6)
    assert not same(expected[3], after[2])
    assert same(saved["current_model_state"], {name: weight for name, weight in after[2].items()})
    assert same(dict(saved["state_dict"]), seen[3])

    plain = yaml.safe_load(config.read_text())
    plain["trainer"]["callbacks"] = plain["trainer"]["callbacks"][:-2]
    without = tmp_path / "without.yaml"
    without.write_text(yaml.safe_dump(plain))
    assert same(fit(without, tmp_path / "without", 3)["state_dict"], saved["current_model_state"])


def test_a_resumed_run_keeps_both(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = fit(config, tmp_path / "whole", 4)
    fit(config, tmp_path / "first", 2)
    (checkpoint,) = (tmp_path / "first").rglob("last.ckpt")
    resumed = fit(config, tmp_path / "second", 4, f"--ckpt_path={checkpoint}")
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        assert same(resumed[key], whole[key]), key
    with pytest.raises(SystemExit):
        main(["fit", "--config=configs/quickstart.yaml", f"--ckpt_path={checkpoint}"])
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


def test_a_validation_that_breaks_off_is_saved_unswapped(config: Path, tmp_path: Path) -> None:
    lost = {"class_path": "tests.lightning_modules.test_scoring.DownAfter", "init_args": {"batches": 1}}
    content = yaml.safe_load(config.read_text())
    benchmark = {"class_path": "callbacks.reward.RewardBenchmark", "init_args": {"reward": lost, "sets": ["unseen"]}}
    content["trainer"]["callbacks"].append(benchmark)
    content["model"]["init_args"] |= {"language": None, "num_retained": 8}
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit):
        fit(config, tmp_path / "lost", 6)
    saved = torch.load(next((tmp_path / "lost").rglob("last.ckpt")), weights_only=True)
    assert saved["global_step"] == 3
    assert same(saved["current_model_state"], Witness.steps[3])
    assert not same(dict(saved["state_dict"]), Witness.steps[3])


def test_bad_decay() -> None:
    with pytest.raises(ValueError, match="EMA has decay=1, use 0 or more and less than 1"):
        EMA(decay=1)

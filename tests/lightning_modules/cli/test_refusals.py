"""Settings that cannot work: one sentence with the setting's name, before models load, and nothing written."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch

from lightning_modules.agents import Agents
from lightning_modules.cli import main
from lightning_modules.cli.command import PromptRLCLI
from tests.lightning_modules.cli.test_command import (
    FLOW,
    QUICKSTART,
    complaint,
    fit,
    flow_only_checkpoint,
    in_the_repository,
)

__all__ = ["flow_only_checkpoint", "in_the_repository"]  # fixtures

LOGGER = "--trainer.logger=lightning.pytorch.loggers"
BY_EPOCH = ["--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=20", "--trainer.limit_val_batches=2"]
REFUSED = {
    "--trainer.accelerator=tpu": r"`trainer\.accelerator` \(tpu\) cannot be used: ",
    "--trainer.accelerator=abacus": r"`trainer\.accelerator` \(abacus\) cannot be used: ",
    "--trainer.strategy=ddq": r"`trainer\.strategy` \(ddq\) cannot be used: ",
    "--trainer.strategy=fsdp": r"`trainer\.accelerator` \(cpu\), `trainer\.strategy` \(fsdp\) cannot be used: ",
    "--trainer.devices=0": r"`trainer\.devices` \(0\)",
    "--trainer.devices=-3": r"`trainer\.devices` \(-3\)",
    "--trainer.devices=many": r"`trainer\.devices` \(many\)",
    "--trainer.num_nodes=0": r"`trainer\.num_nodes` \(0\)",
    "--trainer.precision=16-true": r"`trainer\.precision` is 16-true, which PromptRL does not train in",
    "--trainer.profiler=stopwatch": r"`trainer\.profiler` \(stopwatch\)",
    "--trainer.max_steps=-7": r"`trainer\.max_steps` \(-7\)",
    # "Or .0": typing keeps one order of `int | float` in a process, that of the first module that writes it.
    "--trainer.limit_val_batches=-1": r"`trainer\.limit_val_batches` \(-1(\.0)?\)",
    "--trainer.gradient_clip_val=1": r"`trainer\.gradient_clip_val` is set.*set `max_grad_norm` of `model\.flow`",
    "--trainer.gradient_clip_algorithm=norm": r"`trainer\.gradient_clip_algorithm` is set.*set `max_grad_norm`",
    "--trainer.accumulate_grad_batches=2": r"`trainer\.accumulate_grad_batches` is 2.*set `data\.batch_size`",
    "--trainer.overfit_batches=2": r"`trainer\.overfit_batches` is 2.*leave it out",
    "--data.batch_size=7": r"6 training prompts do not fill one step",
    "--trainer.limit_train_batches=0": r"training begins, and `trainer\.limit_train_batches` is 0(\.0)?; set",
    "--trainer.limit_train_batches=0.1": r"nothing to train: `trainer\.limit_train_batches` is 0\.1, less than a step",
    "--trainer.max_steps=0": r"nothing to train: training begins, and `trainer\.max_steps` is 0; set it higher",
    "--ckpt_path=last": r"`ckpt_path` is last, but no run in .*/runs/quickstart has a last\.ckpt",
    "--ckpt_path=best": r"`ckpt_path` is best, but no run in .*/runs/quickstart has kept a best checkpoint",
    "--experiment=../elsewhere": r"`experiment` is \.\./elsewhere; name a folder below",
    "model.group_size=4": r"`model\.group_size=4` is no option: write `--model\.group_size=4`",
}
MISSING = {
    "--trainer.strategy=deepspeed": ("deepspeed", r"`trainer\.strategy` \(deepspeed\) cannot be used: .*DeepSpeed"),
    f"{LOGGER}.WandbLogger": (
        "wandb",
        r"`trainer\.logger\.class_path` \(.*WandbLogger\) cannot be used: .*pip install -U 'wandb",
    ),
    "--checkpoint.dirpath=s3://bucket/x": ("s3fs", r"`checkpoint\.dirpath` \(s3://bucket/x\) cannot be used: .*s3fs"),
}


def told_in_time(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> str:
    monkeypatch.setattr(Agents, "configure_model", lambda self: pytest.fail("models were loaded"))
    return complaint(capfd, tmp_path, *options)


@pytest.mark.parametrize("option", REFUSED)
def test_settings(
    option: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert re.search(REFUSED[option], told_in_time(capfd, tmp_path, monkeypatch, option))


@pytest.mark.parametrize("option", MISSING)
def test_missing_packages(
    option: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, said = MISSING[option]
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    assert re.search(said, told_in_time(capfd, tmp_path, monkeypatch, option))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = told_in_time(capfd, tmp_path, monkeypatch, "--trainer.accelerator=gpu")
    assert "`trainer.accelerator` (gpu) cannot be used: No supported gpu backend found!" in line


def test_settings_together(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = told_in_time(capfd, tmp_path, monkeypatch, *BY_EPOCH)
    assert re.search(r"`trainer\.val_check_interval` is 20, but an epoch has 6 steps: .*or the interval to 6", line)
    line = told_in_time(capfd, tmp_path, monkeypatch, "--trainer.max_steps=-1", "--trainer.max_epochs=0")
    assert "nothing to train: training begins, and `trainer.max_epochs` is 0" in line
    line = told_in_time(
        capfd, tmp_path, monkeypatch, "--trainer.val_check_interval=00:00:01:00", "--trainer.max_steps=0"
    )
    assert "nothing to train: training begins, and `trainer.max_steps` is 0" in line  # a time is no mistake
    callbacks = ["--trainer.enable_checkpointing=false", "--trainer.callbacks=ModelCheckpoint"]
    line = told_in_time(capfd, tmp_path, monkeypatch, *callbacks)
    assert "`trainer.callbacks`, `trainer.enable_checkpointing` (False) cannot be used: " in line


def test_a_lora_target_that_is_no_layer(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = complaint(capfd, tmp_path, f"--{FLOW}.lora.rank=2", f"--{FLOW}.lora.targets=[attn]")
    said = (
        r"`flow\.lora\.targets` names attn, which matches \S+\.attn, a \w+ and not a single layer, of \w+; use endings"
    )
    assert re.search(said, line)


def test_folders_that_cannot_be_written(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Agents, "configure_model", lambda self: pytest.fail("models were loaded"))
    (tmp_path / "runs").touch()
    for root, said in (
        (
            str(tmp_path / "runs"),
            r"folder cannot be written below .*/runs/quickstart: .*set `trainer\.default_root_dir`",
        ),
        ("s3://bucket/runs", r"trainer\.default_root_dir is s3://bucket/runs, an address"),
    ):
        with pytest.raises(SystemExit):
            fit(tmp_path, f"--trainer.default_root_dir={root}")
        assert re.search(said, capfd.readouterr().err.splitlines()[-1])


def test_a_full_disk(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    line = told_in_time(capfd, tmp_path, monkeypatch)
    assert "No space left on device; set `trainer.default_root_dir` to another folder, or make room" in line


@pytest.mark.slow
def test_a_disk_that_fills_up_while_training(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lightning.pytorch.trainer.trainer.Trainer.save_checkpoint", full)
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path)
    assert stopped.value.code == 2
    assert (
        capfd.readouterr()
        .err.splitlines()[-1]
        .endswith("No space left on device; make room or allow access, or name another place.")
    )


@pytest.mark.slow
def test_a_checkpoint_at_the_end_has_nothing_to_train(
    flow_only_checkpoint: Path,  # noqa: F811
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    capfd.readouterr()  # what the good run printed
    monkeypatch.setattr(Agents, "configure_model", lambda self: pytest.fail("models were loaded"))
    line = complaint(capfd, tmp_path, f"--ckpt_path={flow_only_checkpoint}", config="configs/miniature/flow_only.yaml")
    assert "nothing to train: the checkpoint is of step 1, epoch 0, and `trainer.max_steps` is 1; set it higher" in line
    options = [f"--ckpt_path={flow_only_checkpoint}", "--trainer.fast_dev_run=true"]
    line = complaint(capfd, tmp_path, *options, config="configs/miniature/flow_only.yaml")
    assert "of step 1, epoch 0, where `trainer.fast_dev_run` ends; leave one of the two out" in line


@pytest.mark.parametrize("name", ["validate", "test", "predict"])
def test_without_a_checkpoint_one_line_warns(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptRLCLI, "_run_subcommand", lambda *_: None)
    with pytest.warns(UserWarning, match="no `--ckpt_path` is given: the base model is evaluated") as warned:
        main([name, "--config", QUICKSTART, f"--trainer.default_root_dir={tmp_path}"])
    assert len([one for one in warned if "ckpt_path" in str(one.message)]) == 1


@pytest.mark.parametrize("name", ["validate", "test", "predict"])
def test_precisions_that_cannot_take_prompts(
    name: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Agents, "configure_model", lambda self: pytest.fail("models were loaded"))
    with pytest.raises(SystemExit):
        main([name, "--config", QUICKSTART, f"--trainer.default_root_dir={tmp_path}", "--trainer.precision=bf16-true"])
    assert "lightning: error: `trainer.precision` is bf16-true" in capfd.readouterr().err

"""Hostile options and files given to the `lightning` command: one line, no code run, nothing outside the root."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from callbacks.run_config import resolved_config
from lightning_modules.cli import main
from lightning_modules.cli.checkpoint import SaveConfig
from tests.lightning_modules.cli.test_command import FLOW, LANGUAGE, ROOT, SMALL, complaint, fit
from tests.lightning_modules.test_hostile_checkpoints import Trap

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
]

FLOW_ONLY = "configs/miniature/flow_only.yaml"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", ["../outside", "/OUTSIDE", "link", "link/deeper", "a/../../outside"])
def test_no_experiment_leaves_the_root(experiment: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    outside, runs = tmp_path / "outside", tmp_path / "runs"
    outside.mkdir()
    runs.mkdir()
    (runs / "link").symlink_to(outside)
    with pytest.raises(SystemExit):
        fit(runs, f"--experiment={experiment.replace('/OUTSIDE', str(outside))}", config=FLOW_ONLY)
    assert "name a folder below `trainer.default_root_dir`" in capfd.readouterr().err
    assert not list(outside.iterdir())


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["http://user:hunter2@localhost:1", "http://localhost:1/?token=hunter2", "user:hunter2@localhost"]
)
def test_secrets_in_addresses_are_not_printed(url: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    key = "--model.init_args.reward"
    options = [f"{key}=rewards.serving.client.RemoteReward", f"{key}.urls=[{url}]", f"{key}.reward=a"]
    with pytest.raises(SystemExit):
        fit(tmp_path, *options, config=FLOW_ONLY)
    out, err = capfd.readouterr()
    assert "hunter2" not in out + err
    assert err.splitlines()[-1].startswith("lightning: error: ")


def test_secrets_in_addresses_are_not_saved(tmp_path: Path) -> None:
    given = Namespace(uris=["https://u:hunter2@host/a?key=hunter2"], ckpt_path=None)
    parser = LightningArgumentParser()
    parser.add_argument("--uris", type=list[str])
    parser.add_argument("--ckpt_path")
    callback = SaveConfig(parser, given)
    trainer: Any = SimpleNamespace(callbacks=[callback], log_dir=tmp_path, is_global_zero=True, ckpt_path=None)
    callback.on_fit_start(trainer, L.LightningModule())
    for saved in (yaml.safe_load((tmp_path / "config.yaml").read_text()), resolved_config(trainer)):
        assert saved["uris"][0] == "https://***@host/a?key=***"
    assert given.uris[0] == "https://u:hunter2@host/a?key=hunter2", "what is built gets it whole"


# --- checkpoints ------------------------------------------------------------------------------------------------------


def damaged(kind: str, path: Path, good: Path, trap: Path) -> None:
    data = bytearray(good.read_bytes())
    match kind:
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "flipped":
            data[len(data) // 2] ^= 16
            path.write_bytes(data)
        case "pickled":
            torch.save({"loops": {}, "state_dict": {}, "more": Trap(trap)}, path)
        case "bare pickle":
            path.write_bytes(pickle.dumps(Trap(trap)))
        case "foreign":
            torch.save({"model": torch.zeros(3)}, path)
        case "odd":
            torch.save({"loops": 3, "state_dict": 4}, path)
        case "text":
            path.write_text("no checkpoint")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        fit(runs, config=FLOW_ONLY)
    return runs / "miniature" / "flow_only" / "version_0" / "checkpoints" / "last.ckpt"


KINDS = ("cut", "flipped", "pickled", "bare pickle", "foreign", "odd", "text")


@pytest.mark.parametrize(
    ("command", "kind"), [*(("fit", kind) for kind in KINDS), ("predict", "pickled"), ("predict", "foreign")]
)
def test_bad_checkpoints(
    command: str, kind: str, checkpoint: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, trap = tmp_path / "bad.ckpt", tmp_path / "sprung"
    damaged(kind, path, checkpoint, trap)
    capfd.readouterr()
    if command == "fit":
        line = complaint(capfd, tmp_path, f"--ckpt_path={path}", config=FLOW_ONLY)
    else:
        options = [f"--config={FLOW_ONLY}", f"--trainer.default_root_dir={tmp_path / 'runs'}", *SMALL[1:]]
        with pytest.raises(SystemExit) as stopped:
            main(["predict", *options, f"--ckpt_path={path}", "--prompt=a red circle"])
        assert stopped.value.code == 2
        line = capfd.readouterr().err.splitlines()[-1]
    assert str(path) in line and "give a" in line
    assert not trap.exists()


# --- models -----------------------------------------------------------------------------------------------------------


def copy_of(model: str, folder: Path) -> Path:
    """A copy whose files are links, to be replaced one by one."""
    for path in (ROOT / "miniature" / model).rglob("*"):
        if path.is_file():
            link = folder / path.relative_to(ROOT / "miniature" / model)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return folder


def replace(path: Path, content: bytes) -> None:
    assert path.exists(), path
    path.unlink()
    path.write_bytes(content)


DEEP = b'{"a": ' * 20_000
JUNK = b"\x89PNG\r\n\x1a\n\xff\xfe\0"


@pytest.mark.parametrize(
    ("part", "file", "content"),
    [
        ("flow", "transformer/diffusion_pytorch_model.safetensors", None),
        ("flow", "text_encoder/model.safetensors", b"\xff" * 64),
        ("flow", "transformer/config.json", JUNK),
        ("flow", "model_index.json", DEEP),
        ("flow", "tokenizer/tokenizer.json", b"{}"),
        ("language", "model.safetensors", None),
        ("language", "config.json", DEEP),
        ("language", "tokenizer.json", JUNK),
        ("language", "tokenizer.json", b"{}"),
        ("language", "tokenizer_config.json", b"[]"),
    ],
)
def test_damaged_models(
    part: str, file: str, content: bytes | None, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`None` is the first half."""
    folder = copy_of(part, tmp_path / part)
    whole = (folder / file).read_bytes()
    replace(folder / file, whole[: len(whole) // 2] if content is None else content)
    option, how = (FLOW, {"config": FLOW_ONLY}) if part == "flow" else (LANGUAGE, {})
    line = complaint(capfd, tmp_path, f"--{option}.model={folder}", **how)
    assert str(folder) in line


@pytest.mark.parametrize("damage", ["pickled", "junk"])
def test_damaged_adapters(damage: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder, trap = tmp_path / "peft", tmp_path / "sprung"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
    if damage == "pickled":
        torch.save({"weight": Trap(trap)}, folder / "adapter_model.bin")
    else:
        (folder / "adapter_model.safetensors").write_bytes(JUNK)
    line = complaint(capfd, tmp_path, f"--{LANGUAGE}.lora.path={folder}")
    assert f"`language.lora.path` {folder}" in line and ("give a .safetensors file" in line) == (damage == "pickled")
    assert not trap.exists()

"""The wheel: the command under both names, and everything that a quickstart in an empty folder reads."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("lightning_modules", "datamodules", "rewards", "callbacks", "miniature", "configs")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds, built from a copy since setuptools writes beside what it builds."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(target)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(target)
    return target


def test_it_has_what_the_repository_has(installed: Path) -> None:
    """Code, configurations, base models and samples, and nothing else at the top."""
    for room in ROOMS:
        kinds = (".py", ".yaml", ".json", ".jsonl", ".jinja", ".safetensors", ".txt")
        ours = {path.relative_to(ROOT) for path in (ROOT / room).rglob("*") if path.suffix in kinds}
        assert ours == {path.relative_to(installed) for path in (installed / room).rglob("*") if path.suffix in kinds}
    top = {path.name for path in installed.iterdir() if path.suffix not in (".whl", ".dist-info")}
    assert top == set(ROOMS)


def test_the_command_has_two_names(installed: Path) -> None:
    (entries,) = installed.glob("*.dist-info/entry_points.txt")
    names = [line.partition(" = ") for line in entries.read_text().splitlines() if "=" in line]
    assert {name: entry for name, _, entry in names} == dict.fromkeys(
        ("lightning", "promptrl"), "lightning_modules.cli:main"
    )


def test_an_empty_folder_is_enough(installed: Path, tmp_path: Path) -> None:
    """`promptrl quickstart` trains there, and its last lines name files that are there."""
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); from lightning_modules.cli import main; main()"
    words = ["quickstart", "--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--data.batch_size=1",
             "--trainer.accelerator=cpu", "--preflight=off"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    run = Path("runs/quickstart/version_0")
    last = done.stdout.strip().splitlines()[-6:]
    assert last == [
        f"Checkpoint:  {run}/checkpoints/last.ckpt",
        "TensorBoard: tensorboard --logdir runs",
        "Draw:        promptrl predict \\",
        f"    --config {run}/config.yaml \\",
        f"    --ckpt_path {run}/checkpoints/last.ckpt \\",
        "    --prompt 'a photo of a ring'",
    ]
    assert (tmp_path / run / "checkpoints/last.ckpt").is_file()
    assert f"model: {installed}/miniature/flow\n" in (tmp_path / run / "config.yaml").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}

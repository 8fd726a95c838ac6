"""The last lines of a run name what is there, by paths that a shell takes as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_modules.cli.closing import closing


def test_what_is_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("my runs/quickstart/version_3")
    (folder / "checkpoints").mkdir(parents=True)
    assert closing(folder, Path("my runs"), "a cat") == "TensorBoard: tensorboard --logdir 'my runs'"
    for name in ("results.md", "checkpoints/last.ckpt"):
        (folder / name).touch()
    assert closing(tmp_path / folder, Path("my runs"), "a cat's hat") == (
        f"Report:      {folder}/results.md\n"
        f"Checkpoint:  {folder}/checkpoints/last.ckpt\n"
        "TensorBoard: tensorboard --logdir 'my runs'\n"
        "Draw:        promptrl predict \\\n"
        f"    --config '{folder}/config.yaml' \\\n"
        f"    --ckpt_path '{folder}/checkpoints/last.ckpt' \\\n"
        """    --prompt 'a cat'"'"'s hat'"""
    )
    (folder / "report.html").touch()
    assert closing(folder, Path("my runs"), None).splitlines()[0] == f"Report:      {folder}/report.html"
    monkeypatch.chdir(folder)
    assert closing(tmp_path / folder, tmp_path / "my runs", None).splitlines() == [
        "Report:      report.html",
        f"TensorBoard: tensorboard --logdir '{tmp_path}/my runs'",
    ]

"""A checkpoint's file is whole at every moment, whatever kills its writer, and a full disk leaves the one before."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.atomic_write import remove_strays
from lightning_modules.checkpoints import CheckpointIO
from tests.forked import Forked

KILLS = 12


def checkpoint(value: int) -> dict[str, Any]:
    """Returns 8 MB of one number, which takes some milliseconds to write."""
    return {"global_step": value, "state_dict": {"weight": torch.full((2_000_000,), float(value))}}


def save_for_ever(path: Path) -> None:
    for value in range(1, 10_000):
        CheckpointIO().save_checkpoint(checkpoint(value), path)


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_kills_tear_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills come 0 to 6 ms after something changes in the folder; temporary files go to another file system."""
    shm = Path("/dev/shm")
    if shm.is_dir() and os.access(shm, os.W_OK):
        monkeypatch.setattr(tempfile, "tempdir", str(shm))
    path = tmp_path / "checkpoints" / "last.ckpt"
    CheckpointIO().save_checkpoint(checkpoint(0), path)
    strays = 0
    for kill in range(KILLS):
        before = files(path.parent)
        writer = Forked(lambda: save_for_ever(path), tmp_path / "log")
        while files(path.parent) == before:
            time.sleep(0.0005)
        time.sleep(0.006 * kill / KILLS)
        writer.kill()
        saved = torch.load(path, weights_only=True)
        assert (saved["state_dict"]["weight"] == saved["global_step"]).all()
        strays += len(files(path.parent)) - 1
        remove_strays(path.parent)
        assert list(files(path.parent)) == [path.name]
    assert strays  # some were killed while they wrote


@pytest.mark.parametrize("room", [1_000_000, 4_000_000])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, room: int) -> None:
    path = tmp_path / "last.ckpt"
    CheckpointIO().save_checkpoint({"global_step": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        for name in ("last.ckpt", "new.ckpt"):
            with pytest.raises(OSError, match="File too large") as caught:
                CheckpointIO().save_checkpoint(checkpoint(2), tmp_path / name)
            assert caught.value.filename == str(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(files(tmp_path)) == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == {"global_step": 1}

"""Checkpoints of other origin: foreign, pickled, cut off, with flipped bits. No code in them runs."""

from __future__ import annotations

import io
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lightning_modules.checkpoints import RECORD, CheckpointIO, check_whole, is_checkpoint, read

CHECKPOINT: dict[str, Any] = {
    "global_step": 3,
    "loops": {"fit_loop": {"state_dict": {}}},
    "state_dict": {"flow.weight": torch.arange(4000.0)},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.arange(4000.0)}}, "param_groups": []}],
}


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    CheckpointIO().save_checkpoint(CHECKPOINT, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as several processes write it."""
    path = tmp_path / "sharded.ckpt"
    weights, state = CHECKPOINT["state_dict"], CHECKPOINT["optimizer_states"][0]["state"][0]
    tensors = {"state_dict/flow.weight": weights["flow.weight"], "optimizer/0/0/exp_avg": state["exp_avg"]}
    dcp.save(tensors, checkpoint_id=path, no_dist=True)
    record = {name: value for name, value in CHECKPOINT.items() if name != "state_dict"}
    torch.save(record | {"optimizer_states": [{"state": {}, "param_groups": []}]}, path / RECORD)
    return path


def refusal(path: Path) -> str:
    """The sentence in which reading ends."""
    with pytest.raises(ValueError, match="checkpoint") as stopped:
        check_whole(path)
        read(path)
    said = str(stopped.value)
    assert str(path) in said and "\n" not in said and len(said) < 500
    return said


def test_both_kinds_are_read(file: Path, folder: Path) -> None:
    for path in (file, folder):
        check_whole(path)
        assert is_checkpoint(path)
        found = read(path)
        assert found["global_step"] == 3
        assert torch.equal(found["state_dict"]["flow.weight"], torch.arange(4000.0))
        assert torch.equal(found["optimizer_states"][0]["state"][0]["exp_avg"], torch.arange(4000.0))


def test_an_archive_that_spans_disks(file: Path) -> None:
    """Python's own check of archives raises an error for the ZIP64 record of such a file."""
    locator = b"PK\x06\x07" + struct.pack("<LQL", 1, 0, 2)
    end = b"PK\x05\x06" + struct.pack("<HHHHLLH", 0, 0, 1, 1, 46, 0xFFFFFFFF, 0)
    file.write_bytes(file.read_bytes()[:500] + locator + end)
    assert is_checkpoint(file)
    assert "disks" in refusal(file)


def test_every_flipped_bit_and_every_cut_is_seen(file: Path) -> None:
    """60 of each; one in the names or dates of the archive changes nothing that is read."""
    whole, rng, seen = file.read_bytes(), random.Random(0), 0
    for _ in range(60):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        try:
            check_whole(file)
            found = read(file)
        except ValueError as error:
            seen += 1
            assert str(file) in str(error)
        else:
            assert torch.equal(found["state_dict"]["flow.weight"], CHECKPOINT["state_dict"]["flow.weight"])
    assert seen > 50
    for _ in range(60):
        file.write_bytes(whole[: rng.randrange(len(whole))])
        assert not is_checkpoint(file) or refusal(file)


def rewritten(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Changes the pickle in a checkpoint's archive, whose checksums are right afterwards."""
    new = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new, "w") as archive:
        for name in old.namelist():
            archive.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    path.write_bytes(new.getvalue())


def test_a_pickle_in_a_file_does_not_run(file: Path, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    rewritten(file, lambda _: pickle.dumps({"loops": {}, "state_dict": Trap(trap)}, protocol=2))
    assert "is damaged, or holds more than a run's own" in refusal(file)
    torch.save({**CHECKPOINT, "more": Trap(trap)}, file)
    with pytest.raises(ValueError, match="holds more"):
        CheckpointIO().load_checkpoint(file, weights_only=False)
    assert not trap.exists()
    torch.load(file, weights_only=False)
    assert trap.exists(), "the trap works"


def test_a_pickle_in_a_folder_does_not_run(folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = Trap(trap)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "holds more than a run's own (it names pathlib.Path.touch)" in refusal(folder).replace("Path.", "Path.", 1)
    assert not trap.exists()
    dcp.FileSystemReader(folder).read_metadata()
    assert trap.exists(), "the trap works"


def test_bytes_in_a_folder_are_not_unpickled(folder: Path, tmp_path: Path) -> None:
    """Torch unpickles whatever is no tensor."""
    trap = tmp_path / "sprung"
    shutil.rmtree(folder)
    dcp.save({"state_dict/flow.weight": torch.zeros(2), "more": Trap(trap)}, checkpoint_id=folder, no_dist=True)
    torch.save({}, folder / RECORD)
    assert "more is no tensor" in refusal(folder)
    assert not trap.exists()


@pytest.mark.parametrize("damage", [b"", b"\x80\x04junk", b"\x00" * 100, b"cos\nsystem\n(S'true'\ntR."])
@pytest.mark.parametrize("name", [".metadata", RECORD])
def test_damaged_parts_of_a_folder(folder: Path, name: str, damage: bytes) -> None:
    (folder / name).write_bytes(damage)
    refusal(folder)


def test_foreign_archives(tmp_path: Path) -> None:
    path = tmp_path / "foreign.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "no checkpoint")
    refusal(path)
    for value in ([1, 2], torch.zeros(3), "text"):
        torch.save(value, path)
        refusal(path)


def test_damaged_pickles(file: Path) -> None:
    """Whatever the unpickler stumbles over becomes the one sentence."""
    rng = random.Random(1)
    whole = file.read_bytes()

    def damage(content: bytes) -> bytes:
        data = bytearray(content)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)

    refused = 0
    for _ in range(300):
        file.write_bytes(whole)
        rewritten(file, damage)
        try:
            read(file)
        except ValueError as error:
            assert str(file) in str(error)
            refused += 1
    assert refused > 150

"""Writing in one piece: a write that fails in the middle leaves what was there, and no stray beside it."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from datamodules.atomic_write import remove_strays, replaced_file, replaced_folder, write_atomically


def contents(root: Path) -> dict[str, str]:
    """Relative path -> text of every file below a folder, hidden ones too."""
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    write_atomically(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    write_atomically(path, b"bytes")
    assert contents(tmp_path) == {"new/results.json": "bytes"}


@pytest.mark.parametrize("before", [{}, {"results.json": "old"}])
def test_a_write_that_fails_in_the_middle_changes_nothing(tmp_path: Path, before: dict[str, str]) -> None:
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as on a full disk: the first bytes go through
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(tmp_path / "results.json", "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before


def test_a_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".export.unfinished").mkdir()  # of a process that was killed
    (tmp_path / ".export.unfinished" / "half").write_text("half")
    for text in ("first", "second"):
        with replaced_folder(tmp_path / "export") as folder:
            (folder / text).write_text(text)
    assert contents(tmp_path) == {"export/second": "second"}
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("before", [{}, {"export/README.md": "old"}])
def test_a_folder_that_fails_in_the_middle_changes_nothing(tmp_path: Path, before: dict[str, str]) -> None:
    for name, text in before.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    with pytest.raises(KeyboardInterrupt), replaced_folder(tmp_path / "export") as folder:
        (folder / "README.md").write_text("new")
        raise KeyboardInterrupt
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == [Path(name).parent.name for name in before]


def test_a_folder_comes_back_if_its_replacement_is_gone(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "README.md").write_text("old")
    with pytest.raises(FileNotFoundError), replaced_folder(tmp_path / "export") as folder:
        folder.rmdir()
    assert contents(tmp_path) == {"export/README.md": "old"}


def test_strays_are_removed_unless_somebody_writes_them(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in (".last.ckpt.1.2.tmp", "below/.scores.1.2.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".export.unfinished").mkdir()
    (tmp_path / ".hidden").write_text("whole")
    with replaced_file(tmp_path / "last.ckpt") as file, replaced_folder(tmp_path / "folder") as folder:
        (folder / "part").write_text("part")
        remove_strays(tmp_path)
        file.write(b"new")
    assert contents(tmp_path) == {
        "last.ckpt": "new", "folder/part": "part", ".hidden": "whole", "below/.scores.1.2.tmp": "half",
    }  # fmt: skip
    remove_strays(tmp_path, deep=True)
    assert not (tmp_path / "below" / ".scores.1.2.tmp").exists()
    assert not (tmp_path / ".export.unfinished").exists()
    remove_strays(tmp_path / "missing")

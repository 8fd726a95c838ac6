"""A run's results say what it was made with."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from callbacks.record import commit, digest, versions
from callbacks.reporting.page import run_page
from datamodules.jsonl import read_json
from lightning_modules.cli import main
from tests.short_runs import quick


def test_a_small_files_digest_is_sha256sums(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red cat\n")
    assert digest(path) == "sha256:" + hashlib.sha256(b"a red cat\n").hexdigest()


def test_a_folders_digest_tells_versions_apart(tmp_path: Path) -> None:
    """It does not depend on the folder's name; of large files pieces are read, of which the last ends the file."""
    first = tmp_path / "first"
    (first / "part").mkdir(parents=True)
    (first / "config.json").write_text("{}")
    (first / "part" / "weights").write_bytes(bytes(9 * 2**20))
    whole = tmp_path / "whole"
    shutil.copytree(first, whole, ignore=shutil.ignore_patterns("weights"))
    second = tmp_path / "second"
    shutil.copytree(first, second)
    assert digest(first) == digest(second) and digest(first).startswith("sampled:")
    assert digest(whole).startswith("sha256:")
    weights = second / "part" / "weights"
    seen = {digest(first)}
    for change in (lambda: weights.write_bytes(bytes(9 * 2**20 - 1) + b"x"),
                   lambda: weights.write_bytes(bytes(9 * 2**20 + 1)),
                   lambda: weights.rename(second / "part" / "other"),
                   lambda: (second / "config.json").write_text("[]")):  # fmt: skip
        change()
        seen.add(digest(second))
    assert len(seen) == 5


def test_a_commit_and_its_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    found = commit(tmp_path)
    assert found is not None and len(found["commit"]) == 40 and found["changed"] is False
    (tmp_path / "untracked").touch()
    assert commit(tmp_path) == found
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == found | {"changed": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) is None


@pytest.mark.slow
def test_results_and_page_say_it(tmp_path: Path) -> None:
    """Also before the first validation, and in a run that has none."""
    main(quick("fit", tmp_path / "runs", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"))
    (path,) = (tmp_path / "runs").rglob("results.json")
    found = read_json(path)["run"]
    assert found["versions"] == versions() and found["versions"]["torch"] == torch.__version__
    assert found["seeds"] == {"seed_everything": 42, "model": 42, "data": 42}
    assert found["device"] == {
        "name": "cpu", "processes": 1, "nodes": 1, "strategy": "SingleDeviceStrategy", "precision": "32-true",
    }  # fmt: skip
    assert {Path(name).name: one for name, one in found["models"].items()} == {
        name: digest(Path("miniature", name)) for name in ("language", "flow")
    }
    assert found["training_prompts"]["prompts"] == 12 and len(found["training_prompts"]["texts"]) == 16
    assert f"torch {torch.__version__}" in run_page(path.parent).read_text()

"""What names mean on the hub, and what is asked of it (the network calls are played here)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from datamodules.editing import hub
from datamodules.editing.hub import HubPath, locate, parse_hub
from datamodules.editing.prompts import EditPrompts


@pytest.mark.parametrize(
    ("name", "repo_type", "expected"),
    [
        ("hf://o/n/a/b.parquet", None, HubPath("o/n", "model", "a/b.parquet")),
        ("hf://models/o/n/b.parquet", "model", HubPath("o/n", "model", "b.parquet")),
        ("hf://o/n/a/b.parquet", "dataset", HubPath("o/n", "dataset", "a/b.parquet")),
        ("hf://datasets/o/n-1.2M", None, HubPath("o/n-1.2M", "dataset")),
        ("hf://datasets/o/n/", None, HubPath("o/n", "dataset")),
        ("hf://datasets/o/n@refs%2Fpr%2F1/data/", "dataset", HubPath("o/n", "dataset", "data", "refs/pr/1")),
        ("hf://o/n@v1/d/*.parquet", None, HubPath("o/n", "model", "d/*.parquet", "v1")),
        ("wangfuyun/PrompRL", "model", HubPath("wangfuyun/PrompRL", "model")),
        ("TIGER-Lab/OmniEdit-Filtered-1.2M", None, HubPath("TIGER-Lab/OmniEdit-Filtered-1.2M", "dataset")),
        ("nowhere/train.jsonl", None, None),
        ("datamodules/train", None, None),  # that folder is here, so a mistyped path
        ("/o/n", None, None),
        ("o/n/more", None, None),
    ],
)
def test_names(name: str, repo_type: Any, expected: HubPath | None) -> None:
    assert parse_hub(name, repo_type) == expected


def test_a_local_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_hub("owner/name") is not None
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert parse_hub("owner/name") is None


@pytest.mark.parametrize("name", ["hf://", "hf://owner", "hf://spaces/o/n", "hf://o/n@v1@v2/a"])
def test_other_paths_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no path on the hub"):
        parse_hub(name)


def test_types_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="names a dataset repository and repo_type is 'model'"):
        parse_hub("hf://datasets/o/n/a.parquet", "model")


class Hub:
    """Plays the hub: a folder of files, and what it was asked for."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder, self.names, self.asked = folder, names, []  # type: ignore[var-annotated]
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")

    def hf_hub_download(self, repo: str, name: str, *, repo_type: str, revision: str | None) -> str:
        self.asked.append((repo, name, repo_type, revision))
        return str(self.folder / name)

    def snapshot_download(self, repo: str, *, repo_type: str, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((repo, *allow_patterns, repo_type, revision))
        return str(self.folder)

    def list_repo_files(self, repo: str, *, repo_type: str, revision: str | None) -> list[str]:
        self.asked.append((repo, repo_type, revision))
        return list(self.names)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def play(*names: str) -> Hub:
        there = Hub(tmp_path, *names)
        monkeypatch.setattr(hub, "hf_hub_download", there.hf_hub_download)
        monkeypatch.setattr(hub, "snapshot_download", there.snapshot_download)
        monkeypatch.setattr(hub, "HfApi", lambda: there)
        return there

    return play


def test_files_patterns_folders_and_ids(played: Any, tmp_path: Path) -> None:
    there = played("data/dev-0.parquet", "data/dev-1.parquet", "data/train-0.parquet", "README.md")
    files = locate("hf://wangfuyun/PrompRL/data/dev-0.parquet", "data.eval_file")
    assert files == [tmp_path / "data/dev-0.parquet"]
    files = locate("hf://datasets/o/n@v1/data/dev-*.parquet", "data.eval_file")
    assert files == [tmp_path / "data/dev-0.parquet", tmp_path / "data/dev-1.parquet"]
    assert locate("hf://o/n/data", "data.eval_file", "dataset") == [tmp_path / "data"]
    assert there.asked == [
        ("wangfuyun/PrompRL", "data/dev-0.parquet", "model", None),
        ("o/n", "data/dev-*.parquet", "dataset", "v1"),
        ("o/n", "data/*", "dataset", None),
    ]
    with pytest.raises(ValueError, match=r"data\.x: the hub's dataset repository o/n has no files data/val-\*\."):
        locate("hf://datasets/o/n/data/val-*.parquet", "data.x")
    with pytest.raises(ValueError, match="model repository o/n has no folder images"):
        locate("hf://o/n/images", "data.x")


def test_an_id_alone_is_enough_for_one_file(played: Any, tmp_path: Path) -> None:
    there = played("data/all.parquet", "README.md", "state.json")
    assert locate("owner/name", "data.x") == [tmp_path / "data/all.parquet"]
    assert there.asked == [("owner/name", "dataset", None), ("owner/name", "data/all.parquet", "dataset", None)]


@pytest.mark.parametrize(
    ("names", "has"),
    [
        (("data/train.parquet", "data/dev.parquet"), "2 files of rows (data/train.parquet, data/dev.parquet)"),
        (("README.md",), "no .parquet or .arrow or .jsonl file"),
    ],
)
def test_an_id_alone_is_too_little_for_more(played: Any, names: tuple[str, ...], has: str) -> None:
    played(*names)
    message = f"repository owner/name has {has}: name a file, a folder or a pattern, such as hf://datasets/owner/name/"
    with pytest.raises(ValueError, match=re.escape(message)):
        locate("owner/name", "data.x")


@pytest.mark.parametrize(
    "name", ["hf://o/n/a.parquet", "hf://datasets/o/n/data", "hf://datasets/o/n/*.parquet", "hf://datasets/o/n"]
)
def test_without_a_network_it_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own client, told to stay offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kind = "dataset" if "datasets" in name else "model"
    message = rf"data\.train_file: cannot fetch .* from the hub's {kind} repository o/n \(.+\): check the name"
    with pytest.raises(ValueError, match=message) as caught:
        EditPrompts(name, name).setup("fit")
    assert "\n" not in str(caught.value)


def test_local_patterns(tmp_path: Path) -> None:
    for name in ("b-1.jsonl", "b-0.jsonl", "a.jsonl"):
        (tmp_path / name).write_text("")
    assert locate(f"{tmp_path}/b-*.jsonl", "data.x") == [tmp_path / "b-0.jsonl", tmp_path / "b-1.jsonl"]
    with pytest.raises(ValueError, match=r"data\.x is '.*c-\*\.jsonl', which is not a file"):
        locate(f"{tmp_path}/c-*.jsonl", "data.x")

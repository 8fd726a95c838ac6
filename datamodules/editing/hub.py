"""Resolves names of data files on the hub and fetches the files; no code of a data set is run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from datamodules.parsing import listed
from datamodules.public_sets import origin

RepoType = Literal["model", "dataset"]
DATA_SUFFIXES = (".parquet", ".arrow", ".jsonl")
"""Kinds of files of rows."""


@dataclass(frozen=True)
class HubPath:
    """A file, a folder or a pattern of files in a repository of the hub.

    Args:
        repo: owner/name.
        repo_type: kind of repository (the paper's own data lie in one for models).
        path: within the repository; empty for all of it.
        revision: branch, tag or commit; null is the newest.
    """

    repo: str
    repo_type: RepoType
    path: str = ""
    revision: str | None = None

    def fetch(self) -> list[Path]:
        """Downloads the file, the folder as a whole, or the files that fit the pattern; returns the local copies.

        Raises:
            ValueError: if it cannot be had, or a repository alone is named that has not exactly one file of rows.
        """
        path = self.path or self._only_file()
        if _is_pattern(path):
            folder = self._snapshot(path)
            files = sorted(file for file in folder.glob(path) if file.is_file())
            if not files:
                raise ValueError(f"{self._place} has no files {path}: check the pattern.")
            return files
        if Path(path).suffix in (*DATA_SUFFIXES, ".txt"):
            try:
                return [Path(hf_hub_download(self.repo, path, repo_type=self.repo_type, revision=self.revision))]
            except Exception as error:
                raise self._failure(path, error) from error
        folder = self._snapshot(f"{path}/*") / path
        if not folder.is_dir():
            raise ValueError(f"{self._place} has no folder {path}: name a folder, or a {_KINDS} file.")
        return [folder]

    def _snapshot(self, pattern: str) -> Path:
        try:
            folder = snapshot_download(
                self.repo, repo_type=self.repo_type, revision=self.revision, allow_patterns=[pattern]
            )
        except Exception as error:
            raise self._failure(pattern, error) from error
        return Path(folder)

    def _only_file(self) -> str:
        try:
            names = HfApi().list_repo_files(self.repo, repo_type=self.repo_type, revision=self.revision)
        except Exception as error:
            raise self._failure("its list of files", error) from error
        found = [name for name in names if Path(name).suffix in DATA_SUFFIXES]
        if len(found) != 1:
            has = f"{len(found)} files of rows ({listed(found, 8)})"
            raise ValueError(
                f"{self._place} has {has if found else f'no {_KINDS} file'}: name a file, a folder or a pattern, such "
                f"as hf://{'datasets/' if self.repo_type == 'dataset' else ''}{self.repo}/data/train-*.parquet."
            )
        return found[0]

    def _failure(self, what: str, error: Exception) -> ValueError:
        """Turns an exception of the client, its HTTP library or the system into an error of one sentence."""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        return ValueError(
            f"cannot fetch {what} from {self._place} ({reason}): check the name, the repository's type and the "
            "network, run `hf auth login` if it is gated, or give a local file."
        )

    @property
    def _place(self) -> str:
        return f"the hub's {self.repo_type} repository {self.repo}"


_KINDS = " or ".join(DATA_SUFFIXES)
_NAME = r"\w[\w.-]*/\w[\w.-]*"


def parse_hub(name: str, repo_type: RepoType | None = None) -> HubPath | None:
    """Parses the name of a repository, file, folder or pattern on the hub; returns None for a local path.

    Args:
        name: `hf://datasets/owner/name/path` or, in a model repository, `hf://owner/name/path`, with `@revision` after
            the name if wanted; or `owner/name`, a data set, where nothing local is called so.
        repo_type: kind of repository where the name does not say it.

    Raises:
        ValueError: if the name begins with `hf://` and means nothing on the hub, or contradicts `repo_type`.

    >>> parse_hub("hf://wangfuyun/PrompRL/data/omni_edit_dev.parquet")
    HubPath(repo='wangfuyun/PrompRL', repo_type='model', path='data/omni_edit_dev.parquet', revision=None)
    >>> parse_hub("hf://datasets/owner/name@v1/data/*.parquet")
    HubPath(repo='owner/name', repo_type='dataset', path='data/*.parquet', revision='v1')
    """
    if not name.startswith("hf://"):
        local = Path(name).exists() or Path(name).parent.is_dir() or Path(name).suffix in (*DATA_SUFFIXES, ".txt")
        return None if local or not re.fullmatch(_NAME, name) else HubPath(name, repo_type or "dataset")
    match = re.fullmatch(rf"hf://(datasets/|models/)?({_NAME})(?:@([^/@]+))?(?:/+(.*?))?/*", name)
    if match is None or match[2].startswith("spaces/"):
        raise ValueError(
            f"{name!r} is no path on the hub: write hf://datasets/owner/name/path, or hf://owner/name/path."
        )
    said: RepoType | None = {"datasets/": "dataset", "models/": "model", None: None}[match[1]]
    if said and repo_type not in (None, said):
        raise ValueError(f"{name!r} names a {said} repository and repo_type is {repo_type!r}: drop one of the two.")
    return HubPath(match[2], said or repo_type or "model", match[4] or "", match[3] and match[3].replace("%2F", "/"))


def locate(name: str, setting: str, repo_type: RepoType | None = None) -> list[Path]:
    """Finds the files, or the one folder, that a setting names, and fetches them if they lie on the hub.

    Args:
        name: a path, a pattern such as `data/*.parquet`, or a name on the hub (see `parse_hub`).
        setting: name of the setting, for errors.
        repo_type: kind of repository where the name does not say it.
    """
    try:
        if hub := parse_hub(name, repo_type):
            return hub.fetch()
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error
    path = Path(name)
    if path.exists():
        return [path]
    found = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)))) if _is_pattern(name) else []
    if not found:
        advice = origin(path)
        raise ValueError(
            f"{setting} is {name!r}, which is not a file: {f'{advice}; or ' if advice else ''}give {_KINDS}, a folder, "
            "or a path on the hub."
        )
    return found


def _is_pattern(path: str) -> bool:
    return any(character in path for character in "*?[")

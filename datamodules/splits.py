"""Files of a folder by what they are for: `train.jsonl`, `test_metadata.jsonl`, `dev-00001.parquet` say it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_SPLIT = re.compile(r"(?:(train)(?:ing)?|(val|dev)(?:id(?:ation)?)?|(eval)(?:uation)?|(test)(?:ing)?)(?![a-zA-Z])")
_WANTED = {"train_file": ("train",), "eval_file": ("val", "dev", "eval", "test")}
_LAST = ("test", "eval", "val", "dev")


def files_for(setting: str, files: Iterable[Path]) -> list[Path]:
    """Returns the files whose names begin with the split that a setting is for.

    Args:
        setting: `train_file` (train), `eval_file` (validation, dev or evaluation, else test), or `test_file` and
            `predict_file` (test, else one of those).
        files: files of a folder.

    >>> files_for("eval_file", [Path("train_metadata.jsonl"), Path("test_metadata.jsonl")])[0].name
    'test_metadata.jsonl'
    """
    splits: dict[str, list[Path]] = {}
    for file in files:
        found = _SPLIT.match(file.name)
        if found:
            splits.setdefault(str(found[found.lastindex or 0]), []).append(file)
    return next((splits[name] for name in _WANTED.get(setting, _LAST) if name in splits), [])

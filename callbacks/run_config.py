"""The configuration of a run, its checkpoint and its model folders, for callbacks that write them down."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import SaveConfigCallback

_SECRET = re.compile(r"(^|_)(token|key|secret|password|authorization)$", re.IGNORECASE)


def resolved_config(trainer: L.Trainer) -> dict[str, Any]:
    """Returns the command's configuration with all defaults, as in `config.yaml`; empty without a command.

    Tokens and passwords are left out, as the files that it is written into may be published.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            config: dict[str, Any] = yaml.safe_load(callback.parser.dump(callback.config, skip_none=False))
            return _without_secrets(config)
    return {}


def checkpoint_note(trainer: L.Trainer) -> dict[str, str | None]:
    """Returns path and time of the checkpoint that a command evaluates, on which its images depend.

    Raises:
        ValueError: if the path names no file ("last", "best").
    """
    path = trainer.ckpt_path or resolved_config(trainer).get("ckpt_path")
    if path and not os.path.isfile(path):
        raise ValueError(f"`ckpt_path` is {path}; name the checkpoint's file, which the images depend on.")
    modified = datetime.fromtimestamp(os.stat(path).st_mtime, UTC).isoformat() if path else None
    return {"ckpt_path": os.path.abspath(path) if path else None, "ckpt_modified": modified}


def folder_stamps(config: Any) -> dict[str, str]:
    """Returns the local model folders in a configuration, with the time of their newest file and their size.

    A folder may be trained or exported again under its name.
    """
    if isinstance(config, dict):
        return {name: stamp for value in config.values() for name, stamp in folder_stamps(value).items()}
    if not isinstance(config, str) or not os.path.isdir(config):
        return {}
    stats = [path.stat() for path in Path(config).rglob("*") if path.is_file()]
    newest = max((stat.st_mtime for stat in stats), default=0.0)
    return {config: f"{datetime.fromtimestamp(newest, UTC).isoformat()}, {sum(stat.st_size for stat in stats)} bytes"}


def _without_secrets(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {
            name: "left out" if isinstance(value, str) and _SECRET.search(str(name)) else _without_secrets(value)
            for name, value in tree.items()
        }
    return [_without_secrets(item) for item in tree] if isinstance(tree, list) else tree

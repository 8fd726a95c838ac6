"""The configuration of a run, its checkpoint and its model folders; settings kept beside the images they made."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import SaveConfigCallback

from datamodules.atomic_write import write_atomically
from datamodules.jsonl import read_text
from datamodules.masked import masked
from datamodules.parsing import parse_yaml

_SECRET = re.compile(r"(^|_)(token|key|secret|password|authorization)$", re.IGNORECASE)


def resolved_config(trainer: L.Trainer) -> dict[str, Any]:
    """Returns the command's configuration with all defaults, as in `config.yaml`; empty without a command.

    Tokens and passwords are left out, in addresses too, as the files that it is written into may be published.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            config: dict[str, Any] = yaml.safe_load(masked(callback.parser.dump(callback.config, skip_none=False)))
            return _without_secrets(config)
    return {}


def given(trainer: L.Trainer, option: str) -> Any:
    """Returns the value of an option of the command; None without a command."""
    callbacks: Sequence[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((one.config.get(option) for one in callbacks if isinstance(one, SaveConfigCallback)), None)


def checkpoint_note(trainer: L.Trainer) -> dict[str, str | None]:
    """Returns path and time of the checkpoint that a command evaluates, on which its images depend.

    Raises:
        ValueError: if there is nothing at the path ("last", "best").
    """
    path = trainer.ckpt_path or given(trainer, "ckpt_path")
    if path and not os.path.exists(path):
        raise ValueError(f"`ckpt_path` is {path}; name the checkpoint, which the images depend on.")
    modified = datetime.fromtimestamp(os.stat(path).st_mtime, UTC).isoformat() if path else None
    return {"ckpt_path": os.path.abspath(path) if path else None, "ckpt_modified": modified}


def folder_stamps(config: Any) -> dict[str, str]:
    """Returns the local model folders and LoRA files in a configuration, with their newest file's time and their size.

    A folder may be trained or exported again under its name.
    """
    if isinstance(config, dict):
        return {name: stamp for value in config.values() for name, stamp in folder_stamps(value).items()}
    if not isinstance(config, str) or not (os.path.isdir(config) or Path(config).suffix == ".safetensors"):
        return {}
    stats = [path.stat() for path in (Path(config), *Path(config).rglob("*")) if path.is_file()]
    newest = max((stat.st_mtime for stat in stats), default=0.0)
    return {config: f"{datetime.fromtimestamp(newest, UTC).isoformat()}, {sum(stat.st_size for stat in stats)} bytes"}


def write_settings(note: Path, settings: dict[str, Any]) -> None:
    """Writes down, beside images, the settings that they depend on."""
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    write_atomically(note, f"# Settings that these images were drawn with; later commands compare theirs.\n{text}")


def require_settings(note: Path, settings: dict[str, Any], option: str) -> None:
    """Raises ValueError if the images in a folder were drawn with other settings.

    Args:
        note: file of `write_settings` in that folder; need not exist.
        settings: settings of this command.
        option: the command's option that names the folder.
    """
    changed = changed_setting(note, settings) if note.is_file() else None
    if changed is not None:
        raise ValueError(
            f"the images in {note.parent} were drawn with {changed} now: set `{option}` to another folder, or undo the "
            "change."
        )


def changed_setting(note: Path, settings: dict[str, Any]) -> str | None:
    """Returns "name old, which is new" of a setting that is not as `write_settings` noted it; None if all are."""
    before = dict(_leaves(parse_yaml(read_text(note, "the images' settings"), str(note))))
    now = dict(_leaves(yaml.safe_load(yaml.safe_dump(settings, sort_keys=False))))
    for name in {**now, **before}:
        old, new = before.get(name, "nothing"), now.get(name, "nothing")
        if old != new:
            return f"{name} {old}, which is {new}"
    return None


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted names and values of nested dicts; an empty dict is a value."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _without_secrets(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {
            name: "left out" if isinstance(value, str) and _SECRET.search(str(name)) else _without_secrets(value)
            for name, value in tree.items()
        }
    return [_without_secrets(item) for item in tree] if isinstance(tree, list) else tree

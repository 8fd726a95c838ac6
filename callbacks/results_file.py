"""The file `results.json` of a run, which several callbacks add to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L

from datamodules.atomic_write import write_atomically
from datamodules.jsonl import read_json


def add_results(trainer: L.Trainer, more: dict[str, Any]) -> None:
    """Merges further top-level keys into `results.json`; to be called on every rank."""
    folder = trainer.log_dir  # asked on every rank: Lightning broadcasts it
    if trainer.is_global_zero and folder is not None:
        path = Path(folder) / "results.json"
        dump_results((read_json(path) if path.is_file() else {}) | more, path)


def dump_results(results: dict[str, Any], path: Path) -> None:
    """Writes the file."""
    write_atomically(path, json.dumps(without_nan(results), indent=2) + "\n")


def without_nan(value: Any) -> Any:
    """Replaces NaN, which JSON does not have, by None, in nested dicts and lists."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value

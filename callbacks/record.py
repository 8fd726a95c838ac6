"""`Record`: what a run was made with (versions, commit, seeds, device, data, models), under `run` in `results.json`."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from jsonargparse import Namespace
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.benchmark import texts_digest
from callbacks.results_file import add_results
from callbacks.run_config import given
from datamodules.base import PromptDataModule, bare

PACKAGES = ("promptrl-lightning", "torch", "lightning", "diffusers", "transformers", "peft")
_INDEXES = ("model_index.json", "config.json", "adapter_config.json")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WHOLE_FILE, _WHOLE_PART = 64 * 2**20, 8 * 2**20
"""Bytes up to which a file, and one in a folder, is read whole."""
_PIECES, _PIECE = 64, 4096
_FILES = 1000


class Record(L.Callback):
    """Writes at the start of a fit, validation or test what it is made with into `results.json`, under `run`.

    Every command of ours adds it. The whole configuration is in `config.yaml`.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks everything up on rank 0."""
        add_results(trainer, {"run": record(trainer, pl_module) if trainer.is_global_zero else {}})

    on_test_start = on_fit_start

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks everything up in `lightning validate`."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.on_fit_start(trainer, pl_module)


def record(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
    """Returns what a run is made with; names no user, host or secret beside the paths in its configuration."""
    data = getattr(trainer, "datamodule", None)
    device = trainer.strategy.root_device
    found = {
        "versions": versions(),
        "code": commit(Path(__file__).parents[1]),
        "seeds": {
            "seed_everything": given(trainer, "seed_everything"),
            "model": getattr(module, "seed", None),
            "data": getattr(data, "seed", None),
        },
        "device": {
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": trainer.world_size,
            "nodes": trainer.num_nodes,
            "strategy": type(trainer.strategy).__name__,
            "precision": str(trainer.precision),
        },
        "data": {text: digest(Path(text)) for text in _texts(given(trainer, "data")) if os.path.exists(text)},
        "models": dict(_models(given(trainer, "model"))),
    }
    if isinstance(data, PromptDataModule) and trainer.state.fn == TrainerFn.FITTING:
        prompts = [sample.prompt for sample in bare(data.training_set)]
        found["training_prompts"] = {"prompts": len(prompts), "texts": texts_digest(prompts)}
    return found


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that numbers depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a folder that was never installed
            continue
    return found


def commit(folder: Path) -> dict[str, Any] | None:
    """Returns the git commit that a folder is checked out at, and if tracked files were changed since.

    Args:
        folder: top of a checkout.

    Returns:
        None where it is none, or git is missing or does not answer within five seconds.
    """
    if not (folder / ".git").exists():
        return None
    said = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=5)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
        said.append(done.stdout.strip())
    return {"commit": said[0], "changed": bool(said[1])}


def digest(path: Path) -> str:
    """Returns a digest of a file, or of a folder with all below it, which tells versions apart and proves nothing.

    A file of up to 64 MiB is read whole: the digest is what `sha256sum` prints. A folder's is over the names of its
    files and the contents of the first 1,000 by name. Of files above 64 MiB, in a folder above 8 MiB, the size and 64
    pieces of 4 KiB, spread evenly from the first byte to the last, are read.

    Returns:
        `sha256:<hex>` if all files were read whole, else `sampled:<hex>`; `unreadable` if one cannot be read.
    """
    try:
        if path.is_file():
            whole, digest = _content(path, _WHOLE_FILE)
            return f"{'sha256' if whole else 'sampled'}:{digest.hex()}"
        files = sorted((one.relative_to(path).as_posix(), one) for one in path.rglob("*") if one.is_file())
        total, all_whole = hashlib.sha256("\n".join(name for name, _ in files).encode()), len(files) <= _FILES
        for _, file in islice(files, _FILES):
            whole, part = _content(file, _WHOLE_PART)
            all_whole &= whole
            total.update(part)
    except OSError:
        return "unreadable"
    return f"{'sha256' if all_whole else 'sampled'}:{total.hexdigest()}"


def _content(path: Path, most: int) -> tuple[bool, bytes]:
    """Returns if a file has been read whole, and the digest of what was read."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        if size <= most:
            return True, hashlib.file_digest(file, "sha256").digest()
        found = hashlib.sha256(str(size).encode())
        for number in range(_PIECES):
            file.seek((size - _PIECE) * number // (_PIECES - 1))
            found.update(file.read(_PIECE))
    return False, found.digest()


def _models(config: Any) -> Iterator[tuple[str, str]]:
    """Yields the model folders, weight files and hub ids in a configuration, with a digest or the hub's commit."""
    for text in _texts(config):
        is_folder = any(os.path.isfile(os.path.join(text, name)) for name in _INDEXES)
        if is_folder or (text.endswith(".safetensors") and os.path.isfile(text)):
            yield text, digest(Path(text))
        elif _HUB_ID.fullmatch(text) and not os.path.exists(text):
            try:
                cached = [try_to_load_from_cache(text, name) for name in _INDEXES]
            except HFValidationError:
                continue
            for file in cached:
                if isinstance(file, str):  # .../snapshots/<commit>/config.json
                    yield text, f"hub:{Path(file).parent.name}"
                    break


def _texts(config: Any) -> Iterator[str]:
    """Yields the texts in nested settings that may be paths."""
    if isinstance(config, Namespace):
        config = vars(config)
    if isinstance(config, dict | list):
        for value in config.values() if isinstance(config, dict) else config:
            yield from _texts(value)
    elif isinstance(config, str) and 0 < len(config) < 1000 and "\0" not in config and "\n" not in config:
        yield config

"""The last lines of a run, which say where things are and what to type next."""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def closing(folder: Path, root: Path, prompt: str | None) -> str:
    """Returns the last lines of a finished fit, validation or test: report, checkpoint, commands to copy.

    Args:
        folder: the run's folder.
        root: folder of all runs.
        prompt: an example for `promptrl predict`; None for a command that leaves no checkpoint.
    """
    folder, root = _short(folder), _short(root)
    lines = [f"Report:      {folder / name}" for name in ("report.html", "results.md") if (folder / name).is_file()][:1]
    last = folder / "checkpoints" / "last.ckpt"
    draws = prompt is not None and last.exists()
    lines += [f"Checkpoint:  {last}"] * draws
    lines += [f"TensorBoard: tensorboard --logdir {shlex.quote(str(root))}"]
    if draws:
        options = (("--config", folder / "config.yaml"), ("--ckpt_path", last), ("--prompt", prompt))
        words = (f"{option} {shlex.quote(str(value))}" for option, value in options)
        lines.append(" \\\n    ".join(["Draw:        promptrl predict", *words]))
    return "\n".join(lines)


def _short(path: Path) -> Path:
    """Returns the path from the current folder, or the whole one where it lies outside."""
    relative = Path(os.path.relpath(path))
    return path if ".." in relative.parts else relative

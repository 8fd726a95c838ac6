"""Checkpoints of an experiment's earlier runs, for `--ckpt_path last` and `--ckpt_path best`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lightning_modules.checkpoints import read


def last(experiment: Path, dirpath: str | None = None) -> Path:
    """Returns the newest `last.ckpt` of an experiment's runs.

    Args:
        experiment: folder of the runs, `<default_root_dir>/<experiment>`.
        dirpath: the option `checkpoint.dirpath`, where runs may keep theirs instead.

    Raises:
        ValueError: if there is none.
    """
    found = _by_age(path for folder in _folders(experiment, dirpath) for path in folder.glob("last*.ckpt"))
    if not found:
        raise ValueError(
            f"`ckpt_path` is last, but no run in {experiment} has a last.ckpt: fit one, or give a checkpoint's file."
        )
    return found[-1]


def best(experiment: Path, dirpath: str | None = None, monitor: str | None = None) -> Path:
    """Returns the checkpoint with the best score of all of an experiment's runs.

    Args:
        experiment: as for `last`.
        dirpath: as for `last`.
        monitor: name of the score; None is what the newest run with a best checkpoint went by.

    Raises:
        ValueError: if no run has kept checkpoints by this score.
    """
    scored: list[tuple[str, float, Path]] = []
    newest = (_by_age(folder.glob("*.ckpt"))[-1:] for folder in _folders(experiment, dirpath))
    for path in _by_age(path for paths in newest for path in paths):
        callbacks = read(path, record_only=True).get("callbacks", {})
        for key, state in callbacks.items():
            if not isinstance(state, dict) or not state.get("monitor") or state.get("best_model_score") is None:
                continue
            # By its name: the path is relative to where that command was started.
            file = path.parent / Path(state["best_model_path"]).name
            sign = 1 if "'mode': 'max'" in key else -1
            if file.exists() and monitor in (None, state["monitor"]):
                scored.append((state["monitor"], sign * float(state["best_model_score"]), file))
    if not scored:
        raise ValueError(
            f"`ckpt_path` is best, but no run in {experiment} has kept a best checkpoint by "
            f"{monitor or 'a score'}: fit one with `checkpoint.monitor`, or give a checkpoint's file."
        )
    return max((score, file) for name, score, file in scored if name == scored[-1][0])[1]


def _folders(experiment: Path, dirpath: str | None) -> list[Path]:
    return [*experiment.glob("version_*/checkpoints"), *([] if dirpath is None else [Path(dirpath).expanduser()])]


def _by_age(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, len(str(path)), str(path)))

"""`RunFolder`: a run's folder read without pandas or torch (configuration, results, state), and how to find some."""

from __future__ import annotations

import glob
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from datamodules.jsonl import read_text
from datamodules.parsing import parse_json, parse_yaml
from datamodules.seed import run_seed

_NO_RUNS = ("checkpoints", "images", "predictions")
MODE_LABELS = {"without_pe": "without PE", "with_pe": "with PE"}
NAMES = {
    "geneval": "GenEval",
    "pickscore": "PickScore",
    "hps": "HPSv2.1",
    "unified_reward": "UnifiedReward",
    "ocr": "OCR-1k",
    "tmdb": "TMDB",
    "openlib": "OpenLib",
    "edit": "Editing",
    "editreward": "EditReward",
    "drawbench": "DrawBench",
}
# Files from before `headlines` was written; the benchmarks' own names.
_HEADLINES = ("overall", "mean", "f")


@dataclass(frozen=True, eq=False)
class RunFolder:
    """The folder `<root>/<experiment>/version_N` of one run.

    Args:
        folder: path of the folder.
        config: its `config.yaml`; empty if there is none.
        results: its `results.json`; empty before the first validation.
    """

    folder: Path
    config: Mapping[str, Any] = field(repr=False)
    results: Mapping[str, Any] = field(repr=False)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads the configuration and the results of a folder.

        Raises:
            ValueError: if one is damaged.
        """
        config = parse_yaml(_text(folder / "config.yaml"), str(folder / "config.yaml")) or {}
        results = parse_json(_text(folder / "results.json") or "{}", str(folder / "results.json"))
        for name, value in (("config.yaml", config), ("results.json", results)):
            if not isinstance(value, dict):
                raise ValueError(f"{folder / name} is damaged: it holds a {type(value).__name__}, not a mapping")
        run = cls(folder, config, results)
        try:
            json.dumps(results, ensure_ascii=False).encode()  # half a character is no text
            _ = run.headlines, [int(entry["step"]) + float(entry["rollouts"]) for entry in run.history]
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            said = f"{type(error).__name__}: {str(error)[:100]}"
            raise ValueError(f"{folder / 'results.json'} is damaged ({said}); delete it or the folder.") from error
        return run

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the configuration by its dotted name, as on the command line."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value

    @property
    def stage(self) -> str:
        """Command that made the folder: `test` for `lightning test`, else `fit`."""
        # That command alone has `images`; one that was cut off has left no scores yet.
        return "test" if "images" in self.config or (self.folder / "scores.jsonl").is_file() else "fit"

    @property
    def mode(self) -> str:
        """Name of the method by the agents that learned; `base` for a test without a checkpoint, empty if unknown."""
        if self.stage == "test" and self.config and not self.get("ckpt_path"):
            return "base"
        if self.fitted is not None:
            return self.fitted.mode
        rates = {agent: self.get(f"model.init_args.{agent}.init_args.learning_rate") for agent in ("flow", "language")}
        refines = self.get("model.init_args.language") is not None
        learns = mode_of(rates["flow"] is not None, rates["language"] is not None if refines else None)
        return learns or str(self.get("model.class_path", "")).rpartition(".")[2]

    @property
    def seed(self) -> int | None:
        """Seed of the model, else of everything; a test has its fit's, since all are tested on the same scenes."""
        if self.fitted is not None:
            return self.fitted.seed
        seed: int | None = self.get("model.init_args.seed")
        seed = self.get("seed_everything") if seed is None else seed
        return run_seed(None) if seed is False else seed  # Lightning seeded nothing

    @property
    def history(self) -> list[dict[str, Any]]:
        """Validations in order, `{"step", "rollouts", "seconds", "results"}` with the results of all benchmarks."""
        merged: dict[int, dict[str, Any]] = {}
        for entries in self.results.get("history", {}).values():
            for entry in entries:
                one = merged.setdefault(entry["step"], entry | {"results": {}})
                one["results"] = one["results"] | entry["results"]
                one["seconds"] = max(one["seconds"], entry["seconds"])
        return [merged[step] for step in sorted(merged)]

    @property
    def finished(self) -> bool:
        """True if the command came to its end: at `max_steps`, or earlier where a rule stopped it."""
        if (self.folder / "results.md").is_file():  # `Report` writes it last of all
            return True
        steps, most = [entry["step"] for entry in self.history], self.get("trainer.max_steps")
        return self.stage == "fit" and bool(steps) and isinstance(most, int) and steps[-1] >= most > 0

    @property
    def saved(self) -> bool:
        """True if there is a checkpoint in its folder."""
        return any((self.folder / "checkpoints").glob("*.ckpt"))

    @property
    def continues(self) -> Path | None:
        """Folder of the run whose checkpoint this fit was resumed from; None if it began anew."""
        return self._origin if self.stage == "fit" else None

    @cached_property
    def fitted(self) -> RunFolder | None:
        """The fit whose checkpoint a test run evaluated; None if that folder was deleted."""
        path = self._origin if self.stage == "test" else None
        return None if path is None or not (path / "config.yaml").is_file() else RunFolder.read(path)

    @property
    def _origin(self) -> Path | None:
        path = Path(self.get("ckpt_path") or "")
        if path.suffix != ".ckpt":
            return None
        # A relative path is one from where the command was started, which lies above its folder as a rule.
        starts = [Path.cwd(), *self.folder.resolve().parents]
        run = next((start / path for start in starts if (start / path).exists()), path).resolve().parents[1]
        return None if run == self.folder.resolve() else run  # one that went on in its own folder is one run

    @property
    def headlines(self) -> dict[tuple[str, str], float]:
        """Headline scores of the last evaluation by the benchmark's key and the mode."""
        return headlines(self.results, self.results)


def mode_of(flow: bool, language: bool | None) -> str:
    """Names the method by which agents learn.

    Args:
        flow: True if the flow model learns.
        language: True if the refiner learns; None without a refiner.

    Returns:
        The name, empty if nothing learns.
    """
    if flow:
        return {None: "flow-only", False: "flow-only, static PE", True: "PromptRL"}[language]
    return "prompt-only" if language else ""


def headlines(results: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Finds the headline scores among results.

    Args:
        results: key -> mode -> score -> value; whatever else it holds is left out.
        whole: the `results.json`, which names each benchmark's headline score.

    Returns:
        Key and mode -> value; NaN for one that no image has.
    """
    found = {}
    for key, modes in results.items():
        if isinstance(modes, Mapping) and isinstance(modes.get("without_pe"), Mapping):
            for mode, scores in modes.items():
                names = (whole.get("headlines", {}).get(key), *_HEADLINES)
                name = next((name for name in names if name in scores), None)
                if name is not None:
                    found[key, mode] = float("nan") if scores[name] is None else float(scores[name])
    return found


def key_label(key: str) -> str:
    """Formats a key of the results for readers.

    >>> key_label("geneval"), key_label("geneval.typos"), key_label("drawbench/hps")
    ('GenEval', 'GenEval, typos', 'HPSv2.1 on DrawBench')
    """
    name, _, reward = key.partition("/")
    base, _, kind = name.partition(".")
    words = NAMES.get(base, base) + (f", {kind}" if kind else "")
    return f"{NAMES.get(reward, reward)} on {words}" if reward else words


def find(*places: str | Path) -> list[Path]:
    """Finds run folders.

    Args:
        places: run folders, folders above them, patterns (`runs/*/miniature`).

    Returns:
        Their paths, each once, in the order of the places, then of the names.

    Raises:
        ValueError: if one of the places has no run.
    """
    found: dict[Path, None] = {}
    for place in places:
        path = Path(place).expanduser()
        matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path))))
        folders = [folder for match in matches for folder in below(match)]
        if not folders:
            raise ValueError(
                f"there is no run in {place}: give a run's folder (with metrics.csv or results.json), one above it, or "
                "a pattern."
            )
        found |= dict.fromkeys(folders)
    return list(found)


def read_all(cls: type[Any], folders: list[Path], *, skip_broken: bool = False) -> list[Any]:
    """Reads several run folders, each as a `cls`.

    Raises:
        ValueError: naming all damaged folders, unless they are to be skipped with a warning; or if none is left.
    """
    runs, broken = [], []
    for folder in folders:
        try:
            runs.append(cls.read(folder))
        except ValueError as error:
            broken.append(str(error))
    if broken and skip_broken and runs:
        warnings.warn(f"left out: {'; '.join(broken)}", stacklevel=3)
    elif broken:
        raise ValueError(f"{'; '.join(broken)}. Remove these folders, or leave them out (skip_broken=True).")
    return runs


def below(folder: Path) -> Iterator[Path]:
    """Yields the run folders at or below a folder, which need not exist."""
    for path, folders, files in os.walk(folder):
        if {"metrics.csv", "results.json"} & set(files) or any(name.startswith("events.out") for name in files):
            folders.clear()
            yield Path(path)
        folders[:] = sorted(name for name in folders if name not in _NO_RUNS)


def _text(path: Path) -> str:
    return read_text(path, "a run's file") if path.is_file() else ""

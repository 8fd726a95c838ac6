"""`Sweep`: experiments x overlays x values x seeds as commands, each with a folder of its own; starts no process."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.atomic_write import write_atomically
from datamodules.jsonl import read_json, read_text
from datamodules.local_path import local_path
from datamodules.parsing import parse_yaml
from lightning_modules.run_folder import RunFolder, below


@dataclass(frozen=True)
class Command:
    """One `lightning` command of a run, and the traces it leaves in its folder.

    Attributes:
        stage: `fit` or `test`.
        options: arguments of `lightning`, without a checkpoint.
        configs: configuration files named in the options.
        folder: root of what the command writes; its log and its record (`fit.json`) are there too.
    """

    stage: str
    options: list[str]
    configs: list[str]
    folder: Path

    @property
    def record(self) -> dict[str, Any]:
        """Identity of the command: its options, and a digest of each configuration file."""
        digests = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] for path in self.configs}
        return {"options": self.options, "configs": digests}

    @property
    def record_path(self) -> Path:
        """Path of the record of the command that was started here."""
        return self.folder / f"{self.stage}.json"

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replaces the record of this command."""
        write_atomically(self.record_path, json.dumps(record, indent=2) + "\n")

    def runs(self) -> list[RunFolder]:
        """Run folders that the command has written so far, the newest last."""
        paths = sorted(below(self.folder), key=lambda path: (len(path.name), path.name))  # version_10 after version_9
        found = (RunFolder.read(path) for path in paths)
        # A test lies below its fit.
        return [run for run in found if self.stage == "test" or self.folder / "test" not in run.folder.parents]

    def checkpoint(self) -> Path | None:
        """Path of the newest `last.ckpt`; None without one."""
        paths = [run.folder / "checkpoints" / "last.ckpt" for run in self.runs()]
        return max((path for path in paths if path.exists()), key=lambda path: path.stat().st_mtime, default=None)

    def finished(self) -> bool:
        """Returns True if the command ended by itself: its record says so, or the report, written last, is there."""
        seen = read_json(self.record_path) if self.record_path.is_file() else {}
        return seen.get("seconds") is not None or any((run.folder / "results.md").is_file() for run in self.runs())

    def conflict(self) -> str:
        """Describes a run by another command in the folder; empty if there is none."""
        if not self.record_path.is_file():
            return f"{self.folder} has a run that no sweep made" if self.runs() else ""
        was, now = read_json(self.record_path), self.record
        gone = [option for option in was["options"] if option not in now["options"]]
        new = [option for option in now["options"] if option not in was["options"]]
        edited = [path for path, digest in now["configs"].items() if was["configs"].get(path, digest) != digest]
        if gone or new:
            what = f"with {' '.join(gone) or 'nothing'} in place of {' '.join(new) or 'nothing'}"
        elif edited:
            what = f"before {', '.join(edited)} was edited"
        else:
            return ""
        return f"{self.folder} was made {what}"


@dataclass(frozen=True)
class Job:
    """One run of the sweep: its fit, and the test after it if there is one."""

    name: str
    commands: list[Command]


@dataclass
class Sweep:
    """Runs `lightning fit` for every experiment, value and seed, several side by side; run again, it goes on.

    Args:
        configs: experiments.
        seeds: each S sets `seed_everything`, `model.init_args.seed` and `data.init_args.seed`.
        root: every run gets a folder below, named after its experiment, overlay, values and seed, with its log in it.
        overlays: files of which each run lays one over its experiment; null in the list is a run with none.
        grid: options that vary. `<option>: [values]`; or `<name>: {<option>: [values], <option>: [values]}` for options
            that change together; or `<name>: {multiply: [options], by: [factors]}`, which multiplies what each
            experiment has, and leaves alone what is null there (the learning rate of a frozen agent).
        overrides: option -> value for all runs.
        test_configs: files laid over the experiment in a `lightning test` of each fit's last checkpoint, below its
            folder, with the experiment's own seeds: all are tested on the same scenes. Null is no test.
        test_overrides: option -> value for the tests.
        fit: false trains nothing: only tests, of the models that the experiments and the grid name.
        processes: runs side by side.
        dry_run: print the commands that are left to run, and do nothing.
    """

    configs: list[str]
    seeds: list[int] = field(default_factory=lambda: [42])
    root: str = "runs/sweep"
    overlays: list[str | None] = field(default_factory=lambda: [None])
    grid: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    test_configs: list[str] | None = None
    test_overrides: dict[str, Any] = field(default_factory=dict)
    fit: bool = True
    processes: int = 1
    dry_run: bool = False

    def __post_init__(self) -> None:
        local_path(self.root, "the sweep's `root`")
        if self.processes < 1:
            raise ValueError(f"the sweep's `processes` is {self.processes}, use at least 1.")
        for name in ("configs", "seeds", "overlays"):
            values = getattr(self, name)
            twice = [str(value) for value, times in Counter(values).items() if times > 1]
            if not values or twice:
                raise ValueError(
                    f"the sweep's `{name}` {f'has {twice[0]} twice' if twice else 'is empty'}: correct it."
                )
        if not self.fit and (self.test_configs is None or len(self.seeds) > 1):
            raise ValueError(
                "the sweep has `fit: false`: give `test_configs` (which may be []) and one seed; without training, "
                "another seed would be the same test."
            )
        for path in (*self.configs, *filter(None, self.overlays), *(self.test_configs or ())):
            if not Path(path).is_file():
                raise ValueError(f"the sweep names {path}, but there is no such file; give an existing configuration.")

    def jobs(self) -> list[Job]:
        """Lists all runs seed by seed, so that runs to be compared finish early.

        Raises:
            ValueError: if the grid is not as described, or two runs would have one name.
        """
        jobs = []
        experiments = zip(self.configs, _stems(self.configs), strict=True)
        for seed, (config, stem), overlay in itertools.product(self.seeds, experiments, self.overlays):
            files = [config] if overlay is None else [config, overlay]
            stems = [stem] if overlay is None else [stem, Path(overlay).stem]
            given = [parse_yaml(read_text(path, "a configuration"), path) for path in files]
            for points in itertools.product(*(self._axis(name, config, given) for name in self.grid)):
                name = "-".join([*stems, *(label for label, _ in points), *([f"s{seed}"] if self.fit else [])])
                values = self.overrides | {key: value for _, point in points for key, value in point.items()}
                jobs.append(self._job(name, files, seed, values))
        twice = [name for name, times in Counter(job.name for job in jobs).items() if times > 1]
        if twice:
            raise ValueError(f"two runs of the sweep would be called {twice[0]}: make their values differ.")
        return jobs

    def _job(self, name: str, files: list[str], seed: int, values: dict[str, Any]) -> Job:
        folder = Path(self.root) / name
        seeds: dict[str, Any] = {
            key: seed for key in ("seed_everything", "model.init_args.seed", "data.init_args.seed")
        }
        configs = [f"--config={path}" for path in files]
        fit = ["fit", *configs, *_options(seeds | values | {"trainer.default_root_dir": str(folder)})]
        commands = [Command("fit", fit, files, folder)] if self.fit else []
        if self.test_configs is not None:
            below = folder / "test" if self.fit else folder
            # A file that stands later wins, also over options before it.
            overlays = [f"--config={path}" for path in self.test_configs]
            own = self.test_overrides | {"trainer.default_root_dir": str(below)}
            test = ["test", *configs, *_options(values), *overlays, *_options(own)]
            commands.append(Command("test", test, [*files, *self.test_configs], below))
        return Job(name, commands)

    def _axis(self, name: str, config: str, given: Sequence[Any]) -> list[tuple[str, dict[str, Any]]]:
        """Lists label and options of each point along one dimension of the grid."""
        axis = self.grid[name]
        wrong = (
            f"the sweep's grid has {name}: {json.dumps(axis)}; give a list of values, or lists of one length for each "
            "option, or `multiply` (options) and `by` (factors)."
        )
        if isinstance(axis, list):
            axis, label = {name: axis}, name.rpartition(".")[2]
        else:
            label = _label(name)
        lists = list(axis.values()) if isinstance(axis, dict) else []
        if not lists or not all(isinstance(values, list) and values for values in lists):
            raise ValueError(wrong)
        if axis.keys() == {"multiply", "by"}:
            own = {key: self.overrides.get(key, _look_up(given, key)) for key in axis["multiply"]}
            bases = {key: float(value) for key, value in own.items() if value is not None}
            if not bases:
                raise ValueError(
                    f"the sweep's grid multiplies {', '.join(own)}, of which {config} has none: name one that it has."
                )
            return [
                (f"{label}{_label(by)}", {key: value * float(by) for key, value in bases.items()}) for by in axis["by"]
            ]
        if len({len(values) for values in lists}) > 1:
            raise ValueError(wrong)
        points = [dict(zip(axis, values, strict=True)) for values in zip(*lists, strict=True)]
        return [(f"{label}{_label(next(iter(point.values())))}", point) for point in points]


def _options(values: Mapping[str, Any]) -> list[str]:
    """Formats options as `--key=value`, with a value that is no text as JSON."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def _label(value: Any) -> str:
    """Formats a value for a folder's name."""
    text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")


def _look_up(trees: Sequence[Any], key: str) -> Any:
    """Returns what the last of some files that has an option says; None if none has it."""
    for tree in reversed(trees):
        parts = key.split(".")
        while parts and isinstance(tree, Mapping) and parts[0] in tree:
            tree = tree[parts.pop(0)]
        if not parts:
            return tree
    return None


def _stems(configs: Sequence[str]) -> list[str]:
    """Names files by their stems, with their folders' names before stems that are not unique."""
    stems = [Path(config).stem for config in configs]
    return [
        stem if stems.count(stem) == 1 else f"{Path(config).parent.name}_{stem}"
        for config, stem in zip(configs, stems, strict=True)
    ]

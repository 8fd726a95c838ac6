"""What the studies of `paper_in_miniature` left on the disk, by setting: curves of fits, scores of tests."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from callbacks.comparison import Gap
from callbacks.curves import Curves, curve
from callbacks.prompt_scores import Summary, mean_of_pictures, mean_of_tags, prompt_contrast, prompt_table
from callbacks.runs import Run, load
from lightning_modules.sweep_plan import Sweep
from rewards.metric import PromptTable

GENEVAL = "GenEvalBenchmark"
REWARDS = {"ocr": "RewardBenchmark by ocr", "preference": "RewardBenchmark by preference"}
"""Set of prompts -> the benchmark that scores it, by its title without the sets."""
SUMMARIES: dict[str, Summary] = {GENEVAL: mean_of_tags("correct")}
"""Headline of a benchmark's tests; else the mean of the reward over pictures."""


@dataclass(frozen=True)
class Setting:
    """The seeds of one experiment with one set of values.

    Attributes:
        fits: finished ones, by seed.
        tests: of these fits, by seed; of untrained models a single one.
    """

    fits: Mapping[Any, Run]
    tests: Mapping[Any, Run]

    def only(self, seeds: Sequence[int]) -> Setting:
        """The same with some of its seeds."""
        fits, tests = ({seed: runs[seed] for seed in seeds if seed in runs} for runs in (self.fits, self.tests))
        return Setting(fits, tests)

    def curves(self, column: str) -> Curves:
        """Seed -> a column by rollouts."""
        return {seed: curve(run, column) for seed, run in self.fits.items()}

    def tables(self, name: str, mode: str, benchmark: str = GENEVAL) -> list[PromptTable]:
        """One a seed; the same objects whenever asked."""
        return [_table(run, name, mode, benchmark) for run in self.tests.values()]

    def having(self, name: str, mode: str, benchmark: str = GENEVAL) -> Setting:
        """The seeds whose tests scored this set in this mode: some seeds have fewer tests than others."""
        tests = {}
        for seed, run in self.tests.items():
            if (name, mode, benchmark) in _scored(run):
                tests[seed] = run
        return Setting(self.fits, tests)


@dataclass(frozen=True)
class Score:
    """A setting's tests on one set in one mode; what scores are compared by."""

    setting: Setting
    name: str
    mode: str
    benchmark: str = GENEVAL

    @property
    def there(self) -> bool:
        """Whether all tested seeds have it."""
        having = self.setting.having(self.name, self.mode, self.benchmark)
        return bool(having.tests) and len(having.tests) == len(self.setting.tests)

    @property
    def tables(self) -> list[PromptTable]:
        """One a seed."""
        return self.setting.tables(self.name, self.mode, self.benchmark)

    @property
    def summary(self) -> Summary:
        """The benchmark's headline."""
        return SUMMARIES.get(self.benchmark, mean_of_pictures("table"))

    @cached_property
    def value(self) -> Gap:
        """Mean over seeds with its interval over prompts."""
        return contrast((1, self))

    @property
    def by_tag(self) -> dict[str, float]:
        """Tag -> mean over its prompts and the seeds."""
        column = "correct" if self.benchmark == GENEVAL else "table"
        means = {}
        for tag in dict.fromkeys(self.tables[0].tags):
            parts = [table.rows([i for i, own in enumerate(table.tags) if own == tag]) for table in self.tables]
            means[tag] = prompt_contrast([(1, parts)], summarize=mean_of_pictures(column), resamples=1).value
        return means

    @property
    def by_seed(self) -> list[float]:
        """Each seed's own."""
        return [prompt_contrast([(1, [table])], summarize=self.summary, resamples=1).value for table in self.tables]


def contrast(*terms: tuple[float, Score]) -> Gap:
    """Weighted sum of scores of one benchmark, prompt by prompt: `(1, a), (-1, b)` is a difference."""
    return prompt_contrast([(sign, score.tables) for sign, score in terms], summarize=terms[0][1].summary)


@cache
def _scored(run: Run) -> dict[tuple[str, str, str], str]:
    """Set, mode and benchmark -> the benchmark's title, which also names its sets where these were chosen."""
    keys = run.scores[["set", "mode", "benchmark"]].drop_duplicates().itertuples(index=False)
    return {(name, mode, re.sub(r" of .*?(?= by |$)", "", title)): title for name, mode, title in keys}


@cache
def _table(run: Run, name: str, mode: str, benchmark: str) -> PromptTable:
    return prompt_table(run, name, mode, _scored(run)[name, mode, benchmark])


class Study:
    """All settings below a sweep's root.

    Args:
        root: of the sweep; it need not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        found: dict[str, tuple[dict, dict]] = {}  # fits and tests
        for stage in ("fit", "test"):
            try:
                runs = load(root, stage=stage) if root.is_dir() else []
            except ValueError:  # no run yet, or none of this stage
                continue
            for run in runs:
                job = run.folder.relative_to(root).parts[0]
                if not run.finished:
                    continue
                found.setdefault(re.sub(r"-s\d+$", "", job), ({}, {}))[stage == "test"][run.seed] = run
        self.settings = {name: Setting(*runs) for name, runs in found.items()}

    def __getitem__(self, name: str) -> Setting:
        """A setting by its folder's name without the seed; an empty one if nothing of it is finished."""
        return self.settings.get(name, Setting({}, {}))

    @property
    def seconds(self) -> float:
        """Time of all its processes, as the sweep measured it."""
        paths = [path for name in ("*/fit.json", "*/test/test.json", "*/test.json") for path in self.root.glob(name)]
        records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        return sum(record.get("seconds") or 0.0 for record in records)


class Studies:
    """All studies.

    Args:
        plans: name -> its sweep.
    """

    def __init__(self, plans: Mapping[str, Sweep]) -> None:
        self._plans = plans
        # Sweeps that share a root are one study.
        roots = {Path(plan.root) for plan in plans.values()}
        self._by_root = {root: Study(root) for root in sorted(roots)}

    def __getitem__(self, name: str) -> Study:
        """A study by the name of its plan; an empty one if there is no such plan."""
        plan = self._plans.get(name)
        return Study(Path()) if plan is None else self._by_root[Path(plan.root)]

    def __iter__(self) -> Iterator[str]:
        """Names of the plans; of those that share a root the first."""
        roots: dict[Path, str] = {}
        for name, plan in self._plans.items():
            roots.setdefault(Path(plan.root), name)
        return iter(roots.values())

    def transfers(self) -> tuple[Setting, Setting]:
        """Tests of the second flow model behind the untrained refiner, and behind each of PromptRL's."""
        found = self["transfer"].settings
        fresh = [setting for name, setting in found.items() if name.endswith("-miniature_language")]
        return merged(fresh), merged(setting for setting in found.values() if setting not in fresh)

    def heading(self) -> str:
        """Date, machine, time, and what is missing."""
        fits = sum(len(setting.fits) for study in self._by_root.values() for setting in study.settings.values())
        hours = sum(study.seconds for study in self._by_root.values()) / 3600
        lines = [
            f"{datetime.date.today():%d %B %Y}: {fits} finished fits and their tests, {hours:.1f} hours of processes "
            f"(one thread each) on {os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}. "
            "`python -m benchmarks.paper_in_miniature` makes all of it and goes on where it was cut off.",
        ]
        missing = []
        for name, plan in self._plans.items():
            jobs = plan.jobs()
            left = sum(not all(command.finished() for command in job.commands) for job in jobs)
            if left:
                missing.append(f"{name} ({left} of {len(jobs)} runs)")
        if missing:
            lines.append(f"**Not finished yet:** {', '.join(missing)}.")
        return "\n\n".join(lines)


def merged(settings: Iterable[Setting]) -> Setting:
    """Settings that differ in what is not compared, as the seeds of one."""
    listed = list(settings)
    fits, tests = (
        {i: run for i, run in enumerate(run for one in listed for run in getattr(one, stage).values())}
        for stage in ("fits", "tests")
    )
    return Setting(fits, tests)


def span(values: Sequence[float]) -> str:
    """Least and greatest, as the tables show them.

    >>> span([0.5, 0.4]), span([0.5])
    ('.40-.50', '')
    """
    short = [f"{value:.2f}".replace("0.", ".", 1) for value in (min(values), max(values))]
    return "-".join(short) if len(values) > 1 else ""

"""Finished runs of the studies of `benchmarks.paper`, by setting: curves of fits, scores of tests."""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from callbacks.runs.comparison import Gap
from callbacks.runs.contrasts import Summary, mean_of_images, mean_of_tags, prompt_contrast, prompt_table
from callbacks.runs.curves import Curves, curve
from callbacks.runs.loading import Run, load
from callbacks.scores.prompt_scores import PromptTable
from datamodules.jsonl import read_json
from lightning_modules.sweep.plan import Sweep
from miniature.scenes.prompts import MiniaturePrompts, ShapesPrompts
from miniature.signs.prompts import MultiRewardPrompts, PreferencePrompts, WordsPrompts

GENEVAL = "GenEvalBenchmark"
REWARDS = {"ocr": "RewardBenchmark by ocr", "preference": "RewardBenchmark by preference"}
"""Set of prompts -> title, without the sets, of the benchmark that scores it."""
SUMMARIES: dict[str, Summary] = {GENEVAL: mean_of_tags("correct")}
"""Benchmark -> its headline; of other benchmarks it is the mean of the reward over images."""
PROMPTS: dict[str, type[MiniaturePrompts]] = {
    GENEVAL: ShapesPrompts,
    REWARDS["ocr"]: WordsPrompts,
    REWARDS["preference"]: PreferencePrompts,
}
"""Benchmark -> the data module of its tests, whose first set has the original prompts."""
VARIED = (42, 43, 44, 45, 46)
"""Seeds of the studies that vary GenEval's comparison, which has more."""
LEAST_SEEDS = 3
"""Number of seeds below which nothing is concluded."""


@dataclass(frozen=True, eq=False)
class Test:
    """A finished `lightning test`.

    Attributes:
        run: the test's run.
    """

    run: Run
    _tables: dict[tuple[str, str, str], PromptTable] = field(default_factory=dict)

    @cached_property
    def titles(self) -> dict[tuple[str, str, str], str]:
        """(Set, mode, benchmark) -> the benchmark's full title, which also names its sets where these were chosen."""
        if not len(self.run.scores):
            return {}
        keys = self.run.scores[["set", "mode", "benchmark"]].drop_duplicates().itertuples(index=False)
        return {(name, mode, re.sub(r" of .*?(?= by |$)", "", title)): title for name, mode, title in keys}

    def table(self, name: str, mode: str, benchmark: str) -> PromptTable:
        """Returns the scores by prompt, the same object at every call."""
        key = name, mode, benchmark
        if key not in self._tables:
            self._tables[key] = prompt_table(self.run, name, mode, self.titles[key])
        return self._tables[key]


@dataclass(frozen=True)
class Setting:
    """The seeds of one experiment with one set of values.

    Attributes:
        fits: seed -> finished fit; empty where nothing was trained.
        tests: seed -> test of that fit; tests of untrained models or of exports are numbered instead.
    """

    fits: Mapping[Any, Run]
    tests: Mapping[Any, Test]

    def only(self, seeds: Iterable[int]) -> Setting:
        """Returns this setting with some of its seeds."""
        wanted = list(seeds)
        return Setting(
            {seed: self.fits[seed] for seed in wanted if seed in self.fits},
            {seed: self.tests[seed] for seed in wanted if seed in self.tests},
        )

    def having(self, name: str, mode: str, benchmark: str = GENEVAL) -> Setting:
        """Returns this setting with only the tests that scored a set in a mode: some seeds have fewer than others."""
        tests = {seed: test for seed, test in self.tests.items() if (name, mode, benchmark) in test.titles}
        return Setting(self.fits, tests)

    def curves(self, column: str) -> Curves:
        """Returns seed -> curve of a logged column by rollouts."""
        return {seed: curve(run, column) for seed, run in self.fits.items()}


@dataclass(frozen=True)
class Score:
    """The score of a setting's tests on one set in one mode, by one benchmark."""

    setting: Setting
    name: str
    mode: str
    benchmark: str = GENEVAL

    @property
    def tests(self) -> dict[Any, Test]:
        """Seed -> test, of the tests that have this score."""
        return dict(self.setting.having(self.name, self.mode, self.benchmark).tests)

    @property
    def there(self) -> bool:
        """True if a test has this score."""
        return bool(self.tests)

    @property
    def value(self) -> Gap:
        """Mean over seeds, with its 95 % interval."""
        return contrast((1, self))

    def tables(self, seeds: Sequence[Any]) -> list[PromptTable]:
        """Returns the scores by prompt of each seed."""
        return [self.tests[seed].table(self.name, self.mode, self.benchmark) for seed in seeds]

    @property
    def by_tag(self) -> dict[str, float]:
        """Tag -> mean score over its images and the seeds."""
        tables = self.tables(list(self.tests))
        summarize = mean_of_images("correct" if self.benchmark == GENEVAL else "table")
        means = {}
        for tag in dict.fromkeys(tables[0].tags):
            parts = [table.rows([i for i, own in enumerate(table.tags) if own == tag]) for table in tables]
            means[tag] = prompt_contrast([(1, parts)], summarize=summarize, resamples=1).value
        return means

    @property
    def by_seed(self) -> list[float]:
        """Score of each seed."""
        summarize = SUMMARIES.get(self.benchmark, mean_of_images("table"))
        return [
            prompt_contrast([(1, [table])], summarize=summarize, resamples=1).value
            for table in self.tables(list(self.tests))
        ]


def shared_seeds(*scores: Score) -> list[Any]:
    """Returns the seeds that all trained settings have; tests of untrained models have no seeds to share."""
    trained = [set(score.tests) for score in scores if score.setting.fits]
    return sorted(set.intersection(*trained)) if trained else []


def contrast(*terms: tuple[float, Score], scenes: bool = False) -> Gap:
    """Sums scores of one benchmark with weights, prompt by prompt, over the seeds they share.

    From three seeds on the sum has an interval.

    Args:
        terms: weights and scores; `(1, a), (-1, b)` is a difference.
        scenes: True gives the interval of other scenes and seeds; False that of other seeds, noise, and prompts for the
            scenes that the test has.
    """
    seeds = shared_seeds(*(score for _, score in terms))
    benchmark = terms[0][1].benchmark
    tables = [(sign, score.tables(seeds if score.setting.fits else list(score.tests))) for sign, score in terms]
    first = tables[0][1][0]
    found = prompt_contrast(
        tables,
        summarize=SUMMARIES.get(benchmark, mean_of_images("table")),
        scenes=asked(benchmark, len(first)) if scenes else {name: name for name in first.ids},
        runs=True,
    )
    # Of two seeds Student's distribution says nothing, of one it cannot.
    return replace(found, low=math.nan, high=math.nan) if 0 < len(seeds) < LEAST_SEEDS else found


def asked(benchmark: str, num: int) -> dict[str, str]:
    """Returns id -> original prompt (its scene) of a benchmark's first `num` test prompts, alone or in tagged data."""
    name, samples = next(iter(PROMPTS[benchmark](eval_prompts=num).test_samples().items()))
    tagged = MultiRewardPrompts(eval_prompts=num).test_samples()[name]
    return {sample.id: sample.prompt for sample in (*samples, *tagged)}


def fewest_scenes(score: Score) -> int:
    """Counts the scenes of the tag with the fewest, in the tests of a score."""
    table = score.tables(list(score.tests))[0]
    scenes = asked(score.benchmark, len(table))
    pairs = {(tag, scenes[name]) for tag, name in zip(table.tags, table.ids, strict=True)}
    return min(Counter(tag for tag, _ in pairs).values())


class Study:
    """All settings below a sweep's root.

    Args:
        root: folder of the sweep, which need not exist; None is a study that was not planned.
    """

    def __init__(self, root: Path | None) -> None:
        self.root = root
        found: dict[str, tuple[dict, dict]] = {}  # fits and tests
        for run in _finished(root) if root is not None else ():
            assert root is not None
            job = re.sub(r"-s\d+$", "", run.folder.relative_to(root).parts[0])
            fits, tests = found.setdefault(job, ({}, {}))
            if run.stage == "fit":
                fits[run.seed] = run
            else:
                tests[run.seed] = Test(run)
        self.settings = {name: Setting(*runs) for name, runs in found.items()}

    def __getitem__(self, name: str) -> Setting:
        """Returns a setting by its folder's name without the seed; an empty one if nothing of it is finished."""
        return self.settings.get(name, Setting({}, {}))

    @cached_property
    def processes(self) -> list[tuple[float, float]]:
        """Beginning and end, in seconds since the epoch, of all finished processes, as the sweep measured them."""
        names = ("*/fit.json", "*/test/test.json", "*/test.json")
        paths = [path for name in names for path in (self.root.glob(name) if self.root is not None else ())]
        found = []
        for path in paths:
            seconds = read_json(path).get("seconds") or 0.0
            end = path.stat().st_mtime  # it is written when the process ends
            found.append((end - seconds, end))
        return found


def _finished(root: Path) -> list[Run]:
    """Reads the runs that came to their end; damaged ones are left out with a warning."""
    if not root.is_dir():
        return []
    try:
        runs = load(root, stage=None, skip_broken=True)
    except ValueError as error:  # none at all, or only damaged ones
        if "damaged" in str(error):
            warnings.warn(str(error), stacklevel=2)
        return []
    finished = []
    for run in runs:
        try:
            _ = run.seed  # a test's is its fit's, which may be damaged
            if run.finished and (run.stage == "fit" or len(run.scores)):
                finished.append(run)
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
    return finished


class Studies:
    """All studies of the report, by name.

    Args:
        plans: name of a study -> its sweep.
    """

    def __init__(self, plans: Mapping[str, Sweep]) -> None:
        self._plans = plans
        # Sweeps that share a root are one study.
        self._by_root = {root: Study(root) for root in sorted({Path(plan.root) for plan in plans.values()})}

    def __getitem__(self, name: str) -> Study:
        """Returns a study by the name of its plan; an empty one if there is no such plan."""
        return self._by_root[Path(self._plans[name].root)] if name in self._plans else Study(None)

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names of the plans; of plans that share a root, the first."""
        roots: dict[Path, str] = {}
        for name, plan in self._plans.items():
            roots.setdefault(Path(plan.root), name)
        return iter(roots.values())

    def heading(self) -> str:
        """Writes the report's head: date, machine, time taken, and unfinished studies."""
        fits = sum(len(setting.fits) for study in self._by_root.values() for setting in study.settings.values())
        processes = sorted(span for study in self._by_root.values() for span in study.processes)
        lines = [
            f"{datetime.date.today():%d %B %Y}: {fits} finished fits and their tests, "
            f"{sum(end - begin for begin, end in processes) / 3600:.1f} hours of processes of one thread each in "
            f"{covered(processes) / 3600:.1f} hours of wall time, on {os.cpu_count()} cores ({processor()}), torch "
            f"{torch.__version__}. `python -m benchmarks.paper` makes all of it but the base of lucky words, "
            "and goes on where it was cut off.",
        ]
        missing = []
        for name, plan in self._plans.items():
            jobs = plan.jobs()
            left = sum(not _done(job.commands) for job in jobs)
            if left:
                missing.append(f"{name} ({left} of {len(jobs)} runs)")
        if missing:
            lines.append(f"**Not finished yet:** {', '.join(missing)}.")
        return "\n\n".join(lines)


def _done(commands: Iterable[Any]) -> bool:
    try:
        return all(command.finished() for command in commands)
    except ValueError:  # a damaged folder
        return False


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Computes the length of the union of intervals.

    >>> covered([(0, 2), (1, 3), (5, 6)])
    4.0
    """
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def processor() -> str:
    """Returns the name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", path.read_text(), re.MULTILINE) if path.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def merged(settings: Iterable[Setting]) -> Setting:
    """Merges untrained settings whose differences do not matter into one."""
    return Setting({}, dict(enumerate(test for one in settings for test in one.tests.values())))


def span(values: Sequence[float]) -> str:
    """Formats the lowest and highest of some scores; empty for one score.

    >>> span([0.5, 0.4]), span([0.5])
    ('.40-.50', '')
    """
    short = [f"{value:.2f}".replace("0.", ".", 1) for value in (min(values), max(values))]
    return "-".join(short) if len(values) > 1 else ""

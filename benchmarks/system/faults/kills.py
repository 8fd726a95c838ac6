"""Kills of a fit at a named part; the run must go on from its last checkpoint and end as one that nobody killed."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.system.faults.outcome import Outcome, Tick
from benchmarks.system.faults.short_fit import EVERY, short_fit
from callbacks.runs.loading import Run, load
from lightning_modules.checkpoints import CheckpointIO
from lightning_modules.cli import main
from lightning_modules.evaluation import EvaluatedAgents
from lightning_modules.policies.flow import FlowPolicy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.prompt_rl import PromptRL
from rewards.geneval.reward import GenEvalReward
from tests.forked import Forked

STEPS = 4
PLACES: Mapping[str, tuple[type, str, tuple[int, ...]]] = {
    "refine": (LanguagePolicy, "refine", (1, 2, 3)),
    "rollout": (FlowPolicy, "rollout", (1, 2, 3)),
    "reward": (GenEvalReward, "__call__", (1, 2, 3)),
    "update": (PromptRL, "update", (1, 2, 3)),
    "validation": (EvaluatedAgents, "validation_step", (2, STEPS)),
    "checkpoint": (CheckpointIO, "save_checkpoint", (2, 3, STEPS)),
}
"""Part -> its method, and the finished steps after which it is entered and a checkpoint exists or is being written."""
LONGEST = 0.04
"""Longest time from the beginning of a part to the signal, in seconds; a part takes 0.01 to 0.2."""
STOPPED = 128 + signal.SIGTERM
SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Kill:
    """When a fit is killed.

    Args:
        part: key of `PLACES`.
        number: the signal.
        step: number of finished steps.
        delay: seconds from the part's beginning to the signal.
    """

    part: str
    number: signal.Signals
    step: int
    delay: float

    def __str__(self) -> str:
        return f"{self.number.name} {1000 * self.delay:.0f} ms into {self.part} after step {self.step}"


def kills(number: int, seed: int) -> list[Kill]:
    """Spreads kills over the parts, steps and signals: two of three are SIGKILL, the rest SIGTERM and SIGUSR1."""
    draws = random.Random(seed)
    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1, signal.SIGKILL, signal.SIGKILL)
    planned = []
    for index in range(number):
        part = list(PLACES)[index % len(PLACES)]
        turn = index // len(PLACES) + index % len(PLACES)
        planned.append(Kill(part, signals[turn % 6], draws.choice(PLACES[part][2]), draws.uniform(0, LONGEST)))
    return planned


def attack(folder: Path, number: int, tick: Tick, seed: int = 0) -> Iterator[Outcome]:
    """Kills a fit many times; yields the outcome for each part.

    What is lost: steps beyond those since the last checkpoint that was due, files that cannot be read, rows of
    `metrics.csv`, validations, and final numbers that differ from the unbroken run's.

    Args:
        folder: takes the runs.
        number: how often.
        tick: called after each kill.
        seed: of the moments.
    """
    whole = folder / "unbroken"
    done = Forked(lambda: main(short_fit(whole, STEPS)), folder / "unbroken.log")
    if done.wait() != 0:
        raise RuntimeError(f"the fit fails without a kill:\n{done.text}")
    outcomes = {part: Outcome(f"kill in {part}") for part in PLACES}
    for index, kill in enumerate(kills(number, seed)):
        start = time.perf_counter()
        outcomes[kill.part].add([(what, f"{kill}: {why}") for what, why in losses(folder / f"{index}", kill, whole)])
        outcomes[kill.part].seconds += time.perf_counter() - start
        tick()
    yield from (outcome for outcome in outcomes.values() if outcome.times)


def losses(folder: Path, kill: Kill, whole: Path) -> list[tuple[str, str]]:
    """Kills one fit, goes on with it, and compares it with the unbroken one.

    Returns:
        Kind and details of everything that was lost.

    Raises:
        RuntimeError: if the fit never came to the part.
    """
    root, note = folder / "runs", folder / "step"
    folder.mkdir()
    broken = Forked(lambda: _killed(kill, note, short_fit(root, STEPS)), folder / "broken.log")
    status = broken.wait()
    if not note.exists():
        raise RuntimeError(f"no {kill}: the fit ended with {status}\n{broken.text}")
    finished = int(note.read_text())
    gone = kill.number == signal.SIGKILL
    found = [("torn file", text) for text in damaged(root)]
    if status != (-kill.number if gone else STOPPED) and not (status == 0 and not gone):
        found.append(("exit status", f"{status}; {last_line(broken.text)}"))
    if status != 0 and not found:
        saved = max((load_checkpoint(path)["global_step"] for path in root.rglob("last.ckpt")), default=0)
        missing = finished - (EVERY if gone else 0) - saved
        found += [("step", f"{finished} done, {saved} saved")] * missing
    if status != 0:
        resume = Forked(lambda: main([*short_fit(root, STEPS), "--ckpt_path=last"]), folder / "resumed.log")
        if resume.wait() != 0:
            return [*found, ("resume", last_line(resume.text))]
        found += [("torn file", text) for text in damaged(root)]
    return found + differences(whole, root)


def _killed(kill: Kill, note: Path, words: list[str]) -> None:
    """Runs a command in this process, which the signal reaches in the part."""
    if SHM.is_dir() and os.access(SHM, os.W_OK):
        tempfile.tempdir = str(SHM)  # another file system than the run's
    owner, name, _ = PLACES[kill.part]
    work, begin = getattr(owner, name), PromptRL.on_train_start
    modules: list[PromptRL] = []
    timers: list[threading.Timer] = []

    def fire() -> None:
        note.write_text(str(modules[0].global_step))
        os.kill(os.getpid(), kill.number)

    def entered(*args: Any, **kwargs: Any) -> Any:
        if modules and modules[0].global_step == kill.step and not timers:
            timers.append(threading.Timer(kill.delay, fire))
            timers[0].daemon = True
            timers[0].start()
        return work(*args, **kwargs)

    def begun(module: PromptRL) -> None:
        modules.append(module)
        begin(module)

    setattr(owner, name, entered)
    setattr(PromptRL, "on_train_start", begun)  # noqa: B010 (mypy forbids the assignment)
    main(words)


def damaged(root: Path) -> list[str]:
    """Lists what cannot be read among the files that a run has put in their places."""
    found = []
    for path in sorted(root.rglob("*.ckpt")):
        try:
            load_checkpoint(path)
        except (OSError, RuntimeError, ValueError) as error:
            found.append(f"{path}: {error}")
    for folder in root.glob("*/version_*"):
        try:
            Run.read(folder)
        except ValueError as error:
            found.append(str(error))
    return found


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads all of a checkpoint's file."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def differences(whole: Path, root: Path) -> list[tuple[str, str]]:
    """Compares an interrupted run with the unbroken one: parameters, optimizer, metrics, validations, results."""
    ((expected,), (run, *more)) = load(whole), load(root)
    found = [("run", f"{root} is read as {len(more) + 1} runs")] if more else []
    ends = [load_checkpoint(max(place.rglob("last.ckpt"), key=lambda p: p.stat().st_mtime)) for place in (whole, root)]
    wrong = [key for key in ("global_step", "state_dict", "optimizer_states") if not same(ends[0][key], ends[1][key])]
    found += [("final numbers", f"{', '.join(wrong)} differ")] if wrong else []
    tables = {"row of metrics": (expected.training, run.training), "validation": _validations(expected, run)}
    for kind, rows in tables.items():
        missing = sorted(set(rows[0].index) - set(rows[1].index))
        found += [(kind, f"of step {step} in {root}") for step in missing]
        columns = [name for name in rows[0] if not str(name).startswith("time/") and name not in ("seconds", "epoch")]
        kept = rows[0].index.intersection(rows[1].index)
        had = rows[0].loc[kept, columns]
        # A resumed run may log more, such as another check of the replayed log-probs.
        if not rows[1].reindex(columns=columns).loc[kept].where(had.notna()).equals(had):
            found.append((f"values of a {kind}", str(root)))
    if run.headlines != expected.headlines or not run.finished:
        found.append(("results.json", str(root)))
    return found


def _validations(expected: Run, run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulates the histories in `results.json` of two runs."""
    tables = []
    for one in (expected, run):
        rows = {
            entry["step"]: {"rollouts": entry["rollouts"], "results": str(entry["results"])} for entry in one.history
        }
        tables.append(pd.DataFrame.from_dict(rows, orient="index"))
    return tables[0], tables[1]


def same(a: object, b: object) -> bool:
    """Returns True if two nested values are equal, to the bit where they hold tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def last_line(text: str) -> str:
    """Returns the last line of a log that is not blank."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output")

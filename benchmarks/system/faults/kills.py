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
PLACES: Mapping[str, tuple[type, str]] = {
    "refine": (LanguagePolicy, "refine"),
    "rollout": (FlowPolicy, "rollout"),
    "reward": (GenEvalReward, "__call__"),
    "update": (PromptRL, "update"),
    "validation": (EvaluatedAgents, "validation_step"),
    "checkpoint": (CheckpointIO, "save_checkpoint"),
}
"""Part -> its method."""
CHAIN = 3
"""Number of kills of one run: it is continued after each, and to its end after the last."""
LONGEST = 0.04
"""Longest time from the beginning of a part to the signal, in seconds; a part takes 0.01 to 0.2."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
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


def plan(number: int, seed: int) -> list[list[Kill]]:
    """Plans chains of kills, whose parts all come equally often; half of them are SIGKILL.

    Args:
        number: number of kills; a chain has the next `CHAIN` of them.
        seed: of parts, signals and moments.
    """
    draws = random.Random(seed)
    chains: list[list[Kill]] = []
    while sum(map(len, chains)) < number:
        # Validations come after steps 2 and 4; before the first checkpoint there is nothing to go on from.
        late, early = ["validation", "checkpoint"], ["refine", "rollout", "reward", "update"]
        draws.shuffle(late)
        draws.shuffle(early)
        for parts in ([early[0], late[0], early[1]], [early[2], early[3], late[1]]):
            steps = [1, 2, {"validation": STEPS, "checkpoint": draws.choice((3, STEPS))}.get(parts[2], 3)]
            signals = [signal.SIGKILL, draws.choice((signal.SIGTERM, signal.SIGUSR1)), draws.choice(SIGNALS)]
            draws.shuffle(signals)
            chains.append([Kill(*one, draws.uniform(0, LONGEST)) for one in zip(parts, signals, steps, strict=True)])
    surplus = sum(map(len, chains)) - number
    return [chain for chain in [*chains[:-1], chains[-1][: len(chains[-1]) - surplus]] if chain]


def attack(folder: Path, number: int, tick: Tick, seed: int = 0) -> Iterator[Outcome]:
    """Kills fits many times; yields the outcome for each part.

    What is lost: steps beyond those since the last checkpoint that was due, files that cannot be read, rows of
    `metrics.csv`, validations, and final numbers unlike the unbroken run's; they count for a run's last kill.

    Args:
        folder: takes the runs.
        number: how often.
        tick: called after each kill.
        seed: of parts, signals and moments.
    """
    whole = folder / "unbroken"
    done = Forked(lambda: main(short_fit(whole, STEPS)), folder / "unbroken.log")
    if done.wait() != 0:
        raise RuntimeError(f"the fit fails without a kill:\n{done.text}")
    outcomes = {part: Outcome(f"kill in {part}") for part in PLACES}
    for index, chain in enumerate(plan(number, seed)):
        own, story = folder / f"{index}", "; ".join(map(str, chain))
        own.mkdir()
        for turn, kill in enumerate(chain):
            start = time.perf_counter()
            found = after_kill(own, turn, kill)
            if turn == len(chain) - 1:
                found += after_all(own, whole)
            outcomes[kill.part].add([(what, f"{story}: {why}") for what, why in found])
            outcomes[kill.part].seconds += time.perf_counter() - start
            tick()
    yield from (outcome for outcome in outcomes.values() if outcome.times)


def after_kill(folder: Path, turn: int, kill: Kill) -> list[tuple[str, str]]:
    """Starts a fit, or goes on with it, and kills it.

    Args:
        folder: takes its log and, in `runs`, its run folders.
        turn: number of kills before.
        kill: when.

    Returns:
        Kind and details of everything that was lost.
    """
    root, note = folder / "runs", folder / f"{turn}.step"
    words = short_fit(root, STEPS, *(["--ckpt_path=last"] if turn else []))
    broken = Forked(lambda: _killed(kill, note, words), folder / f"{turn}.log")
    status = broken.wait()
    if not note.exists():
        return [("part", f"it never came to {kill.part}; {last_line(broken.text)}")]
    gone = kill.number == signal.SIGKILL
    found = [("torn file", text) for text in damaged(root)]
    if status != (-kill.number if gone else STOPPED) and not (status == 0 and not gone):  # 0: it was over already
        found.append(("exit status", f"{status}; {last_line(broken.text)}"))
    if not found:
        finished = int(note.read_text()) - (EVERY if gone else 0)
        saved = max((load_checkpoint(path)["global_step"] for path in root.rglob("last.ckpt")), default=0)
        found += [("step", f"{finished} should be saved, {saved} are")] * (finished - saved)
    return found


def after_all(folder: Path, whole: Path) -> list[tuple[str, str]]:
    """Goes on to the end, and compares the run with the unbroken one; returns everything that was lost."""
    root = folder / "runs"
    if not any(root.rglob("results.md")):  # which a run writes last of all
        resume = Forked(lambda: main([*short_fit(root, STEPS), "--ckpt_path=last"]), folder / "last.log")
        if resume.wait() != 0:
            return [("resume", last_line(resume.text))]
    return [("torn file", text) for text in damaged(root)] + differences(whole, root)


def _killed(kill: Kill, note: Path, words: list[str]) -> None:
    """Runs a command in this process, which the signal reaches in the part."""
    if SHM.is_dir() and os.access(SHM, os.W_OK):
        tempfile.tempdir = str(SHM)  # another file system than the run's
    owner, name = PLACES[kill.part]
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
    (expected,) = load(whole)
    run = max(load(root), key=lambda one: str(one.folder))  # another one was killed before its first checkpoint
    found: list[tuple[str, str]] = []
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

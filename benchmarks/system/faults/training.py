"""Training whose reward server answers badly; its memory, file handles and threads are measured on the way."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from benchmarks.system.faults.outcome import Outcome, Tick
from benchmarks.system.faults.serving import KINDS, TIMEOUT, Served, redness, serve
from benchmarks.system.faults.short_fit import short_fit
from lightning_modules.cli import main
from lightning_modules.prompt_rl import PromptRL
from rewards.base import Score
from tests.forked import Forked

SHARE = 0.2
"""Share of the answers that are spoilt."""
MEASURES = {"memory": ("MB", 20.0), "file handles": ("", 2.0), "threads": ("", 2.0)}
"""Measure -> its unit, and the rise an hour that still counts as flat."""
SETTLED = 0.25
"""Share of a soak that is left out of the slope, since caches fill."""
SIGTERM_EXIT = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Sample:
    """What a process holds at one time: seconds since the start, and the values of `MEASURES`."""

    seconds: float
    values: tuple[float, ...]


def sample(pid: int, start: float) -> Sample:
    """Measures a process by /proc."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    memory = int(status["VmRSS"].split()[0]) / 1024
    handles = len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(time.monotonic() - start, (memory, float(handles), float(status["Threads"])))


def slopes(samples: Sequence[Sample]) -> tuple[float, ...]:
    """Fits a line to each measure after the first quarter of the time; returns its rise an hour.

    >>> slopes([Sample(900.0 * n, (100.0 if n else 0.0, 5.0 + n, 3.0)) for n in range(9)])
    (0.0, 4.0, 0.0)
    """
    settled = [one for one in samples if one.seconds >= SETTLED * samples[-1].seconds]
    hours = np.array([one.seconds for one in settled]) / 3600
    values = np.array([one.values for one in settled])
    return tuple(round(float(np.polyfit(hours, column, 1)[0]), 6) + 0.0 for column in values.T)


def attack(
    folder: Path, tick: Tick, *, steps: int = -1, hours: float = 0.0, kinds: Sequence[str] = KINDS, seed: int = 0
) -> Iterator[Outcome]:
    """Trains with a reward server of which 20 % of the answers are spoilt.

    What is lost: steps that were not trained, and images with a wrong score or none.

    Args:
        folder: takes the run.
        tick: called after each step.
        steps: number of training steps; -1 trains for `hours`.
        hours: time after which a signal ends the training.
        kinds: ways to spoil an answer.
        seed: of the choice of answers.

    Yields:
        The outcome, and after a training of some hours that of memory, file handles and threads.
    """
    start = time.perf_counter()
    with serve(folder / "server", SHARE, kinds, seed) as served:
        seen = folder / "seen"
        seen.touch()
        fit = Forked(lambda: _checked(seen, _words(folder / "runs", steps, served)), folder / "fit.log")
        measured = _watch(fit, served, seen, tick, 3600 * hours if steps < 0 else None)
        status = fit.kill(signal.SIGTERM) if steps < 0 and fit.returncode is None else fit.wait(600)
        spoilt = Counter(served.spoilt)
    done = [list(map(int, line.split())) for line in seen.read_text().splitlines()]
    outcome = Outcome(f"bad answers of the reward server ({SHARE:.0%})", sum(spoilt.values()))
    for step, wrong, without in done:
        outcome.lose([("wrong score", f"step {step}, seed {seed}")] * wrong)
        outcome.lose([("image without a score", f"step {step}, seed {seed}")] * without)
    ended = fit.text.splitlines()[-1:] or ["no output"]
    if steps >= 0:
        outcome.lose([("step", f"{len(done)} of {steps} trained; {ended[0]}")] * (steps - len(done)))
    if status != (SIGTERM_EXIT if steps < 0 else 0):
        outcome.lose([("exit status", f"{status}; {ended[0]}")])
    outcome.survived = max(0, outcome.times - outcome.lost)
    outcome.seconds = time.perf_counter() - start
    outcome.extra.append(f"{len(done)} steps; " + ", ".join(f"{kind} {number}" for kind, number in spoilt.items()))
    yield outcome
    if steps < 0:
        yield _flatness(measured, hours)


def _words(root: Path, steps: int, served: Served) -> list[str]:
    options: dict[str, Any] = {"urls": served.spoilt_url, "reward": "redness", "timeout": TIMEOUT, "retries": 8}
    options |= {"backoff": 0.02, "cooldown": 0.1, "max_items": 2, "on_failure": "skip"}
    reward = "--model.init_args.reward"
    return short_fit(
        root, steps, f"{reward}=rewards.serving.client.RemoteReward",
        *(f"{reward}.init_args.{name}={value}" for name, value in options.items()),
        "--trainer.val_check_interval=50", "--checkpoint.every_n_train_steps=50",
    )  # fmt: skip


def mistakes(scores: Sequence[Score], images: Sequence[Image]) -> tuple[int, int]:
    """Counts the images whose score is not that of `Redness`, and those without one."""
    wrong = sum(score.valid and score.native != redness(image) for score, image in zip(scores, images, strict=True))
    return wrong, sum(not score.valid for score in scores)


def _checked(seen: Path, words: list[str]) -> None:
    """Runs a command that notes for each step how many images have a wrong score, and how many have none."""
    collect = PromptRL.collect

    def checked(module: PromptRL, samples: Any) -> Any:
        rollout = collect(module, samples)
        wrong, without = mistakes(rollout.scores, rollout.images)
        with seen.open("a") as file:
            file.write(f"{module.global_step} {wrong} {without}\n")
        return rollout

    setattr(PromptRL, "collect", checked)  # noqa: B010 (mypy forbids the assignment)
    main(words)


def _watch(fit: Forked, served: Served, seen: Path, tick: Tick, seconds: float | None) -> dict[str, list[Sample]]:
    """Measures training and server until the training ends, or for some time from its first step on."""
    start, steps = time.monotonic(), 0
    measured: dict[str, list[Sample]] = {"training": [], "server": []}
    while fit.poll() is None and (seconds is None or time.monotonic() < start + seconds):
        if not steps:
            start = time.monotonic()
        for name, process in (("training", fit), ("server", served.process)):
            with suppress(OSError, KeyError):  # it has ended
                measured[name].append(sample(process.pid, start))
        for _ in range(steps, steps := len(seen.read_text().splitlines())):
            tick()
        time.sleep(1.0 if seconds is None else max(0.5, min(5.0, seconds / 200)))
    return measured


def _flatness(measured: dict[str, list[Sample]], hours: float) -> Outcome:
    """Compares the rises an hour with what counts as flat."""
    outcome = Outcome(f"soak of {hours:g} h: memory, file handles, threads of training and server")
    for name, samples in measured.items():
        rises = slopes(samples)
        for (measure, (unit, flat)), rise, last in zip(MEASURES.items(), rises, samples[-1].values, strict=True):
            line = f"{measure} of the {name}: {last:.0f} {unit}, {rise:+.2f} {unit} an hour".replace("  ", " ")
            outcome.add([("rise", line)] if rise > flat else [])
            outcome.extra.append(line)
    return outcome

"""Fuzzing of everything that reads what others wrote: files, the reward server's requests, its client's answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.system.faults import files, requests
from benchmarks.system.faults.files import Surface
from benchmarks.system.faults.fuzz import fuzz
from benchmarks.system.faults.outcome import Outcome, Tick
from benchmarks.system.faults.short_fit import short_fit
from lightning_modules.cli import main
from tests.forked import Forked


def attack(folder: Path, number: int, tick: Tick, seed: int = 0) -> Iterator[Outcome]:
    """Fuzzes every reader, with the files of a short fit; yields the outcome of each.

    What is lost: cases that end in anything but a right result or our own one sentence, hang, or run code.

    Args:
        folder: takes the files that are read, and those that broke something.
        number: cases for each reader.
        tick: called after each case.
        seed: of hypothesis.
    """
    run = finished_run(folder)
    for name in surfaces(run, folder):
        yield read_all(name, run, folder, number, tick, seed)


def finished_run(folder: Path) -> Path:
    """Makes the folder of a finished fit.

    Raises:
        RuntimeError: if it fails.
    """
    done = Forked(lambda: main(short_fit(folder / "runs", 2)), folder / "fit.log")
    if done.wait() != 0:
        raise RuntimeError(f"the fit fails:\n{done.text}")
    (run,) = folder.glob("runs/*/version_0")
    return run


def surfaces(run: Path, folder: Path) -> dict[str, Surface]:
    """Returns all readers by name; see `attack` for the folder, `files.surfaces` for the run."""
    return files.surfaces(run, folder / "marker") | requests.surfaces()


def read_all(name: str, run: Path, folder: Path, number: int, tick: Tick, seed: int = 0) -> Outcome:
    """Fuzzes one reader; see `attack`."""
    surface, own = surfaces(run, folder)[name], folder / name.partition(" ")[0].strip(",'")
    own.mkdir(exist_ok=True)
    return fuzz(
        name, surface.cases, surface.reader(own), number, tick,
        names=surface.names, marker=folder / "marker", kept=folder / "lost", start=seed,
    )  # fmt: skip

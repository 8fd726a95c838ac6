"""Attacks training, readers of files and the reward server, and prints what was survived and what was lost.

python -m benchmarks.system.faults [--only kills rewards fuzz clients soak] [--soak HOURS] [--folder FOLDER]

It kills fits at every part, spoils a fifth of the reward server's answers through a whole training, feeds hostile files
and requests to everything that reads some, has many clients ask one server, and measures memory, file handles and
threads over hours of training. Ends with status 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.progress import Progress

from benchmarks.system.faults import clients, kills, readers, training
from benchmarks.system.faults.outcome import Outcome, table

ATTACKS = ("kills", "rewards", "fuzz", "clients", "soak")


def parser() -> argparse.ArgumentParser:
    """Builds the command's options."""
    built = argparse.ArgumentParser(
        prog="python -m benchmarks.system.faults", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    built.add_argument("--only", nargs="+", choices=ATTACKS, default=ATTACKS, help="attacks to do; all if not given")
    built.add_argument("--kills", type=int, default=40, help="number of kills")
    built.add_argument("--steps", type=int, default=500, help="training steps with bad answers of the reward server")
    built.add_argument("--cases", type=int, default=10_000, help="fuzz cases of each reader")
    built.add_argument("--clients", type=int, default=200, help="clients of one server at a time")
    built.add_argument("--soak", type=float, default=2.0, metavar="HOURS", help="hours of the soak")
    built.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    built.add_argument("--folder", type=Path, help="keeps runs, logs and the inputs that broke something; new")
    return built


def main() -> None:
    """Does the attacks and prints the table."""
    options = parser().parse_args()
    torch.set_num_threads(1)
    start, outcomes = time.perf_counter(), []
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        progress = stack.enter_context(Progress(transient=True))
        for name in options.only:
            total = {"kills": options.kills, "rewards": options.steps, "clients": 2 * options.clients * clients.CALLS}
            bar = progress.add_task(name, total=total.get(name))

            def tick(bar: object = bar) -> None:
                progress.advance(bar)  # type: ignore[arg-type]

            own = folder / name
            own.mkdir()
            attacks: dict[str, Iterator[Outcome]] = {
                "kills": kills.attack(own, options.kills, tick, options.seed),
                "rewards": training.attack(own, tick, steps=options.steps, seed=options.seed),
                "fuzz": readers.attack(own, options.cases, tick, options.seed),
                "clients": clients.attack(own, options.clients, tick, options.seed),
                "soak": training.attack(own, tick, hours=options.soak, seed=options.seed),
            }
            outcomes += list(attacks[name])
    print(table(outcomes))
    seconds = time.perf_counter() - start
    print(f"\n`python -m benchmarks.system.faults {shlex.join(sys.argv[1:])}`, {seconds:.0f} s")
    sys.exit(any(outcome.lost for outcome in outcomes))


if __name__ == "__main__":
    main()

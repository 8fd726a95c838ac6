"""Runs a sweep: `python -m lightning_modules.sweep --config configs/sweeps/miniature.yaml`.

Every run is a `lightning fit` (and `lightning test`, if asked for) in a process of its own, with the log in
`<root>/<run>/fit.log`. The same command again skips what is finished, and resumes what was cut off from its last
checkpoint. A run that crashes is named with its log's last line; the others go on.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lightning_modules.run_folder import MODE_LABELS, key_label
from lightning_modules.sweep.plan import Command, Job, Sweep

PROGRAM = [sys.executable, "-m", "lightning_modules.cli"]
GRACE_S = 20.0
"""Seconds that a child process may take to end before it is killed."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of one run of a sweep.

    Attributes:
        name: name of the run.
        state: `done`, `was done` (before this sweep), `crashed` or `stopped`.
        seconds: time that its processes took now, without those of earlier calls of the sweep.
        note: after a crash, the path of the log and its last line.
        scores: label -> headline score at the end.
    """

    name: str
    state: str
    seconds: float
    note: str = ""
    scores: dict[str, float] = field(default_factory=dict)


class Children:
    """Child processes that run now, so that all can be stopped."""

    def __init__(self) -> None:
        self.stopped = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def call(self, command: Sequence[str], log: Path) -> int | None:
        """Runs a command and appends its output to a log.

        Returns:
            Its exit status; None if it was stopped, or not started because all were.
        """
        with log.open("ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            with self._lock:
                if self.stopped:
                    return None
                # A session of its own: Ctrl-C reaches the sweep alone, which then ends its children in order.
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={"OMP_NUM_THREADS": "1"} | os.environ,  # threads of several runs would be in each other's way
                )
                self._running.add(process)
            status = process.wait()
            with self._lock:
                self._running.discard(process)
        return None if self.stopped else status

    def stop(self) -> None:
        """Ends all child processes, by force if they take too long."""
        with self._lock:
            self.stopped = True
            running = list(self._running)
        for process in running:
            process.terminate()
        deadline = time.monotonic() + GRACE_S
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except (subprocess.TimeoutExpired, KeyboardInterrupt):  # too slow, or asked a second time
                deadline = 0.0
                os.killpg(process.pid, signal.SIGKILL)  # with its own children, each in the session begun above


def run(job: Job, children: Children) -> Outcome:
    """Runs the commands of a job that are not finished; a damaged folder is this job's crash, not the sweep's."""
    started = time.monotonic()
    try:
        return _run(job, children, started)
    except ValueError as error:
        return Outcome(job.name, "crashed", time.monotonic() - started, str(error))


def _run(job: Job, children: Children, started: float) -> Outcome:
    state = "was done"
    for command in job.commands:
        if command.finished():
            continue
        state = "done"
        begun = time.monotonic()
        status = children.call([*PROGRAM, *command.options, *_checkpoint(job, command)], _started(command))
        if status is None:
            return Outcome(job.name, "stopped", time.monotonic() - started)
        log = command.folder / f"{command.stage}.log"
        # A fit that was cut off behind its last step and validates nothing has done all it should.
        if status != 0 and not (command.stage == "fit" and "nothing to train: " in _last_line(log)):
            return Outcome(job.name, "crashed", time.monotonic() - started, f"{log}: {_last_line(log)}")
        seen = command.record | {"seconds": round(time.monotonic() - begun, 1)}
        command.write_record(seen)
    return Outcome(job.name, state, time.monotonic() - started, scores=_scores(job))


def run_all(jobs: Sequence[Job], processes: int, tell: Callable[[Outcome], None]) -> list[Outcome]:
    """Runs jobs side by side; an interrupt ends all of them.

    Args:
        jobs: in the order in which they are started.
        processes: number of jobs at once, at most.
        tell: called with each outcome as the job ends.

    Returns:
        Outcomes in the order of the jobs.
    """
    children = Children()
    with ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(run, job, children) for job in jobs]
        try:
            for future in as_completed(futures):
                tell(future.result())
        except BaseException:
            children.stop()
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def sweep(plan: Sweep) -> bool:
    """Runs a sweep, with a line for each run and a table at the end.

    Returns:
        True if all runs are done.

    Raises:
        ValueError: before anything is started, if a run's folder was made by another command.
    """
    jobs = plan.jobs()
    conflicts = [conflict for job in jobs for command in job.commands if (conflict := command.conflict())]
    if conflicts:
        more = f" (and {len(conflicts) - 1} more)" if len(conflicts) > 1 else ""
        raise ValueError(f"{conflicts[0]}{more}: remove the folder, or choose another `root`.")
    if plan.dry_run:
        for command in (command for job in jobs for command in job.commands if not command.finished()):
            print(shlex.join(["lightning", *command.options, *_checkpoint_of(jobs, command)]))
        return True
    console = Console()
    with Progress(console=console, transient=True, disable=console.is_jupyter) as progress:  # there it wants ipywidgets
        task = progress.add_task("runs", total=len(jobs))

        def tell(outcome: Outcome) -> None:
            progress.advance(task)
            line = f"{outcome.name}: {outcome.state}, {outcome.seconds:.0f} s {outcome.note}".rstrip()
            progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

        outcomes = run_all(jobs, plan.processes, tell)
    console.print(table_of(outcomes))
    return all(outcome.state in ("done", "was done") for outcome in outcomes)


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """Makes the final table: run, state, time, headline scores."""
    table = Table(title="Sweep")
    table.add_column("run", overflow="fold")
    table.add_column("state")
    columns = list(dict.fromkeys(name for outcome in outcomes for name in outcome.scores))
    for column in ("time", *columns):
        table.add_column(column, justify="right")
    for outcome in outcomes:
        scores = (f"{outcome.scores[name]:.3f}" if name in outcome.scores else "" for name in columns)
        table.add_row(outcome.name, outcome.state, f"{outcome.seconds:.0f} s", *scores)
    return table


def _started(command: Command) -> Path:
    """Writes the record of a command that is about to run; returns the path of its log."""
    command.folder.mkdir(parents=True, exist_ok=True)
    command.write_record(command.record | {"seconds": None})
    return command.folder / f"{command.stage}.log"


def _checkpoint(job: Job, command: Command) -> list[str]:
    """Option `--ckpt_path` of a command: a fit's own last checkpoint, if there is one, or that of a test's fit."""
    if job.commands[0].stage == "test":
        return []
    path = job.commands[0].checkpoint()
    if path is None and command.stage == "test":
        raise ValueError(f"{command.folder.parent} has no last.ckpt to test: fit it anew with `checkpoint.save_last`.")
    return [] if path is None else [f"--ckpt_path={path}"]


def _checkpoint_of(jobs: Sequence[Job], command: Command) -> list[str]:
    """Option `--ckpt_path` of a command that is only shown: a placeholder if its fit has not been run."""
    (job,) = (job for job in jobs if command in job.commands)
    fit = job.commands[0]
    if command.stage == "test" and fit.stage == "fit" and fit.checkpoint() is None:
        return [f"--ckpt_path={fit.folder}/.../last.ckpt"]
    return _checkpoint(job, command)


def _scores(job: Job) -> dict[str, float]:
    """Collects the headline scores on the first evaluation set, of fit and test; a terminal has room for no more."""
    found = {}
    for command in job.commands:
        headlines = next((run.headlines for run in reversed(command.runs()) if run.headlines), {})
        first = next(iter(headlines), ("", ""))[0]
        for (key, mode), score in headlines.items():
            if key == first:
                test = "test, " if command.stage == "test" else ""
                found[f"{test}{key_label(key)} {MODE_LABELS.get(mode, mode)}"] = score
    return found


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1]


# --- the command ------------------------------------------------------------------------------------------------------


class Parser(jsonargparse.ArgumentParser):
    """Argument parser without abbreviated options, whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exits with a one-line message instead of the usage text."""
        _stop(message)


def build_parser() -> Parser:
    """Builds the command line, whose options are the keys of the sweep's file."""
    parser = Parser(prog="python -m lightning_modules.sweep", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(Sweep)
    return parser


def read(args: Sequence[str] | None = None) -> Sweep:
    """Reads a sweep from a command line."""
    config: Any = build_parser().parse_args(args)
    return Sweep(**{one.name: config[one.name] for one in fields(Sweep)})


def main(args: Sequence[str] | None = None) -> None:
    """Runs the sweep that a command line describes; exits with status 1 if a run is not done."""
    with endable():
        try:
            if not sweep(read(args)):
                sys.exit(1)
        except ValueError as error:
            _stop(str(error))


@contextmanager
def endable() -> Iterator[None]:
    """Context manager: Ctrl-C, SIGTERM and a closed terminal end the children too, with exit status 130.

    A closed pipe, such as that of `| head`, ends all without a traceback.
    """
    # Ctrl-C is set as well, since jobs in the background begin with it ignored.
    for end in (signal.SIGINT, signal.SIGTERM):
        signal.signal(end, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` means to outlive the terminal
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("sweep: stopped; the same command goes on.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # who reads the output has enough of it, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _stop(message: str) -> NoReturn:
    print(f"sweep: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)

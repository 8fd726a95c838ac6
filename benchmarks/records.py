"""What a report rests on, of many runs, in one archive: without weights and images."""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from datamodules.atomic_write import replaced_file
from lightning_modules.sweep.plan import Sweep

RECORDS = ("config.yaml", "metrics.csv", "results.json", "results.md", "scores.jsonl")
"""Files of a run that the report rests on."""


def pack(plans: Iterable[Sweep], path: Path) -> None:
    """Writes the records of all finished runs into a compressed archive, by their paths from here."""
    commands = {command.record_path: command for plan in plans for job in plan.jobs() for command in job.commands}
    with replaced_file(path) as file, tarfile.open(fileobj=file, mode="w:xz", preset=9) as archive:
        for command in tqdm(commands.values(), desc="packing", disable=None):
            try:
                runs = command.runs() if command.record_path.is_file() and command.finished() else []
            except ValueError as error:  # a damaged run, which the report leaves out as well
                print(f"not packed: {error}", file=sys.stderr)
                continue
            for record in [command.record_path] * bool(runs) + [run.folder / name for run in runs for name in RECORDS]:
                if record.is_file():
                    archive.add(record)

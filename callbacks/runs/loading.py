"""Finished runs as pandas tables: `load("runs")`, then curves by rollouts or steps (`callbacks.runs.curves`).

A fit writes training and validation into separate rows of `metrics.csv`, whose `step` counts from 0 for the first
update and is 0 as well before it; `rollouts` stands in training rows alone. Here `step` is the number of updates made,
and every row has its rollouts.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.jsonl import json_lines
from lightning_modules.run_folder import RunFolder, find, headlines, read_all


@dataclass(frozen=True, eq=False)
class Run(RunFolder):
    """A run with its logged numbers; `rows` is read when the run is loaded, other tables when first used.

    Args:
        folder: folder of the run.
        config: contents of `config.yaml`.
        results: contents of `results.json`.
        rows: logged rows in order, from `metrics.csv`, else from TensorBoard's event files.
    """

    rows: pd.DataFrame = field(repr=False)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads the files of a folder.

        Raises:
            ValueError: if a file is damaged.
        """
        small = RunFolder.read(folder)
        path = folder / "metrics.csv"
        try:
            rows = _rows(folder)
        except ValueError as error:  # pandas' own errors are such
            raise ValueError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
        if len(rows) and "step" not in rows:
            raise ValueError(f"{path} is damaged: it has no column `step`")
        texts = [name for name in rows if not pd.api.types.is_numeric_dtype(rows[name])]
        if texts:
            name = str(texts[0])[:80]
            raise ValueError(f"{path} is damaged: its column `{name}` holds something else than numbers")
        if len(rows) and not rows["step"].between(0, 2**53).all():
            raise ValueError(f"{path} is damaged: its column `step` holds something else than numbers of steps")
        return cls(folder, small.config, small.results, rows)

    @cached_property
    def training(self) -> pd.DataFrame:
        """Training metrics by `step`; a resumed run's begin with those of the run before, if its folder exists."""
        rows = self.rows
        if "rollouts" not in rows or not rows["rollouts"].notna().any():
            table = pd.DataFrame({"rollouts": []}, index=pd.Index([], name="step"), dtype=float)
        else:
            columns = [name for name in rows if not str(name).startswith(("val/", "test/")) and name != "step"]
            own = rows[columns][rows[columns].drop(columns="epoch", errors="ignore").notna().any(axis=1)]
            table = own.groupby(rows["step"].loc[own.index].astype(int) + self._shift).last()  # the latest values
            table = table[table["rollouts"].notna()].rename_axis("step")
        if self._earlier is not None:
            earlier = self._earlier.training
            table = pd.concat([earlier[earlier.index < self._start], table])
        return table

    @cached_property
    def validations(self) -> pd.DataFrame:
        """Validation metrics by `step` (number of updates made): `rollouts`, `seconds` and `val/...` as logged.

        Steps and rollouts are those of the history in `results.json`, which also tells what was before a resume.
        """
        history, table = self.history, self._logged_validations()
        if history:
            entries = {
                entry["step"]: {key: entry[key] for key in ("rollouts", "seconds")} | self._named(entry)
                for entry in history
            }
            noted = pd.DataFrame.from_dict(entries, orient="index", dtype=float).rename_axis("step")
            table = noted.combine_first(table.reindex(noted.index))
        else:  # killed before the first; images a step are constant, so a line through what was logged is exact
            steps, rollouts = np.append(0, self.training.index), np.append(0.0, self.training["rollouts"])
            table = table.assign(rollouts=np.interp(table.index.to_numpy(dtype=float), steps, rollouts))
        if self._earlier is not None:
            before = self._earlier.validations
            table = table.combine_first(before[before.index < self._start])
        return table

    @cached_property
    def _earlier(self) -> Run | None:
        """The run that this one continues; None if there is none, or its folder was deleted."""
        return Run.read(self.continues) if self.continues is not None and self.continues.is_dir() else None

    @property
    def _trained(self) -> pd.DataFrame:
        """Logged rows of training steps, which are those with rollouts."""
        return self.rows[self.rows["rollouts"].notna()] if "rollouts" in self.rows else self.rows.iloc[:0]

    @property
    def _start(self) -> float:
        """First step that this run logged itself."""
        return float(self._trained["step"].min()) + self._shift if len(self._trained) else float("inf")

    @cached_property
    def _shift(self) -> int:
        """Number of updates made minus the step that Lightning logs with them: 1, and 0 after some resumes.

        Its count goes on from where it was when the checkpoint was saved, before or after a validation. Images a step
        are constant, so rollouts tell the truth.
        """
        known = [(entry["step"], entry["rollouts"]) for entry in self.history]
        if self._earlier is not None:
            known += list(self._earlier.training["rollouts"].items())
        a_step = next((rollouts / step for step, rollouts in known if step > 0), None)
        if self.continues is None or not len(self._trained) or not a_step:
            return 1
        first = self._trained.iloc[0]
        return round(first["rollouts"] / a_step) - int(first["step"])

    def _named(self, entry: dict) -> dict[str, float | None]:
        """Returns a history entry's scores under their names in the logs."""
        prefix = "test" if self.stage == "test" else "val"
        values: dict[str, float | None] = {}
        for (key, mode), value in headlines(entry["results"], self.results).items():
            scores = entry["results"][key][mode]
            values[f"{prefix}/{key}/{mode}"] = value
            values |= {f"{prefix}/{key}/{mode}/{name}": score for name, score in scores.items()}
        return values

    def _logged_validations(self) -> pd.DataFrame:
        """Returns logged validation rows by the number of updates made before them."""
        columns = [name for name in self.rows if str(name).startswith("val/")]
        rows = self.rows[self.rows[columns].notna().any(axis=1)] if columns else self.rows.iloc[:0]
        known = {entry["step"] for entry in self.history}
        trained = self.rows.index.isin(self._trained.index)
        done = (self.rows["step"].where(trained).ffill() + self._shift).fillna(0) if len(self.rows) else self.rows.index
        steps = []
        for index, said in rows["step"].astype(int).items() if len(rows) else ():
            # Lightning logs a validation with the latest update's number, callbacks that use a logger with the next.
            likely = [int(done[index])] if done[index] in (said, said + 1) else []
            candidates = [*likely, said + self._shift, said]
            steps.append(next((step for step in candidates if step in known), candidates[0]))
        return rows[columns].groupby(np.array(steps, dtype=int)).last().rename_axis("step")

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Scores of a test by prompt, set and mode, as in `scores.jsonl`; empty for a fit.

        Raises:
            ValueError: if the file is damaged.
        """
        path = self.folder / "scores.jsonl"
        return pd.DataFrame([record for _, record in json_lines(path)] if path.is_file() else [])


def load(*places: str | Path, stage: str | None = "fit", skip_broken: bool = False) -> list[Run]:
    """Reads runs, without those that another one continues, or has made again since they had saved nothing.

    Args:
        places: run folders, folders above them, patterns.
        stage: `fit` or `test` takes what these commands left; None takes all.
        skip_broken: warn of damaged runs instead of stopping.

    Raises:
        ValueError: if there is no run, or one is damaged.
    """
    runs: list[Run] = read_all(Run, find(*places), skip_broken=skip_broken)
    newest = {run.continues: run for run in sorted(runs, key=lambda run: (len(run.folder.name), run.folder.name))}
    kept = [
        run
        for run in runs
        if stage in (None, run.stage)
        and run.folder.resolve() not in newest
        and (run.continues is None or run is newest[run.continues] or run.finished or run.saved)
    ]
    if not kept:
        raise ValueError(
            f"{', '.join(map(str, places))}: there are runs, but none of the stage {stage}; choose another."
        )
    return kept


def overview(runs: Sequence[Run]) -> pd.DataFrame:
    """Tabulates runs, one a row: mode, seed, finished or not, last step and rollouts, headline scores."""
    rows = []
    for run in runs:
        history = run.history
        last = {"step": history[-1]["step"], "rollouts": history[-1]["rollouts"]} if history else {}
        scores = {f"{key} {mode}": value for (key, mode), value in run.headlines.items()}
        about = {"run": str(run.folder), "mode": run.mode, "seed": run.seed, "finished": run.finished}
        rows.append(about | last | scores)
    return pd.DataFrame(rows).set_index("run")


def _rows(folder: Path) -> pd.DataFrame:
    """Reads the lines of `metrics.csv` that are whole, as a kill may halve the last; else TensorBoard's files."""
    path = folder / "metrics.csv"
    text = path.read_bytes() if path.is_file() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if not whole:
        return _events(folder)
    rows = pd.read_csv(io.BytesIO(whole))
    if not isinstance(rows.index, pd.RangeIndex):  # pandas then takes the first values for the rows' names
        raise ValueError("a row has more values than there are columns")
    return rows


def _events(folder: Path) -> pd.DataFrame:
    """Reads TensorBoard's scalars as the rows that `metrics.csv` would have: training and validation apart, by time."""
    written: dict[tuple[int, bool], dict[str, float]] = {}
    times: dict[tuple[int, bool], float] = {}
    for path in sorted(folder.glob("events.out.tfevents*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                key = event.step, name.startswith(("val/", "test/"))
                written.setdefault(key, {})[name] = event.value
                times[key] = min(times.get(key, event.wall_time), event.wall_time)
    order = sorted(written, key=times.__getitem__)
    return pd.DataFrame([{"step": step} | written[step, held_out] for step, held_out in order])

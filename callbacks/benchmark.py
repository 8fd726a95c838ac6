"""`Benchmark`: base class of callbacks that score what validation and test draw, and write `results.json`."""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from PIL.Image import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from callbacks.results_file import dump_results, without_nan
from callbacks.scores.bootstrap import enough, interval, resample
from callbacks.scores.prompt_scores import PromptScores, PromptTable, weighted_mean
from datamodules.atomic_write import write_atomically
from datamodules.base import PromptDataModule, PromptSample, bare, contents
from datamodules.jsonl import read_json
from lightning_modules.evaluation import MODES, EvaluationBatch
from rewards.calls import guarded

Results = dict[str, dict[str, dict[str, float]]]
"""evaluation set -> "without_pe" | "with_pe" -> score name -> value."""
Intervals = dict[str, dict[str, dict[str, list[float]]]]
"""evaluation set -> mode -> score name -> both ends of the score's 95 % interval."""
Sets = dict[str, dict[str, Any]]
"""evaluation set -> `prompts` (number of different ones), `texts` (digest of these) and `digest` (of all its rows)."""


class Benchmark(L.Callback, ABC):
    """Scores the images that `validation_step` and `test_step` return.

    Logs `val/<set>/<mode>` (the headline number) and `val/<set>/<mode>/<score>`, with mode `without_pe` (images of
    the prompts as they are) or `with_pe` (images of the refiner's greedy rewrites). At the end of a fit or test it
    prints a table and writes `results.json` beside the logs, with 95 % intervals of the scores and of their changes
    since the first validation, from a bootstrap over prompts within each tag (where each tag has a few), equal ones
    together; a test also leaves `scores.jsonl`, a line for each prompt.

    Args:
        sets: evaluation sets to score, with the sets that reword them; null is all of the data module's.
        resamples: number of replicates of the bootstrap.
    """

    headline: str
    """Name of the score that stands for the whole benchmark."""
    columns: tuple[str, ...]
    """Names of the values that `score` gives an image."""

    def __init__(self, sets: list[str] | None = None, resamples: int = 1000) -> None:
        if resamples < 1:
            raise ValueError(f"a benchmark's `resamples` is {resamples}, use at least 1.")
        self.sets = sets
        self.resamples = resamples
        self.history: list[dict[str, Any]] = []
        """One entry per validation: `{"step", "rollouts", "seconds", "results", "sets"}`."""
        self.tables: dict[tuple[str, str], PromptTable] = {}
        """(Set, mode) -> scores by prompt in the latest evaluation, over all ranks."""
        self.intervals: Intervals = {}
        """95 % intervals of the latest evaluation."""
        self._first: dict[tuple[str, str], PromptTable] = {}
        self._metrics: dict[tuple[str, str], PromptScores] = {}
        self._sets: Sets = {}
        self._started = time.monotonic()
        self._seconds_before = 0.0

    def key(self, name: str) -> str:
        """Returns the key of an evaluation set's scores in logs and results; here the set's name."""
        return name

    @property
    def title(self) -> str:
        """Name that tells this benchmark from others of the run, in its table, in the history and in checkpoints."""
        return type(self).__name__ + (f" of {', '.join(self.sets)}" if self.sets else "")

    @property
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints: one for each benchmark of a run."""
        return self.title

    @abstractmethod
    def score(self, samples: Sequence[PromptSample], images: Sequence[Image]) -> list[dict[str, float]]:
        """Scores B images against their samples' original prompts.

        Returns:
            B times column -> value; a column that is missing could not be scored.
        """

    def tag(self, sample: PromptSample) -> str:
        """Returns the tag that results are split by, and within which prompts are resampled."""
        return sample.tag

    def summarize(self, table: PromptTable, weights: Tensor) -> dict[str, Tensor]:
        """Computes a set's scores from its table; here the mean of each column.

        Args:
            table: values of P prompts' images.
            weights: [R, P] weights of the prompts, R times; ones give the scores themselves.

        Returns:
            Score name -> [R].
        """
        return {column: weighted_mean(table, column, weights) for column in self.columns}

    def scores(self, table: PromptTable) -> dict[str, float]:
        """Returns score name -> value of a table, every prompt counted once."""
        ones = torch.ones(1, len(table), dtype=torch.float64)
        return {name: float(value) for name, value in self.summarize(table, ones).items()}

    # --- hooks ------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock of `seconds` in the history."""
        self._started = time.monotonic()

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Creates empty metrics, one for every set and mode on every rank: all ranks must reduce the same ones."""
        data: PromptDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self._refuse_mistakes(trainer, data)
        self._metrics, self._sets = {}, {}
        for name, samples in data.eval_sets.items():
            if self.scores_set(data, name):
                rows, prompts = [(sample.id, self.tag(sample)) for sample in bare(samples)], contents(samples)
                self._sets[self.key(name)] = _described(bare(samples), prompts)
                refined = getattr(pl_module, "language", None) is not None and name not in data.unrefined
                for mode in MODES if refined else MODES[:1]:
                    self._metrics[name, mode] = PromptScores.on(pl_module.device, rows, self.columns, prompts)

    def _refuse_mistakes(self, trainer: L.Trainer, data: PromptDataModule) -> None:
        """Raises ValueError if `sets` names an unknown set, or two benchmarks use the same key."""
        unknown = set(self.sets or ()) - data.eval_sets.keys()
        if unknown:
            raise ValueError(
                f"{type(self).__name__} is to score the set {min(unknown)}, but the data has "
                f"{', '.join(data.eval_sets)}: correct its `sets`."
            )
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, Benchmark) and other is not self:
                for name in data.eval_sets:
                    both = self.scores_set(data, name) and other.scores_set(data, name)
                    if both and self.key(name) == other.key(name):
                        raise ValueError(
                            f"two benchmarks, {type(self).__name__} and {type(other).__name__}, call their scores "
                            f"{self.key(name)}: give them different `sets`, or leave one out."
                        )

    def scores_set(self, data: PromptDataModule, name: str) -> bool:
        """Returns True if this benchmark scores the set of this name."""
        return self.sets is None or name in self.sets or data.originals.get(name) in self.sets

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Scores the images of one batch."""
        assert isinstance(outputs, EvaluationBatch)
        if not outputs.samples:
            return
        for mode, drawn in outputs.images.items():
            if (outputs.name, mode) in self._metrics:
                for images in drawn:
                    with guarded(self.title):
                        values = self.score(outputs.samples, images)
                    self._metrics[outputs.name, mode].update([sample.id for sample in outputs.samples], values)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reduces over ranks, logs the scores, adds them to the history and writes `results.json`."""
        results: Results = {}
        self.tables, self.intervals = {}, {}
        prefix = "test" if trainer.testing else "val"
        for (name, mode), metric in self._metrics.items():
            key = self.key(name)
            table = self.tables[name, mode] = metric.table()
            scores = self.scores(table)
            replicates = self.summarize(table, resample(table.tags, self.resamples, prompts=table.prompts))
            results.setdefault(key, {})[mode] = scores
            ends = {score: list(interval(values)) for score, values in replicates.items()}
            self.intervals.setdefault(key, {})[mode] = ends if enough(table.tags, table.prompts) else {}
            pl_module.log(f"{prefix}/{key}/{mode}", scores[self.headline], rank_zero_only=True)
            rest = {f"{prefix}/{key}/{mode}/{k}": v for k, v in scores.items() if k != self.headline}
            pl_module.log_dict(rest, rank_zero_only=True)
        if trainer.sanity_checking:
            return
        rollouts = getattr(pl_module, "num_rollouts", 0)
        seconds = self._seconds_before + time.monotonic() - self._started
        entry = {"step": trainer.global_step, "rollouts": rollouts, "seconds": round(seconds, 1), "results": results}
        self._first = self._first if self.history else self.tables
        # Without a validation of this step that was cut off when it was scored here, and is made again.
        self.history = [one for one in self.history if one["step"] != entry["step"]] + [entry | {"sets": self._sets}]
        folder = trainer.log_dir  # asked on every rank: Lightning broadcasts it
        if trainer.is_global_zero and folder is not None:
            self._write(Path(folder) / "results.json")
            if trainer.testing:
                self._write_scores(Path(folder) / "scores.jsonl")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drops the history that came with a checkpoint: it is of validation's prompts."""
        self.history = []
        folder = trainer.log_dir  # asked on every rank: Lightning broadcasts it
        if trainer.is_global_zero and folder is not None:
            (Path(folder) / "scores.jsonl").unlink(missing_ok=True)  # of an earlier test, where folders are shared

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the table of scores."""
        if trainer.is_global_zero and self.history:
            self.print_table()

    on_test_end = on_fit_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the table of `lightning validate`; within a fit the end does."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Returns the history, the first scores and the seconds so far, so that a resumed run keeps its beginning."""
        first = {key: vars(table) for key, table in self._first.items()}
        seconds = self._seconds_before + time.monotonic() - self._started
        return {"history": self.history, "seconds": seconds, "first": first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the history and the seconds of the run that is resumed."""
        self.history = list(state_dict["history"])
        self._first = {key: PromptTable(**table) for key, table in state_dict.get("first", {}).items()}
        self._seconds_before = state_dict["seconds"]

    # --- reports ----------------------------------------------------------------------------------------------------

    def _before(self) -> Results:
        """Scores of the first evaluation, of the sets that the last one evaluated too.

        A resumed run may have other prompts under a set's name, with which nothing can be compared.
        """
        first, last = self.history[0], self.history[-1]
        same = [key for key, one in last.get("sets", {}).items() if first.get("sets", {}).get(key) == one]
        return {key: modes for key, modes in first["results"].items() if key in same}

    def _changes(self) -> Intervals:
        """Returns the 95 % intervals of the scores' changes since the first evaluation, for sets with equal prompts.

        A prompt is drawn for both evaluations together: what makes it hard in both does not blur the change.
        """
        if len(self.history) < 2:
            return {}
        found: Intervals = {}
        for (name, mode), last in self.tables.items():
            key, first = self.key(name), self._first.get((name, mode))
            if first is None or key not in self._before() or not enough(last.tags, last.prompts):
                continue
            row_of = {prompt: row for row, prompt in enumerate(first.ids)}
            weights = resample(last.tags, self.resamples, prompts=last.prompts)
            before = self.summarize(first.rows([row_of[prompt] for prompt in last.ids]), weights)
            after = self.summarize(last, weights)
            ends = {score: list(interval(after[score] - before[score])) for score in after if score in before}
            found.setdefault(key, {})[mode] = ends
        return found

    def print_table(self) -> None:
        """Prints the headline scores before and after training, per set and mode."""
        last, before = self.history[-1], self._before()
        later = last["step"] > self.history[0]["step"]
        fitted = later and bool(before)
        ends = self._changes() if fitted else self.intervals
        table = Table(title=f"{self.title} after {last['rollouts']:,} rollouts ({last['seconds']:.0f} s)")
        numbers = ("before", "after", "change") if fitted else ("score",)
        for column in ("set", "prompt", *numbers):
            last_one = column == numbers[-1]
            heading = Text(f"{column} [95 % interval]" if last_one else column)  # no markup
            table.add_column(heading, justify="left" if last_one or column in ("set", "prompt") else "right")
        for name, modes in last["results"].items():
            for mode, scores in modes.items():
                after = scores[self.headline]
                cells = [f"{after:.3f}"]
                if fitted:
                    was = before.get(name, {}).get(mode, {}).get(self.headline)
                    cells = ["", *cells, ""] if was is None else [f"{was:.3f}", *cells, f"{after - was:+.3f}"]
                sign = "+" if fitted else ""
                low_high = ends.get(name, {}).get(mode, {}).get(self.headline)
                cells[-1] += "" if low_high is None else f" [{low_high[0]:{sign}.3f}, {low_high[1]:{sign}.3f}]"
                table.add_row(name, mode.replace("_", " ").replace("pe", "PE"), *map(Text, cells))
        if later and not last["results"].keys() <= before.keys():
            table.caption = "No change is shown where the prompts are not those of the first validation."
        Console().print(table)

    def _write(self, path: Path) -> None:
        """Writes `results.json`: the last scores by set and mode, those before training, intervals, and the history."""
        merged = read_json(path) if path.is_file() else {}
        last = self.history[-1]
        merged |= last["results"] | {"rollouts": last["rollouts"], "seconds": last["seconds"]}
        merged["headlines"] = merged.get("headlines", {}) | dict.fromkeys(last["results"], self.headline)
        merged["intervals"] = merged.get("intervals", {}) | self.intervals
        merged["before"] = merged.get("before", {}) | self._before()
        merged["changes"] = merged.get("changes", {}) | self._changes()
        merged["sets"] = merged.get("sets", {}) | last["sets"]
        merged.setdefault("history", {})[self.title] = self.history
        dump_results(merged, path)

    def _write_scores(self, path: Path) -> None:
        """Adds a line for each prompt: the means of its images' values."""
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for (name, mode), table in self.tables.items():
            means = {column: table.sums[column] / table.counts[column] for column in self.columns}
            for row, (prompt, tag) in enumerate(zip(table.ids, table.tags, strict=True)):
                line: dict[str, Any] = {"benchmark": self.title, "set": name, "mode": mode, "id": prompt, "tag": tag}
                line |= {} if table.prompts is None else {"prompt": table.prompts[row]}
                line |= {column: float(mean[row]) for column, mean in means.items()}
                line["images"] = int(table.images[row])
                text += json.dumps(without_nan(line), ensure_ascii=False) + "\n"
        write_atomically(path, text)


def _described(samples: Sequence[PromptSample], prompts: Sequence[str]) -> dict[str, Any]:
    """Describes an evaluation set in the history, so that only scores of the same prompts are compared."""
    rows = [(sample.id, sample.wording, prompt) for sample, prompt in zip(samples, prompts, strict=True)]
    return {
        "prompts": len(set(prompts)),
        "texts": texts_digest(sample.prompt for sample in samples),
        "digest": texts_digest(map(repr, rows)),
    }


def texts_digest(texts: Iterable[str]) -> str:
    """Returns a digest of the different texts, in whatever order and however often each stands there."""
    return hashlib.sha256("\n".join(sorted({text.strip() for text in texts})).encode()).hexdigest()[:16]

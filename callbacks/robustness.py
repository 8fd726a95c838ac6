"""`PromptRobustness`: scores of paraphrased evaluation prompts, compared with their originals pair by pair."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from rich.console import Console

from callbacks.benchmark import Benchmark
from callbacks.reporting.results import modes_of, wordings_table
from callbacks.reporting.tables import rich_table
from callbacks.results_file import add_results
from callbacks.scores.bootstrap import enough, interval, resample
from datamodules.base import Chosen, PromptDataModule, PromptSample, Reworded, Stage, bare, spread
from datamodules.paraphrases.base import ContentCheck, Paraphraser
from datamodules.paraphrases.content import PromptContent
from lightning_modules.evaluation import MODES


@dataclass(frozen=True)
class Difference:
    """Scores of a set's paraphrases minus those of their originals, over the prompts that have both.

    Attributes:
        prompts: number of prompts that have both.
        original: headline score of the originals.
        paraphrase: headline score of the paraphrases.
        tags: names of the scores that are means of a tag.
        scores: score name -> difference; the benchmark's headline stands under "headline" too.
        intervals: score name -> both ends of its 95 % interval.
    """

    prompts: int
    original: float
    paraphrase: float
    tags: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)


class PromptRobustness(L.Callback):
    """Draws and scores paraphrases of the evaluation prompts, and reports what they change, pair by pair.

    Each kind of paraphrase becomes an evaluation set `<set>.<kind>` with the ids, and so the noise, of its originals;
    scorers see the original. A wording that loses a class name, a number, a colour or a quoted text is left out and
    counted, unless its paraphraser says that it stands for a prompt enhancer (`checked: false`), whose mistakes count.

    With a paraphraser that a language model writes: put in front of a flow model it is a *static PE* (paper, Table 1);
    compared with the trained refiner's rewrites (`against_pe`) it is an *LM swap*.

    Args:
        paraphrasers: sources of wordings.
        check: finds what a wording has lost; null is `PromptContent`, for published benchmarks.
        sets: sets to reword; null is all that do not reword others themselves.
        num_prompts: at most so many prompts of each set, spread evenly over it, in `lightning test` and `validate`.
        prompts_in_fit: at most so many prompts of each set at every validation inside a fit; 0 rewords nothing there.
        resamples: of the bootstrap over prompts, within each tag.
    """

    def __init__(
        self,
        paraphrasers: list[Paraphraser],
        check: ContentCheck | None = None,
        sets: list[str] | None = None,
        num_prompts: int | None = None,
        prompts_in_fit: int = 0,
        resamples: int = 1000,
    ) -> None:
        for name, value, least in (
            ("num_prompts", 1 if num_prompts is None else num_prompts, 1),
            ("prompts_in_fit", prompts_in_fit, 0),
            ("resamples", resamples, 1),
        ):
            if value < least:
                raise ValueError(f"PromptRobustness has `{name}` {value}, use at least {least}.")
        self.paraphrasers = paraphrasers
        self.check = check or PromptContent()
        self.sets = sets
        self.num_prompts = num_prompts
        self.prompts_in_fit = prompts_in_fit
        self.resamples = resamples
        self.rejected: dict[str, list[str]] = {}
        """Derived set -> for each wording that was left out, its loss and its text."""
        self.report: dict[str, dict[str, Any]] = {}
        """Benchmark -> derived set -> its entry in `results.json`."""
        self._trainer: L.Trainer | None = None

    # --- other wordings ---------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Registers `derive` with the data module.

        Raises:
            ValueError: if the run has two such callbacks.
        """
        data: PromptDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self._trainer = trainer
        if sum(isinstance(callback, PromptRobustness) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError("there are two PromptRobustness callbacks: give one of them all `paraphrasers`.")
        if stage != "predict" and self.derive not in data.derivations:
            data.derivations.append(self.derive)

    def derive(self, stage: Stage, given: Mapping[str, Sequence[PromptSample]]) -> dict[str, Sequence[PromptSample]]:
        """Makes the evaluation sets `<set>.<kind>` of paraphrased prompts.

        Raises:
            ValueError: if `sets` names an unknown set, or two paraphrasers use one kind.
        """
        assert self._trainer is not None
        data: PromptDataModule = self._trainer.datamodule  # type: ignore[attr-defined]
        limit = self.prompts_in_fit if self._trainer.state.fn == "fit" else self.num_prompts
        if limit == 0:
            return {}
        unknown = set(self.sets or ()) - given.keys()
        if unknown:
            raise ValueError(
                f"PromptRobustness is to reword the set {min(unknown)}, but the data has {', '.join(given)}: correct "
                "its `sets`."
            )
        derived: dict[str, Sequence[PromptSample]] = {}
        for name in self.sets or [name for name in given if name not in data.originals]:
            samples = bare(given[name])
            rows = spread(len(samples), limit)
            for paraphraser in self.paraphrasers:
                source = given[name] if paraphraser.sees_images else samples
                for kind, wordings in self._write(paraphraser, name, Chosen(source, rows)).items():
                    kept = self._keep(paraphraser, f"{name}.{kind}", [samples[row] for row in rows], wordings)
                    if f"{name}.{kind}" in derived:
                        raise ValueError(f"two paraphrasers of PromptRobustness call a kind {kind}: rename one.")
                    if kept:
                        derived[f"{name}.{kind}"] = Reworded(given[name], {rows[i]: text for i, text in kept.items()})
                        data.originals[f"{name}.{kind}"] = name
                        if not paraphraser.refined:
                            data.unrefined.add(f"{name}.{kind}")
        return derived

    def _write(
        self, paraphraser: Paraphraser, name: str, samples: Sequence[PromptSample]
    ) -> dict[str, list[str | None]]:
        """Returns kind -> wordings; the first process writes new ones, which the others read."""
        assert self._trainer is not None
        wordings = paraphraser.write(name, samples) if self._trainer.is_global_zero else None
        self._trainer.strategy.barrier("paraphrases written")
        return paraphraser.write(name, samples) if wordings is None else wordings

    def _keep(
        self, paraphraser: Paraphraser, name: str, samples: Sequence[PromptSample], wordings: Sequence[str | None]
    ) -> dict[int, str]:
        """Returns position -> wording for the wordings that lost nothing; the others are recorded in `rejected`."""
        kept: dict[int, str] = {}
        self.rejected[name] = []
        for position, (sample, wording) in enumerate(zip(samples, wordings, strict=True)):
            if wording is None:
                if not paraphraser.checked:  # an enhancer that changes nothing is to be counted as such
                    kept[position] = sample.prompt
                continue
            lost = self.check.lost(sample, wording) if paraphraser.checked else None
            if lost is None:
                kept[position] = wording
            else:
                self.rejected[name].append(f"{lost}: {wording}")
        if not kept:
            warnings.warn(f"no prompt has a wording of the kind {name}, which is left out", stacklevel=2)
        return kept

    # --- differences ------------------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compares and logs the benchmarks' scores, which they have by now on every rank."""
        if trainer.sanity_checking:
            return
        data: PromptDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self.report = {}
        for benchmark in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(benchmark, Benchmark):
                found = {
                    derived: self._compare(benchmark, derived, original)
                    for derived, original in data.originals.items()
                    if (derived, MODES[0]) in benchmark.tables and (original, MODES[0]) in benchmark.tables
                }
                if found:
                    self.report[benchmark.title] = found
        if not self.report:
            return
        add_results(trainer, {"robustness": self.report})
        prefix = "test" if trainer.testing else "val"
        for logger in trainer.loggers:
            values = {f"{prefix}/robustness/{key}": value for key, value in self._headlines().items()}
            logger.log_metrics(values, step=trainer.global_step)
        if trainer.is_global_zero and trainer.state.fn != "fit":
            self.print_table()

    on_test_end = on_validation_end

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the tables."""
        if trainer.is_global_zero and self.report:
            self.print_table()

    def _compare(self, benchmark: Benchmark, derived: str, original: str) -> dict[str, Any]:
        """Returns the entry of `results.json` for one derived set."""
        said: dict[str, Any] = {"of": original, "rejected": len(self.rejected.get(derived, []))}
        pairs = {mode: (mode, mode) for mode in MODES} | {"against_pe": ("without_pe", "with_pe")}
        for name, (own, other) in pairs.items():
            # Against the rewrites of the run's refiner only where another one takes its place.
            swapped = (derived, "with_pe") not in benchmark.tables
            if {(derived, own), (original, other)} <= benchmark.tables.keys() and (name in MODES or swapped):
                difference = paired_difference(benchmark, (derived, own), (original, other), self.resamples)
                said[name] = vars(difference)
        return said

    def _headlines(self) -> dict[str, float]:
        return {
            f"{title}/{derived}/{mode}": said[mode]["scores"]["headline"]
            for title, found in self.report.items()
            for derived, said in found.items()
            for mode in modes_of(said)
        }

    def print_table(self) -> None:
        """Prints the scores of originals, of paraphrases and their difference."""
        for title, found in self.report.items():
            Console().print(rich_table(wordings_table(title, found, by_tag=False)))  # a terminal is narrow


def paired_difference(
    benchmark: Benchmark, paraphrase: tuple[str, str], original: tuple[str, str], resamples: int
) -> Difference:
    """Subtracts scores of one set and mode from those of another, over the prompts (ids) that both have.

    Pairs are resampled together: what makes a prompt hard in both wordings does not blur the difference.

    Args:
        benchmark: a benchmark after an evaluation.
        paraphrase: set and mode whose scores count positively.
        original: set and mode whose scores are subtracted.
        resamples: number of replicates of the bootstrap.
    """
    first, second = benchmark.tables[paraphrase], benchmark.tables[original]
    common = set(first.ids) & set(second.ids)
    row_of = {name: row for row, name in enumerate(second.ids)}
    rows = [row for row, name in enumerate(first.ids) if name in common]
    first, second = first.rows(rows), second.rows([row_of[first.ids[row]] for row in rows])
    # A prompt that could be scored in one wording only is no pair. A column that no image of either has, such as
    # GEdit-Bench's `intersection` elsewhere, says nothing of that.
    pairs = [(counts, second.counts[column]) for column, counts in first.counts.items()]
    used = [torch.stack(pair) > 0 for pair in pairs if pair[0].any() or pair[1].any()]
    seen = torch.cat(used or [torch.zeros(1, len(first), dtype=torch.bool)]).all(0)
    rows = seen.nonzero()[:, 0].tolist()
    first, second = first.rows(rows), second.rows(rows)
    first_scores, second_scores = benchmark.scores(first), benchmark.scores(second)
    weights = resample(first.tags, resamples, prompts=second.prompts)
    first_replicates, second_replicates = benchmark.summarize(first, weights), benchmark.summarize(second, weights)
    names = [name for name in first_scores if name in second_scores]
    headline = benchmark.headline
    certain = enough(first.tags, second.prompts)
    scores = {name: first_scores[name] - second_scores[name] for name in names}
    ends = {
        name: list(interval(first_replicates[name] - second_replicates[name])) if certain else [math.nan] * 2
        for name in names
    }
    return Difference(
        prompts=len(rows),
        original=second_scores[headline],
        paraphrase=first_scores[headline],
        tags=[name for name in names if name in first.tags],
        scores={"headline": scores[headline]} | scores,
        intervals={"headline": ends[headline]} | ends,
    )

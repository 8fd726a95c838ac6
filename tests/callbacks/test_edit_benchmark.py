"""Means of categories' means: literal answers, a slow loop on random marks, and a whole test of GEdit's rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from callbacks.edit import EditBenchmark
from callbacks.reward import RewardBenchmark
from callbacks.robustness import paired_difference
from callbacks.scores.prompt_scores import PromptScores, PromptTable
from datamodules.editing.benchmarks import GEditPrompts
from datamodules.sample import PromptSample
from lightning_modules.evaluation import EvaluationBatch
from rewards.base import Reward, RewardBatch, Score
from rewards.judges.viescore import VIEScore
from tests.rewards.judges.judge_server import Judge, Reply, serving


class Told(Reward):
    """Scores a sample by its metadata: `marks` are overall, sc and pq; none is invalid."""

    name = "told"

    def __call__(self, batch: RewardBatch) -> list[Score]:
        return [
            Score(marks[0], marks[0], 0.0, detail={"sc": marks[1], "pq": marks[2]}) if marks else Score.invalid("told")
            for marks in (sample.metadata["marks"] for sample in batch.samples)
        ]


def edit(name: str, task: str, marks: tuple[float, ...], shared: bool | None = None) -> PromptSample:
    inside = {} if shared is None else {"Intersection_exist": shared}
    return PromptSample(name, name, task, {"marks": marks, **inside})


def table_of(benchmark: EditBenchmark, samples: list[PromptSample]) -> PromptTable:
    metric = PromptScores([s.id for s in samples], [benchmark.tag(s) for s in samples], benchmark.columns)
    values = benchmark.score(samples, [Image.new("RGB", (2, 2))] * len(samples))
    metric.update([s.id for s in samples], values)
    return metric.table()


def test_pairs_where_a_column_is_never_used() -> None:
    """No sample says whether it is of the intersection. Failed in one wording: no pair. (4 - 5 + 8 - 5) / 2 = 1."""
    benchmark = EditBenchmark(Told(), parts=["sc", "pq"])
    fives = (5.0, 5.0, 5.0)
    wordings: dict[str, list[tuple[float, ...]]] = {
        "edit": [fives, fives, fives],
        "edit.other": [(4.0, 4.0, 4.0), (), (8.0, 8.0, 8.0)],
        "edit.lost": [(), (), ()],
    }
    for name, marks in wordings.items():
        samples = [edit(str(row), "add", mark) for row, mark in enumerate(marks)]
        benchmark.tables[name, "without_pe"] = table_of(benchmark, samples)
    found = paired_difference(benchmark, ("edit.other", "without_pe"), ("edit", "without_pe"), 10)
    assert found.prompts == 2 and found.scores["headline"] == found.scores["sc"] == 1
    lost = paired_difference(benchmark, ("edit.lost", "without_pe"), ("edit", "without_pe"), 10)
    assert lost.prompts == 0


def test_literal_means_of_means() -> None:
    """add: (9 + 6 + 3) / 3 = 6; style: 2 and one that failed; together (6 + 2) / 2, not 20 / 4."""
    benchmark = EditBenchmark(Told(), parts=["sc", "pq"])
    samples = [
        edit("a", "add", (9.0, 9.0, 9.0), True),
        edit("b", "add", (6.0, 4.0, 9.0), True),
        edit("c", "add", (3.0, 3.0, 3.0), False),
        edit("d", "style", (2.0, 1.0, 4.0), True),
        edit("e", "style", (), True),
    ]
    expected = {
        "add": 6.0,
        "style": 2.0,
        "overall": 4.0,
        "sc": (16 / 3 + 1) / 2,
        "pq": (7 + 4) / 2,
        "intersection_overall": (7.5 + 2) / 2,
        "intersection_sc": (6.5 + 1) / 2,
        "intersection_pq": (9 + 4) / 2,
        "invalid_share": 0.2,
        "images": 5.0,
    }
    assert benchmark.scores(table_of(benchmark, samples)) == pytest.approx(expected, abs=1e-12)
    assert benchmark.headline == "overall" and benchmark.key("gedit_en") == "gedit_en/told"


def test_without_an_intersection_there_are_no_such_scores_and_an_empty_tag_is_left_out() -> None:
    benchmark = EditBenchmark(Told())
    samples = [edit("a", "add", (4.0, 0.0, 0.0)), edit("b", "style", ()), edit("c", "remove", (1.0, 0.0, 0.0))]
    scores = benchmark.scores(table_of(benchmark, samples))
    assert math.isnan(scores.pop("style"))
    assert scores == pytest.approx(
        {"add": 4.0, "remove": 1.0, "overall": 2.5, "invalid_share": 1 / 3, "images": 3.0}, abs=1e-12
    )
    with pytest.raises(ValueError, match="`parts` name quality, which scores of told do not have: they have sc, pq"):
        table_of(EditBenchmark(Told(), parts=["quality"]), samples)


def test_the_papers_average_is_over_images_and_another_benchmark() -> None:
    """Two swaps and one style: (1 + 2 + 6) / 3 = 3 over images, (1.5 + 6) / 2 = 3.75 over kinds."""
    samples = [edit("a", "swap", (1.0, 0, 0)), edit("b", "swap", (2.0, 0, 0)), edit("c", "style", (6.0, 0, 0))]
    found = {}
    for benchmark in (RewardBenchmark(Told()), EditBenchmark(Told())):
        metric = PromptScores(["a", "b", "c"], ["swap", "swap", "style"], benchmark.columns)
        metric.update(["a", "b", "c"], benchmark.score(samples, [Image.new("RGB", (2, 2))] * 3))
        scores = benchmark.scores(metric.table())
        found[type(benchmark)] = scores[benchmark.headline]
        assert (scores["swap"], scores["style"]) == (1.5, 6.0)
    assert found == {RewardBenchmark: 3.0, EditBenchmark: 3.75}


def test_summary_equals_a_slow_loop_for_every_weighting() -> None:
    rng = np.random.default_rng(1)
    benchmark = EditBenchmark(Told(), parts=["sc", "pq"])
    samples = []
    for number in range(40):
        marks = () if rng.random() < 0.2 else tuple(rng.uniform(0, 10, 3).tolist())
        samples.append(
            edit(f"p{number}", ["add", "style", "text", "tone"][number % 4], marks, bool(rng.random() < 0.5))
        )
    weights = rng.integers(0, 3, (30, 40)).astype(float)
    found = benchmark.summarize(table_of(benchmark, samples), torch.from_numpy(weights))
    for replicate, weight in enumerate(weights):
        for prefix, inside in (
            ("", samples),
            ("intersection_", [s for s in samples if s.metadata["Intersection_exist"]]),
        ):
            for index, part in enumerate(("overall", "sc", "pq")):
                means = []
                for task in ("add", "style", "text", "tone"):
                    marks = [
                        s.metadata["marks"][index]
                        for s in inside
                        for _ in range(int(weight[samples.index(s)]))
                        if s.tag == task and s.metadata["marks"]
                    ]
                    if marks:
                        means.append(np.mean(marks))
                    if part == "overall" and not prefix:
                        assert float(found[task][replicate]) == pytest.approx(np.mean(marks), abs=1e-12)
                assert float(found[prefix + part][replicate]) == pytest.approx(np.mean(means), abs=1e-12)


class Paints(L.LightningModule):
    """Draws every prompt in one colour."""

    def test_step(self, batch: list[PromptSample], batch_idx: int, dataloader_idx: int = 0) -> EvaluationBatch:
        name = self.trainer.datamodule.eval_names[dataloader_idx]  # type: ignore[attr-defined]
        images = {"without_pe": [[Image.new("RGB", (8, 8), "red")] * len(batch)]}
        return EvaluationBatch(name, batch, {"without_pe": [s.prompt for s in batch]}, [[0] * len(batch)], images)


def answer(prompt: str, turn: int) -> Reply:
    """Quality 9 and 4; success by the instruction's number, which is unreadable for 3."""
    number = next((int(digit) for digit in "012345" if f"[edit {digit}]" in prompt), None)
    marks: Any = [9, 4] if number is None else [number + 3, 10]
    return Reply("I cannot say." if number == 3 else json.dumps({"score": marks, "reasoning": ""}))


def test_gedit_from_file_to_results(tmp_path: Path) -> None:
    """Real rows, judge and Trainer. English: edits 0, 2 (add) and 4 (style); Chinese: 1, 3 (add) and 5 (style)."""
    (tmp_path / "source.png").write_bytes(b"")
    Image.new("RGB", (8, 8), "gray").save(tmp_path / "source.png")
    rows = [
        {
            "key": f"k{i}",
            "task_type": "style_change" if i > 3 else "subject-add",
            "instruction": f"edit {i}",
            "instruction_language": ["en", "cn"][i % 2],
            "Intersection_exist": i != 2,
            "image": "source.png",
        }
        for i in range(6)
    ]
    (tmp_path / "gedit.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judge: Judge
    with serving() as judge:
        judge.answer = answer
        benchmark = EditBenchmark(VIEScore(judge.url, "judge", backoff=0.01), parts=["sc", "pq"], resamples=20)
        trainer = L.Trainer(
            accelerator="cpu", logger=CSVLogger(tmp_path, name="run"), callbacks=[benchmark],
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        trainer.test(Paints(), GEditPrompts(str(tmp_path / "gedit.jsonl"), eval_batch_size=2), verbose=False)
    results = json.loads((tmp_path / "run" / "version_0" / "results.json").read_text())
    # sc 3, 5 and 7, pq 4: roots of 12, 20 and 28
    add, style = (math.sqrt(12) + math.sqrt(20)) / 2, math.sqrt(28)
    assert results["gedit_en/viescore"]["without_pe"] == pytest.approx(
        {
            "subject-add": add,
            "style_change": style,
            "overall": (add + style) / 2,
            "sc": (4 + 7) / 2,
            "pq": 4.0,
            "intersection_overall": (math.sqrt(12) + style) / 2,
            "intersection_sc": (3 + 7) / 2,
            "intersection_pq": 4.0,
            "invalid_share": 0.0,
            "images": 3.0,
        }
    )
    chinese = results["gedit_cn/viescore"]["without_pe"]
    # edit 3 could not be read: sc 4 alone in its tag, and 8
    assert chinese["overall"] == pytest.approx((4 + math.sqrt(32)) / 2)
    assert chinese["invalid_share"] == pytest.approx(1 / 3)

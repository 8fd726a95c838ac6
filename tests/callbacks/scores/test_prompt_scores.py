"""Scores by prompt: two processes sum to one, means against loops; the bootstrap against theory."""

from __future__ import annotations

import math
import random
import warnings

import numpy as np
import pytest
import torch

from callbacks.geneval import GenEvalBenchmark
from callbacks.scores.bootstrap import interval, resample
from callbacks.scores.prompt_scores import PromptScores, PromptTable, weighted_mean
from miniature.scenes.detector import ShapesDetector

GENEVAL = GenEvalBenchmark(ShapesDetector())


def geneval_table(*images: tuple[str, str, bool]) -> PromptTable:
    """A table of (id, tag, correct)."""
    tags = {name: tag for name, tag, _ in images}
    metric = PromptScores(list(tags), list(tags.values()), ["correct"])
    metric.update([name for name, _, _ in images], [{"correct": float(correct)} for _, _, correct in images])
    return metric.table()


def test_geneval_is_a_mean_of_tag_means() -> None:
    """colors: 2 of 3 images, position 0 of 2, counting 1 of 1; a prompt counts if any of its images is right."""
    table = geneval_table(
        ("a", "colors", True), ("a", "colors", False), ("b", "colors", True),
        ("c", "position", False), ("c", "position", False), ("d", "counting", True),
    )  # fmt: skip
    assert GENEVAL.scores(table) == pytest.approx(
        {"counting": 1, "colors": 2 / 3, "position": 0, "overall": (1 + 2 / 3) / 3, "images": 0.5, "prompts": 0.75}
    )


def test_processes_sum_to_one() -> None:
    parts = [PromptScores(["a", "b", "c"], ["t"] * 3, ["x", "y"]) for _ in range(2)]
    parts[0].update(["a", "b"], [{"x": 1.0, "y": 2.0}, {"x": 3.0}])
    parts[1].update(["c", "a"], [{}, {"x": 0.25, "y": -1.0}])
    whole = PromptScores(["a", "b", "c"], ["t"] * 3, ["x", "y"])
    assert whole._reductions["totals"](torch.ones(2, 3)).tolist() == [2.0] * 3  # type: ignore[operator,misc]
    whole.totals, whole._update_count = parts[0].totals + parts[1].totals, 2
    table = whole.table()
    assert {name: value.tolist() for name, value in table.sums.items()} == {"x": [1.25, 3, 0], "y": [1, 0, 0]}
    assert {name: value.tolist() for name, value in table.counts.items()} == {"x": [2, 1, 0], "y": [2, 0, 0]}
    assert table.images.tolist() == [2, 1, 1]


def test_reading_a_table_changes_nothing() -> None:
    metric = PromptScores.on(torch.device("cpu"), [("a", "t"), ("b", "t")], ["x"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torchmetrics warns of a metric without updates
        assert metric.table().images.tolist() == [0, 0]
    metric.update(["b"], [{"x": 2.0}])
    before, count = metric.totals.clone(), metric.update_count
    assert metric.table().sums["x"].tolist() == metric.table().sums["x"].tolist() == [0, 2]
    assert torch.equal(metric.totals, before) and metric.update_count == count


def test_one_prompt_keeps_its_dimension() -> None:
    """Torchmetrics squeezes a tensor of one element that `compute` returns."""
    table = geneval_table(("a", "colors", True))
    assert table.sums["correct"].shape == table.images.shape == (1,)
    assert GENEVAL.scores(table)["overall"] == 1.0


def test_a_set_without_prompts_scores_nothing() -> None:
    scores = GENEVAL.scores(PromptScores.on(torch.device("cpu"), [], ["correct"]).table())
    assert set(scores) == {"overall", "images", "prompts"} and all(math.isnan(value) for value in scores.values())


def test_an_unknown_prompt_is_an_error() -> None:
    with pytest.raises(KeyError):
        PromptScores(["a"], ["t"], ["x"]).update(["b"], [{"x": 1.0}])
    with pytest.raises(ValueError, match="shorter"):
        PromptScores(["a"], ["t"], ["x"]).update(["a", "a"], [{"x": 1.0}])


def test_weighted_mean_is_that_of_repeated_prompts() -> None:
    """A weight of 3 is the prompt written three times: against a plain loop over images."""
    rng = random.Random(0)
    images = [(f"p{i % 7}", "t", {"x": rng.gauss(0, 1)} if rng.random() < 0.8 else {}) for i in range(30)]
    metric = PromptScores([f"p{i}" for i in range(7)], ["t"] * 7, ["x"])
    metric.update([name for name, _, _ in images], [values for _, _, values in images])
    table = metric.table()
    weights = torch.tensor([[rng.randrange(4) for _ in range(7)] for _ in range(5)], dtype=torch.float64)
    rows = torch.tensor([True, True, False, True, True, False, True])
    for row, found in zip(weights, weighted_mean(table, "x", weights, rows), strict=True):
        repeated = [
            values["x"]
            for name, _, values in images
            for _ in range(int(row[int(name[1:])]))
            if values and rows[int(name[1:])]
        ]
        assert found.item() == pytest.approx(np.mean(repeated), abs=1e-12)


def test_resamples_keep_the_size_of_every_tag() -> None:
    tags = ["a"] * 3 + ["b"] * 5 + ["a"] * 2
    weights = resample(tags, 400, seed=3)
    is_a = torch.tensor([tag == "a" for tag in tags])
    assert weights[:, is_a].sum(1).tolist() == weights[:, ~is_a].sum(1).tolist() == [5.0] * 400
    assert weights.mean(0).tolist() == pytest.approx([1.0] * 10, abs=0.15)  # std of a mean: sqrt(.8 / 400) = .045
    assert torch.equal(weights, resample(tags, 400, seed=3)) and not torch.equal(weights, resample(tags, 400, seed=4))


def test_rows_of_one_prompt_are_drawn_together() -> None:
    """The draws are those of the distinct prompts, which stand in the rows' order."""
    tags, prompts = ["a", "a", "b", "a", "a"], ["x", "y", "x", "x", "z"]
    weights = resample(tags, 50, prompts=prompts)
    once = resample(["a", "a", "b", "a"], 50)
    assert torch.equal(weights, once[:, [0, 1, 2, 0, 3]])
    assert torch.equal(resample(tags, 50, prompts=list("vwxyz")), resample(tags, 50))


def test_the_interval_of_a_share_has_its_textbook_width() -> None:
    """200 prompts, half of them right: 1.96 * sqrt(.25 / 200) = .0693 to either side."""
    table = geneval_table(*((f"{i}", "colors", i % 2 == 0) for i in range(200)))
    low, high = interval(GENEVAL.summarize(table, resample(table.tags, 4000))["overall"])
    assert low == pytest.approx(0.5 - 0.0693, abs=0.006) and high == pytest.approx(0.5 + 0.0693, abs=0.006)


def test_intervals_by_hand() -> None:
    assert interval(torch.arange(101.0, dtype=torch.float64)) == pytest.approx((2.5, 97.5))
    assert interval(torch.tensor([math.nan, 1.0, math.nan, 3.0]), level=1.0) == (1.0, 3.0)
    assert all(math.isnan(end) for end in interval(torch.tensor([math.nan])))

"""Scores over prompts from `scores.jsonl`, against answers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from callbacks.edit import EditBenchmark
from callbacks.runs.contrasts import mean_of_images, mean_of_tags, prompt_contrast, prompt_table
from callbacks.runs.loading import Run
from miniature.edits.reward import ShapesEditReward


def scored(folder: Path, *values: tuple[str, str, float | None, int], benchmark: str = "B", **more: Any) -> Run:
    """A test whose prompts (id, tag, mean, images) were scored."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text("{}")
    with (folder / "scores.jsonl").open("a", encoding="utf-8") as file:
        for name, tag, mean, images in values:
            line = {"benchmark": benchmark, "set": "geneval", "mode": "without_pe", "id": name, "tag": tag}
            file.write(json.dumps(line | {"correct": mean, "images": images} | more) + "\n")
    return Run.read(folder)


def test_a_table_is_what_was_scored(tmp_path: Path) -> None:
    """Prompt c could not be scored. By images (0 + 2 + 1) / 5, by tag (2/4 + 1/1) / 2."""
    run = scored(tmp_path, ("a", "red", 0.0, 2), ("b", "red", 1.0, 2), ("c", "red", None, 2), ("d", "blue", 1.0, 1))
    table = prompt_table(run, "geneval", "without_pe")
    assert table.ids == ["a", "b", "c", "d"] and table.images.tolist() == [2, 2, 2, 1]
    assert table.sums["correct"].tolist() == [0, 2, 0, 1] and table.counts["correct"].tolist() == [2, 2, 0, 1]
    assert run.stage == "test" and run.mode == "", "no config.yaml tells"
    assert prompt_contrast([(1, [table])], summarize=mean_of_images("correct")).value == pytest.approx(3 / 5)
    gap = prompt_contrast([(1, [table])], summarize=mean_of_tags("correct"))
    assert gap.value == pytest.approx(0.75) and gap.num == 4
    assert math.isnan(gap.low), "one prompt in a tag would seem certain"


def test_a_benchmarks_own_summary(tmp_path: Path) -> None:
    """EditBenchmark asks for a column that no prompt has. Means of kinds: (1 + 0.5) / 2."""
    columns = {"overall": 1.0, "intersection": None}
    run = scored(tmp_path, ("a", "swap", None, 1), **columns)
    run = scored(tmp_path, ("b", "env", None, 2), **columns | {"overall": 0.5})
    benchmark = EditBenchmark(ShapesEditReward())
    table = prompt_table(run, "geneval", "without_pe")
    assert prompt_contrast([(1, [table])], summarize=lambda t, w: benchmark.summarize(t, w)["overall"]).value == 0.75


def test_pairs_leave_the_prompts_difficulty_out(tmp_path: Path) -> None:
    """Every prompt gains .25 in the mean of two seeds, in another order and with one more: no doubt is left."""
    easy, other = {"a": 0.0, "b": 0.5, "c": 0.75}, {"a": 0.25, "b": 0.5, "c": 0.25}
    first = [
        scored(tmp_path / "1", *[(name, "red", value + 0.25, 4) for name, value in easy.items()]),
        scored(tmp_path / "2", *[(name, "red", value + 0.25, 4) for name, value in reversed(other.items())]),
    ]
    second = [
        scored(tmp_path / "3", ("z", "red", 1.0, 4), *[(name, "red", value, 4) for name, value in easy.items()]),
        scored(tmp_path / "4", *[(name, "red", value, 4) for name, value in other.items()]),
    ]
    tables = [[prompt_table(run, "geneval", "without_pe") for run in runs] for runs in (first, second)]
    gap = prompt_contrast([(1, tables[0]), (-1, tables[1])], summarize=mean_of_tags("correct"))
    assert (gap.value, gap.low, gap.high) == pytest.approx((0.25, 0.25, 0.25)) and gap.num == 3
    alone = prompt_contrast([(1, tables[0])], summarize=mean_of_tags("correct"))
    assert alone.value == pytest.approx((0.25 + 0.75 + 1 + 0.5 + 0.75 + 0.5) / 6)
    assert alone.low == pytest.approx(0.375) and alone.high == pytest.approx(0.75), "three times a, three times b or c"


def test_a_difference_of_differences(tmp_path: Path) -> None:
    """One model loses .5 by other words, the other .25, on every prompt: .25 more, without a doubt."""
    values = [(0.5, 0.0), (1.0, 0.5), (0.75, 0.25)], [(0.25, 0.0), (0.5, 0.25), (1.0, 0.75)]
    tables = []
    for i, side in enumerate(values):
        for j in (0, 1):
            ratings = [(name, "red", pair[j], 4) for name, pair in zip("abc", side, strict=True)]
            tables.append([prompt_table(scored(tmp_path / f"{i}{j}", *ratings), "geneval", "without_pe")])
    terms = list(zip((1.0, -1.0, -1.0, 1.0), tables, strict=True))
    gap = prompt_contrast(terms, summarize=mean_of_tags("correct"))
    assert (gap.value, gap.low, gap.high) == pytest.approx((0.25, 0.25, 0.25)) and gap.num == 3


def test_intervals_over_scenes_and_runs(tmp_path: Path) -> None:
    """Two scenes of three prompts each, right (1) or wrong (0): drawn together they are both right, one, or none.

    Runs of .25 and .75 throughout: a draw of both is .25, .5 or .75.
    """
    scenes = {name: "ab"[i // 3] for i, name in enumerate("uvwxyz")}
    alike = scored(tmp_path / "1", *[(name, "red", float(scene == "b"), 4) for name, scene in scenes.items()])
    table = prompt_table(alike, "geneval", "without_pe")
    by_prompt = prompt_contrast([(1, [table])], summarize=mean_of_tags("correct"))
    by_scene = prompt_contrast([(1, [table])], summarize=mean_of_tags("correct"), scenes=scenes)
    assert by_prompt.value == by_scene.value == 0.5
    assert (by_scene.low, by_scene.high) == (0, 1) and by_prompt.low > 0 and by_prompt.high < 1


def test_equal_prompts_are_drawn_together(tmp_path: Path) -> None:
    """As scenes are, and for a difference by the set that repeats its prompts."""
    right = {name: float(i > 2) for i, name in enumerate("uvwxyz")}
    tables = []
    for folder, prompts in (("1", "aaabbb"), ("2", "uvwxyz")):
        for prompt, (name, value) in zip(prompts, right.items(), strict=True):
            run = scored(tmp_path / folder, (name, "red", value, 4), prompt=prompt)
        tables.append(prompt_table(run, "geneval", "without_pe"))
    summarize = mean_of_tags("correct")
    one = prompt_contrast([(1, tables[:1])], summarize=summarize)
    assert (one.low, one.high) == (0, 1)
    both = prompt_contrast([(1, tables[1:]), (-0.5, tables[:1])], summarize=summarize)
    assert (both.value, both.low, both.high) == (0.25, 0, 0.5)


def test_intervals_of_other_runs(tmp_path: Path) -> None:
    """Three runs with .25, .5 and .75 on every prompt: Student's t interval, 4.3027 * .25 / sqrt(3) to each side."""
    runs = [scored(tmp_path / str(mean), *[(name, "red", mean, 4) for name in "abcd"]) for mean in (0.25, 0.5, 0.75)]
    tables = [prompt_table(run, "geneval", "without_pe") for run in runs]
    summarize = mean_of_tags("correct")
    fixed = prompt_contrast([(1, tables)], summarize=summarize)
    assert (fixed.low, fixed.high) == (0.5, 0.5)
    other = prompt_contrast([(1, tables)], summarize=summarize, runs=True, resamples=100_000)
    half = 4.3027 * 0.25 / math.sqrt(3)
    assert other.value == pytest.approx(0.5)
    assert (other.low, other.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.03)
    pairs = prompt_contrast([(1, tables), (-1, tables)], summarize=summarize, runs=True)
    assert (pairs.low, pairs.high) == (0, 0), "the same runs of both"
    one = prompt_contrast([(1, tables[:1])], summarize=summarize, runs=True)
    assert (one.low, one.high) == (0.25, 0.25), "what other runs would give is not known from one"


def test_refusals(tmp_path: Path) -> None:
    run = scored(tmp_path / "1", ("a", "red", 0.0, 2))
    with pytest.raises(ValueError, match=r"no scores of unseen with_pe: choose from geneval without_pe"):
        prompt_table(run, "unseen", "with_pe")
    both = scored(tmp_path / "1", ("a", "red", 0.0, 2), benchmark="C")
    with pytest.raises(ValueError, match=r"scores of geneval by B, C: name one benchmark"):
        prompt_table(both, "geneval", "without_pe")
    assert len(prompt_table(both, "geneval", "without_pe", benchmark="C")) == 1
    elsewhere = scored(tmp_path / "2", ("b", "red", 0.0, 2))
    tables = [prompt_table(one, "geneval", "without_pe") for one in (run, elsewhere)]
    with pytest.raises(ValueError, match=r"no prompt in common"):
        prompt_contrast([(1, tables[:1]), (-1, tables[1:])], summarize=mean_of_images("correct"))
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no scores\.jsonl: score its checkpoint by `lightning test`"):
        prompt_table(Run.read(tmp_path / "3"), "geneval", "without_pe")

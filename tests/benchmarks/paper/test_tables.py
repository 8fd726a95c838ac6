"""Tables of the report, by hand-made scores."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.paper.runs import Studies, covered, span
from benchmarks.paper.tables import geneval_table, long_table, retention_table, swap_table, wording_table
from callbacks.reporting.tables import markdown
from lightning_modules.sweep.run import read
from tests.benchmarks.paper.folders import fitted, score_test, studies_in, tenths, write_scores

pytestmark = pytest.mark.slow


def test_tables(studies: Studies) -> None:
    rows = {row.label: row.scores for row in retention_table(studies).rows if not row.source}
    assert {label: scores["without_pe"] for label, scores in rows.items()} == pytest.approx(
        {"m = 0 (3)": 0.3, "m = 1 (3)": 0.7, "m = 2 (3)": 0.5, "m = 4 (3)": 0.5}
    )
    assert not [row for row in wording_table(studies).rows if not row.source], "no test has an enhancer in front"
    assert (span([0.25, 0.5]), span([1.0]), covered([(0, 2), (1, 3), (5, 6)])) == (".25-.50", "", 4.0)


def test_longer_training(studies: Studies, tmp_path: Path) -> None:
    """Flow-only has .5, in the unseen wording .2, PromptRL .8 in both; after longer training .6, .1 and .4."""
    for stem, mode, original, unseen in (
        ("flow_only", "without_pe", "1111110000", "1000000000"),
        ("promptrl", "with_pe", "1111000000", "1111000000"),
    ):
        for seed in (42, 43, 44):
            run = fitted(tmp_path / "long", stem, seed, [0.4, 0.5])
            score_test(run, {("geneval", mode): original, ("unseen", mode): unseen})
    gaps = {
        row.label: [row.scores.get(name) for name in ("cost", "lead")]
        for row in long_table(studies_in(tmp_path, "geneval", "long")).rows
    }
    assert gaps.pop("PromptRL without PE, 7,680 rollouts (3)") == pytest.approx([0.2, 0.1])
    assert gaps == {
        "flow-only, 7,680 rollouts (3)": [pytest.approx(0.3), None],
        "PromptRL with PE, 7,680 rollouts (3)": pytest.approx([0.0, 0.6]),
        "flow-only, 23,040 rollouts (3)": [pytest.approx(0.5), None],
        "PromptRL with PE, 23,040 rollouts (3)": pytest.approx([0.0, 0.3]),
    }


def test_other_wordings(tmp_path: Path) -> None:
    """Of the base and of exports that the plans name: flow-only has lost .3 in detail, PromptRL nothing, with PE."""
    ratings = {"geneval": "1111100000", "geneval.static_pe": "1111000000", "geneval.detailed": "1111111000"}
    drawn = {(name, "without_pe"): digits for name, digits in ratings.items()}
    drawn |= dict.fromkeys([("geneval", "with_pe"), ("geneval.detailed", "with_pe")], ratings["geneval.static_pe"])
    write_scores(tmp_path / "probes_base" / "promptrl" / "x" / "version_0", {"images": {}}, drawn)
    trained = {
        "probes_flow_only": {("geneval", "without_pe"): tenths(7), ("geneval.detailed", "without_pe"): tenths(4)},
        "probes_promptrl": dict.fromkeys([("geneval", "with_pe"), ("geneval.detailed", "with_pe")], tenths(8)),
    }
    for plan, scores in trained.items():
        for job in read(["--config", f"configs/sweeps/paper/{plan}.yaml"]).jobs():
            write_scores(tmp_path / "probes_promptrl" / job.name / "x" / "version_0", {"images": {}}, scores)
    table = wording_table(studies_in(tmp_path, "probes_base", "probes_promptrl"))
    found = {row.label: row.scores for row in table.rows if not row.source}
    assert found == {
        "base": pytest.approx({"original": 0.5, "geneval.static_pe": -0.1, "geneval.detailed": 0.2}),
        "base with the untrained PE": pytest.approx(
            {"original": 0.4, "geneval.static_pe": 0.0, "geneval.detailed": 0.0}
        ),
        "flow-only (5)": pytest.approx({"original": 0.7, "geneval.detailed": -0.3}),
        "PromptRL with PE (5)": pytest.approx({"original": 0.8, "geneval.detailed": 0.0}),
    }


def test_no_interval_for_two_seeds(tmp_path: Path) -> None:
    for stem, seeds in (("flow_only", (42, 43, 44)), ("promptrl", (42, 43))):
        for seed in seeds:
            ratings = {("geneval", mode): "1110000000" for mode in ("without_pe", "with_pe")}
            score_test(fitted(tmp_path / "geneval", stem, seed, [0.4, 0.5]), ratings)
    lines = markdown(geneval_table(studies_in(tmp_path, "geneval"))).splitlines()
    last = {line.split(" (")[0]: line.split(" | ")[-1] for line in lines if " (2, " in line or " (3, " in line}
    assert last.pop("| flow-only").startswith("0.300 [")
    assert last == {"| PromptRL without PE": "0.300 |", "| PromptRL with PE": "0.300 |"}


def test_refiners_in_front_of_a_second_model(tmp_path: Path) -> None:
    """As the plan names them: the first one is untrained."""
    trained = {"s42": tenths(4), "s43": tenths(6), "s44": tenths(5), "s45": tenths(5), "s46": tenths(5)}
    for job in read(["--config", "configs/sweeps/paper/transfer.yaml"]).jobs():
        seed = next((key for key in trained if key in job.name), None)
        scores = {("geneval", "with_pe"): trained[seed] if seed else tenths(2)}
        scores |= {} if seed else {("geneval", "without_pe"): tenths(1)}
        write_scores(tmp_path / "transfer" / job.name / "x" / "version_0", {"images": {}}, scores)
    rows = {
        row.label: row.scores["overall"] for row in swap_table(studies_in(tmp_path, "transfer")).rows if not row.source
    }
    assert rows == pytest.approx(
        {
            "second flow model": 0.1,
            "second flow model with the untrained refiner": 0.2,
            "second flow model with PromptRL's refiner (5, .40-.60)": 0.5,
        }
    )

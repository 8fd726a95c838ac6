"""Tables of the report, by hand-made scores."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.paper.curves import sensitivity_table
from benchmarks.paper.modes import FLOW, JOINT, PLAIN
from benchmarks.paper.properties import properties_table
from benchmarks.paper.runs import Studies, covered, span
from benchmarks.paper.tables import geneval_table, long_table, retention_table, swap_table, wording_table
from callbacks.reporting.tables import markdown
from lightning_modules.sweep.run import read
from tests.benchmarks.paper.folders import fitted, log_similarity, score_test, studies_in, tenths, write_scores

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


def test_the_second_flow_model_in_other_wordings(tmp_path: Path) -> None:
    """.5 as it is, .4 behind the untrained refiner, which makes the same of every wording, .7 in detail."""
    ratings = {"geneval": "1111100000", "geneval.static_pe": "1111000000", "geneval.detailed": "1111111000"}
    drawn = {(name, "without_pe"): digits for name, digits in ratings.items()}
    drawn |= dict.fromkeys([("geneval", "with_pe"), ("geneval.detailed", "with_pe")], ratings["geneval.static_pe"])
    write_scores(tmp_path / "base_crossed_words" / "promptrl" / "x" / "version_0", {"images": {}}, drawn)
    table = wording_table(studies_in(tmp_path, "base_crossed_words"))
    plain, refined = (row for row in table.rows if not row.source)
    assert (plain.label, refined.label) == ("second flow model", "second flow model with the untrained PE")
    assert plain.scores == pytest.approx({"original": 0.5, "geneval.static_pe": -0.1, "geneval.detailed": 0.2})
    assert refined.scores == pytest.approx({"original": 0.4, "geneval.static_pe": 0.0, "geneval.detailed": 0.0})


def test_what_it_depends_on(tmp_path: Path) -> None:
    """Elsewhere .5 and .7, a fourth seed .9; with other noise .4 and .6 or .8, a third is alone; unseen half of it."""
    plan = "sensitivity_noise"
    for folder, label, joint in (("geneval", "", (0.7, 0.7, 0.7, 0.9)), (plan, "-noise_level0.4", (0.6, 0.8, 0.9))):
        flow = 0.5 if folder == "geneval" else 0.4
        for stem, finals in (("flow_only", [flow] * (4 if folder == "geneval" else 2)), ("promptrl", joint)):
            for seed, final in enumerate(finals, start=42):
                enhancer = 0.1 if stem == "promptrl" else 0.0
                run = fitted(tmp_path / folder, stem, seed, [0.3, final, final], enhancer)
                run.parents[1].rename(tmp_path / folder / f"{stem}{label}-s{seed}")
    every, elsewhere, noise = sensitivity_table(studies_in(tmp_path, "geneval", plan)).rows
    assert [row.label for row in (every, elsewhere, noise)] == [
        "as elsewhere (4)",
        "as elsewhere, seeds 42 to 44 (3)",
        "noise level 0.4 (2)",
    ]
    assert every.scores["gap"] == pytest.approx(0.25)
    # The mean curve rises by .4 from .3 where flow-only rises by .2, and by .4 where flow-only rises by .1.
    assert elsewhere.scores["ratio"] == pytest.approx(0.5) and noise.scores["ratio"] == pytest.approx(0.25)
    assert (noise.scores["gap"], noise.scores["unseen"]) == pytest.approx((0.3, 0.15))
    assert (noise.intervals["gap"], noise.intervals["unseen"]) == (pytest.approx((0.2, 0.4)), pytest.approx((0.1, 0.2)))
    assert elsewhere.scores["gap"] == pytest.approx(0.2)
    finals = {FLOW: 0.5, PLAIN: 0.6, JOINT: 0.7}
    assert {name: elsewhere.scores[name] for name in finals} == pytest.approx(finals)

    for size in (16, 4):
        for stem in ("flow_only", "promptrl"):
            run = fitted(tmp_path / "sensitivity_group", stem, 42, [0.3, 0.4])
            run.parents[1].rename(tmp_path / "sensitivity_group" / f"{stem}-group{size}-s42")
    rows = sensitivity_table(studies_in(tmp_path, "geneval", plan, "sensitivity_group")).rows
    assert [row.label for row in rows] == [
        "as elsewhere (4)",
        "as elsewhere, seeds 42 to 44 (3)",
        "group 4 (1)",
        "group 16 (1)",
        "noise level 0.4 (2)",
    ]

    # Behind the second refiner flow-only is the first flow model's, with the second that one's own.
    others = {"crossed": ("promptrl", 0.8), "words_geneval": ("flow_only", 0.3), "crossed_words": ("promptrl", 0.9)}
    for folder, (stem, final) in others.items():
        for seed in (42, 43, 44):
            run = fitted(tmp_path / folder, stem, seed, [0.3, final], 0.1 if stem == "promptrl" else 0.0)
            run.parents[1].rename(tmp_path / folder / f"{stem}-s{seed}")
    rows = sensitivity_table(studies_in(tmp_path, "geneval", *others)).rows
    gaps = {row.label: row.scores["gap"] for row in rows[2:]}
    assert gaps == pytest.approx({"second refiner (3)": 0.3, "second flow model (3)": 0.6})


def test_no_interval_for_two_seeds(tmp_path: Path) -> None:
    for stem, seeds in (("flow_only", (42, 43, 44)), ("promptrl", (42, 43))):
        for seed in seeds:
            ratings = {("geneval", mode): "1110000000" for mode in ("without_pe", "with_pe")}
            score_test(fitted(tmp_path / "geneval", stem, seed, [0.4, 0.5]), ratings)
    lines = markdown(geneval_table(studies_in(tmp_path, "geneval"))).splitlines()
    last = {line.split(" (")[0]: line.split(" | ")[-1] for line in lines if " (2, " in line or " (3, " in line}
    assert last.pop("| flow-only").startswith("0.300 [")
    assert last == {"| PromptRL without PE": "0.300 |", "| PromptRL with PE": "0.300 |"}


def test_gains_beside_each_other(studies: Studies, tmp_path: Path) -> None:
    """Gains over the base's .3: flow-only .2, prompt-only .1, PromptRL .5: .3 over flow-only, .2 over their sum."""
    for seed in (42, 43, 44):
        run = fitted(tmp_path / "geneval", "prompt_only", seed, [0.4, 0.4, 0.4])
        score_test(run, {("geneval", "with_pe"): "1111000000"})
        for stem, alike in (("flow_only", 0.9), ("promptrl", 0.1 * (seed - 41))):
            log_similarity(tmp_path / "geneval" / f"{stem}-s{seed}" / "x" / "version_0", alike)
    ratings = {("geneval", "without_pe"): "1110000000", ("geneval", "with_pe"): "1100000000"}
    write_scores(tmp_path / "base" / "promptrl" / "x" / "version_0", {"images": {}}, ratings)
    (row,) = properties_table(studies_in(tmp_path, "geneval", "base")).rows
    assert row.label == "GenEval (3)" and row.scores == pytest.approx(
        {"flow": 0.2, "prompt": 0.1, "joint": 0.5, "enhancer": -0.1, "over_best": 0.3, "over_sum": 0.2, "base": 0.3}
        | {"alike_flow": 0.9, "alike_joint": 0.2}
    )
    low, high = row.intervals["over_best"]
    assert low <= 0.3 <= high


def test_gains_of_other_flow_models_and_refiners(studies: Studies, tmp_path: Path) -> None:
    """In tenths: the base, its untrained refiner, the three modes; a seed that one mode alone has does not count."""
    others = {
        "crossed": ("second refiner", "base_crossed", 3, 1, 5, 6, 8),
        "crossed_words": ("second flow model", "base_crossed_words", 2, 1, 4, 3, 5),
        "words_geneval": ("second flow model and refiner", "base_words_geneval", 2, 0, 4, 1, 3),
    }
    score_test(fitted(tmp_path / "geneval", "flow_only", 45, [0.4, 0.5]), {("geneval", "without_pe"): tenths(10)})
    fits = [("words_geneval", "flow_only", "without_pe", 4)]
    for name, (_, untrained, base, refiner, _, prompt, joint) in others.items():
        ratings = {("geneval", mode): tenths(right) for mode, right in (("without_pe", base), ("with_pe", refiner))}
        write_scores(tmp_path / untrained / "promptrl" / "x" / "version_0", {"images": {}}, ratings)
        fits += [(name, "prompt_only", "with_pe", prompt), (name, "promptrl", "with_pe", joint)]
    for name, stem, mode, right in fits:
        for seed in (42, 43, 44):
            run = fitted(tmp_path / name, stem, seed, [0.4, 0.5])
            score_test(run, {("geneval", mode): tenths(right)})
    for run in tmp_path.glob("*/*/x/version_0"):
        log_similarity(run, 0.5)
    bases = [untrained for _, untrained, *_ in others.values()]
    rows = {row.label: row.scores for row in properties_table(studies_in(tmp_path, "geneval", *others, *bases)).rows}
    assert set(rows) == {f"GenEval, {label} (3)" for label, *_ in others.values()}
    for label, _, base, *finals in others.values():
        found = [rows[f"GenEval, {label} (3)"][name] for name in ("enhancer", "flow", "prompt", "joint")]
        assert found == pytest.approx([(final - base) / 10 for final in finals])


def test_refiners_in_front_of_a_second_model(tmp_path: Path) -> None:
    """As the plan names them; a refiner that is trained for the second flow model begins as PromptRL's did."""
    ratings = {"s42": "1111000000", "s43": "1111110000", "s44": "1111100000"}
    for job in read(["--config", "configs/sweeps/paper/transfer.yaml"]).jobs():
        (digits,) = (digits for key, digits in ratings.items() if key in job.name)
        folder = tmp_path / "transfer" / job.name / "x" / "version_0"
        write_scores(folder, {"images": {}}, {("geneval", "with_pe"): digits})
    untrained = {("geneval", "with_pe"): "1100000000", ("geneval", "without_pe"): "1000000000"}
    write_scores(tmp_path / "base_crossed_words" / "promptrl" / "x" / "version_0", {"images": {}}, untrained)
    for study, digits in (("crossed_words", "1110000000"), ("words_geneval", "1111111111")):
        for seed in (42, 43, 44):
            score_test(fitted(tmp_path / study, "prompt_only", seed, [0.4, 0.5]), {("geneval", "with_pe"): digits})
    studies = studies_in(tmp_path, "transfer", "base_crossed_words", "crossed_words", "words_geneval")
    rows = {row.label: row.scores["overall"] for row in swap_table(studies).rows if not row.source}
    assert rows == pytest.approx(
        {
            "second flow model": 0.1,
            "second flow model with the untrained refiner": 0.2,
            "second flow model with PromptRL's refiner (3, .40-.60)": 0.5,
            "second flow model with a refiner trained for it (3, .30-.30)": 0.3,
        }
    )

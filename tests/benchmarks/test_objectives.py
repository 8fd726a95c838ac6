"""The study of objectives: its runs by name, and its table of hand-made scores."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.objectives import CELLS, MODES, RATES, SEEDS, Cell, draw, table
from benchmarks.paper.runs import GENEVAL, Study
from tests.benchmarks.paper.folders import fitted, score_test, tenths


def test_runs_have_names_of_their_own() -> None:
    jobs = [job for cell in CELLS for job in cell.plan(RATES, SEEDS[:1], test=False).jobs()]
    assert len({job.name for job in jobs}) == len(jobs) == 6 * 3 * 2 * 4
    nft = Cell("DiffusionNFT", "ocr", "promptrl").plan([1.5e-4], SEEDS, test=True).jobs()
    assert [job.name for job in nft] == [f"ocr_promptrl-diffusion_nft-flow0.00015-s{seed}" for seed in SEEDS]
    fit, test = nft[0].commands
    assert "--config=configs/objectives/diffusion_nft.yaml" in fit.options and test.stage == "test"
    assert {"--model.init_args.objective.init_args.advantage_range=1.0", "--trainer.max_steps=60"} <= set(fit.options)


@pytest.mark.slow
def test_the_best_rate_of_each_is_compared(tmp_path: Path) -> None:
    """Flow-GRPO: alone .5 at its best rate, jointly .7; AWM's search is not finished."""
    (tmp_path / "runs").mkdir()
    for objective, stem, finals, right in (
        ("Flow-GRPO", "flow_only", (0.4, 0.6, 0.5, 0.5), 5),
        ("Flow-GRPO", "promptrl", (0.4, 0.5, 0.8, 0.3), 7),
        ("AWM", "flow_only", (0.4, 0.9), 9),
    ):
        cell = Cell(objective, "geneval", stem)
        for rate, final in zip(RATES, finals, strict=False):
            best = len(finals) == 4 and final == max(finals)
            for seed, job in zip(
                SEEDS, cell.plan([rate], SEEDS if best else SEEDS[:1], test=True).jobs(), strict=False
            ):
                fit = fitted(tmp_path / "made", stem, seed, [0.3, final, final])
                folder = fit.parents[1].rename(tmp_path / "runs" / job.name)
                if best:
                    score_test(folder / "x" / "version_0", {("geneval", MODES[stem]): tenths(right)}, GENEVAL)
    study = Study(tmp_path / "runs")
    (row,) = table(study).rows
    assert row.label == "Flow-GRPO" and Cell("AWM", "geneval", "flow_only").best(study) is None
    assert row.scores == pytest.approx({"geneval, flow-only": 0.5, "geneval, joint": 0.7, "geneval, gain": 0.2})
    low, high = row.intervals["geneval, gain"]
    assert 0 < low <= 0.2 <= high < 0.4
    draw(study, tmp_path / "objectives.png")
    assert (tmp_path / "objectives.png").read_bytes().startswith(b"\x89PNG")

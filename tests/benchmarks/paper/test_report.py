"""Scores of finished runs, and one real study from its plan to the report."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.paper.__main__ import main
from benchmarks.paper.claims import FAILS, HERE, HOLDS, OPEN, above
from benchmarks.paper.runs import Score, Studies, Study, shared_seeds
from lightning_modules.sweep import run
from tests.benchmarks.paper.folders import studies_in


def test_scores_and_differences(studies: Studies) -> None:
    joint, flow = studies["geneval"]["promptrl"], studies["geneval"]["flow_only"]
    assert set(joint.fits) == set(joint.tests) == {42, 43, 44} and set(joint.only([43, 99]).tests) == {43}
    score = Score(joint, "geneval", "with_pe")
    assert score.there and score.value.value == pytest.approx(0.8) and score.by_seed == pytest.approx([0.8] * 3)
    assert score.by_tag == pytest.approx({"colors": 0.8})
    assert not Score(flow, "geneval", "with_pe").there and not Score(studies["ocr"]["x"], "geneval", "with_pe").there
    assert flow.having("geneval.static_pe", "without_pe").tests == {}
    alone = Score(flow, "geneval", "without_pe")
    gain = above("gain", (1, score), (-1, alone))
    assert gain is not None and gain.number.startswith("+0.300 [") and gain.number.endswith(", 3 seeds")
    assert gain.verdict in (HOLDS, HERE)
    loss = above("loss", (1, alone), (-1, score))
    assert loss is not None and loss.verdict == FAILS
    none = above("nothing", (1, alone), (-1, Score(joint, "geneval", "without_pe")))
    assert none is not None and none.verdict == OPEN and none.number.startswith("+0.000 [+0.000, +0.000] [+0.000, ")
    assert above("not measured", (1, score), (-1, Score(flow, "geneval", "with_pe"))) is None


def test_only_seeds_that_both_have_are_compared(studies: Studies) -> None:
    """Two are too few for a verdict, and none are no comparison."""
    joint, flow = studies["geneval"]["promptrl"], studies["geneval"]["flow_only"]
    best, two = Score(joint, "geneval", "with_pe"), Score(flow.only([43, 44]), "geneval", "without_pe")
    assert shared_seeds(best, two) == [43, 44]
    found = above("gain", (1, best), (-1, two))
    assert found is not None and found.verdict == OPEN and found.number.endswith(", 2 seeds")
    assert above("gain", (1, Score(joint.only([42]), "geneval", "with_pe")), (-1, two)) is None


def test_a_damaged_run_is_left_out_with_a_warning(studies: Studies, tmp_path: Path) -> None:
    """The others stay; the heading counts it as unfinished."""
    (tmp_path / "geneval" / "promptrl-s43" / "x" / "version_0" / "results.json").write_text('{"geneval": ')
    (tmp_path / "geneval" / "flow_only-s44" / "test" / "x" / "version_0" / "scores.jsonl").write_text('{"set": ')
    with pytest.warns(UserWarning, match="damaged"):
        found = Study(tmp_path / "geneval")
    assert set(found["promptrl"].fits) == {42, 44} and set(found["flow_only"].tests) == {42, 43}
    with pytest.warns(UserWarning, match="damaged"):
        assert "Not finished yet" in studies_in(tmp_path, "geneval").heading()


def test_nothing_is_there_yet(tmp_path: Path) -> None:
    study = Study(tmp_path / "none")
    assert study.settings == {} and study["promptrl"].fits == {} and study.processes == []
    assert studies_in(tmp_path, "geneval")["swap"].settings == {}, "not what lies in the current folder"


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "genevil"])
    assert "has no study genevil: choose from base, search_flow_only, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--plans", str(tmp_path)])
    assert "choose from none" in capsys.readouterr().err


@pytest.mark.slow
def test_from_a_plan_to_the_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], preloaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is tested without training, flow-only trains one step; the second call runs nothing again."""
    monkeypatch.setattr(run, "PROGRAM", [*preloaded, "-m", "lightning_modules.cli"])
    small = {
        "trainer.accelerator": "cpu",
        "data.init_args.train_prompts": 6,
        "data.init_args.eval_prompts": 6,
        "model.init_args.flow.init_args.sampling.eval_steps": 2,
        "data.init_args.batch_size": 1,
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
    }
    plans: dict[str, dict[str, Any]] = {
        "base": {"configs": ["configs/miniature/promptrl.yaml"], "fit": False, "test_configs": []},
        "geneval": {"configs": ["configs/miniature/flow_only.yaml"], "seeds": [5]},
    }
    (tmp_path / "plans").mkdir()
    for name, plan in plans.items():
        text = yaml.safe_dump(plan | {"overrides": small, "root": str(tmp_path / "runs" / name)})
        (tmp_path / "plans" / f"{name}.yaml").write_text(text)
    options = ["--plans", str(tmp_path / "plans"), "--out", str(tmp_path / "PAPER.md"), "--processes", "2"]
    for state in ("done", "was done"):
        main(options)
        said = capfd.readouterr().out
        assert f"promptrl: {state}, " in said and f"flow_only-s5: {state}, " in said
    text = (tmp_path / "PAPER.md").read_text()
    assert "1 finished fits" in text and "Not finished" not in text
    assert "![validation scores by rollouts](paper_curves.png)" in text
    assert (tmp_path / "paper_curves.png").read_bytes().startswith(b"\x89PNG")
    table = text.partition("## GenEval, canonical prompts")[2]
    assert "| base | " in table and "| base with the untrained PE | " in table
    assert "| GenEval: flow-only | 1 | " in text
    assert not list((tmp_path / "runs" / "base").rglob("*.ckpt"))

    # What is packed says the same after everything else is gone.
    main([*options, "--pack", str(tmp_path / "study.tar.xz")])
    shutil.rmtree(tmp_path / "runs")
    with tarfile.open(tmp_path / "study.tar.xz") as archive:
        archive.extractall("/", filter=lambda member, _: member)
    main([*options, "--report-only"])
    assert (tmp_path / "PAPER.md").read_text().splitlines()[2:] == text.splitlines()[2:]

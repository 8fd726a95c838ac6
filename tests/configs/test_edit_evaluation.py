"""The editing miniature's test overlay on the shipped base models, and the tables of several seeds made of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.miniature import evaluation as miniature_evaluation
from lightning_modules import cli

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`lightning test` of the base models with the source in sight, and hidden from the refiner."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "miniature").symlink_to(ROOT / "miniature")
    overlay = yaml.safe_load((ROOT / "configs/miniature/edit_evaluate.yaml").read_text())
    (diversity,) = (one for one in overlay["trainer"]["callbacks"] if one["class_path"].endswith("Diversity"))
    diversity["init_args"]["num_prompts"] = 2  # of 48, with eight images in each of three arms
    (folder / "evaluate.yaml").write_text(yaml.safe_dump(overlay))
    configs = [f"--config={ROOT}/configs/miniature/edit_promptrl.yaml", f"--config={folder}/evaluate.yaml"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the static enhancer's wordings go where the command is run
        for name, sees in (("base-0", "true"), ("blind-0", "false")):
            options = [
                "--data.init_args.eval_prompts=6",
                f"--model.init_args.language.init_args.see_source={sees}",
                f"--trainer.default_root_dir=evaluation/{name}",
                "--trainer.accelerator=cpu",
            ]
            cli.main(["test", *configs, *options])
    return folder


def results(folder: Path, name: str) -> Any:
    (path,) = (folder / "evaluation" / name).rglob("results.json")
    return json.loads(path.read_text())


def test_a_static_enhancer_is_the_untrained_refiner(tested: Path) -> None:
    """Equal rewrites give equal images, to the bit; one that does not see the source rewrites otherwise."""
    base, blind = results(tested, "base-0"), results(tested, "blind-0")
    for key in ("overall", "strict", "removal"):
        static = base["edit.static_pe/shapes_edit"]["without_pe"][key]
        assert static == base["edit/shapes_edit"]["with_pe"][key]
        assert static == blind["edit.static_pe/shapes_edit"]["without_pe"][key]
    said = base["robustness"]["EditBenchmark by shapes_edit"]["edit.static_pe"]
    assert said["against_pe"]["prompts"] == 6 and said["against_pe"]["scores"]["headline"] == 0
    scores = base["edit/shapes_edit"]
    assert scores["without_pe"] == blind["edit/shapes_edit"]["without_pe"]
    assert scores["with_pe"]["overall"] > blind["edit/shapes_edit"]["with_pe"]["overall"]


def test_the_source_is_what_names_come_from(tested: Path) -> None:
    seen, blind = (results(tested, name)["naming"]["results"]["edit"]["names_source"] for name in ("base-0", "blind-0"))
    # miniature/README.md: .86 and .04 of 384
    assert seen["mean"] >= 0.5 and blind["mean"] <= 0.35


def test_tables_of_several_seeds(
    tested: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", str(tested / "evaluation"), "--set", "edit"])
    miniature_evaluation.main()
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("|")]
    base = results(tested, "base-0")
    scores = base["edit/shapes_edit"]["with_pe"]
    (row,) = [row for row in rows if row[0] == f"base with PE ({scores['overall']:.2f}-{scores['overall']:.2f})"][:1]
    heads = rows[0]
    assert row[heads.index("strict")] == f"{scores['strict']:.3f}"
    assert row[heads.index("removal")] == f"{scores['removal']:.3f}"
    assert any(row[0].startswith("blind, edit, names source") for row in rows)

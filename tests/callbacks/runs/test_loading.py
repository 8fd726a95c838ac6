"""Runs read back: files as Lightning writes them, with literal numbers, and one real fit, resumed and tested."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from callbacks.runs.curves import curve, settings
from callbacks.runs.loading import Run, load, overview
from lightning_modules.cli import main
from lightning_modules.run_folder import RunFolder, find
from tests.short_runs import quick

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")]

RATES = {"flow-only": (1e-4, None), "prompt-only": (None, 1e-4), "PromptRL": (1e-4, 1e-4)}


def config(mode: str = "PromptRL", seed: int = 42, max_steps: int = 4, ckpt_path: str | None = None) -> dict[str, Any]:
    flow, language = ({"init_args": {"learning_rate": rate}} for rate in RATES[mode])
    agents = {"flow": flow, "language": None if mode == "flow-only" else language}
    model = {"class_path": "lightning_modules.prompt_rl.PromptRL", "init_args": agents | {"seed": seed}}
    return {"model": model, "trainer": {"max_steps": max_steps}, "seed_everything": 7, "ckpt_path": ckpt_path}


def history(*steps: int, first: float = 0.5) -> dict[str, Any]:
    """Validations with 8 rollouts a step; the headline, `f`, rises by .01 a step."""
    scores = {step: {"words": {"without_pe": {"f": first + step / 100, "rest": None}}} for step in steps}
    entries = [{"step": step, "rollouts": 8 * step, "seconds": 2.0 * step, "results": scores[step]} for step in steps]
    return {"headlines": {"words": "f"}, "history": {"Words": entries}} | scores[steps[-1]]


ROWS = [  # what a fit of 4 steps logs: before training, then training rows and, after them, validation rows
    {"step": 0, "val/words/without_pe": 0.5, "val/naming": 0.1},
    {"step": 0, "health/dark_share": 0.25},
    {"step": 0, "reward": 1.0, "rollouts": 8.0},
    {"step": 1, "reward": 2.0, "rollouts": 16.0},
    {"step": 1, "val/words/without_pe": 0.52, "val/naming": 0.2},
    {"step": 2, "val/robustness": -0.1},  # by a callback's own call of the loggers, after that validation
    {"step": 2, "reward": 3.0, "rollouts": 24.0},
    {"step": 3, "reward": 4.0, "rollouts": 32.0},
    {"step": 3, "val/words/without_pe": 0.54, "val/naming": 0.3},
]


def write(folder: Path, *, rows: list[dict[str, Any]] = ROWS, results: Any = None, **about: Any) -> Path:
    """A run folder as the command leaves it, `metrics.csv` by Lightning's own logger."""
    logger = CSVLogger(folder.parent, name="", version=folder.name)
    for row in rows:
        logger.log_metrics({name: value for name, value in row.items() if name != "step"}, row["step"])
    logger.save()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config(**about)))
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_validations_and_training(tmp_path: Path) -> None:
    run = Run.read(write(tmp_path / "a" / "version_0", results=history(0, 2, 4)))
    assert run.validations.index.tolist() == [0, 2, 4]
    assert run.validations["rollouts"].tolist() == [0, 16, 32] and run.validations["seconds"].tolist() == [0, 4, 8]
    assert run.validations["val/words/without_pe"].tolist() == pytest.approx([0.5, 0.52, 0.54])
    assert run.validations["val/naming"].tolist() == [0.1, 0.2, 0.3]
    assert run.validations["val/robustness"].tolist()[1] == -0.1 and run.validations["val/robustness"].count() == 1
    assert run.validations["val/words/without_pe/rest"].isna().all()
    assert run.training["rollouts"].to_dict() == {1: 8, 2: 16, 3: 24, 4: 32}
    assert run.training["reward"].tolist() == [1, 2, 3, 4] and run.training["health/dark_share"].tolist()[0] == 0.25
    assert (run.mode, run.seed, run.finished, run.stage) == ("PromptRL", 42, True, "fit")
    assert curve(run, "val/naming").to_dict() == {0: 0.1, 16: 0.2, 32: 0.3}
    assert curve(run, "reward", by="step").to_dict() == {1: 1, 2: 2, 3: 3, 4: 4}
    assert curve(run, "val/words/without_pe", by="seconds").index.tolist() == [0, 4, 8]
    with pytest.raises(ValueError, match=r"version_0 has no val/namin by rollouts: choose another, such as val/naming"):
        curve(run, "val/namin")


def test_a_run_without_results_is_unfinished(tmp_path: Path) -> None:
    """Killed before results.json; steps and rollouts of validations follow from the order of rows."""
    run = Run.read(write(tmp_path / "version_0", rows=ROWS[:5], mode="flow-only"))
    assert not run.finished and run.mode == "flow-only" and run.headlines == {}
    assert run.validations["rollouts"].to_dict() == {0: 0, 2: 16}
    assert run.validations["val/words/without_pe"].tolist() == [0.5, 0.52]
    (row,) = overview([run]).to_dict("records")
    assert (row["mode"], row["finished"]) == ("flow-only", False)


def test_training_rows_that_are_far_apart(tmp_path: Path) -> None:
    """`log_every_n_steps` 4: the validation after 2 steps stands between training rows, at half their rollouts."""
    rows = [ROWS[0], {"step": 1, "val/naming": 0.2}, ROWS[7], ROWS[8]]
    for results in (None, history(0, 2, 4)):
        run = Run.read(write(tmp_path / f"{results is None}" / "version_0", rows=rows, results=results))
        assert run.validations["rollouts"].to_dict() == {0: 0, 2: 16, 4: 32}
        assert run.validations["val/naming"].tolist() == [0.1, 0.2, 0.3]


def test_repeated_steps_take_the_latest(tmp_path: Path) -> None:
    again = [{"step": 3, "reward": 9.0, "rollouts": 32.0}, {"step": 3, "val/naming": 0.9}]
    run = Run.read(write(tmp_path / "version_0", rows=ROWS + again, results=history(0, 2, 4)))
    assert run.training["reward"].tolist() == [1, 2, 3, 9]
    assert run.validations["val/naming"].tolist() == [0.1, 0.2, 0.9]


def test_a_resumed_run_has_its_beginning(tmp_path: Path) -> None:
    """Stopped after step 3, resumed from the checkpoint of step 2: what is logged twice comes from the second run."""
    first = write(tmp_path / "version_0", rows=ROWS[:7], results=history(0, 2))
    rest = [{"step": 2, "reward": 30.0, "rollouts": 24.0}, *ROWS[7:]]
    checkpoint = str(first / "checkpoints" / "last.ckpt")
    write(tmp_path / "version_1", rows=rest, results=history(0, 2, 4), ckpt_path=checkpoint)
    (run,) = load(tmp_path)
    assert run.folder.name == "version_1" and run.finished
    assert run.training["reward"].to_dict() == {1: 1, 2: 2, 3: 30, 4: 4}
    assert run.validations["val/words/without_pe"].tolist() == pytest.approx([0.5, 0.52, 0.54])
    assert run.validations["val/naming"].tolist() == [0.1, 0.2, 0.3]
    for path in first.iterdir():
        path.unlink()
    first.rmdir()
    (alone,) = load(tmp_path)
    assert alone.training.index.tolist() == [3, 4] and alone.validations.index.tolist() == [0, 2, 4]
    assert math.isnan(alone.validations["val/naming"][0]), "no benchmark, so not in the history"


def test_a_test_that_was_cut_off_is_no_continuation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has named its checkpoint and opened its events, but scored nothing. The path is as the command was given."""
    monkeypatch.chdir(tmp_path)
    fit = write(Path("runs/a/version_0"), results=history(0, 4), seed=43)
    test = write(Path("runs/a/test/version_0"), rows=ROWS[:1], ckpt_path=str(fit / "checkpoints" / "last.ckpt"))
    (fit / "checkpoints").mkdir()
    (fit / "checkpoints" / "last.ckpt").touch()
    said = yaml.safe_load((test / "config.yaml").read_text())
    (test / "config.yaml").write_text(yaml.safe_dump(said | {"images": {"images_per_prompt": 1}}))
    monkeypatch.chdir("/")
    (run,) = load(tmp_path / "runs")
    assert run.folder == tmp_path / fit and run.finished
    (cut,) = load(tmp_path / "runs", stage="test")
    assert not cut.finished and cut.seed == 43 and cut.mode == "PromptRL", "its fit's, not its own 42"


def test_a_resumed_run_whose_steps_are_counted_from_one(tmp_path: Path) -> None:
    """Lightning's count after a resume from a checkpoint that was saved behind a validation; 8 rollouts a step."""
    first = write(tmp_path / "version_0", rows=ROWS[:7], results=history(0, 2))
    rest = [{"step": row["step"] + 1} | {k: v for k, v in row.items() if k != "step"} for row in ROWS[6:]]
    for results in (history(0, 2, 4), None):
        about = {"results": results, "ckpt_path": str(first / "checkpoints" / "last.ckpt")}
        run = Run.read(write(tmp_path / f"{results is None}" / "version_1", rows=rest, **about))
        assert run.training["rollouts"].to_dict() == {1: 8, 2: 16, 3: 24, 4: 32}
        assert run.validations["val/naming"].to_dict() == {0: 0.1, 2: 0.2, 4: 0.3}
        assert run.validations["rollouts"].tolist() == [0, 16, 32]


def test_a_resumed_run_that_was_killed_too(tmp_path: Path) -> None:
    """It has no results.json yet; the first run got one validation further than the checkpoint."""
    first = write(tmp_path / "version_0", results=history(0, 2, 4))
    rest = [{"step": 2, "reward": 30.0, "rollouts": 24.0}]
    write(tmp_path / "version_1", rows=rest, ckpt_path=str(first / "checkpoints" / "last.ckpt"))
    (run,) = load(tmp_path)
    assert not run.finished and run.training["reward"].to_dict() == {1: 1, 2: 2, 3: 30}
    assert run.validations["rollouts"].to_dict() == {0: 0, 2: 16}


def test_event_files_stand_in(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="version_0")
    for row in ROWS:
        logger.log_metrics({name: value for name, value in row.items() if name != "step"}, row["step"])
    logger.finalize("success")
    (tmp_path / "version_0" / "results.json").write_text(json.dumps(history(0, 2, 4)))
    (run,) = load(tmp_path)
    assert run.training["reward"].to_dict() == {1: 1, 2: 2, 3: 3, 4: 4}
    assert run.training["rollouts"].tolist() == [8, 16, 24, 32]
    assert run.validations["val/naming"].tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_a_number_of_steps_that_is_none(tmp_path: Path) -> None:
    folder = write(tmp_path / "version_0", results=history(4))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert RunFolder.read(folder).finished
    config["trainer"]["max_steps"] = "4ll"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert not RunFolder.read(folder).finished


def test_places(tmp_path: Path) -> None:
    folders = [write(tmp_path / name / "mini" / "version_0") for name in ("a-1", "a-2", "b-1")]
    (tmp_path / "a-1" / "mini" / "version_0" / "checkpoints").mkdir()
    assert find(tmp_path) == folders
    assert find(tmp_path / "a-*") == folders[:2]
    assert find(folders[2], tmp_path / "b-1", tmp_path / "a-2") == [folders[2], folders[1]]
    with pytest.raises(ValueError, match=r"there is no run in .*/c: give a run's folder"):
        find(tmp_path / "a-1", tmp_path / "c")
    with pytest.raises(ValueError, match=r"there are runs, but none of the stage test"):
        load(tmp_path, stage="test")


@pytest.mark.parametrize(("cut", "steps"), [(0, [1, 2, 3, 4]), (1, [1, 2, 3]), (9, [1, 2, 3]), (1000, [])])
def test_what_a_kill_leaves_of_a_file_is_read(cut: int, steps: list[int], tmp_path: Path) -> None:
    """The last line lacks its line feed, or more; the file may be empty."""
    path = write(tmp_path / "version_0", rows=ROWS[:-1]) / "metrics.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    (run,) = load(tmp_path)
    assert run.training.index.tolist() == steps


def test_a_run_that_was_resumed_twice_is_one(tmp_path: Path) -> None:
    """The first resumed run was cut off before it saved anything; the second went on from the same checkpoint."""
    first = write(tmp_path / "version_0", rows=ROWS[:7])
    (first / "checkpoints").mkdir()
    (first / "checkpoints" / "last.ckpt").touch()
    last = str(first / "checkpoints" / "last.ckpt")
    write(tmp_path / "version_1", rows=[{"step": 2, "reward": 3.0, "rollouts": 24.0}], ckpt_path=last)
    rows = [{"step": 2, "reward": 3.5, "rollouts": 24.0}, {"step": 3, "reward": 4.0, "rollouts": 32.0}]
    write(tmp_path / "version_2", rows=rows, ckpt_path=last)
    (run,) = load(tmp_path)
    assert run.folder.name == "version_2" and run.training["reward"].to_dict() == {1: 1.0, 2: 2.0, 3: 3.5, 4: 4.0}


def test_broken_runs_are_named(tmp_path: Path) -> None:
    write(tmp_path / "good" / "version_0")
    for name, file, text in (
        ("cut", "results.json", '{"history": {'),
        ("list", "results.json", "[]"),
        ("yaml", "config.yaml", "a: [1"),
        ("csv", "metrics.csv", "reward\n1.0\n"),
        ("text", "metrics.csv", "step,reward\nx\x00y,1.0\n"),
        ("latin", "config.yaml", "a: \udce9"),
    ):
        (write(tmp_path / name / "version_0") / file).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as raised:
        load(tmp_path)
    sentence = str(raised.value)
    for said in (
        "cut/version_0/results.json:1: not valid JSON",
        "list/version_0/results.json is damaged",
        "yaml/version_0/config.yaml:",
        "text/version_0/metrics.csv is damaged: its column `step` holds something else than numbers",
        "latin/version_0/config.yaml:1: the file is not UTF-8 text",
    ):
        assert f"{tmp_path}/{said}" in sentence
    assert "csv/version_0/metrics.csv is damaged: it has no column `step`" in sentence
    assert "good" not in sentence and "\n" not in sentence
    with pytest.warns(UserWarning, match=r"left out: .*cut/version_0/results\.json"):
        assert [run.folder.parts[-2] for run in load(tmp_path, skip_broken=True)] == ["good"]


@pytest.mark.parametrize("mode", RATES)
def test_modes(mode: str, tmp_path: Path) -> None:
    assert RunFolder.read(write(tmp_path / "version_0", mode=mode)).mode == mode


def test_settings(tmp_path: Path) -> None:
    for mode in ("flow-only", "PromptRL"):
        for seed in (42, 43):
            rows = [
                row | {"val/words/with_pe": 0.7} if mode == "PromptRL" and "val/naming" in row else row for row in ROWS
            ]
            write(tmp_path / f"{mode}-{seed}" / "version_0", rows=rows, results=history(0, 2, 4), mode=mode, seed=seed)
    runs = load(tmp_path)
    both = settings(runs, "val/words/without_pe", "val/words/with_pe")
    assert set(both) == {"flow-only, without_pe", "PromptRL, without_pe", "PromptRL, with_pe"}
    assert list(both["PromptRL, with_pe"]) == [42, 43]
    assert both["PromptRL, with_pe"][42].to_dict() == {0: 0.7, 16: 0.7, 32: 0.7}
    by_steps = settings(runs, "val/naming", by="step", group=lambda run: f"{run.mode} {run.get('trainer.max_steps')}")
    assert by_steps["flow-only 4"][43].to_dict() == {0: 0.1, 2: 0.2, 4: 0.3}
    with pytest.raises(ValueError, match=r"are both all with seed 42: group the runs"):
        settings(runs, "val/naming", group=lambda run: "all")
    with pytest.raises(ValueError, match=r"has no val/x by rollouts"):
        settings(runs, "val/x", "val/y")


def test_a_real_run(tmp_path: Path) -> None:
    """Two steps, a third after a resume, then a test: what the command leaves is what is read."""
    small = {"config": "configs/miniature/flow_only.yaml"}
    fit = quick("fit", tmp_path, "--trainer.val_check_interval=1", **small)
    main([*fit, "--trainer.max_steps=2"])
    run_folder = tmp_path / "miniature/flow_only"
    checkpoint = str(run_folder / "version_0/checkpoints/last.ckpt")
    main([*fit, "--trainer.max_steps=3", f"--ckpt_path={checkpoint}"])
    main(quick("test", tmp_path, f"--ckpt_path={checkpoint}", **small))
    (run,) = load(tmp_path)
    assert run.folder == run_folder / "version_1" and run.finished and run.mode == "flow-only"
    assert run.training["rollouts"].to_dict() == {1: 8, 2: 16, 3: 24}
    assert run.validations["rollouts"].to_dict() == {0: 0, 1: 8, 2: 16, 3: 24}
    column = "val/geneval/without_pe"
    logged = run.rows[column].dropna().tolist()
    assert run.validations[column].tolist()[-1] == pytest.approx(logged[-1])
    before = Run.read(run_folder / "version_0")
    assert before.finished and run.validations[column][0] == pytest.approx(before.rows[column].dropna().tolist()[0])
    (test,) = load(tmp_path, stage="test")
    assert test.mode == "flow-only" and test.seed == 42 and len(test.scores) == len(test.headlines)
    assert test.get("ckpt_path") == checkpoint


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("metrics.csv", "step,reward\n,1.0\n", "its column `step` holds something else than numbers of steps"),
        ("metrics.csv", "step,reward\n1,2,3\n", "a row has more values than there are columns"),
        ("metrics.csv", f"step,{'x' * 5000}\n1,y\n", "its column `xxx"),
        (
            "results.json",
            '{"history": {"GenEval": [{"step": 1, "rollouts": 8, "results": {}}]}}',
            "KeyError: 'seconds'",
        ),
        ("results.json", '{"geneval": {"without_pe": {"score": "\\ud800"}}}', "UnicodeEncodeError"),
        ("results.json", '{"geneval": {"without_pe": {}, "with_pe": 3}}', "TypeError"),
    ],
)
def test_values_that_no_run_writes(file: str, text: str, said: str, tmp_path: Path) -> None:
    (write(tmp_path / "version_0") / file).write_text(text)
    with pytest.raises(ValueError) as raised:
        load(tmp_path)
    assert f"version_0/{file} is damaged" in str(raised.value) and said in str(raised.value)
    assert len(str(raised.value)) < 600

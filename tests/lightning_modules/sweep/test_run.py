"""Sweeps: what is run under which name, and real runs that crash, are cut off, go on and are skipped."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from callbacks.runs.loading import load
from lightning_modules.cli import main as lightning
from lightning_modules.sweep import run
from lightning_modules.sweep.plan import Job, Sweep
from lightning_modules.sweep.run import Outcome, main, read, run_all, table_of
from tests.forked import Forked

ROOT = Path(__file__).parents[3]
FLOW, LANGUAGE = (f"model.init_args.{agent}.init_args.learning_rate" for agent in ("flow", "language"))
MODES = [f"configs/miniature/{mode}.yaml" for mode in ("flow_only", "prompt_only", "promptrl")]
SMALL = {
    "trainer.accelerator": "cpu",
    "trainer.enable_model_summary": False,
    "trainer.enable_progress_bar": False,
    "data.init_args.batch_size": 1,
    "data.init_args.train_prompts": 6,
    "data.init_args.eval_prompts": 6,
}


def plan(**more: Any) -> list[Job]:
    return Sweep(**({"configs": MODES[:1], "seeds": [42]} | more)).jobs()


def varied(job: Job) -> dict[str, str]:
    """Options of the fit that are no seed, file or folder."""
    options = dict(option.removeprefix("--").split("=", 1) for option in job.commands[0].options[1:])
    return {k: v for k, v in options.items() if k != "config" and "seed" not in k and k != "trainer.default_root_dir"}


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_seeds_and_names() -> None:
    jobs = plan(configs=MODES, seeds=[42, 43])
    assert [job.name for job in jobs] == [
        f"{mode}-s{seed}" for seed in (42, 43) for mode in ("flow_only", "prompt_only", "promptrl")
    ]
    (fit,) = jobs[3].commands
    assert fit.options == [
        "fit",
        "--config=configs/miniature/flow_only.yaml",
        "--seed_everything=43",
        "--model.init_args.seed=43",
        "--data.init_args.seed=43",
        "--trainer.default_root_dir=runs/sweep/flow_only-s43",
    ]


def test_a_grid_is_a_product() -> None:
    sizes = {"model.init_args.group_size": [4, 8], "model.init_args.num_retained": [4, 8]}
    grid = {"trainer.max_steps": [1, 2], "sizes": sizes}
    jobs = plan(grid=grid, overrides={"trainer.precision": None, "experiment": "x"})
    assert [job.name for job in jobs] == [
        f"flow_only-max_steps{steps}-sizes{size}-s42" for steps in (1, 2) for size in (4, 8)
    ]
    assert varied(jobs[1]) == {
        "trainer.precision": "null",
        "experiment": "x",
        "trainer.max_steps": "1",
        "model.init_args.group_size": "8",
        "model.init_args.num_retained": "8",
    }


def test_no_name_leaves_the_root() -> None:
    (job,) = plan(grid={"../../x": {"multiply": [FLOW], "by": [2]}})
    assert job.name == "flow_only-.._.._x2-s42"


def test_factors_leave_frozen_agents_alone() -> None:
    """1.5e-4, 6e-4 and 3e-4 in the files; flow-only has no refiner, prompt-only a frozen flow model."""
    jobs = plan(configs=MODES, grid={"lr": {"multiply": [FLOW, LANGUAGE], "by": [1, 2.5]}})
    assert [job.name for job in jobs[:2]] == ["flow_only-lr1-s42", "flow_only-lr2.5-s42"]
    rates = [{key: float(value) for key, value in varied(job).items()} for job in jobs]
    assert rates[1] == pytest.approx({FLOW: 3.75e-4})
    assert rates[3] == pytest.approx({LANGUAGE: 1.5e-3})
    assert rates[5] == pytest.approx({FLOW: 3.75e-4, LANGUAGE: 7.5e-4})


def test_overlays_are_laid_over_every_experiment(tmp_path: Path) -> None:
    """One a run, null for none; what a grid multiplies is what the files say together."""
    slow = tmp_path / "slow.yaml"
    slow.write_text("model: {init_args: {flow: {init_args: {learning_rate: 1.0e-5}}}}\n")
    grid = {"lr": {"multiply": [FLOW], "by": [2]}}
    jobs = plan(configs=MODES[:1], overlays=[None, str(slow)], grid=grid, test_configs=[])
    assert [job.name for job in jobs] == ["flow_only-lr2-s42", "flow_only-slow-lr2-s42"]
    assert [float(varied(job)[FLOW]) for job in jobs] == pytest.approx([3e-4, 2e-5])
    for command in jobs[1].commands:
        assert command.options[1:3] == [f"--config={MODES[0]}", f"--config={slow}"]
        assert command.configs == [MODES[0], str(slow)]
    with pytest.raises(ValueError, match=r"names .*missing\.yaml, but there is no such file"):
        plan(overlays=[str(tmp_path / "missing.yaml")])


def test_a_test_follows_with_overlays_after_the_fits_options() -> None:
    """The test has no seed: its scenes and noise are the experiment's for all."""
    (job,) = plan(overrides=SMALL, test_configs=["configs/miniature/evaluate.yaml"], test_overrides={"a.b": 2})
    options = job.commands[1].options
    assert options[:2] == ["test", "--config=configs/miniature/flow_only.yaml"]
    assert options[-3:] == [
        "--config=configs/miniature/evaluate.yaml",
        "--a.b=2",
        "--trainer.default_root_dir=runs/sweep/flow_only-s42/test",
    ]
    assert not [option for option in options if "seed" in option]


def test_tests_of_untrained_models() -> None:
    (job,) = plan(fit=False, test_configs=[], test_overrides={"data.init_args.eval_prompts": 6}, overrides={"a": 1})
    (test,) = job.commands
    assert job.name == "flow_only" and (test.stage, test.folder) == ("test", Path("runs/sweep/flow_only"))
    assert test.options == [
        "test",
        "--config=configs/miniature/flow_only.yaml",
        "--a=1",
        "--data.init_args.eval_prompts=6",
        "--trainer.default_root_dir=runs/sweep/flow_only",
    ]


def test_files_with_one_name() -> None:
    jobs = plan(configs=["configs/geneval/flux1_promptrl.yaml", "configs/ocr/flux1_promptrl.yaml"])
    assert [job.name for job in jobs] == ["geneval_flux1_promptrl-s42", "ocr_flux1_promptrl-s42"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"configs": []}, r"`configs` is empty"),
        ({"seeds": [1, 2, 1]}, r"`seeds` has 1 twice"),
        ({"configs": ["configs/no.yaml"]}, r"names configs/no\.yaml, but there is no such file"),
        ({"processes": 0}, r"`processes` is 0, use at least 1"),
        ({"fit": False}, r"has `fit: false`: give `test_configs`"),
        ({"fit": False, "test_configs": [], "seeds": [1, 2]}, r"has `fit: false`: give .* one seed"),
        ({"grid": {"trainer.max_steps": 3}}, r"grid has trainer\.max_steps: 3; give a list of values"),
        ({"grid": {"x": {"a": [1, 2], "b": [1]}}}, r"grid has x: .*lists of one length"),
        (
            {"grid": {"lr": {"multiply": [LANGUAGE], "by": [2]}}},
            r"grid multiplies .*, of which .*flow_only\.yaml has no",
        ),
        ({"grid": {"experiment": ["a b", "a_b"]}}, r"two runs .* would be called flow_only-experimenta_b-s42"),
    ],
)
def test_refused_plans(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(**more)


def test_output_that_nobody_reads_ends_it_silently(tmp_path: Path) -> None:
    """As in `... --dry_run true | head -1`."""

    def unread() -> None:
        ours, theirs = os.pipe()
        os.close(ours)
        sys.stdout = os.fdopen(theirs, "w")  # a line at a time, or what is left at the end
        main(["--configs", json.dumps(MODES), "--root", str(tmp_path / "runs"), "--dry_run", "true"])

    process = Forked(unread, tmp_path / "log")
    assert (process.wait(), process.text) == (128 + signal.SIGPIPE, "")


def test_a_file_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.yaml"
    grid = {"trainer.max_steps": [1, 2], "lr": {"multiply": [FLOW], "by": [2]}}
    said = {"configs": MODES[:1], "seeds": [7], "grid": grid, "root": str(tmp_path / "runs")}
    path.write_text(yaml.safe_dump(said, sort_keys=False))
    assert read(["--config", str(path)]).jobs() == plan(seeds=[7], grid=grid, root=str(tmp_path / "runs"))
    main(["--config", str(path), "--dry_run", "true"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("lightning fit --config=configs/miniature/") for line in lines)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(path), "--proceses", "2"])
    assert stopped.value.code == 2 and "proceses" in capsys.readouterr().err.splitlines()[-1]


def test_a_changed_experiment_is_no_continuation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("a: 1\n")
    again = {"configs": [str(config)], "root": str(tmp_path / "runs"), "overrides": {"trainer.max_steps": 1}}
    (job,) = plan(**again)
    folder = tmp_path / "runs" / "mine-s42"
    folder.mkdir(parents=True)
    job.commands[0].record_path.write_text(json.dumps(job.commands[0].record | {"seconds": 2.0}))
    assert job.commands[0].finished() and not job.commands[0].conflict()
    (other,) = plan(**again | {"overrides": {"trainer.max_steps": 2}})
    said = rf"{folder} was made with --trainer\.max_steps=1 in place of --trainer\.max_steps=2"
    assert re.fullmatch(said, other.commands[0].conflict())
    config.write_text("a: 2\n")
    assert job.commands[0].conflict() == f"{folder} was made before {config} was edited"
    with pytest.raises(SystemExit) as stopped:
        main(["--configs", json.dumps([str(config)]), "--root", again["root"], "--dry_run", "true",
              "--overrides", '{"trainer.max_steps": 1}'])  # fmt: skip
    assert stopped.value.code == 2
    assert "was edited: remove the folder, or choose another `root`" in capsys.readouterr().err
    (folder / "fit.json").unlink()
    (folder / "results.json").write_text("{}")
    assert job.commands[0].conflict() == f"{folder} has a run that no sweep made"


def test_a_damaged_folder_is_one_runs_crash(tmp_path: Path) -> None:
    """Two runs whose fits are done: one has lost its checkpoint, which a test needs; the other's files are damaged."""
    jobs = plan(root=str(tmp_path), seeds=[1, 2], test_configs=["configs/miniature/evaluate.yaml"])
    for job in jobs:
        folder = job.commands[0].folder / "miniature" / "flow_only" / "version_0"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text("{" if job is jobs[1] else "{}")
        job.commands[0].write_record(job.commands[0].record | {"seconds": 2.0})
    outcomes = run_all(jobs, 2, lambda outcome: None)
    assert [outcome.state for outcome in outcomes] == ["crashed", "crashed"]
    assert "has no last.ckpt to test" in outcomes[0].note
    assert "results.json:1: not valid JSON" in outcomes[1].note


def test_a_fit_that_was_cut_off_after_its_last_step_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed without validations, it has nothing to do and is refused; its test is left to do."""
    program = tmp_path / "lightning.py"
    program.write_text("import sys\nif sys.argv[1] == 'fit': sys.exit('lightning: error: nothing to train: step 1')")
    monkeypatch.setattr("lightning_modules.sweep.run.PROGRAM", [sys.executable, str(program)])
    (job,) = plan(root=str(tmp_path / "runs"), test_configs=["configs/miniature/evaluate.yaml"])
    fit, test = job.commands
    checkpoint = fit.folder / "miniature" / "flow_only" / "version_0" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    (checkpoint.parents[1] / "metrics.csv").touch()
    (outcome,) = run_all([job], 1, lambda outcome: None)
    assert outcome.state == "done" and fit.finished() and test.finished()
    assert f"--ckpt_path={checkpoint}" in (test.folder / "test.log").read_text()


def test_the_table_is_whole_on_a_narrow_terminal() -> None:
    """A fit and its test, each with and without PE, and a long name."""
    scores = {"GenEval without PE": 0.1, "test, GenEval without PE": 0.2, "GenEval with PE": 0.3}
    outcome = Outcome("promptrl-num_retained0-s42", "done", 464.0, scores=scores | {"test, GenEval with PE": 0.4})
    console = Console(width=80, file=io.StringIO())
    console.print(table_of([outcome]))
    _, *lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert {line[-1] for line in lines} <= set("┓┃┩│┘") and "0.400" in "".join(lines)
    assert "".join(line[2:12].strip() for line in lines if line[0] == "│") == outcome.name


# --- real runs --------------------------------------------------------------------------------------------------------


def arguments(root: Path, **more: Any) -> list[str]:
    options = {"configs": MODES[:1], "root": str(root)} | more
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}
    return [part for name, text in texts.items() for part in (f"--{name}", text)]


def versions(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.rglob("config.yaml"))


@pytest.fixture
def preloaded_runs(preloaded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps start their runs as forks of this process."""
    monkeypatch.setattr(run, "PROGRAM", [*preloaded, "-m", "lightning_modules.cli"])


@pytest.mark.slow
@pytest.mark.usefixtures("preloaded_runs")
def test_done_crashed_and_skipped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of eight samples without a writer all keep the prompt, or the run refuses to start."""
    overrides = SMALL | {"trainer.max_steps": 1, "trainer.val_check_interval": 1}
    more: dict[str, Any] = {"seeds": [5], "grid": {"model.init_args.num_retained": [8, 7]}, "overrides": overrides}
    good, bad = tmp_path / "flow_only-num_retained8-s5", tmp_path / "flow_only-num_retained7-s5"
    for state in ("done", "was done"):
        with pytest.raises(SystemExit) as stopped:
            main(arguments(tmp_path, processes=2, **more))
        lines = capfd.readouterr().out.splitlines()
        assert stopped.value.code == 1, "not all is done"
        assert [line for line in lines if line.startswith(f"{good.name}: {state}, ")]
        (crash,) = (line for line in lines if line.startswith(f"{bad.name}: crashed, "))
        assert re.search(rf"{bad}/fit\.log: lightning: error: .*1 prompts have no writer; set num_retained to 8", crash)
        rows = [line for line in lines if re.search(r"[│┃]", line)]
        assert re.search(rf"flow_only-num_reta.*{state}.* s .*0\.\d{{3}}", "\n".join(rows)), rows
    assert versions(good) == ["version_0"] and versions(bad) == []
    assert json.loads((good / "fit.json").read_text())["seconds"] > 0
    (fit,) = load(tmp_path)
    assert fit.seed == 5 and fit.get("data.init_args.seed") == 5 and fit.finished
    main(arguments(tmp_path, **more | {"grid": {"model.init_args.num_retained": [8]}}))
    with pytest.raises(SystemExit) as stopped:
        main(arguments(tmp_path, **more | {"overrides": overrides | {"trainer.max_steps": 2}}))
    assert stopped.value.code == 2 and "in place of --trainer.max_steps=2" in capfd.readouterr().err
    assert versions(good) == ["version_0"]


@pytest.mark.slow
@pytest.mark.usefixtures("preloaded_runs")
def test_a_sweep_that_is_interrupted_goes_on(tmp_path: Path) -> None:
    """Ctrl-C after the first checkpoint; the same command resumes from it, and tests the result."""
    overlay = tmp_path / "evaluate.yaml"
    overlay.write_text("data: {init_args: {eval_prompts: 6}}\n")
    steps = 5
    overrides = SMALL | {
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps,
        "checkpoint.every_n_train_steps": 1,
    }
    options = arguments(tmp_path / "runs", seeds=[5], overrides=overrides, test_configs=[str(overlay)])
    folder = tmp_path / "runs" / "flow_only-s5"
    process = Forked(lambda: main(options), tmp_path / "sweep.log")
    while not list(folder.rglob("last.ckpt")):
        time.sleep(0.02)
    assert process.kill(signal.SIGINT) == 130, process.text
    assert json.loads((folder / "fit.json").read_text())["seconds"] is None and not (folder / "test").exists()
    (cut_off,) = load(folder)
    assert not cut_off.finished

    main(options)
    (resumed,) = load(folder)
    assert resumed.folder.name == "version_1" and resumed.continues == cut_off.folder.resolve() and resumed.finished
    assert resumed.rows["step"].min() > 0, "did not start anew"
    assert resumed.validations["rollouts"].to_dict() == {0: 0, steps: 8 * steps}
    (test,) = load(folder, stage="test")
    assert test.folder.is_relative_to(folder / "test") and len(test.scores) == 6 * len(test.headlines)
    assert test.seed == 5 and test.get("data.init_args.seed") != 5 and test.mode == "flow-only"


@pytest.mark.slow
@pytest.mark.usefixtures("preloaded_runs")
def test_a_fit_that_was_killed_in_its_last_validation_is_evaluated(tmp_path: Path) -> None:
    overrides = SMALL | {"trainer.max_steps": 1, "trainer.val_check_interval": 5}
    (job,) = plan(root=str(tmp_path / "runs"), overrides=overrides)
    (fit,) = job.commands
    strikes = "--trainer.callbacks+=tests.lightning_modules.cli.test_interrupted.Strikes"
    struck = [*fit.options, strikes, "--trainer.callbacks.part=final", "--trainer.callbacks.number=9"]
    fit.folder.mkdir(parents=True)
    fit.write_record(fit.record | {"seconds": None})
    assert Forked(lambda: lightning(struck), tmp_path / "log").wait() == -9
    assert fit.checkpoint() is not None and not fit.finished()
    (outcome,) = run_all([job], 1, lambda outcome: None)
    assert outcome.state == "done" and fit.finished() and outcome.scores
    (resumed,) = load(fit.folder)
    assert resumed.finished and resumed.validations.index.tolist() == [0, 1]

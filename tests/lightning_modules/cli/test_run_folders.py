"""Every run has a folder of its own, whatever loggers it has; `last` and `best` are checkpoints of such folders."""

from __future__ import annotations

import csv
import os
import resource
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_modules.cli import main
from lightning_modules.cli.earlier_checkpoints import best, last
from lightning_modules.cli.trainer import claim
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.run_folder import RunFolder
from tests.forked import Forked, command, run
from tests.short_runs import quick

FLOW_ONLY = "configs/miniature/flow_only.yaml"
EXPERIMENT = Path("miniature/flow_only")
STEP = ["--trainer.max_steps=1", "--data.init_args.train_prompts=6"]


def versions(root: Path) -> list[str]:
    return sorted(path.name for path in (root / EXPERIMENT).iterdir())


def claim_many(parent: Path, start: float, times: int) -> None:
    time.sleep(max(0.0, start - time.time()))
    for _ in range(times):
        (claim(parent) / str(os.getpid())).touch()


def test_processes_that_claim_together_share_no_folder(tmp_path: Path) -> None:
    work = partial(claim_many, tmp_path / "a" / "b", time.time() + 0.3, 25)
    for one in [Forked(work, tmp_path / f"{number}.log") for number in range(4)]:
        assert one.wait() == 0, one.text
    folders = list((tmp_path / "a" / "b").iterdir())
    assert sorted(int(folder.name.removeprefix("version_")) for folder in folders) == list(range(100))
    assert all(len(list(folder.iterdir())) == 1 for folder in folders)


def test_a_new_run_comes_after_all_others(tmp_path: Path) -> None:
    for name in ("version_0", "version_11", "version_x", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "version_3").touch()
    assert claim(tmp_path).name == "version_12"


@pytest.mark.slow
def test_two_fits_started_together(tmp_path: Path) -> None:
    options = quick("fit", tmp_path / "runs", *STEP, config=FLOW_ONLY)
    both = [command(tmp_path / f"output {seed}", *options, f"--model.init_args.seed={seed}")[0] for seed in (1, 2)]
    for one in both:
        assert one.wait() == 0, one.text
    assert versions(tmp_path / "runs") == ["version_0", "version_1"]
    runs = [RunFolder.read(folder) for folder in (tmp_path / "runs" / EXPERIMENT).iterdir()]
    assert sorted(one.get("model.init_args.seed") for one in runs) == [1, 2]
    for one in runs:
        assert (one.folder / "checkpoints" / "last.ckpt").is_file() and one.finished
        assert len(list(one.folder.glob("events.out.*"))) == 1
        with (one.folder / "metrics.csv").open() as file:
            assert [row["rollouts"] for row in csv.DictReader(file) if row["rollouts"]] == ["8.0"]


CSV = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=."]


@pytest.mark.slow
@pytest.mark.parametrize("logger", [["--trainer.logger=false"], CSV], ids=["none", "one in the current folder"])
def test_a_folder_does_not_depend_on_loggers(
    logger: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("configs", "miniature"):
        (tmp_path / folder).symlink_to(Path(folder).resolve())
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        main(quick("fit", Path("runs"), *STEP, *logger, f"--model.init_args.seed={seed}", config=FLOW_ONLY))
    main(quick("validate", Path("runs"), *logger, "--ckpt_path=last", config=FLOW_ONLY))
    assert versions(Path("runs")) == ["version_0", "version_1", "version_2"]
    assert [path.name for path in Path("runs").iterdir()] == ["miniature"]
    for number in (0, 1):
        found = RunFolder.read(Path("runs") / EXPERIMENT / f"version_{number}")
        assert found.get("model.init_args.seed") == number + 1
        assert len(found.history) == 2 and found.finished
        assert (found.folder / "checkpoints" / "last.ckpt").is_file()
    assert not list(tmp_path.glob("*.json")) and not list(Path().glob("checkpoints"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ours", "Lightning's"])
def test_two_processes_of_one_run_have_one_folder(launcher: str, tmp_path: Path, preloaded: list[str]) -> None:
    root = tmp_path / "runs"
    (root / EXPERIMENT / "version_0").mkdir(parents=True)
    options = quick(
        "fit", root, *STEP, "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.logger=false", config=FLOW_ONLY
    )
    if launcher == "ours":
        for one in run(tmp_path / "output", *options, processes=2):
            assert one.returncode == 0, one.text
    else:
        subprocess.run([*preloaded, "-m", "lightning_modules.cli", *options], check=True)
    assert versions(root) == ["version_0", "version_1"]
    written = {path.name for path in (root / EXPERIMENT / "version_1").iterdir()}
    assert written == {
        "checkpoints",
        "config.yaml",
        "report",
        "report.html",
        "results.json",
        "results.md",
        "results.tex",
    }
    assert not list((root / EXPERIMENT / "version_0").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["fit", *STEP, "--trainer.logger=false"],
        ["fit", *STEP, "--trainer.callbacks+=callbacks.export.Export"],
        ["test"],
        ["predict"],
    ],
    ids=["fit", "export", "test", "predict"],
)
def test_a_trial_run_leaves_nothing(words: list[str], tmp_path: Path) -> None:
    if words == ["predict"]:
        words = ["predict", f"--predictions.directory={tmp_path / 'runs'}"]
    main(quick(words[0], tmp_path / "runs", *words[1:], "--trainer.fast_dev_run=true", config=FLOW_ONLY))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    main(quick("fit", tmp_path, *STEP, "--trainer.enable_checkpointing=false", config=FLOW_ONLY))
    assert (tmp_path / EXPERIMENT / "version_0" / "results.json").is_file()
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_a_slurm_job_does_not_go_on_from_another(tmp_path: Path, fitted: Path) -> None:
    """Lightning would resume from any `hpc_ckpt_N.ckpt` in the root."""
    root = tmp_path / "runs"
    job = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "x", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    options = quick("fit", root, "--trainer.max_steps=3", "--trainer.limit_val_batches=0", config=FLOW_ONLY)
    (root / EXPERIMENT / "slurm_1").mkdir(parents=True)
    for folder in (root, root / EXPERIMENT / "slurm_1"):
        (folder / "hpc_ckpt_1.ckpt").symlink_to(fitted / "version_1" / "checkpoints" / "last.ckpt")
    for number, restores in ((1, True), (2, False)):
        one = Forked(partial(main, options), tmp_path / f"{number}.log", job | {"SLURM_JOB_ID": str(number)})
        assert one.wait() == 0, one.text
        assert ("Restoring states from the checkpoint" in one.text) == restores, one.text


# --- last and best ----------------------------------------------------------------------------------------------------


def save(path: Path, age: int, **state: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = state.pop("mode", "max")
    key = f"Checkpoint{{'monitor': {state.get('monitor')!r}, 'mode': '{mode}'}}"
    torch.save({"callbacks": {key: state, "Benchmark": {"history": []}}}, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_last_is_the_newest_of_the_experiment(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"`ckpt_path` is last, but no run in {tmp_path} has a last\.ckpt: fit one"):
        last(tmp_path)
    save(tmp_path / "version_9" / "checkpoints" / "last.ckpt", 3)
    second = save(tmp_path / "version_10" / "checkpoints" / "last.ckpt", 2)
    save(tmp_path / "version_11" / "checkpoints" / "epoch=0-step=7.ckpt", 1)
    (tmp_path / "version_12").mkdir()
    assert last(tmp_path) == second
    elsewhere = save(tmp_path / "elsewhere" / "last-v1.ckpt", 1)
    assert last(tmp_path, str(tmp_path / "elsewhere")) == elsewhere


@pytest.mark.parametrize(("mode", "wins"), [("max", 0), ("min", 1)])
def test_best_is_that_of_all_runs(mode: str, wins: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`ckpt_path` is best.*by a score: fit one with `checkpoint\.monitor`"):
        best(tmp_path)
    kept = []
    for number, score in enumerate((0.7, 0.4, 0.5)):
        folder = tmp_path / f"version_{number}" / "checkpoints"
        name = f"best-{number}.ckpt"
        about = {"monitor": "val", "mode": mode, "best_model_path": f"old/place/{name}"}
        kept.append(save(folder / name, 50 - number, **about, best_model_score=torch.tensor(score)))
        save(folder / "last.ckpt", 40 - number, **about, best_model_score=torch.tensor(score))
    gone = {"monitor": "val", "mode": mode, "best_model_path": "gone.ckpt", "best_model_score": torch.tensor(9.0)}
    save(tmp_path / "version_3" / "checkpoints" / "last.ckpt", 2, **gone)
    save(
        tmp_path / "version_4" / "checkpoints" / "last.ckpt", 1, monitor=None, best_model_path="", best_model_score=None
    )
    assert best(tmp_path) == kept[wins]
    with pytest.raises(ValueError, match=r"kept a best checkpoint by other: fit one"):
        best(tmp_path, monitor="other")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of two steps, of which the first has kept its best checkpoint by a score."""
    root = tmp_path_factory.mktemp("fitted")
    monitor = ["--checkpoint.monitor=val/geneval/without_pe", "--checkpoint.mode=max"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[3])
        for more in (monitor, ["--trainer.limit_val_batches=0", "--model.init_args.flow.init_args.learning_rate=1e-2"]):
            options = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--checkpoint.every_n_train_steps=1"]
            main(quick("fit", root, *options, *more, config=FLOW_ONLY))
    return root / EXPERIMENT


@pytest.mark.slow
@pytest.mark.parametrize("which", ["last", "best"])
def test_all_commands_find_them(
    which: str, fitted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    last_one = fitted / "version_1" / "checkpoints" / "last.ckpt"
    (best_one,) = (fitted / "version_0" / "checkpoints").glob("epoch*.ckpt")
    expected = {"last": last_one, "best": best_one}[which]
    root = fitted.parents[1]
    options = {"fit": "--trainer.max_steps=3", "predict": f"--predictions.directory={tmp_path}"}
    for name in ("fit", "validate", "test", "predict"):
        before = set(versions(root))
        caplog.clear()
        main(quick(name, root, f"--ckpt_path={which}", *([options[name]] if name in options else []), config=FLOW_ONLY))
        assert f"from the checkpoint at {expected}" in capfd.readouterr().err + caplog.text
        for folder in set(versions(root)) - before - {"images"}:
            if name in ("fit", "test"):
                config = yaml.safe_load((fitted / folder / "config.yaml").read_text())
                assert config["ckpt_path"] == str(expected)
            if name == "fit":
                assert RunFolder.read(fitted / folder).continues == expected.parents[1].resolve()
                (fitted / folder / "checkpoints" / "last.ckpt").unlink()  # a newer last.ckpt than the one to be found


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False], ids=["deleted", "a file in its place"])
def test_a_folder_that_goes_in_mid_run_ends_in_one_sentence(tmp_path: Path, kept: bool) -> None:
    """The last step is saved in a new folder of that name, where one can be made."""
    folder = tmp_path / EXPERIMENT / "version_0"

    def fit() -> None:
        update: Any = PromptRL.update

        def deletes(self: PromptRL, rollout: Any) -> Any:
            if self.global_step == 1:
                shutil.rmtree(folder)
                if not kept:
                    folder.touch()
            return update(self, rollout)

        PromptRL.update = deletes  # type: ignore[method-assign]
        steps = ["--trainer.max_steps=3", "--trainer.val_check_interval=9", "--checkpoint.every_n_train_steps=9"]
        main(quick("fit", tmp_path, *steps, config=FLOW_ONLY))

    run = Forked(fit, tmp_path / "log")
    assert run.wait() == 2 and "Traceback" not in run.text
    said = [line for line in run.text.splitlines() if line.startswith("lightning: error: ")]
    assert len(said) == 1 and str(folder) in said[0] and "the run's folder was deleted or moved" in said[0]
    last_one = folder / "checkpoints" / "last.ckpt"
    assert last_one.exists() == kept == (f"{last_one}: go on with --ckpt_path" in run.text)


@pytest.mark.slow
def test_a_full_disk_ends_in_one_sentence(tmp_path: Path) -> None:
    """The second fit, for which there is room, removes what a killed one left."""

    def fit_without_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_200_000, resource.RLIM_INFINITY))
        main(quick("fit", tmp_path, *STEP, config=FLOW_ONLY))

    fit = Forked(fit_without_room, tmp_path / "log")
    folder = tmp_path / EXPERIMENT / "version_0"
    assert fit.wait() == 2 and "Traceback" not in fit.text
    said = [line for line in fit.text.splitlines() if line.startswith("lightning: error: ")]
    assert len(said) == 1 and f"{folder / 'checkpoints'}/" in said[0] and "File too large; make room" in said[0]
    assert not list(folder.glob("checkpoints/*")) + [
        path for path in folder.rglob("*") if path.is_file() and not path.stat().st_size
    ]
    stray = folder / "checkpoints" / ".last.ckpt.1.2.tmp"
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"half")
    main(quick("fit", tmp_path, *STEP, config=FLOW_ONLY))
    assert not stray.exists() and (folder.parent / "version_1" / "checkpoints" / "last.ckpt").is_file()

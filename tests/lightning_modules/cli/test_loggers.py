"""Loggers of the key `loggers` beside the run's own, by the real wandb package in its offline mode."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from PIL import Image

from lightning_modules.cli import main
from lightning_modules.cli.loggers import MetricsLogger
from tests.forked import Forked
from tests.short_runs import quick

pytestmark = pytest.mark.slow

WANDB = ["--loggers+=lightning.pytorch.loggers.WandbLogger", "--loggers.offline=true", "--loggers.project=mine"]


def test_wandb_gets_what_tensorboard_gets(tmp_path: Path) -> None:
    """Scalars, images, rewrites and results, in each run's own folder, which the command names in `config.yaml`."""
    wandb = pytest.importorskip("wandb")

    def fit(seed: int) -> None:
        main(quick("fit", tmp_path / "runs", "--trainer.max_steps=1", f"--seed_everything={seed}", *WANDB))
        wandb.finish()  # which the end of a process does, but not that of a fork

    for done in [Forked(partial(fit, seed), tmp_path / f"{seed}.log") for seed in (1, 2)]:
        assert done.wait() == 0, done.text
    for name in ("version_0", "version_1"):
        folder = tmp_path / "runs" / "quickstart" / name
        assert {"metrics.csv", "config.yaml", "results.json", "wandb"} <= {path.name for path in folder.iterdir()}
        assert len(list(folder.glob("events.out.*"))) == 1
        (offline,) = folder.glob("wandb/offline-run-*")
        (log,) = offline.glob("*.wandb")
        for text in ("reward/geneval", "val/geneval/with_pe", "group_size", f"quickstart/{name}", "mine"):
            assert text.encode() in log.read_bytes(), text
        media = offline / "files" / "media"
        sheets = [Image.open(path).size for path in media.glob("images/samples/*.png")]
        assert len(sheets) >= 4 and min(min(size) for size in sheets) > 100
        (table, *_) = media.glob("table/rewrites/geneval_*.table.json")
        assert json.loads(table.read_text())["columns"] == ["prompt", "rewrite"]
        (results, *_) = media.glob("table/results/*.table.json")
        assert json.loads(results.read_text())["data"][0][0].startswith("quickstart without PE")
        written = yaml.safe_load((folder / "config.yaml").read_text())["loggers"]
        assert [one["class_path"] for one in written] == ["lightning.pytorch.loggers.WandbLogger"]


def test_a_new_column_leaves_the_rows_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is written anew for its header; what is killed in the middle of that has lost nothing."""
    logger = MetricsLogger(tmp_path, name="run", version=0)
    path = tmp_path / "run" / "version_0" / "metrics.csv"

    def log(step: int, **values: float) -> None:
        logger.log_metrics(values, step)
        logger.save()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    log(0, a=1.0)
    log(1, a=2.0)
    with monkeypatch.context() as patch:
        patch.setattr("csv.DictWriter.writerows", stop)
        with pytest.raises(KeyboardInterrupt):
            log(2, a=3.0, b=4.0)
    assert path.read_text().splitlines() == ["a,step", "1.0,0", "2.0,1"]
    logger.save()
    assert path.read_text().splitlines() == ["a,b,step", "1.0,,0", "2.0,,1", "3.0,4.0,2"]


def test_a_missing_package_is_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="2"):
        main(quick("fit", tmp_path, *WANDB))
    assert "error: `loggers` cannot be used: " in capfd.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())

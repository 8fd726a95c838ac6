"""Every benchmark's file, laid over experiments, replaces data and callbacks, leaves the agents and loads nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from callbacks.benchmark import Benchmark
from lightning_modules import cli
from lightning_modules.cli import command

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")]

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs" / "benchmarks").glob("*.yaml"))
EDITING = {f"configs/benchmarks/{name}.yaml" for name in ("omniedit", "gedit", "imgedit")}
DRAWING_EXPERIMENTS = ("multi_reward/flux1_promptrl", "ocr/flux1_flow_only")
EDITING_EXPERIMENTS = ("edit/kontext_promptrl", "edit/kontext_flow_only")
PAIRS = [
    (f"configs/{experiment}.yaml", overlay)
    for overlay in OVERLAYS
    for experiment in (EDITING_EXPERIMENTS if overlay in EDITING else DRAWING_EXPERIMENTS)
]


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def test_there_is_a_file_for_every_benchmark() -> None:
    names = {"geneval", "ocr", "tmdb", "openlib", "drawbench", "omniedit", "gedit", "imgedit"}
    assert {Path(overlay).stem for overlay in OVERLAYS} == names


@pytest.mark.parametrize(("experiment", "overlay"), PAIRS)
def test_overlay(experiment: str, overlay: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built: list[command.PromptRLCLI] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(command.PromptRLCLI, "_run_subcommand", lambda self, _: built.append(self))
    options = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.default_root_dir", str(tmp_path)]
    cli.main(["test", "--config", experiment, "--config", overlay, *options])
    (made,) = built
    wanted, before = load(overlay), load(experiment)

    data: Any = made.datamodule
    assert type(data).__qualname__ == wanted["data"]["class_path"].rsplit(".", 1)[1]
    for name, value in wanted["data"]["init_args"].items():
        own = type(data).eval_name if name == "eval_name" and value is None else value
        assert getattr(data, name) == own
    # no file of the experiment's is left over
    before_files = set(map(str, before["data"]["init_args"].values())) - set(
        map(str, wanted["data"]["init_args"].values())
    )
    assert not before_files & {value for value in vars(data).values() if isinstance(value, str)}

    callbacks: Any = made.trainer.callbacks  # type: ignore[attr-defined]
    benchmarks = [callback for callback in callbacks if isinstance(callback, Benchmark)]
    asked = wanted["trainer"]["callbacks"]
    assert [type(b).__qualname__ for b in benchmarks] == [one["class_path"].rsplit(".", 1)[1] for one in asked]
    for benchmark, one in zip(benchmarks, asked, strict=True):
        args = one.get("init_args", {})
        if "reward" in args:
            reward = vars(benchmark)["reward"]
            assert type(reward).__qualname__ == args["reward"]["class_path"].rsplit(".", 1)[1] and reward.name
    assert len({benchmark.title for benchmark in benchmarks}) == len(benchmarks)

    model: Any = made.model
    assert model.flow.model == before["model"]["init_args"]["flow"]["init_args"]["model"]
    assert (model.language is None) == (before["model"]["init_args"].get("language") is None)
    assert not any(True for _ in model.parameters()), "constructors load no weights"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_header_says_how_to_run_it(overlay: str) -> None:
    text = (ROOT / overlay).read_text()
    command = (
        rf"^#   lightning test --config (configs/\S+\.yaml) --config {re.escape(overlay)} \\\n#     --ckpt_path \S+$"
    )
    found = re.search(command, text, re.MULTILINE)
    assert found is not None and (ROOT / found[1]).is_file()

"""The run's seed: of the training order and of rollout noise, unless they have one of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.seed import run_seed
from lightning_modules import cli
from lightning_modules.cli import command
from lightning_modules.run_folder import RunFolder
from tests.short_runs import quick


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize(
    ("options", "model", "data"),
    [
        ([], 42, 42),
        (["--seed_everything=1"], 1, 1),
        (["--seed_everything=0"], 0, 0),
        (["--seed_everything=1", "--model.init_args.seed=7"], 7, 1),
        (["--seed_everything=1", "--data.init_args.seed=7"], 1, 7),
    ],
)
def test_data_and_noise_follow_seed_everything(
    options: list[str], model: int, data: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[command.PromptRLCLI] = []
    monkeypatch.setattr(command.PromptRLCLI, "_run_subcommand", lambda self, _: built.append(self))
    cli.main(quick("fit", tmp_path, *options))
    assert (built[0].model.seed, built[0].datamodule.seed) == (model, data)


def test_without_lightning_it_is_42(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert (run_seed(None), run_seed(0), run_seed(5)) == (42, 0, 5)
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    assert (run_seed(None), run_seed(0)) == (3, 0)


def test_a_run_is_named_by_the_seed_that_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for own, seed in ((None, 3), (0, 0), (7, 7)):
        config = {"seed_everything": 3, "model": {"init_args": {"seed": own}}}
        assert RunFolder(Path("run"), config, {}).seed == seed
    assert RunFolder(Path("run"), {"seed_everything": 3}, {}).seed == 3
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    unseeded = RunFolder(Path("run"), {"seed_everything": False}, {}).seed
    assert unseeded == run_seed(None) == 42 and unseeded is not False

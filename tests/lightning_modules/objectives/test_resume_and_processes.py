"""A resumed run with copies of weights is the unbroken one; two processes equal one (sharded: `test_sharded.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.cli.checkpoint import Checkpoint
from lightning_modules.objectives import DGPO, DiffusionNFT, RefinerGRPO
from lightning_modules.policies.kept import Decay
from tests.lightning_modules.sharded_runs import Case, compare, difference, run, train
from tests.lightning_modules.test_resume import AGENTS, same
from tests.lightning_modules.test_resume import run as fit

pytestmark = pytest.mark.slow

NFT: dict[str, Any] = {
    "mode": "flow",
    "objective": DiffusionNFT(old_policy=Decay(0.5)),
    "reference": Decay(0.8, every=2),
}
PROCESSES = {
    "NFT, old policy and moving reference": Case("ddp", steps=2, **(NFT | {"reference": Decay(0.8)})),
    "DGPO, mean of tokens, groups without scores": Case(
        "ddp",
        unscored=((0,), (1,)),
        objective=DGPO(),
        language_objective=RefinerGRPO(mean="token", ratio="sequence"),
    ),
}


@pytest.mark.parametrize("case", PROCESSES.values(), ids=PROCESSES)
def test_two_processes_equal_one(case: Case, tmp_path: Path) -> None:
    found = compare(case, tmp_path)
    assert found["difference"] < 2e-6 < 1e-3 < found["moved"]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_resumed_run_is_the_unbroken_one(lora: bool, tmp_path: Path) -> None:
    """Weights, copies and all logged numbers of steps 3 and 4, with references of both agents that move."""
    more = [
        "--model.init_args.objective=DiffusionNFT",
        "--model.init_args.objective.init_args.old_policy={limit: 0.9, slope: 0.3}",
        "--model.init_args.flow.init_args.kl_units=velocity",
        *(f"--model.init_args.{agent}.init_args.reference_decay={{limit: 0.5, every: 2}}" for agent in AGENTS),
        *(f"--model.init_args.{agent}.init_args.kl_weight=0.1" for agent in AGENTS),
    ]
    if lora:
        more += [f"--model.init_args.{agent}.init_args.lora.rank=4" for agent in AGENTS]
    whole, whole_rows = fit(tmp_path / "whole", 4, "--checkpoint.save_top_k=-1", *more)
    (checkpoint,) = (tmp_path / "whole").rglob("*step=2*.ckpt")
    resumed, rows = fit(tmp_path / "second", 4, f"--ckpt_path={checkpoint}", *more)
    for name in ("state_dict", "optimizer_states", "copies"):
        assert same(whole[name], resumed[name])
    copies: Any = whole["copies"]
    assert copies.keys() == {"flow.old", "flow.reference", "language.reference"}
    weights: Any = whole["state_dict"]
    for name, copy in copies.items():
        agent = name.partition(".")[0]
        assert all(not torch.equal(value, weights[f"{agent}.{key}"]) for key, value in copy.items() if value.any())
    train_rows = [row for row in whole_rows if "reward" in row]
    assert len(train_rows) == 4 and train_rows[2:] == [row for row in rows if "reward" in row]


def test_sharded_copies_are_resumed(tmp_path: Path) -> None:
    """What a sharded run saved after two of three steps goes on for one more."""
    case = Case({"save_distributed_checkpoint": True}, steps=3, **NFT)
    (whole, _) = run(case, tmp_path / "whole", 2, train_with_checkpoint)
    checkpoint = tmp_path / "whole" / "step=2.ckpt"
    wrong = [difference(ended, whole) for ended in run(case, tmp_path / "ended", 2, checkpoint=checkpoint)]
    assert wrong == [0, 0]


def train_with_checkpoint(case: Case, rank: int, world: int, folder: Path) -> None:
    """Trains and saves."""
    saves = Checkpoint(dirpath=str(folder), filename="{step}", every_n_train_steps=2, save_top_k=-1)
    train(case, rank, world, folder, callbacks=[saves], enable_checkpointing=True, default_root_dir=folder)

"""A resumed run is the unbroken run, bit for bit: parameters, optimizer, and every logged number."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from lightning_modules.cli import main
from tests.forked import run as run_forked

pytestmark = pytest.mark.slow

SHORT = [
    "fit",
    "--config=configs/quickstart.yaml",
    "--data.init_args.eval_prompts=1",
    "--data.init_args.train_prompts=6",  # three steps an epoch: the break is in mid-epoch, the rest crosses one
    "--data.init_args.batch_size=2",
    "--trainer.val_check_interval=3",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--checkpoint.every_n_train_steps=2",
    "--model.init_args.flow.init_args.sampling.eval_steps=2",
    "--preflight=off",
]

AGENTS = ("flow", "language")


def run(root: Path, steps: int, *more: str, processes: int = 1) -> tuple[dict[str, object], list[dict[str, str]]]:
    options = [*SHORT, f"--trainer.max_steps={steps}", f"--trainer.default_root_dir={root}", *more]
    if processes == 1:
        main(options)
    else:
        for one in run_forked(root / "output", *options, processes=processes):
            assert one.returncode == 0, one.text
    (folder,) = (root / "quickstart").iterdir()
    with (folder / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if v and not k.startswith("time/")} for row in csv.DictReader(file)]
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True), rows


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))  # type: ignore[arg-type]
    return a == b


@pytest.mark.parametrize("parts", [1, 2], ids=["full", "lora, mini-batches, warm-up, fewer calls"])
def test_two_and_two_steps_are_four(tmp_path: Path, parts: int) -> None:
    """A step has one rollout, and as many optimizer steps as mini-batches."""
    more = [f"--model.init_args.num_minibatches={parts}", f"--data.init_args.batch_size={parts}"]
    more += [f"--data.init_args.train_prompts={3 * parts}"]
    if parts > 1:
        more += [f"--model.init_args.{agent}.init_args.lora.rank=4" for agent in AGENTS]
        more += ["--model.init_args.lr_scheduler=CosineAnnealingLR", "--model.init_args.warmup_steps=6"]
        more += ["--model.init_args.lr_scheduler.init_args.T_max=9"]
        more += [
            f"--model.init_args.{agent}.init_args.{kl}" for agent in AGENTS for kl in ("kl_weight=0.1", "kl_every=3")
        ]
        more += [
            f"--model.init_args.flow.init_args.{one}" for one in ("text_cache_gib=0.1", "sampling.share_start=true")
        ]
        more += ["--model.init_args.flow.init_args.sampling.sde_steps=[1,2]"]
    whole, whole_rows = run(tmp_path / "whole", 4 * parts, *more)
    run(tmp_path / "first", 2 * parts, *more)
    (checkpoint,) = (tmp_path / "first").rglob("last.ckpt")
    resumed, resumed_rows = run(tmp_path / "second", 4 * parts, f"--ckpt_path={checkpoint}", *more)
    assert whole["global_step"] == resumed["global_step"] == 4 * parts
    assert same(whole["state_dict"], resumed["state_dict"])
    assert same(whole["optimizer_states"], resumed["optimizer_states"])
    assert same(whole["lr_schedulers"], resumed["lr_schedulers"]) and bool(whole["lr_schedulers"]) == (parts > 1)
    assert whole["num_rollouts"] == resumed["num_rollouts"] == 4 * 8 * parts
    assert all(("lora" in name) == (parts > 1) for name in whole["state_dict"])  # type: ignore[attr-defined]
    train = [row for row in whole_rows if "reward" in row]
    again = [row for row in resumed_rows if "reward" in row]
    assert len(train) == 4 and train[2:] == again
    # The steps differ from one another, so equality says something.
    assert len({row["reward"] + row["train/flow/grad_norm"] for row in train}) == 4


@pytest.mark.parametrize(
    ("ends", "processes"),
    [((1,), 1), ((3,), 1), ((2, 4), 1), ((2,), 2)],
    ids=["within an epoch", "at its end", "twice", "two processes"],
)
def test_a_run_that_ended_at_max_steps_is_continued(tmp_path: Path, ends: tuple[int, ...], processes: int) -> None:
    """Parts with nothing saved but at their ends equal one run of five steps, over two epochs of three."""
    more = ["--checkpoint.every_n_train_steps=100", "--trainer.limit_val_batches=0"]
    if processes > 1:
        more += ["--data.init_args.batch_size=1", f"--trainer.devices={processes}", "--trainer.strategy=ddp"]
    whole, whole_rows = run(tmp_path / "whole", 5, *more, processes=processes)
    checkpoint: list[str] = []
    rows: list[dict[str, str]] = []
    for number, end in enumerate((*ends, 5)):
        part, part_rows = run(tmp_path / f"{number}", end, *more, *checkpoint, processes=processes)
        rows += part_rows
        checkpoint = [f"--ckpt_path={next((tmp_path / f'{number}').rglob('last.ckpt'))}"]
    assert part["global_step"] == 5
    assert same(whole["state_dict"], part["state_dict"])
    assert same(whole["optimizer_states"], part["optimizer_states"])
    steps = [[row for row in found if "reward" in row] for found in (whole_rows, rows)]
    assert len(steps[0]) == 5 and steps[0] == steps[1]
    assert len({row["reward"] + row["train/flow/grad_norm"] for row in steps[0]}) == 5

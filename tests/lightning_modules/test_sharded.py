"""Several processes end with the weights of one, under `ddp` and `sharded` (FSDP2); checkpoints load into either."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import FluxPipeline
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from transformers import AutoModelForCausalLM

from callbacks.ema import EMA
from callbacks.export import Export
from callbacks.geneval import GenEvalBenchmark
from lightning_modules.agents import check_strategy
from lightning_modules.checkpoints import is_checkpoint, read
from lightning_modules.cli.checkpoint import Checkpoint
from lightning_modules.objectives import DGPO, DiffusionNFT
from lightning_modules.policies.flow import FlowPolicy
from lightning_modules.policies.kept import Decay
from lightning_modules.sharded import Sharded
from miniature.scenes.detector import ShapesDetector
from tests.forked import run as run_command
from tests.lightning_modules.sharded_runs import Case, build, compare, difference, run, train, train_split
from tests.short_runs import quick

pytestmark = pytest.mark.slow

CASES = {
    "ddp, all weights, uneven micro-batches": Case("ddp", steps=2),
    "all weights, uneven micro-batches, groups without scores": Case("sharded", unscored=((0,), (1,))),
    "two copies of two shards, adapters, recomputed activations": Case(
        {"shard_size": 2}, processes=4, lora=True, checkpointing=True, updates=2, steps=2
    ),
    "an old policy and references that follow": Case(
        "sharded",
        objective=DiffusionNFT(0.5, old_policy=Decay(0.5)),
        reference=Decay(0.9),
        unscored=((1,), ()),
        steps=2,
    ),
    "preferences of groups, two updates": Case(
        "sharded", objective=DGPO(10.0, levels=2), updates=2, steps=2, lora=True
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_several_processes_equal_one_with_the_union(case: Case, tmp_path: Path) -> None:
    found = compare(case, tmp_path)
    assert set(found["sharded"]) == {case.strategy != "ddp"} and len(found["rollouts"]) == 1
    assert found["difference"] < 1e-6 < 1e-3 < found["moved"]


@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_processes_that_share_groups_equal_one(strategy: str, tmp_path: Path) -> None:
    """Each of two draws every other prompt of the same groups: the same images, rewards, advantages and weights."""
    case = Case(strategy, micro=(4,), steps=2)
    (one,) = run(replace(case, strategy="auto"), tmp_path, 1, train_split)
    two = run(case, tmp_path, 2, train_split)
    for rank, other in enumerate(two):
        assert difference(one, other) < 1e-6 and other["rollouts"] == one["rollouts"] == 32
        for step in range(case.steps):
            assert torch.equal(other["rewards"][step], one["rewards"][step][:, rank::2])
            pixels = other["pixels"][step].int() - one["pixels"][step][:, rank::2].int()
            assert pixels.abs().max() <= step  # after an update, weights that differ by rounding draw such images
            torch.testing.assert_close(other["advantages"][step], one["advantages"][step][:, rank::2])


def test_half_precision_is_on_policy(tmp_path: Path) -> None:
    """Weights in fp32, computed in bf16: what is updated is what has drawn, to the last bit."""
    for one in run(Case("sharded", precision="bf16-mixed", steps=1), tmp_path, 2):
        assert one["max_log_ratio"]["flow"] == 0 and one["max_log_ratio"]["language"] < 0.1


FOLDER = {"save_distributed_checkpoint": True}


def train_with_checkpoints(case: Case, rank: int, world: int, folder: Path, checkpoint: Path | None = None) -> None:
    """Trains with a moving average, checkpoints and an export; from the start on with validations on the way."""
    callbacks = [
        GenEvalBenchmark(ShapesDetector()),
        EMA(decay=0.5),
        Export(str(folder / "export")),
        Checkpoint(dirpath=str(folder), filename="{step}", save_top_k=-1, save_last=True, every_n_train_steps=2),
    ]
    train(
        case,
        rank,
        world,
        folder,
        checkpoint,
        callbacks=callbacks,
        enable_checkpointing=True,
        default_root_dir=folder,
        limit_val_batches=1.0 if checkpoint is None else 0,
        val_check_interval=2,  # a step follows in which the average has been swapped out again
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )


def test_checkpoints_load_into_any_strategy(tmp_path: Path) -> None:
    """What a run saved after two steps goes on for a third: under the same strategy exactly, else to rounding."""
    how: dict[str, Any] = {"ddp": "ddp", "file": "sharded", "folder": FOLDER}
    work: dict[str, Any] = {"world": 2, "work": train_with_checkpoints}
    whole = {name: run(Case(strategy), tmp_path / f"{name}", **work)[0] for name, strategy in how.items()}
    assert difference(whole["file"], whole["folder"]) == 0 and difference(whole["file"], whole["ddp"]) < 1e-6
    for name in ("file", "folder"):
        assert whole[name]["history"] == whole["ddp"]["history"] and len(whole["ddp"]["history"]) == 3
        checkpoint = tmp_path / name / "last.ckpt"
        assert is_checkpoint(checkpoint) and checkpoint.is_dir() == (name == "folder")
        exported = FluxPipeline.from_pretrained(tmp_path / name / "export" / "flow").transformer
        language = AutoModelForCausalLM.from_pretrained(tmp_path / name / "export" / "language")
        weights = {f"flow.network.{n}": p for n, p in exported.named_parameters()}
        weights |= {f"language.network.{n}": p for n, p in language.named_parameters()}
        average = read(checkpoint)["state_dict"]
        assert all(torch.equal(weights[n], weight) for n, weight in average.items())
    for begun, goes_on in (("folder", "folder"), ("file", "ddp"), ("ddp", "file"), ("folder", "one")):
        checkpoint = tmp_path / begun / "step=2.ckpt"
        assert read(checkpoint, record_only=True)["global_step"] == 2
        case, world = (Case("auto"), 1) if goes_on == "one" else (Case(how[goes_on]), 2)
        ended = run(case, tmp_path / "ended" / goes_on, world, train_with_checkpoints, checkpoint=checkpoint)[0]
        unbroken = whole["ddp" if goes_on == "one" else goes_on]
        assert difference(ended, unbroken) <= (0 if begun == goes_on else 1e-6), (begun, goes_on)
        assert ended["rollouts"] == unbroken["rollouts"]


def in_folders(folder: Path) -> Path:
    """Writes a configuration whose checkpoints are folders."""
    path = folder / "sharded.yaml"
    init = "{save_distributed_checkpoint: true}"
    path.write_text(f"trainer: {{strategy: {{class_path: lightning_modules.sharded.Sharded, init_args: {init}}}}}")
    return path


def test_the_command_trains_in_shards(tmp_path: Path) -> None:
    """With a run folder, preflight, a page and the last lines; what it leaves is evaluated by one process."""
    common = ["--config=configs/quickstart.yaml", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    common += [f"--trainer.default_root_dir={tmp_path}", "--data.init_args.eval_prompts=3"]
    strategy = in_folders(tmp_path)
    sharded = [f"--config={strategy}", "--trainer.devices=2", "--trainer.max_steps=1", "--data.init_args.batch_size=1"]
    for process in run_command(tmp_path / "fit", "fit", *common, *sharded, processes=2):
        assert process.returncode == 0, process.text
    (page,) = tmp_path.rglob("report.html")
    last = page.parent / "checkpoints" / "last.ckpt"
    assert last.is_dir()
    (test,) = run_command(tmp_path / "test", "test", *common, "--ckpt_path=last")
    assert test.returncode == 0 and str(last) in test.text, test.text


class FillsUp(L.Callback):
    """Leaves no room on the disk after the first step."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Lets no file grow above 100 kB."""
        if trainer.global_step == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def test_a_full_disk_leaves_the_folder_before(tmp_path: Path) -> None:
    strategy = in_folders(tmp_path)
    options = [f"--config={strategy}", "--trainer.devices=2", "--trainer.max_steps=2", "--trainer.limit_val_batches=0"]
    options += ["--trainer.callbacks+=tests.lightning_modules.test_sharded.FillsUp"]
    options += ["--checkpoint.every_n_train_steps=1", "--checkpoint.save_top_k=0"]
    for process in run_command(tmp_path / "fit", *quick("fit", tmp_path, *options), processes=2):
        assert process.returncode == 2 and "Traceback" not in process.text, process.text
        (said,) = [line for line in process.text.splitlines() if line.startswith("lightning: error: ")]
        assert "last.ckpt" in said and "File too large" in said, said
    (last,) = tmp_path.rglob("last.ckpt")
    assert read(last, record_only=True)["global_step"] == 1 and read(last)["state_dict"]
    assert not list(last.parent.glob(".*"))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_would_train_wrongly_are_refused(strategy: Any) -> None:
    with pytest.raises(ValueError, match=rf"{strategy.__name__}, with which .* use `sharded`"):
        check_strategy(object.__new__(strategy))
    check_strategy(Sharded())


def test_plain_model_parallelism_is_refused_by_the_command(tmp_path: Path) -> None:
    options = [
        "--config=configs/quickstart.yaml",
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    (process,) = run_command(
        tmp_path, "fit", *options, "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy"
    )
    assert process.returncode == 2 and "lightning: error: `trainer.strategy`" in process.text
    assert not list(tmp_path.rglob("version_*"))


def test_split_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="shard_size=0, use at least 1"):
        Sharded(shard_size=0)
    strategy = Sharded(shard_size=3)
    strategy.parallel_devices = [torch.device("cpu")] * 4
    with pytest.raises(ValueError, match="shard_size=3, which does not divide 4 processes"):
        strategy.setup_environment()


def test_quantized_weights_are_refused() -> None:
    policy: FlowPolicy = build(Case("sharded", lora=True), 0).flow
    policy.quantization = "nf4"
    policy.network = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="`flow.quantization` is nf4, which cannot be sharded"):
        policy.shard(None, torch.device("cpu"), None)  # type: ignore[arg-type]

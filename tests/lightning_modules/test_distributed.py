"""Two processes under DDP: validation, results, a lost scorer, curves, skipped updates (weights: `test_sharded.py`)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment

from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.prompt_rl import PromptRL
from lightning_modules.rl.advantages import group_advantages
from lightning_modules.rollout import Rollout
from miniature.scenes.prompts import ShapesPrompts
from rewards.base import Reward, RewardBatch, Score
from tests.forked import run, two_processes
from tests.lightning_modules.test_finite import Spoiled
from tests.lightning_modules.test_prompt_rl import Collector


def trainer_of(world: int, **kwargs: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        plugins=[LightningEnvironment()],
        limit_val_batches=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


@pytest.mark.slow
def test_two_processes_validate_and_write_results(tmp_path: Path) -> None:
    """The whole command under DDP: no rank may skip a collective, or this hangs."""
    options = [
        "fit",
        "--config=configs/quickstart.yaml",
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.max_steps=1",
        "--data.init_args.eval_prompts=7",
        "--data.init_args.batch_size=1",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.enable_progress_bar=false",
    ]
    for process in run(tmp_path / "output", *options, processes=2):
        assert process.returncode == 0, process.text
    (path,) = tmp_path.rglob("results.json")
    results = json.loads(path.read_text())
    assert results["rollouts"] == 2 * 8
    # 7 prompts, none counted twice: the share of correct images is a whole number of sevenths.
    sevenths = 7 * results["geneval"]["without_pe"]["images"]
    assert abs(sevenths - round(sevenths)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "said"), [("false", "the reward server is gone."), ("true", "DownAfter returned None for an image")]
)
def test_a_scorer_lost_on_one_rank_stops_both_with_a_checkpoint(tmp_path: Path, broken: str, said: str) -> None:
    """Rank 1 alone gets no scores in the second step; nobody hangs, and the state before that step is saved."""
    options = [
        "fit",
        "--config=configs/quickstart.yaml",
        "--model.init_args.reward=tests.lightning_modules.test_scoring.DownAfter",
        "--model.init_args.reward.init_args.batches=1",
        "--model.init_args.reward.init_args.rank=1",
        f"--model.init_args.reward.init_args.broken={broken}",
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.max_steps=3",
        "--data.init_args.eval_prompts=2",
        "--data.init_args.batch_size=1",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.enable_progress_bar=false",
    ]
    zero, one = run(tmp_path / "output", *options, processes=2)
    assert zero.returncode != 0 and one.returncode != 0
    assert f"lightning: error: {said}" in one.text
    (path,) = tmp_path.rglob("last.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 1


class ByRank(Reward):
    """Scores that differ by rank, prompt and image, of which one on rank 1 fails."""

    name = "by_rank"

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """One value an image."""
        values = [(1 + 2 * self.rank) * (number % 4) ** 2 / 9 for number in range(len(batch))]
        scores = [Score(value, value, value) for value in values]
        return [Score.invalid("no"), *scores[1:]] if self.rank == 1 else scores


def step_on_two_ranks(rank: int, folder: Path, scale: str) -> None:
    """One step with a group of the same tag on each rank, and a NaN in a gradient on rank 1 in the second step."""
    size: dict[str, Any] = {"height": 32, "width": 32, "max_sequence_length": 18}
    flow = Flux1Policy("miniature/flow", Sampling(4, 2), dtype="float32", learning_rate=1e-3, **size)
    language = LanguagePolicy("miniature/language", template="{prompt}", max_new_tokens=32, dtype="float32")
    module = PromptRL(flow, ByRank(rank), language, 4, 2, advantage_scale=scale)  # type: ignore[arg-type]
    spoiled, collector = Spoiled("flow", {1}, rank=1), Collector()
    trainer = trainer_of(2, max_steps=3, callbacks=[spoiled, collector])
    rollouts = []
    collect = module.collect

    def noted(samples: Any) -> Rollout:
        samples = [replace(sample, tag="one") for sample in samples]
        rollouts.append(collect(samples))
        return rollouts[-1]

    module.collect = noted  # type: ignore[method-assign]
    trainer.fit(module, ShapesPrompts(train_prompts=16, batch_size=1))
    first = rollouts[0]
    assert first.completions is not None
    torch.save(
        {
            "logged": collector.steps,
            "weights": spoiled.weights,
            "rewards": first.rewards,
            "valid": first.valid,
            "advantages": first.advantages,
            "formats": first.completions.formatted,
            "lengths": first.completions.mask.sum(1),
        },
        folder / f"{rank}.pt",
    )


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["tag", "group"])
def test_curves_advantages_and_skipped_updates_are_of_all_ranks(tmp_path: Path, scale: str) -> None:
    two_processes(step_on_two_ranks, tmp_path, scale)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["logged"][0].keys() == two["logged"][0].keys()
    timeless = [{k: v for k, v in rank["logged"][0].items() if not k.startswith("time/")} for rank in (one, two)]
    assert timeless[0] == pytest.approx(timeless[1], nan_ok=True)
    logged = timeless[0]
    rewards, valid = (torch.cat([one[key], two[key]]) for key in ("rewards", "valid"))
    assert valid.sum() == 7 and rewards[0].mean() != pytest.approx(float(rewards[1][valid[1]].mean()), abs=0.1)
    assert logged["reward"] == pytest.approx(float(rewards[valid].mean()))
    assert logged["format"] == pytest.approx(float(torch.cat([one["formats"], two["formats"]]).mean()))
    lengths = torch.cat([one["lengths"], two["lengths"]]).float()
    assert logged["refine/length"] == pytest.approx(float(lengths.mean()))
    assert logged["group/invalid_share"] == pytest.approx(1 / 8)
    stds = [float(row[own].std(correction=0)) for row, own in zip(rewards, valid, strict=True)]
    assert logged["group/std"] == pytest.approx(sum(stds) / 2, rel=1e-5)
    # The advantages are those of one process that has both groups.
    tags = torch.zeros(2, dtype=torch.long) if scale == "tag" else None
    expected = group_advantages(rewards, valid, scale=scale, tags=tags)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.cat([one["advantages"], two["advantages"]]), expected)
    for rank in (one, two):
        assert [step["train/flow/skipped"] for step in rank["logged"]] == [0, 1, 0]
        assert [step["train/language/skipped"] for step in rank["logged"]] == [0, 0, 0]
        _, first, second, third = rank["weights"]
        assert torch.equal(first, second) and not torch.equal(second, third) and third.isfinite().all()
    assert torch.equal(one["weights"][-1], two["weights"][-1])

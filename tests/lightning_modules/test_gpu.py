"""Tests that need a GPU: devices that do not match, and rounding in bf16 kernels."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_modules.cli import main
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.rl.sde import SDEType

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_joint_steps_run_and_start_on_policy(tmp_path: Path, precision: str) -> None:
    main(
        [
            "fit",
            "--config=configs/quickstart.yaml",
            "--trainer.accelerator=gpu",
            f"--trainer.precision={precision}",
            "--trainer.max_steps=3",
            "--data.init_args.eval_prompts=12",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.enable_progress_bar=false",
        ]
    )
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    (ratio,) = [float(row["train/flow/max_log_ratio"]) for row in rows if row["train/flow/max_log_ratio"]]
    assert ratio < 1e-6  # one rounding error of a log-prob near -1, against a clip range of 1e-4
    assert len([row for row in rows if row["reward"]]) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sde_type", ["flow_sde", "dance_sde", "cps"])
def test_replayed_log_probs_are_the_sampled_ones(
    make_flow: Callable[..., Flux1Policy], sde_type: SDEType, dtype: str
) -> None:
    policy = make_flow(sampling=Sampling(6, 3, sde_type), dtype=dtype, micro_batch_size=2).to("cuda")
    trajectory = policy.rollout(["a photo of a circle", "a photo of two crosses"], [1, 2])
    for step in range(3):
        replayed = policy.replay(trajectory, step).log_prob(trajectory.next_latents[:, step])
        assert (replayed - trajectory.log_probs[:, step]).abs().max() < 1e-6

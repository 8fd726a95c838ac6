"""Tests that need a GPU: devices that do not match, rounding in bf16 kernels, quantized weights that move."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from datamodules.sample import PromptSample
from lightning_modules.cli import main
from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.language import LanguagePolicy
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


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_weights_quantized_on_the_cpu_are_the_same_on_the_gpu(
    make_flow: Callable[..., Flux1Policy], quantization: str
) -> None:
    """Loading rounds them on the CPU, and Lightning moves them: images, log-probs and gradients follow."""
    prompts, seeds = ["a photo of a circle", "a photo of two crosses"], [1, 2]
    policy = make_flow(
        sampling=Sampling(6, 3), dtype="float32", lora=LoRA(4, 8), quantization=quantization, micro_batch_size=2
    )
    expected = policy.generate(prompts, seeds)
    policy.to("cuda")
    assert (policy.generate(prompts, seeds).cpu() - expected).abs().mean() < 0.02  # int8 rounds activations too
    trajectory = policy.rollout(prompts, seeds)
    replayed = policy.replay(trajectory, 0).log_prob(trajectory.next_latents[:, 0])
    assert (replayed - trajectory.log_probs[:, 0]).abs().max() < 1e-6
    replayed.sum().backward()
    gradients = [weight.grad for weight in policy.parameters() if weight.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_decoding_writes_the_same_rewrites(make_language: Callable[..., LanguagePolicy], dtype: str) -> None:
    """Sizes of batch and prompt change between calls, weights too: each is captured anew."""
    samples = [PromptSample(str(number), "a photo of a red circle " * number, "none", {}) for number in (1, 2, 3)]
    policy = make_language(dtype=dtype).to("cuda")
    for count, num in ((3, 4), (1, 2), (3, 1)):
        written = []
        for graphs in (True, False):
            policy.cuda_graphs = graphs
            torch.manual_seed(5)
            written.append(policy._write(samples[:count], num, 24, greedy=num == 1))
        captured, usual = written
        near = 1e-5 if dtype == "float32" else 0.05
        if dtype == "float32":
            assert torch.equal(captured.tokens, usual.tokens)
            assert (captured.log_probs - usual.log_probs).abs().max() < near
        replayed = policy.log_probs(captured)
        if num > 1:
            assert ((replayed - captured.log_probs)[captured.mask]).abs().mean() < near
        with torch.no_grad():
            for weight in policy.parameters():
                weight.add_(0.01 * torch.randn_like(weight))

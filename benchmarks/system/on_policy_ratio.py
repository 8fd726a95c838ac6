"""Measures the largest |log ratio| between replay and rollout before any update, which ought to be 0.

    python -m benchmarks.system.on_policy_ratio [--device cuda] [--full-size]

`--full-size` adds a transformer of FLUX.1-dev's shape (12B random weights in bf16, LoRA) at 512 px; it needs a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch

from datamodules.chunks import chunks
from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.rl.sde import SDEType
from lightning_modules.rollout import Conditioning
from miniature.scenes.prompts import shapes_prompts

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Prints a table of the flow model's ratios, one of the refiner's, and one of FLUX.1-dev's shape if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full-size", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.device}, 64 samples in micro-batches of 16, 8 steps of which 3 SDE\n")
    print("| SDE | dtype | trained | max abs log ratio | replayed in batches of 5 | / clip range 1e-4 |")
    print("|---|---|---|---|---|---|")
    sdes: tuple[SDEType, ...] = ("flow_sde", "dance_sde", "cps")
    for sde, dtype, lora in itertools.product(sdes, ("float32", "bfloat16"), (LoRA(16, 32), None)):
        same, other = flow_ratio(sde, dtype, lora, args.device)
        print(f"| {sde} | {dtype} | {'LoRA' if lora else 'full'} | {same:.1e} | {other:.1e} | {other / 1e-4:.3f} |")
    print("\n| refiner | trained | max abs log ratio | mean |\n|---|---|---|---|")
    for dtype, lora in itertools.product(("float32", "bfloat16"), (LoRA(16, 32), None)):
        largest, mean = language_ratio(dtype, lora, args.device)
        print(f"| {dtype} | {'LoRA' if lora else 'full'} | {largest:.1e} | {mean:.1e} |")
    if args.full_size:
        full_size()


def flow_ratio(sde: SDEType, dtype: str, lora: LoRA | None, device: str) -> tuple[float, float]:
    """Returns the largest |log ratio| of a replay in the rollout's micro-batches of 16, and in batches of 5."""
    policy = Flux1Policy(
        str(ROOT / "miniature/flow"),
        Sampling(8, 3, sde),
        height=32,
        width=32,
        max_sequence_length=18,
        dtype=dtype,
        learning_rate=1e-4,
        lora=lora,
        micro_batch_size=16,
    )
    policy.load()
    policy.to(device)
    prompts = [sample.prompt for sample in shapes_prompts("ratio", "train", ("canonical",), 64, 0)]
    trajectory = policy.rollout(prompts, list(range(64)))
    found = []
    for size in (16, 5):
        worst = 0.0
        for rows in chunks(64, size):
            part = trajectory.rows(rows)
            for step in range(3):
                replayed = policy.replay(part, step).log_prob(part.next_latents[:, step])
                worst = max(worst, (replayed - part.log_probs[:, step]).abs().max().item())
        found.append(worst)
    return found[0], found[1]


def language_ratio(dtype: str, lora: LoRA | None, device: str) -> tuple[float, float]:
    """Returns the largest and the mean |log ratio| over the tokens of 48 rewrites."""
    policy = LanguagePolicy(
        str(ROOT / "miniature/language"),
        template="{prompt}",
        max_new_tokens=32,
        dtype=dtype,
        lora=lora,
    )
    policy.load()
    policy.to(device)
    completions = policy.refine(shapes_prompts("ratio", "train", ("canonical",), 8, 0), 6)
    difference = (policy.log_probs(completions) - completions.log_probs)[completions.mask].abs()
    return difference.max().item(), difference.mean().item()


def full_size() -> None:
    """Prints ratio, time and memory of one group's rollout and update by FLUX.1-dev's shape with random weights."""
    from diffusers import FluxTransformer2DModel

    from lightning_modules.objectives import flow_objective

    # cuDNN's attention failed in the backward pass at this size (torch 2.11, H100).
    torch.backends.cuda.enable_cudnn_sdp(False)
    policy = Flux1Policy(
        str(ROOT / "miniature/flow"), Sampling(8, 3), height=512, width=512, lora=LoRA(64, 128), micro_batch_size=1
    )
    policy.load()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        network: Any = FluxTransformer2DModel(guidance_embeds=True)
    torch.set_default_dtype(torch.float32)
    policy.network = policy.pipe.transformer = network.eval().requires_grad_(False)
    policy.pipe.vae_scale_factor = 8  # FLUX.1's own autoencoder, which this measurement leaves out
    assert policy.lora is not None
    policy._add_adapters(policy.lora)
    generator = torch.Generator("cuda").manual_seed(0)
    embeds = torch.randn(4, 512, 4096, device="cuda", dtype=torch.bfloat16, generator=generator)
    pooled = torch.randn(4, 768, device="cuda", dtype=torch.bfloat16, generator=generator)
    conditioning = Conditioning({"embeds": embeds, "pooled": pooled}, torch.arange(4, device="cuda"))
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with torch.no_grad():
        trajectory = policy._sample(conditioning, [1, 2, 3, 4], policy.sigmas(8), (0, 1, 2))
    torch.cuda.synchronize()
    drawn, worst = time.perf_counter(), 0.0
    for rows, step in itertools.product(chunks(4, 1), range(3)):
        part = trajectory.rows(rows)
        result = flow_objective(policy, part, step, torch.ones(1, device="cuda"))
        result.loss.sum().backward()
        worst = max(worst, (result.log_probs - part.log_probs[:, step]).abs().max().item())
    torch.cuda.synchronize()
    print("\n| FLUX.1-dev shape, bf16, LoRA r64, 512 px, 4 images, 8 steps (3 SDE), micro-batch 1 | |\n|---|---|")
    print(f"| parameters | {sum(p.numel() for p in network.parameters()) / 1e9:.2f} B |")
    print(f"| max abs log ratio | {worst:.1e} |")
    print(f"| rollout / update | {drawn - start:.1f} s / {time.perf_counter() - drawn:.1f} s |")
    print(f"| peak memory | {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB |")


if __name__ == "__main__":
    main()

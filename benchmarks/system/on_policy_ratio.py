"""Measures the largest |log ratio| between replay and rollout before any update, which ought to be 0.

    python -m benchmarks.system.on_policy_ratio [--device cuda]

Tiny models; `benchmarks.system.gpu` does so with models of full size.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch

from datamodules.chunks import chunks
from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.rl.sde import SDEType
from miniature.scenes.prompts import shapes_prompts

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Prints a table of the flow model's ratios and one of the refiner's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
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


if __name__ == "__main__":
    main()

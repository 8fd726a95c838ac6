"""Prints the estimated memory of real models by preset, from configurations alone: no weights, network or GPU.

    python -m benchmarks.system.preflight_table [--size 1024 --batch-size 4 --micro-batch-size 1]

Writes the published architectures' configuration files to a temporary folder and prints a Markdown table of the memory
that is held throughout a run, of its rough peak and of its largest phase. A step has `batch-size` prompts with groups
of 8, of which the refiner (Qwen2.5-VL-3B with LoRA, or none) rewrites 6.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.system.published import write_pipeline, write_refiner
from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.preflight.check import Estimate, Setting, estimate, size_text
from lightning_modules.prompt_rl import PromptRL
from miniature.scenes.detector import ShapesDetector
from rewards.geneval.reward import GenEvalReward

FULL: dict[str, Any] = {"dtype": "float32", "frozen_dtype": "bfloat16"}
"""All weights are trained in fp32 with products in bf16, since bf16 weights would round small updates away."""
ADAPTERS: dict[str, Any] = {"dtype": "bfloat16", "lora": LoRA(64, 128)}
PRESETS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "full, checkpointing": FULL | {"gradient_checkpointing": True},
    "LoRA": ADAPTERS,
    "LoRA, checkpointing": ADAPTERS | {"gradient_checkpointing": True},
    "LoRA, nf4, checkpointing, offload": ADAPTERS
    | {"gradient_checkpointing": True, "quantization": "nf4", "offload": True},
}
SHOWN = ("FLUX.1-dev", "FLUX.2-klein-base-4B", "SD3.5-medium", "Qwen-Image", "Z-Image", "Sana-1600M")
"""Models of the table."""


def row(name: str, preset: str, found: Estimate) -> str:
    """Formats a line of the table."""
    parameters = sum(part.parameters for part in found.networks)
    trained = sum(part.trained for part in found.networks)
    sizes = {phase: size or 0 for phase, size in found.transient.items()}
    phase = max(sizes, key=lambda phase: sizes[phase])
    cells = [name, preset, f"{parameters / 1e9:.2f} B", f"{trained / 1e6:,.0f} M", size_text(found.persistent_total)]
    cells += [
        size_text(sum(found.per_step.values())),
        f"{phase}: {size_text(sizes[phase])}",
        f"**{size_text(found.total)}**",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Prints the table of all models and presets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="height and width of images")
    parser.add_argument("--batch-size", type=int, default=4, help="prompts a step")
    parser.add_argument("--micro-batch-size", type=int, default=1, help="images, and completions, a forward pass")
    options = parser.parse_args()
    print("| model | preset | parameters | trained | sure | kept in a step | largest phase | peak, rough |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        language = Path(temporary, "language")
        write_refiner(language, "Qwen2.5-VL-3B")
        for name in SHOWN:
            folder = Path(temporary, name)
            cls: Any = write_pipeline(folder, name)
            for preset, settings in PRESETS.items():
                for refiner in (False, True) if preset.startswith("LoRA, ch") else (False,):
                    flow = cls(
                        str(folder),
                        Sampling(num_steps=10, sde_steps=2),
                        height=options.size,
                        width=options.size,
                        micro_batch_size=options.micro_batch_size,
                        learning_rate=1e-4,
                        **settings,
                    )
                    rewriter = LanguagePolicy(
                        str(language),
                        learning_rate=1e-4,
                        lora=LoRA(64, 128),
                        gradient_checkpointing=True,
                        micro_batch_size=4 * options.micro_batch_size,
                    )
                    module = PromptRL(
                        flow,
                        reward=GenEvalReward(ShapesDetector()),  # never asked
                        language=rewriter if refiner else None,
                        num_retained=2 if refiner else 8,
                    )
                    autocast = torch.bfloat16 if settings["dtype"] == "float32" else None
                    found = estimate(module, Setting(options.batch_size, autocast=autocast))
                    shown = f"{name} + Qwen2.5-VL-3B" if refiner else name
                    print(row(shown, preset, found), flush=True)


if __name__ == "__main__":
    main()

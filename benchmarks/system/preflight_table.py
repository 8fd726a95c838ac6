"""Prints the estimated memory of real models by preset, from configurations alone: no weights, network or GPU.

    python -m benchmarks.system.preflight_table [--size 1024 --batch-size 4 --micro-batch-size 1]

Writes the published architectures' configuration files to a temporary folder and prints a Markdown table of the memory
that is held throughout a run, of its rough peak and of its largest phase. A step has `batch-size` prompts with groups
of 8, of which the refiner (Qwen2.5-VL-3B with LoRA, or none) rewrites 6.
"""

from __future__ import annotations

import argparse
import json
import pydoc
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
import yaml

from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.policies.pipeline import PipelinePolicy
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


MODELS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("preflight_models.yaml").read_text(encoding="utf-8"))
"""Sizes of published models: `pipelines` by name, and the `refiner`."""


def write_pipeline(folder: Path, cls: type[PipelinePolicy], parts: dict[str, dict[str, Any]], more: Any) -> None:
    """Writes a pipeline folder without weights: each part's configuration, and an empty file for a tokenizer.

    Args:
        folder: folder to write.
        cls: policy that reads it.
        parts: name of a part -> class -> arguments of its configuration.
        more: further entries of `model_index.json`.
    """
    index = {"_class_name": cls.pipeline_class.__name__, "_diffusers_version": diffusers.__version__, **more}
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_config(folder / "scheduler")
    for name, part in parts.items():
        ((kind, settings),) = part.items()
        library = "diffusers" if hasattr(diffusers, kind) else "transformers"
        index[name] = [library, kind]
        if name.startswith("tokenizer"):
            (folder / name).mkdir()
            (folder / name / "tokenizer_config.json").write_text("{}")
        elif library == "transformers":
            getattr(transformers, kind).config_class(**settings).save_pretrained(folder / name)
        else:
            with torch.device("meta"):
                getattr(diffusers, kind)(**settings).save_config(folder / name)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def write_language(folder: Path) -> None:
    """Writes a refiner's folder without weights; loading looks for a file of them first, so an empty one is there."""
    ((kind, settings),) = MODELS["refiner"].items()
    config = getattr(transformers, kind).config_class(**settings)
    config.architectures = [kind]
    config.save_pretrained(folder)
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).touch()


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
        write_language(language)
        for name, model in MODELS["pipelines"].items():
            folder = Path(temporary, name)
            cls: Any = pydoc.locate(model["policy"])
            write_pipeline(folder, cls, model["parts"], model.get("index", {}))
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

"""Prints the estimated memory of real models by preset, from configurations alone: no weights, network or GPU.

    python -m benchmarks.system.preflight_table [--size 1024 --batch-size 4 --micro-batch-size 1]

Writes the published architectures' configuration files to a temporary folder and prints a Markdown table of the memory
that is held throughout a run, of its rough peak and of its largest phase. A step has `batch-size` prompts with groups
of 8, of which the refiner (Qwen2.5-VL-3B with LoRA, or none) rewrites 6.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from lightning_modules.policies.base import LoRA
from lightning_modules.policies.flow import Sampling
from lightning_modules.policies.flux1 import Flux1Policy
from lightning_modules.policies.flux2 import Flux2KleinPolicy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.policies.pipeline import PipelinePolicy
from lightning_modules.policies.sd3 import SD3Policy
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


def t5_xxl() -> Any:
    """Returns class and configuration of T5 v1.1 XXL's encoder."""
    return transformers.T5EncoderModel, transformers.T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )


def clip_l(projected: bool) -> Any:
    """Returns class and configuration of CLIP-L's text encoder, as FLUX.1 (pooled) or SD3 (projected) uses it."""
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return cls, transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
    )


def clip_g() -> Any:
    """Returns class and configuration of OpenCLIP bigG's text encoder."""
    return transformers.CLIPTextModelWithProjection, transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
    )


def qwen3_4b() -> Any:
    """Returns class and configuration of Qwen3-4B."""
    return transformers.Qwen3ForCausalLM, transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )


def qwen25_vl_3b() -> Any:
    """Returns class and configuration of Qwen2.5-VL-3B-Instruct."""
    return transformers.Qwen2_5_VLForConditionalGeneration, transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
        },
        tie_word_embeddings=True,
    )


def vae(**settings: Any) -> Any:
    """Builds the autoencoder of FLUX.1 and SD3."""
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        **settings,
    )


def flux1_dev() -> dict[str, Any]:
    """Returns the parts of FLUX.1-dev's pipeline."""
    return {
        "transformer": diffusers.FluxTransformer2DModel(guidance_embeds=True),
        "vae": vae(),
        "text_encoder": clip_l(projected=False),
        "text_encoder_2": t5_xxl(),
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "T5TokenizerFast",
    }


def flux2_klein_4b() -> dict[str, Any]:
    """Returns the parts of FLUX.2-klein-4B's pipeline."""
    return {
        "transformer": diffusers.Flux2Transformer2DModel(
            num_layers=5,
            num_single_layers=20,
            num_attention_heads=24,
            joint_attention_dim=7680,
            guidance_embeds=False,
        ),
        "vae": diffusers.AutoencoderKLFlux2(),
        "text_encoder": qwen3_4b(),
        "tokenizer": "Qwen2TokenizerFast",
        "is_distilled": True,
    }


def sd35_medium() -> dict[str, Any]:
    """Returns the parts of SD3.5-medium's pipeline."""
    return {
        "transformer": diffusers.SD3Transformer2DModel(
            sample_size=128,
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        "vae": vae(),
        "text_encoder": clip_l(projected=True),
        "text_encoder_2": clip_g(),
        "text_encoder_3": t5_xxl(),
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "tokenizer_3": "T5TokenizerFast",
    }


MODELS: dict[str, tuple[type[PipelinePolicy], Any]] = {
    "FLUX.1-dev": (Flux1Policy, flux1_dev),
    "FLUX.2-klein-4B": (Flux2KleinPolicy, flux2_klein_4b),
    "SD3.5-medium": (SD3Policy, sd35_medium),
}


def write_pipeline(folder: Path, cls: type[PipelinePolicy], build: Any) -> Path:
    """Writes a pipeline folder without weights: each part's configuration, and an empty file for a tokenizer."""
    with torch.device("meta"):
        parts = build()
    index: dict[str, Any] = {"_class_name": cls.pipeline_class.__name__, "_diffusers_version": diffusers.__version__}
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_config(folder / "scheduler")
    for name, part in parts.items():
        if isinstance(part, bool):
            index[name] = part
        elif isinstance(part, str):
            index[name] = ["transformers", part]
            (folder / name).mkdir()
            (folder / name / "tokenizer_config.json").write_text("{}")
        elif isinstance(part, tuple):
            index[name] = ["transformers", part[0].__name__]
            part[1].save_pretrained(folder / name)
        else:
            index[name] = ["diffusers", type(part).__name__]
            part.save_config(folder / name)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def write_language(folder: Path) -> Path:
    """Writes a refiner's folder without weights; loading looks for a file of them first, so an empty one is there."""
    cls, config = qwen25_vl_3b()
    config.architectures = [cls.__name__]
    config.save_pretrained(folder)
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).touch()
    return folder


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
        language = write_language(Path(temporary, "language"))
        for name, (cls, build) in MODELS.items():
            folder = write_pipeline(Path(temporary, name), cls, build)
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

"""Agents as configuration files describe them, with folders of published sizes in place of published weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import lightning as L
from omegaconf import OmegaConf

from benchmarks.system.published import MODELS, write_pipeline, write_refiner
from lightning_modules.prompt_rl import PromptRL

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = {
    "FLUX.1-dev": "flux1_dev",
    "FLUX.2-klein-base-4B": "flux2_klein_base_4b",
    "SD3.5-medium": "sd3_5_medium",
    "Qwen-Image": "qwen_image",
    "Z-Image": "z_image",
    "Sana-1600M": "sana",
    "FLUX.1-Kontext-dev": "flux1_dev",
    "Qwen-Image-Edit-2509": "qwen_image",
}
"""Published model -> its file in `configs/recipes/model`, or that of the family's other model."""


def recipe(flow: str, gpu: int, mode: str, task: str = "geneval") -> tuple[str, ...]:
    """Lists a recipe's files under `configs/`, in the order in which they are laid over each other.

    Args:
        flow: published model.
        gpu: gigabytes of the GPU: 80, 48 or 24.
        mode: promptrl, flow_only or prompt_only.
        task: name of a file in `configs/recipes/task`.
    """
    model = f"recipes/model/{FILES[flow]}.yaml"
    return "recipes/base.yaml", model, f"gpu/{gpu}gb.yaml", f"recipes/task/{task}.yaml", f"recipes/mode/{mode}.yaml"


def configured(
    files: Sequence[str],
    flow: str,
    refiner: str,
    folder: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    tiny: bool = False,
) -> tuple[PromptRL, Any]:
    """Builds the agents of configuration files, without loading them.

    Args:
        files: files under `configs/`, each laid over those before it.
        flow: name of a pipeline in `published.yaml`, in place of the files' own.
        refiner: name of a refiner there, unless the files have none.
        folder: where their folders are written.
        changes: dotted key under `model.init_args` -> value, laid over the files.
        tiny: takes stand-ins of few weights, small images and short rewrites.

    Returns:
        The module, and the whole configuration.
    """
    config: Any = OmegaConf.merge(*(OmegaConf.load(CONFIGS / name) for name in files))
    model = config.model.init_args
    policy = write_pipeline(folder / "flow", flow, tiny=tiny)
    model.flow.class_path = f"{policy.__module__}.{policy.__qualname__}"
    all_changes: dict[str, Any] = {"flow.init_args.model": str(folder / "flow")} | dict(changes or {})
    if model.language is not None:
        write_refiner(folder / "language", refiner, tiny=tiny)
        all_changes["language.init_args.model"] = str(folder / "language")
    if tiny:
        small = {"height": 64, "width": 64, "max_sequence_length": 64} | MODELS["pipelines"][flow].get("tiny", {})
        all_changes |= {f"flow.init_args.{key}": value for key, value in small.items()}
        all_changes |= {"group_size": 4, "num_retained": 4 if model.language is None else 2}
        all_changes |= {} if model.language is None else {"language.init_args.max_new_tokens": 8}
    for key, value in all_changes.items():
        OmegaConf.update(model, key, value, merge=False)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningModule, "model", fail_untyped=False)
    parsed = parser.parse_object({"model": OmegaConf.to_container(config.model)})
    return parser.instantiate(parsed).model, config

"""Checks of model folders, and LoRA configurations, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from datamodules.jsonl import read_json
from lightning_modules.policies.adapters import matching
from lightning_modules.policies.base import LoRA
from rewards.pretrained import check_hub_id, one_line_errors

ADAPTERS = {
    "FluxPipeline": "flux1.Flux1Policy",
    "FluxKontextPipeline": "flux1_kontext.KontextPolicy",
    "Flux2KleinPipeline": "flux2.Flux2KleinPolicy",
    "StableDiffusion3Pipeline": "sd3.SD3Policy",
    "QwenImagePipeline": "qwen_image.QwenImagePolicy",
    "QwenImageEditPlusPipeline": "qwen_image_edit.QwenImageEditPolicy",
    "SanaPipeline": "sana.SanaPolicy",
    "ZImagePipeline": "z_image.ZImagePolicy",
}
"""Stock pipeline -> our adapter under `lightning_modules.policies`, for the error that a wrong one gets."""

ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
"""Kinds of layers that peft has adapters for."""


def check_pipeline(model: str, expected: str | None = None) -> None:
    """Raises a ValueError if a pipeline is of another family, or a local folder lacks a part.

    Args:
        model: folder or hub id; of the latter only `model_index.json` is fetched.
        expected: name of the stock pipeline class that the adapter is for; None accepts any.
    """
    folder = Path(model)
    if not folder.is_dir():
        check_hub_id(model)
        if expected is None:
            return
    elif not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is not a diffusers pipeline: it has no model_index.json.")
    index = _read_json(model, "model_index.json")
    found = index.get("_class_name")
    if expected is not None and found != expected:
        adapter = ADAPTERS.get(str(found))
        advice = f"use lightning_modules.policies.{adapter}" if adapter else "which no adapter here is for"
        raise ValueError(f"{model} is a {found}, not a {expected}: {advice}.")
    if folder.is_dir():
        parts = {name: value for name, value in index.items() if isinstance(value, list)}
        missing = [name for name, (library, _) in parts.items() if library and not _holds_files(folder / name)]
        if missing:
            raise ValueError(f"the pipeline folder {folder} lacks {', '.join(missing)}: copy the missing part there.")


def absent_parts(model: str) -> dict[str, None]:
    """Parts that a pipeline goes without, such as SD3's T5, each with the None that `from_pretrained` wants."""
    return {name: None for name, value in read_index(model).items() if value == [None, None]}


def read_config(model: str, part: str, name: str = "config.json") -> dict[str, Any]:
    """Reads the configuration of a pipeline's part, from its folder or from the hub."""
    return _read_json(model, f"{part}/{name}")


def read_index(model: str) -> dict[str, Any]:
    """Reads a pipeline's own configuration, `model_index.json`, from its folder or from the hub."""
    return _read_json(model, "model_index.json")


def _read_json(model: str, name: str) -> dict[str, Any]:
    path = Path(model) / name
    if not Path(model).is_dir():
        with one_line_errors(model):
            try:
                path = Path(hf_hub_download(model, name))
            except LocalEntryNotFoundError:  # a kind of EntryNotFoundError
                raise
            except EntryNotFoundError as error:
                raise ValueError(
                    f"it has no {name}; if it is a LoRA, give its base model as `flow.model` and it as `flow.lora.path`"
                ) from error
    if not path.is_file():
        raise ValueError(f"the pipeline folder {model} lacks {name}: copy it there.")
    return read_json(path)


def check_language_model(model: str) -> None:
    """Raises a ValueError if a local folder is no transformers model with a tokenizer."""
    folder = Path(model)
    if not folder.is_dir():
        check_hub_id(model)
        return
    for part, patterns in {
        "config.json": ["config.json"],
        "weights (*.safetensors)": ["*.safetensors"],
        "tokenizer (tokenizer.json or tokenizer_config.json)": ["tokenizer.json", "tokenizer_config.json"],
    }.items():
        if not any(list(folder.glob(pattern)) for pattern in patterns):
            raise ValueError(f"the language model folder {folder} lacks its {part}: copy it there.")


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def lora_config(network: nn.Module, lora: LoRA, default_targets: list[str] | str, where: str) -> LoraConfig:
    """Makes the configuration for peft, once every target is known to match a module.

    Args:
        network: network that gets the adapters.
        lora: the user's settings.
        default_targets: used when `lora.targets` is None.
        where: the argument that an error names.

    Raises:
        ValueError: if a target matches no module, or one that peft has no adapter for.
    """
    targets = lora.targets if lora.targets is not None else default_targets
    modules = dict(network.named_modules())
    groups = {targets: targets} if isinstance(targets, str) else {target: [target] for target in targets}
    found = {target: matching(modules, group) for target, group in groups.items()}
    wrong = [
        (target, name)
        for target, names in found.items()
        for name in sorted(names)
        if not isinstance(modules[name], ADAPTABLE) and any(True for _ in modules[name].parameters())
    ]
    unmatched = ", ".join(target for target, names in found.items() if not names)
    if unmatched or wrong:
        what = f"{unmatched}, which matches no module"
        if not unmatched:
            target, name = wrong[0]
            what = f"{target}, which matches {name}, a {type(modules[name]).__name__} and not a single layer,"
        raise ValueError(
            f"`{where}.targets` names {what} of {type(network).__name__}; use endings of module names such as "
            f"{_example(network)}."
        )
    rank, alpha = (64 if lora.rank is None else lora.rank), (128 if lora.alpha is None else lora.alpha)
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)


def _example(network: nn.Module) -> str:
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    endings = sorted({name.rsplit(".", 1)[-1] for name in layers})
    return ", ".join([ending for ending in endings if not ending.isdigit()][:4]) or "to_q"

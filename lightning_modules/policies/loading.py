"""Loading pipelines and adapters with errors that say what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path

from peft import LoraConfig
from torch import nn

from lightning_modules.policies.base import LoRA
from rewards.models import check_hub_id


def check_pipeline(model: str) -> None:
    """Raises a ValueError if a local pipeline folder lacks a part that its `model_index.json` names.

    Hub ids ("organisation/name") are left to the hub's own loader.
    """
    folder = Path(model)
    if not folder.is_dir():
        check_hub_id(model)
        return
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{folder} is not a diffusers pipeline: it has no model_index.json.")
    parts = {name: value for name, value in json.loads(index.read_text()).items() if isinstance(value, list)}
    missing = [name for name, (library, _) in parts.items() if library and not _holds_files(folder / name)]
    if missing:
        raise ValueError(f"the pipeline folder {folder} lacks {', '.join(missing)}: copy the missing part there.")


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
    """The configuration for peft, once every target is known to match a module.

    Args:
        network: where the adapters go.
        lora: the user's settings.
        default_targets: used when `lora.targets` is None.
        where: the argument that an error names.
    """
    targets = lora.targets if lora.targets is not None else default_targets
    names = [name for name, _ in network.named_modules()]
    if isinstance(targets, str):
        unmatched = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        unmatched = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if unmatched:
        raise ValueError(
            f"`{where}.targets` names {', '.join(unmatched)}, which matches no module of {type(network).__name__}; "
            f"use endings of module names such as {_example(network)}."
        )
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0)


def _example(network: nn.Module) -> str:
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    endings = sorted({name.rsplit(".", 1)[-1] for name in layers})
    return ", ".join([ending for ending in endings if not ending.isdigit()][:4]) or "to_q"
